"""Scores and alerts of files, without servers: the service's detector with windows in this process.

Promises what the service would publish of the same events. It holds the scores of all events in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from state.episodes import CREATE
from state.memory.episodes import MemoryEpisodes
from state.memory.windows import MemoryWindows
from streamer.alerting.file_thresholds import daily_threshold
from streamer.alerting.pipeline import AlertPipeline
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector
from streamer.detection.isolation import EventIsolation
from streamer.detection.score_files import ScoredFile, score_files
from streamer.event_files import batches
from streamer.explain.attribution import Explainer
from streamer.offline.evaluation import Detected
from streamer.redaction import Redactor
from streamer.training.fit import fit
from streamer.training.history import StageProgress


def write_alerts(
    paths: Sequence[Path],
    bundle: Bundle,
    scores: ScoredFile,
    thresholds: NDArray[np.float64],
    out: Path,
    progress: Callable[[int], None] = lambda _: None,
    redact: Collection[str] = (),
) -> int:
    """Write what the service would publish of these files, one finding a line; returns the number of alerts (Creates).
    It reads the files again, because explanations need the window at each event. At the end all episodes are closed.
    scores: of these files; thresholds: float64 [n], of each event; progress: called with the number of events done;
    redact: attributes whose values are masked."""
    windows = MemoryWindows(dim=bundle.dim)
    detector = Detector(bundle, windows)
    detector.live.moves = True
    isolation = EventIsolation()
    findings = AlertPipeline(
        Explainer(bundle, windows), MemoryEpisodes(), bundle_version=bundle.version, redactor=Redactor(redact)
    )
    creates = done = 0
    ends: dict[str, int] = {}
    with out.open("wb") as file:
        for batch in batches(paths):
            seen = isolation.score(detector, batch)
            detector.take(seen)
            here = slice(done, done + len(seen))
            scored = _as_scored(seen, scores, here, thresholds)
            alerts = findings.alerts(scored, np.flatnonzero(scores.p_value[here] <= thresholds[here]))
            file.writelines(alert.value + b"\n" for alert in alerts)
            creates += sum(alert.activity == CREATE for alert in alerts)
            ends[batch[0].topic] = batch[-1].offset + 1
            windows.committed({(batch[0].topic, 0): batch[-1].offset + 1})
            done += len(scored)
            progress(done)
        for topic, end in ends.items():
            file.writelines(alert.value + b"\n" for alert in findings.finish((topic, 0), end, float(thresholds[-1])))
    return creates


def _as_scored(batch: ScoredBatch, scores: ScoredFile, here: slice, thresholds: NDArray[np.float64]) -> ScoredBatch:
    """The batch with the scores of its file, which include inactivity that is known only at the end of the file."""
    level = np.where(scores.cause[here] == batch.cause, 0 if batch.level is None else batch.level, 0).astype(np.uint8)
    return replace(
        batch,
        p_value=scores.p_value[here],
        severity=scores.severity[here],
        entity=scores.entity[here],
        cause=scores.cause[here],
        threshold=thresholds[here],
        level=level,
    )


def write_scores(scored: ScoredFile, threshold: float | NDArray[np.float64], out: Path) -> int:
    """Write one JSON line for each event; returns the number of alerts. threshold: the p-value at or under which an
    event is an alert, one for all or float64 [n]."""
    alerts = scored.p_value <= threshold
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
    train: Sequence[Path], test: Sequence[Path], bundle: Path, *, seed: int, progress: StageProgress | None = None
) -> Detected:
    """Fit on one set of files and score another, for the evaluation."""
    started = time.perf_counter()
    fitted = fit(train, bundle, seed=seed, progress=progress)
    scored = score_files(test, fitted.bundle)
    thresholds = {budget: daily_threshold(budget, len(scored)) for budget in (20, 100)}
    p_value = dict(zip(scored.uids, scored.p_value.tolist(), strict=True))
    return Detected(p_value, thresholds, time.perf_counter() - started)
