"""The detector: a function from a batch of raw events to a batch of scored events.

It does not know where the events came from: the Kafka loop, `ripcurrent score`, replay, evaluation and the benchmark
all call it. Promises that a score depends on the event, its entities' windows and the bundle alone, not on how the
stream was cut into batches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from encoder.acts import acts
from encoder.entities import KINDS, Entities
from encoder.entities import entities as find_entities
from encoder.events import Coordinates, EventBatch, Message, Reject, decode
from encoder.runtime import Encoded
from encoder.schema import UNKNOWN, Field, Schema
from encoder.values import FOLDER, WORD, derived, normalise
from encoder.vectorize import FeatureBatch
from state.tally import LEVELS
from state.timers import Heard, MemoryTimers, Silence, TimerStore
from state.windows import WindowEntries, Windows, WindowStore
from streamer import much, wording
from streamer.at_once import CAUSES as AT_ONCE
from streamer.bundle import Bundle, load
from streamer.drift import Drift
from streamer.left_out import cut, weights
from streamer.much import RateFinding
from streamer.remembering import Remembering
from streamer.scoring import DENSITY_TRUST, NEIGHBOURS, Parts, RateScorer, severity, weighed
from streamer.silences import CAUSE as SILENCE
from streamer.silences import Watch, coordinates_of, rows_of, unpack

if TYPE_CHECKING:
    from pathlib import Path

    from state.redis_windows import RedisWindows
    from streamer.settings import Settings


@dataclass(frozen=True)
class ScoredBatch:
    """n scored events.

    coordinates, time: as in `EventBatch`; p_value: float64 [n] in (0, 1], how often normal data scores at least this;
    severity: float32 [n], 0 to 100; entity: str object [n] (`kind:value`, "" where the event names none); cause: str
    object [n] (`record:ATTRIBUTE PATH`, `sequence:WHAT`, `rate:WHAT` or `first:WHAT`); records: the n decoded events;
    rejects: what could not be read; repairs: how often each kind of repair was made; complete: bool [n], False where
    the history of an entity is known to be missing (None: nothing is); line: float64 [n], the p-value at or under which
    each event is an alert (None: whoever scored did not ask); level: uint8 [n], of a rate the level that the event
    raised its count to (`state.tally`; None: no cause is a rate); silences: the k last events of entities that fell
    silent, as event time moved on by these events, judged by that (None: nobody did); of those, told: intp [k],
    ascending, the rows here at which that was clear.
    """

    coordinates: Coordinates
    time: NDArray[np.int64]
    p_value: NDArray[np.float64]
    severity: NDArray[np.float32]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    records: list[dict[str, Any]]
    rejects: list[Reject]
    repairs: Counter[str] = field(default_factory=Counter)
    complete: NDArray[np.bool_] | None = None
    line: NDArray[np.float64] | None = None
    level: NDArray[np.uint8] | None = None
    silences: ScoredBatch | None = None
    told: NDArray[np.intp] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def story(self, row: int) -> str:
        """What an alert on this event would be about: events of one story spend the budget once."""
        return f"{self.cause[row]} {self.entity[row]}" if self.entity[row] else ""


@dataclass(frozen=True)
class FieldFinding:
    """One attribute that mattered: what was observed, what else was expected with its probability, and -log p in nats.

    given: who acts, where the value is odd for that actor more than for events of this type; new: training had no such
    value at all.
    """

    path: str
    observed: str
    expected: tuple[tuple[str, float], ...]
    surprise: float
    given: str = ""
    new: bool = False


@dataclass(frozen=True)
class Explanation:
    """Why one event was alerted on, in the order of what mattered most.

    fields: at most five; neighbours: the nearest normal events, each a compact redacted copy (path -> value), nearest
    first; distance and usual_distance: to the nearest normal and that of a normal event; window: for a sequence, (event
    time ms, coordinates, one-line summary, share of its surprise that it would lose without this one) of each of its
    events, oldest first;
    rates: of a rate, how much it was, and what else was much; else none.
    """

    fields: tuple[FieldFinding, ...]
    neighbours: tuple[dict[str, Any], ...]
    distance: float
    usual_distance: float
    window: tuple[tuple[int, str, str, float], ...] = ()
    rates: tuple[RateFinding, ...] = ()


EXPLAINED_FIELDS = 5
EXPLAINED_NEIGHBOURS = 3
EXAMPLES = 32
"""Near normal events in which real examples of an expected value are looked for: the schema has it normalised."""
WORTH_TELLING = 1.5
"""Nats: what is expected more often than one time in four or five explains nothing."""
EXPLAINED_RECORDS = 12
Timeline = tuple[tuple[int, str, str, float], ...]
_TEMPLATED = re.compile(r"\{\}|#|\*")
"""What `normalise` puts where ids, hexadecimal numbers and owners of home folders stood."""


_RATES = np.array([f"rate:{name}" for name in LEVELS], object)


@dataclass(frozen=True)
class _History:
    """Of n events: the strongest evidence of a window or count of theirs (float64, nats, weighed), whose it is, which
    it is, whether no history of theirs is missing, and of a count the level it was raised to (uint8); and who fell
    silent meanwhile."""

    evidence: NDArray[np.float64]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    complete: NDArray[np.bool_]
    level: NDArray[np.uint8]
    silent: list[Silence] = field(default_factory=list)


class Detector:
    """Joins encoder and state: decodes, encodes, appends to windows, scores, explains.

    windows: where entities are remembered between batches; its vectors must be of the bundle's encoder. timers: who is
    waited for, so that silence is evidence; None: it is not.
    """

    def __init__(
        self, bundle: Bundle, windows: WindowStore, *, tenant: str = "default", timers: TimerStore | None = None
    ) -> None:
        self.bundle = bundle
        self.windows = windows
        self.tenant = tenant
        fields = bundle.encoder.schema.fields
        self.drift = Drift(bundle.encoder.schema, bundle.profile)
        self._causes = np.array([f"record:{field.path}" for field in fields], object)
        sequences, self._watch = bundle.scorer.sequences, None
        if timers is not None and sequences is not None and sequences.model.silence:
            self._watch = Watch(bundle.scorer, sequences, timers)

    def score(self, messages: Sequence[Message]) -> ScoredBatch:
        """Score a batch of messages, whole messages in stream order within each partition."""
        events, rejects = decode(messages)
        encoder, scorer = self.bundle.encoder, self.bundle.scorer
        features = encoder.vectorize(events)
        first, like = features.distinct()
        distinct = features.take(first)
        encoded = encoder.encode(distinct)
        types = distinct.codes[:, 0].astype(np.int64)
        parts = scorer.record.parts(scorer.record.raw(encoded, types), types)
        record = scorer.record.evidence(parts)[like]
        cause = self._causes[_causal_field(encoded, parts)][like]
        entities = find_entities(events)
        entity = np.array(entities.primary, object)
        history = self._judge_windows(events, entities, encoder.behaviours(distinct)[like])
        by_history = history.evidence > record
        p_value = scorer.p_value(record, history.evidence)
        self.drift.observe(events.time, features.codes, p_value)
        return ScoredBatch(
            events.coordinates,
            events.time,
            p_value,
            severity(p_value),
            np.where(by_history, history.entity, entity),
            np.where(by_history, history.cause, cause),
            events.records,
            rejects,
            events.repairs,
            history.complete,
            level=np.where(by_history, history.level, 0).astype(np.uint8),
            silences=self._silences(history.silent, events) if history.silent else None,
        )

    def remember(self, messages: Sequence[Message]) -> None:
        """Append a batch to the windows and timers without scoring it: to fill what was lost."""
        events, _ = decode(messages)
        features = self.bundle.encoder.vectorize(events)
        first, like = features.distinct()
        vectors = self.bundle.encoder.behaviours(features.take(first))[like]
        entities = find_entities(events)
        windows = self.windows.append(window_entries(events, entities, vectors)) if len(entities) else None
        if self._watch is not None and (sequences := self.bundle.scorer.sequences) is not None:
            ending = self._watch.ending(entities)
            windows = windows.take(ending) if windows is not None and len(ending) else None
            raw = sequences.raw(windows, entities.kind[ending]) if windows is not None else {}
            self._watch.advance(events, entities, ending, windows, raw)

    def _judge_windows(self, events: EventBatch, entities: Entities, vectors: NDArray[np.float16]) -> _History:
        """Append the events to the windows of their entities, and judge each by the histories that it is part of."""
        n, kind, row = len(events), entities.kind, entities.row
        nothing = np.full(n, "", object)
        found = _History(np.zeros(n), nothing, nothing.copy(), np.ones(n, bool), np.zeros(n, np.uint8))
        if not len(row):
            if self._watch is not None:
                found.silent.extend(self._watch.advance(events, entities, self._watch.ending(entities), None, {}))
            return found
        windows = self.windows.append(window_entries(events, entities, vectors))
        np.logical_and.at(found.complete, row, windows.complete)
        sequences, rates = self.bundle.scorer.sequences, self.bundle.scorer.rates
        if sequences is None or rates is None:
            return found
        raw = sequences.raw(windows, kind)
        order = sequences.evidence("order", raw, kind)
        rate, column = self._judge_rates(rates, entities, windows)
        overlap, sort = np.zeros(len(row)), np.zeros(len(row), np.int8)
        if (overlaps := self.bundle.scorer.overlaps) is not None:
            overlap, sort = overlaps.judge(entities.entity, kind, windows)
        parts = weighed(order, rate, sequences.evidence("missing", raw, kind), overlap)
        evidence = parts.max(0)
        weakest_first = np.argsort(evidence, kind="stable")
        cause = np.choose(parts.argmax(0), ["sequence:order", _RATES[column], "sequence:missing", AT_ONCE[sort]])
        found.evidence[row[weakest_first]] = evidence[weakest_first]
        found.entity[row[weakest_first]] = np.array(entities.entity, object)[weakest_first]
        found.cause[row[weakest_first]] = cause[weakest_first]
        level = windows.levels[np.arange(len(row)), column]
        found.level[row[weakest_first]] = level[weakest_first]
        if self._watch is not None:
            ending = self._watch.ending(entities)
            of_ending = {name: score[ending] for name, score in raw.items()}
            found.silent.extend(self._watch.advance(events, entities, ending, windows.take(ending), of_ending))
        return found

    @staticmethod
    def _judge_rates(
        rates: RateScorer, entities: Entities, windows: Windows
    ) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Evidence and count (place in `LEVELS`) of each pair: most raise nothing, and are not looked at."""
        evidence, column = np.zeros(len(entities)), np.zeros(len(entities), np.int8)
        raised = np.flatnonzero(windows.levels.any(1))
        if len(raised):
            names, kinds = [entities.entity[pair] for pair in raised.tolist()], entities.kind[raised]
            excess = rates.habits.excess(names, kinds, windows.levels[raised])
            evidence[raised], column[raised] = rates.evidence(excess, kinds)
        return evidence, column

    def finish(self) -> ScoredBatch | None:
        """The stream is over: the entities that were waited for still, by their last events (None: there are none)."""
        timers = self._watch.timers if self._watch is not None else None
        left = timers.finish() if isinstance(timers, MemoryTimers) else []
        return self._last_events(left) if left else None

    def _silences(self, silent: list[Silence], events: EventBatch) -> ScoredBatch:
        row = rows_of(silent, events.coordinates)
        order = np.argsort(row, kind="stable")
        return replace(self._last_events([silent[i].last for i in order.tolist()]), told=row[order])

    @staticmethod
    def _last_events(last: list[Heard]) -> ScoredBatch:
        """What is known of the last events of entities that are silent, as events that were judged by that."""
        p_value = np.array([heard.p_value for heard in last], np.float64)
        return ScoredBatch(
            coordinates_of(last),
            np.array([heard.time for heard in last], np.int64),
            p_value,
            severity(p_value),
            np.array([heard.entity for heard in last], object),
            np.full(len(last), SILENCE, object),
            [unpack(heard.event) for heard in last],
            [],
            complete=np.array([heard.complete for heard in last], np.bool_),
        )

    def explain(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Explanation]:
        """Why these events scored as they did. Costs milliseconds an event: for alerts."""
        found = []
        timelines, rates = self._timelines(scored, rows), self._rates(scored, rows)
        for row in rows.tolist():
            message = Message("", 0, 0, int(scored.time[row]), orjson.dumps(scored.records[row]))
            events, _ = decode([message])
            explained = self._explain_one(events, str(scored.cause[row]), timelines.get(row, ()))
            found.append(replace(explained, rates=rates.get(row, ())))
        return found

    def _rates(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, tuple[RateFinding, ...]]:
        """Of those rows that a rate made alerts, the counts that their entity had raised beyond its habits by then."""
        told = [row for row in rows.tolist() if str(scored.cause[row]).startswith("rate:")]
        if self.bundle.scorer.rates is None or not told:
            return {}
        entities, causes = ([str(column[row]) for row in told] for column in (scored.entity, scored.cause))
        level = np.zeros(len(told), np.uint8) if scored.level is None else scored.level[told]
        causal = [LEVELS.index(cause.partition(":")[2]) for cause in causes]
        levels = much.levels(self.windows.latest(entities), scored.time[told])
        levels[np.arange(len(told)), causal] = level
        return dict(zip(told, much.findings(self.bundle.scorer.rates, entities, levels, causal), strict=True))

    def _timelines(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, Timeline]:
        """Of those rows that a sequence made alerts, the last records of its window up to the event, each told by the
        normal event that it is most like, with what the window would lose without it. One pass for all."""
        sequences = self.bundle.scorer.sequences
        told = [row for row in rows.tolist() if str(scored.cause[row]).startswith("sequence:")]
        if sequences is None or not told:
            return {}
        entities = [str(scored.entity[row]) for row in told]
        windows = self.windows.latest(entities)
        upto = windows.mask & (windows.times <= scored.time[told][:, None])
        ends = np.where(upto.any(1), upto.shape[1] - 1 - upto[:, ::-1].argmax(1), -1)
        windows = cut(windows, ends)
        kinds = np.array([KINDS.index(entity.partition(":")[0]) for entity in entities], np.int8)
        weight = weights(sequences, windows, kinds, scored.cause[told] == SILENCE)
        return {row: self._timeline(windows, i, weight[i]) for i, row in enumerate(told)}

    def _timeline(self, windows: Windows, i: int, weight: NDArray[np.float64]) -> Timeline:
        sequences = self.bundle.scorer.sequences
        slots = np.flatnonzero(windows.mask[i])[-EXPLAINED_RECORDS:]
        if sequences is None or not len(slots):
            return ()
        codes = sequences.model.codebook(windows.vectors[i, slots]).tolist()
        return tuple(
            (int(windows.times[i, slot]), self._coordinates(windows, i, slot), self._told(code), float(weight[slot]))
            for slot, code in zip(slots.tolist(), codes, strict=True)
        )

    def _told(self, code: int) -> str:
        """A record of a window in words: what those of its outcome have in common, which names nobody."""
        known = self.bundle.behaviours
        return wording.told(orjson.loads(known[code])) if code < len(known) else "an event like none in training"

    @staticmethod
    def _coordinates(windows: Windows, i: int, slot: int) -> str:
        topic, partition = windows.sources[windows.source[i, slot]]
        return f"{topic}:{partition}:{windows.offset[i, slot]}:{windows.index[i, slot]}"

    def _explain_one(self, events: EventBatch, cause: str, window: Timeline) -> Explanation:
        encoder, scorer = self.bundle.encoder, self.bundle.scorer
        features = encoder.vectorize(events)
        encoded = encoder.encode(features)
        distances, places = scorer.record.baseline.search(encoded.vectors, EXAMPLES)
        near = [orjson.loads(self.bundle.exemplars[place]) for place in places[0].tolist()]
        usual = scorer.record.calibrations["novelty"].scores
        return Explanation(
            self._findings(events, features, near, cause),
            tuple(near[:EXPLAINED_NEIGHBOURS]),
            float(distances[0, :NEIGHBOURS].mean()),
            float(np.median(usual)),
            window,
        )

    def _findings(
        self, events: EventBatch, features: FeatureBatch, near: list[dict[str, Any]], cause: str
    ) -> tuple[FieldFinding, ...]:
        """The fields that mattered, one of each group: the cause, then by how surprising the counts or the network find
        them."""
        encoder = self.bundle.encoder
        fields = encoder.schema.fields
        surprise = encoder.rarity(features)
        by_type = dict(zip(encoder.rarity.columns, surprise.by_type[0].tolist(), strict=True))
        by_actor = dict(zip(encoder.rarity.columns, surprise.by_actor[0].tolist(), strict=True))
        # Of an actor that hardly ever does this, every value is a little odd: that is told once, of the type of event.
        hardly_ever = min(by_actor.values())
        by_actor = {i: nats if i == 0 else nats - hardly_ever for i, nats in by_actor.items()}
        counted = {i: max(by_type[i], by_actor[i]) for i in by_type}
        numbers = [i for i, f in enumerate(fields) if f.kind == "number" and features.codes[0, i]]
        likely = sorted(counted, key=lambda i: -counted[i])[: 2 * EXPLAINED_FIELDS]
        named = [i for i in counted if f"record:{fields[i].path}" == cause and i not in likely]
        expectations = encoder.expectations(features, 0, np.array(likely + named + numbers, np.int32))
        told = {e.field: max(e.surprise, counted.get(e.field, 0.0)) for e in expectations}
        actor = _value(events, encoder.schema.actors, features.codes[0], fields)
        findings: list[FieldFinding] = []
        columns, twins = encoder.rarity.columns, encoder.rarity.groups[int(features.codes[0, 0])].tolist()
        group_of = {i: fields[columns[twin]].group for i, twin in zip(columns, twins, strict=True)}
        groups: set[str] = set()
        first = {e for e in told if f"record:{fields[e].path}" == cause and told[e] >= WORTH_TELLING}
        for e in sorted(expectations, key=lambda e: (e.field not in first, -told[e.field])):
            field_, code = fields[e.field], int(features.codes[0, e.field])
            group = group_of.get(e.field, field_.group)
            if group in groups or field_.name.startswith("#") or (findings and told[e.field] < WORTH_TELLING):
                continue
            groups.add(group)
            column = events.columns.get(field_.path)
            observed = _shown(column.values[0]) if column is not None else ""
            by_whom = by_actor.get(e.field, 0.0) > max(by_type.get(e.field, 0.0) + 1, e.surprise)
            given = actor if by_whom and actor != observed else ""
            new = code == UNKNOWN and not field_.left_out
            # What the rarest word usually is explains no text.
            usual = e.expected if field_.derives != WORD else ()
            expected = tuple((_example(field_, text, near), p) for text, p in usual)
            findings.append(FieldFinding(field_.path, observed, expected, told[e.field], given, new))
            if len(findings) == EXPLAINED_FIELDS:
                break
        return tuple(findings)


