"""Figures are right: against labels, under ties, and the peers' against those published for the evaluation streams."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from streamer.offline.evaluation import (
    Detected,
    EvaluationError,
    Labels,
    at_budget,
    by_sequence,
    evaluate,
    metrics,
    recall_at,
    results_table,
)
from streamer.offline.reference_detectors import Table, flatten, half_space_trees, tabulate

DATA = os.environ.get("RIPCURRENT_EVAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")


def walked(label: np.ndarray, order: tuple[int, ...], allowed: int) -> float:
    """Recall by walking down one order until one false alarm too many."""
    found = alarms = 0
    for row in order:
        if label[row]:
            found += 1
        elif (alarms := alarms + 1) > allowed:
            break
    return found / max(1, label.sum())


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6), st.integers(0, 3))
def test_recall_is_the_mean_over_every_order_of_the_tied(events: list[tuple[int, int]], allowed: int) -> None:
    label = np.array([kind for kind, _ in events], np.int8)
    score = np.array([value for _, value in events], np.float64)
    orders = [o for o in itertools.permutations(range(len(events))) if (np.diff(score[list(o)]) <= 0).all()]
    assert recall_at(label, score, allowed) == pytest.approx(np.mean([walked(label, o, allowed) for o in orders]))


def test_a_score_that_says_nothing_earns_nothing() -> None:
    label = np.array([1] * 50 + [0] * 5000, np.int8)
    for rows in (label, label[::-1]):
        assert metrics(rows, np.zeros(len(rows)))["auroc"] == 0.5
        assert recall_at(rows, np.zeros(len(rows))) == pytest.approx(21 / 5001)


def test_metrics_of_a_perfect_a_reversed_and_an_absent_ranking() -> None:
    label = np.array([0] * 100 + [1] * 10, np.int8)
    score = np.arange(110, dtype=np.float64)
    assert metrics(label, score) == pytest.approx({"auroc": 1.0, "ap": 1.0, "recall_at_20fp": 1.0})
    assert metrics(label, -score)["auroc"] == 0.0
    assert metrics(label, -score)["recall_at_20fp"] == 0.0
    assert metrics(np.zeros(110, np.int8), score)["auroc"] is None
    with pytest.raises(ValueError, match="1 of 110"):
        metrics(label, np.where(score == 3, np.nan, score))


def test_a_sequence_is_as_bad_as_its_worst_event() -> None:
    labels = Labels(np.array([0, 1, 0, 0, 0], np.int8), ["bad", "bad", "good", "good", ""])
    found = by_sequence(labels, np.array([0.0, 5.0, 4.0, 4.0, 9.0]))
    assert found is not None
    assert found["auroc"] == 1.0
    assert by_sequence(Labels(labels.label, ["one"] * 5), np.arange(5.0)) is None


def test_the_budget_counts_false_alarms() -> None:
    label = np.array([1, 1, 0, 0], np.int8)
    assert at_budget(label, np.array([True, False, True, False])) == {"alerts": 2, "false_alarms": 1, "recall": 0.5}


def test_flatten_names_paths_and_drops_null() -> None:
    record = {"a": {"b": 1, "c": {"d": None}}, "e": [1, {"f": 2}], "g": True}
    assert flatten(record) == {"a.b": 1, "e": '[1, {"f": 2}]', "g": True}


def test_a_table_survives_values_of_the_wrong_kind() -> None:
    train = [{"n": i * 1.5, "c": "x" if i % 2 else True} for i in range(40)]
    table = tabulate(train, [{"n": "not a number", "c": 1}, {"other": [1]}, {}])
    assert np.isfinite(table.train).all()
    assert np.isfinite(table.test).all()
    assert table.train.shape[1] == table.test.shape[1]
    assert table.rarity[0, 0] > table.rarity[2, 0] - 1e-9  # the text 1 was never seen, nor was absence


@pytest.fixture
def recording(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Sequences that count a, b, c; in the test set every tenth goes a, c, z."""

    def write(name: str, blocks: int, odd: int) -> tuple[Path, list[str]]:
        lines, labels = [], []
        for block in range(blocks):
            wrong = odd and block % odd == 0
            for step, code in enumerate("acz" if wrong else "abc"):
                uid = f"{name}-{block}-{step}"
                metadata = {"uid": uid, "correlation_uid": f"{name}{block}", "event_code": code}
                event = {"metadata": metadata, "type_uid": 100899, "time": block, "size": block % 30 + 0.5}
                lines.append(json.dumps(event))
                labels.append(f"{uid},{int(bool(wrong) and code == 'z')},,{name}{block}")
        path = tmp_path / f"{name}.ndjson"
        path.write_text("\n".join(lines) + "\n\nnot json\n[]\n")
        return path, labels

    train, _ = write("train", 60, 0)
    test, labels = write("test", 50, 10)
    labels_path = tmp_path / "labels.csv"
    labels_path.write_text("uid,label,attack,sequence\n" + "\n".join(labels) + "\n")
    return train, test, labels_path


