"""Scoring without servers: files in, one line an event out, windows in this process; by the service's own detector."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.ocsf.decoder import Reject
from state.episode_rules import MemoryEpisodes
from state.episodes import CREATE
from state.errors import Source
from state.timers import MemoryTimers
from state.windows import MemoryWindows
from streamer.alerting.pipeline import Findings
from streamer.alerting.threshold import Budget
from streamer.bundles.bundle_files import Bundle
from streamer.detection.combine import severity
from streamer.detection.detector import Detector, ScoredBatch
from streamer.event_files import batches
from streamer.offline.evaluation import Detected, event_uid
from streamer.training.fit import DAY_MS, Progress, fit


@dataclass(frozen=True)
class ScoredFile:
    """n scored events of files, in their order: uids (`metadata.uid`, else the line); time: int64 [n], ms; p_value:
    float64 [n]; severity: float32 [n]; entity and cause: object [n]; rejects: what could not be read, with the line of
    each."""

    uids: list[str]
    time: NDArray[np.int64]
    p_value: NDArray[np.float64]
    severity: NDArray[np.float32]
    entity: NDArray[np.object_]
    cause: NDArray[np.object_]
    rejects: list[tuple[int, Reject]]

    def __len__(self) -> int:
        return len(self.uids)


def score_files(paths: Sequence[Path], bundle: Bundle, progress: Callable[[int], None] = lambda _: None) -> ScoredFile:
    """Score the events of files. At the end all who are waited for count as silent, and an entity's silence stands in
    the place of its last event where it is the odder of the two. `progress` hears how many are done."""
    windows = MemoryWindows(dim=bundle.dim)
    timers = MemoryTimers(keeps_events=False)
    detector = Detector(bundle, windows, timers=timers)
    silences: list[ScoredBatch] = []
    uids: list[str] = []
    parts: list[ScoredBatch] = []
    rejects: list[tuple[int, Reject]] = []
    for batch in batches(paths):
        scored = detector.score(batch)
        offsets = scored.coordinates.offset.tolist()
        uids.extend(event_uid(record, line + 1) for record, line in zip(scored.records, offsets, strict=True))
        rejects.extend((batch[reject.message].offset + 1, reject) for reject in scored.rejects)
        for store in (windows, timers):
            store.committed({(batch[0].topic, 0): batch[-1].offset + 1})
        if scored.silences is not None:
            silences.append(scored.silences)
        scored.records.clear()
        parts.append(scored)
        progress(len(uids))
    time = np.concatenate([np.empty(0, np.int64), *(part.time for part in parts)])
    empty = np.empty(0, object)
    p_value = np.concatenate([np.empty(0), *(part.p_value for part in parts)])
    entity = np.concatenate([empty, *(part.entity for part in parts)])
    cause = np.concatenate([empty, *(part.cause for part in parts)])
    if (left := detector.finish()) is not None:
        silences.append(left)
    places: dict[tuple[Source, int, int], int] = {}
    if silences:
        places = {
            coordinates: place for place, coordinates in enumerate(at for part in parts for at in _coordinates(part))
        }
    for silent in silences:
        for row, coordinates in enumerate(_coordinates(silent)):
            place = places[coordinates]
            if silent.p_value[row] < p_value[place]:
                p_value[place], entity[place], cause[place] = silent.p_value[row], silent.entity[row], silent.cause[row]
    return ScoredFile(uids, time, p_value, severity(p_value), entity, cause, rejects)


def _coordinates(scored: ScoredBatch) -> Iterator[tuple[tuple[str, int], int, int]]:
    at = scored.coordinates
    sources = (at.sources[source] for source in at.source.tolist())
    return zip(sources, at.offset.tolist(), at.index.tolist(), strict=True)


def write_alerts(
    paths: Sequence[Path],
    bundle: Bundle,
    scores: ScoredFile,
    lines: NDArray[np.float64],
    out: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write what the service would publish of these files, a finding a line; returns how many alerts (Creates). It
    reads them again, because what comes before an event must be at hand to explain it; and at the end all episodes
    are over. scores: of these files; lines: of each event, float64 [n]; `progress` hears how many events are done."""
    windows = MemoryWindows(dim=bundle.dim)
    detector = Detector(bundle, windows)
    findings = Findings(detector, MemoryEpisodes(), bundle_version=bundle.version)
    creates = done = 0
    ends: dict[str, int] = {}
    with out.open("wb") as file:
        for batch in batches(paths):
            seen = detector.score(batch)
            here = slice(done, done + len(seen))
            scored = _as_scored(seen, scores, here, lines)
            alerts = findings.alerts(scored, np.flatnonzero(scores.p_value[here] <= lines[here]))
            file.writelines(alert.value + b"\n" for alert in alerts)
            creates += sum(alert.activity == CREATE for alert in alerts)
            ends[batch[0].topic] = batch[-1].offset + 1
            windows.committed({(batch[0].topic, 0): batch[-1].offset + 1})
            done += len(scored)
            progress(done)
        for topic, end in ends.items():
            file.writelines(alert.value + b"\n" for alert in findings.finish((topic, 0), end, float(lines[-1])))
    return creates


