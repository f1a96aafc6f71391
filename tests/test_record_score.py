"""The record score: parts without weights, each product calibrated on its own events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streamer.detection.record_score import OWN_CALIBRATION, PARTS, RecordScorer

METRICS, LOGS, RARE = 2, 3, 4
"""Event types, by their codes; the products of the first two have enough events for a calibration of their own."""
NOTHING: Any = None


@pytest.fixture(scope="module")
def scorer() -> RecordScorer:
    generator = np.random.default_rng(0)
    made = RecordScorer(NOTHING, NOTHING, np.empty(0, np.int64), np.array([0, 0, 2, 3, 4]))
    types = np.repeat([METRICS, LOGS, RARE], [2000, 2000, OWN_CALIBRATION // 2])
    made.fit(raw(generator.normal(size=len(types)) + 100 * (types == METRICS)), types)
    return made


def raw(scores: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return dict.fromkeys(PARTS, scores)


def judged(scorer: RecordScorer, score: float, event_type: int) -> float:
    types = np.array([event_type])
    return float(scorer.evidence(scorer.parts(raw(np.array([score])), types), types)[0])


def test_what_is_usual_for_one_product_is_odd_for_another(scorer: RecordScorer) -> None:
    assert judged(scorer, 100, METRICS) < 2
    assert judged(scorer, 100, LOGS) > 6
    assert judged(scorer, 6, LOGS) > 6, "metrics that lie at 100 must not make 6 usual"


def test_a_product_with_few_events_and_a_new_type_are_judged_by_all_events(scorer: RecordScorer) -> None:
    assert judged(scorer, 6, RARE) == judged(scorer, 6, 99)
    assert judged(scorer, 6, RARE) < 2 < judged(scorer, 110, RARE)


def test_types_of_which_more_parts_speak_do_not_make_the_others_usual() -> None:
    generator = np.random.default_rng(0)
    made = RecordScorer(NOTHING, NOTHING, np.array([METRICS]), np.zeros(5, np.int64))
    types = np.repeat([METRICS, LOGS], 2000)
    scores = raw(generator.normal(size=len(types)))
    made.fit(scores, types)
    evidence = made.evidence(made.parts(scores, types), types)
    for event_type in (METRICS, LOGS):
        assert np.mean(evidence[types == event_type] >= -np.log(0.01)) == pytest.approx(0.01, rel=0.5)