@pytest.mark.extended
def test_evaluate_puts_the_detector_beside_its_peers(recording: tuple[Path, Path, Path]) -> None:
    train, test, labels = recording
    p_value = {f"test-{block}-2": 0.001 for block in range(0, 50, 10)} | {"test-1-0": 0.002, "test-0-0": 0.5}
    asked: list[object] = []

    def detect(*paths: object) -> Detected:
        asked.extend(paths)
        return Detected(p_value, {20: 0.001, 100: 0.01}, 1.0)

    said: list[str] = []
    results = evaluate([train], [test], labels, detect=detect, say=said.append)
    assert asked == [[train], [test]]
    ours = results["ripcurrent"]
    assert (ours["auroc"], ours["ap"], ours["recall_at_20fp"]) == pytest.approx((1.0, 1.0, 1.0))
    assert ours["budget"]["20"] == {"alerts": 5, "false_alarms": 0, "recall": 1.0}
    assert ours["budget"]["100"] == {"alerts": 6, "false_alarms": 1, "recall": 1.0}
    assert ours["by_sequence"]["auroc"] == 1.0
    assert results["trigram"]["by_sequence"]["auroc"] == 1.0
    assert {"rarity_sum", "isolation_forest", "raw_knn", "lof", "conditional_rarity"} <= set(results)
    assert json.loads(json.dumps(results)) == results
    console = Console(width=200, record=True)
    console.print(results_table(results, "toy"))
    assert "ripcurrent" in console.export_text()


@pytest.mark.extended
def test_peers_are_deterministic_for_a_seed(recording: tuple[Path, Path, Path]) -> None:
    def run() -> dict[str, dict[str, object]]:
        results = evaluate([recording[0]], [recording[1]], recording[2], seed=3)
        return {name: {k: v for k, v in figures.items() if k != "seconds"} for name, figures in results.items()}

    assert run() == run()


def test_labels_of_another_file_are_refused(recording: tuple[Path, Path, Path]) -> None:
    train, _, labels = recording
    with pytest.raises(EvaluationError, match="180 of 180 test events have no label, 'train-0-0'"):
        evaluate([train], [train], labels)


def test_a_peer_that_is_not_installed_is_left_out_with_a_word(
    recording: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "river", None)
    said: list[str] = []
    results = evaluate([recording[0]], [recording[1]], recording[2], say=said.append)
    assert "half_space_trees" not in results
    assert "half space trees left out: river is not installed" in said


def test_half_space_trees_see_a_far_event() -> None:
    pytest.importorskip("river")
    rng = np.random.default_rng(0)
    train = rng.normal(0, 1, (2000, 4)).astype(np.float32)
    test = np.array([[0, 0, 0, 0], [3, -3, 3, -3]], np.float32)
    near, far = half_space_trees(Table(train, test, np.zeros((2, 0))))
    assert far > near


PUBLISHED = {
    "flows-nsl": {
        "rarity_sum": (0.948, 0.620, 0.01),
        "isolation_forest": (0.956, 0.789, 0.44),
        "raw_knn": (0.968, 0.741, 0.01),
        "lof": (0.841, 0.269, 0.01),
        "half_space_trees": (0.935, 0.666, 0.09),
        "conditional_rarity": (0.959, 0.774, 0.21),
    },
    "flows-nsl-dirty": {
        "rarity_sum": (0.945, 0.590, 0.01),
        "isolation_forest": (0.962, 0.775, 0.17),
        "raw_knn": (0.640, 0.209, 0.01),
        "lof": (0.532, 0.133, 0.00),
        "half_space_trees": (0.927, 0.723, 0.34),
        "conditional_rarity": (0.959, 0.759, 0.17),
    },
    "windows-a": {
        "rarity_sum": (0.919, 0.154, 0.00),
        "isolation_forest": (0.754, 0.056, 0.00),
        "raw_knn": (0.604, 0.383, 0.00),
        "lof": (0.307, 0.023, 0.00),
        "half_space_trees": (0.934, 0.207, 0.00),
        "conditional_rarity": (0.975, 0.807, 0.57),
    },
    "sequences-hdfs": {
        "rarity_sum": (0.896, 0.842),
        "isolation_forest": (0.676, 0.081),
        "raw_knn": (0.874, 0.714),
        "lof": (0.835, 0.686),
        "half_space_trees": (0.673, 0.259),
        "trigram": (0.853, 0.812),
    },
}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("stream", PUBLISHED)
def test_peers_reach_the_published_figures(stream: str) -> None:
    data = Path(DATA or "")
    results = evaluate(
        [data / f"{stream}.train.ndjson.gz"], [data / f"{stream}.test.ndjson.gz"], data / f"{stream}.labels.csv"
    )
    for peer, published in PUBLISHED[stream].items():
        found = results[peer].get("by_sequence", results[peer])
        for name, figure, tolerance in zip(
            ("auroc", "ap", "recall_at_20fp"), published, (0.0011, 0.0011, 0.006), strict=False
        ):
            assert found[name] == pytest.approx(figure, abs=tolerance), (peer, name)
