"""The codebook: maps record vectors to codes, the vocabulary of the sequence model.

It has a code for each of the most common records of training, and one for each cluster of the rest; vectors unlike all
of these are OTHER. Promises the same code for the same vector in every process. It knows nothing of time or entities.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder.features.vectorizer import row_hash

CODES = 512
"""Codes: one half for the most common records, the other for clusters of the rest."""
ORDER = 3
"""Codes before the counted one in an n-gram."""


class Codebook:
    """Maps record vectors to codes.

    centres: float32 [k, d], the most common distinct vectors of training, then cluster centres of the rest; reach:
    float32 [k], the largest distance of a training vector from its centre, with a margin. A vector beyond the reach of
    its nearest centre gets code k, OTHER.
    """

    def __init__(self, centres: Tensor, reach: Tensor) -> None:
        self.centres, self.reach = centres, reach

    @property
    def other(self) -> int:
        return len(self.centres)

    @classmethod
    def fit(cls, vectors: NDArray[np.float16], *, seed: int, size: int = CODES) -> Codebook:
        """vectors: float16 [n, d], of training events."""
        from sklearn.cluster import MiniBatchKMeans  # Not at the top: scoring does without scikit-learn and scipy.

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
        codebook = cls(torch.from_numpy(np.ascontiguousarray(centres, np.float32)), torch.zeros(len(centres)))
        nearest, distance = codebook._nearest(torch.from_numpy(distinct))
        codebook.reach.scatter_reduce_(0, nearest, distance, "amax")
        # The margin: how far vectors of one meaning lie apart, over the whole codebook.
        codebook.reach = (
            torch.maximum(codebook.reach * 1.05, torch.full_like(codebook.reach, 1e-3)) + 0.5 * codebook.reach.median()
        )
        return codebook

    def _nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        parts = [torch.cdist(part, self.centres).min(dim=1) for part in torch.split(vectors, 4096)]
        if not parts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])

    def __call__(self, vectors: NDArray[np.float16]) -> NDArray[np.int64]:
        """float16 [n, d] to codes, int64 [n]; each distinct vector is looked up once."""
        first, inverse = distinct_rows(vectors)
        known = torch.from_numpy(vectors[first].astype(np.float32)).to(self.centres.device)
        nearest, distance = self._nearest(known)
        codes = torch.where(distance <= self.reach[nearest], nearest, self.other).cpu().numpy()
        return codes[inverse]


def distinct_rows(vectors: NDArray[np.float16]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first row of each distinct vector, intp [k], and the index of its vector for every row, intp [n]. vectors:
    float16 [n, d]."""
    bits = np.ascontiguousarray(vectors).view(np.uint16).astype(np.int32)
    keys = row_hash((bits[:, ::2] << 16) + bits[:, 1::2] if bits.shape[1] % 2 == 0 else bits)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.ravel()
