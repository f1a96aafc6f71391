"""Entities: who or what each event is about, found by attribute paths that OCSF fixes, resolved by class.

Promises: the same event names the same entities in every process and batch; names are lower-cased and of bounded
length, placeholders ("-", an address of all zeros) name nobody, and an event names at most `MAX_PER_EVENT`. Does not
promise that two names are two people, and knows no tenants: whoever keeps windows puts the tenant before the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv6Address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.events import EventBatch

KINDS = ("correlation", "process", "user", "address", "host", "session", "service")
"""Kinds of entity; the first of them are kept where an event names more than `MAX_PER_EVENT`."""
MAX_PER_EVENT = 4
"""Each is a window to keep and to score."""
MAX_LENGTH = 120
"""Characters of a name; a longer one is cut and made distinct by a hash."""
_PRIMARY = ("user", "host", "address", "service", "session", "correlation", "process")
"""Whom an alert is about, the first that the event names: people before machines, what lasts before what is over in a
minute (each run of a job is another one, and alerts on it would never be one episode), a process tree by where it runs.
"""
_LAUNCH = 1007_01

_NOBODY = frozenset(
    {"", "-", "--", "?", "n/a", "na", "none", "null", "(null)", "<null>", "nil", "undefined", "unknown", "anonymous"}
    | {"<unknown process>", "anonymous logon", "null sid", "s-1-0-0", "0x0", "localhost"}
    | {"::", "::1", "0.0.0.0", "127.0.0.1"}  # noqa: S104 (nothing is bound)
    | {"00000000-0000-0000-0000-000000000000", "{00000000-0000-0000-0000-000000000000}"}
)
_LOCAL_USERS = frozenset(
    {"system", "local service", "network service", "local system", "root", "nobody", "daemon", "administrator"}
    | {"guest", "defaultaccount", "s-1-5-18", "s-1-5-19", "s-1-5-20"}
)
"""Accounts that every machine has one of: the name alone would be all machines at once."""


@dataclass(frozen=True)
class Rule:
    """Where a kind of entity is named: `paths` in order of preference; classes: class_uids for which the rule holds,
    before those that hold for all (none given)."""

    kind: str
    paths: tuple[str, ...]
    classes: tuple[int, ...] = ()


def _names(*objects: str) -> tuple[str, ...]:
    return tuple(f"{of}.{attribute}" for of in objects for attribute in ("name", "email_addr", "uid"))


RULES = (
    Rule("correlation", ("metadata.correlation_uid", "message_trace_uid")),
    Rule("process", ("actor.process.uid", "actor.process.name", "actor.process.file.name")),
    Rule("process", ("process.uid", "process.name")),
    # Whoever logs on or has rights changed by themselves is `user`; elsewhere `user` is what somebody acted on.
    Rule("user", _names("user", "actor.user"), classes=(3002, 3003)),
    Rule("user", _names("actor.user", "actor.process.user", "user", "process.user", "evidences[].actor.user")),
    Rule("address", ("src_endpoint.ip", "evidences[].src_endpoint.ip")),
    Rule("host", ("device.hostname", "device.name", "device.uid", "device.ip", "src_endpoint.hostname")),
    Rule("host", ("src_endpoint.instance_uid", "evidences[].device.hostname")),
    Rule("session", ("session.uid", "actor.session.uid", "process.session.uid")),
    Rule("service", ("service.name", "actor.app_name", "app_name")),
)
"""The defaults: attributes of OCSF 1.0 to 1.8 by their meaning, not by any source's habits."""


@dataclass(frozen=True)
class Entities:
    """The m (event, entity) pairs of n events, in stream order.

    row: int32 [m], ascending, the event; kind: int8 [m], index into `KINDS`; entity: m strings `kind:value`; primary: n
    strings, the entity that an alert on the event is about, "" where it names none.
    """

    row: NDArray[np.int32]
    kind: NDArray[np.int8]
    entity: list[str]
    primary: list[str]

    def __len__(self) -> int:
        return len(self.entity)


def _clean(text: str) -> str:
    """Text as a name, "" for a placeholder."""
    text = text.strip().lower()
    if text in _NOBODY:
        return ""
    if len(text) > MAX_LENGTH:
        return f"{text[: MAX_LENGTH - 17]}#{blake2b(text.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"
    return text


_clean_again = lru_cache(maxsize=16_384)(_clean)
"""For texts of a name's length: the cache holds them whole."""


