"""Alerts are found, told and followed from the topic and from a file, and the documented subscribers run."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import WORD, scored
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from loop_harness import until
from test_cli import COMMAND
from test_pipeline import Quiet
from typer.testing import CliRunner, Result

from state.episode_rules import MINUTE_MS
from state.memory.episodes import MemoryEpisodes
from streamer.alerting.finding_frame import Alert
from streamer.alerting.pipeline import AlertPipeline
from streamer.cli.main import app

ROOT = Path(__file__).parents[1]


def make(times: int, entity: str = "user:bob", severity: float = 75.0, minutes: float = 0) -> list[Alert]:
    """What is published of some events of an entity, a minute apart, and its Close."""
    kind, _, name = entity.partition(":")
    who = {"actor": {"user": {"name": name}}} if kind == "user" else {"actor": {}, "device": {"hostname": name}}
    records = [{**WORD, **who, "time": WORD["time"] + int((minutes + i) * MINUTE_MS)} for i in range(times)]
    records.append({**WORD, "time": records[-1]["time"] + 2 * 60 * MINUTE_MS})
    batch = scored(records, entity=entity)
    batch.severity[:] = severity
    batch = replace(batch, threshold=np.full(len(batch), 1e-4))
    return AlertPipeline(Quiet(), MemoryEpisodes(), bundle_version="b").alerts(batch, np.arange(times))


@pytest.fixture(scope="module")
def topic(kafka: str) -> str:
    """A topic with two stories, what is no alert, and an alert of a transaction that was aborted."""
    name = create_topic(kafka, f"alerts-{uuid.uuid4().hex[:10]}", 2)
    send(kafka, name, [*make(3), *make(1, "host:fs01", 95.0, 5)])
    producer = Producer({"bootstrap.servers": kafka})
    for other in (b"garbage", b"", b"[]", b'{"class_uid": 2004}'):
        producer.produce(name, other)
    assert producer.flush(10) == 0
    aborting = Producer({"bootstrap.servers": kafka, "transactional.id": name})
    aborting.init_transactions(20)
    aborting.begin_transaction()
    aborting.produce(name, make(1, "user:nobody")[0].value)
    aborting.flush(10)
    aborting.abort_transaction()
    return name


def create_topic(kafka: str, name: str, partitions: int = 1) -> str:
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(20)
    return name


def send(kafka: str, name: str, alerts: list[Alert]) -> None:
    producer = Producer({"bootstrap.servers": kafka})
    for alert in alerts:
        producer.produce(name, alert.value, alert.key, headers=list(alert.headers))
    assert producer.flush(10) == 0


def invoke(kafka: str, topic: str, *arguments: Any) -> Result:
    flags = [f"--kafka-bootstrap-servers={kafka}", f"--alerts={topic}"]
    return CliRunner().invoke(app, [*map(str, arguments), *flags], env={"COLUMNS": "200"})


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout.strip().splitlines()


def test_tail_shows_one_line_an_alert_and_more_if_asked(kafka: str, topic: str) -> None:
    bob, fs01 = sorted(lines(invoke(kafka, topic, "tail", "--no-follow")), key=lambda line: "fs01" in line)
    assert re.match(r"2026-05-28 20:26:40  High +new +Unusual network activity of .*user bob.*  [0-9a-f]{8}$", bob)
    assert "Critical" in fs01
    assert lines(invoke(kafka, topic, "tail", "--no-follow", "--severity", "critical")) == [fs01]
    assert lines(invoke(kafka, topic, "tail", "--no-follow", "--entity", "user:bob")) == [bob]
    assert lines(invoke(kafka, topic, "tail", "--no-follow", "--match", "dst_endpoint", "--entity", "fs")) == [fs01]
    assert lines(invoke(kafka, topic, "tail", "--no-follow", "--match", "no such words")) == []
    every = lines(invoke(kafka, topic, "tail", "--no-follow", "--all", "--entity", "bob"))
    assert [line.split()[3] for line in every] == ["new", "more", "over"]
    assert every[-1].split("  ")[-2] == "×3"
    long = lines(invoke(kafka, topic, "tail", "--no-follow", "--entity", "bob", "--verbose"))
    assert long[0] == bob
    assert any("alerts begin at 1 in 10,000" in line for line in long[1:])
    (whole,) = lines(invoke(kafka, topic, "tail", "--no-follow", "--entity", "bob", "--json"))
    assert orjson.loads(whole)["is_alert"] is True
    wrong = invoke(kafka, topic, "tail", "--severity", "bad")
    assert "one of informational, low" in str(wrong.exception)


def test_tail_shows_alerts_as_they_come_and_ends_when_told(kafka: str, unique: Callable[[str], str]) -> None:
    topic = create_topic(kafka, unique("alerts"))
    send(kafka, topic, make(3))
    command = [*COMMAND, "tail", f"--kafka-bootstrap-servers={kafka}", f"--alerts={topic}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(25):  # It begins with what comes after its start, and cannot say that it has.
            send(kafka, topic, make(1, "user:eve"))
            time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    told = out.decode().splitlines()
    assert told
    assert all("user eve" in line for line in told), "what was there before is not shown"
    assert b"Traceback" not in err


def test_explain_tells_a_whole_story_by_the_beginning_of_any_of_its_uids(
    kafka: str, topic: str, tmp_path: Path
) -> None:
    alerts = make(3)
    findings = [orjson.loads(alert.value) for alert in alerts]
    (finding,) = {found["finding_info"]["uid"] for found in findings}
    (tmp_path / "alerts.ndjson").write_bytes(b"\n".join([b"garbage", *(alert.value for alert in alerts)]))
    texts = [lines(invoke(kafka, topic, "explain", uid)) for uid in (finding, finding[:8], alerts[1].uid[:10])]
    texts.append(lines(CliRunner().invoke(app, ["explain", finding, "--file", str(tmp_path / "alerts.ndjson")])))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    text = "\n".join(texts[0])
    assert "severity High; confidence High (90 of 99); risk 71 of 100; 3 events; resolved" in text
    assert "Of normal events, 1 in 100,000 would look as unusual as this" in text
    assert [line.split()[3] for line in texts[0] if line.startswith("2026-05-28") and "×" in line] == ["more", "over"]
    assert "kcat -b BROKER -t events -p 3 -o 101 -c 1" in text
    shown = lines(invoke(kafka, topic, "explain", alerts[0].uid, "--json"))
    assert orjson.loads("\n".join(shown))["metadata"]["uid"] == alerts[1].uid, "the latest that explains"
    for uid, words in (("ffff-none", "no alert 'ffff-none' there"), ("", "findings begin with ''")):
        assert words in str(invoke(kafka, topic, "explain", uid).exception)


def test_what_is_told_cannot_move_the_cursor(tmp_path: Path) -> None:
    alert = orjson.loads(make(1)[0].value)
    alert["finding_info"]["title"] = "\x1b[2J\x07red"
    (tmp_path / "one.ndjson").write_bytes(orjson.dumps(alert))
    done = CliRunner().invoke(app, ["explain", alert["metadata"]["uid"], "--file", str(tmp_path / "one.ndjson")])
    assert "\x1b" not in done.stdout
    assert "·[2J·red" in done.stdout


def test_the_documented_subscriber_sees_each_alert_once_and_goes_on_where_it_was(
    kafka: str, unique: Callable[[str], str], tmp_path: Path
) -> None:
    topic, group, out = create_topic(kafka, unique("alerts")), unique("subscriber"), tmp_path / "out"

    def run(lines: int) -> list[str]:
        command = [sys.executable, str(ROOT / "docs" / "subscriber.py"), kafka, topic, group]
        with out.open("wb") as file, subprocess.Popen(command, stdout=file) as process:
            until(lambda: len(out.read_text().splitlines()) >= lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        return out.read_text().splitlines()

    send(kafka, topic, [*make(3), *make(1, "host:fs01", 95.0), *make(1, "user:eve", 30.0)])
    assert [line.split()[0] for line in run(5)] == ["new", "more", "over", "new", "over"]
    send(kafka, topic, make(1, "user:mallory"))
    new, over = run(2)
    assert "user mallory" in new
    assert over.startswith("over")


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_documented_jq_filter_gives_a_line_for_each_severe_create() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text()
    (program,) = re.findall(r"jq -r '([^']+)'", page)
    values = b"\n".join(alert.value for alert in [*make(3), *make(1, "host:fs01", 95.0), *make(1, "user:eve", 30.0)])
    done = subprocess.run(["jq", "-r", program], input=values, capture_output=True, check=True)
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [(row[0], "fs01" in row[1]) for row in rows] == [("High", False), ("Critical", True)]
