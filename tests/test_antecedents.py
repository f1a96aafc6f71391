"""What hardly ever comes without something before it: learned, missed where it is missing, and nothing else said."""

import numpy as np
from numpy.typing import NDArray

from encoder.models.antecedents import LEAST, SPAN_MS, Antecedents, known, recent
from encoder.ocsf.entities import KINDS

JOB, INSTALLER, NOISE, OTHER = 0, 1, 2, 3
HOST, RUN = KINDS.index("host"), KINDS.index("correlation")


def learned(jobs: int, without: int = 0, kind: int = HOST) -> Antecedents:
    """Jobs after an installer, with noise between in every third; some without an installer; and the noise itself."""
    before = np.full((jobs, 4), -1, np.int64)
    before[:, 1] = INSTALLER
    before[::3, 2] = NOISE
    before[:without, 1] = -1
    kinds, code = np.full(jobs, kind, np.int64), np.full(jobs, JOB, np.int64)
    noise = (kinds, np.full(jobs, NOISE, np.int64), np.full((jobs, 4), -1, np.int64))
    return Antecedents.fit([(kinds, code, before), noise], OTHER + 1)


def missing(antecedents: Antecedents, *before: int, kind: int = HOST) -> float:
    pair = np.array([kind], np.int64), np.array([JOB], np.int64)
    assert antecedents.has_usual(*pair).all()
    nats, which = antecedents.missing(*pair, np.array([before], np.int64))
    assert which.tolist() == [INSTALLER if nats[0] else -1], "what did not come is named"
    return float(nats[0])


def test_a_job_without_its_installer_is_as_odd_as_jobs_without_it_are_rare() -> None:
    assert missing(learned(100), -1, NOISE, INSTALLER, NOISE) == 0.0
    assert missing(learned(100), -1, NOISE, NOISE, NOISE) == np.float32(-np.log(0.5 / 101))
    assert missing(learned(1000), -1, -1, -1, -1) > missing(learned(100), -1, -1, -1, -1)
    assert missing(learned(1000, without=100), -1, -1, -1, -1) == np.float32(-np.log(100.5 / 1001))


def test_what_has_no_usual_predecessor_and_what_was_seldom_seen_is_not_asked() -> None:
    antecedents, kind = learned(100), np.array([HOST], np.int64)
    assert not antecedents.has_usual(kind, np.array([NOISE])).any()
    assert not antecedents.has_usual(np.array([RUN]), np.array([JOB])).any()  # each kind of entity by itself
    assert not antecedents.has_usual(kind, np.array([OTHER])).any()
    assert not learned(LEAST - 1).has_usual(kind, np.array([JOB])).any()
    assert not learned(100, without=60).has_usual(kind, np.array([JOB])).any()


def test_training_in_parts_is_training_in_one() -> None:
    before = np.random.default_rng(0).integers(-1, 3, (500, 6))
    kind, code = np.full(500, HOST, np.int64), np.arange(500) % 3
    whole = Antecedents.fit([(kind, code, before)], 4)
    parts = Antecedents.fit([(kind[s], code[s], before[s]) for s in (slice(0, 7), slice(7, 500))], 4)
    for name in ("keys", "before", "nats"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def window(*ago: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """One window of four slots: members so long (ms) before the newest, oldest first."""
    times = np.zeros((1, 4), np.int64)
    times[0, 4 - len(ago) :] = 10**9 - np.array(ago)
    return times, np.arange(4)[None] >= 4 - len(ago)


def test_what_came_is_what_came_within_the_span_before_the_newest() -> None:
    times, used = window(SPAN_MS + 1, SPAN_MS, 1, 0)
    assert recent(times, used).tolist() == [[False, True, True, False]]


def test_nothing_is_said_of_a_history_that_is_not_known() -> None:
    for ago, whole in (((0,), False), ((SPAN_MS, 0), False), ((SPAN_MS + 1, 0), True), ((3, 2, 1, 0), True)):
        assert known(*window(*ago)).tolist() == [whole]
