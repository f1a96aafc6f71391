"""How far a vector lies from the many: isolation by nearest neighbours (Bandaragoda et al. 2018).

A sample of an event type's training vectors is cut into random groups. The score is the mean, over the groups, of the
distance to the nearest member of each: an event that a handful of training events resemble is near in a handful of
groups and far in all others. So a few unlabelled attacks in training do not hide the next one. Promises that a score
does not depend on the batch beyond the arithmetic of float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUPS = (16, 32, 64)
"""Members of a group. The three scales are averaged on a log scale."""
SAMPLE = 1024
"""Members of a reference, a power of two. From 512 to 8192 detection is the same (docs/detection.md)."""
MIN_REFERENCE = 50
"""Training events from which on a type has a reference of its own; a rarer one is compared with all types together."""
_NEAR = 1e-3
"""Added to distances before the logarithm: what is nearer than this is the same."""


@dataclass(frozen=True)
class GroupDistance:
    """vectors: float32 [r, d], the references one after the other, at last that of all types; starts: int64
    [types + 2], where each begins; types: int64 [types], sorted."""

    vectors: NDArray[np.float32]
    starts: NDArray[np.int64]
    types: NDArray[np.int64]

    @classmethod
    def fit(
        cls, vectors: NDArray[np.float16], weights: NDArray[np.float64], types: NDArray[np.int64], *, seed: int
    ) -> GroupDistance:
        """vectors: float16 [n, d], distinct, at least one; weights: float64 [n], events each stands for; types: int64
        [n]."""
        generator = np.random.default_rng(seed)
        known = [kind for kind in np.unique(types).tolist() if weights[types == kind].sum() >= MIN_REFERENCE]
        rows = [*(np.flatnonzero(types == kind) for kind in known), np.arange(len(vectors))]
        parts = [vectors[_sample(each, weights, generator)].astype(np.float32) for each in rows]
        return cls(
            np.concatenate(parts),
            np.cumsum([0, *map(len, parts)]).astype(np.int64),
            np.array(known, np.int64),
        )

    def __call__(self, vectors: NDArray[np.float16], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float16 [n, d] and int64 [n] to the mean log distance, float64 [n]."""
        place = np.searchsorted(self.types, types)
        of_all = len(self.types)
        known = (place < of_all) & (self.types[np.minimum(place, max(of_all - 1, 0))] == types if of_all else False)
        place = np.where(known, place, of_all)
        out = np.empty(len(vectors))
        for which in np.unique(place).tolist():
            rows = np.flatnonzero(place == which)
            reference = self.vectors[self.starts[which] : self.starts[which + 1]]
            out[rows] = log_group_distance(reference, vectors[rows].astype(np.float32))
        return out


def log_group_distance(reference: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """float32 [r, d], r a power of two, and float32 [n, d] to float64 [n]."""
    known = reference.astype(np.float64)
    norms = (known**2).sum(1)
    out = np.empty(len(queries))
    for start in range(0, len(queries), 512):
        asked = queries[start : start + 512].astype(np.float64)
        squared = norms + (asked**2).sum(1)[:, None] - 2 * (asked @ known.T)
        scales = []
        for size in GROUPS:
            nearest = squared.reshape(len(asked), -1, min(size, len(known))).min(2)
            scales.append(np.sqrt(np.maximum(nearest, 0.0)).mean(1))
        out[start : start + 512] = np.log(np.array(scales) + _NEAR).mean(0)
    return out


def _sample(rows: NDArray[np.intp], weights: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.intp]:
    """A power of two of these rows, drawn by how many events each stands for: at most SAMPLE."""
    mass = weights[rows]
    size = 1 << (int(min(SAMPLE, max(mass.sum(), GROUPS[0]))).bit_length() - 1)
    return generator.choice(rows, size, p=mass / mass.sum())
