"""Compares an entity with its peers: is the unusual value unusual for all of them, or for this entity alone?

Peers are the other users, hosts, addresses or services of training, identified by name. Promises to name only entities
of examples that the bundle keeps. Examples are a part of training, so the numbers of peers are lower bounds; where the
examples show nothing, there is no comparison.
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
from encoder.features.schema import FIRST, OF_PRODUCT
from encoder.ocsf.entities import KINDS, RULES
from encoder.ocsf.entities import entities as find_entities
from encoder.ocsf.events import Column, Coordinates, EventBatch
from streamer.redaction import MASK

if TYPE_CHECKING:
    from streamer.detection.bundle import Bundle

COUNT, VALUE, MORE, LESS, EVENT, CHANGE = "count", "value", "more", "less", "event", "change"
NAMED = 5
"""Peers that are named; of further ones there is only the number."""
SEARCHED = 4096
"""Examples of one type and one normalised value that are searched for the exact value."""
EXAMINED = 256
"""Examples that are decoded to find their entities."""
_BY_RANK = ("user", "host", "address", "service")
"""Kinds of entity that live long enough to have peers. Where the alert is about another kind, the first of these that
the event names is compared."""

Names = dict[str, str]
"""The entities of one event: kind -> `kind:name`."""


@dataclass(frozen=True)
class PeerComparison:
    """What the peers of an entity did in training.

    what: COUNT (reached this count), VALUE (had exactly this value in an event of this type; MORE, LESS: at least, at
    most this number), EVENT (had a similar event) or CHANGE (went from one well known partner of a sort to another
    within an hour). of: the attribute, count or sort of partner, "" for EVENT. kind: of entity. count: how many peers
    did so, without the entity of the alert. among: how many peers training had. names: of some peers that did so, most
    frequent first, without the kind. itself: whether the entity of the alert did so, too. at_least: not all examples
    were searched, so `count` is a lower bound.
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
    """An event to compare with peers. entity: of the alert; names: all entities of the event; codes: int32 [fields],
    its features; path, value: of the attribute that contributed most (path "": none); new: no event of training had
    that value; near: normal events (examples) that are as near to it as normal events are to each other; all_near:
    `near` holds all of them."""

    entity: str
    names: Names
    codes: NDArray[np.int32]
    path: str
    value: Any
    new: bool
    near: Sequence[Mapping[str, Any]]
    all_near: bool


def find(bundle: Bundle, query: PeerQuery) -> PeerComparison | None:
    """The peers that had the unusual value or, without one, similar events; None where the examples show nothing."""
    kind = kind_of(query.entity, query.names, query.path)
    if not kind:
        return None
    mine = query.names[kind]
    if query.path:  # Similar events do not have the unusual value: search by value instead.
        if query.new:
            return PeerComparison(VALUE, query.path, kind, 0, n) if (n := _peer_count(bundle, mine)) else None
        what, examples, complete = with_value(bundle, query.codes, query.path, query.value)
        return _among(bundle, what, query.path, mine, examples, complete)
    similar = [example for example in query.near if str(example.get("type_uid")) == _type_of(bundle, query.codes)]
    return _among(bundle, EVENT, "", mine, similar, query.all_near)


def _peer_count(bundle: Bundle, mine: str) -> int:
    rates = bundle.scorer.rates
    return len(rates.profiles.peers(mine, KINDS.index(mine.partition(":")[0]))) if rates is not None else 0


def _type_of(bundle: Bundle, codes: NDArray[np.int32]) -> str:
    """The `type_uid` of an event as text, "" where it did not occur in training."""
    if codes[0] < FIRST:
        return ""
    event_type: str = bundle.encoder.schema.fields[0].values[codes[0] - FIRST]
    return event_type.partition(OF_PRODUCT)[0]


