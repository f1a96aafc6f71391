"""Redaction: masks secrets in alerts, exemplars and reports.

Text that looks like a secret, or stands where secrets stand (after `--password`, before the @ of a URL), is masked
within its value; the value of an attribute that is named like a secret, or that the operator lists, is masked whole.
Patterns find common forms of secrets, not all: attributes that must never appear belong in the list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

MASK = "[masked]"
_MASKED = rf"\1{MASK}"
MAX_TEXT = 4096
"""Characters kept of one value: an alert shows what happened, the stream keeps the event."""
MAX_ITEMS = 64
"""Elements kept of one list."""
MAX_DEPTH = 24
MAX_VALUES = 2048
"""Values kept of one event, so that a hostile one costs no more than a large one."""

_VALUE = r"""(?:(?P<q>\\?["'])(?:(?!(?P=q)).)*(?:(?P=q))?[^\s"'&;,\\]*|[^\s"'&;,\\]+)"""
_WORD = r"""(?:"[^"]*(?:"|\Z)|'[^']*(?:'|\Z)|[^\s"'])+"""
_NAMED = (
    r"passw(?:or)?d|passphrase|pwd(?!\s*[:=]\s*/)|(?<!\d:)secret|token|api[_-]?key|access[_-]?key|account[_-]?key"
    r"|private[_-]?key|secret[_-]?key|shared[_-]?key|sig"
)
_SAYS_NOTHING = r"(?:yes|no|true|false|null|none|-|\d|%%\d+)"
"""What stands beside `Elevated Token:` and the like, and is not worth hiding."""
_NET = r"\bnet1?(?:\.exe)?\s+"


class _Rule(NamedTuple):
    """Where one of the hints stands in the lower-cased text, what `pattern` finds becomes its group 1 and the mask."""

    hints: tuple[str, ...]
    pattern: re.Pattern[str]


def _rule(hints: str, pattern: str, flags: int = re.I) -> _Rule:
    return _Rule(tuple(hints.split("|")), re.compile(pattern, flags))


_RULES = (
    _rule("private key", r"()-----BEGIN [A-Z0-9 ]*PRIVATE KEY.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.S),
    _rule("eyj", r"()\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)*", 0),  # a JSON Web Token begins with {" in base64
    _rule("://", r"(://[^\s/:@]*:)[^\s/]+(?=@)"),
    _rule("://", r"(://)[^\s/:@]{20,}(?=@)"),
    _rule("akia|asia", r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", 0),
    _rule(
        "iqojb3jpz2lu|wogzxivyxdz|qogzxivyxdz", r"()\b(?:IQoJb3JpZ2lu|FwoGZXIvYXdz|FQoGZXIvYXdz)[\w+/=]{16,}", 0
    ),  # session tokens of AWS
    _rule("ghp_|gho_|ghs_|ghu_|ghr_|github_pat_", r"\b(gh[opsur]_|github_pat_)\w{10,}"),
    _rule("glpat-|xox|xapp-|npm_|hf_|pypi-", r"\b(glpat-|xox[abeprs]-|xapp-|npm_|hf_|pypi-)[\w-]{10,}"),
    _rule("aiza|ya29.|hvs.|hvb.|sg.", r"\b(AIza|ya29\.|hv[bs]\.|SG\.)[\w.-]{16,}", 0),
    _rule("sk-|k_live_|k_test_", r"\b(sk-|[rs]k_(?:live|test)_)[\w-]{16,}", 0),
    _rule("authorization", r"(authorization\s*[:=]\s*(?:(?:bearer|basic|digest|negotiate|ntlm|token)\s+)?)" + _VALUE),
    _rule("bearer", r"(\bbearer\s+)[\w.~+/=-]{16,}"),
    _rule("basic", r"(\bbasic\s+)(?=[a-z+/]*[0-9=])[a-z0-9+/]{8,}={0,2}"),
    _rule(
        "pass|pwd|secret|token|key|sig",
        rf"""((?:{_NAMED})(?:\\?["'])?\s*[:=]\s*)(?!\{{\\?["}}]|{_SAYS_NOTHING}(?:[\s"',;&}}]|\Z)){_VALUE}""",
    ),
    _rule(
        "pass|pwd|-pw|secret|token|key|-rp|/rp",
        r"((?<!\S)(?:--?|/)(?:password|passwd|passphrase|pass(?:in|out)?|pwd|pw|secret|token|api-?key|client-secret"
        rf"|secret-key|access-key|rp)(?:\s+|[:=]\s*))(?!-){_WORD}",
    ),
    _rule("/p:", r"((?<!\S)/p:)\S+"),
    _rule(
        "sshpass|exec|rdesktop|winrm|crackmap|nxc|login",
        r"(\b(?:sshpass|p[as]exec\w*|rdesktop|evil-winrm|crackmapexec|nxc|netexec|docker login|podman login)\b"
        rf"(?:.{{0,400}}?\s)?-p\s*){_WORD}",
        0,
    ),
    _rule("mysql|mariadb", rf"(\b(?:mysql|mariadb)\S*\s(?:.{{0,400}}?\s)?-p)(?=\S){_WORD}", 0),
    _rule("sqlcmd|bcp|osql", rf"(\b(?:sqlcmd|bcp|osql)\S*\s(?:.{{0,400}}?\s)?-P\s*){_WORD}", 0),
    _rule("ldap", rf"(\bldap\w+\s(?:.{{0,400}}?\s)?-w\s*){_WORD}", 0),
    _rule(
        "curl|wget",
        r"""(\b(?:curl|wget)\S*\s(?:.{0,400}?\s)?(?:-u|-U|--user|--proxy-user)[\s=]*["']?[^\s:"']+:)[^\s"']+""",
        0,
    ),
    _rule("net", rf"({_NET}user\s+(?!/){_WORD}\s+)(?![/*]){_WORD}"),
    _rule("net", rf"({_NET}use\s+(?:\S:\s+)?\\\\\S+\s+)(?![/*]){_WORD}"),
    _rule("net", rf"({_NET}use\s.{{0,400}}?/user:{_WORD}\s+)(?![/*]){_WORD}"),
    _rule("securestring", rf"(\bconvertto-securestring\s+(?:-string\s+)?)(?!-){_WORD}"),
)
_BARE_KEY = re.compile(
    r"(?<![\w/+=.-])(?=[A-Z0-9/+]{0,39}[a-z])(?=[a-z0-9/+]{0,39}[A-Z])(?=[A-Za-z/+]{0,39}[0-9])"
    r"[A-Za-z0-9+][A-Za-z0-9/+]{39}(?![\w/+=])"
)
"""A secret key of AWS by itself: 40 characters of base64; hexadecimal digests have no upper and lower case at once."""
_NOTHING = re.compile(f"{_SAYS_NOTHING}?", re.I)
_SECRET_ENDINGS = (
    *("password", "passwd", "passphrase", "pwd", "secret", "token", "apikey", "accesskey", "secretkey", "privatekey"),
    *("accountkey", "authorization", "cookie", "credentials"),
)


def mask_text(text: str) -> str:
    """The text with what looks like a secret masked, at most MAX_TEXT characters."""
    if len(text) < 16 and text.isalnum():  # no rule finds anything in one short word
        return text
    if len(text) > MAX_TEXT:
        return _mask(text[: MAX_TEXT - 512])[: MAX_TEXT - 512] + "…"
    return _mask_again(text) if len(text) <= 256 else _mask(text)


def _mask(text: str) -> str:
    lower = text.lower()
    for hints, pattern in _RULES:
        for hint in hints:
            if hint in lower:
                text = pattern.sub(_MASKED, text)
                break
    return _BARE_KEY.sub(MASK, text) if len(text) >= 40 else text


_mask_again = lru_cache(maxsize=8192)(_mask)
"""Hosts, users and programs come again in every alert."""


def names_a_secret(name: str) -> bool:
    """Whether an attribute, header or variable of this name holds a secret: `DB_PASSWORD`, `accessToken`, `Cookie`."""
    return _ends_like_a_secret(name[-256:])  # The cache holds it.


@lru_cache(maxsize=8192)
def _ends_like_a_secret(name: str) -> bool:
    plain = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    return plain.endswith(_SECRET_ENDINGS)


@dataclass(frozen=True)
class Redacted:
    """A copy of an event that may be shown. hidden: the texts that stood in listed attributes, lower case; cut: whether
    something was left out for its size; unknown: the event is not at hand, so each name may be one of those."""

    record: dict[str, Any]
    hidden: frozenset[str]
    cut: bool
    unknown: bool = False

    def text(self, name: str) -> str:
        """A name that stands in the event, as it may be shown."""
        return MASK if self.unknown or name.lower() in self.hidden else mask_text(name)

    def entity(self, entity: str) -> str:
        """An entity of the event, `kind:name`, as it may be shown."""
        kind, _, name = entity.partition(":")
        return f"{kind}:{self.text(name)}" if name else kind


class Redactor:
    """Masks events and single values. attributes: paths (`actor.user.email_addr`, list brackets left out) whose values,
    and everything below them, are masked whole, beside those that `names_a_secret`."""

    def __init__(self, attributes: Collection[str] = ()) -> None:
        self._listed = frozenset(path.replace("[]", "").lower() for path in attributes)

    def lists(self, path: str) -> bool:
        """Whether the value at this attribute path is masked whole."""
        path = path.replace("[]", "").lower()
        if names_a_secret(path.rsplit(".", 1)[-1]):
            return True
        if not self._listed:
            return False
        parts = path.split(".")
        return any(".".join(parts[:n]) in self._listed for n in range(1, len(parts) + 1))

    def text(self, path: str, text: str) -> str:
        """The value at a path as it may be shown."""
        return MASK if text and self.lists(path) else mask_text(text)

    def record(self, record: Mapping[str, Any]) -> Redacted:
        """A copy of the event as it may be shown; values that JSON cannot hold become text."""
        walk = _Walk(self._listed)
        copy = walk.object("", record, 0)
        return Redacted(copy, frozenset(walk.hidden), walk.cut, unknown=bool(self._listed and not record))


class _Walk:
    def __init__(self, listed: frozenset[str]) -> None:
        self.listed = listed
        self.left = MAX_VALUES
        self.hidden: set[str] = set()
        self.cut = False

    def object(self, path: str, record: Mapping[str, Any], depth: int) -> dict[str, Any]:
        copy: dict[str, Any] = {}
        name = record.get("name")
        pair_is_secret = isinstance(name, str) and "value" in record and names_a_secret(name)
        for key, value in record.items():
            self.left -= 1
            if self.left < 0:
                self.cut = True
                break
            key = str(key)
            below = f"{path}.{key.lower()}" if self.listed and path else key.lower()
            if below in self.listed:
                self.hide(value)
                copy[key] = MASK
            elif names_a_secret(key) or (pair_is_secret and key == "value"):
                copy[key] = value if _NOTHING.fullmatch(str(value)) else MASK
            else:
                copy[key] = self.value(below, value, depth)
        return copy

    def value(self, path: str, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            self.cut = self.cut or len(value) > MAX_TEXT
            return mask_text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= MAX_DEPTH:
            self.cut = True
            return "…"
        if isinstance(value, Mapping):
            return self.object(path, value, depth + 1)
        if isinstance(value, list | tuple):
            self.cut = self.cut or len(value) > MAX_ITEMS
            self.left -= len(value[:MAX_ITEMS])
            return [self.value(path, item, depth + 1) for item in value[:MAX_ITEMS]]
        return mask_text(str(value))

    def hide(self, value: Any) -> None:
        """Record the masked texts, so that they are also masked elsewhere (in names of entities)."""
        stack = [value]
        while stack and len(self.hidden) < MAX_ITEMS:
            item = stack.pop()
            if isinstance(item, Mapping):
                stack.extend(item.values())
            elif isinstance(item, list | tuple):
                stack.extend(item[:MAX_ITEMS])
            elif item is not None and str(item):
                self.hidden.add(str(item).lower())
