"""Habits: what is much for whom, learned block by block so that nobody vouches for themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.rate_profiles import BLOCKS, STRANGER, RateExcess, RateProfiles
from state.rolling_counts import LEVELS, level_of
from streamer.detection.rate_score import MIN_ENTITIES, RateScorer

HOUR = 3_600_000
PEOPLE = 40


def a_week(counts: NDArray[np.int64]) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32]]:
    """Of PEOPLE users over seven days, the level that each day's failures reached. counts: [users, days]."""
    names = [f"user:{person}" for person in range(len(counts)) for _ in range(counts.shape[1])]
    levels = np.zeros((counts.size, len(LEVELS)), np.uint8)
    levels[:, LEVELS.index("failures.day")] = [level_of(int(count)) for count in counts.ravel()]
    time = np.tile(np.arange(counts.shape[1]) * 24 * HOUR, len(counts))
    return names, levels, time, np.arange(counts.size, dtype=np.int32)


def fitted(counts: NDArray[np.int64]) -> tuple[RateProfiles, RateExcess, RateScorer]:
    names, levels, time, rows = a_week(counts)
    kind = np.zeros(len(names), np.int8)
    profiles, excess = RateProfiles.fit(names, kind, levels, time, kinds=1)
    rates = RateScorer(profiles)
    rates.fit(excess, kind, names, rows)
    return profiles, excess, rates


def judged(profiles: RateProfiles, rates: RateScorer, name: str, count: int) -> tuple[float, str]:
    levels = np.zeros((1, len(LEVELS)), np.uint8)
    levels[0, LEVELS.index("failures.day")] = level_of(count)
    kind = np.zeros(1, np.int8)
    evidence, column = rates.evidence(profiles.excess([name], kind, levels), kind)
    return float(evidence[0]), LEVELS[column[0]]


COUNTS = np.random.default_rng(0).poisson(3, (PEOPLE, BLOCKS)) + 1


def test_what_is_much_for_one_is_little_for_another() -> None:
    counts = COUNTS.copy()
    counts[0] = 200 + np.arange(BLOCKS)
    profiles, _, rates = fitted(counts)
    busy, quiet = (judged(profiles, rates, name, 210) for name in ("user:0", "user:1"))
    assert quiet[0] > 4 > 2 > busy[0]
    assert quiet[1] == "failures.day"


def test_no_block_is_judged_by_itself() -> None:
    counts = COUNTS.copy()
    counts[3, 2] = 500
    _, excess, _ = fitted(counts)
    over = excess.over[3 * BLOCKS : 4 * BLOCKS, LEVELS.index("failures.day")]
    assert over[2] > 20
    assert (np.delete(over, 2) < -20).all()


def test_a_newcomer_that_does_as_the_few_that_do_most_is_not_odd() -> None:
    """One name in thirty belongs to who works there, the others to visitors, as with addresses."""
    counts = np.ones((30 * 20, BLOCKS), np.int64)
    counts[:20] = 200
    names, levels, time, _ = a_week(counts)
    profiles, _ = RateProfiles.fit(names, np.zeros(len(names), np.int8), levels, time, kinds=1)
    column = LEVELS.index("failures.day")
    new = [a_week(np.full((1, 1), many))[1] for many in (200, 4000)]
    over = [profiles.excess(["user:new"], np.zeros(1, np.int8), level).over[0, column] for level in new]
    assert over[0] <= 0 < over[1]


def test_a_stranger_is_measured_by_what_its_kind_seldom_exceeds_and_only_where_training_had_strangers() -> None:
    profiles, _, rates = fitted(COUNTS)
    excess = profiles.excess(["user:new"], np.zeros(1, np.int8), a_week(np.full((1, 1), 9))[1])
    assert excess.group[0, LEVELS.index("failures.day")] == STRANGER
    assert judged(profiles, rates, "user:new", 500)[0] == 0.0
    guests = np.zeros((2 * PEOPLE, BLOCKS), np.int64)
    guests[:PEOPLE] = COUNTS
    names, levels, time, _ = a_week(guests)
    there = np.ones(len(names), bool)
    there[PEOPLE * BLOCKS :] = np.arange(PEOPLE * BLOCKS) % BLOCKS == 0  # these came on one day only
    levels[PEOPLE * BLOCKS :, LEVELS.index("failures.day")] = level_of(1)
    names = [name for name, yes in zip(names, there, strict=True) if yes]
    kind, rows = np.zeros(len(names), np.int8), np.arange(len(names), dtype=np.int32)
    profiles, excess = RateProfiles.fit(names, kind, levels[there], time[there], kinds=1)
    rates = RateScorer(profiles)
    rates.fit(excess, kind, names, rows)
    assert judged(profiles, rates, "user:new", 500)[0] > 2


def test_of_a_few_entities_nothing_is_concluded() -> None:
    profiles, _, rates = fitted(COUNTS[: MIN_ENTITIES - 1])
    assert judged(profiles, rates, "user:1", 1_000_000)[0] == 0.0


def test_half_of_what_is_normal_says_little() -> None:
    _, excess, rates = fitted(COUNTS)
    evidence, _ = rates.evidence(excess, np.zeros(len(excess.over), np.int8))
    assert np.median(evidence) < 1.0
    assert (evidence > 4).mean() < 0.05


def test_others_are_of_the_same_kind_and_not_the_one_itself() -> None:
    names, levels, time, _ = a_week(COUNTS)
    kind = np.array([int(name.removeprefix("user:")) % 2 for name in names], np.int8)
    profiles, _ = RateProfiles.fit(names, kind, levels, time, kinds=2)
    failures = LEVELS.index("failures.day")
    peers = np.sort(profiles.peers("user:2", 0)[:, failures])
    assert peers.tolist() == sorted(level_of(int(COUNTS[i].max())) for i in range(PEOPLE) if i % 2 == 0 and i != 2)
    assert len(profiles.peers("user:new", 1)) == PEOPLE // 2


def test_what_stays_within_the_habits_is_no_evidence() -> None:
    profiles, _, rates = fitted(COUNTS)
    name = "user:1"
    reached = int(COUNTS[1].max())
    assert judged(profiles, rates, name, reached)[0] == 0.0
    assert judged(profiles, rates, name, 40 * reached)[0] > 0.0
