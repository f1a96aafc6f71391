"""The batches that flow from the decoder to the alerts: one array for each attribute, one row for each event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.features.vectorizer import FeatureBatch
from encoder.ocsf.entities import Entities
from encoder.ocsf.events import Coordinates, EventBatch, Reject
from state.windows import WindowEntries, Windows
from streamer.detection.live_calibration import LiveCalibration
from streamer.redaction import Redacted, Redactor


@dataclass(frozen=True)
class KeptEvent:
    """An event that a timer kept. masked: what may be shown of it; of `hidden`, only the names of its entities; named:
    its entities, `kind:name`."""

    masked: Redacted
    named: tuple[str, ...]


@dataclass(frozen=True)
class UnusualStretches:
    """Of s events a window that is unlike normal windows. row: intp [s], ascending, the event; entity: str object [s],
    whose window it is; windows: the s windows as they were at the events."""

    row: NDArray[np.intp]
    entity: NDArray[np.object_]
    windows: Windows


@dataclass(frozen=True)
class ScoredBatch:
    """n scored events.

    coordinates, time: as in `EventBatch`; p_value: float64 [n] in (0, 1], how often normal data scores at least this;
    severity: float32 [n], 0 to 100; entity: str object [n] (`kind:value`, "" where the event names none); cause: str
    object [n] (`record:ATTRIBUTE PATH`, `sequence:WHAT`, `rate:WHAT` or `first:WHAT`); records: the n decoded events;
    rejects: what could not be read; repairs: the number of repairs by kind; complete: bool [n], False where part of an
    entity's history is missing (None: no part is); threshold: float64 [n], the p-value at or under which each event is
    an alert (None: not decided yet); level: uint8 [n], for a rate the level to which the event raised its count
    (`state.rolling_counts`; None: no cause is a rate); inactive: the last events of k entities that became inactive
    during this batch, scored for that (None: there are none); noticed_at: of such a batch, intp [k], ascending, the
    rows of the surrounding batch at which the inactivity was detected; in_sequence: intp [s], ascending, the rows whose
    cause is a sequence; windows: their s windows as they were at these events; kept: the n events, where they come from
    a store and `records` are masked (None: `records` are whole); live: the live calibration behind this batch (None:
    there is none); lowered: object [n], the `Lowered` that the evidence of an event was under, None for none (None: of
    no event); stretches: windows that are unusual as a whole (None: none was asked); seconds: the time of each stage.
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
    threshold: NDArray[np.float64] | None = None
    level: NDArray[np.uint8] | None = None
    inactive: ScoredBatch | None = None
    noticed_at: NDArray[np.intp] | None = None
    windows: Windows | None = None
    in_sequence: NDArray[np.intp] | None = None
    kept: list[KeptEvent] | None = None
    live: LiveCalibration | None = None
    lowered: NDArray[np.object_] | None = None
    stretches: UnusualStretches | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def redacted(self, row: int, redactor: Redactor) -> Redacted:
        """The event of a row as it may be shown."""
        shown = redactor.record(self.records[row])  # Again where it was kept: the attributes to mask may have changed.
        if self.kept is None:
            return shown
        kept = self.kept[row].masked
        return Redacted(shown.record, shown.hidden | kept.hidden, shown.cut or kept.cut)

    def episode_key(self, row: int) -> str:
        """Cause and entity of an alert on this event ("" without an entity): events that share them spend the budget
        once."""
        return f"{self.cause[row]} {self.entity[row]}" if self.entity[row] else ""


@dataclass(frozen=True)
class PreparedBatch:
    """n events with all results that do not depend on earlier events.

    features: of each event; entities, entries: the entities of each event, and what their windows append; parts:
    float64 [parts, n] and record: float64 [n], nats, the evidence against each event by itself, in parts and in all;
    cause: str object [n], the attribute it rests on;
    rejects, seconds: as in `ScoredBatch`.
    """

    events: EventBatch
    rejects: list[Reject]
    features: FeatureBatch
    entities: Entities
    entries: WindowEntries
    parts: NDArray[np.float64]
    record: NDArray[np.float64]
    cause: NDArray[np.object_]
    seconds: Mapping[str, float]


class StageTimer:
    """Seconds by stage, each from the end of the previous one. seconds: of stages that were timed before."""

    def __init__(self, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        self.seconds = dict(seconds)
        self._began = perf_counter()

    def end(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage], self._began = now - self._began, now
