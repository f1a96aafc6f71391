"""Silence in the service: found by event time, told once through restarts, SIGKILL, lost windows and other workers, and
found again by a replay."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from stream import Topics, create
from test_replay import alerts_in, replay
from whole import Service, alerts_of, lines, undisturbed_run

LINE = 0.4
"""The short training of these tests tells little: at this line some silences are alerts."""
Alerts = dict[str, tuple[bytes, dict[str, Any]]]

DIES = """
import os, signal, sys
import streamer.findings as findings
inner, left = findings.Findings.alerts, [int(sys.argv.pop(1))]
def alerts(self, scored, rows):
    found = inner(self, scored, rows)
    left[0] -= scored.silences is not None
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
findings.Findings.alerts = alerts
from streamer.cli import main
main()
"""
"""The command, which kills itself when silences have been found and decided on for the n-th time, and Kafka knows
nothing of it."""


def silent(alerts: Alerts) -> set[str]:
    return {uid for uid, (_, body) in alerts.items() if body["unmapped"]["cause"] == "sequence:silence"}


@pytest.fixture(scope="module")
def events(folder: Path) -> list[bytes]:
    return lines(folder / "test.ndjson")[:1500]


@pytest.fixture(scope="module")
def straight(kafka: str, folder: Path, redis_url: str, events: list[bytes]) -> Topics:
    """An undisturbed run."""
    topics = create(kafka, "silence-straight", partitions=1)
    undisturbed_run(topics, folder / "bundle", redis_url, events, line=LINE)
    return topics


@pytest.fixture
def topics(straight: Topics, unique: Callable[[str], str]) -> Topics:
    """Outputs of their own, the same events: alerts have the ids of the undisturbed run."""
    return replace(create(straight.bootstrap, unique("silence"), partitions=1), source=straight.events)


def test_a_silence_is_an_alert_on_the_last_event_told_at_a_later_one(straight: Topics, events: list[bytes]) -> None:
    alerts = alerts_of(straight)
    assert len(silent(alerts)) >= 3
    messages = {message.headers()[0][1]: message for message in straight.read("alerts")}
    assert messages
    for uid in silent(alerts):
        key, body = alerts[uid]
        assert key.startswith(b"correlation:")
        if body["activity_name"] == "Close":
            continue
        source = body["unmapped"]["source"]
        assert key.removeprefix(b"correlation:") in events[source["offset"]]
        later = [event for event in events[source["offset"] + 1 :] if key.removeprefix(b"correlation:") in event]
        assert not later, "nothing followed"


def test_a_replay_finds_the_same_silences(straight: Topics, folder: Path, tmp_path: Path) -> None:
    replay(straight, folder / "bundle", "--line", LINE, "--out", tmp_path / "out", "--batch-size", 61)
    live = alerts_of(straight)
    assert alerts_in(tmp_path / "out").keys() == live.keys()
    replay(straight, folder / "bundle", "--line", LINE, "--out", tmp_path / "part", "--from", 700, "--to", "0=1100")
    part = {uid for uid, body in alerts_in(tmp_path / "part").items() if uid in silent(live)}
    assert part < silent(live)


def test_a_restart_while_somebody_is_waited_for_changes_nothing_also_as_another_worker(
    straight: Topics, topics: Topics, folder: Path, redis_url: str
) -> None:
    Service(topics, folder / "bundle", redis_url, 2, line=LINE, batch_size=100, tenant="restart").run_until(500)
    later = Service(
        topics, folder / "bundle", redis_url, 2, line=LINE, batch_size=64, tenant="restart", kafka_instance_id="two"
    )
    later.run_until(1500)
    assert_same(topics, straight)


def test_sigkill_between_a_silence_and_its_commit_loses_and_doubles_nothing(
    straight: Topics, topics: Topics, folder: Path, redis_url: str
) -> None:
    service = Service(topics, folder / "bundle", redis_url, 3, line=LINE, batch_size=100, tenant="killed")
    arguments = service.command[service.command.index("run") :]
    for n in (1, 3):
        done = subprocess.run([sys.executable, "-c", DIES, str(n), *arguments], timeout=90, check=False)
        assert done.returncode == -signal.SIGKILL
    assert service.done() < 1500
    Service(topics, folder / "bundle", redis_url, 3, line=LINE, batch_size=77, tenant="killed").run_until(1500)
    assert_same(topics, straight)


@pytest.mark.parametrize("what", ["timers", "everything but the episodes"])
def test_timers_that_redis_lost_come_back_with_the_windows(
    straight: Topics, topics: Topics, folder: Path, redis_url: str, what: str
) -> None:
    service = Service(topics, folder / "bundle", redis_url, 4, line=LINE, batch_size=50, tenant=topics.name)
    service.run_until(300, kill=True)
    assert service.done() < 1500
    with redis.Redis.from_url(redis_url.removesuffix("/0") + "/4") as server:
        keys = [key for key in server.scan_iter() if b":episodes:" not in key]
        keys = [key for key in keys if what != "timers" or b":timers:" in key]
        assert any(b":timers:" in key for key in keys)
        server.delete(*keys)
    service.run_until(1500)
    assert_same(topics, straight)


def assert_same(topics: Topics, straight: Topics) -> None:
    found, expected = alerts_of(topics), alerts_of(straight)
    assert found.keys() == expected.keys()
    for uid in silent(expected):
        assert found[uid][1]["count"] == expected[uid][1]["count"]
