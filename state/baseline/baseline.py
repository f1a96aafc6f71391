"""The baseline of normal: a search over deduplicated vectors (HNSW or exact), and the density of one event type's
reference sample.

Promises: built with one thread, so that the same vectors give the same index; searches refuse NaN; an index file is
loaded only with the manifest that was written with it, into the space that it was made for. Neither is ever changed in
place: build another and swap.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import hnswlib
import numpy as np
import torch
from numpy.typing import NDArray

from state.errors import StateError

MAX_VECTORS = 50_000
M, EF_CONSTRUCTION, EF = 16, 200, 128
EXACT_UP_TO = 2_000
"""Vectors that are searched exactly on a CPU: below, that is as fast as the graph. Measured in docs/performance.md."""
CANARY = 1024
"""One live query of so many is searched exactly, too."""
ENOUGH_QUERIES, MIN_RECALL = 100, 0.9
"""From so many on, a smaller share of neighbours found turns HNSW off: slow is better than blind."""
_QUERIES = 256


class BaselineError(StateError):
    """An index that cannot be used: another space or dimension, a changed file, a vector that is not a number."""


class Neighbours(Protocol):
    """A search over fixed vectors: both implementations give the same neighbours, but for what HNSW misses."""

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """float16 [q, d] to the distances (not squared) and places of the k nearest, [q, k] each, nearest first."""
        ...


class Exact:
    """Every query against every vector, on any device. In float64, where the square root of a small difference of large
    numbers does not depend on the shape of the matrix."""

    def __init__(self, vectors: NDArray[np.float32], device: str = "cpu") -> None:
        self._vectors = torch.from_numpy(vectors).to(device).double()
        self._squares = self._vectors.square().sum(1)

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances, places = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
        for start in range(0, len(vectors), _QUERIES):
            part = slice(start, start + _QUERIES)
            a = torch.from_numpy(vectors[part].astype(np.float64)).to(self._vectors.device)
            squared = a.square().sum(1, keepdim=True) + self._squares - 2 * a @ self._vectors.T
            found = torch.topk(squared, k, dim=1, largest=False)
            distances[part] = found.values.clamp(min=0).sqrt().float().cpu().numpy()
            places[part] = found.indices.cpu().numpy()
        return distances, places


class Hnsw:
    """hnswlib's graph (Malkov and Yashunin 2016): the cost of a query hardly grows with the number of vectors."""

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
        found: NDArray[np.float32] = np.asarray(self.index.get_items(np.arange(self.index.element_count)), np.float32)
        return found

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels, squared = self.index.knn_query(vectors.astype(np.float32), k=k, num_threads=1)
        return np.sqrt(np.maximum(squared, 0.0)), labels.astype(np.int64)


@dataclass
class Recall:
    """What the canary saw: the live queries that were also searched exactly, the share of their neighbours that HNSW
    found too, and whether it was too small and exact search has taken over."""

    queries: int = 0
    neighbours: int = 0
    found: int = 0
    fallen_back: bool = False

    @property
    def share(self) -> float:
        """1.0 before the first query."""
        return self.found / self.neighbours if self.neighbours else 1.0


