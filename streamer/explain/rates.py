"""What was much: the counts of an entity that lie beyond its habits, the strongest first.

An event answers for the one count that it lifted furthest, which need not be the one that says what goes on: an address
that sprays passwords has many events, and many failures. Promises to name the cause first. Knows of what was raised by
the members of the window alone, so that a count which long stood still is not named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.entities import KINDS
from state.rolling_counts import HOUR_MS, HOURS, LEVELS, NEAR, SPANS, count
from state.windows import Windows
from streamer.detection.rate_score import RateScorer

MAX_NAMED_RATES = 3
"""Counts named of one alert."""
WORTH_TELLING = 2.3
"""Nats: of the counts that normal entities raise, one in ten."""


@dataclass(frozen=True)
class RateFinding:
    """How much an entity did: count, span: of `tally.COUNTS` and `tally.SPANS`; observed: at least so many; usual:
    what it never exceeded in training or, where training had no such entity (own: False), what its kind seldom did;
    reached: how many others of its kind ever reached as much in training, of `among` (0: not known)."""

    count: str
    span: str
    observed: float
    usual: float
    own: bool
    reached: int = 0
    among: int = 0


def levels(windows: Windows, time: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [m, 8]: the highest levels to which the members of m windows, as `WindowStore.latest` has them, raised each
    count within its span before a time (int64 [m], ms)."""
    behind = time[:, None] // HOUR_MS - windows.times // HOUR_MS
    before = windows.mask & (windows.times <= time[:, None])
    found = np.zeros((len(windows), len(LEVELS)), np.uint8)
    for place, hours in enumerate((NEAR, HOURS)):
        within = (before & (behind < hours))[:, :, None]
        found[:, place :: len(SPANS)] = np.where(within, windows.raised[:, :, place :: len(SPANS)], 0).max(1, initial=0)
    return found


def findings(
    rates: RateScorer, entities: Sequence[str], reached: NDArray[np.uint8], causal: Sequence[int]
) -> list[tuple[RateFinding, ...]]:
    """At most `MAX_NAMED_RATES` of each entity, one a count: the causal one (its place in `LEVELS`) first, then by
    evidence. reached: uint8 [m, 8]."""
    kinds = np.array([KINDS.index(entity.partition(":")[0]) for entity in entities], np.int8)
    own, known = rates.habits.own(entities)
    most = np.where(known[:, None], own, rates.habits.usual[kinds])
    evidence = rates.by_count(rates.habits.excess(entities, kinds, reached), kinds)
    evidence[reached <= most] = 0.0
    found = []
    for i, first in enumerate(causal):
        beside = [c for c in np.argsort(-evidence[i], kind="stable").tolist() if evidence[i, c] >= WORTH_TELLING]
        others = rates.habits.others(entities[i], int(kinds[i]))
        named: dict[str, RateFinding] = {}
        for column in [first, *beside]:
            what, _, span = LEVELS[column].partition(".")
            # A level is all counts up to where the next one begins.
            usual = float(count(int(most[i, column]) + 1)) - 1 if most[i, column] else 0.0
            seen = float(count(int(reached[i, column])))
            as_much = int((others[:, column] >= reached[i, column]).sum())
            named.setdefault(what, RateFinding(what, span, seen, usual, bool(known[i]), as_much, len(others)))
        found.append(tuple(named.values())[:MAX_NAMED_RATES])
    return found