def _value(events: EventBatch, paths: Sequence[str], codes: NDArray[np.int32], fields: Sequence[Field]) -> str:
    """The first of these attributes that the one event has, as it stands there."""
    present = {field.path for field, code in zip(fields, codes.tolist(), strict=True) if code}
    path = next((path for path in paths if path in present), "")
    return _shown(events.columns[path].values[0]) if path in events.columns else ""


def _example(field: Field, normalised: str, near: list[dict[str, Any]]) -> str:
    """A real value, of a normal event nearby, that looks like this once normalised; else what stands for many values
    becomes "…". Of a folder it is the folder."""
    in_folder = field.derives == FOLDER
    if field.kind in ("number", "presence") or not normalised or (field.derives and not in_folder):
        return normalised
    for event in near:
        value = event.get(field.path)
        if value is None:
            continue
        text = normalise(value, field.path)
        if not in_folder and text == normalised:
            return _shown(value)
        if in_folder and derived(text, FOLDER) == (normalised,):
            end = max(_shown(value).rfind("/"), _shown(value).rfind("\\"))
            return f"{_shown(value)[: end + 1]}…"
    text = _TEMPLATED.sub("…", normalised)
    return f"{text}/…" if in_folder else text


def window_entries(events: EventBatch, entities: Entities, vectors: NDArray[np.float16]) -> WindowEntries:
    """The (event, entity) pairs of a batch as the window store takes them. vectors: float16 [n, d], one an event."""
    rows, at = entities.row, events.coordinates
    return WindowEntries(
        entities.entity,
        np.maximum(events.time[rows], 0),
        vectors[rows],
        at.sources,
        at.source[rows],
        at.offset[rows],
        at.index[rows],
        acts(events, entities),
    )