def _as_scored(batch: ScoredBatch, scores: ScoredFile, here: slice, lines: NDArray[np.float64]) -> ScoredBatch:
    """The batch with the scores of its file: an entity's silence is known only at its end."""
    level = np.where(scores.cause[here] == batch.cause, 0 if batch.level is None else batch.level, 0).astype(np.uint8)
    return replace(
        batch,
        p_value=scores.p_value[here],
        severity=scores.severity[here],
        entity=scores.entity[here],
        cause=scores.cause[here],
        line=lines[here],
        level=level,
    )


def line_of_a_day(alerts_per_day: float, events: int) -> float:
    """The p-value line that spends the budget on a file, which counts as one day."""
    return min(0.5, alerts_per_day / max(events, 1))


def lines_of(scored: ScoredFile, alerts_per_day: float, bundle: Bundle) -> NDArray[np.float64]:
    """The line that each event is held against, float64 [n]: what spans more than a day is judged as the stream would
    be, hour by hour; what does not counts as one day, whose one line needs no hours to be learned from."""
    if not len(scored) or int(np.ptp(scored.time)) <= DAY_MS:
        return np.full(len(scored), line_of_a_day(alerts_per_day, len(scored)))
    budget = Budget(alerts_per_day, float(bundle.manifest["training"]["events_per_day"]))

    def story(row: int) -> str:
        return f"{scored.cause[row]} {scored.entity[row]}" if scored.entity[row] else ""

    return budget.judge(scored.time, scored.p_value, story=story)


def write_scores(scored: ScoredFile, line: float | NDArray[np.float64], out: Path) -> int:
    """Write one JSON line an event; returns how many alerts. line: the p-value at or under which an event is one, for
    all or for each."""
    alerts = scored.p_value <= line
    rows = zip(
        scored.uids,
        scored.p_value.tolist(),
        scored.severity.tolist(),
        alerts.tolist(),
        scored.entity.tolist(),
        scored.cause.tolist(),
        strict=True,
    )
    names = ("uid", "p_value", "severity", "alert", "entity", "cause")
    with out.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(dict(zip(names, row, strict=True)), option=orjson.OPT_APPEND_NEWLINE))
    return int(alerts.sum())


def detect(
    train: Sequence[Path], test: Sequence[Path], bundle: Path, *, seed: int, progress: Progress | None = None
) -> Detected:
    """Fit on one set of files and score another, for the evaluation."""
    started = time.perf_counter()
    fitted = fit(train, bundle, seed=seed, progress=progress)
    scored = score_files(test, fitted.bundle)
    lines = {budget: line_of_a_day(budget, len(scored)) for budget in (20, 100)}
    p_value = dict(zip(scored.uids, scored.p_value.tolist(), strict=True))
    return Detected(p_value, lines, time.perf_counter() - started)
