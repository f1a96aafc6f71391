"""The detector: a function from a batch of raw events to a batch of scored events.

The Kafka loop, `ripcurrent score`, replay, evaluation and the benchmark all call it; it does not know where the events
come from. Promises that a score depends only on the event, the windows of its entities, the bundle and what was decided
about live traffic (`streamer.detection.live_calibration`), not on how the stream was cut into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import UNKNOWN, Schema
from encoder.models.record_encoder import Encoded
from encoder.ocsf.activity_counts import activity_counts
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import Entities
from encoder.ocsf.entities import entities as find_entities
from encoder.ocsf.events import EventBatch, Message
from state.memory.timers import MemoryTimers
from state.rolling_counts import LEVELS
from state.timers import Activity, Inactivity, TimerStore
from state.windows import WindowEntries, Windows, WindowStore
from streamer.detection.batches import PreparedBatch, ScoredBatch, StageTimer, UnusualStretches
from streamer.detection.bundle import Bundle
from streamer.detection.combine import in_doubt, severity, weighted
from streamer.detection.cooccurrence_score import CAUSES as COOCCURRENCE_CAUSES
from streamer.detection.drift import Drift
from streamer.detection.inactivity import CAUSE as INACTIVITY
from streamer.detection.inactivity import InactivityMonitor, coordinates_of, rows_of, unpack
from streamer.detection.live_calibration import Evidence, LiveCalibration, discrete
from streamer.detection.rate_score import RateScorer
from streamer.detection.record_score import (
    FAR,
    FOR_ACTOR,
    FOR_TYPE,
    NEAR,
    NUMBERS,
    PARTS,
    REPLACED,
    TEXT,
    by_text,
    strongest,
)
from streamer.detection.sequence_score import MISSING, ORDER
from streamer.detection.stretch_score import COMPOSITION
from streamer.redaction import Redactor

COMPACTED = 1024
"""Events decoded together by `compact`."""
TOLD_BY_NUMBERS = 3.0
"""Nats of evidence by its numbers from which on an event is told by its most unusual number: one event in twenty."""
UNUSUAL_STRETCH = 3.0
"""Nats of evidence by the composition of a window from which on an alert tells of it: one normal life in twenty."""
_RATES = np.array([f"rate:{name}" for name in LEVELS], object)


@dataclass(frozen=True)
class _History:
    """The evidence of history against n events. evidence: float64 [n], nats, weighted, of the strongest window or
    count; entity, cause: of that; complete: bool [n], whether no history is missing; level: uint8 [n], the level that a
    count was raised to; window: intp [n], the row of that window in `windows`; silent: entities that became inactive
    during the batch."""

    evidence: NDArray[np.float64]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    complete: NDArray[np.bool_]
    level: NDArray[np.uint8]
    window: NDArray[np.intp]
    windows: Windows | None = None
    silent: list[Inactivity] = field(default_factory=list)


@dataclass(frozen=True)
class _PreparedParts:
    """The parts of the record score of a batch, for `LiveCalibration`."""

    bundle: Bundle
    prepared: PreparedBatch

    def without_news(self, rows: NDArray[np.intp], columns: Sequence[int]) -> NDArray[np.float64]:
        encoder, scorer = self.bundle.encoder, self.bundle.scorer.record
        chosen = self.prepared.features.take(rows)
        first, like = chosen.distinct()
        # Places among the discrete fields but the event type, to places among those that are counted.
        names = [encoder.schema.fields[i].name for i in discrete(encoder.schema)]
        wanted = {names[column] for column in columns}
        counted = [place for place, name in enumerate(encoder.rarity.names) if name in wanted]
        by_type, by_actor = encoder.surprise_without(chosen.take(first), counted)
        types = chosen.codes[:, 0].astype(np.int64)
        parts = self.prepared.parts[:, rows]
        for name, raw in ((FOR_TYPE, by_type), (FOR_ACTOR, by_actor)):
            parts[PARTS.index(name)] = scorer.part(name, raw.astype(np.float64)[like], types)
        return parts

    def joint(self, parts: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.bundle.scorer.record.evidence(parts, types)


class Detector:
    """Joins encoder and state: decodes, encodes, appends to windows, scores.

    windows: the windows of entities between batches; their vectors must be of the bundle's encoder. timers: detect
    inactive entities; None: inactivity is not detected. redactor: masks the events that timers keep.

    live: how often evidence came lately, learned here only where `live.moves`. What it is after a batch is in
    `ScoredBatch.live`; `take` goes on from there.
    """

    def __init__(
        self,
        bundle: Bundle,
        windows: WindowStore,
        *,
        tenant: str = "default",
        timers: TimerStore | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self.bundle = bundle
        self.windows = windows
        self.tenant = tenant
        self.live = LiveCalibration.of(bundle.encoder, bundle.version)
        self._discrete = discrete(bundle.encoder.schema)
        fields = bundle.encoder.schema.fields
        self.drift = Drift(bundle.encoder.schema, bundle.profile)
        self._causes = np.array([f"record:{field.path}" for field in fields], object)
        self._text_causes = np.array([f"record:{path}" for path in (*bundle.scorer.record.texts.paths, "")], object)
        sequences, self._monitor = bundle.scorer.sequences, None
        if timers is not None and sequences is not None and sequences.model.timeouts:
            self._monitor = InactivityMonitor(bundle.scorer, sequences, timers, redactor or Redactor())

    def score(self, messages: Sequence[Message]) -> ScoredBatch:
        """Score a batch of whole messages, which are in stream order within each partition."""
        return self.judge(self.prepare(messages))

    def prepare(self, messages: Sequence[Message]) -> PreparedBatch:
        """Decode and encode a batch, and score each event by itself. Neither reads nor changes state, so it may run
        ahead in another thread, and its result may be discarded. All that depends on the content of an event is done
        here: one that makes this fail leaves nothing in the windows."""
        timer = StageTimer()
        events, rejects = decode(messages)
        timer.end("decode")
        encoder, scorer = self.bundle.encoder, self.bundle.scorer
        features = encoder.vectorize(events)
        first, like = features.distinct()
        distinct = features.take(first)
        timer.end("vectorize")
        types = distinct.codes[:, 0].astype(np.int64)
        encoded = encoder.encode(distinct, scorer.record.measured(types))
        anonymised = encoder.anonymised(distinct)[like]
        timer.end("encode")
        parts = scorer.record.parts(scorer.record.raw(encoded, types), types)
        cause = self._causes[_causal_field(encoded, parts)][like]
        surprise, attribute = scorer.record.texts(events)
        parts = scorer.record.with_text(parts[:, like], surprise, types[like])
        record = scorer.record.evidence(parts, types[like])
        cause = np.where(by_text(parts), self._text_causes[attribute], cause)
        entities = find_entities(events)
        entries = window_entries(events, entities, anonymised)
        timer.end("compare")
        return PreparedBatch(events, rejects, features, entities, entries, parts, record, cause, timer.seconds)

    def take(self, scored: ScoredBatch) -> None:
        """Go on from what the live calibration learned of this batch; a batch that is judged again is not taken."""
        if scored.live is not None:
            self.live = scored.live

    def judge(self, prepared: PreparedBatch) -> ScoredBatch:
        """Append a prepared batch to the windows of its entities and score it."""
        timer = StageTimer(prepared.seconds)
        events, cause, live = prepared.events, prepared.cause, self.live.copy()
        record, lowered = live.judge(self._evidence(prepared), _PreparedParts(self.bundle, prepared))
        entity = np.array(prepared.entities.primary, object)
        history = self._judge_windows(events, prepared.entities, prepared.entries, timer)
        by_history = history.evidence > record
        stretch, unusual = self._stretch(record, history, prepared.entities)
        p_value = self.bundle.scorer.p_value(record, history.evidence, stretch)
        in_sequence = np.flatnonzero(by_history & np.isin(history.cause, (ORDER, MISSING)))
        self.drift.observe(events.time, prepared.features.codes, p_value)
        timer.end("sequences")
        return ScoredBatch(
            events.coordinates,
            events.time,
            p_value,
            severity(p_value),
            np.where(by_history, history.entity, entity),
            np.where(by_history, history.cause, cause),
            events.records,
            prepared.rejects,
            events.repairs,
            history.complete,
            level=np.where(by_history, history.level, 0).astype(np.uint8),
            inactive=self._inactive(history.silent, events) if history.silent else None,
            windows=history.windows.take(history.window[in_sequence]) if history.windows is not None else None,
            in_sequence=in_sequence,
            live=live,
            lowered=lowered,
            stretches=unusual,
            seconds=timer.seconds,
        )

    def _evidence(self, prepared: PreparedBatch) -> Evidence:
        codes, names = prepared.features.codes, prepared.entities.primary
        types, unknown = codes[:, 0].astype(np.int64), codes[:, self._discrete] == UNKNOWN
        return Evidence(prepared.events.time, types, unknown, names, prepared.parts, prepared.record)

    def remember(self, messages: Sequence[Message]) -> None:
        """Append a batch to windows and timers without scoring it, to rebuild lost state."""
        events, _ = decode(messages)
        features = self.bundle.encoder.vectorize(events)
        first, like = features.distinct()
        vectors = self.bundle.encoder.anonymised(features.take(first))[like]
        entities = find_entities(events)
        windows = self.windows.append(window_entries(events, entities, vectors)) if len(entities) else None
        if self._monitor is not None and (sequences := self.bundle.scorer.sequences) is not None:
            ending = self._monitor.ending(entities)
            windows = windows.take(ending) if windows is not None and len(ending) else None
            raw = sequences.raw(windows, entities.kind[ending]) if windows is not None else {}
            self._monitor.advance(events, entities, ending, windows, raw)

    def _judge_windows(
        self, events: EventBatch, entities: Entities, entries: WindowEntries, timer: StageTimer
    ) -> _History:
        """Append the events to the windows of their entities; judge each event by these windows and counts."""
        n, kind, row = len(events), entities.kind, entities.row
        unset = np.full(n, "", object)
        history = _History(
            np.zeros(n), unset, unset.copy(), np.ones(n, bool), np.zeros(n, np.uint8), np.zeros(n, np.intp)
        )
        if not len(row):
            if self._monitor is not None:
                history.silent.extend(self._monitor.advance(events, entities, self._monitor.ending(entities), None, {}))
            return history
        windows = self.windows.append(entries)
        history = replace(history, windows=windows)
        timer.end("windows")
        np.logical_and.at(history.complete, row, windows.complete)
        sequences, rates = self.bundle.scorer.sequences, self.bundle.scorer.rates
        if sequences is None or rates is None:
            return history
        raw = sequences.raw(windows, kind)
        rate, column = self._judge_rates(rates, entities, windows)
        cooccurrence_evidence, sort = np.zeros(len(row)), np.zeros(len(row), np.int8)
        if (cooccurrence := self.bundle.scorer.cooccurrence) is not None:
            cooccurrence_evidence, sort = cooccurrence.judge(entities.entity, kind, windows)
        order, missing = (sequences.evidence(name, raw, kind) for name in ("order", "missing"))
        parts = weighted(order, missing, rate, cooccurrence_evidence)
        evidence = parts.max(0)
        weakest_first = np.argsort(evidence, kind="stable")
        cause = np.choose(parts.argmax(0), [ORDER, MISSING, _RATES[column], COOCCURRENCE_CAUSES[sort]])
        history.evidence[row[weakest_first]] = evidence[weakest_first]
        history.entity[row[weakest_first]] = np.array(entities.entity, object)[weakest_first]
        history.cause[row[weakest_first]] = cause[weakest_first]
        history.window[row[weakest_first]] = weakest_first
        level = windows.levels[np.arange(len(row)), column]
        history.level[row[weakest_first]] = level[weakest_first]
        if self._monitor is not None:
            ending = self._monitor.ending(entities)
            of_ending = {name: score[ending] for name, score in raw.items()}
            history.silent.extend(self._monitor.advance(events, entities, ending, windows.take(ending), of_ending))
        return history

    def _stretch(
        self, record: NDArray[np.float64], history: _History, entities: Entities
    ) -> tuple[NDArray[np.float64], UnusualStretches | None]:
        """float64 [n], nats: the evidence by what the entities of each event did in their whole windows, 0 where
        nothing else is in doubt and of events that are no members of their windows; and the windows that are worth
        telling."""
        scorer, windows = self.bundle.scorer.stretch, history.windows
        if scorer is None or windows is None:
            return np.zeros(len(record)), None
        pairs = np.flatnonzero(in_doubt(record, history.evidence)[entities.row] & (windows.own >= 0))
        kinds, rows = entities.kind[pairs], entities.row[pairs]
        raw = scorer.raw(windows.take(pairs), kinds)
        by_composition = scorer.by_lives(COMPOSITION, raw[COMPOSITION], kinds)
        strongest_last = np.lexsort((by_composition, rows))
        last = np.append(np.diff(rows[strongest_last]) > 0, True)[: len(rows)]
        told = strongest_last[last]
        told = told[by_composition[told] >= UNUSUAL_STRETCH]
        names = np.array([entities.entity[pair] for pair in pairs[told].tolist()], object)
        unusual = UnusualStretches(rows[told].astype(np.intp), names, windows.take(pairs[told]))
        return scorer.evidence(raw, kinds, rows, len(record)), unusual

    @staticmethod
    def _judge_rates(
        rates: RateScorer, entities: Entities, windows: Windows
    ) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Evidence (float64 [m], nats) and count (int8 [m], place in `LEVELS`) of each pair of event and entity. Most
        pairs raise no count and are skipped."""
        evidence, column = np.zeros(len(entities)), np.zeros(len(entities), np.int8)
        raised = np.flatnonzero(windows.levels.any(1))
        if len(raised):
            names, kinds = [entities.entity[pair] for pair in raised.tolist()], entities.kind[raised]
            excess = rates.profiles.excess(names, kinds, windows.levels[raised])
            evidence[raised], column[raised] = rates.evidence(excess, kinds)
        return evidence, column

    def finish(self) -> ScoredBatch | None:
        """At the end of a stream: the last events of all entities whose timers still run; None where there are none."""
        timers = self._monitor.timers if self._monitor is not None else None
        last = timers.finish() if isinstance(timers, MemoryTimers) else []
        return self._last_events(last) if last else None

    def _inactive(self, silent: list[Inactivity], events: EventBatch) -> ScoredBatch:
        row = rows_of(silent, events.coordinates)
        order = np.argsort(row, kind="stable")
        return replace(self._last_events([silent[i].last for i in order.tolist()]), noticed_at=row[order])

    @staticmethod
    def _last_events(last: list[Activity]) -> ScoredBatch:
        """The last events of inactive entities as scored events."""
        p_value = np.array([event.p_value for event in last], np.float64)
        kept = [unpack(event.event) for event in last]
        return ScoredBatch(
            coordinates_of(last),
            np.array([event.time for event in last], np.int64),
            p_value,
            severity(p_value),
            np.array([event.entity for event in last], object),
            np.full(len(last), INACTIVITY, object),
            [event.masked.record for event in kept],
            [],
            complete=np.array([event.complete for event in last], np.bool_),
            kept=kept,
        )


