"""What a report says: figures and stories from findings, scores and an evaluation, ready to be laid out.

Promises that everything shown comes from what it was given, and that memory is bounded by the number of stories and of
p-values. Lays nothing out: `streamer.report.page` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from state.episodes import CREATE
from streamer.alerting.alert_reader import AlertEpisode, Finding, group_episodes, own, parse
from streamer.errors import ConfigurationError

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
TOP = 20
DECADES = 12
PARTS = 24
"""Pieces into which the scores are cut, in their order, to see whether they drift."""
LEVELS = (0.1, 0.01, 0.001)
MAX_BARS = 72


@dataclass(frozen=True)
class Scores:
    """What n p-values say. decades: how many lie in (10^-(i+1), 10^-i], the last also below; levels: of each level the
    share at or under it; parts: the share at or under 0.01 of each of PARTS pieces in their order."""

    n: int
    decades: tuple[int, ...]
    levels: tuple[tuple[float, float], ...]
    parts: tuple[float, ...]
    alerts: int | None = None


@dataclass(frozen=True)
class Days:
    """Creates by day (UTC midnight, ms) against what the budget promises a day; line: the lowest and highest that the
    alerts crossed."""

    spent: tuple[tuple[int, int], ...]
    promised: float | None
    line: tuple[float, float] | None


@dataclass(frozen=True)
class Report:
    """All of it. bars: (start ms, alerts by severity level 1 to 5) of equal spans; causes: the most frequent;
    drift: what the service that runs says of it, in parts joined by "; "; what is None or empty is left out."""

    title: str
    made_ms: int
    sources: tuple[str, ...]
    counts: tuple[tuple[str, str], ...] = ()
    days: Days | None = None
    scores: Scores | None = None
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bars: tuple[tuple[int, tuple[int, ...]], ...] = ()
    causes: tuple[tuple[str, int], ...] = ()
    top: tuple[AlertEpisode, ...] = ()
    drift: str = ""


@dataclass
class Material:
    """What a report is made of, gathered from files, topics and the service."""

    findings: list[Finding] = field(default_factory=list)
    p_values: list[float] = field(default_factory=list)
    scored_alerts: int | None = None
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    drift: str = ""

    def add_file(self, path: Path) -> None:
        """Take an evaluation (JSON), scores or findings (JSON lines). Raises ConfigurationError for anything else."""
        try:
            whole = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        self.sources.append(path.name)
        if _is_evaluation(found := _json(whole)):
            self.evaluation |= found
            return
        before = len(self.findings) + len(self.p_values)
        for line in whole.splitlines():
            self.add_line(line)
        if len(self.findings) + len(self.p_values) == before and whole.strip():
            raise ConfigurationError(
                f"{path} holds neither an evaluation (evaluate --json), nor scores or findings (score, replay)"
            )

    def add_line(self, line: bytes) -> None:
        """Take a finding or a score."""
        if (finding := parse(line)) is not None:
            self.findings.append(finding)
            return
        found = _json(line)
        if isinstance(found, dict) and isinstance(found.get("p_value"), int | float):
            self.p_values.append(float(found["p_value"]))
            if "alert" in found:
                self.scored_alerts = (self.scored_alerts or 0) + bool(found["alert"])


def report(material: Material, *, title: str, made_ms: int, promised: float | None = None) -> Report:
    """The report of this material. promised: alerts a day of the budget, where it is known."""
    told = list(group_episodes(material.findings).values())
    creates = [finding for finding in material.findings if finding.get("activity_id") == CREATE]
    return Report(
        title,
        made_ms,
        tuple(material.sources),
        _counts(told, creates, material),
        _days(material.findings, creates, promised) if creates else None,
        _scores(np.array(material.p_values), material.scored_alerts) if material.p_values else None,
        material.evaluation,
        _bars(creates),
        tuple(Counter(str(own(finding).get("cause")) for finding in creates).most_common(8)),
        tuple(sorted(told, key=_rank)[:TOP]),
        material.drift,
    )


def _rank(story: AlertEpisode) -> tuple[int, int, str]:
    last = story.last
    return -_int(last.get("risk_score")), -_int(last.get("count")), story.uid


def _counts(
    told: Sequence[AlertEpisode], creates: Sequence[Finding], material: Material
) -> tuple[tuple[str, str], ...]:
    found = []
    if material.findings:
        events = sum(max(_int(finding.get("count")) for finding in story.findings) for story in told)
        severe = sum(_int(story.last.get("severity_id")) >= 4 for story in told)
        judged = sum(bool(story.verdict) for story in told)
        found += [("alerts", f"{len(creates):,}"), ("of severity High and above", f"{severe:,}")]
        found += [("events in them", f"{events:,}"), ("with a verdict", f"{judged:,}")]
    if material.p_values:
        found.append(("events scored", f"{len(material.p_values):,}"))
    if material.scored_alerts is not None:
        found.append(("events at or under the line", f"{material.scored_alerts:,}"))
    return tuple(found)


def _days(findings: Iterable[Finding], creates: Sequence[Finding], promised: float | None) -> Days:
    spent = Counter(_first_seen(finding) // DAY_MS * DAY_MS for finding in creates)
    lines = [line for finding in findings if isinstance(line := own(finding).get("line"), float)]
    return Days(tuple(sorted(spent.items())), promised, (min(lines), max(lines)) if lines else None)


def _scores(p_values: NDArray[np.float64], alerts: int | None) -> Scores:
    decade = np.minimum(np.floor(-np.log10(np.clip(p_values, 1e-300, 1.0))), DECADES - 1).astype(int)
    counts = np.bincount(decade, minlength=DECADES)
    parts = np.array_split(p_values, min(PARTS, max(len(p_values) // 500, 1)))
    return Scores(
        len(p_values),
        tuple(counts.tolist()),
        tuple((level, float((p_values <= level).mean())) for level in LEVELS),
        tuple(float((part <= 0.01).mean()) for part in parts),
        alerts,
    )


def _bars(creates: Sequence[Finding]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Alerts over time, by severity: hours, or longer spans where there are too many of them."""
    times = [_first_seen(finding) for finding in creates]
    if not times:
        return ()
    span = HOUR_MS
    while (max(times) - min(times)) // span >= MAX_BARS:
        span *= 2
    first = min(times) // span
    bars = [[0] * 5 for _ in range(max(times) // span - first + 1)]
    for at, finding in zip(times, creates, strict=True):
        bars[at // span - first][min(max(_int(finding.get("severity_id")), 1), 5) - 1] += 1
    return tuple(((first + i) * span, tuple(bar)) for i, bar in enumerate(bars))


def _first_seen(finding: Finding) -> int:
    return _int(finding["finding_info"].get("first_seen_time"))


def _is_evaluation(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(part, dict) and "auroc" in part for part in found.values())
    )


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0
