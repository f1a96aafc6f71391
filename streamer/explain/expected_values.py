"""What values an event was expected to have in one field: those of the nearest normal events, as text.

Texts are normalised as in the schema: "" for absent, a range for a number.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import FIRST, MISSING, UNKNOWN, Field

Expected = tuple[tuple[str, float], ...]
MOST = 3
"""Expected values that are named."""
MIN_SHARE = 0.05
USUAL = 0.9
"""The share of events that the range of a number holds."""


def expected_values(field: Field, code: int, near: NDArray[np.integer]) -> Expected:
    """The most common other values of a field among the nearest normal events, with their shares; for a number, the
    range of nine in ten of them where the event lies outside. code: of the event; near: int [k], of these events."""
    if not len(near):
        return ()
    if field.kind == "number":
        return _expected_number(field, code, near)
    codes, counts = np.unique(near, return_counts=True)
    likely = sorted(zip(codes.tolist(), (counts / len(near)).tolist(), strict=True), key=lambda each: -each[1])
    named = ((_name(field, c), share) for c, share in likely if c not in (code, UNKNOWN) and share >= MIN_SHARE)
    return tuple(named)[:MOST]


def tail(field: Field, quantile: float) -> float:
    """-log of the share of training values at least this far from the median, on both sides."""
    return float(-np.log(max(2 * min(quantile, 1 - quantile), 1 / max(len(field.grid), 1))))


def usual_range(field: Field) -> Expected:
    """The range of nine in ten training values."""
    last = len(field.grid) - 1
    least, most = (field.grid[round(share * last)] for share in ((1 - USUAL) / 2, (1 + USUAL) / 2))
    return ((as_range(least, most), USUAL),)


def as_range(low: float, high: float) -> str:
    """A range on the signed log scale as text: "3 to 12", "3" where both ends are the same to three digits."""
    least, most = _rounded(low), _rounded(high)
    return least if least == most else f"{least} to {most}"


def _expected_number(field: Field, code: int, near: NDArray[np.integer]) -> Expected:
    missing = float(np.mean(near == MISSING))
    if missing > 0.5:
        return (("", missing),) if code != MISSING else ()
    bins = np.sort(near[near >= FIRST]) - FIRST
    cut = round((1 - USUAL) / 2 * len(bins))
    low, high = (int(bins[cut]), int(bins[len(bins) - 1 - cut])) if len(bins) else (0, -1)
    if high < low or low <= code - FIRST <= high:
        return ()
    return ((_range(field, low, high), USUAL if cut else 1.0),)


def _name(field: Field, code: int) -> str:
    if code == MISSING:
        return ""
    return "present" if field.kind == "presence" else field.values[code - FIRST]


def _range(field: Field, first: int, last: int) -> str:
    """Neighbouring bins of a number as text: "0", "3 to 12", "over 4200", to three digits."""
    low = field.edges[first - 1] if first > 0 else None
    high = field.edges[last] if last < len(field.edges) else None
    inside = field.grid[
        0 if low is None else bisect_right(field.grid, low) : None if high is None else bisect_right(field.grid, high)
    ]
    if not inside:  # the bins have no value of the grid
        inside = tuple(x for x in (low, high) if x is not None)
    usual = as_range(inside[0], inside[-1])
    return f"over {_rounded(low)}" if high is None and low is not None and " to " in usual else usual


def _rounded(logarithmic: float) -> str:
    """A number from the signed log scale as text: whole numbers below 1000 exactly, others to three digits."""
    x = float(np.sign(logarithmic) * np.expm1(abs(logarithmic)))
    whole = round(x)
    if abs(x - whole) < 1e-6 * max(1.0, abs(x)) and abs(whole) < 1000:
        return str(whole)
    return f"{float(f'{x:.3g}'):.12g}"
