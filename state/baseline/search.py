"""Nearest neighbours, by hnswlib or by exact search, with one interface.

Promises the same neighbours from both, except those that HNSW misses. It does not decide which one serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import hnswlib
import numpy as np
import torch
from numpy.typing import NDArray

from state.errors import StateError

_QUERIES = 256


class BaselineError(StateError):
    """An index that cannot be used: another space or dimension, a changed file, a vector with NaN."""


class Neighbours(Protocol):
    """A search over fixed vectors. Both implementations give the same neighbours, except those that HNSW misses."""

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """float16 [q, d] to the distances (not squared) and places of the k nearest, [q, k] each, nearest first."""
        ...


class Exact:
    """Compares every query with every vector, on any device. In float64, in which the root of a small difference of
    large numbers does not depend on the shape of the matrix."""

    def __init__(self, vectors: NDArray[np.float32], device: str = "cpu") -> None:
        self._vectors = torch.from_numpy(vectors).to(device).double()
        self._squares = self._vectors.square().sum(1)

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances, places = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
        for start in range(0, len(vectors), _QUERIES):
            part = slice(start, start + _QUERIES)
            a = torch.from_numpy(vectors[part].astype(np.float64)).to(self._vectors.device)
            squared = a.square().sum(1, keepdim=True) + self._squares - 2 * a @ self._vectors.T
            nearest = torch.topk(squared, k, dim=1, largest=False)
            distances[part] = nearest.values.clamp(min=0).sqrt().float().cpu().numpy()
            places[part] = nearest.indices.cpu().numpy()
        return distances, places


class Hnsw:
    """hnswlib's graph (Malkov and Yashunin 2016): the cost of a query grows slowly with the number of vectors."""

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def build(cls, vectors: NDArray[np.float32], *, seed: int) -> Hnsw:
        """vectors: float32 [count, d], distinct."""
        index = hnswlib.Index(space="l2", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), M=M, ef_construction=EF_CONSTRUCTION, random_seed=seed)
        index.set_num_threads(1)
        index.add_items(vectors, np.arange(len(vectors)), num_threads=1)
        index.set_ef(EF)
        return cls(index)

    def vectors(self) -> NDArray[np.float32]:
        """float32 [count, d], by place."""
        vectors: NDArray[np.float32] = np.asarray(self.index.get_items(np.arange(self.index.element_count)), np.float32)
        return vectors

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels, squared = self.index.knn_query(vectors.astype(np.float32), k=k, num_threads=1)
        return np.sqrt(np.maximum(squared, 0.0)), labels.astype(np.int64)


def refuse_other_space(path: Path, hnsw: Hnsw, count: int) -> None:
    """Refuse an index of another space. The file does not name its space, but one of a cosine space holds vectors of
    length one instead of the float16 values that were added. Raises BaselineError."""
    if hnsw.index.element_count != count:
        raise BaselineError(f"{path} holds {hnsw.index.element_count} vectors, not {count}; fit the bundle again")
    vectors = hnsw.vectors()
    if not np.array_equal(vectors, vectors.astype(np.float16).astype(np.float32)):
        raise BaselineError(f"{path} is an index of another space than l2; fit the bundle again")


def refuse_nan(vectors: NDArray[np.float16]) -> None:
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise BaselineError(f"{int(bad.sum())} of {len(vectors)} vectors hold NaN or infinity (first: {bad.argmax()})")


M, EF_CONSTRUCTION, EF = 16, 200, 32
