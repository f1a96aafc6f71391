"""What was much is told of what the entity lately raised, and no older."""

from __future__ import annotations

import numpy as np

from encoder.ocsf.activity_counts import NOBODY, PARTNERS, ActivityCounts
from encoder.ocsf.entities import KINDS
from state.calibration import Calibration
from state.memory.windows import MemoryWindows
from state.rate_profiles import GROUPS, RateProfiles
from state.rolling_counts import LEVELS, level_of
from state.windows import WindowEntries
from streamer.detection.rate_score import RateScorer
from streamer.explain.rates import findings, levels

MINUTE = 60_000
HOUR = 60 * MINUTE
USER = KINDS.index("user")


def store(times: list[int], failed: list[bool]) -> MemoryWindows:
    n = len(times)
    windows = MemoryWindows(dim=2, width=32)
    activity_counts = ActivityCounts(
        np.ones(n, bool), np.array(failed), np.zeros(n, np.int64), np.full((n, PARTNERS), NOBODY, np.int16)
    )
    at, none = np.arange(n, dtype=np.int64), np.zeros(n, np.int32)
    vectors = np.zeros((n, 2), np.float16)
    windows.append(
        WindowEntries(["user:bob"] * n, np.array(times), vectors, (("t", 0),), none, at, none, activity_counts)
    )
    return windows


def reached(windows: MemoryWindows, time: int) -> dict[str, int]:
    highest = levels(windows.latest(["user:bob"]), np.array([time]))
    return {name: level for name, level in zip(LEVELS, highest[0].tolist(), strict=True) if level}


def test_a_count_is_what_it_was_last_raised_to_within_its_span() -> None:
    windows = store([MINUTE * i for i in range(20)] + [5 * HOUR], [True] * 20 + [False])
    assert reached(windows, 19 * MINUTE) == {
        f"{of}.{span}": level_of(20) for of in ("events", "failures") for span in ("hour", "day")
    }
    later = reached(windows, 5 * HOUR)
    assert later == {"events.hour": level_of(1), "events.day": level_of(21), "failures.day": level_of(20)}
    assert reached(windows, 3 * MINUTE)["failures.hour"] == level_of(4), "as it was at the event"


def test_the_cause_is_named_first_and_then_what_else_is_beyond_the_habits() -> None:
    profiles, _ = RateProfiles.fit(
        ["user:bob"] * 2, np.full(2, USER, np.int8), np.full((2, 8), 12, np.uint8), np.array([0, HOUR]), kinds=8
    )
    nothing_like_it = Calibration.fit(np.linspace(-10, 0, 200))
    names = [f"{USER}.{column}.{group}" for column in range(len(LEVELS)) for group in range(GROUPS)]
    rates = RateScorer(profiles, dict.fromkeys(names, nothing_like_it))
    windows = store([MINUTE * i for i in range(30)], [i % 2 == 0 for i in range(30)])
    at = levels(windows.latest(["user:bob"]), np.array([30 * MINUTE]))
    for cause in ("events.hour", "failures.day"):
        (named,) = findings(rates, ["user:bob"], at, [LEVELS.index(cause)])
        assert f"{named[0].count}.{named[0].span}" == cause
        assert {rate.count for rate in named} == {"events", "failures"}, "partners and bytes were not raised"
        assert all(rate.own and rate.observed > rate.usual for rate in named)
        assert all(rate.among == 0 for rate in named), "there is nobody else"


def test_of_those_of_its_kind_it_is_told_how_many_reached_as_much() -> None:
    most = {"user:bob": 6, "user:ann": level_of(30), "user:eve": level_of(20), "user:joe": 0, "host:pc": 255}
    names, kinds = list(most), np.array([KINDS.index(name.partition(":")[0]) for name in most], np.int8)
    reached = np.repeat(np.array(list(most.values()), np.uint8)[:, None], len(LEVELS), axis=1)
    profiles, _ = RateProfiles.fit(
        names * 2, np.tile(kinds, 2), np.tile(reached, (2, 1)), np.arange(10) * HOUR, kinds=8
    )
    rates = RateScorer(profiles)
    now = np.full((1, len(LEVELS)), level_of(30), np.uint8)
    for who, count, among in (("user:bob", 1, 3), ("user:new", 1, 4), ("user:ann", 0, 3)):
        (named,) = findings(rates, [who], now, [LEVELS.index("failures.hour")])
        assert (named[0].reached, named[0].among) == (count, among), who
