"""Inactivity as evidence: scores, at each event, how surprising it would be that no further event of its entity
follows, and keeps that with the entity's timer.

Promises that the score is of the window as it was at the event, so that an inactive entity is detected without reading
its window again. It does nothing where no kind of entity has routines that end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.ocsf.entities import Entities
from encoder.ocsf.events import Coordinates, EventBatch
from state.errors import SourcePartition
from state.timers import TICK_MS, Activity, ClockAdvance, Inactivity, Span, TimerStore
from state.windows import Windows
from streamer.detection.batches import KeptEvent
from streamer.detection.combine import HISTORY_TRUST, EventScorer, discounted
from streamer.detection.sequence_score import SequenceScorer
from streamer.redaction import Redacted, Redactor

CAUSE = "sequence:silence"
MAX_EVENT = 8 * 1024
"""Bytes of a packed event in its timer; a larger one keeps only attributes of at most MAX_ATTRIBUTE bytes of JSON."""
MAX_ATTRIBUTE = 512


class InactivityMonitor:
    """Detects inactivity of the kinds of entity whose routines end. timers: of these entities; redactor: masks the
    events that timers keep."""

    def __init__(self, scorer: EventScorer, sequences: SequenceScorer, timers: TimerStore, redactor: Redactor) -> None:
        self.timers = timers
        self._redactor = redactor
        self._scorer, self._sequences = scorer, sequences
        self._timeout = sequences.model.timeout_ms

    def ending(self, entities: Entities) -> NDArray[np.intp]:
        """intp: which of the m pairs of event and entity are of a kind whose routines end."""
        return np.flatnonzero(self._timeout[entities.kind] > 0)

    def advance(
        self,
        events: EventBatch,
        entities: Entities,
        pairs: NDArray[np.intp],
        windows: Windows | None,
        raw: Mapping[str, NDArray[np.float64]],
    ) -> list[Inactivity]:
        """Take a batch; returns the entities that became inactive at its events. pairs: from `ending`; windows, raw: of
        these pairs, from `SequenceScorer.raw` (None: there are no pairs). Raises a `StateError`."""
        last: list[_Pair] = []
        if windows is not None and len(pairs):
            kinds = entities.kind[pairs]
            evidence = self._sequences.evidence("ending", {"ending": raw["ending"]}, kinds)
            nothing = np.zeros(len(pairs))
            p_value = self._scorer.p_value(nothing, HISTORY_TRUST * discounted(evidence), nothing)
            newest = windows.own == windows.times.shape[1] - 1
            columns = (entities.row[pairs], self._timeout[kinds], p_value, windows.complete, newest)
            names = [entities.entity[pair] for pair in pairs.tolist()]
            last = list(zip(*(column.tolist() for column in columns), names, strict=True))
        return self.timers.advance(list(self._steps(events, entities, last)), _spans(events.coordinates))

    def _packed(self, events: EventBatch, entities: Entities) -> Callable[[int], bytes]:
        """From a row to its event as a timer keeps it. Each row is packed once."""
        packed: dict[int, bytes] = {}

        def of(row: int) -> bytes:
            if not self.timers.keeps_events:
                return b""
            if row not in packed:
                masked = self._redactor.record(events.records[row])
                named = tuple(entities.entity[pair] for pair in np.flatnonzero(entities.row == row).tolist())
                hidden = masked.hidden.intersection(name.partition(":")[2].lower() for name in named)
                packed[row] = pack(KeptEvent(replace(masked, hidden=hidden), named))
            return packed[row]

        return of

    def _steps(self, events: EventBatch, entities: Entities, pairs: list[_Pair]) -> Iterator[Activity | ClockAdvance]:
        """The steps of the timers in stream order. Between two ticks only the latest event of an entity counts."""
        at, ticks = events.coordinates, dict(_ticks(events))
        events_at = self._packed(events, entities)
        since: dict[tuple[str, int, bool], _Pair] = {}

        def latest() -> Iterator[Activity]:
            for row, timeout, p_value, complete, newest, entity in since.values():
                place = at.sources[at.source[row]], int(at.offset[row]), int(at.index[row])
                time = max(int(events.time[row]), 0)
                yield Activity(
                    entity, *place, time, timeout, p_value, complete, events_at(row) if newest else b"", newest
                )
            since.clear()

        places = iter(sorted(ticks))
        tick = next(places, None)
        for pair in pairs:
            row, newest, entity = pair[0], pair[4], pair[5]
            while tick is not None and tick <= row:
                yield from latest()
                yield ticks[tick]
                tick = next(places, None)
            source = int(at.source[row])
            since.pop((entity, source, False), None)
            since.pop((entity, source, newest), None)
            since[entity, source, newest] = pair
        yield from latest()
        while tick is not None:
            yield ticks[tick]
            tick = next(places, None)


_Pair = tuple[int, int, float, bool, bool, str]
"""(row, timeout, p-value, complete, newest, entity)"""


def _ticks(events: EventBatch) -> Iterator[tuple[int, ClockAdvance]]:
    """The rows at which the clock of a source may advance."""
    at = events.coordinates
    for number, source in enumerate(at.sources):
        rows = np.flatnonzero(at.source == number)
        if not len(rows):
            continue
        clock = np.maximum.accumulate(np.maximum(events.time[rows], 0)) // TICK_MS
        moves = np.append(True, clock[1:] > clock[:-1])
        for row, now in zip(rows[moves].tolist(), clock[moves].tolist(), strict=True):
            yield row, ClockAdvance(source, int(at.offset[row]), int(at.index[row]), now * TICK_MS)


def _spans(at: Coordinates) -> dict[SourcePartition, Span]:
    spans = {}
    for number, source in enumerate(at.sources):
        offsets = at.offset[at.source == number]
        if len(offsets):
            spans[source] = Span(int(offsets.min()), int(offsets.max()))
    return spans


def pack(kept: KeptEvent) -> bytes:
    """An event in the form in which a timer keeps it. `state.redis.formats.TIMERS` is its format."""
    record, masked = kept.masked.record, kept.masked
    rest = {"named": kept.named, "hidden": sorted(masked.hidden), "cut": masked.cut}
    packed = _compressed(record, rest)
    if len(packed) <= MAX_EVENT:
        return packed
    small = {name: value for name, value in record.items() if len(orjson.dumps(value)) <= MAX_ATTRIBUTE}
    packed = _compressed(small, rest)
    return packed if len(packed) <= MAX_EVENT else _compressed({}, rest)


def _compressed(record: Mapping[str, Any], rest: Mapping[str, Any]) -> bytes:
    return zlib.compress(orjson.dumps({"event": record, **rest}), 1)


def unpack(event: bytes) -> KeptEvent:
    """The inverse of `pack`; of a timer that keeps no event, an empty one."""
    if not event:
        return KeptEvent(Redacted({}, frozenset(), cut=False), ())
    found = orjson.loads(zlib.decompress(event))
    return KeptEvent(Redacted(found["event"], frozenset(found["hidden"]), found["cut"]), tuple(found["named"]))


def coordinates_of(last: list[Activity]) -> Coordinates:
    """The coordinates of last events."""
    sources = tuple(dict.fromkeys(event.source for event in last))
    return Coordinates(
        sources,
        np.array([sources.index(event.source) for event in last], np.int32),
        np.array([event.offset for event in last], np.int64),
        np.array([event.index for event in last], np.int32),
    )


def rows_of(inactive: list[Inactivity], at: Coordinates) -> NDArray[np.intp]:
    """intp [k]: the rows of a batch at which these entities were found inactive."""
    rows = []
    for each in inactive:
        here = (at.source == at.sources.index(each.last.source)) & (at.offset == each.offset)
        rows.append(int(np.flatnonzero(here & (at.index == each.index))[0]))
    return np.array(rows, np.intp)
