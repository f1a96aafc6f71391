"""Silence as evidence: tells the timers what a batch says of the entities whose routines end, and judges each by how
surprising it would be that nothing follows.

Promises that the judgement is made at the event, on the window as it was, and kept with the timer, so that an entity
that falls silent is found without its window. Costs nothing where no kind of entity comes to an end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.ocsf.entities import KINDS, Entities
from encoder.ocsf.events import Coordinates, EventBatch
from state.errors import SourcePartition
from state.timers import TICK_MS, Activity, ClockAdvance, Inactivity, Span, TimerStore
from state.windows import Windows
from streamer.detection.combine import HISTORY_TRUST, EventScorer, beyond_doubt
from streamer.detection.sequence_score import SequenceScorer

CAUSE = "sequence:silence"
MAX_EVENT = 16 * 1024
"""Bytes of an event, packed, kept with its timer; of a larger one, attributes of at most MAX_ATTRIBUTE as JSON."""
MAX_ATTRIBUTE = 512


class InactivityMonitor:
    """Watches the kinds of entity that come to an end. timers: who is waited for."""

    def __init__(self, scorer: EventScorer, sequences: SequenceScorer, timers: TimerStore) -> None:
        self.timers = timers
        self._scorer, self._sequences = scorer, sequences
        self._timeout = np.array([sequences.model.silence.get(kind, 0) for kind in KINDS], np.int64)

    def ending(self, entities: Entities) -> NDArray[np.intp]:
        """Which of the m pairs are of a kind that ends."""
        return np.flatnonzero(self._timeout[entities.kind] > 0)

    def advance(
        self,
        events: EventBatch,
        entities: Entities,
        pairs: NDArray[np.intp],
        windows: Windows | None,
        raw: Mapping[str, NDArray[np.float64]],
    ) -> list[Inactivity]:
        """Event time moves on by a batch: who fell silent at its events. pairs: as `ending` gives them; windows, raw:
        of these pairs, as `SequenceScorer.raw` has it (None: there are none). Raises a `StateError`."""
        found: list[_Pair] = []
        if windows is not None and len(pairs):
            kinds = entities.kind[pairs]
            evidence = self._sequences.evidence("ending", {"ending": raw["ending"]}, kinds)
            p_value = self._scorer.p_value(np.zeros(len(pairs)), HISTORY_TRUST * beyond_doubt(evidence))
            newest = windows.own == windows.times.shape[1] - 1
            columns = (entities.row[pairs], self._timeout[kinds], p_value, windows.complete, newest)
            names = [entities.entity[pair] for pair in pairs.tolist()]
            found = list(zip(*(column.tolist() for column in columns), names, strict=True))
        return self.timers.advance(list(self._steps(events, found)), _spans(events.coordinates))

    def _steps(self, events: EventBatch, pairs: list[_Pair]) -> Iterator[Activity | ClockAdvance]:
        """In stream order; of what an entity does between two ticks the latest stands for all."""
        at, ticks = events.coordinates, dict(_ticks(events))
        events_at = _events(events, keep=self.timers.keeps_events)
        since: dict[tuple[str, int, bool], _Pair] = {}

        def heard() -> Iterator[Activity]:
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
                yield from heard()
                yield ticks[tick]
                tick = next(places, None)
            source = int(at.source[row])
            since.pop((entity, source, False), None)
            since.pop((entity, source, newest), None)
            since[entity, source, newest] = pair
        yield from heard()
        while tick is not None:
            yield ticks[tick]
            tick = next(places, None)


_Pair = tuple[int, int, float, bool, bool, str]
"""(row, quiet, p-value, complete, newest, entity)"""


def _ticks(events: EventBatch) -> Iterator[tuple[int, ClockAdvance]]:
    """The rows at which the clock of a source may move on."""
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


def _events(events: EventBatch, *, keep: bool) -> Any:
    """row -> its event, packed; made once a row."""
    packed: dict[int, bytes] = {}

    def of(row: int) -> bytes:
        if not keep:
            return b""
        if row not in packed:
            packed[row] = pack(events.records[row])
        return packed[row]

    return of


def pack(record: Mapping[str, Any]) -> bytes:
    """An event as a timer keeps it."""
    packed = zlib.compress(orjson.dumps(record), 1)
    if len(packed) <= MAX_EVENT:
        return packed
    small = {name: value for name, value in record.items() if len(orjson.dumps(value)) <= MAX_ATTRIBUTE}
    packed = zlib.compress(orjson.dumps(small), 1)
    return packed if len(packed) <= MAX_EVENT else zlib.compress(b"{}", 1)


def unpack(event: bytes) -> dict[str, Any]:
    """The inverse of `pack`."""
    record: dict[str, Any] = orjson.loads(zlib.decompress(event)) if event else {}
    return record


def coordinates_of(last: list[Activity]) -> Coordinates:
    """Of the last events."""
    sources = tuple(dict.fromkeys(heard.source for heard in last))
    return Coordinates(
        sources,
        np.array([sources.index(heard.source) for heard in last], np.int32),
        np.array([heard.offset for heard in last], np.int64),
        np.array([heard.index for heard in last], np.int32),
    )


def rows_of(silences: list[Inactivity], at: Coordinates) -> NDArray[np.intp]:
    """The rows of a batch at which these were clear, intp [k]."""
    rows = []
    for silence in silences:
        here = (at.source == at.sources.index(silence.last.source)) & (at.offset == silence.offset)
        rows.append(int(np.flatnonzero(here & (at.index == silence.index))[0]))
    return np.array(rows, np.intp)
