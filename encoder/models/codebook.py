"""Outcomes: which of the known kinds of record a vector is, and what follows what, by counting.

A codebook names the commonest records of training and clusters of the others; what is like none of them is OTHER. Runs
of outcomes are counted as a network would have to learn them. Promises the same outcome for the same vector in every
process. Knows nothing of time and of entities but their kind.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from encoder.features.vectorizer import row_hash

CODES = 512
"""Records told apart as outcomes: the commonest and, of the rest, clusters."""
ORDER = 3
"""Outcomes before the one that is counted."""


class Codebook:
    """Record vectors to outcomes: the commonest distinct vectors of training, then cluster centres of the others.

    centres: float32 [k, d]; reach: float32 [k], the farthest that a training vector lay from its centre. A vector
    beyond the reach of its nearest centre is OTHER, outcome k: like nothing in training.
    """

    def __init__(self, centres: Tensor, reach: Tensor) -> None:
        self.centres, self.reach = centres, reach

    @property
    def other(self) -> int:
        return len(self.centres)

    @classmethod
    def fit(cls, vectors: NDArray[np.float16], *, seed: int, size: int = CODES) -> Codebook:
        """vectors: float16 [n, d], of training events."""
        first, inverse = distinct_rows(vectors)
        counts = np.bincount(inverse)
        order = np.argsort(-counts, kind="stable")
        distinct = vectors[first[order]].astype(np.float32)
        common = distinct if len(distinct) <= size else distinct[: size // 2]
        rest = distinct[len(common) :]
        centres = common
        if len(rest):
            weights = np.sqrt(counts[order[len(common) :]])
            model = MiniBatchKMeans(size - len(common), random_state=seed, batch_size=1024, n_init=1, max_iter=20)
            centres = np.concatenate([common, model.fit(rest, sample_weight=weights).cluster_centers_])
        book = cls(torch.from_numpy(np.ascontiguousarray(centres, np.float32)), torch.zeros(len(centres)))
        nearest, distance = book._nearest(torch.from_numpy(distinct))
        book.reach.scatter_reduce_(0, nearest, distance, "amax")
        # A little beyond: as far as vectors of one meaning were seen to lie apart, over all of the book.
        book.reach = torch.maximum(book.reach * 1.05, torch.full_like(book.reach, 1e-3)) + 0.5 * book.reach.median()
        return book

    def _nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.cdist(part, self.centres).min(dim=1) for part in torch.split(vectors, 4096)]
        if not found:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])

    def __call__(self, vectors: NDArray[np.float16]) -> NDArray[np.int64]:
        """float16 [n, d] to int64 [n]: each distinct vector is looked up once."""
        first, inverse = distinct_rows(vectors)
        known = torch.from_numpy(vectors[first].astype(np.float32)).to(self.centres.device)
        nearest, distance = self._nearest(known)
        codes = torch.where(distance <= self.reach[nearest], nearest, self.other).cpu().numpy()
        return codes[inverse]


def distinct_rows(vectors: NDArray[np.float16]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first row of each kind, and for every row which of them is its like. vectors: float16 [n, d]."""
    bits = np.ascontiguousarray(vectors).view(np.uint16).astype(np.int32)
    keys = row_hash((bits[:, ::2] << 16) + bits[:, 1::2] if bits.shape[1] % 2 == 0 else bits)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.ravel()