def window_entries(events: EventBatch, entities: Entities, vectors: NDArray[np.float16]) -> WindowEntries:
    """The pairs of event and entity of a batch, for the window store. vectors: float16 [n, d], one an event."""
    rows, at = entities.row, events.coordinates
    return WindowEntries(
        entities.entity,
        np.maximum(events.time[rows], 0),
        vectors[rows],
        at.sources,
        at.source[rows],
        at.offset[rows],
        at.index[rows],
        activity_counts(events, entities),
        _fingerprints(events, entities, vectors)[rows],
    )


def _fingerprints(events: EventBatch, entities: Entities, vectors: NDArray[np.float16]) -> NDArray[np.uint32]:
    """uint32 [n]: hashes of `metadata.uid`, time, entities and behaviour, by which an event that comes twice is known.
    0 for one without a uid: two events of one second may well be equal. The uid alone would not do: there are sources
    that give all events of a type the same."""
    found = np.zeros(len(events), np.uint32)
    if (uid := events.columns.get("metadata.uid")) is not None:
        named = np.searchsorted(entities.row, np.arange(len(events) + 1)).tolist()
        for row, value in zip(uid.rows.tolist(), uid.values, strict=True):
            words = (str(value), str(events.time[row]), *entities.entity[named[row] : named[row + 1]], "")
            content = "\0".join(words).encode("utf-8", "surrogatepass") + vectors[row].tobytes()
            found[row] = int.from_bytes(blake2b(content, digest_size=4).digest(), "little") or 1
    return found