@lru_cache(maxsize=16_384)
def _user(name: str, host: str) -> str:
    """`DOMAIN\\name` and `name` are one; an account of the machine itself is named with its host."""
    name = name.rsplit("\\", 1)[-1]
    if name in _NOBODY:
        return ""
    return f"user:{name}@{host}" if host and name in _LOCAL_USERS else f"user:{name}"


@lru_cache(maxsize=16_384)
def _local(kind: str, name: str, host: str) -> str:
    """Short ids and program names are distinct on one host only."""
    return f"{kind}:{name}@{host}" if host and len(name) < 32 and not name.startswith("{") else f"{kind}:{name}"


@lru_cache(maxsize=16_384)
def _global(kind: str, name: str) -> str:
    return f"{kind}:{_address(name) if kind == 'address' else name}"


def _address(text: str) -> str:
    """One spelling of an IPv6 address; an IPv4 address within one is that. Clouds write names here: kept."""
    if ":" not in text:
        return text
    try:
        parsed = IPv6Address(text.partition("%")[0])
    except ValueError:
        return text
    return str(parsed.ipv4_mapped or parsed)


def entities(events: EventBatch, rules: Sequence[Rule] = RULES) -> Entities:
    """Who the events are about. Raises ValueError for a rule of an unknown kind."""
    unknown = {rule.kind for rule in rules} - set(KINDS)
    if unknown:
        raise ValueError(f"entity kinds {sorted(unknown)} are not known; there are {', '.join(KINDS)}")
    hosts = _values(events, rules, "host")
    named = {kind: hosts if kind == "host" else _values(events, rules, kind) for kind in KINDS}
    columns = [(kind, _qualified(kind, named[kind], hosts)) for kind in KINDS]
    process = columns[KINDS.index("process")][1]
    launched = _qualified("process", _launched(events), hosts)
    columns.insert(KINDS.index("process") + 1, ("process", np.where(launched == process, "", launched)))
    primary = np.full(len(events), "", object)
    for kind in reversed(_PRIMARY):
        names = next(names for of, names in columns if of == kind)
        primary = np.where(names != "", names, primary)
    table = np.column_stack([names for _, names in columns])
    used = (table != "").astype(bool)
    used &= np.cumsum(used, axis=1) <= MAX_PER_EVENT
    row, column = np.nonzero(used)
    kinds = np.array([KINDS.index(kind) for kind, _ in columns], np.int8)
    return Entities(row.astype(np.int32), kinds[column], table[row, column].tolist(), primary.tolist())


def _values(events: EventBatch, rules: Sequence[Rule], kind: str) -> NDArray[np.object_]:
    """The name of each event's entity of a kind, "" for none: rules for its class first, then in the order given."""
    names = np.full(len(events), "", object)
    ordered = sorted((rule for rule in rules if rule.kind == kind), key=lambda rule: not rule.classes)
    for rule in reversed(ordered):
        for path in reversed(rule.paths):
            column = events.columns.get(path)
            if column is None:
                continue
            rows, values = column.rows, _cleaned(column.values)
            keep = values != ""
            if rule.classes:
                keep &= np.isin(events.class_uid[rows], rule.classes)
            names[rows[keep]] = values[keep]
    return names


def _launched(events: EventBatch) -> NDArray[np.object_]:
    """The process that an event starts: a process's history begins with its launch, which is an act of its parent."""
    names = np.full(len(events), "", object)
    column = events.columns.get("process.uid")
    if column is not None:
        names[column.rows] = _cleaned(column.values)
        names[events.type_uid != _LAUNCH] = ""
    return names


def _cleaned(values: list[Any]) -> NDArray[np.object_]:
    """Numbers are ids; of a list (of a path with []) the first member stands for it."""
    texts = [v if type(v) is str else str(next(iter(v), "")) if type(v) is list else str(v) for v in values]
    cleaned = [_clean_again(text) if len(text) <= 2 * MAX_LENGTH else _clean(text) for text in texts]
    return np.array(cleaned, object)


def _qualified(kind: str, names: NDArray[np.object_], hosts: NDArray[np.object_]) -> NDArray[np.object_]:
    """Values to names of entities, `kind:value`."""
    out = np.full(len(names), "", object)
    rows = np.flatnonzero(names != "")
    found, where = names[rows].tolist(), hosts[rows].tolist()
    if kind == "user":
        out[rows] = list(map(_user, found, where))
    elif kind in ("process", "session"):
        out[rows] = [_local(kind, name, host) for name, host in zip(found, where, strict=True)]
    else:
        out[rows] = [_global(kind, name) for name in found]
    return out
