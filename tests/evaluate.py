"""`make evaluate`: each labelled recording of a folder, fitted and scored with the defaults, beside simple detectors.

    python tests/evaluate.py FOLDER [--out DIR] [--seeds 0,1,2] [--streams flows-nsl,web] [--jobs 2]
        [--fast] [--choose] [--together]

A folder holds `NAME.train.ndjson.gz`, `NAME.test.ndjson.gz` and `NAME.labels.csv` (columns uid, label and, if any,
sequence). A training part without a test of its own, such as `NAME-dirty`, is judged by the test of `NAME`. Each stream
and seed is a process of its own. What it gave is kept in DIR and is measured again only when the code has changed, so a
run that was cut off goes on. Writes `evaluation.md` and `evaluation.json` to DIR, and prints the table.

--fast measures the record part alone, without windows, sequences and rates. The features of a stream and the evidence
of each part of the record score stay in DIR; --choose compares CHOICES of parts on that evidence, without fitting
again. Of each stream it reports the choice that is best on all the others (leave one out).

--together measures one record part fitted to all streams with a test of their own, interleaved as on one topic: every
stream begins and ends when all do. Each test part is judged by it.

The figures of the simple detectors are those of `tests/evaluation/reference_figures.json` (AUROC, AP, R@20), taken once
and frozen: `ripcurrent evaluate` measures detectors of the same names on a stream of your own.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import torch
import typer
from numpy.typing import NDArray

from encoder.features.schema import Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer, fitted_to
from encoder.models.text_shapes import Attribute, TextCollector, Texts
from encoder.ocsf.decoder import decode
from state.calibration import FEW, Calibration
from streamer.alerting.file_thresholds import daily_threshold
from streamer.detection.record_score import FAR, FOR_ACTOR, FOR_TYPE, NEAR, NUMBERS, PARTS, REPLACED, TEXT
from streamer.detection.score_files import score_files
from streamer.event_files import batches, event_uid
from streamer.offline.evaluation import Labels, at_budget, by_sequence, metrics, read_labels, recall_at
from streamer.training import fit as fitting

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "evaluation" / "reference_figures.json"
UNRANKED = ("cloud",)
"""Streams that are measured and count for nothing in the figure of merit: a realism check, not a quality bar."""
BUDGETS = (20, 100)
CHOICES: dict[str, tuple[str, ...]] = {
    "all parts": PARTS,
    "without texts": (FOR_ACTOR, FOR_TYPE, NUMBERS, FAR, NEAR, REPLACED),
    "without the numbers in context": (FOR_ACTOR, FOR_TYPE, FAR, NEAR, REPLACED, TEXT),
    "without the network": (FOR_ACTOR, FOR_TYPE, NUMBERS, FAR, NEAR, TEXT),
    "without the nearest": (FOR_ACTOR, FOR_TYPE, NUMBERS, FAR, REPLACED, TEXT),
    "without the many": (FOR_ACTOR, FOR_TYPE, NUMBERS, NEAR, REPLACED, TEXT),
    "without the rarest value for the type": (FOR_ACTOR, NUMBERS, FAR, NEAR, REPLACED, TEXT),
    "without the values for the actor": (FOR_TYPE, NUMBERS, FAR, NEAR, REPLACED, TEXT),
    "values and texts alone": (FOR_ACTOR, FOR_TYPE, TEXT),
    "distances alone": (FAR, NEAR),
}
"""Parts whose evidence is added up without weights. The first is the score as it is served."""
TRAIN = ".train.ndjson.gz"


@dataclass(frozen=True)
class Stream:
    """A training part, and the test part and labels that judge it."""

    name: str
    train: Path
    test: Path
    labels: Path


def streams_of(folder: Path) -> list[Stream]:
    """All streams of a folder that have a test and labels, by name."""
    found = []
    for train in sorted(folder.glob(f"*{TRAIN}")):
        name = train.name.removesuffix(TRAIN)
        judged_by = next((n for n in (name, name.removesuffix("-dirty")) if (folder / f"{n}.labels.csv").is_file()), "")
        test = folder / f"{judged_by}.test.ndjson.gz"
        if judged_by and test.is_file():
            found.append(Stream(name, train, test, folder / f"{judged_by}.labels.csv"))
    return sorted(found, key=lambda stream: stream.name)


def code_digest(*rooms: str) -> str:
    """Names the code of these folders (default: all that detects): a figure of other code is not this one's."""
    digest = hashlib.sha256()
    for room in rooms or ("encoder", "state", "streamer"):
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def figures(labels: Labels, evidence: NDArray[np.float64], p_value: NDArray[np.float64]) -> dict[str, Any]:
    """All figures of n scored events. reachable: the recall that the ranking allows at 1.5 times a budget."""
    return {
        **metrics(labels.label, evidence),
        "by_sequence": by_sequence(labels, evidence),
        "budget": {str(n): at_budget(labels.label, p_value <= daily_threshold(n, len(evidence))) for n in BUDGETS},
        "reachable": {str(n): recall_at(labels.label, evidence, int(1.5 * n)) for n in BUDGETS},
        "events": len(evidence),
    }


