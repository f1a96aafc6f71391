"""Text is taken apart into the same parts everywhere, at a cost that its writer cannot drive up."""

from __future__ import annotations

import pytest
from cpu_time import least_cpu_s
from hypothesis import example, given
from hypothesis import strategies as st

from encoder.features.text_parts import (
    MAX_PARTS,
    MAX_TEXT,
    Form,
    form_of,
    label,
    of_names,
    place_name,
    shape_of,
    take_apart,
    wider,
)

FORMS: tuple[Form, ...] = ("path", "words")


def test_a_url_is_its_segments_its_parameters_and_their_values() -> None:
    parts = take_apart("/api/users/773/Edit?id=42&name=J%C3%B6rg%20O&flag", "path")
    assert parts == [
        ("/", "api"),
        ("//api", "users"),
        ("//api/users", "773"),
        ("//api/users/0", "Edit"),
        ("&/api/users/0/edit", "id&name&flag"),
        ("?/api/users/0/edit?id", "42"),
        ("?/api/users/0/edit?name", "Jörg O"),
        ("?/api/users/0/edit?flag", ""),
    ]
    assert wider("?/api/users/0/edit?id") == ("?id", "?")
    assert of_names("?/api/users/0/edit?id") == ("=/api/users/0/edit", "id")
    assert wider("//api/users") == ("/users/", "//")
    assert label("//api/users") == "users" and label("?/api?id") == "id"


def test_what_is_escaped_is_decoded_once_and_does_not_make_parameters() -> None:
    values = [value for place, value in take_apart("/?a=1%262&b=%2527", "path") if place[0] == "?"]
    assert values == ["1&2", "%27"]


def test_a_command_line_is_its_words_each_after_the_one_before() -> None:
    parts = take_apart('"C:\\Program Files\\Tool.exe" --level=3 -f "my file.txt" x', "words")
    assert parts == [
        (">", "C:\\Program Files\\Tool.exe"),
        (" tool.exe =", "--level"),
        (" tool.exe --level", "3"),
        (" tool.exe --level", "-f"),
        (" tool.exe -f", "my file.txt"),
        (" tool.exe my_file.txt", "x"),
    ]
    assert wider(" tool.exe -f") == (" tool.exe", " ") and label(" tool.exe -f") == "-f"


def test_ids_are_no_names_of_places() -> None:
    assert place_name("users") == "users" and place_name("V2") == "v0"
    assert place_name("3F2504E0-4F89-11D3-9A0C-0305E82C3301") == "#"


def test_a_shape_is_classes_pattern_and_length() -> None:
    assert shape_of("anna.b@mail7.org")[:2] == (frozenset("a.@0"), "a.a@a0.a")
    assert shape_of("")[:2] == (frozenset([""]), "")
    assert shape_of("12345")[1] == shape_of("1")[1] == "0"
    assert shape_of("12345")[2] > shape_of("1")[2]
    assert shape_of("Ünïcödé")[1] == "éaéaéaé" and shape_of("\x00\x1f")[0] == {"\x01"}


@pytest.mark.parametrize(
    ("path", "values", "form"),
    [
        ("process.cmd_line", ["a", "b"], "words"),
        ("http_request.url.path", ["/", "/a"], "path"),
        ("unmapped.note", ["one two three", "x", "four five six"], "words"),
        ("reg_value.data", ["a\\b", "c\\d", "e"], "path"),
        ("http_request.http_method", ["GET", "POST"], None),
    ],
)
def test_the_form_follows_from_name_and_values(path: str, values: list[str], form: Form | None) -> None:
    assert form_of(path, values) == form


@given(st.text(max_size=3 * MAX_TEXT) | st.text("%&=?/\\\" '\0\ufffda1-", max_size=400), st.sampled_from(FORMS))
@example("%" * 500, "path")
@example('"' * 501, "words")
@example("?" * 300, "path")
@example("\ufffd\0" * 200, "words")
def test_any_text_has_few_parts_with_places(text: str, form: Form) -> None:
    parts = take_apart(text, form)
    assert len(parts) <= MAX_PARTS + 1
    assert parts == take_apart(text, form)
    for place, value in parts:
        assert place and len(place) < 1024 and len(value) <= MAX_TEXT
        assert all(len(name) <= len(place) + 2 and name != place for name in wider(place))
        assert shape_of(value)[1] == shape_of(value)[1][:13]
        label(place)


def test_the_beginning_and_the_end_of_a_long_text_are_read() -> None:
    parts = take_apart("/a?x=1&" + "p=1&" * 100_000 + "evil=../../etc", "path")
    assert parts[0] == ("/", "a") and parts[-2:] == [("?/a?evil", "../../etc"), ("#", "cut")]
    words = take_apart("tool " + "x" * 100_000 + " --evil", "words")
    assert words[-2][1] == "--evil"


MEGABYTE = 1 << 20
HOSTILE = {
    "one letter": "a" * MEGABYTE,
    "parameters": "/x?" + "a=1&" * (MEGABYTE // 4),
    "nested escapes": "/x?a=" + "%2525" * (MEGABYTE // 5),
    "every escape": "/x?a=" + "".join(f"%{i % 256:02x}" for i in range(MEGABYTE // 3)),
    "segments": "/a" * (MEGABYTE // 2),
    "words": "a " * (MEGABYTE // 2),
    "quotes": '"a" ' * (MEGABYTE // 4),
    "NUL": "\0" * MEGABYTE,
    "replacements": "\ufffd" * MEGABYTE,
    "beyond the plane": "é😀" * (MEGABYTE // 2),
    "changing classes": "/x?a=" + "aA0" * (MEGABYTE // 3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_costs_no_more_than_a_text_that_is_just_too_long(name: str, form: Form) -> None:
    def seconds(text: str) -> float:
        return least_cpu_s(lambda: [shape_of(value) for _, value in take_apart(text, form)], times=9)

    text = HOSTILE[name]
    allowed = 3 * seconds(text[: MAX_TEXT + 64]) + 0.0002
    assert seconds(text) < allowed
    assert seconds(text) < least_cpu_s(lambda: text.encode().decode().translate({0: "0"})), "far less than one pass"
