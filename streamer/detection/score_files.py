"""Scores files in this process with the service's detector: one p-value for each event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from state.errors import SourcePartition
from state.memory.timers import MemoryTimers
from state.memory.windows import MemoryWindows
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.combine import severity
from streamer.detection.detector import Detector
from streamer.detection.isolation import EventIsolation
from streamer.detection.live_calibration import Lowered
from streamer.event_files import Unread, batches, event_uid


@dataclass(frozen=True)
class ScoredFile:
    """n scored events of files, in their order. uids: `metadata.uid`, else the line number; time: int64 [n], ms;
    p_value: float64 [n]; severity: float32 [n]; entity, cause: object [n]; unread: what could not be read; repairs: how
    often each kind of repair was made; lowered: what of the evidence counts less at their end."""

    uids: list[str]
    time: NDArray[np.int64]
    p_value: NDArray[np.float64]
    severity: NDArray[np.float32]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    unread: Unread
    repairs: Counter[str] = field(default_factory=Counter)
    lowered: tuple[Lowered, ...] = ()

    def __len__(self) -> int:
        return len(self.uids)


def score_files(paths: Sequence[Path], bundle: Bundle, progress: Callable[[int], None] = lambda _: None) -> ScoredFile:
    """Score the events of files. At the end of the files, all entities with running timers count as inactive.
    Inactivity replaces the score of the entity's last event where it is less likely. progress: called with the number
    of scored events."""
    windows = MemoryWindows(dim=bundle.dim)
    timers = MemoryTimers(keeps_events=False)
    detector = Detector(bundle, windows, timers=timers)
    detector.live.moves = True
    isolation = EventIsolation()
    inactive: list[ScoredBatch] = []
    uids: list[str] = []
    parts: list[ScoredBatch] = []
    unread = Unread()
    repairs: Counter[str] = Counter()
    for batch in batches(paths, lost=unread.in_file):
        scored = isolation.score(detector, batch)
        detector.take(scored)
        offsets = scored.coordinates.offset.tolist()
        uids.extend(event_uid(record, index + 1) for record, index in zip(scored.records, offsets, strict=True))
        for reject in scored.rejects:
            unread.in_file(batch[0].topic, batch[reject.message].offset, reject)
        for store in (windows, timers):
            store.committed({(batch[0].topic, 0): batch[-1].offset + 1})
        if scored.inactive is not None:
            inactive.append(scored.inactive)
        repairs.update(scored.repairs)
        scored.records.clear()
        parts.append(scored)
        progress(len(uids))
    time = np.concatenate([np.empty(0, np.int64), *(part.time for part in parts)])
    empty = np.empty(0, object)
    p_value = np.concatenate([np.empty(0), *(part.p_value for part in parts)])
    entity = np.concatenate([empty, *(part.entity for part in parts)])
    cause = np.concatenate([empty, *(part.cause for part in parts)])
    if (last := detector.finish()) is not None:
        inactive.append(last)
    places: dict[tuple[SourcePartition, int, int], int] = {}
    if inactive:
        places = {
            coordinates: place for place, coordinates in enumerate(at for part in parts for at in _coordinates(part))
        }
    for silent in inactive:
        for row, coordinates in enumerate(_coordinates(silent)):
            place = places[coordinates]
            if silent.p_value[row] < p_value[place]:
                p_value[place], entity[place], cause[place] = silent.p_value[row], silent.entity[row], silent.cause[row]
    lowered = detector.live.lowered
    return ScoredFile(uids, time, p_value, severity(p_value), entity, cause, unread, repairs, lowered)


def _coordinates(scored: ScoredBatch) -> Iterator[tuple[tuple[str, int], int, int]]:
    at = scored.coordinates
    sources = (at.sources[source] for source in at.source.tolist())
    return zip(sources, at.offset.tolist(), at.index.tolist(), strict=True)
