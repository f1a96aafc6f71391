"""The counts of an entity that are above its usual rates, strongest evidence first.

The cause of an alert is the one count that the event raised furthest. Other high counts may say more: an address that
sprays passwords has many events and many failures. Promises to name the cause first. It knows only the counts that
members of the window raised, so a count that has not changed for long is not named.
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
"""Counts that one alert names."""
WORTH_TELLING = 2.3
"""Nats: one in ten of the counts that normal entities raise is as strong."""


@dataclass(frozen=True)
class RateFinding:
    """A high count of an entity. count, span: of `state.rolling_counts.COUNTS` and `SPANS`; observed: a lower bound of
    the count; usual: the most that the entity had in training (own) or, where training did not have the entity (own is
    False), what its kind seldom exceeded; reached: how many peers reached this count in training, of `among` (0: not
    known)."""

    count: str
    span: str
    observed: float
    usual: float
    own: bool
    reached: int = 0
    among: int = 0


def levels(windows: Windows, time: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [m, 8]: for each of m windows (from `WindowStore.latest`), the highest level to which its members raised
    each count within the span of that count before `time` (int64 [m], ms)."""
    behind = time[:, None] // HOUR_MS - windows.times // HOUR_MS
    before = windows.mask & (windows.times <= time[:, None])
    highest = np.zeros((len(windows), len(LEVELS)), np.uint8)
    for place, hours in enumerate((NEAR, HOURS)):
        within = (before & (behind < hours))[:, :, None]
        highest[:, place :: len(SPANS)] = np.where(within, windows.raised[:, :, place :: len(SPANS)], 0).max(
            1, initial=0
        )
    return highest


def findings(
    rates: RateScorer, entities: Sequence[str], reached: NDArray[np.uint8], causal: Sequence[int]
) -> list[tuple[RateFinding, ...]]:
    """At most `MAX_NAMED_RATES` for each of m entities, one for each count: the cause first, then by evidence.

    reached: uint8 [m, 8], levels; causal: m places in `LEVELS`, the cause of each alert."""
    kinds = np.array([KINDS.index(entity.partition(":")[0]) for entity in entities], np.int8)
    own, known = rates.profiles.own(entities)
    most = np.where(known[:, None], own, rates.profiles.usual[kinds])
    evidence = rates.by_count(rates.profiles.excess(entities, kinds, reached), kinds)
    evidence[reached <= most] = 0.0
    results = []
    for i, first in enumerate(causal):
        beside = [c for c in np.argsort(-evidence[i], kind="stable").tolist() if evidence[i, c] >= WORTH_TELLING]
        peers = rates.profiles.peers(entities[i], int(kinds[i]))
        named: dict[str, RateFinding] = {}
        for column in [first, *beside]:
            what, _, span = LEVELS[column].partition(".")
            # A level covers all counts below the start of the next level.
            usual = float(count(int(most[i, column]) + 1)) - 1 if most[i, column] else 0.0
            seen = float(count(int(reached[i, column])))
            as_much = int((peers[:, column] >= reached[i, column]).sum())
            named.setdefault(what, RateFinding(what, span, seen, usual, bool(known[i]), as_much, len(peers)))
        results.append(tuple(named.values())[:MAX_NAMED_RATES])
    return results