def measure(stream: Stream, seed: int) -> dict[str, Any]:
    """Fit and score one stream, then open its labels."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bundle = fitting.fit([stream.train], Path(folder) / "bundle", seed=seed).bundle
        fitted = time.perf_counter()
        scored = score_files([stream.test], bundle)
    ended = time.perf_counter()
    evidence = -np.log(np.maximum(scored.p_value, np.finfo(np.float64).tiny))
    found = figures(read_labels(stream.labels, scored.uids), evidence, scored.p_value)
    return found | {"fit_s": round(fitted - began, 1), "score_s": round(ended - fitted, 1)}


FEATURES = tuple(field.name for field in fields(FeatureBatch))
"""The arrays of a `FeatureBatch`."""


@dataclass(frozen=True)
class Features:
    """What the record part is fitted to and judged by: the schema, n training rows in order of time, which of them are
    held out (bool [n]), and the test rows with their uids."""

    schema: Schema
    train: FeatureBatch
    train_texts: Texts
    held: NDArray[np.bool_]
    test: FeatureBatch
    test_texts: Texts
    uids: list[str]


def features_of(stream: Stream, kept: Path) -> Features:
    """Decoded and vectorized, or read from `kept`, which is of this code that decodes and vectorizes."""
    if kept.is_file():
        with np.load(kept) as arrays:
            return Features(
                Schema.from_json(arrays["schema"].tobytes()),
                FeatureBatch(*(arrays[f"train.{name}"] for name in FEATURES)),
                texts_from(arrays, "train"),
                arrays["held"],
                FeatureBatch(*(arrays[f"test.{name}"] for name in FEATURES)),
                texts_from(arrays, "test"),
                arrays["uids"].tolist(),
            )
    loaded = fitting._load([stream.train], lambda *_: None)
    held = fitting.held_out(loaded.time)
    schema, train = fitted_to(loaded.schema, loaded.features, np.flatnonzero(~held))
    test, test_texts, uids = test_features(stream, schema)
    arrays = {f"train.{name}": getattr(train, name) for name in FEATURES}
    arrays |= {f"test.{name}": getattr(test, name) for name in FEATURES}
    np.savez(
        kept,
        schema=np.frombuffer(schema.to_json(), np.uint8),
        held=held,
        uids=np.array(uids),
        allow_pickle=False,
        **arrays,
        **texts_to(loaded.texts, "train"),
        **texts_to(test_texts, "test"),
    )
    return Features(schema, train, loaded.texts, held, test, test_texts, uids)


def texts_to(texts: Texts, part: str) -> dict[str, NDArray[Any]]:
    """Arrays from which `texts_from` makes the same."""
    described = [[list(attribute) for attribute in texts.attributes], texts.strings]
    return {f"{part}.ids": texts.ids, f"{part}.texts": np.frombuffer(orjson.dumps(described), np.uint8)}


def texts_from(arrays: Mapping[str, NDArray[Any]], part: str) -> Texts:
    attributes, strings = orjson.loads(arrays[f"{part}.texts"].tobytes())
    return Texts([Attribute(*attribute) for attribute in attributes], arrays[f"{part}.ids"], strings)


def test_features(stream: Stream, schema: Schema) -> tuple[FeatureBatch, Texts, list[str]]:
    """The features of the n test events, their texts and their n uids."""
    vectorize, texts = Vectorizer(schema), TextCollector(schema)
    parts: list[FeatureBatch] = []
    uids: list[str] = []
    for batch in batches([stream.test]):
        events, _ = decode(batch)
        parts.append(vectorize(events))
        texts.add(events, np.arange(len(events)))
        lines = events.coordinates.offset.tolist()
        uids += [event_uid(record, line + 1) for record, line in zip(events.records, lines, strict=True)]
    return FeatureBatch.concatenate(parts), texts.finish(np.arange(len(uids))), uids


def features_file(stream: Stream, out: Path) -> Path:
    return out / f"{stream.name}.{code_digest('encoder/ocsf', 'encoder/features')}.npz"


def measure_record(stream: Stream, seed: int, out: Path) -> dict[str, Any]:
    """The record part alone. Leaves the raw parts of held-out and test events in `out`."""
    began = time.perf_counter()
    known = features_of(stream, features_file(stream, out))
    loaded = time.perf_counter()
    part = fitted_record(known, seed)
    fitted = time.perf_counter()
    held = np.flatnonzero(known.held)
    evidence = {
        "held": parts_of(part, known.train.take(held), known.train_texts.take(held)),
        "test": parts_of(part, known.test, known.test_texts),
    }
    np.savez(out / f"{stream.name}.{seed}.parts.npz", uids=np.array(known.uids), allow_pickle=False, **evidence)
    found = of_parts(stream, evidence["held"], evidence["test"], known.uids, PARTS)
    times = {"load_s": loaded - began, "fit_s": fitted - loaded, "score_s": time.perf_counter() - fitted}
    return found | {name: round(seconds, 1) for name, seconds in times.items()}


def fitted_record(known: Features, seed: int) -> fitting.FittedRecord:
    trained, held = np.flatnonzero(~known.held), np.flatnonzero(known.held)
    first, in_block = fitting._distinct(known.train, trained)
    return fitting.fit_record(
        known.schema,
        known.train.take(first),
        in_block,
        known.train.take(held),
        texts=known.train_texts.take(trained),
        later_texts=known.train_texts.take(held),
        seed=seed,
        device=torch.device("cpu"),
    )


def parts_of(part: fitting.FittedRecord, features: FeatureBatch, texts: Texts) -> NDArray[np.float64]:
    """float64 [parts, n], nats."""
    first, like = features.distinct()
    distinct = features.take(first)
    types = distinct.codes[:, 0].astype(np.int64)
    parts = part.scorer.parts(part.scorer.raw(part.encoder.encode(distinct), types), types)[:, like]
    return part.scorer.with_text(parts, part.scorer.texts.of_texts(texts), types[like])


def of_parts(
    stream: Stream,
    held: NDArray[np.float64],
    test: NDArray[np.float64],
    uids: list[str],
    chosen: tuple[str, ...],
) -> dict[str, Any]:
    """The figures of some parts of the record score. held, test: float64 [parts, n], nats."""
    rows = [PARTS.index(name) for name in chosen]
    evidence = test[rows].sum(0)
    p_value = Calibration.fit(held[rows].sum(0), tail_from=FEW).p_value(evidence)
    return figures(read_labels(stream.labels, uids), evidence, p_value)


TOGETHER = "together"
_SPAN_MS = 14 * 86_400_000
"""How long the interleaved streams last: two weeks."""
_FROM_MS = 1_767_571_200_000


def measure_together(streams: list[Stream], seed: int, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each stream, the figures of the record part that is fitted to all of them."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [stream for stream in streams if stream.test.name == f"{stream.name}.test.ndjson.gz"]
    train = out / f"{TOGETHER}{TRAIN}"
    interleave([stream.train for stream in chosen], train)
    began = time.perf_counter()
    whole = Stream(TOGETHER, train, chosen[0].test, chosen[0].labels)
    known = features_of(whole, features_file(whole, out))
    part = fitted_record(known, seed)
    held = np.flatnonzero(known.held)
    evidence = evidence_of(part, known.train.take(held), known.train_texts.take(held))
    calibration = Calibration.fit(evidence, tail_from=FEW)
    seconds = time.perf_counter() - began
    found = {}
    for stream in chosen:
        began = time.perf_counter()
        test, texts, uids = test_features(stream, part.encoder.schema)
        evidence = evidence_of(part, test, texts)
        result = figures(read_labels(stream.labels, uids), evidence, calibration.p_value(evidence))
        found[stream.name] = [result | {"fit_s": seconds, "score_s": time.perf_counter() - began}]
    return found


def evidence_of(part: fitting.FittedRecord, features: FeatureBatch, texts: Texts) -> NDArray[np.float64]:
    """float64 [n], nats: the record score."""
    return part.scorer.evidence(parts_of(part, features, texts), features.codes[:, 0].astype(np.int64))


def interleave(trains: list[Path], out: Path) -> None:
    """All events of some files, each file stretched to the same span of time. Moments within an event move together, so
    that the time between them stays."""
    rows: list[tuple[float, bytes]] = []
    for path in trains:
        events = [orjson.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        times = [event["time"] for event in events]
        first, span = min(times), max(max(times) - min(times), 1)
        for event in events:
            share = (event["time"] - first) / span
            shift = round(_FROM_MS + share * _SPAN_MS) - event["time"]
            rows.append((share, orjson.dumps(shifted(event, event["time"], shift))))
    rows.sort(key=lambda row: row[0])
    out.write_bytes(gzip.compress(b"\n".join(row for _, row in rows), 1))


def shifted(value: Any, moment: int, by: int) -> Any:
    """The same JSON value, its whole numbers within ten years of a moment (ms) moved by so many ms."""
    if isinstance(value, dict):
        return {name: shifted(each, moment, by) for name, each in value.items()}
    if isinstance(value, list):
        return [shifted(each, moment, by) for each in value]
    decade = 315_360_000_000
    near = isinstance(value, int) and not isinstance(value, bool) and abs(value - moment) < decade
    return value + by if near else value


def choose(streams: list[Stream], seed: int, out: Path) -> str:
    """CHOICES on the evidence that is kept, as Markdown; and of each stream the choice that the others would make."""
    ap: dict[str, dict[str, float]] = {name: {} for name in CHOICES}
    lines = ["| choice | " + " | ".join(stream.name for stream in streams) + " |", "|---" * (len(streams) + 1) + "|"]
    for name, chosen in CHOICES.items():
        cells = []
        for stream in streams:
            with np.load(out / f"{stream.name}.{seed}.parts.npz") as kept:
                found = of_parts(stream, kept["held"], kept["test"], kept["uids"].tolist(), chosen)
            judged = found["by_sequence"] if stream.name.startswith("sequences") else found
            ap[name][stream.name] = judged["ap"]
            cells.append(f"{judged['auroc']:.3f} / {judged['ap']:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if len(streams) > 1:
        left_out = []
        for stream in streams:
            others = [other.name for other in streams if other is not stream and other.name not in UNRANKED]
            best = max(CHOICES, key=lambda name: float(np.mean([ap[name][other] for other in others])))
            left_out.append(f"{best}, {ap[best][stream.name]:.3f}")
        lines.append("| the best of all others, AP | " + " | ".join(left_out) + " |")
    return "\n".join(lines)


def results(
    streams: list[Stream], seeds: list[int], out: Path, jobs: int, fast: bool
) -> dict[str, list[dict[str, Any]]]:
    """Of each stream, what each seed gave; from `out` where that is of this code."""
    code = code_digest()

    def one(stream: Stream, seed: int) -> dict[str, Any]:
        kept = out / f"{stream.name}.{seed}{'.record' if fast else ''}.json"
        if kept.is_file() and (known := orjson.loads(kept.read_bytes()))["code"] == code:
            return dict(known)
        command = [sys.executable, __file__, str(stream.train.parent), "--one", stream.name, "--seeds", str(seed)]
        command += ["--out", str(out), *(["--fast"] if fast else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{stream.name}, seed {seed}: it ended with {done.returncode}")
        found = orjson.loads(done.stdout.splitlines()[-1]) | {"code": code}
        kept.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
        print(
            f"{stream.name}, seed {seed}: fit {found['fit_s']:.0f} s, score {found['score_s']:.0f} s", file=sys.stderr
        )
        return dict(found)

    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {s.name: [pool.submit(one, s, seed) for seed in seeds] for s in streams}
        return {name: [each.result() for each in of_seeds] for name, of_seeds in waiting.items()}


def summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, differences to the best simple detector of each figure, and the figure of merit.

    Where positives are sequences alone (`sequences-hdfs`), AUROC and AP are by sequence, as the reference figures are.
    """
    reference = orjson.loads(REFERENCE.read_bytes())
    rows = {}
    for name, of_seeds in measured.items():
        judged = [r["by_sequence"] if name.startswith("sequences") else r for r in of_seeds]
        row: dict[str, Any] = {
            key: float(np.mean([each[key] for each in judged])) for key in ("auroc", "ap", "recall_at_20fp")
        }
        for n in map(str, BUDGETS):
            row[f"false_{n}"] = max(r["budget"][n]["false_alarms"] for r in of_seeds)
            row[f"recall_{n}"] = float(np.mean([r["budget"][n]["recall"] for r in of_seeds]))
            row[f"reachable_{n}"] = float(np.mean([r["reachable"][n] for r in of_seeds]))
        row["seconds"] = float(np.mean([r["fit_s"] + r["score_s"] for r in of_seeds]))
        if name in reference:
            simple = reference[name].values()
            row["best_auroc"], row["best_ap"] = (max(each[i] for each in simple) for i in (0, 1))
        rows[name] = row
    ranked = [row for name, row in rows.items() if "best_ap" in row and name not in UNRANKED]
    merit = None
    if ranked:
        auroc = [row["auroc"] - row["best_auroc"] for row in ranked]
        ap = [row["ap"] - row["best_ap"] for row in ranked]
        merit = {"worst_auroc": min(auroc), "worst_ap": min(ap), "mean_ap": float(np.mean(ap))}
    return {"streams": rows, "merit": merit}


