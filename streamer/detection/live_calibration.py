"""Live calibration: how often evidence as strong as this one has come lately, where that is far more often than in
training.

Two things make evidence common that calibration holds for rare: values that a deployment brings (each event has one
that training did not have), and a part whose scores have moved. Both are learned here from counts of the last day, by
event type: the events are divided by which attributes hold a value that training did not have, and of each group it is
counted how many reach certain levels of evidence. Evidence is then lowered to -log of the share of live events of the
type that lie in the same group and reach it. An event that stands out of its group keeps what it has.

Promises: decisions are made at hours of event time from the hours before alone, and hold for events from then on;
scores do not depend on how an ordered stream was cut into batches; memory is bounded. It never raises evidence. Pure:
it takes arrays, and remembers counts and decisions. `streamer.alerting.threshold_ledger` keeps both in Kafka.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import FIRST, OF_PRODUCT, UNKNOWN, Schema
from encoder.models.record_encoder import RecordEncoder
from encoder.ocsf.event_time import NO_TIME
from streamer.detection.record_score import FOR_ACTOR, FOR_TYPE, PARTS

HOUR_MS = 3_600_000
DAY_H = 24
SPANS_H = DAY_H, 1
"""Hours over which shares are taken; the larger share counts: what a deployment changes shows in the last hour, what
comes back each day in the day."""
LEVELS: NDArray[np.float64] = -np.log([0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6, 1e-7, 1e-9])
"""Nats: the evidence at which events are counted. Between two levels, the share is interpolated."""
UNUSUAL = 1
"""The place of p = .01 in LEVELS."""
VOICE = 0.15
"""A part says nothing any more where at least this share of the live events of a type has a p-value under .01. An
attack that makes up a tenth of the events does not silence it."""
NEWS = 0.01
"""A value that training did not have is no news where at least this share of the live events of the type has one in
the same attribute."""
TIMES = 3.0
"""And where that is so many times what the bundle expects."""
BULK = 0.15
"""The share of a group that may stand out of it. Evidence is lowered by what all but these have in common: a few
attacks among many new values keep what they have beyond that, however many they are."""
PRIOR = 200.0
"""Events as promised by calibration that are added to those counted, so that a few events decide nothing."""
FEWEST = 1e-6
"""A share of a group that stands for none."""
MAX_GROUPS = 256
"""Groups counted in an hour. Events of further groups count for their type alone."""
BITS = 128
"""Size of the bitmap that entities are counted with (linear counting, Whang et al. 1990); it tells up to about 600."""
KEPT = 1024
"""Decisions to judge by: six weeks of them. An event that is older is judged by the first of these."""
RECOUNTED = PARTS.index(FOR_ACTOR), PARTS.index(FOR_TYPE)
"""The places of the parts that are counted again without the new values: their evidence for values never seen has an
upper end, so it does not tell one new value from two."""
_WEIGHTS = np.random.default_rng(0).integers(1 << 8, 1 << 63, 4096).astype(np.uint64)
"""The sum of those of the unknown fields tells one pattern of unknown fields from another."""


class RecordParts(Protocol):
    """What is needed of the record score."""

    def without_news(self, rows: NDArray[np.intp], columns: Sequence[int]) -> NDArray[np.float64]:
        """float64 [parts, rows], nats: the parts of some events of the batch, had training known the values that they
        have in these discrete fields. Only those of RECOUNTED differ."""
        ...

    def joint(self, parts: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [parts, n], nats, and the codes of the event types, int64 [n], to float64 [n]: all parts as one."""
        ...


@dataclass(frozen=True)
class Group:
    """Events of one type and hour with unknown values in the same attributes. events: how many; entities: bitmap of
    their entities, without unknown values only of those with a p-value under .01; counts: int64 [parts, levels],
    how many reach each of LEVELS by each part."""

    events: int
    entities: int
    counts: NDArray[np.int64]

    def __add__(self, other: Group) -> Group:
        return Group(self.events + other.events, self.entities | other.entities, self.counts + other.counts)


