"""The detector: a function from a batch of raw events to a batch of scored events.

It does not know where the events came from: the Kafka loop, `ripcurrent score`, replay, evaluation and the benchmark
all call it. Promises that a score depends on the event, its entities' windows and the bundle alone, not on how the
stream was cut into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.features.schema import Schema
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
from streamer.detection.batches import PreparedBatch, ScoredBatch, StageTimer
from streamer.detection.bundle import Bundle
from streamer.detection.combine import severity, weighed
from streamer.detection.cooccurrence_score import CAUSES as AT_ONCE
from streamer.detection.drift import Drift
from streamer.detection.inactivity import CAUSE as SILENCE
from streamer.detection.inactivity import InactivityMonitor, coordinates_of, rows_of, unpack
from streamer.detection.rate_score import RateScorer
from streamer.detection.record_score import DENSITY_TRUST, Parts
from streamer.detection.sequence_score import MISSING, ORDER

if TYPE_CHECKING:
    pass

_RATES = np.array([f"rate:{name}" for name in LEVELS], object)


@dataclass(frozen=True)
class _History:
    """Of n events: the strongest evidence of a window or count of theirs (float64, nats, weighed), whose it is, which
    it is, whether no history of theirs is missing, of a count the level it was raised to (uint8), and which of the
    windows it is (intp); and who fell silent meanwhile."""

    evidence: NDArray[np.float64]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    complete: NDArray[np.bool_]
    level: NDArray[np.uint8]
    window: NDArray[np.intp]
    windows: Windows | None = None
    silent: list[Inactivity] = field(default_factory=list)


class Detector:
    """Joins encoder and state: decodes, encodes, appends to windows, scores.

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
            self._watch = InactivityMonitor(bundle.scorer, sequences, timers)

    def score(self, messages: Sequence[Message]) -> ScoredBatch:
        """Score a batch of messages, whole messages in stream order within each partition."""
        return self.judge(self.prepare(messages))

    def prepare(self, messages: Sequence[Message]) -> PreparedBatch:
        """What can be said of events by themselves. Reads and changes nothing that is remembered, so that it may be
        done ahead, in another thread, and thrown away."""
        laps = StageTimer()
        events, rejects = decode(messages)
        laps.end("decode")
        encoder, scorer = self.bundle.encoder, self.bundle.scorer
        features = encoder.vectorize(events)
        first, like = features.distinct()
        distinct = features.take(first)
        laps.end("vectorize")
        encoded = encoder.encode(distinct)
        anonymised = encoder.anonymised(distinct)[like]
        laps.end("encode")
        types = distinct.codes[:, 0].astype(np.int64)
        parts = scorer.record.parts(scorer.record.raw(encoded, types), types)
        record = scorer.record.evidence(parts)[like]
        cause = self._causes[_causal_field(encoded, parts)][like]
        laps.end("compare")
        return PreparedBatch(events, rejects, features.codes, anonymised, record, cause, laps.seconds)

    def judge(self, prepared: PreparedBatch) -> ScoredBatch:
        """Score what was prepared, by the histories that it is part of from now on."""
        laps = StageTimer(prepared.seconds)
        events, record, cause = prepared.events, prepared.record, prepared.cause
        entities = find_entities(events)
        entity = np.array(entities.primary, object)
        history = self._judge_windows(events, entities, prepared.anonymised, laps)
        by_history = history.evidence > record
        p_value = self.bundle.scorer.p_value(record, history.evidence)
        in_sequence = np.flatnonzero(by_history & np.isin(history.cause, (ORDER, MISSING)))
        self.drift.observe(events.time, prepared.codes, p_value)
        laps.end("sequences")
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
            silences=self._silences(history.silent, events) if history.silent else None,
            windows=history.windows.take(history.window[in_sequence]) if history.windows is not None else None,
            in_sequence=in_sequence,
            seconds=laps.seconds,
        )

    def remember(self, messages: Sequence[Message]) -> None:
        """Append a batch to the windows and timers without scoring it: to fill what was lost."""
        events, _ = decode(messages)
        features = self.bundle.encoder.vectorize(events)
        first, like = features.distinct()
        vectors = self.bundle.encoder.anonymised(features.take(first))[like]
        entities = find_entities(events)
        windows = self.windows.append(window_entries(events, entities, vectors)) if len(entities) else None
        if self._watch is not None and (sequences := self.bundle.scorer.sequences) is not None:
            ending = self._watch.ending(entities)
            windows = windows.take(ending) if windows is not None and len(ending) else None
            raw = sequences.raw(windows, entities.kind[ending]) if windows is not None else {}
            self._watch.advance(events, entities, ending, windows, raw)

    def _judge_windows(
        self, events: EventBatch, entities: Entities, vectors: NDArray[np.float16], laps: StageTimer
    ) -> _History:
        """Append the events to the windows of their entities, and judge each by the histories that it is part of."""
        n, kind, row = len(events), entities.kind, entities.row
        nothing = np.full(n, "", object)
        found = _History(
            np.zeros(n), nothing, nothing.copy(), np.ones(n, bool), np.zeros(n, np.uint8), np.zeros(n, np.intp)
        )
        if not len(row):
            if self._watch is not None:
                found.silent.extend(self._watch.advance(events, entities, self._watch.ending(entities), None, {}))
            return found
        windows = self.windows.append(window_entries(events, entities, vectors))
        found = replace(found, windows=windows)
        laps.end("windows")
        np.logical_and.at(found.complete, row, windows.complete)
        sequences, rates = self.bundle.scorer.sequences, self.bundle.scorer.rates
        if sequences is None or rates is None:
            return found
        raw = sequences.raw(windows, kind)
        rate, column = self._judge_rates(rates, entities, windows)
        overlap, sort = np.zeros(len(row)), np.zeros(len(row), np.int8)
        if (cooccurrence := self.bundle.scorer.cooccurrence) is not None:
            overlap, sort = cooccurrence.judge(entities.entity, kind, windows)
        order, missing = (sequences.evidence(name, raw, kind) for name in ("order", "missing"))
        parts = weighed(order, missing, rate, overlap)
        evidence = parts.max(0)
        weakest_first = np.argsort(evidence, kind="stable")
        cause = np.choose(parts.argmax(0), [ORDER, MISSING, _RATES[column], AT_ONCE[sort]])
        found.evidence[row[weakest_first]] = evidence[weakest_first]
        found.entity[row[weakest_first]] = np.array(entities.entity, object)[weakest_first]
        found.cause[row[weakest_first]] = cause[weakest_first]
        found.window[row[weakest_first]] = weakest_first
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
            excess = rates.profiles.excess(names, kinds, windows.levels[raised])
            evidence[raised], column[raised] = rates.evidence(excess, kinds)
        return evidence, column

    def finish(self) -> ScoredBatch | None:
        """The stream is over: the entities that were waited for still, by their last events (None: there are none)."""
        timers = self._watch.timers if self._watch is not None else None
        left = timers.finish() if isinstance(timers, MemoryTimers) else []
        return self._last_events(left) if left else None

    def _silences(self, silent: list[Inactivity], events: EventBatch) -> ScoredBatch:
        row = rows_of(silent, events.coordinates)
        order = np.argsort(row, kind="stable")
        return replace(self._last_events([silent[i].last for i in order.tolist()]), noticed_at=row[order])

    @staticmethod
    def _last_events(last: list[Activity]) -> ScoredBatch:
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
        activity_counts(events, entities),
    )


def _causal_field(encoded: Encoded, parts: Parts) -> NDArray[np.int32]:
    """int32 [n]: the field that says most about the strongest part: the furthest number where density speaks, else the
    least expected value."""
    by_density = (DENSITY_TRUST * parts.density > parts.surprise) & (encoded.farthest_number >= 0)
    return np.where(by_density, encoded.farthest_number, encoded.most_surprising_field)


def compact(record: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The attributes of an event that the schema reads, flat, for exemplars."""
    events, _ = decode([Message("", 0, 0, -1, orjson.dumps(record))])
    read = {field.path for field in schema.fields}
    return {path: column.values[0] for path, column in events.columns.items() if path in read}
