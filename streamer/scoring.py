"""From distances and surprises to one p-value an event.

Each part of the record score is calibrated on held-out normal data, so that they can be compared, and the event is as
unusual as the strongest of them says, each weighed by how far it is to be trusted. The result is calibrated again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.runtime import Encoded
from state.baseline import Baseline, Density
from state.calibration import Calibration

DENSITY_TRUST, SURPRISE_TRUST, NOVELTY_TRUST = 2.0, 1.0, 0.5
"""How far each part is trusted. Density speaks only where events carry quantities, and there it is the best; novelty
(nobody like it, ever) is fooled by one unlabelled attack in training. Measured in docs/detection.md."""
BLEND = 0.01
"""How much the other parts add to the strongest: an order among events that it puts level."""
NEIGHBOURS = 3
SEVERITY_PER_DECADE = 12.5


@dataclass(frozen=True)
class Parts:
    """Evidence against each of n events, float64 [n] in nats, 0 for nothing: `density`, `surprise`, `novelty`."""

    density: NDArray[np.float64]
    surprise: NDArray[np.float64]
    novelty: NDArray[np.float64]

    def combined(self) -> NDArray[np.float64]:
        """The strongest, weighed."""
        weighed = np.stack([DENSITY_TRUST * self.density, SURPRISE_TRUST * self.surprise, NOVELTY_TRUST * self.novelty])
        strongest: NDArray[np.float64] = weighed.max(0) + BLEND * (self.density + self.surprise + self.novelty)
        return strongest

    def take(self, rows: NDArray[np.intp]) -> Parts:
        return Parts(self.density[rows], self.surprise[rows], self.novelty[rows])


@dataclass
class RecordScorer:
    """The record score: what it compares with and how it is calibrated (by name; density by event type)."""

    baseline: Baseline
    density: Density
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, encoded: Encoded, types: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated scores of n distinct events, float64 [n] by name."""
        found: dict[str, NDArray[np.float64]] = {
            f"oddness.{name}": score.astype(np.float64) for name, score in encoded.oddness.items()
        }
        found["novelty"] = self.baseline.search(encoded.vectors, NEIGHBOURS)[0].mean(1).astype(np.float64)
        found["density"] = self.density(encoded.vectors, types)
        return found

    def fit(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> None:
        """Calibrate on the raw scores of held-out events."""
        calibrations = self.calibrations
        for name in raw:
            if name != "density":
                calibrations[name] = Calibration.fit(raw[name])
        density = raw["density"]
        for kind in self.density.types.tolist():
            scores = density[(types == kind) & np.isfinite(density)]
            if len(scores):
                calibrations[f"density.{kind}"] = Calibration.fit(scores)
        calibrations["surprise"] = Calibration.fit(self._oddness(raw))
        calibrations["record"] = Calibration.fit(self.parts(raw, types).combined())

    def _oddness(self, raw: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The evidence of all oddness scores added (Fisher's method, but for their dependence: calibrated after)."""
        names = [name for name in raw if name.startswith("oddness.")]
        total: NDArray[np.float64] = np.sum([self.calibrations[name].evidence(raw[name]) for name in names], axis=0)
        return total

    def parts(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> Parts:
        """The evidence of each part."""
        density = np.zeros(len(types))
        for kind in np.unique(types[np.isfinite(raw["density"])]).tolist():
            rows = types == kind
            if (calibration := self.calibrations.get(f"density.{kind}")) is not None:
                density[rows] = calibration.evidence(raw["density"][rows])
        surprise = self.calibrations["surprise"].evidence(self._oddness(raw))
        return Parts(density, surprise, self.calibrations["novelty"].evidence(raw["novelty"]))

    def p_value(self, parts: Parts) -> NDArray[np.float64]:
        """float64 [n] in (0, 1]."""
        return self.calibrations["record"].p_value(parts.combined())


def severity(p_value: NDArray[np.float64]) -> NDArray[np.float32]:
    """0 to 100, 12.5 for each power of ten by which normal data is rarer than this: 50 is one in ten thousand events,
    100 one in a hundred million. It means the same in every bundle."""
    return np.clip(-SEVERITY_PER_DECADE * np.log10(p_value), 0, 100).astype(np.float32)
