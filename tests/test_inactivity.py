"""Silence in the service: found by event time, told once through restarts, SIGKILL, lost windows and other workers, and
found again by a replay."""

from __future__ import annotations

import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import redis
import service_process
from alert_samples import VALIDATOR
from loop_harness import EachRow, Topics, create, figure, partitions_of, running, until
from numpy.typing import NDArray
from service_process import alerts_of, lines
from test_replay import alerts_in, replay

from state.calibration import Calibration
from streamer.alerting.finding_frame import Alert
from streamer.alerting.pipeline import open_episodes, open_findings
from streamer.bundles.bundle_files import load, save
from streamer.detection.batches import ScoredBatch
from streamer.explain.attribution import Explainer
from streamer.redaction import MASK, Redacted, Redactor
from streamer.service.entity_state import open_detector
from streamer.service.loop import Service

TIMER_BYTES = 36
"""Of a value in Redis, before the event (timers.lua)."""
LINE = 0.4
"""At this line some silences are alerts."""
Alerts = dict[str, tuple[bytes, dict[str, Any]]]

DIES = """
import os, signal, sys
import streamer.alerting.pipeline as findings
inner, left = findings.AlertPipeline.alerts, [int(sys.argv.pop(1))]
def alerts(self, scored, rows):
    found = inner(self, scored, rows)
    left[0] -= scored.inactive is not None
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
findings.AlertPipeline.alerts = alerts
from streamer.cli.main import main
main()
"""
"""The command, which kills itself when silences have been found and decided on for the n-th time, and Kafka knows
nothing of it."""


