"""The alert line holds the budget: over days, in bursts, and when rates or scores change; it never looks ahead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamer.alerting.threshold import (
    ALWAYS,
    CORRECTION,
    HOUR_MS,
    HourCounts,
    MovingThreshold,
    Threshold,
    threshold_at,
)

DAY_MS = 24 * HOUR_MS
MONDAY = 20_454 * DAY_MS


def traffic(days: int, events_per_day: int, *, seed: int = 0, start: int = MONDAY) -> NDArray[np.int64]:
    """Event times of whole days, most of them by day and a fifth of them at weekends, as people make them."""
    generator = np.random.default_rng(seed)
    parts = []
    for day in range(days):
        count = generator.poisson(events_per_day * (0.2 if day % 7 >= 5 else 1.0))
        hours = np.where(generator.random(count) < 0.8, generator.normal(13, 2.5, count), generator.random(count) * 24)
        parts.append(start + day * DAY_MS + (np.clip(hours, 0, 23.99) * HOUR_MS).astype(np.int64))
    return np.sort(np.concatenate(parts))


def run(
    budget: MovingThreshold, time: NDArray[np.int64], p: NDArray[np.float64], size: int = 500
) -> NDArray[np.float64]:
    return np.concatenate([budget.judge(time[i : i + size], p[i : i + size]) for i in range(0, len(time), size)])


def a_day(time: NDArray[np.int64], chosen: NDArray[np.bool_], first: int, last: int) -> float:
    """Mean number of these a day, over some of the days."""
    day = (time - time[0] // DAY_MS * DAY_MS) // DAY_MS
    return float((chosen & (day >= first) & (day < last)).sum()) / (last - first)


@pytest.mark.parametrize("alerts_per_day", [20, 100])
@pytest.mark.parametrize("skew", [1.0, 0.4, 2.5])
def test_weeks_of_normal_traffic_cost_what_was_promised(alerts_per_day: int, skew: float) -> None:
    """skew: how often p-values that should be met once are met, because calibration was on another week."""
    time = traffic(28, 5_000)
    p = np.random.default_rng(1).random(len(time)) / skew
    threshold = run(MovingThreshold(alerts_per_day, 5_000), time, p)
    spent = a_day(time, p <= threshold, 7, 28)
    assert 0.5 * alerts_per_day <= spent <= 1.5 * alerts_per_day
    if skew != 1.0:  # A line that stays does not.
        fixed = a_day(time, p <= alerts_per_day / 4_000, 7, 28)
        assert not 0.5 * alerts_per_day <= fixed <= 1.5 * alerts_per_day


@pytest.mark.parametrize("beyond", [8, 16])
def test_what_alerts_whatever_is_spent_is_made_up_for_by_the_line(beyond: int) -> None:
    """So many stories a day lie far under any line, such as those of something new that comes every day."""
    time = traffic(35, 5_000)
    generator = np.random.default_rng(4)
    p = generator.random(len(time))
    p[generator.random(len(time)) < beyond / 4_000] = 1e-9
    threshold = run(MovingThreshold(20, 4_000), time, p)
    assert 10 <= a_day(time, p <= threshold, 7, 35) <= 24
    assert a_day(time, p <= 1e-9, 7, 35) == a_day(time, (p <= threshold) & (p <= 1e-9), 7, 35)
    fixed = a_day(time, p <= 20 / 4_000, 7, 35)
    assert fixed > 18 + beyond


@pytest.mark.parametrize("factor", [0.2, 8])
def test_the_budget_holds_again_after_the_rate_has_changed(factor: float) -> None:
    before, after = traffic(7, 5000), traffic(14, int(5000 * factor), seed=2, start=MONDAY + 7 * DAY_MS)
    time = np.concatenate([before, after])
    p = np.random.default_rng(3).random(len(time))
    threshold = run(MovingThreshold(50, 5000), time, p)
    assert 25 <= a_day(time, p <= threshold, 14, 21) <= 75
    assert max(a_day(time, p <= threshold, day, day + 1) for day in range(7, 21)) <= 100


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6), st.floats(0.3, 30.0))
def test_any_six_hours_spend_at_most_half_and_what_is_far_under_the_line_always_alerts(
    alerts_per_day: int, seed: int, skew: float
) -> None:
    time = traffic(3, 3000, seed=seed)
    p = np.maximum(np.random.default_rng(seed).random(len(time)) / skew, 1e-9)
    budget = MovingThreshold(alerts_per_day, 3000)
    threshold = run(budget, time, p, size=seed % 700 + 1)
    open_line = np.array([each.p_value for each in budget.thresholds])
    open_at = open_line[
        np.maximum(np.searchsorted([each.start for each in budget.thresholds], time, side="right") - 1, 0)
    ]
    ordinary = time[(p <= threshold) & (p > ALWAYS * open_at)]
    ends = np.searchsorted(ordinary, ordinary + 6 * HOUR_MS)
    assert (ends - np.arange(len(ordinary))).max(initial=0) <= np.ceil(alerts_per_day / 2)
    assert ((p <= threshold) | (p > ALWAYS * open_at)).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 2000), st.integers(20, 2000))
def test_a_line_depends_on_what_was_before_and_not_on_how_the_stream_was_cut(seed: int, one: int, other: int) -> None:
    time = traffic(2, 2000, seed=seed)
    p = np.random.default_rng(seed).random(len(time)) / 3
    whole, half = MovingThreshold(30, 2000), MovingThreshold(30, 2000)
    thresholds = run(whole, time, p, one)
    cut = len(time) // 2
    np.testing.assert_array_equal(run(half, time[:cut], p[:cut], other), thresholds[:cut])
    np.testing.assert_array_equal(run(MovingThreshold(30, 2000), time, p, other), thresholds)


def test_the_recorded_lines_are_those_that_events_were_held_against() -> None:
    time = traffic(3, 4000)
    time[::7] -= 90 * 60_000  # late by up to an hour and a half
    p = np.random.default_rng(0).random(len(time)) / 5
    budget = MovingThreshold(20, 4000)
    thresholds = run(budget, time, p)
    assert any(threshold.share == ALWAYS for threshold in budget.thresholds)
    replayed = threshold_at(budget.thresholds, time)
    np.testing.assert_array_equal(p <= thresholds, p <= replayed)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1000), st.floats(0.1, 200))
def test_the_correction_is_bounded(skew: float, alerts_per_day: float) -> None:
    time = np.sort(np.random.default_rng(0).integers(0, 3 * DAY_MS, 3000)) + MONDAY
    p = np.minimum(np.random.default_rng(1).random(3000) / (skew + 1e-9), 1.0)
    budget = MovingThreshold(alerts_per_day, 1000)
    run(budget, time, p)
    for threshold in budget.thresholds:
        assert 0.99 / CORRECTION <= threshold.correction <= CORRECTION
        assert 0 < threshold.in_force <= 0.5


def test_what_goes_on_about_the_same_thing_spends_once_and_closes_nothing() -> None:
    time = MONDAY + np.arange(4000) * 3000
    p = np.where(np.arange(4000) % 2, 0.5, 0.0005)
    storm, alone = MovingThreshold(20, 24_000), MovingThreshold(20, 24_000)
    for budget, episode_key in ((storm, lambda _: "record:cmd_line user:eve"), (alone, lambda _: "")):
        threshold = np.concatenate(
            [budget.judge(time[i : i + 64], p[i : i + 64], episode_key=episode_key) for i in range(0, 4000, 64)]
        )
        if budget is storm:
            assert (p[::2] <= threshold[::2]).sum() > 1000
    hours = range(MONDAY // HOUR_MS, MONDAY // HOUR_MS + 5)
    assert storm.spent(hours) == 1
    assert all(each.share == 1.0 for each in storm.thresholds)
    assert 5 < alone.spent(hours) <= 10
    again = np.array([MONDAY + 4000 * 3000 + 2 * HOUR_MS])
    storm.judge(again, np.array([storm.at(again)[0] / 2]), episode_key=lambda _: "record:cmd_line user:eve")
    assert storm.spent(range(hours[0], hours[-1] + 5)) == 2


def test_a_copy_goes_its_own_way() -> None:
    budget = MovingThreshold(20, 1000)
    budget.judge(np.array([MONDAY]), np.array([0.5]))
    other = budget.copy()
    other.judge(np.array([MONDAY + HOUR_MS]), np.array([0.001]))
    assert len(budget.thresholds) == 1
    assert budget.spent(range(MONDAY // HOUR_MS, MONDAY // HOUR_MS + 2)) == 0
    assert other.spent(range(MONDAY // HOUR_MS, MONDAY // HOUR_MS + 2)) == 1


def test_what_others_spend_counts_and_what_they_let_through_is_not_judged_anew() -> None:
    hour = MONDAY // HOUR_MS
    budget = MovingThreshold(20, 1000, elsewhere={hour: HourCounts(10, 0.2, 0.2, 10, MONDAY + 60_000)})
    budget.advance(hour)
    assert budget.thresholds == [Threshold(MONDAY + 60_001, budget.thresholds[0].p_value, 1.0, share=ALWAYS)]
    np.testing.assert_array_equal(
        budget.judge(np.array([MONDAY + 70_000]), np.array([0.01]), moves=False),
        [budget.thresholds[0].p_value * ALWAYS],
    )