class Baseline:
    """Distinct normal vectors under L2, with the search that suits their number: exact where there are few or where
    they lie on a GPU, else HNSW, of whose answers a sample is checked.

    members: int64 [count], which of the rows given to `build` each vector is; learned: bool [count], False for those
    that joined in a refresh, after the first fit.
    """

    def __init__(self, hnsw: Hnsw, dim: int, members: NDArray[np.int64], device: str = "cpu") -> None:
        self._hnsw = hnsw
        self._exact: Exact | None = None
        self._device = device
        self.dim = dim
        self.members = members
        self.learned = np.ones(len(members), bool)
        self.recall = Recall()
        self.serves_exactly = len(members) <= EXACT_UP_TO or device != "cpu"

    def __len__(self) -> int:
        return len(self.members)

    @classmethod
    def build(
        cls,
        vectors: NDArray[np.float16],
        *,
        seed: int,
        lonely: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None,
    ) -> Baseline:
        """vectors: float16 [n, d], any number of them equal. Of more than MAX_VECTORS distinct ones, a sample that does
        not mind how often each came, so that what is rare but normal stays in; without those that are `lonely` (asked
        with int64 [m], places in vectors; answers bool [m]). Raises BaselineError for none."""
        if not len(vectors):
            raise BaselineError("a baseline of no vectors: there is nothing to compare events with")
        _refuse_nan(vectors)
        _, members = np.unique(vectors, axis=0, return_index=True)
        # In a random order: a graph built cluster by cluster has clusters that no search reaches.
        members = np.random.default_rng(seed).permutation(members)[:MAX_VECTORS].astype(np.int64)
        if lonely is not None:
            members = members[~lonely(members)]
        return cls(Hnsw.build(vectors[members].astype(np.float32), seed=seed), vectors.shape[1], members)

    def vectors(self) -> NDArray[np.float16]:
        """float16 [count, d]."""
        return self._hnsw.vectors().astype(np.float16)

    def exact(self) -> Exact:
        """Exact search over the same vectors; made when first asked for."""
        if self._exact is None:
            self._exact = Exact(self._hnsw.vectors(), self._device)
        return self._exact

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """float16 [q, d] to the distances (not squared) and places in `members` of the k nearest, [q, k] each, nearest
        first; k is at most the number of vectors. Raises BaselineError for a query that is not a number."""
        _refuse_nan(vectors)
        k = min(k, len(self))
        if not len(vectors):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        if self.serves_exactly or self.recall.fallen_back:
            return self.exact().search(vectors, k)
        distances, places = self._hnsw.search(vectors, k)
        self._check(vectors, distances, k)
        return distances, places

    def _check(self, vectors: NDArray[np.float16], distances: NDArray[np.float32], k: int) -> None:
        """The canary: search one query in CANARY exactly too. Which, its vector says: a query that comes often is one
        that matters often. Neighbours count by their distance, for several may be equally near."""
        mixed = vectors.view(np.uint16).sum(1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        rows = np.flatnonzero(mixed >> np.uint64(48) < np.uint64((1 << 16) // CANARY))
        if not len(rows):
            return
        truth, _ = self.exact().search(vectors[rows], k)
        seen = self.recall
        seen.queries += len(rows)
        seen.neighbours += truth.size
        seen.found += int((distances[rows] <= truth[:, -1:] * (1 + 1e-4) + 1e-4).sum())
        seen.fallen_back = seen.queries >= ENOUGH_QUERIES and seen.share < MIN_RECALL

    def save(self, path: Path) -> dict[str, Any]:
        """Write the index and return its manifest. Raises OSError where not all of it could be written: hnswlib
        itself does not look."""
        self._hnsw.index.save_index(str(path))
        written, size = path.stat().st_size, self._hnsw.index.index_file_size()
        if written != size:
            raise OSError(errno.ENOSPC, f"{written} of {size} bytes of the index were written", str(path))
        return {
            "space": "l2",
            "dim": self.dim,
            "ef": EF,
            "count": len(self),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }

    @classmethod
    def load(
        cls, path: Path, manifest: dict[str, Any], members: NDArray[np.int64], *, dim: int, device: str = "cpu"
    ) -> Baseline:
        """dim: of the encoder whose vectors are searched for. Raises BaselineError: hnswlib itself loads an index of
        another space or length silently, and forgets ef."""
        wrong = {
            f"space {manifest.get('space')}, not l2": manifest.get("space") != "l2",
            f"{manifest.get('count')} vectors, not {len(members)}": manifest.get("count") != len(members),
            f"vectors of {manifest.get('dim')}, and the encoder makes {dim}": manifest.get("dim") != dim,
        }
        if any(wrong.values()):
            what = "; ".join(text for text, is_so in wrong.items() if is_so)
            raise BaselineError(f"{path} is another model's: {what}; restore or fit the bundle again")
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise BaselineError(f"{path} cannot be read: {error.strerror}; restore or fit the bundle again") from error
        if digest != manifest["sha256"]:
            raise BaselineError(f"{path} was changed or cut off since it was written; restore or fit the bundle again")
        index = hnswlib.Index(space="l2", dim=dim)
        try:
            index.load_index(str(path), max_elements=len(members))
        except RuntimeError as error:
            raise BaselineError(f"{path} is not an index of hnswlib ({error}); fit the bundle again") from error
        index.set_ef(int(manifest["ef"]))
        index.set_num_threads(1)
        hnsw = Hnsw(index)
        _refuse_other_space(path, hnsw, len(members))
        return cls(hnsw, dim, members, device)


def _refuse_other_space(path: Path, hnsw: Hnsw, count: int) -> None:
    """An index file does not say what its distances are. But that of a cosine space holds vectors cut to length one,
    and not those of float16 that were put in. Raises BaselineError."""
    if hnsw.index.element_count != count:
        raise BaselineError(f"{path} holds {hnsw.index.element_count} vectors, not {count}; fit the bundle again")
    vectors = hnsw.vectors()
    if not np.array_equal(vectors, vectors.astype(np.float16).astype(np.float32)):
        raise BaselineError(f"{path} is an index of another space than l2; fit the bundle again")


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

    def lonely(
        self, vectors: NDArray[np.float16], weights: NDArray[np.float64], types: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """bool [n], as for `fit`: the TRIM of each type's weight that lies farthest from its reference. Unlabelled
        attacks in training are among them, and would be the nearest neighbours of the next."""
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
