"""The detector: a function from a batch of raw events to a batch of scored events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.events import Coordinates, Reject


@dataclass(frozen=True)
class ScoredBatch:
    """n scored events.

    coordinates, time: as in `EventBatch`; p_value: float64 [n] in (0, 1], how often normal data scores at least this;
    severity: float32 [n], 0 to 100; entity: str object [n] (`kind:value`, "" where the event names none); cause: str
    object [n] (`record:ATTRIBUTE PATH` or `sequence:WHAT`); records: the n decoded events; rejects: what could not be read.
    """

    coordinates: Coordinates
    time: NDArray[np.int64]
    p_value: NDArray[np.float64]
    severity: NDArray[np.float32]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    records: list[dict[str, Any]]
    rejects: list[Reject]

    def __len__(self) -> int:
        return len(self.records)