def table(found: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| stream | AUROC / AP / R@20 | best simple one, AUROC / AP | false alarms, recall at 20 (allowed) "
        "| at 100 | s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["streams"].items():
        best = f"{row['best_auroc']:.3f} / {row['best_ap']:.3f}" if "best_ap" in row else "-"
        spent = " | ".join(
            f"{row[f'false_{n}']}, {row[f'recall_{n}']:.2f} ({row[f'reachable_{n}']:.2f})" for n in BUDGETS
        )
        lines.append(
            f"| `{name}` | {row['auroc']:.3f} / {row['ap']:.3f} / {row['recall_at_20fp']:.2f} | {best} | {spent} "
            f"| {row['seconds']:.0f} |"
        )
    if (merit := found["merit"]) is not None:
        lines += [
            "",
            f"Figure of merit against the best simple detector: worst AUROC {merit['worst_auroc']:+.3f}, worst AP "
            f"{merit['worst_ap']:+.3f}, mean AP {merit['mean_ap']:+.3f}.",
        ]
    return "\n".join(lines)


def main(
    folder: Path,
    out: Path = ROOT / ".cache" / "evaluate",
    seeds: str = "0",
    streams: str = "",
    jobs: int = 2,
    fast: bool = False,
    choose_parts: Annotated[bool, typer.Option("--choose")] = False,
    together: bool = False,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure the streams of a folder."""
    known = streams_of(folder)
    asked = [name for name in (one or streams).split(",") if name]
    missing = set(asked) - {stream.name for stream in known}
    if missing or not known:
        raise SystemExit(f"{folder}: no stream {', '.join(sorted(missing)) or 'at all'}")
    chosen = [stream for stream in known if not asked or stream.name in asked]
    numbers = [int(seed) for seed in seeds.split(",")]
    if one:
        found = measure_record(chosen[0], numbers[0], out) if fast else measure(chosen[0], numbers[0])
        print(orjson.dumps(found).decode())
        return
    if together:
        found = summary(measure_together(chosen, numbers[0], out))
        print(table(found))
        (out / "together.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
        return
    found = summary(results(chosen, numbers, out, jobs, fast or choose_parts))
    if choose_parts:
        print(choose(chosen, numbers[0], out))
        return
    (out / "evaluation.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    (out / "evaluation.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
