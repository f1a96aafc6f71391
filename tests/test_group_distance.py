"""Isolation by groups: what resembles a handful of training events is still far from the many."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from state.baseline.baseline import Baseline
from state.baseline.group_distance import MIN_REFERENCE, SAMPLE, GroupDistance, log_group_distance

DIM = 8


def vectors(n: int, seed: int, *, centre: float = 0.0, spread: float = 1.0) -> NDArray[np.float16]:
    return (np.random.default_rng(seed).standard_normal((n, DIM)) * spread + centre).astype(np.float16)


def of_one_type(data: NDArray[np.float16]) -> GroupDistance:
    return GroupDistance.fit(data, np.ones(len(data)), np.ones(len(data), np.int64), seed=0)


def test_a_few_unlabelled_attacks_do_not_hide_the_next_one() -> None:
    """2 % of the training events are attacks that are like each other and nothing else."""
    data = np.concatenate([vectors(2000, 0), vectors(40, 1, centre=30, spread=0.05)])
    another, normal = vectors(1, 2, centre=30, spread=0.05), vectors(500, 3)
    far = of_one_type(data)
    assert far(another, np.ones(1, np.int64)) > far(normal, np.ones(500, np.int64)).max()
    nearest = Baseline.build(data, seed=0)
    assert nearest.search(another, 1)[0] < np.median(nearest.search(normal, 1)[0]), "the nearest alone is fooled"


def test_each_type_is_compared_with_its_own_and_a_rare_one_with_all() -> None:
    here, there, rare = vectors(400, 0), vectors(400, 1, centre=20), vectors(MIN_REFERENCE - 1, 2, centre=-20)
    types = np.repeat([3, 5, 9], [400, 400, len(rare)]).astype(np.int64)
    far = GroupDistance.fit(np.concatenate([here, there, rare]), np.ones(len(types)), types, seed=0)
    assert far.types.tolist() == [3, 5]
    asked = vectors(50, 3)
    as_own, as_other, as_rare, as_unseen = (far(asked, np.full(50, kind)).mean() for kind in (3, 5, 9, 77))
    assert as_own < as_rare < as_other
    assert as_rare == as_unseen


def test_a_vector_counts_as_often_as_it_came() -> None:
    """One vector stands for nine in ten events: what is near it is near the many."""
    data = np.concatenate([vectors(1, 0, centre=5, spread=0), vectors(100, 1)])
    weights = np.append(900.0, np.ones(100))
    types = np.ones(101, np.int64)
    far = GroupDistance.fit(data, weights, types, seed=0)
    assert far(data[:1], types[:1]) < far(data[1:], types[1:]).min()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 10**6))
def test_a_score_does_not_depend_on_the_batch(count: int, queries: int, seed: int) -> None:
    far, asked = of_one_type(vectors(count, seed)), vectors(queries, seed + 1)
    types = np.ones(queries, np.int64)
    whole = far(asked, types)
    alone = np.concatenate([far(asked[i : i + 1], types[:1]) for i in range(queries)])
    np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-9)
    assert np.isfinite(whole).all()


def test_it_is_the_mean_log_of_the_distance_to_each_groups_nearest() -> None:
    reference, query = vectors(SAMPLE, 0).astype(np.float32), vectors(1, 1).astype(np.float32)
    distance = np.sqrt(((reference.astype(np.float64) - query) ** 2).sum(1))
    scales = [distance.reshape(-1, size).min(1).mean() for size in (16, 32, 64)]
    np.testing.assert_allclose(
        log_group_distance(reference, query), [np.log(np.array(scales) + 1e-3).mean()], rtol=1e-9
    )
