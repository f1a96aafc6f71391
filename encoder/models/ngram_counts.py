"""N-gram counts of codes: which code follows which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from encoder.features.vectorizer import row_hash
from encoder.models.codebook import ORDER


class NgramCounts:
    """The probability of a code after up to ORDER earlier codes, by counting, with Witten-Bell backoff (Bell et al.
    1990): the baseline that a network has to beat on routines.

    An entity counts once for each n-gram: what one machine does a thousand times a day is one observation. keys: int64
    [k], sorted; counts: float32 [k, 2]: for (kind, run, code) the number of entities, for (kind, run) their sum and the
    number of distinct codes; vocabulary: the number of codes.
    """

    def __init__(self, keys: NDArray[np.int64], counts: NDArray[np.float32], vocabulary: int) -> None:
        self.keys, self.counts, self.vocabulary = keys, counts, vocabulary

    @classmethod
    def fit(
        cls,
        entity: NDArray[np.int64],
        kind: NDArray[np.int64],
        runs: NDArray[np.int64],
        code: NDArray[np.int64],
        vocabulary: int,
    ) -> NgramCounts:
        """entity, kind: int64 [m]; runs: int64 [m, ORDER], the earlier codes, latest first, -1 for none; code: int64
        [m]."""
        keys: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.float64]] = []
        for order in range(ORDER + 1):
            wanted = _run_keys(kind, runs, order, code)
            _, once = np.unique(wanted ^ (entity * _ODD), return_index=True)
            pair, first, count = np.unique(wanted[once], return_index=True, return_counts=True)
            at = once[first]
            run, inverse = np.unique(_run_keys(kind[at], runs[at], order, None), return_inverse=True)
            totals = np.bincount(inverse, weights=count)
            keys += [pair, run]
            counts += [np.column_stack([count, count]), np.column_stack([totals, np.bincount(inverse)])]
        all_keys = np.concatenate(keys)
        by_key = np.argsort(all_keys, kind="stable")
        return cls(all_keys[by_key], np.concatenate(counts)[by_key].astype(np.float32), vocabulary)

    def _look_up(self, keys: NDArray[np.int64]) -> NDArray[np.float32]:
        if not len(self.keys):
            return np.zeros((len(keys), 2), np.float32)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where((self.keys[at] == keys)[:, None], self.counts[at], np.float32(0))

    def probability(
        self, kind: NDArray[np.int64], runs: NDArray[np.int64], code: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """float64 [m], the probability of each code; arguments as in `fit`."""
        p = np.full(len(kind), 1.0 / self.vocabulary)
        for order in range(ORDER + 1):
            hits = self._look_up(_run_keys(kind, runs, order, code))[:, 0]
            total, distinct = self._look_up(_run_keys(kind, runs, order, None)).T
            seen = total > 0
            p = np.where(seen, (hits + distinct * p) / np.maximum(total + distinct, 1.0), p)
        return p


def _run_keys(
    kind: NDArray[np.int64], runs: NDArray[np.int64], order: int, code: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    what = np.full(len(kind), -1, np.int64) if code is None else code
    parts = [np.full(len(kind), order, np.int64), kind, what, *runs[:, :order].T]
    return row_hash(np.column_stack(parts).astype(np.int32)).view(np.int64)


_ODD = np.int64(0x1E3779B97F4A7C15)
