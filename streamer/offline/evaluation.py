"""Evaluates the detector against labels, and beside reference detectors on the same events.

Promises that ties among scores favour no detector: AUROC and average precision count tied events together, and recall
at a number of false alarms is the expectation over all orders of tied events. No other module reads labels.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table as RichTable
from sklearn.metrics import average_precision_score, roc_auc_score

from encoder.ocsf.decoder import decode
from streamer.errors import RipcurrentError
from streamer.event_files import Unread, batches, event_uid
from streamer.offline import reference_detectors as references

FALSE_ALARMS = 20


class EvaluationError(RipcurrentError):
    """Events and labels that do not belong together."""


@dataclass(frozen=True)
class Labels:
    """The labels of n test events. label: int8 [n], 1 for an anomaly; sequence: n names, "" for none."""

    label: NDArray[np.int8]
    sequence: list[str]


@dataclass(frozen=True)
class Detected:
    """The results of the detector. p_value: by event uid (`event_uid`; 1.0 for events that are not in it); thresholds:
    alerts a day -> the p-value at or under which it would alert; seconds: the time of fitting and scoring."""

    p_value: Mapping[str, float]
    thresholds: Mapping[int, float]
    seconds: float


Detect = Callable[[Sequence[Path], Sequence[Path]], Detected]


def read_events(paths: Sequence[Path], unread: Unread | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(uid, event) of every event that the detector reads in these files; `unread` counts the rest."""
    unread = unread if unread is not None else Unread()
    for batch in batches(paths, lost=unread.in_file):
        events, rejects = decode(batch)
        for reject in rejects:
            unread.in_file(batch[0].topic, batch[reject.message].offset, reject)
        for record, index in zip(events.records, events.coordinates.offset.tolist(), strict=True):
            yield event_uid(record, index + 1), record


def read_labels(path: Path, uids: Sequence[str]) -> Labels:
    """The labels (columns uid, label, optionally sequence) of the events in the order of `uids`."""
    with path.open(newline="") as file:
        rows = {row["uid"]: row for row in csv.DictReader(file)}
    unknown = [uid for uid in uids if uid not in rows]
    if unknown:
        raise EvaluationError(
            f"{path}: {len(unknown)} of {len(uids)} test events have no label, {unknown[0]!r} the first: "
            "labels and test file must belong together (column `uid` = metadata.uid)"
        )
    return Labels(
        np.array([int(rows[uid]["label"]) for uid in uids], np.int8), [rows[uid].get("sequence") or "" for uid in uids]
    )


def recall_at(label: NDArray[np.int8], score: NDArray[np.float64], false_alarms: int = FALSE_ALARMS) -> float:
    """Share of the positives met, from the highest score down, before false alarm number `false_alarms` + 1.

    Among p positives and n negatives of one score, of which r negatives may still be met, a positive stands before
    negative r + 1 with probability (r + 1) / (n + 1) when their order is random: that expectation is what counts.
    """
    values, group = np.unique(-score, return_inverse=True)
    positives = np.bincount(group, weights=label, minlength=len(values))
    negatives = np.bincount(group, weights=1 - label, minlength=len(values))
    remaining = false_alarms - (np.cumsum(negatives) - negatives)
    share = np.clip((remaining + 1) / (negatives + 1), 0.0, 1.0)
    return float((positives * share).sum() / max(1, int(label.sum())))


def metrics(label: NDArray[np.int8], score: NDArray[np.float64]) -> dict[str, float | None]:
    """`auroc`, `ap`, `recall_at_20fp` of scores [n], higher meaning less normal; None where all labels are equal.

    Raises ValueError where a score is not finite.
    """
    if not np.isfinite(score).all():
        raise ValueError(f"{(~np.isfinite(score)).sum()} of {len(score)} scores are not finite")
    if not 0 < label.sum() < len(label):
        return {"auroc": None, "ap": None, "recall_at_20fp": None}
    return {
        "auroc": float(roc_auc_score(label, score)),
        "ap": float(average_precision_score(label, score)),
        "recall_at_20fp": recall_at(label, score),
    }


def by_sequence(labels: Labels, score: NDArray[np.float64]) -> dict[str, float | None] | None:
    """`metrics` over sequences, each the maximum over its events; None unless there are sequences of both kinds."""
    best: dict[str, tuple[int, float]] = {}
    for name, label, value in zip(labels.sequence, labels.label.tolist(), score.tolist(), strict=True):
        if name:
            was = best.get(name, (0, -np.inf))
            best[name] = (max(was[0], label), max(was[1], value))
    kinds = np.array([kind for kind, _ in best.values()], np.int8)
    if not 0 < kinds.sum() < len(kinds):
        return None
    return metrics(kinds, np.array([value for _, value in best.values()]))


