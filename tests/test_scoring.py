"""Evidence is joined so that the stronger counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.scoring import SEQUENCE_DOUBT, Parts, beyond_doubt

NATS = st.floats(0, 600, allow_nan=False)


@given(NATS, NATS)
def test_density_and_surprise_are_little_more_than_the_stronger(density: float, surprise: float) -> None:
    (joined,) = Parts(np.array([density]), np.array([surprise])).combined()
    strongest = max(2 * density, surprise)
    assert strongest * (1 - 1e-9) - 1e-9 <= joined <= strongest * 1.2600 + 1e-9  # 2 ** (1 / 3)


def test_a_sequence_says_nothing_until_it_is_rare() -> None:
    counted = beyond_doubt(-np.log([1.0, 0.05, 0.01, 1e-4]))
    assert counted[:3].tolist() == [0, 0, 0]
    assert counted[3] == pytest.approx(4 * np.log(10) - SEQUENCE_DOUBT)
