"""What usually stands where in text: how unusual a part of a URL, path, command line or message is for its place.

A part has four aspects: itself, its rarest class of characters, the pattern of these classes, and its length (the
models of Kruegel and Vigna 2003, "Anomaly detection of web-based attacks"). Each is counted by place and judged as
values are (`encoder.models.rarity`): -log of the share of training events whose aspect was equally or less likely, each
judged by the other blocks of time; where every id is new, a new one is usual. A place with little history is judged by
the next wider one. A text is as unusual as its most unusual part. Promises bounded memory, and time bounded by
`text_parts.MAX_PARTS`; of the parts themselves only hashes are kept.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import Schema
from encoder.features.text_parts import (
    MAX_TEXT,
    QUERY,
    Form,
    Part,
    form_of,
    label,
    of_names,
    shape_of,
    take_apart,
    wider,
)
from encoder.models.rarity import BLOCKS, ENOUGH, HIT, SEEN, counted, no_likelier
from encoder.ocsf.events import EventBatch

_Key = TypeVar("_Key", int, str)

MAX_STRINGS = 50_000
"""Distinct texts of an attribute that training keeps."""
MAX_KEPT = 1 << 28
"""Characters of all texts that training keeps."""
MAX_LEARNT = 1 << 22
"""Characters of the distinct texts of an attribute from which training learns; of more, every k-th text."""
MAX_ENTRIES = 1 << 19
"""What is known of all places together: some 100 bytes each. The places with the fewest events are forgotten first."""
MAX_VALUES = 1024
"""What is known of one aspect of a place."""
CACHE_BYTES = 32 << 20
"""What the texts and parts whose surprise is remembered take at most, about."""
_CACHED_LENGTH = 1024
_SLOT_BYTES = 300
_IN_QUERY = ("?", "&")
ASPECTS = ("value", "symbols", "pattern", "length")


class Attribute(NamedTuple):
    """An attribute that holds text. query: the attribute with the query string of the same URL, "" for none."""

    path: str
    query: str


def attributes_of(schema: Schema) -> list[Attribute]:
    """What may be text: attributes that are neither numbers nor names of users, hosts and addresses."""
    paths = [
        field.path for field in schema.fields[1:-1] if field.kind in ("category", "presence") and not field.derives
    ]
    beside = {f"{path.removesuffix(QUERY)}path": path for path in paths if path.endswith(QUERY)}
    queries = {query for path, query in beside.items() if path in paths}
    return [Attribute(path, beside.get(path, "")) for path in paths if path not in queries]


def texts_at(events: EventBatch, attribute: Attribute) -> tuple[list[int], list[str]]:
    """The rows that have this attribute as text, ascending, and the texts; a URL with its query string."""
    column = events.columns.get(attribute.path)
    if column is None:
        return [], []
    rows, values = column.rows.tolist(), column.values
    if set(map(type, values)) != {str}:
        pairs = [(row, value) for row, value in zip(rows, values, strict=True) if type(value) is str]
        rows, values = [row for row, _ in pairs], [value for _, value in pairs]
    if attribute.path.endswith(QUERY):
        return rows, [f"?{value}" for value in values]
    if attribute.query and (query := events.columns.get(attribute.query)) is not None:
        of_row = dict(zip(query.rows.tolist(), query.values, strict=True))
        found = [of_row.get(row) for row in rows]
        values = [f"{v}?{q}" if q and type(q) is str else v for v, q in zip(values, found, strict=True)]
    return rows, values


@dataclass(frozen=True)
class Texts:
    """The texts of n events. ids: int32 [n, attributes], place in `strings` of the attribute, -1 where there is none;
    strings: of each attribute, its distinct texts in order of their first event."""

    attributes: list[Attribute]
    ids: NDArray[np.int32]
    strings: list[list[str]]

    def take(self, rows: NDArray[np.intp]) -> Texts:
        return Texts(self.attributes, self.ids[rows], self.strings)


class TextCollector:
    """Collects the texts of training in bounded memory: after MAX_STRINGS distinct texts of an attribute, or MAX_KEPT
    characters, others are left out, and of long ones only what is taken apart is kept."""

    def __init__(self, schema: Schema) -> None:
        self._attributes = attributes_of(schema)
        self._known: list[dict[str, int]] = [{} for _ in self._attributes]
        self._ids: list[NDArray[np.int32]] = []
        self._left = MAX_KEPT

    def add(self, events: EventBatch, kept: NDArray[np.intp]) -> None:
        """kept: the rows of the batch that are training events."""
        ids = np.full((len(events), len(self._attributes)), -1, np.int32)
        for place, (attribute, known) in enumerate(zip(self._attributes, self._known, strict=True)):
            rows, texts = texts_at(events, attribute)
            ids[rows, place] = [self._id(known, text) for text in texts]
        self._ids.append(ids[kept])

    def _id(self, known: dict[str, int], text: str) -> int:
        if len(text) > MAX_TEXT:
            text = text[: MAX_TEXT + 1 - MAX_TEXT // 4] + text[-MAX_TEXT // 4 :]
        if (place := known.get(text)) is not None:
            return place
        if len(known) >= MAX_STRINGS or len(text) > self._left:
            return -1
        self._left -= len(text)
        known[text] = len(known)
        return len(known) - 1

    def finish(self, order: NDArray[np.intp]) -> Texts:
        """The texts of all kept events in this order."""
        return Texts(self._attributes, np.concatenate(self._ids)[order], [list(known) for known in self._known])


class Usual(NamedTuple):
    """The most common pattern of a place, its share of the events, and the least and the greatest length of what has
    it."""

    pattern: str
    share: float
    least: int
    most: int


class Place(NamedTuple):
    """What is known of a place: its training events; for each of ASPECTS the events whose aspect was no likelier than
    one that was never seen; and by aspect the same of those that were seen. usual: what stands there most often."""

    events: float
    unseen: tuple[float, ...]
    values: dict[int, float]
    symbols: dict[str, float]
    patterns: dict[str, float]
    lengths: dict[int, float]
    usual: Usual


class TextFinding(NamedTuple):
    """The part of an event's texts that is the most unusual. path: its attribute; kind, label: of its place
    (`text_parts.Part`); usual: what stands there most often, None where training never had the place."""

    path: str
    kind: str
    label: str
    part: str
    surprise: float
    usual: Usual | None


class TextShapes:
    """Places by attribute. forms: of each attribute that is text."""

    def __init__(
        self, attributes: Sequence[tuple[Attribute, Form]] = (), places: Sequence[dict[str, Place]] = ()
    ) -> None:
        self.attributes = list(attributes)
        self.places = list(places)
        self.paths = [path for attribute, _ in self.attributes for path in (attribute.path, attribute.query)]
        self._of_text: list[dict[str, tuple[float, int]]] = [{} for _ in self.attributes]
        self._of_part: list[dict[Part, float]] = [{} for _ in self.attributes]
        self._cached = 0

    @classmethod
    def fit(cls, texts: Texts) -> TextShapes:
        """texts: of n training events in order of time."""
        attributes: list[tuple[Attribute, Form]] = []
        places: list[dict[str, Place]] = []
        block = np.arange(len(texts.ids)) * BLOCKS // max(len(texts.ids), 1)
        for at, (attribute, strings) in enumerate(zip(texts.attributes, texts.strings, strict=True)):
            ids = texts.ids[:, at]
            has = ids >= 0
            counts = np.bincount(ids[has] * BLOCKS + block[has], minlength=len(strings) * BLOCKS)
            in_block = counts.reshape(-1, BLOCKS).astype(np.float64)
            trained = np.flatnonzero(in_block.any(1))
            some = [strings[i] for i in trained.tolist()]
            if some and (form := form_of(attribute.path, some)) is not None:
                attributes.append((attribute, form))
                stride = -(-sum(min(len(text), MAX_TEXT) for text in some) // MAX_LEARNT) or 1
                places.append(_count(some[::stride], form, in_block[trained[::stride]]))
        return cls(attributes, _most_used(places))

    def __call__(self, events: EventBatch) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Of n events, the surprise of the most unusual part of their texts (float64 [n], nats; 0 without text), and
        its attribute (int32 [n], place in `paths`, -1 without text)."""
        surprise, path = np.zeros(len(events)), np.full(len(events), -1, np.int32)
        for at, (attribute, _) in enumerate(self.attributes):
            rows, texts = texts_at(events, attribute)
            if rows:
                self._raise(surprise, path, np.array(rows), self._judged(at, texts), at)
        return surprise, path

    def of_texts(self, texts: Texts) -> NDArray[np.float64]:
        """float64 [n]: the surprise of n events by their collected texts."""
        surprise, path = np.zeros(len(texts.ids)), np.full(len(texts.ids), -1, np.int32)
        known = {attribute: place for place, attribute in enumerate(texts.attributes)}
        for at, (attribute, _) in enumerate(self.attributes):
            ids = texts.ids[:, known[attribute]]
            rows = np.flatnonzero(ids >= 0)
            distinct, like = np.unique(ids[rows], return_inverse=True)
            strings = texts.strings[known[attribute]]
            judged = self._judged(at, [strings[i] for i in distinct.tolist()])
            self._raise(surprise, path, rows, [judged[i] for i in like.tolist()], at)
        return surprise

    @staticmethod
    def _raise(
        surprise: NDArray[np.float64],
        path: NDArray[np.int32],
        rows: NDArray[np.intp],
        judged: list[tuple[float, int]],
        at: int,
    ) -> None:
        if not len(rows):
            return
        found = np.array(judged)
        more = (found[:, 0] > surprise[rows]) | (path[rows] < 0)
        surprise[rows[more]] = found[more, 0]
        path[rows[more]] = 2 * at + found[more, 1].astype(np.int32)

    def _judged(self, at: int, texts: list[str]) -> list[tuple[float, int]]:
        """Of each text the surprise of its most unusual part, and whether that stands in the query string."""
        cache = self._of_text[at]
        found = [cache.get(text) for text in texts]
        return [self._judge(at, texts[i]) if known is None else known for i, known in enumerate(found)]

    def _judge(self, at: int, text: str) -> tuple[float, int]:
        cache = self._of_text[at]
        if (known := cache.get(text)) is not None:  # An equal text of this batch.
            return known
        attribute, form = self.attributes[at]
        of_part = self._of_part[at]
        most, worst = 0.0, ""
        for part in take_apart(text, form):
            if (surprise := of_part.get(part)) is None:
                surprise = self._surprise(at, *part)
                if len(part[1]) <= _CACHED_LENGTH:
                    of_part[part] = surprise
                    self._remembered(len(part[0]) + len(part[1]))
            if surprise > most:
                most, worst = surprise, part[0]
        judged = most, int(attribute.query != "" and worst[:1] in _IN_QUERY)
        if len(text) <= _CACHED_LENGTH:
            cache[text] = judged
            self._remembered(len(text))
        return judged

    def _remembered(self, characters: int) -> None:
        self._cached += characters + _SLOT_BYTES
        if self._cached > CACHE_BYTES:
            for texts, parts in zip(self._of_text, self._of_part, strict=True):
                texts.clear()
                parts.clear()
            self._cached = 0

    def _surprise(self, at: int, place: str, value: str) -> float:
        """-log p of the most unusual aspect of a part at a place."""
        known = self.places[at]
        here = known.get(place)
        if here is not None and here.events >= ENOUGH:
            chain, beyond = [here], 0.0
        else:
            names = (place, *wider(place))
            chain, beyond = [there for name in names if (there := known.get(name)) is not None], 1.0
        symbols, pattern, length = shape_of(value)
        hashed = _hash(value)
        a = b = c = d = beyond
        for events, unseen, values, of_symbols, patterns, lengths, _ in reversed(chain):
            never, strange, irregular, unusual = unseen
            events += SEEN
            a = (values.get(hashed, never) + SEEN * a) / events
            b = (min([of_symbols.get(symbol, strange) for symbol in symbols]) + SEEN * b) / events
            c = (patterns.get(pattern, irregular) + SEEN * c) / events
            d = (lengths.get(length, unusual) + SEEN * d) / events
        surprise = -math.log(min(a, b, c, d))
        if (here is None or here.events < ENOUGH) and (named := of_names(place)) is not None:
            return max(surprise, self._surprise(at, *named))
        return surprise

    def worst(self, events: EventBatch, row: int) -> TextFinding | None:
        """The most unusual part of the texts of one event; None without text."""
        best: TextFinding | None = None
        for at, (attribute, form) in enumerate(self.attributes):
            rows, texts = texts_at(events, attribute)
            for place, value in take_apart(texts[rows.index(row)], form) if row in rows else ():
                surprise = self._surprise(at, place, value)
                if best is None or surprise > best.surprise:
                    path = attribute.query if attribute.query and place[0] in _IN_QUERY else attribute.path
                    here = self.places[at].get(place)
                    best = TextFinding(path, place[0], label(place), value, surprise, here.usual if here else None)
        return best

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays from which `from_arrays` makes the same."""
        every = [place for of_attribute in self.places for place in of_attribute.values()]
        tables = [table for place in every for table in place[2:6]]
        texts = [str(key) for place in every for table in (place.symbols, place.patterns) for key in table]
        described = {
            "attributes": [
                [a.path, a.query, form, len(p)] for (a, form), p in zip(self.attributes, self.places, strict=True)
            ],
            "names": [name for of_attribute in self.places for name in of_attribute],
            "usual": [place.usual for place in every],
            "keys": texts,
        }
        return {
            "described": np.frombuffer(json.dumps(described).encode(), np.uint8),
            "events": np.array([place.events for place in every], np.float64),
            "unseen": np.array([place.unseen for place in every], np.float64).reshape(-1, len(ASPECTS)),
            "sizes": np.array([len(table) for table in tables], np.int64).reshape(-1, len(ASPECTS)),
            "hashes": np.array([key for place in every for key in place.values], np.uint64),
            "lengths": np.array([key for place in every for key in place.lengths], np.int64),
            "counts": np.array([count for table in tables for count in table.values()], np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> TextShapes:
        """Raises KeyError or ValueError where they are not of `arrays`."""
        described = json.loads(arrays["described"].tobytes())
        hashes, lengths = iter(arrays["hashes"].tolist()), iter(arrays["lengths"].tolist())
        keys, counts = iter(described["keys"]), iter(arrays["counts"].tolist())
        rows = zip(
            described["names"],
            arrays["events"].tolist(),
            arrays["unseen"].tolist(),
            arrays["sizes"].tolist(),
            described["usual"],
            strict=True,
        )
        attributes: list[tuple[Attribute, Form]] = []
        places: list[dict[str, Place]] = []
        for path, query, form, many in described["attributes"]:
            attributes.append((Attribute(path, query), form))
            of_attribute: dict[str, Place] = {}
            for _ in range(many):
                name, events, unseen, sizes, usual = next(rows)
                tables: list[dict[Any, float]] = [
                    {next(of): next(counts) for _ in range(size)}
                    for size, of in zip(sizes, (hashes, keys, keys, lengths), strict=True)
                ]
                values, symbols, patterns, by_length = tables
                of_attribute[name] = Place(events, tuple(unseen), values, symbols, patterns, by_length, Usual(*usual))
            places.append(of_attribute)
        return cls(attributes, places)


def _hash(value: str) -> int:
    return int.from_bytes(blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _count(texts: list[str], form: Form, in_block: NDArray[np.float64]) -> dict[str, Place]:
    """The places of some texts, most events first. in_block: float64 [texts, blocks], the events of each text."""
    names: dict[str, int] = {}
    patterns: dict[str, int] = {}
    symbols: dict[str, int] = {}
    values: dict[str, int] = {}
    columns = [array("q") for _ in range(6)]  # text, place, value, pattern, length, characters
    of_symbols = [array("q"), array("q")]  # row, symbol
    for text, parts in enumerate(take_apart(each, form) for each in texts):
        of_parameters = [named for place, _ in parts if (named := of_names(place)) is not None]
        for narrowest, part in (*parts, *of_parameters):
            classes, looks, length = shape_of(part)
            value = values.setdefault(part, len(values))
            pattern = patterns.setdefault(looks, len(patterns))
            of_part = [symbols.setdefault(symbol, len(symbols)) for symbol in sorted(classes)]
            for name in (narrowest, *wider(narrowest)):
                of_symbols[0].extend([len(columns[0])] * len(of_part))
                of_symbols[1].extend(of_part)
                row = (text, names.setdefault(name, len(names)), value, pattern, length, len(part))
                for column, number in zip(columns, row, strict=True):
                    column.append(number)
    if not names:
        return {}
    text_, place_, value_, pattern_, length_, characters = (np.array(column) for column in columns)
    row_, symbol_ = (np.array(column) for column in of_symbols)
    weights = in_block[text_]
    events, many = np.bincount(place_, weights.sum(1), len(names)), len(names)
    usual = _usual(place_, pattern_, characters, weights.sum(1), list(patterns), many)
    by_value, no_value = _table(*_by_place(place_, value_, weights, many), [_hash(each) for each in values])
    by_symbol, no_symbol = _table(*_by_rarest(place_, row_, symbol_, weights, many), list(symbols))
    by_pattern, no_pattern = _table(*_by_place(place_, pattern_, weights, many), list(patterns))
    by_length, no_length = _table(*_by_place(place_, length_, weights, many), list(range(int(length_.max()) + 1)))
    unseen = list(zip(no_value, no_symbol, no_pattern, no_length, strict=True))
    named_ = list(names)
    return {
        named_[i]: Place(float(events[i]), unseen[i], by_value[i], by_symbol[i], by_pattern[i], by_length[i], usual[i])
        for i in np.argsort(-events, kind="stable").tolist()
        if events[i] >= SEEN  # Of fewer, the wider place says more.
    }


def _table(
    places: NDArray[np.int64],
    keys: NDArray[np.int64],
    counts: NDArray[np.float64],
    unseen: NDArray[np.float64],
    spelled: list[_Key],
) -> tuple[list[dict[_Key, float]], list[float]]:
    """By place what was seen there, and what holds for all else; the last argument: the texts of the keys."""
    tables: list[dict[_Key, float]] = [{} for _ in unseen]
    else_ = unseen.tolist()
    order = np.lexsort((keys, -counts, places))
    for place, key, count in zip(places[order].tolist(), keys[order].tolist(), counts[order].tolist(), strict=True):
        if len(tables[place]) < MAX_VALUES:
            tables[place][spelled[key]] = count
        else:  # What is left out counts as never seen, which is no rarer than this.
            else_[place] = max(else_[place], count)
    return tables, [max(count, HIT) for count in else_]


_Counts = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Places and what was seen there, int64 [k] each; the events that were no likelier, float64 [k]; the same of what was
never seen, by place, float64 [places]."""