@pytest.fixture(scope="module")
def folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in all tests, but with a bundle to which an ending that is a little odder than half of those of training is
    very odd: so short a day and training have too few endings for any of them to be."""
    anxious = tmp_path_factory.mktemp("anxious")
    for name in ("train.ndjson", "test.ndjson"):
        (anxious / name).symlink_to(folder / name)
    bundle = load(folder / "bundle")
    sequences = bundle.scorer.sequences
    assert sequences is not None
    for name, known in sequences.calibrations.items():
        if name.startswith("ending."):
            middle, high = np.quantile(known.scores, [0.5, 0.9])
            sequences.calibrations[name] = Calibration(known.scores, float(middle), float(high - middle) / 20 + 1e-3)
    save(
        anxious / "bundle", encoder=bundle.encoder, scorer=bundle.scorer, exemplars=bundle.exemplars,
        anonymised=bundle.anonymised, profile=bundle.profile, training=bundle.manifest["training"], codes=bundle.codes,
    )  # fmt: skip
    return anxious


def silent(alerts: Alerts) -> set[str]:
    return {uid for uid, (_, body) in alerts.items() if body["unmapped"]["cause"] == "sequence:silence"}


@pytest.fixture(scope="module")
def events(folder: Path) -> list[bytes]:
    return lines(folder / "test.ndjson")[:1500]


@pytest.fixture(scope="module")
def straight(kafka: str, folder: Path, redis_url: str, events: list[bytes]) -> Topics:
    """An undisturbed run."""
    topics = create(kafka, "silence-straight", partitions=1)
    topics.produce(events, 0)
    with running(service_for(topics, folder, redis_url, batch_size=2048)) as raised:
        topics.wait_until_read(len(events))
    assert raised == []
    return topics


@pytest.fixture
def topics(straight: Topics, unique: Callable[[str], str]) -> Topics:
    """Outputs of their own, the same events: alerts have the ids of the undisturbed run."""
    return replace(create(straight.bootstrap, unique("silence"), partitions=1), source=straight.events)


def test_a_silence_is_an_alert_on_the_last_event_told_at_a_later_one(straight: Topics, events: list[bytes]) -> None:
    found = {}
    for message in straight.read("alerts"):
        body = orjson.loads(message.value())
        if body["unmapped"]["cause"] == "sequence:silence" and body["activity_name"] != "Close":
            assert not list(VALIDATOR.iter_errors(body))
            if message.key().startswith(b"correlation:"):
                found.setdefault(message.key(), body)  # Updates may be about others of whom the same is told.
    assert len(found) >= 3
    for key, body in found.items():
        run = key.removeprefix(b"correlation:")
        last = max(n for n, event in enumerate(events) if run in event)
        assert body["unmapped"]["source"]["offset"] == last
        assert orjson.loads(body["raw_data"])["metadata"]["uid"] == orjson.loads(events[last])["metadata"]["uid"]
        assert body["finding_info"]["title"].startswith("Unusual silence of ")


@pytest.mark.extended
def test_a_replay_finds_the_same_silences(straight: Topics, folder: Path, tmp_path: Path) -> None:
    replay(straight, folder / "bundle", "--line", LINE, "--out", tmp_path / "out", "--batch-size", 61)
    live = alerts_of(straight)
    assert alerts_in(tmp_path / "out").keys() == live.keys()
    replay(straight, folder / "bundle", "--line", LINE, "--out", tmp_path / "part", "--from", 700, "--to", "0=1100")
    part = {uid for uid, body in alerts_in(tmp_path / "part").items() if uid in silent(live)}
    assert part < silent(live)


def service_for(topics: Topics, folder: Path, redis_url: str, alerting: Any = None, **more: Any) -> Service:
    """`ripcurrent run`, in this process."""
    flags = {"redis.url": redis_url.removesuffix("/0") + "/2", "tenant": topics.name, "scores": "", "batch_size": 50}
    settings = topics.settings(**(flags | more))
    detector, remembering = open_detector(settings, folder / "bundle")
    findings = alerting or open_findings(
        settings, Explainer(detector.bundle, detector.windows), open_episodes(settings)
    )
    return Service(settings, detector, findings, threshold=LINE, windows=remembering)


@pytest.mark.extended
def test_a_restart_while_somebody_is_waited_for_changes_nothing_also_as_another_worker(
    straight: Topics, topics: Topics, folder: Path, redis_url: str
) -> None:
    with running(service_for(topics, folder, redis_url)) as raised:
        topics.wait_until_read(500)
    with running(service_for(topics, folder, redis_url, batch_size=64, **{"kafka.instance_id": "two"})) as later:
        topics.wait_until_read(1500)
    assert raised == later == []
    assert_same(topics, straight)


@pytest.mark.extended
def test_events_are_masked_in_redis_and_alerts_tell_the_same(
    topics: Topics,
    straight: Topics,
    folder: Path,
    redis_url: str,
    events: list[bytes],
    unique: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = ["actor.user.name", "device.hostname", "process.cmd_line"]
    timers: set[bytes] = set()
    with redis.Redis.from_url(redis_url.removesuffix("/0") + "/2") as server:

        def seen() -> int:
            for key in server.keys(f"{{{topics.name}}}:timers:*:open"):
                timers.update(server.hvals(key))
            return len(timers)

        with running(service_for(topics, folder, redis_url, redact=hidden)) as raised:
            until(lambda: seen() >= 3, 120)
    kept = [orjson.loads(zlib.decompress(timer[TIMER_BYTES:]))["event"] for timer in timers]
    assert all(MASK.encode() in orjson.dumps(event) for event in kept)
    assert {event["device"]["hostname"] for event in kept if "device" in event} == {MASK}
    with running(service_for(topics, folder, redis_url, redact=hidden)) as later:
        topics.wait_until_read(len(events), 200)
    assert raised == later == []

    class Nothing(Redactor):
        def record(self, record: Mapping[str, Any]) -> Redacted:
            return Redacted(dict(record), frozenset(), cut=False)

    plain = replace(create(straight.bootstrap, unique("silence"), partitions=1), source=straight.events)
    with monkeypatch.context() as patch:
        patch.setattr("streamer.service.entity_state.Redactor", Nothing)
        service = service_for(plain, folder, redis_url, redact=hidden)
    with running(service) as raised:
        plain.wait_until_read(len(events), 200)
    assert raised == []
    assert len(silent(alerts_of(plain))) >= 3
    assert told_of(topics) == told_of(plain)


def told_of(topics: Topics) -> Alerts:
    """Alerts without tenant and clock; of a silence without how its last event compares with others by itself."""
    alerts = alerts_of(topics)
    for uid in alerts:
        body = alerts[uid][1]
        del body["metadata"]["tenant_uid"], body["finding_info"]["created_time"]
        if body["unmapped"]["cause"] == "sequence:silence":
            body["evidences"] = body["anomaly_analyses"] = None
            body["unmapped"]["nearest_normal"] = body["finding_info"]["desc"] = None
    return alerts


@pytest.mark.extended
@pytest.mark.parametrize("what", [b":timers:", b":"], ids=["timers", "timers and windows"])
def test_timers_that_redis_lost_come_back_with_the_windows(
    straight: Topics, topics: Topics, folder: Path, redis_url: str, what: bytes
) -> None:
    """While it runs, and between two starts."""

    def lose() -> None:
        with redis.Redis.from_url(redis_url.removesuffix("/0") + "/2") as server:
            keys = [key for key in server.scan_iter(f"{{{topics.name}*") if b":episodes:" not in key and what in key]
            assert any(b":timers:" in key for key in keys)
            server.delete(*keys)

    first = service_for(topics, folder, redis_url)
    with running(first) as raised:
        topics.wait_until_read(300)
        lose()
        until(lambda: figure(first, "window_losses_total") >= 1)
        topics.wait_until_read(600)
    lose()
    second = service_for(topics, folder, redis_url)
    with running(second) as later:
        topics.wait_until_read(1500)
    assert raised == later == []
    assert figure(second, "window_losses_total") >= 1
    assert_same(topics, straight)


class EachSilence(EachRow):
    """An alert for each silence, and for nothing else."""

    def alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Alert]:
        inactive = scored.inactive
        if inactive is None or inactive.noticed_at is None:
            return []
        uids = [f"{entity}|{inactive.coordinates.label(row)}" for row, entity in enumerate(inactive.entity)]
        return [
            Alert(uid, uid.encode(), orjson.dumps({"uid": uid}), [], row=row)
            for uid, row in zip(uids, inactive.noticed_at.tolist(), strict=True)
        ]


@pytest.mark.extended
def test_workers_that_come_and_go_tell_each_silence_once_and_none_that_another_partition_refutes(
    kafka: str, unique: Callable[[str], str], folder: Path, redis_url: str, events: list[bytes]
) -> None:
    """What an entity does lies in both partitions, as input without keys does."""
    topics = create(kafka, unique("silence"), partitions=2)
    ends, seen = dict[str, int](), [orjson.loads(event) for event in events]
    times = {event["metadata"]["uid"]: event["time"] for event in seen}
    for number, event in enumerate(seen):
        if run := event["metadata"].get("correlation_uid"):
            ends[f"correlation:{run}"] = number
    topics.produce(events)
    first, second = (
        service_for(topics, folder, redis_url, EachSilence(), **{"kafka.instance_id": name}) for name in ("a", "b")
    )
    with running(first) as raised:
        topics.wait_until_read(400)
        with running(second) as later:
            until(lambda: partitions_of(second) == 1)
            topics.wait_until_read(900)
        topics.wait_until_read(1500)
        for hours in (1, 2):  # Both clocks beyond everything, then an event in each to tell it at.
            last = {**seen[0], "time": max(times.values()) + 3_600_000 * hours}
            last["metadata"] = {key: value for key, value in last["metadata"].items() if key != "correlation_uid"}
            for partition in (0, 1):
                topics.produce([orjson.dumps(last)], partition)
            topics.wait_until_read(1500 + 2 * hours)
    assert raised == later == []
    expected = {f"{entity}|{topics.events}:{n % 2}:{n // 2}:0" for entity, n in ends.items()}
    assert sorted(topics.alerts()) == sorted(expected)


def test_sigkill_between_a_silence_and_its_commit_loses_and_doubles_nothing(
    straight: Topics, topics: Topics, folder: Path, redis_url: str
) -> None:
    flags = {"batch_size": 100, "tenant": topics.name}
    command = service_process.Service(
        topics, folder / "bundle", redis_url, 2, threshold=LINE, scores="", **flags
    ).command
    for n in (1, 3):
        killed = [sys.executable, "-c", DIES, str(n), *command[command.index("run") :]]
        done = subprocess.run(killed, timeout=90, check=False)
        assert done.returncode == -signal.SIGKILL
    with running(service_for(topics, folder, redis_url, batch_size=77)) as raised:
        topics.wait_until_read(1500)
    assert raised == []
    assert_same(topics, straight)


def assert_same(topics: Topics, straight: Topics) -> None:
    found, expected = alerts_of(topics), alerts_of(straight)
    assert found.keys() == expected.keys()
    for uid in silent(expected):
        assert found[uid][1]["count"] == expected[uid][1]["count"]
