"""Scoring files in this process, by the service's own detector: one p-value an event."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from streamer.event_files import Unread, batches, event_uid


@dataclass(frozen=True)
class ScoredFile:
    """n scored events of files, in their order: uids (`metadata.uid`, else the line); time: int64 [n], ms; p_value:
    float64 [n]; severity: float32 [n]; entity and cause: object [n]; unread: what could not be read."""

    uids: list[str]
    time: NDArray[np.int64]
    p_value: NDArray[np.float64]
    severity: NDArray[np.float32]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    unread: Unread

    def __len__(self) -> int:
        return len(self.uids)


def score_files(paths: Sequence[Path], bundle: Bundle, progress: Callable[[int], None] = lambda _: None) -> ScoredFile:
    """Score the events of files. At the end all who are waited for count as silent, and an entity's silence stands in
    the place of its last event where it is the odder of the two. `progress` hears how many are done."""
    windows = MemoryWindows(dim=bundle.dim)
    timers = MemoryTimers(keeps_events=False)
    detector = Detector(bundle, windows, timers=timers)
    silences: list[ScoredBatch] = []
    uids: list[str] = []
    parts: list[ScoredBatch] = []
    unread = Unread()
    for batch in batches(paths, lost=unread.in_file):
        scored = detector.score(batch)
        offsets = scored.coordinates.offset.tolist()
        uids.extend(event_uid(record, line + 1) for record, line in zip(scored.records, offsets, strict=True))
        for reject in scored.rejects:
            unread.in_file(batch[0].topic, batch[reject.message].offset, reject)
        for store in (windows, timers):
            store.committed({(batch[0].topic, 0): batch[-1].offset + 1})
        if scored.silences is not None:
            silences.append(scored.silences)
        scored.records.clear()
        parts.append(scored)
        progress(len(uids))
    time = np.concatenate([np.empty(0, np.int64), *(part.time for part in parts)])
    empty = np.empty(0, object)
    p_value = np.concatenate([np.empty(0), *(part.p_value for part in parts)])
    entity = np.concatenate([empty, *(part.entity for part in parts)])
    cause = np.concatenate([empty, *(part.cause for part in parts)])
    if (left := detector.finish()) is not None:
        silences.append(left)
    places: dict[tuple[SourcePartition, int, int], int] = {}
    if silences:
        places = {
            coordinates: place for place, coordinates in enumerate(at for part in parts for at in _coordinates(part))
        }
    for silent in silences:
        for row, coordinates in enumerate(_coordinates(silent)):
            place = places[coordinates]
            if silent.p_value[row] < p_value[place]:
                p_value[place], entity[place], cause[place] = silent.p_value[row], silent.entity[row], silent.cause[row]
    return ScoredFile(uids, time, p_value, severity(p_value), entity, cause, unread)


def _coordinates(scored: ScoredBatch) -> Iterator[tuple[tuple[str, int], int, int]]:
    at = scored.coordinates
    sources = (at.sources[source] for source in at.source.tolist())
    return zip(sources, at.offset.tolist(), at.index.tolist(), strict=True)