def _by_place(place: NDArray[np.int64], what: NDArray[np.int64], weights: NDArray[np.float64], places: int) -> _Counts:
    keys, _, in_block = counted(place << 32 | what, weights)
    known, unknown = no_likelier((keys >> 32).astype(np.intp), in_block, in_block, places)
    return keys >> 32, keys & 0xFFFFFFFF, known, unknown


def _by_rarest(
    place: NDArray[np.int64],
    row: NDArray[np.int64],
    symbol: NDArray[np.int64],
    weights: NDArray[np.float64],
    places: int,
) -> _Counts:
    """By the rarest symbol of each part. row, symbol: int64 [s], the symbols of each row of `place` and `weights`."""
    of_pair = place[row] << 32 | symbol
    keys, _, likely = counted(of_pair, weights[row])
    at = np.searchsorted(keys, of_pair)
    order = np.lexsort((at, likely.sum(1)[at], row))
    rarest = order[np.unique(row[order], return_index=True)[1]]
    blocks = [np.bincount(at[rarest], block, len(keys)) for block in weights[row[rarest]].T]
    in_block: NDArray[np.float64] = np.stack(blocks, 1).astype(np.float64)
    known, unknown = no_likelier((keys >> 32).astype(np.intp), in_block, likely, places)
    return keys >> 32, keys & 0xFFFFFFFF, known, unknown


