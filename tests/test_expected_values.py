"""What an event was expected to have in a field is what the nearest normal events have, in words."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.features.schema import FIRST, MISSING, UNKNOWN, Field
from streamer.explain.expected_values import expected_values, tail, usual_range

NAME = Field("process.name", "process.name", "category", "process", 100, ("sh", "bash", "zsh"))
AGENT = Field("user_agent", "user_agent", "presence", "", 100)
GRID = tuple(float(np.log1p(x)) for x in range(1000))
EDGES = tuple(float(np.log1p(x)) for x in (0.5, 9.5, 99.5, 499.5, 999.5))
BYTES = Field("bytes", "bytes", "number", "traffic", 100, grid=GRID, edges=EDGES)


def test_common_values_of_neighbours_are_expected_with_their_shares() -> None:
    near = np.array([FIRST] * 6 + [FIRST + 1] * 3 + [UNKNOWN])
    assert expected_values(NAME, UNKNOWN, near) == (("sh", 0.6), ("bash", 0.3))
    assert expected_values(NAME, FIRST, near) == (("bash", 0.3),), "the event's own value is not expected instead"
    assert expected_values(NAME, FIRST, np.array([MISSING] * 4)) == (("", 1.0),)
    assert expected_values(AGENT, MISSING, np.array([FIRST] * 4)) == (("present", 1.0),)
    assert expected_values(NAME, FIRST, np.empty(0, np.int64)) == ()


@pytest.mark.parametrize(
    ("code", "bins", "expected"),
    [
        pytest.param(FIRST + 3, [1] * 20, (("1 to 9", 0.9),), id="above"),
        pytest.param(FIRST + 1, [1] * 20, (), id="as its neighbours"),
        pytest.param(FIRST, [1] * 18 + [2, 4], (("1 to 99", 0.9),), id="without the outer twentieths"),
        pytest.param(FIRST + 4, [1, 2], (("1 to 99", 1.0),), id="all of a few"),
    ],
)
def test_a_number_is_expected_in_the_range_of_its_neighbours(
    code: int, bins: list[int], expected: tuple[tuple[str, float], ...]
) -> None:
    assert expected_values(BYTES, code, np.array(bins) + FIRST) == expected


def test_a_number_that_neighbours_do_not_have_is_expected_to_be_absent() -> None:
    assert expected_values(BYTES, FIRST, np.array([MISSING, MISSING, FIRST])) == (("", pytest.approx(2 / 3)),)


def test_far_from_usual_is_rare_and_the_usual_range_holds_nine_in_ten() -> None:
    assert usual_range(BYTES) == (("50 to 949", 0.9),)
    assert tail(BYTES, 0.5) == 0.0
    assert tail(BYTES, 0.01) == pytest.approx(-np.log(0.02)) and tail(BYTES, 1.0) == pytest.approx(np.log(1000))
