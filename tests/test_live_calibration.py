"""What is learned while serving: values that came with a deployment are news for an hour, a part whose scores moved is
heard less, and what stands out of either is still found. Nobody can teach it quickly what few entities do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from streamer.detection.live_calibration import (
    HOUR_MS,
    MAX_GROUPS,
    Decision,
    Evidence,
    HourTally,
    LiveCalibration,
    Lowered,
)
from streamer.detection.record_score import PARTS

FIELDS = ("container.name", "device.hostname", "process.name")
PER_HOUR = 400
RARITY, NEAR = PARTS.index("rarity_for_actor"), PARTS.index("near")
NEW = 8.0
"""Nats that a new value adds to the rarity of an event."""


def joint(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """As a record calibration does it, roughly: what all parts say beyond what they usually say together."""
    return np.maximum(parts.sum(0) - len(PARTS), 0.0)


class Score:
    """Events of `with_news`: what they are without it."""

    def __init__(self, seen: Evidence) -> None:
        self.seen = seen

    def without_news(self, rows: NDArray[np.intp], columns: Sequence[int]) -> NDArray[np.float64]:
        parts = self.seen.parts[:, rows].copy()
        parts[RARITY] -= NEW * self.seen.unknown[np.ix_(rows, columns)].sum(1)
        return np.maximum(parts, 0.0)

    def joint(self, parts: NDArray[np.float64], _: NDArray[np.int64]) -> NDArray[np.float64]:
        return joint(parts)


def judge(live: LiveCalibration, seen: Evidence) -> tuple[NDArray[np.float64], NDArray[np.object_]]:
    return live.judge(seen, Score(seen))


def ordinary(hours: int, *, first: int = 0, per_hour: int = PER_HOUR, entities: int = 50, seed: int = 0) -> Evidence:
    """Events as calibration promises them: each part is exponential, without unknown values."""
    random, n = np.random.default_rng(seed), hours * per_hour
    parts = random.exponential(size=(len(PARTS), n))
    time = first * HOUR_MS + np.arange(n) * HOUR_MS // per_hour
    entity = [f"host:{number}" for number in random.integers(0, entities, n).tolist()]
    return Evidence(time, np.full(n, 2), np.zeros((n, len(FIELDS)), np.bool_), entity, parts, joint(parts))


def with_news(seen: Evidence, rows: NDArray[np.intp], fields: Sequence[int] = (0,)) -> Evidence:
    """The same events, some of them with new values."""
    parts, unknown = seen.parts.copy(), seen.unknown.copy()
    parts[RARITY, rows] += NEW * len(fields)
    unknown[np.ix_(rows, fields)] = True
    return replace(seen, parts=parts, unknown=unknown, record=joint(parts))


def louder(seen: Evidence, rows: NDArray[np.intp], part: int, nats: float) -> Evidence:
    parts = seen.parts.copy()
    parts[part, rows] += nats
    return replace(seen, parts=parts, record=joint(parts))


def part_of(seen: Evidence, rows: slice) -> Evidence:
    return Evidence(
        seen.time[rows], seen.types[rows], seen.unknown[rows], seen.entity[rows], seen.parts[:, rows], seen.record[rows]
    )


def everything(seen: Evidence) -> NDArray[np.intp]:
    return np.arange(len(seen.time))


@pytest.fixture
def live() -> LiveCalibration:
    return LiveCalibration("bundle", ("100701",), FIELDS, moves=True)


def judged(live: LiveCalibration, seen: Evidence) -> tuple[NDArray[np.float64], list[Lowered | None]]:
    record, lowered = judge(live, seen)
    return record, lowered.tolist()


def test_nothing_is_lowered_in_traffic_as_it_was_in_training(live: LiveCalibration) -> None:
    seen = ordinary(48)
    record, lowered = judged(live, seen)
    np.testing.assert_array_equal(record, seen.record)
    assert set(lowered) == {None}
    assert [decision.lowered for decision in live.decisions] == [()] * 48


def test_a_day_on_which_every_event_has_a_new_name_is_news_for_an_hour(live: LiveCalibration) -> None:
    judged(live, ordinary(24))
    seen = ordinary(24, first=24, seed=1)
    renamed = with_news(seen, everything(seen), (0, 1))
    record, lowered = judged(live, renamed)
    alert = 7.0
    assert (record[:PER_HOUR] > alert).mean() > 0.9
    usual = (seen.record > alert).sum()
    assert (record[2 * PER_HOUR :] > alert).sum() <= 1.5 * usual + 5
    assert lowered[-1] is not None
    assert lowered[-1].fields == ("container.name", "device.hostname")
    assert lowered[-1].since == 25 * HOUR_MS
    assert lowered[-1].share == 1.0


def test_what_hides_among_renamed_events_is_still_found(live: LiveCalibration) -> None:
    """Attacks with the new names that are also far from all normal events, or have a further new value, keep that."""
    judged(live, ordinary(24))
    seen = ordinary(24, first=24, seed=1)
    far, other = np.arange(5 * PER_HOUR, 24 * PER_HOUR, 97), np.arange(5 * PER_HOUR + 11, 24 * PER_HOUR, 997)
    renamed = louder(with_news(seen, everything(seen)), far, NEAR, 12.0)
    renamed = with_news(renamed, other, (2,))
    record, lowered = judged(live, renamed)
    rest = np.setdiff1d(np.arange(5 * PER_HOUR, 24 * PER_HOUR), np.union1d(far, other))
    assert np.quantile(record[far], 0.1) > np.quantile(record[rest], 0.99) + 1
    assert np.median(record[other]) > np.quantile(record[rest], 0.99)
    assert lowered[int(other[-1])] is not None  # for its new name alone


def test_the_thousandth_event_with_the_same_new_value_is_no_news(live: LiveCalibration) -> None:
    """A new program in one event of twenty, at all hosts."""
    seen = ordinary(60)
    rows = np.arange(24 * PER_HOUR, 60 * PER_HOUR, 20)
    record, _ = judged(live, with_news(seen, rows, (2,)))
    first, thousandth = rows[:10], rows[len(rows) - 100 :]
    assert np.median(record[first]) > 7
    # Its share of the events bounds what it says; chance says the rest.
    assert np.median(record[thousandth]) < -np.log(1 / 20) + 1
    others = np.setdiff1d(everything(seen), rows)
    np.testing.assert_array_equal(record[others], seen.record[others])


def test_news_of_one_entity_counts_once_an_hour(live: LiveCalibration) -> None:
    """One of fifty hosts repeats a new value a thousand times in an hour, and a hundred times an hour for a week."""
    judged(live, ordinary(24))

    def attacked(hours: int, first: int, times: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        seen = ordinary(hours, first=first, per_hour=PER_HOUR + times, seed=first)
        rows = everything(seen)[np.arange(len(seen.time)) % (PER_HOUR + times) < times]
        mine = set(rows.tolist())
        seen = replace(seen, entity=["host:evil" if i in mine else e for i, e in enumerate(seen.entity)])
        seen = with_news(seen, rows, (2,))
        return judge(live.copy(), seen)[0][rows], seen.record[rows]

    flood = live.copy()
    seen = ordinary(1, first=24, per_hour=1000)
    seen = with_news(replace(seen, entity=["host:evil"] * 1000), everything(seen), (2,))
    judge(flood, seen)
    after = ordinary(1, first=25, per_hour=1000)
    after = with_news(replace(after, entity=["host:evil"] * 1000), everything(after), (2,))
    record = judge(flood, after)[0]
    # One of about fifty entities had it, and -log of that is what the value may still say, whether it was alone in an
    # hour or goes on for a week.
    usual = np.median(ordinary(1).record)
    assert np.median(record) > usual - np.log(1 / 50) - 1.5
    record, before = attacked(168, 24, 100)
    assert np.median(record[-2000:]) > usual - np.log(1 / 50) - 1.5
    assert (record <= before).all()


def test_a_part_that_speaks_too_often_is_heard_less_and_comes_back_when_it_is_sound(live: LiveCalibration) -> None:
    judged(live, ordinary(24))
    drifted = ordinary(24, first=24, seed=1)
    moved = np.arange(0, len(drifted.time), 2)
    drifted = louder(drifted, moved, NEAR, 6.0)
    record, lowered = judged(live, drifted)
    late = slice(12 * PER_HOUR, None)
    assert (record[late] > 7).mean() < 0.2 * (drifted.record[late] > 7).mean()
    assert lowered[-1] is not None
    assert (lowered[-1].fields, lowered[-1].parts) == ((), ("near",))
    assert lowered[-1].since <= 32 * HOUR_MS
    sound = ordinary(30, first=48, seed=2)
    record, lowered = judged(live, sound)
    assert lowered[0] is not None
    assert lowered[-1] is None
    np.testing.assert_array_equal(record[-PER_HOUR:], sound.record[-PER_HOUR:])


def test_an_attack_of_a_tenth_of_the_events_silences_no_part(live: LiveCalibration) -> None:
    seen = ordinary(48)
    attack = louder(seen, np.arange(0, len(seen.time), 10), NEAR, 12.0)
    record, _ = judged(live, attack)
    np.testing.assert_array_equal(record, attack.record)


@pytest.mark.parametrize("size", [1, 7, 333, 4096])
def test_scores_and_decisions_do_not_depend_on_how_the_stream_was_cut(live: LiveCalibration, size: int) -> None:
    seen = ordinary(8, per_hour=100)
    seen = with_news(seen, np.arange(150, 800, 3), (0, 2))
    whole, parts = live.copy(), live.copy()
    record = judge(whole, seen)[0]
    cut = [judge(parts, part_of(seen, slice(i, i + size)))[0] for i in range(0, len(seen.time), size)]
    np.testing.assert_allclose(np.concatenate(cut), record, rtol=1e-12)
    assert parts.decisions == whole.decisions
    assert (record < seen.record).any()


def test_decisions_and_counts_survive_json(live: LiveCalibration) -> None:
    seen = ordinary(5)
    judged(live, louder(with_news(seen, np.arange(0, len(seen.time), 2), (0, 1)), everything(seen), NEAR, 6.0))
    assert any(decision.lowered for decision in live.decisions)
    for decision in live.decisions:
        assert Decision.from_json(orjson.loads(orjson.dumps(decision.to_json()))) == decision
    tallies = {
        hour: HourTally.from_json(orjson.loads(orjson.dumps(tally.to_json()))) for hour, tally in live.tallies.items()
    }
    again = replace(live, tallies=tallies, decisions=live.decisions[:-1])
    again.advance(live.decisions[-1].start // HOUR_MS)
    assert again.decisions == live.decisions


def test_counts_of_two_processes_decide_as_those_of_one(live: LiveCalibration) -> None:
    seen = ordinary(4)
    seen = with_news(seen, np.arange(0, len(seen.time), 3))
    one, other = live.copy(), live.copy()
    judge(live, seen)
    halves = [np.arange(i, len(seen.time), 2) for i in range(2)]
    for process, rows in zip((one, other), halves, strict=True):
        entity = [seen.entity[row] for row in rows.tolist()]
        half = Evidence(
            seen.time[rows], seen.types[rows], seen.unknown[rows], entity, seen.parts[:, rows], seen.record[rows]
        )
        judge(process, half)
    owner = replace(one, decisions=[], elsewhere=dict(other.tallies))
    owner.advance(4)
    live.advance(4)
    assert owner.decisions[-1].lowered[0].caps == live.decisions[-1].lowered[0].caps
    # Not from before what the other has judged already.
    assert owner.decisions[-1].start >= live.decisions[-1].start


def test_a_verdict_withdraws_what_was_learned(live: LiveCalibration) -> None:
    live.withdrawn = {("100701", "container.name"): 30 * HOUR_MS}
    seen = ordinary(40)
    renamed = with_news(seen, everything(seen))
    _, lowered = judged(live, renamed)
    assert {each.fields for each in lowered[24 * PER_HOUR : 30 * PER_HOUR] if each} <= {()}
    assert lowered[31 * PER_HOUR] is not None
    assert "container.name" in lowered[31 * PER_HOUR].fields


def test_hostile_events_cost_bounded_memory(live: LiveCalibration) -> None:
    n, width = 20_000, 40
    wide = replace(live, fields=tuple(f"a.{i}" for i in range(width)))
    seen = ordinary(1, per_hour=n)
    random = np.random.default_rng(0)
    seen = replace(seen, unknown=random.random((n, width)) < 0.5, entity=[f"user:{i}" for i in range(n)])
    for start in range(0, n, 500):
        judge(wide, part_of(seen, slice(start, start + 500)))
    (tally,) = wide.tallies.values()
    assert len(tally.groups) == MAX_GROUPS
    assert tally.types["100701"][0] == n
    assert len(orjson.dumps(tally.to_json())) < 200_000
    wide.advance(1)
    assert len(orjson.dumps(wide.decisions[-1].to_json())) < 200_000