def _causal_field(encoded: Encoded, parts: Parts) -> NDArray[np.int32]:
    """int32 [n]: the field that says most about the strongest part: the furthest number where density speaks, else the
    least expected value."""
    by_density = (DENSITY_TRUST * parts.density > parts.surprise) & (encoded.far_number >= 0)
    return np.where(by_density, encoded.far_number, encoded.odd_field)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def compact(record: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The attributes of an event that the schema reads, flat, for exemplars."""
    events, _ = decode([Message("", 0, 0, -1, orjson.dumps(record))])
    read = {field.path for field in schema.fields}
    return {path: column.values[0] for path, column in events.columns.items() if path in read}


def device_of(settings: Settings) -> str:
    """cpu or cuda, also where the settings leave it open."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_detector(settings: Settings, path: Path) -> tuple[Detector, RedisWindows | Remembering]:
    """The detector of the service: the bundle at `path`, and windows in the settings' Redis; with them timers, where
    some kind of entity comes to an end."""
    from state.redis_timers import RedisTimers
    from state.redis_windows import RedisWindows

    bundle = load(path, device_of(settings))
    place: dict[str, Any] = {"tenant": settings.tenant, "timeout_s": settings.redis.timeout_s}
    place |= {"retries": settings.redis.retries, **settings.redis.client_arguments()}
    windows = RedisWindows(settings.redis.url, encoder=bundle.encoder_hash, dim=bundle.dim, **place)
    sequences = bundle.scorer.sequences
    if sequences is None or not sequences.model.silence:
        return Detector(bundle, windows, tenant=settings.tenant), windows
    timers = RedisTimers(settings.redis.url, space=bundle.encoder_hash, **place)
    return Detector(bundle, windows, tenant=settings.tenant, timers=timers), Remembering(windows, timers)
