"""The shift score: the numbers of an entity have moved away from where they stood, over several events.

Each number of an event enters the entity's window as its deviation: how unusual it is given what it is of
(`encoder.models.contextual_numbers`), positive where it is high. The mean of the LATEST events is compared with that of
the earlier ones: several samples mildly off in one direction are a shift, and an entity that always stands higher than
others of its kind is not. Promises nothing to say where the window's newest event has no number that is judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_network import EMBEDDING
from state.calibration import Calibration
from state.windows import Windows
from streamer.detection.sequence_score import strongest_by_event

LATEST = 3
"""Events over which a shift is measured: one may be chance, and ten are late."""
PRIOR_EVENTS = 2.0
"""The level before a shift counts as if so many more events had been where the context usually is."""
CAUSE = "shift:"
"""What a cause begins with, before the path of the number that shifted most."""


@dataclass
class ShiftScorer:
    """Judges the deviations in the window of each entity, calibrated by kind of entity, then by event.

    paths: the attribute path of each deviation.
    """

    paths: tuple[str, ...]
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, windows: Windows) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """The shifts of all numbers of each of m windows added up, float64 [m], nats, NaN where the newest event has
        none; intp [m], the number that shifted most (its place in `paths`)."""
        total, strongest = np.full(len(windows), np.nan), np.zeros(len(windows), np.intp)
        newest = windows.vectors[:, -1, EMBEDDING:]
        rows = np.flatnonzero((windows.own >= 0) & ~np.isnan(newest).all(1))
        if len(rows):
            deviation = windows.vectors[rows, :, EMBEDDING:].astype(np.float32)
            there = ~np.isnan(deviation) & windows.mask[rows][:, :, None]
            deviation = np.where(there, deviation, np.float32(0))
            latest, count = deviation[:, -LATEST:].sum(1), there[:, -LATEST:].sum(1)
            level = (deviation.sum(1) - latest) / (there.sum(1) - count + PRIOR_EVENTS)
            shift = np.where(there[:, -1], np.abs(latest / np.maximum(count, 1) - level), 0)
            total[rows], strongest[rows] = shift.sum(1), shift.argmax(1)
        return total, strongest

    def fit(self, raw: NDArray[np.float64], kinds: NDArray[np.int8], rows: NDArray[np.int32]) -> None:
        """Calibrate on m held-out windows. raw: float64 [m]; kinds: int8 [m]; rows: int32 [m], the last event of
        each."""
        spoke = ~np.isnan(raw)
        for kind in np.unique(kinds[spoke]).tolist():
            self.calibrations[str(kind)] = Calibration.fit(raw[spoke & (kinds == kind)])
        if spoke.any():
            by_event = strongest_by_event(self.evidence(raw, kinds)[spoke], rows[spoke])
            self.calibrations["shift"] = Calibration.fit(by_event)

    def evidence(self, raw: NDArray[np.float64], kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m], nats, against each window; 0 where nothing is said, and for a kind of entity without held-out
        events."""
        evidence = np.zeros(len(kinds))
        for kind in np.unique(kinds).tolist():
            rows = np.flatnonzero((kinds == kind) & ~np.isnan(raw))
            if (calibration := self.calibrations.get(str(kind))) is not None and len(rows):
                evidence[rows] = calibration.evidence(raw[rows])
        if (by_event := self.calibrations.get("shift")) is not None:
            evidence = np.where(np.isnan(raw), 0.0, by_event.evidence(evidence))
        return evidence

    def causes(self, strongest: NDArray[np.intp]) -> NDArray[np.object_]:
        """str object [m], from the numbers that shifted most, intp [m]."""
        return np.array([f"{CAUSE}{path}" for path in self.paths], object)[strongest]
