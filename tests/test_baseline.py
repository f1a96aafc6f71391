"""The baseline finds what is nearest, whichever way it searches, and refuses what is not its own by name."""

from __future__ import annotations

import os
from pathlib import Path

import hnswlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import state.baseline.baseline
from state.baseline.baseline import Baseline
from state.baseline.search import BaselineError, Exact, Hnsw

DIM = 16


def vectors(n: int, seed: int, *, duplicates: float = 0.0) -> NDArray[np.float16]:
    """Clustered, as events are; a share of them duplicates."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, DIM)) * 4
    distinct = centres[generator.integers(40, size=n)] + generator.normal(size=(n, DIM))
    copies = generator.random(n) < duplicates
    distinct[copies] = distinct[generator.integers(max(1, n // 50), size=int(copies.sum()))]
    return distinct.astype(np.float16)


def nearest(data: NDArray[np.float16], queries: NDArray[np.float16], k: int) -> NDArray[np.float64]:
    """The distances of the k nearest, the long way."""
    difference = queries[:, None].astype(np.float64) - np.unique(data, axis=0)[None].astype(np.float64)
    return np.sort(np.sqrt((difference**2).sum(2)), axis=1)[:, :k]


@pytest.mark.parametrize("exact_up_to", [0, 10**9], ids=["hnsw", "exact"])
@pytest.mark.parametrize("duplicates", [0.0, 0.9])
def test_both_searches_find_the_nearest(
    monkeypatch: pytest.MonkeyPatch, exact_up_to: int, duplicates: float, tmp_path: Path
) -> None:
    monkeypatch.setattr(state.baseline.baseline, "EXACT_UP_TO", exact_up_to)
    data, queries = vectors(3000, 0, duplicates=duplicates), vectors(200, 1)
    baseline = Baseline.build(data, seed=0)
    assert baseline.serves_exactly == bool(exact_up_to)
    manifest = baseline.save(tmp_path / "index")
    for each in (baseline, Baseline.load(tmp_path / "index", manifest, baseline.members, dim=DIM)):
        distances, places = each.search(queries, 5)
        truth = nearest(data, queries, 5)
        assert np.mean(np.abs(distances - truth) < 1e-3) > 0.99
        again = np.linalg.norm(data[each.members[places]].astype(float) - queries[:, None].astype(float), axis=2)
        np.testing.assert_allclose(again, distances, atol=1e-3)
        if exact_up_to:
            np.testing.assert_allclose(distances, truth, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 10**6))
def test_exact_search_does_not_depend_on_the_batch(count: int, queries: int, seed: int) -> None:
    exact, asked = Exact(vectors(count, seed).astype(np.float32)), vectors(queries, seed + 1)
    whole, _ = exact.search(asked, min(3, count))
    alone = np.concatenate([exact.search(asked[i : i + 1], min(3, count))[0] for i in range(queries)])
    np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-6)


def test_few_vectors_are_searched_exactly_and_a_tiny_baseline_gives_what_it_has() -> None:
    baseline = Baseline.build(np.repeat(vectors(2, 0), 50, axis=0), seed=0)
    assert (len(baseline), baseline.serves_exactly) == (2, True)
    distances, places = baseline.search(vectors(3, 1), 5)
    assert distances.shape == places.shape == (3, 2)
    with pytest.raises(BaselineError, match="no vectors"):
        Baseline.build(np.empty((0, DIM), np.float16), seed=0)


def test_the_canary_sees_a_graph_that_misses_and_exact_search_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.baseline.baseline, "EXACT_UP_TO", 0)
    monkeypatch.setattr(state.baseline.baseline, "CANARY", 8)
    data, queries = vectors(5000, 0), vectors(4000, 1)
    sound = Baseline.build(data, seed=0)
    sound.search(queries, 5)
    assert 300 < sound.recall.queries < 700
    assert sound.recall.share > 0.98
    assert not sound.recall.fallen_back

    index = hnswlib.Index(space="l2", dim=DIM)
    index.init_index(max_elements=len(data), M=2, ef_construction=2, random_seed=0)
    index.add_items(data.astype(np.float32), np.arange(len(data)), num_threads=1)
    index.set_ef(5)
    poor = Baseline(Hnsw(index), DIM, np.arange(len(data)))
    poor.search(queries, 5)
    assert poor.recall.share < 0.9
    assert poor.recall.fallen_back
    np.testing.assert_allclose(poor.search(queries[:100], 5)[0], nearest(data, queries[:100], 5), atol=1e-5)


def test_what_training_had_is_at_distance_zero_though_the_graph_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.baseline.baseline, "EXACT_UP_TO", 0)
    data = np.unique(vectors(3000, 0), axis=0)
    index = hnswlib.Index(space="l2", dim=DIM)
    index.init_index(max_elements=len(data), M=2, ef_construction=2, random_seed=0)
    index.add_items(data.astype(np.float32), np.arange(len(data)), num_threads=1)
    poor = Baseline(Hnsw(index), DIM, np.arange(len(data)))
    assert (Hnsw(index).search(data, 1)[0] > 0.1).any(), "the graph misses some"
    queries = np.concatenate([data, data + np.float16(0.5)])
    distances, places = poor.search(queries, 1)
    assert not distances[: len(data)].any()
    np.testing.assert_array_equal(places[: len(data), 0], np.arange(len(data)))
    assert (distances[len(data) :] > 0).all()


@pytest.mark.parametrize("exact_up_to", [0, 10**9], ids=["hnsw", "exact"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch, exact_up_to: int, bad: float) -> None:
    monkeypatch.setattr(state.baseline.baseline, "EXACT_UP_TO", exact_up_to)
    data = vectors(100, 0)
    baseline = Baseline.build(data, seed=0)
    wrong = data.copy()
    wrong[7, 3] = bad
    with pytest.raises(BaselineError, match=r"1 of 100 vectors hold NaN or infinity \(first: 7\)"):
        baseline.search(wrong, 3)
    with pytest.raises(BaselineError, match="NaN"):
        Baseline.build(wrong, seed=0)


def test_an_index_that_is_not_its_own_is_refused_by_its_name(tmp_path: Path) -> None:
    path, other = tmp_path / "baseline.hnsw", tmp_path / "other.hnsw"
    baseline, another = Baseline.build(vectors(500, 0), seed=0), Baseline.build(vectors(500, 1), seed=0)
    manifest, foreign = baseline.save(path), another.save(other)
    members = baseline.members

    def refused(match: str, manifest: dict[str, object], *, dim: int = DIM) -> None:
        with pytest.raises(BaselineError, match=match) as raised:
            Baseline.load(path, manifest, members, dim=dim)
        assert "baseline.hnsw" in str(raised.value)

    Baseline.load(path, manifest, members, dim=DIM)
    refused("another model's: vectors of 16, and the encoder makes 64", manifest, dim=64)
    refused("another model's: space cosine", manifest | {"space": "cosine"})
    refused("another model's: 400 vectors", manifest | {"count": 400})
    refused("changed or cut off", foreign)
    whole = path.read_bytes()
    path.write_bytes(other.read_bytes())
    refused("changed or cut off", manifest)
    path.write_bytes(whole)
    os.truncate(path, len(whole) // 2)
    refused("changed or cut off", manifest)
    path.unlink()
    refused("cannot be read", manifest)


def test_an_index_of_another_space_is_refused_though_its_manifest_agrees(tmp_path: Path) -> None:
    path, data = tmp_path / "baseline.hnsw", np.unique(vectors(300, 0), axis=0)
    index = hnswlib.Index(space="cosine", dim=DIM)
    index.init_index(max_elements=len(data), M=16, ef_construction=100)
    index.add_items(data.astype(np.float32), np.arange(len(data)), num_threads=1)
    manifest = Baseline(Hnsw(index), DIM, np.arange(len(data))).save(path)
    with pytest.raises(BaselineError, match=r"baseline\.hnsw is an index of another space"):
        Baseline.load(path, manifest, np.arange(len(data)), dim=DIM)
