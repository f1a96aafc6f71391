"""How the baseline searches: HNSW against exact, for docs/performance.md. Not a test.

python tests/measure_baseline.py BUNDLE...       recall and scores on the bundle's vectors, one in ten as queries
python tests/measure_baseline.py --size 1000000  build, memory, load, queries a second of so many made-up vectors
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from state.baseline.search import Exact, Hnsw
from streamer.bundles.bundle_files import load

DIM = 64
NEIGHBOURS = 1
"""As the record score asks."""


def rate(search: object, queries: np.ndarray) -> float:
    began = time.process_time()
    search.search(queries, NEIGHBOURS)  # type: ignore[attr-defined]
    return len(queries) / (time.process_time() - began)


def of_bundle(path: Path) -> None:
    vectors = load(path).scorer.record.baseline._hnsw.vectors()
    asked = np.random.default_rng(0).random(len(vectors)) < 0.1
    queries, kept = vectors[asked][:2000].astype(np.float16), vectors[~asked]
    hnsw, exact = Hnsw.build(kept, seed=0), Exact(kept)
    found, truth = hnsw.search(queries, NEIGHBOURS)[0], exact.search(queries, NEIGHBOURS)[0]
    recall = float((found <= truth[:, -1:] * (1 + 1e-4) + 1e-4).mean())
    ours, theirs = found.mean(1), truth.mean(1)
    off = float((np.abs(ours - theirs) > 0.05 * np.maximum(theirs, 1e-6)).mean())
    print(
        f"{path.name}: {len(kept):,} vectors, recall@{NEIGHBOURS} {recall:.4f}, scores off by more than 5 %: {off:.2%}"
        f", queries a second of CPU: HNSW {rate(hnsw, queries):,.0f}, exact {rate(exact, queries):,.0f}"
    )


def of_size(count: int) -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(1000, DIM))
    vectors = np.empty((count, DIM), np.float32)
    for start in range(0, count, 100_000):
        part = slice(start, min(start + 100_000, count))
        size = part.stop - part.start
        noise = generator.normal(size=(size, DIM)) * 0.3
        vectors[part] = (centres[generator.integers(1000, size=size)] + noise).astype(np.float16)
    noise = generator.normal(size=(2000, DIM)) * 0.3
    queries = (centres[generator.integers(1000, size=2000)] + noise).astype(np.float16)
    before, began = memory(), time.process_time()
    hnsw = Hnsw.build(vectors, seed=0)
    built, grown = time.process_time() - began, memory() - before
    speed = rate(hnsw, queries)
    truth = Exact(vectors[:]).search(queries[:200], NEIGHBOURS)[0] if count <= 200_000 else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        hnsw.index.save_index(str(path))
        size = path.stat().st_size
        import hnswlib

        again, began = hnswlib.Index(space="l2", dim=DIM), time.process_time()
        again.load_index(str(path), max_elements=count)
        loaded = time.process_time() - began
    told = ""
    if truth is not None:
        found = hnsw.search(queries[:200], NEIGHBOURS)[0]
        told = f", recall {float((found <= truth[:, -1:] * (1 + 1e-4) + 1e-4).mean()):.3f}"
        told += f", exact {rate(Exact(vectors), queries[:500]):,.0f} queries a second"
    print(
        f"{count:,} vectors of {DIM}: built in {built:.0f} s of CPU, {grown / 2**20:,.0f} MB more, file "
        f"{size / 2**20:,.0f} MB, loaded in {loaded:.1f} s, {speed:,.0f} queries a second of CPU{told}"
    )


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1] == "--size":
        of_size(int(sys.argv[2]))
    else:
        for each in sys.argv[1:]:
            of_bundle(Path(each))
