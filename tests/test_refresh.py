"""What has been normal for long enough joins the baseline; what was alerted on, what one machine pushes, and what moves
away a little each day does not, and the last is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from state.baseline import Baseline
from state.quarantine import CAP, DAY_MS, MIN_DAYS, Quarantine
from streamer.bundle import load
from streamer.refresh import refresh
from streamer.simulate import simulate, write

MONDAY = 20_454 * DAY_MS
DIM = 8


def day(quarantine: Quarantine, number: int, vectors: list[int], who: list[str], **more: list[float]) -> None:
    """A day of events: numbers stand for vectors."""
    n = len(vectors)
    quarantine.hold(
        MONDAY + number * DAY_MS + np.arange(n),
        np.repeat(np.array(vectors, np.float16)[:, None], DIM, 1),
        who,
        np.array(more.get("alert", [0] * n), bool),
        np.array(more.get("known", [0] * n), bool),
        np.array(more.get("novelty", [1.0] * n)),
    )


def test_what_came_on_enough_days_joins_and_what_was_alerted_on_never() -> None:
    quarantine = Quarantine()
    for number in range(MIN_DAYS):
        vectors = [1, 2, 3] if number else [1, 3]
        alert = [float(vector == 3 and number == 1) for vector in vectors]
        day(quarantine, number, vectors, ["user:a"] * len(vectors), alert=alert)
    released = quarantine.release()
    assert released.rows.tolist() == [0]
    assert released.refused == {"not on enough days": 1, "alerted on": 1}


def test_one_entity_brings_little_and_many_bring_what_they_share() -> None:
    quarantine = Quarantine()
    own, shared = list(range(100)), [500, 501]
    for number in range(MIN_DAYS):
        day(quarantine, number, own + shared * 3, ["host:eve"] * 100 + [f"host:{n}" for n in (1, 1, 2, 2, 3, 3)])
    released = quarantine.release()
    assert len(released.rows) == CAP + 2
    assert released.refused == {"too much of one entity": 100 - CAP}


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.3), st.integers(0, 10**6))
def test_a_slow_drift_is_alarmed_before_its_end_state_joins(step: float, seed: int) -> None:
    """Each day a little further from what was first learned, under the line all the time, and then staying there."""
    generator = np.random.default_rng(seed)
    quarantine = Quarantine()
    entities = [f"user:{n}" for n in range(20)]
    for number in range(35):
        for entity in entities:
            novelty = generator.exponential(1.0, 20)
            vectors = (generator.integers(0, 30, 20) + (1000 if entity == "user:0" else 0)).tolist()
            if entity == "user:0":
                novelty = novelty * (1 + step * number)
                vectors[0] = 2000 + number // 4
            day(quarantine, number, vectors, [entity] * 20, novelty=novelty.tolist())
    drifting = quarantine.drifting()
    assert "user:0" in drifting
    assert MONDAY < drifting["user:0"] < MONDAY + 35 * DAY_MS
    assert len(drifting) <= 2  # Twenty entities over five weeks: chance may name one more.
    released = quarantine.release()
    assert released.refused["of an entity that drifts"] >= 9  # nothing of where it went has joined


def test_entities_that_stay_as_they_are_are_not_named() -> None:
    generator = np.random.default_rng(0)
    quarantine = Quarantine()
    for number in range(28):
        for who in range(50):
            novelty = generator.exponential(1.0 + who % 5, 15).tolist()
            day(quarantine, number, [0] * 15, [f"user:{who}"] * 15, novelty=novelty)
    assert len(quarantine.drifting()) <= 2


def test_a_refreshed_bundle_keeps_the_windows_and_knows_more(folder: Path, tmp_path: Path) -> None:
    days = list(simulate(seed=3, days=5, events_per_day=2600))
    write(days[1:], tmp_path / "later.ndjson")
    before = load(folder / "bundle")
    done = refresh([tmp_path / "later.ndjson"], folder / "bundle", tmp_path / "new", alerts_per_day=20)
    after = load(tmp_path / "new")
    joined = len(done.released.rows)
    assert joined > 0
    assert len(after.scorer.record.baseline) == len(before.scorer.record.baseline) + joined == len(after.exemplars)
    assert after.scorer.record.baseline.learned.sum() == len(before.scorer.record.baseline)
    assert after.encoder_hash == before.encoder_hash
    assert after.manifest["training"]["refreshed"]["of"] == before.version
    old, new = (each.scorer.record.baseline.vectors() for each in (before, after))
    joining = new[~after.scorer.record.baseline.learned]
    assert isinstance(after.scorer.record.baseline, Baseline)
    np.testing.assert_allclose(after.scorer.record.baseline.search(joining, 1)[0], 0.0, atol=1e-3)
    assert {vector.tobytes() for vector in old} <= {vector.tobytes() for vector in new}
    assert all(orjson.loads(line) for line in after.exemplars[:5])
    again = refresh([tmp_path / "later.ndjson"], tmp_path / "new", tmp_path / "third", alerts_per_day=20)
    assert len(again.released.rows) < joined  # What has joined is known; what was capped may come now.
    assert again.bundle.scorer.record.baseline.learned.sum() == len(before.scorer.record.baseline)
