"""Takes text apart: parameters of a URL, segments of a path, words of a command line or a message, each with its place.

Promises one pass over at most MAX_TEXT characters and MAX_PARTS parts of any text, without backtracking, and the same
parts in every process. It does not judge (`encoder.models.text_shapes`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, TypeVar
from urllib.parse import unquote

Form = Literal["path", "words"]
"""How an attribute is taken apart: paths and URLs, or text with spaces."""

MAX_TEXT = 2048
"""Characters of a text that are taken apart: the first three quarters of so many and the last quarter."""
MAX_PARTS = 64
_MAX_PLACE = 256
"""Characters of the name of a place."""
_MAX_NAME = 64
_MAX_SHAPE = 12
QUERY = "query_string"
"""The last name of an attribute that belongs to the path of the same URL."""
USUAL_SHARE = 0.3
"""The share of the distinct values of an attribute from which on their form is that of the attribute."""
_WORDS = re.compile(r"(^|[._])(cmd_line|message|user_agent|subject|desc|comment|script_content)$")
_PATHS = re.compile(r"(^|[._])(url_string|path|query_string)$")


_Piece = TypeVar("_Piece")
Part = tuple[str, str]
"""Where a part stands, and the part. The first character of a place says of what kind it is: `?` the value of a
parameter, `&` the names of all parameters, `/` a segment, ` ` a word after another one, `>` the first word, `#` a text
that is too long."""
Shape = tuple[frozenset[str], str, int]
"""What a part looks like: its classes of characters, each once; the pattern, the classes in order, repeated letters and
digits once; and its length in half powers of two."""


def form_of(path: str, values: list[str]) -> Form | None:
    """The form of an attribute with these distinct values (training); None where it is not text."""
    if _WORDS.search(path):
        return "words"
    if _PATHS.search(path):
        return "path"
    if sum(len(value[:MAX_TEXT].split(None, 3)) > 2 for value in values) > USUAL_SHARE * len(values):
        return "words"
    slashed = sum("/" in value[:MAX_TEXT] or "\\" in value[:MAX_TEXT] for value in values)
    return "path" if slashed > USUAL_SHARE * len(values) else None


def take_apart(text: str, form: Form) -> list[Part]:
    """The parts of a text, at most MAX_PARTS; of more, the first and the last, and one that says so."""
    cut = len(text) > MAX_TEXT
    if cut:
        text = text[: MAX_TEXT * 3 // 4] + text[-MAX_TEXT // 4 :]
    parts = _words(text) if form == "words" else _url(text)
    if cut or len(parts) > MAX_PARTS:
        parts = [*_ends(parts), ("#", "cut")]
    return parts


def _ends(pieces: list[_Piece]) -> list[_Piece]:
    """All, or of more than MAX_PARTS the first three quarters and the last quarter of so many."""
    if len(pieces) <= MAX_PARTS:
        return pieces
    return pieces[: MAX_PARTS * 3 // 4] + pieces[-MAX_PARTS // 4 :]


def of_names(place: str) -> Part | None:
    """For the place of a parameter, its name as a part of its own; None for other places."""
    if place[0] != "?" or (end := place.find("?", 1)) < 0:
        return None
    return f"={place[1:end]}", place[end + 1 :]


def wider(place: str) -> tuple[str, ...]:
    """The places that a place is in, the narrowest first: of a parameter of a path the parameter of any path, then any
    parameter; of a segment under a folder the segment under any folder of that name, then any; of a word after another
    one the words that go with the first word, then any word."""
    kind = place[0]
    if kind == "?":
        return f"?{label(place)}", "?"
    if kind == "/":
        return (f"/{label(place)}/", "//") if len(place) > 1 else ("//",)
    if kind == " ":
        return place[: place.find(" ", 1)], " "
    return (kind,) if len(place) > 1 else ()


def label(place: str) -> str:
    """The name of a place for a reader: the parameter, the folder, or the word before."""
    kind = place[0]
    if kind == "?":
        return place[place.find("?", 1) + 1 :]
    return place[place.rfind(kind) + 1 :] if kind in "/ " else ""


def _words(text: str) -> list[Part]:
    """Words, options and arguments: the place of each is after the word before it, of what the first word names.
    Quoted text is one word."""
    pieces = text.split('"')
    if len(pieces) > 1:
        pieces[1::2] = [piece.replace(" ", "\0") for piece in pieces[1::2]]
        words = [word.replace("\0", " ") for word in _ends("".join(pieces).split())]
    else:
        words = _ends(text.split())
    if not words:
        return [(">", "")]
    first = place_name(_SEPARATOR.split(words[0])[-1])
    parts = [(">", words[0])]
    before = ""
    for word in words[1:]:
        if "=" in word[1:]:
            name, _, value = word.partition("=")
            parts.append((f" {first} =", name))
            before = place_name(name)
            parts.append((f" {first} {before}", value))
        else:
            parts.append((f" {first} {before}", word))
            before = place_name(word)
    return parts


def _url(text: str) -> list[Part]:
    """Segments of the path, then of a URL with a query the names of its parameters, and each value."""
    path, _, query = text.partition("?")
    parts: list[Part] = []
    above = ""
    for segment in _ends(_SEPARATOR.split(path)):
        if segment:
            parts.append((f"/{above}", _decoded(segment)))
            above = f"{above}/{place_name(segment)}"[-_MAX_PLACE:]
    if query:
        pairs = [pair.partition("=") for pair in _ends(query.split("&"))]
        if "%" in query:
            pairs = [(_decoded(name), equals, _decoded(value)) for name, equals, value in pairs]
        parts.append((f"&{above}", "&".join([name for name, _, _ in pairs])))
        of_path = f"?{above}?"
        parts += [(of_path + name[:_MAX_PLACE], value) for name, _, value in pairs]
    return parts


_SEPARATOR = re.compile(r"[\\/]")


def _decoded(text: str) -> str:
    """Percent-escapes decoded once: what is escaped twice keeps its `%`, which is odd enough."""
    return unquote(text, errors="replace") if "%" in text else text


@lru_cache(16_384)
def place_name(word: str) -> str:
    """A word as part of the name of a place: lower case, numbers as 0, ids as #."""
    word = word[:_MAX_NAME].lower()
    if word.isalpha():
        return word
    word = word.translate(_AS_PLACE)
    while "00" in word:
        word = word.replace("00", "0")
    return "#" if word.count("0") > 2 else word


def shape_of(value: str) -> Shape:
    """The shape of a part."""
    classes = (value if value.isascii() else _NOT_ASCII.sub("é", value)).translate(_CLASSES)
    pattern = classes[:64]
    for twice, once in _REPEATED:
        while twice in pattern:
            pattern = pattern.replace(twice, once)
    if len(pattern) > _MAX_SHAPE:
        pattern = pattern[:_MAX_SHAPE] + "…"
    return frozenset(classes) or _EMPTY, pattern, ((len(value) + 1) ** 2).bit_length()


_REPEATED = tuple((each * 2, each) for each in "aA0é")
_EMPTY = frozenset([""])
_DIGITS = dict.fromkeys(range(ord("0"), ord("9") + 1), "0")
_AS_PLACE = {**_DIGITS, ord(" "): "_", ord("?"): "_", ord("/"): "_"}
_NOT_ASCII = re.compile("[^\x00-\x7f\ufffd]")
_CLASSES = {
    **dict.fromkeys([*range(32), 127], "\x01"),
    **dict.fromkeys(range(ord("a"), ord("z") + 1), "a"),
    **dict.fromkeys(range(ord("A"), ord("Z") + 1), "A"),
    **_DIGITS,
}
