"""Scores to p-values: how often normal data, held out from everything that was fitted, scores at least this.

Conformal p-values (Bates et al. 2023, arXiv:2104.08279) as far as the held-out sample resolves, an exponential tail
(the generalized Pareto of shape 0; Siffer et al. 2017) beyond it. They are valid for data like the sample, and say
nothing about data that has drifted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TAIL = 0.1
"""The share of the sample that the tail is fitted to."""
FEW = 20
"""Of the sample's largest scores: beyond them, counting says little and the tail takes over."""
MIN_TAIL = 10
"""Fewer scores than this in the tail and there is no tail: p-values then end at 1 / (n + 1)."""
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
        where there are no scores or one is not finite."""
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
        """float [m] to float64 [m] in (0, 1], never rising with the score."""
        n = len(self.scores)
        p = (1 + n - np.searchsorted(self.scores, scores, side="left")) / (n + 1)
        if not np.isfinite(self.start):
            return np.asarray(p, np.float64)
        at_start = (1 + n - np.searchsorted(self.scores, self.start, side="right")) / (n + 1)
        beyond = np.maximum(scores.astype(np.float64) - self.start, 0.0) / self.scale
        return np.where(scores > self.start, np.maximum(at_start * np.exp(-beyond), SMALLEST), p)

    def evidence(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """-log p, in nats: float [m] to float64 [m], 0 for what is entirely usual."""
        return -np.log(self.p_value(scores))
