"""p-values are compared by their logarithms: alerts lie at 1e-5 and far below, where an absolute difference is always
small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

PValues: TypeAlias = NDArray[np.float64] | Sequence[float]
LOG_TOLERANCE = 1e-5
"""What matrix shapes may change of log p."""


def log_difference(found: PValues, expected: PValues) -> float:
    """The largest difference of log p between two sequences of p-values, both [n]; infinite if one is not above 0."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert one.shape == other.shape, f"{one.shape} p-values against {other.shape}"
    if not (one > 0).all() or not (other > 0).all():
        return float("inf")
    return float(np.abs(np.log(one) - np.log(other)).max(initial=0.0))


def assert_same_p_values(found: PValues, expected: PValues) -> None:
    """Raises AssertionError, with the largest difference, unless each log p is within LOG_TOLERANCE."""
    difference = log_difference(found, expected)
    assert difference <= LOG_TOLERANCE, f"log p differs by up to {difference:.1e}"


def assert_same_scores(found: Mapping[Any, float], expected: Mapping[Any, float]) -> None:
    """Two maps from an event's place to its p-value: the same events, not none, each with the same p-value."""
    assert found.keys() == expected.keys() != set()
    assert_same_p_values([found[at] for at in expected], list(expected.values()))
