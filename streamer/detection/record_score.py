"""The record score: the evidence against one event by itself.

Combines density and surprise, each calibrated on held-out events. It knows no windows and no other events of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_encoder import Encoded
from state.baseline.baseline import Baseline
from state.baseline.density import Density
from state.calibration import Calibration

DENSITY_TRUST = 2.0
"""The weight of density relative to surprise. Density applies only to events with quantities; there it is the best
part, most of all where training holds unlabelled attacks. Measured in docs/detection.md."""
HALF = 0.5
"""The share of quantities among an event's attributes at which density has its full weight; below, its weight is
proportional: four numbers among twenty names do not characterise an event."""
SHARPNESS = 3.0
"""The exponent of the norm that combines density and surprise. 1 would add them up, which halves the evidence against
attacks that only density detects; infinity would take the stronger of the two."""
NOVELTY_TRUST = 2 / 3
"""The weight of the distance to the nearest vectors beside the two counting scores, with which it correlates."""
NEIGHBOURS = 3
_SURPRISES = {"odd_value": 1.0, "odd_for_actor": 1.0, "novelty": NOVELTY_TRUST}


@dataclass(frozen=True)
class Parts:
    """Evidence against each of n events, float64 [n] in nats, 0 for none. density: the event lies apart from events of
    its type; surprise: its values are unusual, by themselves or for the actor, or no event is like it."""

    density: NDArray[np.float64]
    surprise: NDArray[np.float64]

    def combined(self) -> NDArray[np.float64]:
        """float64 [n]: both, weighted: little more than the stronger."""
        powers = (DENSITY_TRUST * self.density) ** SHARPNESS + self.surprise**SHARPNESS
        norm: NDArray[np.float64] = powers ** (1 / SHARPNESS)
        return norm


@dataclass
class RecordScorer:
    """The record score. baseline, density: what events are compared with; calibrations: by name, of density by event
    type.

    quantities: float64 [types of density], the share of an event's attributes that are quantities.
    """

    baseline: Baseline
    density: Density
    quantities: NDArray[np.float64]
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, encoded: Encoded, types: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated scores of n distinct events, float64 [n] by name."""
        return {
            "odd_value": encoded.max_surprise.astype(np.float64),
            "odd_for_actor": encoded.max_surprise_for_actor.astype(np.float64),
            "novelty": self.baseline.search(encoded.vectors, NEIGHBOURS)[0].mean(1).astype(np.float64),
            "density": self.density(encoded.vectors, types),
        }

    def fit(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> None:
        """Calibrate on the raw scores of held-out events; types: int64 [n], their event types."""
        for name in _SURPRISES:
            self.calibrations[name] = Calibration.fit(raw[name])
        density = raw["density"]
        for kind in self.density.types.tolist():
            scores = density[(types == kind) & np.isfinite(density)]
            if len(scores):
                self.calibrations[f"density.{kind}"] = Calibration.fit(scores)
        self.calibrations["surprise"] = Calibration.fit(self._surprise(raw))
        self.calibrations["record"] = Calibration.fit(self.parts(raw, types).combined())

    def _surprise(self, raw: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The sum of the evidence of three scores, as in Fisher's method. They depend on each other, so the sum is
        calibrated again."""
        parts = [trust * self.calibrations[name].evidence(raw[name]) for name, trust in _SURPRISES.items()]
        total: NDArray[np.float64] = np.sum(parts, axis=0)
        return total

    def parts(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> Parts:
        """The evidence of each part."""
        density = np.zeros(len(types))
        for kind, quantities in zip(self.density.types.tolist(), self.quantities.tolist(), strict=True):
            rows = types == kind
            if (calibration := self.calibrations.get(f"density.{kind}")) is not None and rows.any():
                density[rows] = calibration.evidence(raw["density"][rows]) * min(quantities / HALF, 1.0)
        return Parts(density, self.calibrations["surprise"].evidence(self._surprise(raw)))

    def evidence(self, parts: Parts) -> NDArray[np.float64]:
        """float64 [n], nats: all parts as one."""
        return self.calibrations["record"].evidence(parts.combined())