def names_in(events: EventBatch) -> list[Names]:
    """The entities of each event, the first of each kind."""
    entities = find_entities(events)
    names: list[Names] = [{} for _ in range(len(events))]
    for row, kind, entity in zip(entities.row.tolist(), entities.kind.tolist(), entities.entity, strict=True):
        names[row].setdefault(KINDS[kind], entity)
    return names


def names_of(examples: Sequence[Mapping[str, Any]]) -> list[Names]:
    """The entities of examples as a bundle keeps them (path -> value), the first of each kind."""
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
    """The kind of entity whose peers are compared: that of the alert's entity where it has peers, else the first of
    `_BY_RANK` that the event names; "" for none. path: the unusual attribute, which must not be the name itself."""
    kinds = dict.fromkeys((entity.partition(":")[0], *_BY_RANK))
    return next((kind for kind in kinds if kind in _BY_RANK and kind in names and path not in _paths(kind)), "")


def _paths(kind: str) -> set[str]:
    return {path for rule in RULES if rule.kind == kind for path in rule.paths}


def with_value(
    bundle: Bundle, codes: NDArray[np.int32], path: str, value: Any
) -> tuple[str, list[dict[str, Any]], bool]:
    """The examples of the event's type that have its value, as (what, examples, complete).

    what: VALUE, and the value is exactly the same; for a number MORE (at least as much) where it is above the median of
    training, else LESS (at most as much). examples: at most EXAMINED; complete: these are all. codes: int32 [fields],
    of the event."""
    fields = bundle.encoder.schema.fields
    place = next((i for i, field in enumerate(fields) if field.name == path), 0)
    if not place or codes[0] < FIRST or codes[place] < FIRST:
        return VALUE, [], True
    of_type, column, code = bundle.codes[0] == codes[0], bundle.codes[place], codes[place]
    if fields[place].kind != "number":
        rows = np.flatnonzero(of_type & (column == code))
        text = orjson.dumps({path: value})[1:-1]
        holding = [row for row in _spread(rows, SEARCHED).tolist() if text in bundle.exemplars[row]]
        matches = [example for example in read(bundle, np.array(holding, np.intp), EXAMINED) if example[path] == value]
        return VALUE, matches, len(rows) <= SEARCHED and len(holding) <= EXAMINED
    x, middle = number(value), fields[place].grid[len(fields[place].grid) // 2]
    if x is None:
        return VALUE, [], True
    more = x > middle
    rows = np.flatnonzero(of_type & ((column >= code) if more else (column >= FIRST) & (column <= code)))
    numbers = [(example, number(example.get(path))) for example in read(bundle, rows, EXAMINED)]
    matches = [example for example, y in numbers if y is not None and (y >= x if more else y <= x)]
    return MORE if more else LESS, matches, len(rows) <= EXAMINED


def read(bundle: Bundle, rows: NDArray[np.intp], most: int) -> list[dict[str, Any]]:
    """The examples in `rows`, decoded; of more than `most`, evenly spaced ones."""
    return [orjson.loads(bundle.exemplars[row]) for row in _spread(rows, most).tolist()]


def _spread(rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(np.intp)]


def _among(
    bundle: Bundle, what: str, of: str, mine: str, examples: Sequence[Mapping[str, Any]], complete: bool
) -> PeerComparison | None:
    """The peers among the entities of these examples, of the kind of `mine` (`kind:name`). complete: these are all
    examples there are. None where there is no such entity, or none but `mine` in an incomplete search."""
    kind = mine.partition(":")[0]
    holders = Counter(name for names in names_of(examples) if MASK not in (name := names.get(kind, MASK)))
    itself = holders.pop(mine, 0) > 0
    if not holders and not (itself and complete):
        return None
    first = sorted(holders, key=lambda name: (-holders[name], name))[:NAMED]
    names = tuple(name.partition(":")[2] for name in first)
    among = max(_peer_count(bundle, mine), len(holders))
    return PeerComparison(what, of, kind, len(holders), among, names, itself, not complete)
