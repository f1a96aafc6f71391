"""What is found in organisations that are drawn by seed, for docs/detection.md. Not a test, and no gate.

    python tests/measure_organisations.py FOLDER [--seeds 0,1,2]

Writes the stream of each seed to FOLDER, scores its test days with the detector, with its record part alone and with
the reference detectors of `ripcurrent evaluate`, and prints tables. What is in FOLDER already is not made again.

An incident is found at n a day where one of its events scores above all normal events but n for each test day: so all
detectors pay the same false alarms. For the detector as it is served, the thresholds of a file decide instead.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import typer
from evaluate import BUDGETS, Stream, streams_of, test_features
from measure_budget import first_of_episode, scored_once
from numpy.typing import NDArray

from streamer.alerting.file_thresholds import thresholds_of
from streamer.bundles.bundle_files import load
from streamer.devtools.organisations.generator import TEST_DAYS, simulate, write_stream
from streamer.devtools.organisations.incidents import KINDS
from streamer.offline import reference_detectors as references
from streamer.offline.evaluation import metrics, read_events
from streamer.training.fit import fit

Scores = NDArray[np.float64]
WHOLE, RECORD = "ripcurrent", "record part alone"


@dataclass(frozen=True)
class Truth:
    """The labels of n test events in the order of the file: label int8 [n], incident: the id [n], "" for none; kinds:
    by id."""

    label: NDArray[np.int8]
    incident: NDArray[np.str_]
    kinds: dict[str, str]


def truth_of(stream: Stream) -> Truth:
    with stream.labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    incident = np.array([row["sequence"] for row in rows])
    kinds = {row["sequence"]: row["attack"] for row in rows if row["sequence"]}
    return Truth(np.array([int(row["label"]) for row in rows], np.int8), incident, kinds)


def kept(file: Path, make: Callable[[], Scores]) -> Scores:
    """An array of a file, made where the file is not there."""
    if not file.exists():
        print(f"making {file.name}", file=sys.stderr, flush=True)
        np.save(file, make())
    return np.asarray(np.load(file))


def scores_of(stream: Stream, seed: int) -> dict[str, Scores]:
    """Of each detector, float64 [n]; higher is less normal."""
    folder = stream.test.parent
    place = lambda name: folder / f"{stream.name}.{name.replace(' ', '_')}.npy"  # noqa: E731
    bundle = folder / f"{stream.name}.bundle"
    if not bundle.exists():
        print(f"fitting {stream.name}", file=sys.stderr, flush=True)
        fit([stream.train], bundle, seed=seed)
    p_value = scored_once(stream.test, folder / f"{stream.name}.npz", bundle).p_value

    def record_alone() -> Scores:
        opened = load(bundle)
        features, texts, _ = test_features(stream, opened.encoder.schema)
        first, like = features.distinct()
        distinct = features.take(first)
        types, part = distinct.codes[:, 0].astype(np.int64), opened.scorer.record
        parts = part.parts(part.raw(opened.encoder.encode(distinct), types), types)[:, like]
        whole = part.with_text(parts, part.texts.of_texts(texts), types[like])
        return np.asarray(part.evidence(whole, types[like]))

    found = {
        WHOLE: -np.log(np.maximum(p_value, np.finfo(np.float64).tiny)),
        RECORD: kept(place(RECORD), record_alone),
    }
    events: list[list[dict[str, object]]] = []
    table: list[references.Table] = []

    def records() -> list[list[dict[str, object]]]:
        if not events:
            events.extend([record for _, record in read_events([path])] for path in (stream.train, stream.test))
        return events

    def on_table(detector: references.OnTable) -> Scores:
        if not table:
            table.append(references.tabulate(*records()))
        return detector(table[0], seed)

    runs: list[tuple[str, Callable[[], Scores]]] = [
        *((name, partial(on_table, detector)) for name, detector in references.ON_TABLE.items()),
        *((name, lambda detector=detector: detector(*records())) for name, detector in references.ON_EVENTS.items()),
    ]
    for name, run in runs:
        try:
            found[name.replace("_", " ")] = kept(place(name), run)
        except references.ReferenceUnavailableError as reason:
            print(f"{name} left out: {reason}", file=sys.stderr)
    return found


def found_at(truth: Truth, score: Scores, false_alarms: int) -> set[str]:
    """The incidents of which an event scores above all normal events but so many."""
    normal = np.sort(score[truth.label == 0])[::-1]
    above = (score > normal[false_alarms]) & (truth.label == 1)
    return set(truth.incident[above].tolist())


def as_served(stream: Stream, truth: Truth) -> str:
    """Incidents, false alarms and episodes of them at the thresholds of a file, a row a budget."""
    folder = stream.test.parent
    bundle = folder / f"{stream.name}.bundle"
    file, opened = scored_once(stream.test, folder / f"{stream.name}.npz", bundle), load(bundle)
    cells = []
    for budget in BUDGETS:
        alert = file.p_value <= thresholds_of(file, budget, opened)
        incidents = len(set(truth.incident[alert].tolist()) - {""})
        false = alert & (truth.label == 0)
        episodes = int((first_of_episode(file, alert) & false).sum())
        cells.append(f"{incidents}; {false.sum() / TEST_DAYS:.0f}; {episodes / TEST_DAYS:.0f}")
    return f"| {stream.name} | {len(truth.kinds)} | " + " | ".join(cells) + " |"


def row(name: str, cells: Iterable[object]) -> str:
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def main(folder: Path, seeds: str = "0,1,2") -> None:
    """Measure the detector and the reference detectors on organisations."""
    numbers = [int(seed) for seed in seeds.split(",")]
    for seed in numbers:
        if not (folder / f"organisation-{seed}.labels.csv").exists():
            write_stream(simulate(seed), folder, f"organisation-{seed}")
    streams = {stream.name: stream for stream in streams_of(folder)}
    chosen = [streams[f"organisation-{seed}"] for seed in numbers]
    truths = [truth_of(stream) for stream in chosen]
    scores = [scores_of(stream, seed) for stream, seed in zip(chosen, numbers, strict=True)]
    names = list(scores[0])

    totals = [len(truth.kinds) for truth in truths]
    heads = [f"{s.name}: AUROC / AP; found of {t} at 20, 100" for s, t in zip(chosen, totals, strict=True)]
    print(row("detector", [*heads, f"all {sum(totals)}: at 20, 100"]))
    print("|---" * (len(chosen) + 2) + "|")
    hits: dict[tuple[str, int], Counter[str]] = {}
    for name in names:
        cells, sums = [], [0, 0]
        for truth, score in zip(truths, scores, strict=True):
            figures = metrics(truth.label, score[name])
            counts = []
            for place, budget in enumerate(BUDGETS):
                found = found_at(truth, score[name], budget * TEST_DAYS)
                hits.setdefault((name, budget), Counter()).update(truth.kinds[each] for each in found)
                counts.append(len(found))
                sums[place] += len(found)
            cells.append(f"{figures['auroc']:.3f} / {figures['ap']:.3f}; {counts[0]}, {counts[1]}")
        print(row(name, [*cells, f"{sums[0]}, {sums[1]}"]))

    there = Counter(kind for truth in truths for kind in truth.kinds.values())
    print("\n" + row("kind (incidents)", [f"{name}: at 20, at 100" for name in names]))
    print("|---" * (len(names) + 1) + "|")
    for kind in KINDS:
        cells = [", ".join(str(hits[name, budget][kind]) for budget in BUDGETS) for name in names]
        print(row(f"{kind.replace('_', ' ')} ({there[kind]})", cells))

    print("\n| as served | incidents | 20 a day: found; false alarms a day; episodes of them | the same at 100 |")
    print("|---|---|---|---|")
    for stream, truth in zip(chosen, truths, strict=True):
        print(as_served(stream, truth))


if __name__ == "__main__":
    typer.run(main)
