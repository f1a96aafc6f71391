"""Density: how far a vector lies from the bulk of the events of its type.

Promises distances that do not depend on the batch. It knows event types only, not entities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

MASS = 0.06
"""The share of the reference that is an event's neighbourhood. It is large, so that a few unlabelled attacks in
training do not make the next one look normal."""
TRIM = 0.05
"""The share of the reference that is left out: the vectors farthest from the others."""
SAMPLE = 4096
MIN_REFERENCE = 200


@dataclass(frozen=True)
class Density:
    """The mean distance to the nearest MASS of a reference sample, with one sample for each event type.

    vectors: float32 [r, d] and weights: float64 [r], grouped; starts: int64 [types + 1]; types: int64 [types], sorted.
    """

    vectors: NDArray[np.float32]
    weights: NDArray[np.float64]
    starts: NDArray[np.int64]
    types: NDArray[np.int64]

    @classmethod
    def fit(
        cls, vectors: NDArray[np.float16], weights: NDArray[np.float64], types: NDArray[np.int64], *, seed: int
    ) -> Density:
        """vectors: float16 [n, d], distinct; weights: float64 [n], events of each (at least 1); types: int64 [n]. A
        type with fewer than MIN_REFERENCE events has no reference."""
        generator = np.random.default_rng(seed)
        parts: list[tuple[int, NDArray[np.float32], NDArray[np.float64]]] = []
        for kind in np.unique(types).tolist():
            rows = np.flatnonzero(types == kind)
            if weights[rows].sum() < MIN_REFERENCE:
                continue
            if len(rows) > SAMPLE:
                rows = generator.choice(rows, SAMPLE, replace=False)
            reference, mass = vectors[rows].astype(np.float32), weights[rows]
            sparse = _mean_distance(reference, reference, mass, 2 * MASS)
            order = np.argsort(sparse, kind="stable")
            kept = np.sort(order[np.cumsum(mass[order]) <= (1 - TRIM) * mass.sum()])
            if len(kept):
                parts.append((kind, reference[kept], mass[kept]))
        dim = vectors.shape[1]
        return cls(
            np.concatenate([part[1] for part in parts]) if parts else np.empty((0, dim), np.float32),
            np.concatenate([part[2] for part in parts]) if parts else np.empty(0),
            np.cumsum([0] + [len(part[1]) for part in parts]).astype(np.int64),
            np.array([part[0] for part in parts], np.int64),
        )

    def sparse(
        self, vectors: NDArray[np.float16], weights: NDArray[np.float64], types: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """bool [n], arguments as in `fit`: the vectors farthest from their reference, TRIM of each type's weight.
        Unlabelled attacks in training are among them, and would be the nearest neighbours of the next attack."""
        distance, out = self(vectors, types), np.zeros(len(vectors), np.bool_)
        for kind in self.types.tolist():
            rows = np.flatnonzero(types == kind)
            farthest = rows[np.argsort(-distance[rows], kind="stable")]
            out[farthest] = np.cumsum(weights[farthest]) <= TRIM * weights[rows].sum()
        return out

    def __call__(self, vectors: NDArray[np.float16], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float16 [n, d] and int64 [n] to float64 [n], NaN where the type has no reference."""
        out = np.full(len(vectors), np.nan)
        for place, kind in enumerate(self.types.tolist()):
            rows = np.flatnonzero(types == kind)
            if len(rows):
                own = slice(int(self.starts[place]), int(self.starts[place + 1]))
                out[rows] = _mean_distance(vectors[rows].astype(np.float32), self.vectors[own], self.weights[own], MASS)
        return out


def _mean_distance(
    queries: NDArray[np.float32], reference: NDArray[np.float32], weights: NDArray[np.float64], share: float
) -> NDArray[np.float64]:
    """float64 [q]: the mean distance to the nearest `share` of the weight. In float64, in which the root of a small
    difference of large numbers does not depend on the shape of the matrix."""
    b = torch.from_numpy(reference).double()
    w = torch.from_numpy(weights)
    mass = max(share * float(weights.sum()), 1.0)
    k = min(len(b), int(np.ceil(mass)) + 1)
    out = np.empty(len(queries))
    for start in range(0, len(queries), 512):
        a = torch.from_numpy(queries[start : start + 512]).double()
        squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        nearest = torch.topk(squared, k, dim=1, largest=False)
        distance = nearest.values.clamp(min=0).sqrt()
        near = w[nearest.indices]
        before = near.cumsum(1) - near
        share_of = (mass - before).clamp(min=0).minimum(near)
        out[start : start + 512] = ((distance * share_of).sum(1) / share_of.sum(1)).numpy()
    return out
