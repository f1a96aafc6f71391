"""The report is one page that loads nothing, shows what it was given, and runs nothing of what alerts hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import WORD, scored
from test_alert_commands import create_topic, invoke, lines, make, send
from test_pipeline import Quiet, with_threshold
from typer.testing import CliRunner

from state.memory.episodes import MemoryEpisodes
from streamer.alerting.pipeline import AlertPipeline
from streamer.cli.main import app
from streamer.report.page import page
from streamer.report.report import DECADES, Material, report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
EVALUATION = {
    "ripcurrent": {
        "auroc": 0.991,
        "ap": 0.9,
        "recall_at_20fp": 0.61,
        "seconds": 3.0,
        "budget": {"20": {"alerts": 30, "false_alarms": 12, "recall": 0.5}},
    },
    "raw_knn": {"auroc": 0.968, "ap": 0.741, "recall_at_20fp": 0.01, "seconds": 1.0},
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """An evaluation, uniform scores whose second half has drifted, and findings, one of them hostile."""
    rng = np.random.default_rng(0)
    p_values = rng.random(10_000)
    p_values[5000:] **= 2
    batch = with_threshold(scored([{**WORD, "actor": {"user": {"name": HOSTILE}}}], entity=f"user:{HOSTILE}"))
    hostile = AlertPipeline(Quiet(), MemoryEpisodes(), bundle_version="b").alerts(batch, np.arange(1))
    alerts = [*make(12), *make(1, "host:fs01", 95.0, 300), *make(2, "user:eve", 45.0, 90), *hostile]
    contents = {
        "eval.json": orjson.dumps(EVALUATION),
        "scores.ndjson": b"\n".join(orjson.dumps({"p_value": p, "alert": p < 1e-3}) for p in p_values.tolist()),
        "alerts.ndjson": b"\n".join(alert.value for alert in alerts),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in contents]


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.S)))


def test_the_figures_are_those_of_what_it_was_given(files: list[Path]) -> None:
    material = Material()
    for path in files:
        material.add_file(path)
    made = report(material, title="t", made_ms=0, promised=20)
    assert dict(made.counts) == {
        "alerts": "4",
        "of severity High and above": "3",
        "events in them": "16",
        "with a verdict": "0",
        "events scored": "10,000",
        "events at or under the threshold": str(sum(p < 1e-3 for p in material.p_values)),
    }
    assert made.scores is not None
    assert made.days is not None
    assert sum(made.scores.decades) == 10_000
    assert len(made.scores.decades) == DECADES
    assert made.scores.parts[0] == pytest.approx(0.01, abs=0.01)
    assert made.scores.parts[-1] == pytest.approx(0.1, abs=0.03), "drift shows"
    assert sum(sum(bar) for _, bar in made.bars) == sum(n for _, n in made.days.spent) == 4
    assert made.top[0].last["severity"] == "Critical"


def test_the_page_holds_it_all_and_refers_to_nothing_outside(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", *map(str, files), "--out", str(out), "--title", "A & B"])
    assert done.exit_code == 0, done.exception
    html = out.read_text()
    assert not re.findall(r"https?:|//[a-z]|url\(|<link|<script|<img|<iframe|@import", html)
    assert "default-src 'none'" in html
    text = text_of(html)
    for words in ("A &amp; B", "0.991", "12 of 30, 0.500", "Promised: at most about 20 a day", "1 in 10,000"):
        assert words in text, words
    assert "Of normal events, 1 in 100,000 would look as unusual as this" in text
    assert "&lt;img src=x onerror" in html


def test_what_is_no_report_material_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("hello\n")
    for path, words in ((tmp_path / "other", "holds neither an evaluation"), (tmp_path / "none", "cannot be read")):
        assert words in str(CliRunner().invoke(app, ["report", str(path)]).exception)
    assert "nothing" not in page(report(Material(), title="empty", made_ms=0))


def test_the_last_day_of_the_alert_topic(kafka: str, unique: Callable[[str], str], tmp_path: Path) -> None:
    topic = create_topic(kafka, unique("alerts"))
    send(kafka, topic, make(12))
    out = tmp_path / "report.html"
    assert lines(invoke(kafka, topic, "report", "--out", str(out)))[0].startswith("4 findings, 0 scores")
    assert "user bob" in text_of(out.read_text())
    assert lines(invoke(kafka, topic, "report", "--out", str(out), "--to", "1h"))[0].startswith("0 findings")


@pytest.mark.extended
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_it_runs_nothing_and_complains_of_nothing(files: list[Path], tmp_path: Path) -> None:
    import matplotlib.image

    out, shot = tmp_path / "report.html", tmp_path / "shot.png"
    CliRunner().invoke(app, ["report", *map(str, files), "--out", str(out)])
    own: list[Any] = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    own += ["--enable-logging=stderr", "--window-size=1100,2400", "--hide-scrollbars"]
    done = subprocess.run(
        [*own, f"--screenshot={shot}", out.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    assert "CONSOLE" not in done.stderr, "neither an error nor a refused script"
    picture = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    assert picture.shape == (2400, 1100, 3)
    for colour in ((0xC3, 0x26, 0x3F), (0xE0, 0x65, 0x2B), (0x3B, 0x6F, 0xD4)):  # critical, high, bars
        assert (picture == colour).all(axis=2).sum() > 100, colour
    dom = subprocess.run([*own, "--dump-dom", out.as_uri()], capture_output=True, text=True, timeout=90, check=True)
    assert "<img" not in dom.stdout
    assert "<script" not in dom.stdout


def test_a_story_keeps_its_verdict_in_the_report() -> None:
    (alert, *_) = make(1)
    finding = orjson.loads(alert.value)
    material = Material([finding, finding | {"verdict_id": 5, "verdict": "Benign", "metadata": {"uid": "v"}}])
    made = report(material, title="t", made_ms=0)
    assert dict(made.counts)["with a verdict"] == "1"
    assert "benign" in page(replace(made, title="x"))