@dataclass(frozen=True)
class HourTally:
    """What an hour held. types: by event type (as in the schema, "" for one that training did not have) the events and
    the bitmap of their entities; groups: by event type and the attributes with unknown values; latest: the latest event
    time, -1 for none."""

    types: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    groups: Mapping[tuple[str, tuple[str, ...]], Group] = field(default_factory=dict)
    latest: int = -1

    def __add__(self, other: HourTally) -> HourTally:
        types, groups = dict(self.types), dict(self.groups)
        for name, (events, entities) in other.types.items():
            known, known_entities = types.get(name, (0, 0))
            types[name] = known + events, known_entities | entities
        for key, group in other.groups.items():
            if key in groups:
                groups[key] = groups[key] + group
            elif len(groups) < MAX_GROUPS:
                groups[key] = group
        return HourTally(types, groups, max(self.latest, other.latest))

    def to_json(self) -> dict[str, Any]:
        """As JSON values. Counts end with the last that is not 0."""
        groups = [
            [name, list(fields), group.events, f"{group.entities:x}", [_trimmed(row) for row in group.counts.tolist()]]
            for (name, fields), group in self.groups.items()
        ]
        types = {name: [events, f"{entities:x}"] for name, (events, entities) in self.types.items()}
        return {"types": types, "groups": groups, "latest": self.latest}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HourTally:
        """The inverse of `to_json`."""
        groups = {}
        for name, fields, events, entities, rows in value["groups"]:
            counts = np.zeros((len(PARTS), len(LEVELS)), np.int64)
            for row, known in zip(counts, rows, strict=False):
                row[: len(known)] = known[: len(row)]
            groups[name, tuple(fields)] = Group(events, int(entities, 16), counts)
        types = {name: (events, int(entities, 16)) for name, (events, entities) in value["types"].items()}
        return cls(types, groups, value["latest"])


@dataclass(frozen=True)
class Lowered:
    """Evidence of which less is believed. type_uid: of these events, with the product where the schema has it; fields:
    the attributes whose unknown values are no news, in order; empty where parts speak too often without any; share: of
    the live events of the type; parts: those that speak too often (without `fields`); since: event time (ms) from which
    on it holds; caps: nats [parts, levels], what evidence of each of LEVELS counts, for each of PARTS. With `fields`,
    those of RECOUNTED say instead what the new values may still say."""

    type_uid: str
    fields: tuple[str, ...]
    share: float
    parts: tuple[str, ...]
    since: int
    caps: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        if self.fields:
            return f"new values of {', '.join(self.fields)} in {self.share:.0%} of the events of type {self.type_uid}"
        return f"{', '.join(self.parts)}: under .01 in {self.share:.0%} of the events of type {self.type_uid}"


