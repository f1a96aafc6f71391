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

_ODD = np.int64(0x1E3779B97F4A7C15)


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


class RunCounts:
    """-log p of an outcome after the runs of up to ORDER outcomes before it, by counting, with Witten-Bell backoff
    (Bell et al. 1990): what a network has to beat on routines.

    An entity counts once for each run and outcome: what one machine does a thousand times a day is one observation of
    what machines do. keys: int64 [k], sorted; counts: float32 [k, 2], of (kind, run, outcome) how many entities, and of
    (kind, run) their sum and the number of distinct outcomes.
    """

    def __init__(self, keys: NDArray[np.int64], counts: NDArray[np.float32], outcomes: int) -> None:
        self.keys, self.counts, self.outcomes = keys, counts, outcomes

    @classmethod
    def fit(
        cls,
        entity: NDArray[np.int64],
        kind: NDArray[np.int64],
        runs: NDArray[np.int64],
        outcome: NDArray[np.int64],
        outcomes: int,
    ) -> RunCounts:
        """entity, kind: int64 [m]; runs: int64 [m, ORDER], latest first, -1 where there was nothing; outcome: int64
        [m]."""
        keys: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.float64]] = []
        for order in range(ORDER + 1):
            wanted = _run_keys(kind, runs, order, outcome)
            _, once = np.unique(wanted ^ (entity * _ODD), return_index=True)
            pair, first, count = np.unique(wanted[once], return_index=True, return_counts=True)
            at = once[first]
            run, inverse = np.unique(_run_keys(kind[at], runs[at], order, None), return_inverse=True)
            totals = np.bincount(inverse, weights=count)
            keys += [pair, run]
            counts += [np.column_stack([count, count]), np.column_stack([totals, np.bincount(inverse)])]
        all_keys = np.concatenate(keys)
        by_key = np.argsort(all_keys, kind="stable")
        return cls(all_keys[by_key], np.concatenate(counts)[by_key].astype(np.float32), outcomes)

    def _look_up(self, keys: NDArray[np.int64]) -> NDArray[np.float32]:
        if not len(self.keys):
            return np.zeros((len(keys), 2), np.float32)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where((self.keys[at] == keys)[:, None], self.counts[at], np.float32(0))

    def probability(
        self, kind: NDArray[np.int64], runs: NDArray[np.int64], outcome: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """float64 [m], as in `fit`."""
        p = np.full(len(kind), 1.0 / self.outcomes)
        for order in range(ORDER + 1):
            hits = self._look_up(_run_keys(kind, runs, order, outcome))[:, 0]
            total, distinct = self._look_up(_run_keys(kind, runs, order, None)).T
            seen = total > 0
            p = np.where(seen, (hits + distinct * p) / np.maximum(total + distinct, 1.0), p)
        return p


def _run_keys(
    kind: NDArray[np.int64], runs: NDArray[np.int64], order: int, outcome: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    what = np.full(len(kind), -1, np.int64) if outcome is None else outcome
    parts = [np.full(len(kind), order, np.int64), kind, what, *runs[:, :order].T]
    return row_hash(np.column_stack(parts).astype(np.int32)).view(np.int64)
