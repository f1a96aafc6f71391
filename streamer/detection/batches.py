"""The batches that flow from the decoder to the alerts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.events import Coordinates, EventBatch, Reject
from state.windows import Windows

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ScoredBatch:
    """n scored events.

    coordinates, time: as in `EventBatch`; p_value: float64 [n] in (0, 1], how often normal data scores at least this;
    severity: float32 [n], 0 to 100; entity: str object [n] (`kind:value`, "" where the event names none); cause: str
    object [n] (`record:ATTRIBUTE PATH`, `sequence:WHAT`, `rate:WHAT` or `first:WHAT`); records: the n decoded events;
    rejects: what could not be read; repairs: how often each kind of repair was made; complete: bool [n], False where
    the history of an entity is known to be missing (None: nothing is); line: float64 [n], the p-value at or under which
    each event is an alert (None: whoever scored did not ask); level: uint8 [n], of a rate the level that the event
    raised its count to (`state.rolling_counts`; None: no cause is a rate); silences: the k last events of entities that
    fell silent, as event time moved on by these events, judged by that (None: nobody did); of those, told: intp [k],
    ascending, the rows here at which that was clear; windows: of the rows of which a sequence is the cause that window
    as it was then (it may have moved on when it is explained); in_sequence: intp [s], ascending, those rows; seconds:
    how long each stage took.
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
    silences: ScoredBatch | None = None
    noticed_at: NDArray[np.intp] | None = None
    windows: Windows | None = None
    in_sequence: NDArray[np.intp] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def episode_key(self, row: int) -> str:
        """What an alert on this event would be about: events of one story spend the budget once."""
        return f"{self.cause[row]} {self.entity[row]}" if self.entity[row] else ""


@dataclass(frozen=True)
class PreparedBatch:
    """n events of which all is known that does not depend on what came before.

    codes: int32 [n, fields]; behaviours: float16 [n, d], what windows remember; record: float64 [n], nats, what each
    event says by itself; cause: str object [n], of which of its attributes; rejects, seconds: as in `ScoredBatch`.
    """

    events: EventBatch
    rejects: list[Reject]
    codes: NDArray[np.int32]
    anonymised: NDArray[np.float16]
    record: NDArray[np.float64]
    cause: NDArray[np.object_]
    seconds: Mapping[str, float]


class StageTimer:
    """Seconds by stage, each from the end of the one before; goes on from those that were taken already."""

    def __init__(self, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        self.seconds = dict(seconds)
        self._began = perf_counter()

    def end(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage], self._began = now - self._began, now