@dataclass(frozen=True)
class Decision:
    """What is lowered from an event time (ms) on, until the next decision."""

    start: int
    lowered: tuple[Lowered, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "start": self.start,
            "lowered": [{name: getattr(each, name) for name in Lowered.__dataclass_fields__} for each in self.lowered],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decision:
        """The inverse of `to_json`."""
        lowered = []
        for each in value["lowered"]:
            caps = tuple(tuple(map(float, row)) for row in each["caps"])
            texts = {name: tuple(each[name]) for name in ("fields", "parts")}
            lowered.append(Lowered(**{**each, **texts, "caps": caps}))
        return cls(int(value["start"]), tuple(lowered))


@dataclass(frozen=True)
class Evidence:
    """n events as the live calibration sees them.

    time: int64 [n], ms; types: int64 [n], codes of the event type; unknown: bool [n, discrete fields], where training
    did not have the value; entity: n names, "" for none; parts: float64 [parts, n] and record: float64 [n], nats, of
    each part and of all together.
    """

    time: NDArray[np.int64]
    types: NDArray[np.int64]
    unknown: NDArray[np.bool_]
    entity: Sequence[str]
    parts: NDArray[np.float64]
    record: NDArray[np.float64]


@dataclass
class LiveCalibration:
    """The decisions of one tenant and bundle, and what they are made from.

    Args:
        bundle: its version; counts and decisions of another say nothing of it.
        types: the event types by code less FIRST; fields: the names of the discrete fields, by column.
        usual: (event type, field) -> the share of unknown values that the bundle expects.
        decisions: the recorded ones, by start.
        tallies: of the hours (event time over HOUR_MS) of this process's part of the stream.
        elsewhere: the same, of what others judge.
        withdrawn: (`type_uid`, attribute path) -> event time (ms) until which nothing is learned of it; "" for parts.
        moves: whether this process decides, or takes the decisions that it is given.
    """

    bundle: str
    types: tuple[str, ...]
    fields: tuple[str, ...]
    usual: Mapping[tuple[str, str], float] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    tallies: dict[int, HourTally] = field(default_factory=dict)
    elsewhere: dict[int, HourTally] = field(default_factory=dict)
    withdrawn: Mapping[tuple[str, str], int] = field(default_factory=dict)
    moves: bool = False

    @classmethod
    def of(cls, encoder: RecordEncoder, bundle: str) -> LiveCalibration:
        """Nothing learned yet, and nothing decided here."""
        schema, types = encoder.schema, encoder.schema.fields[0].values
        nats = encoder.unknown_surprise()[FIRST:].tolist()
        usual = {
            (name, field): float(np.exp(-surprise))
            for name, of_type in zip(types, nats, strict=True)
            for field, surprise in zip(encoder.rarity.names, of_type, strict=True)
        }
        return cls(bundle, types, tuple(schema.fields[i].name for i in discrete(schema)), usual)

    def copy(self) -> LiveCalibration:
        """One that may go its own way."""
        return replace(self, decisions=[*self.decisions], tallies={**self.tallies}, elsewhere={**self.elsewhere})

    def judge(self, seen: Evidence, score: RecordParts) -> tuple[NDArray[np.float64], NDArray[np.object_]]:
        """The evidence that counts (float64 [n], nats) of n events, and for each the `Lowered` that it is under (object
        [n], None for none). Counts the events, and decides where they reach a new hour."""
        record, under = seen.record.copy(), np.full(len(seen.time), None, object)
        newest = np.maximum(
            np.maximum.accumulate(seen.time), max((*self.tallies, *self.elsewhere), default=0) * HOUR_MS
        )
        time = np.where(seen.time == NO_TIME, newest, seen.time)
        hours = time // HOUR_MS
        for hour in np.unique(hours).tolist():
            rows = np.flatnonzero(hours == hour)
            if self.moves:
                self.advance(hour)
            self._lower(seen, score, time, rows, record, under)
            tally = self._counted(seen, rows, int(time[rows].max()))
            self.tallies[hour] = self.tallies.get(hour, HourTally()) + tally
            self.forget(hour * HOUR_MS)
        return record, under

    def advance(self, hour: int) -> None:
        """Decide for an hour, unless it or a later one is decided."""
        if self.decisions and hour <= self.decisions[-1].start // HOUR_MS:
            return
        start = hour * HOUR_MS
        if self.elsewhere:  # What others have judged was judged by the decision before.
            start = max(start, 1 + max(tally.latest for tally in self.elsewhere.values()))
        self.decisions.append(Decision(start, tuple(self._decide(hour, start))))
        del self.decisions[:-KEPT]

    def forget(self, now: int) -> None:
        """Drop what no decision needs from this event time (ms) on."""
        for counted in (self.tallies, self.elsewhere):
            for old in [old for old in counted if old < now // HOUR_MS - DAY_H]:
                del counted[old]

    @property
    def lowered(self) -> tuple[Lowered, ...]:
        """What the latest decision lowers."""
        return self.decisions[-1].lowered if self.decisions else ()

    def _lower(
        self,
        seen: Evidence,
        score: RecordParts,
        time: NDArray[np.int64],
        rows: NDArray[np.intp],
        record: NDArray[np.float64],
        under: NDArray[np.object_],
    ) -> None:
        """Lower the evidence of these rows, in place."""
        place = np.searchsorted([decision.start for decision in self.decisions], time[rows], side="right") - 1
        for at in np.unique(place[place >= 0]).tolist():
            of_decision = rows[place == at]
            for name in {each.type_uid for each in self.decisions[at].lowered}:
                of_type = of_decision[seen.types[of_decision] == self._code(name)]
                if not len(of_type):
                    continue
                lowered = [each for each in self.decisions[at].lowered if each.type_uid == name]
                worn = sorted({column for each in lowered for column in self._columns(each.fields)})
                unknown = seen.unknown[of_type][:, worn]
                for each in lowered:
                    pattern = np.isin(worn, self._columns(each.fields))
                    chosen = of_type[(unknown == pattern).all(1)]
                    parts = np.stack([_capped(e, cap) for e, cap in zip(seen.parts[:, chosen], each.caps, strict=True)])
                    if each.fields:
                        rest = score.without_news(chosen, self._columns(each.fields))
                        for part in RECOUNTED:
                            news = np.minimum(seen.parts[part, chosen], each.caps[part][0])
                            parts[part] = np.minimum(np.maximum(rest[part], news), seen.parts[part, chosen])
                    record[chosen] = np.minimum(score.joint(parts, seen.types[chosen]), seen.record[chosen])
                    under[chosen] = each

    def _counted(self, seen: Evidence, rows: NDArray[np.intp], latest: int) -> HourTally:
        types, unknown = seen.types[rows], seen.unknown[rows]
        bit_of = {name: crc32(name.encode("utf-8", "replace")) % BITS for name in set(seen.entity)}
        bit = np.array([bit_of[name] for name in seen.entity], np.int64)[rows]
        codes, type_of = np.unique(types, return_inverse=True)
        entities = _bitmaps(type_of, bit, len(codes))
        by_type = {
            self._name(code): (events, of_type)
            for code, events, of_type in zip(codes.tolist(), np.bincount(type_of).tolist(), entities, strict=True)
        }
        pattern = np.zeros(len(rows), np.uint64)
        some = np.flatnonzero(unknown.any(1))
        pattern[some] = (unknown[some] * _WEIGHTS[np.arange(unknown.shape[1]) % len(_WEIGHTS)]).sum(1)
        _, first, group_of, size = np.unique(
            pattern + types.astype(np.uint64), return_index=True, return_inverse=True, return_counts=True
        )
        reached = np.searchsorted(LEVELS, seen.parts[:, rows], side="right")  # [parts, n], how many levels
        width, height = len(LEVELS) + 1, len(reached)
        place = (group_of * height + np.arange(height)[:, None]) * width + reached
        exactly = np.bincount(place.ravel(), minlength=len(first) * height * width).reshape(-1, height, width)
        counts = exactly[:, :, ::-1].cumsum(2)[:, :, -2::-1]
        news: NDArray[np.bool_] = np.asarray(unknown[first], np.bool_)
        spoken = np.any(news, axis=1)[group_of] | (reached > UNUSUAL).any(0)
        entities = _bitmaps(group_of[spoken], bit[spoken], len(first))
        groups: dict[tuple[str, tuple[str, ...]], Group] = {}
        for group in np.argsort(-size, kind="stable")[:MAX_GROUPS].tolist():
            columns = np.flatnonzero(news[group]).tolist()
            key = self._name(int(types[first[group]])), tuple(self.fields[column] for column in columns)
            groups[key] = Group(int(size[group]), entities[group], counts[group])
        return HourTally(by_type, groups, latest)

    def _decide(self, hour: int, start: int) -> Iterable[Lowered]:
        """From the hours of the last day."""
        before = range(hour - DAY_H, hour)
        day = [self.tallies.get(h, HourTally()) + self.elsewhere.get(h, HourTally()) for h in before]
        previous = {(each.type_uid, each.fields): each.since for each in self.lowered}
        withdrawn = {key for key, until in self.withdrawn.items() if until > start}
        for name in sorted({name for tally in day for name in tally.types}):
            spans = [_Span(name, day[-hours:], day) for hours in SPANS_H]
            seen = {each for fields in spans[0].patterns for each in fields}
            type_uid = name.partition(OF_PRODUCT)[0]
            seen = {each for each in seen if (type_uid, path_of(each)) not in withdrawn}
            usual = {each: self.usual.get((name, each), 0.0) for each in seen}
            worn = {each for each in seen if any(span.is_no_news(each, usual[each]) for span in spans)}
            patterns = {tuple(x for x in fields if x in worn) for fields in spans[0].patterns}
            for pattern in sorted(patterns | {()}):
                if not pattern and (type_uid, "") in withdrawn:
                    continue
                since = previous.get((name, pattern), start)
                found = [each for span in spans for each in _lowered(span, pattern, worn, since)]
                if found:
                    most = max(found, key=lambda each: each.share)
                    caps = np.min([each.caps for each in found], 0).tolist()
                    yield replace(most, caps=tuple(map(tuple, caps)))

    def _columns(self, fields: Sequence[str]) -> list[int]:
        """Of fields that another schema has, none."""
        return [self.fields.index(field) for field in fields if field in self.fields]

    def _name(self, code: int) -> str:
        return self.types[code - FIRST] if code >= FIRST else ""

    def _code(self, name: str) -> int:
        return self.types.index(name) + FIRST if name in self.types else UNKNOWN


def path_of(field: str) -> str:
    """The attribute that a field reads, from the name of the field."""
    return field.partition("#")[0]


def discrete(schema: Schema) -> list[int]:
    """The fields whose unknown values are counted: all that are no numbers, but the event type."""
    return [i for i, field in enumerate(schema.fields) if i and field.kind != "number"]


@dataclass(frozen=True)
class _Groups:
    """Groups of one event type in a day, together. share: of the live events, as their entities allow; counts: float64
    [parts, levels], how many reach each of LEVELS, too."""

    events: int
    share: float
    counts: NDArray[np.float64]


class _Span:
    """Some hours of one event type: the last of a day. A quiet hour counts as an hour with as many events and entities
    as the others had, so that whoever is alone in it teaches little."""

    def __init__(self, name: str, hours: Sequence[HourTally], day: Sequence[HourTally]) -> None:
        self.name = name
        self._hours = [{f: group for (t, f), group in tally.groups.items() if t == name} for tally in hours]
        known = [(of[0], _distinct(of[1])) for tally in day if (of := tally.types.get(name))]
        usual = np.mean(known, 0) * min(len(hours), len(known))
        own = [tally.types.get(name, (0, 0)) for tally in hours]
        self.events = max(float(sum(events for events, _ in own)), float(usual[0]))
        self._entity_hours = max(sum(_distinct(entities) for _, entities in own), float(usual[1]))
        self.patterns = {fields for of_hour in self._hours for fields in of_hour}

    def those_with(self, among: set[str], fields: set[str]) -> _Groups:
        """The groups that have unknown values in exactly these of some fields. An entity counts once an hour, so a few
        entities cannot teach what holds for all."""
        chosen = [[group for f, group in of_hour.items() if among & set(f) == fields] for of_hour in self._hours]
        groups = [group for of_hour in chosen for group in of_hour]
        events = sum(group.events for group in groups)
        entities = sum(_distinct(_union(of_hour)) for of_hour in chosen) / self._entity_hours
        allowed = min(1.0, entities * self.events / max(events, 1))
        counts = np.zeros((len(PARTS), len(LEVELS)))
        for group in groups:
            counts += allowed * group.counts
        return _Groups(events, allowed * events / max(self.events, 1), counts)

    def is_no_news(self, field: str, usual: float) -> bool:
        """Whether unknown values of an attribute are common by now, and far more so than was expected."""
        share = self.those_with({field}, {field}).share
        return share * self.events >= NEWS * (self.events + PRIOR) and share >= TIMES * usual


def _lowered(span: _Span, pattern: tuple[str, ...], worn: set[str], since: int) -> Iterator[Lowered]:
    """What is lowered of the events with unknown values in exactly these of the worn attributes, if anything is."""
    group = span.those_with(worn, set(pattern))
    if not group.events:
        return
    unusual = (group.counts[:, UNUSUAL] + PRIOR * np.exp(-LEVELS[UNUSUAL])) / (span.events + PRIOR)
    loud = tuple(part for part, share in zip(PARTS, unusual.tolist(), strict=True) if share >= VOICE)
    if not pattern and not loud:
        return
    # Training had as good as no such group, but the usual events as calibration says.
    promised = 0.0 if pattern else PRIOR
    share = (group.share * span.events + promised) / (span.events + PRIOR)
    within = (group.counts + promised * np.exp(-LEVELS)) / (group.share * span.events + promised)
    caps = [_caps(share, np.maximum(row, FEWEST)) for row in within]
    if pattern:
        for part in RECOUNTED:
            caps[part] = (float(f"{-np.log(share):.6g}"),) * len(LEVELS)
    common = group.share if pattern else float(unusual.max())
    yield Lowered(span.name, pattern, float(f"{common:.3g}"), () if pattern else loud, since, tuple(caps))


def _caps(share: float, within: NDArray[np.float64]) -> tuple[float, ...]:
    """What evidence of each of LEVELS counts: -log of the live share that reaches it, up to the evidence that BULK of
    the group reach; what an event has beyond that counts in full. share: of the group among the events of the type;
    within: float64 [levels], of the group."""
    within = np.append(1.0, within)
    levels, nats = np.append(0.0, LEVELS), np.maximum(-np.log(share * within), 0.0)
    last = int(np.flatnonzero(within >= BULK)[-1])
    bulk, counts = levels[last], nats[last]
    if last + 1 < len(levels):
        ahead = np.log(within[last] / BULK) / np.log(within[last] / within[last + 1])
        bulk, counts = bulk + ahead * (levels[last + 1] - bulk), counts + ahead * (nats[last + 1] - counts)
    caps = np.where(levels > bulk, counts + levels - bulk, nats)
    # Sums of floating-point numbers depend on their order, so the last digits go.
    return tuple(float(f"{cap:.6g}") for cap in caps[1:])


def _capped(evidence: NDArray[np.float64], caps: Sequence[float]) -> NDArray[np.float64]:
    """float64 [n], nats: evidence as live events make it, at most what it was. caps: of evidence at LEVELS."""
    lowered = np.interp(evidence, [0.0, *LEVELS], [0.0, *caps]) + np.maximum(evidence - LEVELS[-1], 0.0)
    smaller: NDArray[np.float64] = np.minimum(evidence, lowered)
    return smaller


def _bitmaps(group: NDArray[np.intp], bit: NDArray[np.int64], groups: int) -> list[int]:
    """Of each of some groups, the bits of its rows."""
    there = np.zeros((groups, BITS), np.bool_)
    there[group, bit] = True
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(there, axis=1, bitorder="little")]


def _union(groups: Iterable[Group]) -> int:
    entities = 0
    for group in groups:
        entities |= group.entities
    return entities


def _distinct(bitmap: int) -> float:
    """How many entities a bitmap holds, by linear counting."""
    empty = BITS - bitmap.bit_count()
    return BITS * float(np.log(BITS / max(empty, 0.5)))


def _trimmed(row: list[int]) -> list[int]:
    while row and not row[-1]:
        row.pop()
    return row
