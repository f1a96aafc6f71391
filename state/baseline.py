"""The baseline of normal: an HNSW index of deduplicated vectors, and the density of one event type's reference sample.

Promises: built with one thread, so that the same vectors give the same index; searches refuse NaN; an index file is
loaded only with the manifest that was written with it. Neither is ever changed in place: build another and swap.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import torch
from numpy.typing import NDArray

from state.errors import StateError

MAX_VECTORS = 50_000
M, EF_CONSTRUCTION, EF = 16, 100, 64


class BaselineError(StateError):
    """An index that cannot be used: another space or dimension, a changed file, a vector that is not a number."""


class Baseline:
    """Distinct normal vectors under L2.

    members: int64 [count], which of the rows given to `build` each vector is.
    """

    def __init__(self, index: Any, dim: int, members: NDArray[np.int64]) -> None:
        self._index = index
        self.dim = dim
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    @classmethod
    def build(cls, vectors: NDArray[np.float16], *, seed: int) -> Baseline:
        """vectors: float16 [n, d], any number of them equal. Of more than MAX_VECTORS distinct ones, a sample that does
        not mind how often each came, so that what is rare but normal stays in."""
        _refuse_nan(vectors)
        _, members = np.unique(vectors, axis=0, return_index=True)
        if len(members) > MAX_VECTORS:
            members = np.sort(np.random.default_rng(seed).choice(members, MAX_VECTORS, replace=False))
        index = hnswlib.Index(space="l2", dim=vectors.shape[1])
        index.init_index(max_elements=len(members), M=M, ef_construction=EF_CONSTRUCTION, random_seed=seed)
        index.set_num_threads(1)
        index.add_items(vectors[members].astype(np.float32), np.arange(len(members)), num_threads=1)
        index.set_ef(EF)
        return cls(index, vectors.shape[1], members.astype(np.int64))

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """float16 [q, d] to the distances (not squared) and places in `members` of the k nearest, [q, k] each, nearest
        first; k is at most the number of vectors."""
        _refuse_nan(vectors)
        k = min(k, len(self))
        if not len(vectors):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        labels, squared = self._index.knn_query(vectors.astype(np.float32), k=k, num_threads=1)
        return np.sqrt(np.maximum(squared, 0.0)), labels.astype(np.int64)

    def save(self, path: Path) -> dict[str, Any]:
        """Write the index and return its manifest."""
        self._index.save_index(str(path))
        return {
            "space": "l2",
            "dim": self.dim,
            "ef": EF,
            "count": len(self),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }

    @classmethod
    def load(cls, path: Path, manifest: dict[str, Any], members: NDArray[np.int64]) -> Baseline:
        """Raises BaselineError: hnswlib itself loads an index of another space silently and forgets ef."""
        if manifest.get("space") != "l2" or manifest.get("count") != len(members):
            raise BaselineError(
                f"{path} is not the index of its manifest ({manifest}); restore or fit the bundle again"
            )
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise BaselineError(f"{path} cannot be read: {error.strerror}; restore or fit the bundle again") from error
        if digest != manifest["sha256"]:
            raise BaselineError(f"{path} was changed or cut off since it was written; restore or fit the bundle again")
        index = hnswlib.Index(space="l2", dim=int(manifest["dim"]))
        index.load_index(str(path), max_elements=len(members))
        index.set_ef(int(manifest["ef"]))
        index.set_num_threads(1)
        return cls(index, int(manifest["dim"]), members)


def _refuse_nan(vectors: NDArray[np.float16]) -> None:
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise BaselineError(f"{int(bad.sum())} of {len(vectors)} vectors hold NaN or infinity (first: {bad.argmax()})")


MASS = 0.06
"""The share of the reference that counts as an event's neighbourhood. Wide, because a fold of a few unlabelled attacks
in training must not vouch for the next."""
TRIM = 0.05
"""The share of the reference, its loneliest, that is left out."""
SAMPLE = 4096
MIN_REFERENCE = 200


@dataclass(frozen=True)
class Density:
    """Mean distance to the nearest MASS of a reference sample, for one event type each.

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
        """vectors: float16 [n, d], distinct; weights: float64 [n], events each stands for (at least 1); types: int64
        [n]. A type with fewer than MIN_REFERENCE events has no reference."""
        generator = np.random.default_rng(seed)
        parts: list[tuple[int, NDArray[np.float32], NDArray[np.float64]]] = []
        for kind in np.unique(types).tolist():
            rows = np.flatnonzero(types == kind)
            if weights[rows].sum() < MIN_REFERENCE:
                continue
            if len(rows) > SAMPLE:
                rows = generator.choice(rows, SAMPLE, replace=False)
            reference, mass = vectors[rows].astype(np.float32), weights[rows]
            lonely = _mean_distance(reference, reference, mass, 2 * MASS)
            order = np.argsort(lonely, kind="stable")
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
    """Mean distance to the nearest `share` of the weight. In float64, where the square root of a small difference of
    large numbers does not depend on the shape of the matrix."""
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
