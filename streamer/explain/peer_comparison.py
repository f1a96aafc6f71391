"""What others of the same kind do: whether what is unusual is unusual for everybody, or for this one alone.

Others are the users, hosts, addresses or services of training, told apart by name. Promises to name nobody who is not
in an example that the bundle keeps. Examples are a part of training, so there may be more others than are found, never
fewer; where they show nothing, nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.features.normalization import number
from encoder.features.schema import FIRST
from encoder.ocsf.entities import KINDS, RULES
from encoder.ocsf.entities import entities as find_entities
from encoder.ocsf.events import Column, Coordinates, EventBatch
from streamer.redaction import MASK

if TYPE_CHECKING:
    from streamer.detection.bundle import Bundle

COUNT, VALUE, MORE, LESS, EVENT, CHANGE = "count", "value", "more", "less", "event", "change"
NAMED = 5
"""Others that are named; of more, how many there are."""
SEARCHED = 4096
"""Examples of one type and value, as the schema has it, in which exactly that value is looked for."""
EXAMINED = 256
"""Examples that are read for who they are of."""
_BY_RANK = ("user", "host", "address", "service")
"""Kinds that live long enough to have others, the first that an event names where its entity is of none of them."""

Names = dict[str, str]
"""Of one event its entities, `kind:name` by kind."""


@dataclass(frozen=True)
class PeerComparison:
    """What others of one kind of entity did in training.

    what: COUNT (reached as much), VALUE (had exactly this value in an event of this type; MORE, LESS: at least, at most
    this number), EVENT (had an event like it) or CHANGE (went from one well known partner of a sort to another within
    an hour); of: the attribute, count or sort that this is about, "" of an event; kind: of entity; count: how many did,
    but for the one that the alert is about; among: how many others training had; names: of some of those
    that did, most frequent first, without the kind; itself: whether the one that the alert is about did, too; at_least:
    not all examples were looked at, so that there may well be more.
    """

    what: str
    of: str
    kind: str
    count: int
    among: int
    names: tuple[str, ...] = ()
    itself: bool = False
    at_least: bool = False


@dataclass(frozen=True)
class PeerQuery:
    """An event whose others are looked for. entity: that the alert is about; names: all that the event names; codes:
    int32 [fields], its features; path, value: of the attribute that mattered most ("": of none), new: which no event of
    training had; near: examples of normal events that are as near to it as normal events are to each other; all_near:
    whether those are all."""

    entity: str
    names: Names
    codes: NDArray[np.int32]
    path: str
    value: Any
    new: bool
    near: Sequence[Mapping[str, Any]]
    all_near: bool


def find(bundle: Bundle, asked: PeerQuery) -> PeerComparison | None:
    """Who had the odd value, or where no value is odd, such events; None where no example tells."""
    kind = kind_of(asked.entity, asked.names, asked.path)
    if not kind:
        return None
    mine = asked.names[kind]
    if asked.path:  # What is odd about an event is not in those that are like it.
        if asked.new:
            return PeerComparison(VALUE, asked.path, kind, 0, n) if (n := _number_of_others(bundle, mine)) else None
        what, examples, whole = with_value(bundle, asked.codes, asked.path, asked.value)
        return _among(bundle, what, asked.path, mine, examples, whole)
    kin = [example for example in asked.near if str(example.get("type_uid")) == _type_of(bundle, asked.codes)]
    return _among(bundle, EVENT, "", mine, kin, asked.all_near)


def _number_of_others(bundle: Bundle, mine: str) -> int:
    rates = bundle.scorer.rates
    return len(rates.habits.others(mine, KINDS.index(mine.partition(":")[0]))) if rates is not None else 0


def _type_of(bundle: Bundle, codes: NDArray[np.int32]) -> str:
    """The type of an event, "" where training had none of it."""
    return bundle.encoder.schema.fields[0].values[codes[0] - FIRST] if codes[0] >= FIRST else ""


def names_in(events: EventBatch) -> list[Names]:
    """Of each event its entities, the first of a kind."""
    found = find_entities(events)
    names: list[Names] = [{} for _ in range(len(events))]
    for row, kind, entity in zip(found.row.tolist(), found.kind.tolist(), found.entity, strict=True):
        names[row].setdefault(KINDS[kind], entity)
    return names


def names_of(examples: Sequence[Mapping[str, Any]]) -> list[Names]:
    """The same of examples, flat as a bundle keeps them (path -> value)."""
    if not examples:
        return []
    columns: dict[str, Column] = {}
    for path in dict.fromkeys(path for rule in RULES for path in rule.paths):
        rows = [row for row, example in enumerate(examples) if path in example]
        if rows:
            columns[path] = Column(np.array(rows, np.int32), [examples[row][path] for row in rows])
    types = np.array([_number(example.get("type_uid")) for example in examples], np.int32)
    n, nothing = len(examples), np.zeros(len(examples), np.int32)
    at = Coordinates((("", 0),), nothing, nothing.astype(np.int64), nothing)
    return names_in(EventBatch(at, np.zeros(n, np.int64), types // 100, types, columns, [{}] * n))


def _number(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**31 else 0


def kind_of(entity: str, names: Names, path: str = "") -> str:
    """Whose others are told of an event: of the alert's entity, where it is of a kind that has any, else of the first
    that the event names; "" for none. path: the odd attribute, which must not be the name itself."""
    kinds = dict.fromkeys((entity.partition(":")[0], *_BY_RANK))
    return next((kind for kind in kinds if kind in _BY_RANK and kind in names and path not in _paths(kind)), "")


def _paths(kind: str) -> set[str]:
    return {path for rule in RULES if rule.kind == kind for path in rule.paths}


def with_value(
    bundle: Bundle, codes: NDArray[np.int32], path: str, value: Any
) -> tuple[str, list[dict[str, Any]], bool]:
    """VALUE and the examples of an event's type that have a value exactly as it has it; of a number MORE or LESS and
    those with at least or at most as much, as it lies above or below the middle of training. At most EXAMINED; and
    whether those are all. codes: int32 [fields], of the event."""
    fields = bundle.encoder.schema.fields
    place = next((i for i, field in enumerate(fields) if field.name == path), 0)
    if not place or codes[0] < FIRST or codes[place] < FIRST:
        return VALUE, [], True
    of_type, column, code = bundle.codes[0] == codes[0], bundle.codes[place], codes[place]
    if fields[place].kind != "number":
        rows = np.flatnonzero(of_type & (column == code))
        text = orjson.dumps({path: value})[1:-1]
        holding = [row for row in _spread(rows, SEARCHED).tolist() if text in bundle.exemplars[row]]
        found = [example for example in read(bundle, np.array(holding, np.intp), EXAMINED) if example[path] == value]
        return VALUE, found, len(rows) <= SEARCHED and len(holding) <= EXAMINED
    x, middle = number(value), fields[place].grid[len(fields[place].grid) // 2]
    if x is None:
        return VALUE, [], True
    more = x > middle
    rows = np.flatnonzero(of_type & ((column >= code) if more else (column >= FIRST) & (column <= code)))
    numbers = [(example, number(example.get(path))) for example in read(bundle, rows, EXAMINED)]
    found = [example for example, y in numbers if y is not None and (y >= x if more else y <= x)]
    return MORE if more else LESS, found, len(rows) <= EXAMINED


def read(bundle: Bundle, rows: NDArray[np.intp], most: int) -> list[dict[str, Any]]:
    """At most so many of these examples, evenly."""
    return [orjson.loads(bundle.exemplars[row]) for row in _spread(rows, most).tolist()]


def _spread(rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(np.intp)]


def _among(
    bundle: Bundle, what: str, of: str, mine: str, examples: Sequence[Mapping[str, Any]], whole: bool
) -> PeerComparison | None:
    """Who is of these examples, of the kind of `mine` (`kind:name`); None where nobody is, or nobody else as far as was
    looked. whole: whether these are all."""
    kind = mine.partition(":")[0]
    found = Counter(name for names in names_of(examples) if MASK not in (name := names.get(kind, MASK)))
    itself = found.pop(mine, 0) > 0
    if not found and not (itself and whole):
        return None
    first = sorted(found, key=lambda name: (-found[name], name))[:NAMED]
    names = tuple(name.partition(":")[2] for name in first)
    among = max(_number_of_others(bundle, mine), len(found))
    return PeerComparison(what, of, kind, len(found), among, names, itself, not whole)