def _causal_field(encoded: Encoded, parts: NDArray[np.float64]) -> NDArray[np.int32]:
    """int32 [n]: the field that says most about the strongest part: of distances and the network, the value that fits
    the rest of the event least; else the least expected value. The network finds an operation as odd for its duration
    as the other way round, so a number that is worth telling by itself goes first. parts: float64 [7, n]."""
    whole = np.isin(PARTS, (FAR, NEAR, REPLACED))
    field = np.where(strongest(parts, whole), encoded.most_replaced_field, encoded.most_surprising_field)
    others = ~whole & ~np.isin(PARTS, (TEXT,))
    numbers = np.isin(PARTS, (NUMBERS,))[others]
    of_number = strongest(parts[others], numbers) & (parts[PARTS.index(NUMBERS)] >= TOLD_BY_NUMBERS)
    return np.where(of_number, encoded.most_surprising_number, field)


def compact(records: Sequence[bytes], schema: Schema) -> list[dict[str, Any]]:
    """Of each event, given as JSON, the attributes that the schema reads, flat, for exemplars."""
    read = {field.path for field in schema.fields}
    found: list[dict[str, Any]] = [{} for _ in records]
    for start in range(0, len(records), COMPACTED):
        part = records[start : start + COMPACTED]
        events, _ = decode([Message("", 0, start + i, -1, record) for i, record in enumerate(part)])
        place = events.coordinates.offset.tolist()
        for path, column in events.columns.items():
            if path in read:
                for row, value in zip(column.rows.tolist(), column.values, strict=True):
                    found[place[row]].setdefault(path, value)
    return found
