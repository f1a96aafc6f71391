"""The contents of a report: figures and episodes from findings, scores and an evaluation.

Promises that all of it comes from the given material, and that memory is bounded by the number of episodes and of
p-values. It does not lay the page out: `streamer.report.page` does.
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

from encoder.ocsf.event_time import common_range
from state.episodes import CREATE
from streamer.alerting.alert_reader import AlertEpisode, Finding, group_episodes, integer, own, parse
from streamer.errors import ConfigurationError

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
YEAR_MS = 366 * DAY_MS
TOP = 20
DECADES = 12
PARTS = 24
"""Parts into which the scores are split, in their order, to show drift."""
LEVELS = (0.1, 0.01, 0.001)
MAX_BARS = 72


@dataclass(frozen=True)
class Scores:
    """Statistics of n p-values. decades: how many lie in (10^-(i+1), 10^-i]; the last also counts smaller ones. levels:
    (level, share at or under it). parts: the share at or under 0.01 in each of PARTS parts, in their order. alerts:
    events at or under the threshold, where the scores say so."""

    n: int
    decades: tuple[int, ...]
    levels: tuple[tuple[float, float], ...]
    parts: tuple[float, ...]
    alerts: int | None = None


@dataclass(frozen=True)
class Days:
    """Creates by day (UTC midnight, ms), the alerts a day that the budget promises, and the lowest and highest
    threshold that the alerts name."""

    spent: tuple[tuple[int, int], ...]
    promised: float | None
    threshold: tuple[float, float] | None


@dataclass(frozen=True)
class Report:
    """A report. bars: (start ms, alerts by severity level 1 to 5) of equal spans; causes: the most frequent ones; top:
    the episodes of highest risk; drift, repairs: what the running service says of them, parts joined by "; ". The page
    omits what is None or empty."""

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
    repairs: str = ""


@dataclass
class Material:
    """The material of a report, from files, topics and the service."""

    findings: list[Finding] = field(default_factory=list)
    p_values: list[float] = field(default_factory=list)
    scored_alerts: int | None = None
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    drift: str = ""
    repairs: str = ""

    def add_file(self, path: Path) -> None:
        """Add an evaluation (JSON), scores or findings (JSON lines). Raises ConfigurationError for anything else."""
        try:
            whole = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        self.sources.append(path.name)
        if _is_evaluation(evaluation := _json(whole)):
            self.evaluation |= evaluation
            return
        before = len(self.findings) + len(self.p_values)
        for line in whole.splitlines():
            self.add_line(line)
        if len(self.findings) + len(self.p_values) == before and whole.strip():
            raise ConfigurationError(
                f"{path} holds neither an evaluation (evaluate --json), nor scores or findings (score, replay)"
            )

    def add_line(self, line: bytes) -> None:
        """Add a finding or a score."""
        if (finding := parse(line)) is not None:
            self.findings.append(finding)
            return
        score = _json(line)
        if isinstance(score, dict) and isinstance(score.get("p_value"), int | float):
            self.p_values.append(float(score["p_value"]))
            if "alert" in score:
                self.scored_alerts = (self.scored_alerts or 0) + bool(score["alert"])


def report(material: Material, *, title: str, made_ms: int, promised: float | None = None) -> Report:
    """The report of this material. promised: the alert budget per day, None where it is not known."""
    episodes = list(group_episodes(material.findings).values())
    creates = [finding for finding in material.findings if finding.get("activity_id") == CREATE]
    return Report(
        title,
        made_ms,
        tuple(material.sources),
        _counts(episodes, creates, material),
        _days(material.findings, creates, promised) if creates else None,
        _scores(np.array(material.p_values), material.scored_alerts) if material.p_values else None,
        material.evaluation,
        _bars(creates),
        tuple(Counter(str(own(finding).get("cause")) for finding in creates).most_common(8)),
        tuple(sorted(episodes, key=_rank)[:TOP]),
        material.drift,
        material.repairs,
    )


def _rank(episode: AlertEpisode) -> tuple[int, int, str]:
    last = episode.last
    return -integer(last.get("risk_score")), -integer(last.get("count")), episode.uid


def _counts(
    episodes: Sequence[AlertEpisode], creates: Sequence[Finding], material: Material
) -> tuple[tuple[str, str], ...]:
    figures = []
    if material.findings:
        events = sum(max(integer(finding.get("count")) for finding in episode.findings) for episode in episodes)
        severe = sum(integer(episode.last.get("severity_id")) >= 4 for episode in episodes)
        judged = sum(bool(episode.verdict) for episode in episodes)
        figures += [("alerts", f"{len(creates):,}"), ("of severity High and above", f"{severe:,}")]
        figures += [("events in them", f"{events:,}"), ("with a verdict", f"{judged:,}")]
    if material.p_values:
        figures.append(("events scored", f"{len(material.p_values):,}"))
    if material.scored_alerts is not None:
        figures.append(("events at or under the threshold", f"{material.scored_alerts:,}"))
    return tuple(figures)


def _days(findings: Iterable[Finding], creates: Sequence[Finding], promised: float | None) -> Days:
    spent = Counter(_first_seen(finding) // DAY_MS * DAY_MS for finding in creates)
    thresholds = [threshold for finding in findings if isinstance(threshold := own(finding).get("line"), float)]
    return Days(tuple(sorted(spent.items())), promised, (min(thresholds), max(thresholds)) if thresholds else None)


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
    """Alerts over time, by severity, in spans of an hour, or longer ones where there would be more than MAX_BARS."""
    times = [_first_seen(finding) for finding in creates]
    if not times:
        return ()
    if max(times) - min(times) > YEAR_MS and (common := common_range(np.array(times))) is not None:
        times = [min(max(at, common[0]), common[1]) for at in times]  # A clock that was reset must not hide the rest.
    span = HOUR_MS
    while (max(times) - min(times)) // span >= MAX_BARS:
        span *= 2
    first = min(times) // span
    bars = [[0] * 5 for _ in range(max(times) // span - first + 1)]
    for at, finding in zip(times, creates, strict=True):
        bars[at // span - first][min(max(integer(finding.get("severity_id")), 1), 5) - 1] += 1
    return tuple(((first + i) * span, tuple(bar)) for i, bar in enumerate(bars))


def _first_seen(finding: Finding) -> int:
    return integer(finding["finding_info"].get("first_seen_time"))


def _is_evaluation(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(part, dict) and "auroc" in part for part in value.values())
    )


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