def _usual(
    place: NDArray[np.int64],
    pattern: NDArray[np.int64],
    characters: NDArray[np.int64],
    weights: NDArray[np.float64],
    patterns: list[str],
    places: int,
) -> list[Usual]:
    """What stands most often at each place."""
    order = np.lexsort((characters, pattern, place))
    keys, first, inverse = np.unique((place << 32 | pattern)[order], return_index=True, return_inverse=True)
    mass = np.bincount(inverse, weights[order])
    last = np.append(first[1:], len(order)) - 1
    total = np.bincount(place, weights, places)
    best = np.lexsort((-mass, keys >> 32))
    best = best[np.unique((keys >> 32)[best], return_index=True)[1]]
    return [
        Usual(
            patterns[keys[i] & 0xFFFFFFFF],
            float(mass[i] / total[at]),
            int(characters[order[first[i]]]),
            int(characters[order[last[i]]]),
        )
        for at, i in enumerate(best.tolist())
    ]


def _most_used(places: list[dict[str, Place]]) -> list[dict[str, Place]]:
    """The places with the most events, as many as MAX_ENTRIES allow for."""
    ranked = sorted(
        ((place.events, at, name) for at, of_attribute in enumerate(places) for name, place in of_attribute.items()),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    left, kept = MAX_ENTRIES, [set[str]() for _ in places]
    for _, at, name in ranked:
        left -= 1 + sum(len(table) for table in places[at][name][2:6])
        if left < 0:
            break
        kept[at].add(name)
    return [
        {name: place for name, place in of_attribute.items() if name in kept[at]}
        for at, of_attribute in enumerate(places)
    ]
