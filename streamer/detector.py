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


@dataclass(frozen=True)
class FieldFinding:
    """One attribute that mattered: what was observed, what was expected with its probability, and -log p in nats."""

    path: str
    observed: str
    expected: tuple[tuple[str, float], ...]
    surprise: float


@dataclass(frozen=True)
class Explanation:
    """Why one event was alerted on, in the order of what mattered most.

    fields: at most five; neighbours: the nearest normal events, each a compact redacted copy (path -> value), nearest
    first; distance and usual_distance: to the nearest normal and that of a normal event; window: for a sequence, (event
    time ms, coordinates, one-line summary, share of the score) of each of its events, oldest first.
    """

    fields: tuple[FieldFinding, ...]
    neighbours: tuple[dict[str, Any], ...]
    distance: float
    usual_distance: float
    window: tuple[tuple[int, str, str, float], ...] = ()
