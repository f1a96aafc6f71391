"""`make evaluate`: a folder of labelled streams becomes one table, beside the frozen figures of simple detectors."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import evaluate
import orjson
import pytest
from evaluate import REFERENCE, choose, streams_of, summary, table


def write_stream(folder: Path, name: str, *, judged: bool) -> None:
    (folder / f"{name}.train.ndjson.gz").write_bytes(gzip.compress(b"{}\n"))
    if judged:
        (folder / f"{name}.test.ndjson.gz").write_bytes(gzip.compress(b"{}\n"))
        (folder / f"{name}.labels.csv").write_text("uid,label\n")


def test_a_dirty_training_part_is_judged_by_the_test_of_the_clean_one(tmp_path: Path) -> None:
    write_stream(tmp_path, "web", judged=True)
    write_stream(tmp_path, "web-dirty", judged=False)
    write_stream(tmp_path, "unlabelled", judged=False)
    found = streams_of(tmp_path)
    assert [stream.name for stream in found] == ["web", "web-dirty"]
    assert {stream.test.name for stream in found} == {"web.test.ndjson.gz"}
    assert found[1].train.name == "web-dirty.train.ndjson.gz"


def result(ap: float, **more: Any) -> dict[str, Any]:
    spent = {"false_alarms": 3, "alerts": 5, "recall": 0.5}
    both: dict[str, Any] = {"20": spent, "100": spent}
    found = {"auroc": 0.9, "ap": ap, "recall_at_20fp": 0.3, "by_sequence": None, "budget": both}
    return found | {"reachable": {"20": 0.6, "100": 0.7}, "fit_s": 2.0, "score_s": 1.0} | more


def test_the_figure_of_merit_is_the_worst_and_the_mean_difference_to_the_best_simple_detector() -> None:
    by_sequence = {"auroc": 0.99, "ap": 0.95, "recall_at_20fp": 1.0}
    measured = {
        "web": [result(0.5), result(0.6)],
        "pods": [result(0.1)],
        "sequences-hdfs": [result(0.2, by_sequence=by_sequence)],
        "cloud": [result(0.0)],
        "mine": [result(0.4)],
    }
    found = summary(measured)
    assert found["streams"]["web"]["ap"] == pytest.approx(0.55)
    assert found["streams"]["sequences-hdfs"]["ap"] == 0.95
    differences = [0.55 - 0.467, 0.1 - 0.205, 0.95 - 0.842]
    assert found["merit"]["worst_ap"] == pytest.approx(min(differences))
    assert found["merit"]["mean_ap"] == pytest.approx(sum(differences) / 3)
    text = table(found)
    assert "| `mine` | 0.900 / 0.400 / 0.30 | - |" in text and "worst AP -0.105" in text


def test_the_reference_figures_name_a_detector_and_three_figures_each() -> None:
    for of_stream in orjson.loads(REFERENCE.read_bytes()).values():
        assert len(of_stream) == 6
        for figures in of_stream.values():
            assert len(figures) == 3 and all(0 <= figure <= 1 for figure in figures[:2])


def test_the_record_part_is_measured_and_its_parts_compared_without_fitting_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from encoder.training import replaced_fields
    from streamer.devtools.simulator.generator import simulate, write

    monkeypatch.setattr(replaced_fields, "STEPS", 30)
    days = list(simulate(seed=1, days=2, events_per_day=2600, incidents={1: ("rare_process_tree", "unseen_binary")}))
    write(days[:1], tmp_path / "own.train.ndjson.gz")
    write(days[1:], tmp_path / "own.test.ndjson.gz", tmp_path / "own.labels.csv")
    (stream,) = streams_of(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    fresh = evaluate.measure_record(stream, 0, out)
    again = evaluate.measure_record(stream, 0, out)
    assert fresh["auroc"] > 0.8 and fresh["events"] == len(days[1].events)
    assert (again["auroc"], again["ap"]) == (fresh["auroc"], fresh["ap"]), "the features that were kept are the same"
    monkeypatch.setattr(replaced_fields, "train", None)
    rows = choose([stream], 0, out).splitlines()
    assert rows[2] == f"| all parts | {fresh['auroc']:.3f} / {fresh['ap']:.3f} |"
    assert len(rows) == 2 + len(evaluate.CHOICES)
    with (tmp_path / "own.labels.csv").open(newline="") as labels:
        assert sum(int(row["label"]) for row in csv.DictReader(labels)) > 0
