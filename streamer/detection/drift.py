"""Drift: does recent traffic still look like the training data? Measured as numbers, and summed up as one verdict.

Three signs that need no labels: the population stability index of each field (Siddiqi 2006, Credit Risk Scorecards,
with the usual 0.25 for "has shifted") on the codes of the schema, the share of unknown values, and whether p-values are
as rare as they should be. Promises bounded memory. It does not name the cause of a change, and gives no verdict before
MIN_EVENTS.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import FIRST, MISSING, UNKNOWN, Schema
from encoder.ocsf.event_time import NO_TIME

HOUR_MS = 3_600_000
HOURS, DAYS = 24, 7
"""Values and p-values are compared over a day, fields over a week, because weekends differ from working days."""
MIN_EVENTS = 1000
SHIFTED = 0.25
RARE = 0.005
"""Codes with a smaller share of training are compared as one."""
LEVELS = (0.1, 0.01, 0.001)
JUDGED = LEVELS[:2]
"""The levels that count: below them there are so few p-values that a few incidents would look like drift."""
HEALTHY, REFIT, DISTRUST = "healthy", "refit soon", "do not trust"
_SEVERAL_FIELDS, _HALF_OF_FIELDS = 0.1, 0.5
_TWICE, _FIVE_TIMES = 2.0, 5.0
_NOTICED_UNKNOWN, _MANY_UNKNOWN = 0.01, 0.05


@dataclass(frozen=True)
class Health:
    """events: of the last day; psi: population stability index by field, over the week; unknown, unknown_in_training:
    shares of the present values; unseen_types: share of events whose type training did not have; share: of p-values at
    or under each of LEVELS; verdict: HEALTHY, REFIT or DISTRUST with its reasons, "" before MIN_EVENTS."""

    events: int
    psi: dict[str, float]
    unknown: float
    unknown_in_training: float
    unseen_types: float
    share: dict[float, float]
    verdict: str
    reasons: list[str] = field(default_factory=list)


def profile(schema: Schema, codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """The frequency of each code of each field: int32 [n, fields] to int64 [sum of the fields' sizes]."""
    starts = _starts(schema)
    flat = codes.astype(np.int64) + starts[:-1]
    return np.bincount(flat.ravel(), minlength=int(starts[-1])).astype(np.int64)


class Drift:
    """Compares the events that a detector scores with training.

    reference: `profile` of the training events.
    """

    def __init__(self, schema: Schema, reference: NDArray[np.int64]) -> None:
        self._schema = schema
        self._starts = _starts(schema)
        self._reference = reference
        self._bins = _bins(schema, self._starts, reference)
        discrete = [i for i, f in enumerate(schema.fields) if f.kind != "number"]
        self._unknown_at = self._starts[discrete] + UNKNOWN
        present = [np.arange(self._starts[i] + UNKNOWN, self._starts[i + 1]) for i in discrete]
        self._present_at = np.concatenate(present)
        self._days: dict[int, NDArray[np.int64]] = {}
        self._hours: dict[int, NDArray[np.int64]] = {}

    def observe(self, time: NDArray[np.int64], codes: NDArray[np.int32], p_value: NDArray[np.float64]) -> None:
        """Add n events. time: int64 [n], ms, NO_TIME counts as the newest hour; codes: int32 [n, fields]; p_value:
        float64 [n]."""
        hours = np.where(time == NO_TIME, max(self._hours, default=0), time // HOUR_MS)
        for hour in np.unique(hours).tolist():
            rows = hours == hour
            counts = profile(self._schema, codes[rows])
            under = [int((p_value[rows] <= level).sum()) for level in LEVELS]
            unseen = int((codes[rows, 0] == UNKNOWN).sum())
            small = np.array([int(rows.sum()), *self._values(counts), unseen, *under])
            self._hours[hour] = self._hours.get(hour, 0) + small
            self._days[hour // HOURS] = self._days.get(hour // HOURS, 0) + counts
        newest = max(self._hours, default=0)
        self._hours = {hour: kept for hour, kept in self._hours.items() if hour > newest - HOURS}
        self._days = {day: kept for day, kept in self._days.items() if day > newest // HOURS - DAYS}

    def health(self) -> Health:
        """The state as of the last event time."""
        hours = list(self._hours.values())  # Another thread reads this for metrics.
        events, present, unseen, types, *under = np.sum(hours, axis=0).tolist() if hours else [0] * (4 + len(LEVELS))
        if events < MIN_EVENTS:
            return Health(events, {}, 0.0, 0.0, 0.0, {}, "")
        counts: NDArray[np.int64] = np.sum(list(self._days.values()), axis=0)
        share = {level: n / events for level, n in zip(LEVELS, under, strict=True)}
        psi = {
            f.name: stability(self._reference[start:end], counts[start:end], self._bins[start:end])
            for f, start, end in zip(self._schema.fields, self._starts, self._starts[1:], strict=False)
        }
        present_before, unseen_before = self._values(self._reference)
        unknown, before = unseen / max(present, 1), unseen_before / max(present_before, 1)
        verdict, reasons = _verdict(psi, unknown, before, share, events)
        return Health(events, psi, unknown, before, types / events, share, verdict, reasons)

    def _values(self, counts: NDArray[np.int64]) -> tuple[int, int]:
        """The number of present values, and of unknown ones among them; numbers are never unknown."""
        return int(counts[self._present_at].sum()), int(counts[self._unknown_at].sum())


def stability(reference: NDArray[np.int64], seen: NDArray[np.int64], bins: NDArray[np.int64]) -> float:
    """The population stability index without what chance adds to it (Yurdakul 2018), at least 0. bins: int64, the bin
    of each code."""
    binned = np.array([np.bincount(bins, weights=counts.astype(np.float64)) for counts in (reference, seen)])
    binned = binned[:, binned.sum(0) > 0] + 0.5
    p, q = binned / binned.sum(1, keepdims=True)
    chance = (len(p) - 1) * float((1 / binned.sum(1)).sum())
    return max(0.0, float(np.sum((q - p) * np.log(q / p))) - chance)


def _verdict(
    psi: dict[str, float], unknown: float, before: float, share: dict[float, float], events: int
) -> tuple[str, list[str]]:
    shifted = [name for name, value in sorted(psi.items(), key=lambda each: -each[1]) if value > SHIFTED]
    worst, reasons = HEALTHY, []

    def say(verdict: str, reason: str) -> None:
        nonlocal worst
        reasons.append(reason)
        worst = DISTRUST if DISTRUST in (verdict, worst) else verdict

    if len(shifted) > max(_SEVERAL_FIELDS * len(psi), 2):
        many = len(shifted) > _HALF_OF_FIELDS * len(psi)
        say(DISTRUST if many else REFIT, f"{len(shifted)} of {len(psi)} fields have shifted: {', '.join(shifted[:5])}")
    if unknown > _TWICE * before + _NOTICED_UNKNOWN:
        many = unknown > _FIVE_TIMES * before + _MANY_UNKNOWN
        say(DISTRUST if many else REFIT, f"{unknown:.1%} of the values were never seen in training, there {before:.1%}")
    for level in JUDGED:
        seen = share[level]
        noise = 3 * (level / events) ** 0.5
        ratio = seen / level
        if seen - level > noise and ratio > _TWICE:
            say(DISTRUST if ratio > _FIVE_TIMES else REFIT, f"p-values under {level:g} are {ratio:.1f} times as many")
        elif level - seen > noise and ratio < 1 / _FIVE_TIMES:
            say(REFIT, f"p-values under {level:g} are {ratio:.2f} times as many")
    return worst, reasons


def _starts(schema: Schema) -> NDArray[np.int64]:
    return np.cumsum([0, *(f.size for f in schema.fields)]).astype(np.int64)


def _bins(schema: Schema, starts: NDArray[np.int64], reference: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bin of each code within its field: MISSING, UNKNOWN and each common code have their own, rare codes share
    one."""
    bins = np.empty(len(reference), np.int64)
    for i in range(len(schema.fields)):
        start, end = int(starts[i]), int(starts[i + 1])
        counts = reference[start:end]
        common = counts >= RARE * max(int(counts.sum()), 1)
        common[[MISSING, UNKNOWN]] = True
        bins[start:end] = np.where(common, np.cumsum(common) - 1, int(common.sum()))
    return bins


assert FIRST == UNKNOWN + 1 == MISSING + 2  # The slices above rely on this.