def at_budget(label: NDArray[np.int8], alert: NDArray[np.bool_]) -> dict[str, Any]:
    """The use of a budget: `alerts`, `false_alarms`, and `recall`, the share of the positives with an alert."""
    hits = int((alert & (label == 1)).sum())
    alerts, positives = int(alert.sum()), int(label.sum())
    return {"alerts": alerts, "false_alarms": alerts - hits, "recall": hits / positives if positives else None}


def _result(labels: Labels, score: NDArray[np.float64], seconds: float) -> dict[str, Any]:
    result: dict[str, Any] = {**metrics(labels.label, score), "seconds": round(seconds, 1)}
    sequences = by_sequence(labels, score)
    if sequences is not None:
        result["by_sequence"] = sequences
    return result


def evaluate(
    train_paths: Sequence[Path],
    test_paths: Sequence[Path],
    labels_path: Path,
    *,
    seed: int = 0,
    detect: Detect | None = None,
    say: Callable[[str], None] = lambda _: None,
    unread: Unread | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the detector and every reference detector on the same files; returns name -> figures, ready for JSON.

    The detector is named `ripcurrent` and has, beside `auroc`, `ap`, `recall_at_20fp`, `seconds` and (where there are
    sequences of both kinds) `by_sequence`, a `budget`: alerts a day -> `at_budget`, a test file counting as one day.
    `detect` is called with the paths of train and test before labels are read. Reference detectors that cannot run are
    skipped, and `say` is called with the reason. `unread` counts what could not be read. Raises `EvaluationError` where
    labels and test events do not belong together.
    """
    results: dict[str, dict[str, Any]] = {}
    detected = detect(train_paths, test_paths) if detect is not None else None
    named = list(read_events(test_paths, unread))
    uids, test = [uid for uid, _ in named], [record for _, record in named]
    labels = read_labels(labels_path, uids)
    if detected is not None:
        p_value = np.array([detected.p_value.get(uid, 1.0) for uid in uids], np.float64)
        result = _result(labels, -np.log(np.maximum(p_value, np.finfo(np.float64).tiny)), detected.seconds)
        result["budget"] = {
            str(n): at_budget(labels.label, p_value <= threshold) for n, threshold in detected.thresholds.items()
        }
        results["ripcurrent"] = result
    train = [record for _, record in read_events(train_paths, unread)]
    if not train or not test:
        raise EvaluationError(f"no events in {', '.join(map(str, train_paths if not train else test_paths))}")
    say("turning events into a table for the reference detectors")
    table = references.tabulate(train, test)
    runs: list[tuple[str, Callable[[], NDArray[np.float64]]]] = [
        *((name, partial(reference, table, seed)) for name, reference in references.ON_TABLE.items()),
        *((name, partial(reference, train, test)) for name, reference in references.ON_EVENTS.items()),
    ]
    for name, run in runs:
        say(f"measuring {name.replace('_', ' ')}")
        started = time.perf_counter()
        try:
            score = run()
        except references.ReferenceUnavailableError as reason:
            say(f"{name.replace('_', ' ')} left out: {reason}")
            continue
        results[name] = _result(labels, score, time.perf_counter() - started)
    return results


def results_table(results: Mapping[str, Mapping[str, Any]], title: str = "") -> RichTable:
    """The results as a table; the best of each column is bold."""
    sequences = any("by_sequence" in result for result in results.values())
    budgets = sorted({int(n) for result in results.values() for n in result.get("budget", ())})
    kinds = ["", "by_sequence"] if sequences else [""]
    names = ("auroc", "ap", "recall_at_20fp")
    table = RichTable(title=title or None, caption="20 FA: share of the anomalies found before the 20th false alarm")
    table.add_column("detector")
    for kind in kinds:
        for name in ("AUROC", "AP", "20 FA"):
            table.add_column(f"{name}\n{'by sequence' if kind else 'by event'}" if sequences else name, justify="right")
    for n in budgets:
        table.add_column(f"{n} a day:\nfalse / alerts, recall", justify="right")
    table.add_column("time", justify="right")

    def figure(result: Mapping[str, Any], kind: str, name: str) -> float | None:
        value = (result.get(kind, {}) if kind else result).get(name)
        return None if value is None else float(value)

    best = {
        (kind, name): max((v for r in results.values() if (v := figure(r, kind, name)) is not None), default=None)
        for kind in kinds
        for name in names
    }
    for detector, result in results.items():
        cells = []
        for kind in kinds:
            for name in names:
                value = figure(result, kind, name)
                text = "-" if value is None else f"{value:.3f}"
                cells.append(f"[bold]{text}[/bold]" if value is not None and value == best[kind, name] else text)
        for n in budgets:
            spent = result.get("budget", {}).get(str(n))
            recall = "" if spent is None or spent["recall"] is None else f", {spent['recall']:.3f}"
            cells.append("" if spent is None else f"{spent['false_alarms']} / {spent['alerts']}{recall}")
        table.add_row(detector.replace("_", " "), *cells, f"{result.get('seconds', 0):.0f} s")
    return table
