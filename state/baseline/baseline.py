"""The baseline of normal: a search over deduplicated vectors, by HNSW or exact.

Promises: it is built with one thread, so that the same vectors give the same index; searches refuse NaN; an index file
loads only with its own manifest and into its own space. An index is never changed in place: build another one and swap.
"""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
from numpy.typing import NDArray

from state.baseline.search import EF, BaselineError, Exact, Hnsw, refuse_nan, refuse_other_space

MAX_VECTORS = 50_000
EXACT_UP_TO = 2_000
"""Up to so many vectors, exact search on a CPU is as fast as the graph. Measured in docs/performance.md."""
CANARY = 1024
"""One in so many live queries is also searched exactly."""
ENOUGH_QUERIES, MIN_RECALL = 100, 0.9
"""After so many queries, a smaller recall switches to exact search, which is slow but right."""


@dataclass
class Recall:
    """The recall on live queries. queries: also searched exactly; neighbours: of these; found: by HNSW, too;
    fallen_back: the recall was too small, and exact search is in use."""

    queries: int = 0
    neighbours: int = 0
    found: int = 0
    fallen_back: bool = False

    @property
    def share(self) -> float:
        """1.0 before the first query."""
        return self.found / self.neighbours if self.neighbours else 1.0


class Baseline:
    """Distinct normal vectors under L2. Search is exact for few vectors and on a GPU, else by HNSW, and a sample of its
    answers is checked.

    members: int64 [count], the row given to `build` of each vector; learned: bool [count], False for vectors that
    joined in a refresh after the first fit.
    """

    def __init__(self, hnsw: Hnsw, dim: int, members: NDArray[np.int64], device: str = "cpu") -> None:
        self._hnsw = hnsw
        self._exact: Exact | None = None
        self._by_hash: tuple[NDArray[np.float16], NDArray[np.uint64], NDArray[np.intp]] | None = None
        self._device = device
        self.dim = dim
        self.members = members
        self.learned = np.ones(len(members), bool)
        self.recall = Recall()
        self.serves_exactly = len(members) <= EXACT_UP_TO or device != "cpu"

    def __len__(self) -> int:
        return len(self.members)

    @classmethod
    def build(cls, vectors: NDArray[np.float16], *, seed: int, most: int = MAX_VECTORS) -> Baseline:
        """vectors: float16 [n, d], any number of them equal. Of more than `most` distinct ones, a sample that does
        not mind how often each came, so that what is rare but normal stays in. Raises BaselineError for none."""
        if not len(vectors):
            raise BaselineError("a baseline of no vectors: there is nothing to compare events with")
        refuse_nan(vectors)
        _, members = np.unique(vectors, axis=0, return_index=True)
        # Insert in random order: a graph built cluster by cluster has unreachable clusters.
        members = np.random.default_rng(seed).permutation(members)[:most].astype(np.int64)
        return cls(Hnsw.build(vectors[members].astype(np.float32), seed=seed), vectors.shape[1], members)

    def vectors(self) -> NDArray[np.float16]:
        """float16 [count, d]."""
        return self._hnsw.vectors().astype(np.float16)

    def exact(self) -> Exact:
        """Exact search over the same vectors; made at the first call."""
        if self._exact is None:
            self._exact = Exact(self._hnsw.vectors(), self._device)
        return self._exact

    def search(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """float16 [q, d] to the distances (not squared) and places in `members` of the k nearest, [q, k] each, nearest
        first; k is at most the number of vectors. Raises BaselineError for a query with NaN or infinity."""
        refuse_nan(vectors)
        k = min(k, len(self))
        if not len(vectors):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        if self.serves_exactly or self.recall.fallen_back:
            return self.exact().search(vectors, k)
        if k > 1:
            return self._by_graph(vectors, k)
        places = self._same(vectors)[:, None]
        distances = np.zeros(places.shape, np.float32)
        others = np.flatnonzero(places < 0)
        if len(others):
            distances[others], places[others] = self._by_graph(vectors[others], 1)
        return distances, places

    def _by_graph(self, vectors: NDArray[np.float16], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances, places = self._hnsw.search(vectors, k)
        self._check(vectors, distances, k)
        return distances, places

    def _same(self, vectors: NDArray[np.float16]) -> NDArray[np.int64]:
        """int64 [q]: the place of the member that equals each vector, or -1. A graph does not reach every member, and
        what training had must not be far from it."""
        if self._by_hash is None:
            known = self.vectors()
            hashes = _hashes(known)
            order = np.argsort(hashes, kind="stable")
            self._by_hash = known, hashes[order], order
        known, hashes, order = self._by_hash
        at = order[np.minimum(np.searchsorted(hashes, _hashes(vectors)), len(order) - 1)]
        return np.where((known[at] == vectors).all(1), at, -1)

    def _check(self, vectors: NDArray[np.float16], distances: NDArray[np.float32], k: int) -> None:
        """The canary: also search one in CANARY queries exactly, chosen by a hash of the vector. Neighbours are
        compared by distance, because several may be equally near."""
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
        """Write the index and return its manifest. Raises OSError where it was not written completely, which hnswlib
        does not check."""
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
        """Load an index. dim: of the encoder's vectors. Raises BaselineError where file, manifest and dim do not belong
        together: hnswlib loads an index of another space or length silently, and forgets ef."""
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
        refuse_other_space(path, hnsw, len(members))
        return cls(hnsw, dim, members, device)


def _hashes(vectors: NDArray[np.float16]) -> NDArray[np.uint64]:
    """uint64 [n] of float16 [n, d]."""
    odd = np.random.default_rng(0).integers(1 << 63, size=vectors.shape[1], dtype=np.uint64) * 2 + 1
    hashes: NDArray[np.uint64] = (vectors.view(np.uint16) * odd).sum(1, dtype=np.uint64)
    return hashes
