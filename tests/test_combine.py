"""Evidence is joined so that the stronger counts, and p-values promise no more than the sample shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from state.calibration import FEW, Calibration
from streamer.detection.combine import SEQUENCE_DISCOUNT, EventScorer, discounted
from streamer.detection.sequence_score import SequenceScorer

NATS = st.floats(0, 600, allow_nan=False)


def test_a_sequence_says_nothing_until_it_is_rare() -> None:
    counted = discounted(-np.log([1.0, 0.05, 0.01, 1e-4]))
    assert counted[:3].tolist() == [0, 0, 0]
    assert counted[3] == pytest.approx(4 * np.log(10) - SEQUENCE_DISCOUNT)


def p_values(held_out: NDArray[np.float64], evidence: NDArray[np.float64]) -> NDArray[np.float64]:
    record: Any = None  # Not asked.
    scorer = EventScorer(record, None, None, Calibration.fit(held_out, tail_from=FEW), None)
    nothing = np.zeros(len(evidence))
    return scorer.p_value(evidence, nothing, nothing)


def test_what_is_stronger_than_the_sample_is_at_first_no_rarer_than_its_strongest_story() -> None:
    """Seventeen events of one story are one thing that was seen, and the next story may have as many."""
    common = np.random.default_rng(0).exponential(0.6, 10_000).clip(max=4.4)
    episode = np.full(17, 5.3)
    evidence = np.array([5.31, 5.8, 6.2, 8.0, 12.0])
    alone, together = (p_values(np.concatenate([common, s]), evidence) for s in (episode[:1], episode))
    assert np.all(together[:3] > 17 / 10_017) and np.all(together[:3] < 19 / 10_017)
    assert np.all(alone[:3] < together[:3])
    assert together[3:] == pytest.approx(np.exp(-evidence[3:]))  # As the evidence says by itself.


@given(st.lists(st.floats(0, 30), min_size=30, max_size=60), st.lists(NATS, min_size=2, max_size=20))
def test_more_evidence_never_has_a_larger_p_value(sample: list[float], evidence: list[float]) -> None:
    p = p_values(np.array(sample), np.sort(evidence))
    assert np.all(p > 0) and np.all(p <= 1) and np.all(np.diff(p) <= 0)


def test_a_silence_is_no_rarer_than_the_models_say() -> None:
    """All routines ended as expected, to a hundredth of a nat: one that ends a little oddly is not one in a billion."""
    model: Any = None  # Not asked.
    scorer = SequenceScorer(model)
    kinds = np.zeros(1_000, np.int8)
    usual = np.random.default_rng(0).normal(0.3, 0.01, 1_000).clip(0)
    raw = {"order": usual, "missing": usual, "ending": usual}
    scorer.fit(raw, kinds, np.ones(1_000, bool), np.arange(1_000, dtype=np.int32))
    evidence = scorer.evidence("ending", {"ending": np.array([0.3, 2.2, 12.0])}, kinds[:3])
    assert evidence.tolist() == pytest.approx([min(evidence[0], 0.6), 4.4, 24.0])
    assert discounted(evidence).tolist() == pytest.approx([0, 0, 24 - SEQUENCE_DISCOUNT])
