"""Scores to p-values: how often normal data, held out from everything that was fitted, scores at least this.

Conformal p-values (Bates et al. 2023, arXiv:2104.08279) as far as the held-out sample resolves, an exponential tail
(the generalized Pareto of shape 0; Siffer et al. 2017) beyond it. Promises valid p-values for data like the sample, not
for data that has drifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TAIL = 0.1
"""The share of the sample to which the tail is fitted."""
FEW = 20
"""The number of largest scores from which the tail starts where counting is too coarse (`tail_from`)."""
MIN_TAIL = 10
"""The least scores in a tail; with fewer there is none, and p-values end at 1 / (n + 1)."""
SMALLEST = 1e-300


@dataclass(frozen=True)
class Calibration:
    """scores: float64 [n], the held-out scores, ascending; start and scale: where the tail begins and its mean excess,
    both NaN where the sample has no tail."""

    scores: NDArray[np.float64]
    start: float
    scale: float

    @classmethod
    def fit(cls, scores: NDArray[np.floating], *, tail_from: int | None = None) -> Calibration:
        """tail_from: the tail begins at the score that so many exceed; by default, TAIL of them. Raises ValueError
        without scores, or where one is not finite."""
        ordered = np.sort(scores.astype(np.float64))
        if not len(ordered) or not np.isfinite(ordered).all():
            raise ValueError(f"cannot calibrate on {len(ordered)} scores, of which {np.sum(~np.isfinite(ordered))} NaN")
        share = TAIL if tail_from is None else min(TAIL, tail_from / len(ordered))
        start = float(np.quantile(ordered, 1 - share))
        excess = ordered[ordered > start] - start
        if len(excess) < MIN_TAIL:
            return cls(ordered, np.nan, np.nan)
        return cls(ordered, start, float(excess.mean()))

    def p_value(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """float [m] to float64 [m] in (0, 1], not increasing with the score."""
        n = len(self.scores)
        p = (1 + n - np.searchsorted(self.scores, scores, side="left")) / (n + 1)
        if not np.isfinite(self.start):
            return np.asarray(p, np.float64)
        at_start = (1 + n - np.searchsorted(self.scores, self.start, side="right")) / (n + 1)
        beyond = np.maximum(scores.astype(np.float64) - self.start, 0.0) / self.scale
        return np.where(scores > self.start, np.maximum(at_start * np.exp(-beyond), SMALLEST), p)

    def evidence(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """-log p in nats: float [m] to float64 [m], 0 for a usual score."""
        return -np.log(self.p_value(scores))
