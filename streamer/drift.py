"""Drift: whether the traffic of the last day still is what the bundle was fitted on, as numbers and as one verdict.

Three signs, none of which needs labels: the population stability index of each field (Siddiqi 2006, Credit Risk
Scorecards, with the usual 0.25 for "has shifted") on the codes of the schema, how many values training did not have,
and whether p-values are as rare as they say. Promises bounded memory. Does not say what changed in the world, and says
nothing before MIN_EVENTS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily

from encoder.schema import FIRST, MISSING, UNKNOWN, Schema

HOUR_MS = 3_600_000
HOURS = 24
"""What is compared is a day: an hour of the night never looks like a week."""
MIN_EVENTS = 1000
SHIFTED = 0.25
RARE = 0.005
"""Codes that are a smaller share of training are compared as one."""
LEVELS = (0.1, 0.01, 0.001)
HEALTHY, REFIT, DISTRUST = "healthy", "refit soon", "do not trust"
_SEVERAL_FIELDS, _HALF_OF_FIELDS = 0.1, 0.5
_TWICE, _FIVE_TIMES = 2.0, 5.0
_NOTICED_UNKNOWN, _MANY_UNKNOWN = 0.01, 0.05


@dataclass(frozen=True)
class Health:
    """events: seen in the day; psi: by field; unknown and unknown_in_training: share of the values that are present;
    share: of p-values at or under each of LEVELS; verdict: one of three, or "" before MIN_EVENTS; reasons: why."""

    events: int
    psi: dict[str, float]
    unknown: float
    unknown_in_training: float
    share: dict[float, float]
    verdict: str
    reasons: list[str] = field(default_factory=list)


def profile(schema: Schema, codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each code of each field is met: int32 [n, fields] to int64 [sum of the fields' sizes]."""
    starts = _starts(schema)
    flat = codes.astype(np.int64) + starts[:-1]
    return np.bincount(flat.ravel(), minlength=int(starts[-1])).astype(np.int64)


class Drift:
    """Watches what a detector sees.

    reference: `profile` of the training events.
    """

    def __init__(self, schema: Schema, reference: NDArray[np.int64]) -> None:
        self._schema = schema
        self._starts = _starts(schema)
        self._reference = reference
        self._hours: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._bins = _bins(schema, self._starts, reference)

    def observe(self, time: NDArray[np.int64], codes: NDArray[np.int32], p_value: NDArray[np.float64]) -> None:
        """Take note of n events: int64 [n], ms; int32 [n, fields]; float64 [n]."""
        hours = time // HOUR_MS
        for hour in np.unique(hours).tolist():
            rows = hours == hour
            counts = profile(self._schema, codes[rows])
            under = [int(rows.sum()), *(int((p_value[rows] <= level).sum()) for level in LEVELS)]
            before = self._hours.get(hour)
            self._hours[hour] = (
                counts if before is None else before[0] + counts,
                np.array(under) if before is None else before[1] + np.array(under),
            )
        newest = max(self._hours, default=0)
        for hour in [hour for hour in self._hours if hour <= newest - HOURS]:
            del self._hours[hour]

    def health(self) -> Health:
        """As of the last day."""
        seen = list(self._hours.values())
        events = int(sum(under[0] for _, under in seen))
        if events < MIN_EVENTS:
            return Health(events, {}, 0.0, 0.0, {}, "")
        counts: NDArray[np.int64] = np.sum([each for each, _ in seen], axis=0)
        under: NDArray[np.int64] = np.sum([each for _, each in seen], axis=0)
        share = {level: float(n) / events for level, n in zip(LEVELS, under[1:].tolist(), strict=True)}
        psi = {
            f.name: stability(self._reference[start:end], counts[start:end], self._bins[start:end])
            for f, start, end in zip(self._schema.fields, self._starts, self._starts[1:], strict=False)
        }
        unknown, before = self._unknown(counts), self._unknown(self._reference)
        return Health(events, psi, unknown, before, share, *_verdict(psi, unknown, before, share, events))

    def _unknown(self, counts: NDArray[np.int64]) -> float:
        columns = [i for i, f in enumerate(self._schema.fields) if f.kind != "number"]
        present = sum(int(counts[self._starts[i] + UNKNOWN : self._starts[i + 1]].sum()) for i in columns)
        return float(sum(int(counts[self._starts[i] + UNKNOWN]) for i in columns)) / max(present, 1)


def stability(reference: NDArray[np.int64], seen: NDArray[np.int64], bins: NDArray[np.int64]) -> float:
    """The population stability index, less what chance gives it (Yurdakul 2018): never under 0. bins: which bin each
    code is counted in."""
    before, now = (np.bincount(bins, weights=counts.astype(np.float64)) for counts in (reference, seen))
    used = (before + now) > 0
    before, now = before[used] + 0.5, now[used] + 0.5
    p, q = before / before.sum(), now / now.sum()
    chance = (len(p) - 1) * float(1 / before.sum() + 1 / now.sum())
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
    for level, found in share.items():
        noise = 3 * (level / events) ** 0.5
        ratio = found / level
        if found - level > noise and ratio > _TWICE:
            say(DISTRUST if ratio > _FIVE_TIMES else REFIT, f"p-values under {level:g} are {ratio:.1f} times as many")
        elif level - found > noise and ratio < 1 / _FIVE_TIMES:
            say(REFIT, f"p-values under {level:g} are {ratio:.2f} times as many")
    return worst, reasons


def _starts(schema: Schema) -> NDArray[np.int64]:
    return np.cumsum([0, *(f.size for f in schema.fields)]).astype(np.int64)


def _bins(schema: Schema, starts: NDArray[np.int64], reference: NDArray[np.int64]) -> NDArray[np.int64]:
    """Within each field: MISSING, UNKNOWN and every common code by itself, the rare ones together."""
    bins = np.empty(len(reference), np.int64)
    for i in range(len(schema.fields)):
        start, end = int(starts[i]), int(starts[i + 1])
        counts = reference[start:end]
        common = counts >= RARE * max(int(counts.sum()), 1)
        common[[MISSING, UNKNOWN]] = True
        bins[start:end] = np.where(common, np.cumsum(common) - 1, int(common.sum()))
    return bins


class DriftCollector:
    """The drift of whichever detector serves, worked out when Prometheus asks. watched: gives its `Drift`."""

    def __init__(self, watched: Any) -> None:
        self._watched = watched

    def collect(self) -> Iterator[GaugeMetricFamily]:
        health: Health = self._watched().health()
        yield _family("drift_events", "Events of the day of event time that drift is judged by", [((), health.events)])
        psi = [((name,), value) for name, value in health.psi.items()]
        yield _family("drift_psi", "Population stability index of a field, live against training", psi, "field")
        unknown = [(("live",), health.unknown), (("training",), health.unknown_in_training)] if health.verdict else []
        yield _family("drift_unknown_share", "Share of values that training did not have", unknown, "where")
        ratios = [((f"{level:g}",), share / level) for level, share in health.share.items()]
        yield _family("drift_p_value_ratio", "P-values at or under a level, over how many should be", ratios, "level")
        verdicts = [((name,), float(name == health.verdict)) for name in (HEALTHY, REFIT, DISTRUST)]
        yield _family("drift_verdict", "1 for the verdict; none before enough events", verdicts, "verdict")


def _family(name: str, text: str, values: Sequence[tuple[tuple[str, ...], float]], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"ripcurrent_{name}", text, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


assert FIRST == UNKNOWN + 1 == MISSING + 2  # What the slices above stand on.
