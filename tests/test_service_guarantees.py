"""What the README guarantees, with nothing stood in for: a fitted detector, the threshold that follows the budget,
`ripcurrent run` as a process, a real Kafka and a real Valkey.

All runs read one topic. Its two partitions let two workers share it; all events lie in one of them, so that the
windows of an undisturbed run are the only right ones.
"""

from __future__ import annotations

import csv
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from loop_harness import Topics, create, until
from p_values import assert_same_p_values, assert_same_scores
from service_process import Service, alerts_of, lines, scores_of, short_training
from test_cli import ripcurrent
from test_window_rebuild import wipe

from streamer.alerting.threshold_ledger import RecordedThresholds
from streamer.devtools.servers import KafkaServer, ValkeyServer, free_port
from streamer.devtools.simulator.generator import schedule, simulate, write
from streamer.training.fit import fit

FIT_DAYS, TEST_DAYS, EVENTS_PER_DAY = 7, 2, 2600
DEFAULT_THRESHOLD = {"threshold": None}
"""The threshold follows the budget of 20 alerts a day and is recorded in the ledger topic."""
SMALL_BATCHES = {"batch_size": 200, "batches_per_transaction": 2, "transaction_latency_ms": 20}
"""So that a fault comes in the middle of the stream."""


def simulated_week(folder: Path) -> None:
    planned = schedule(FIT_DAYS + TEST_DAYS, clean=FIT_DAYS)
    days = list(simulate(seed=3, days=FIT_DAYS + TEST_DAYS, events_per_day=EVENTS_PER_DAY, incidents=planned))
    write(days[:FIT_DAYS], folder / "train.ndjson")
    write(days[FIT_DAYS:], folder / "test.ndjson", folder / "labels.csv")
    with short_training(200):
        fit([folder / "train.ndjson"], folder / "bundle")


@pytest.fixture(scope="module")
def week(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """train.ndjson and a bundle fitted on it; test.ndjson, the days after it, with incidents, and labels.csv."""
    return made_once("simulated-week", simulated_week)


@pytest.fixture(scope="module")
def undisturbed_week(kafka: str, week: Path, redis_url: str) -> Topics:
    topics = create(kafka, f"week-{os.getpid()}")
    events = lines(week / "test.ndjson")
    topics.produce(list(events), 0)
    Service(topics, week / "bundle", redis_url, 8, **DEFAULT_THRESHOLD).run_until(len(events), seconds=240)
    return topics


@pytest.fixture
def topics(undisturbed_week: Topics, unique: Callable[[str], str]) -> Topics:
    """Outputs of their own, the same events."""
    return replace(create(undisturbed_week.bootstrap, unique("week")), source=undisturbed_week.events)


def assert_as_undisturbed(topics: Topics, undisturbed: Topics) -> None:
    assert_same_scores(scores_of(topics), scores_of(undisturbed))
    found, expected = alerts_of(topics), alerts_of(undisturbed)
    assert found.keys() == expected.keys() != set()
    assert {uid: key for uid, (key, _) in found.items()} == {uid: key for uid, (key, _) in expected.items()}
    crossed, expected_crossed = (
        # A Close crosses none.
        {uid: body["unmapped"]["line"] for uid, (_, body) in alerts.items() if body["activity_name"] != "Close"}
        for alerts in (found, expected)
    )
    assert_same_scores(crossed, expected_crossed)
    assert_same_thresholds(topics, undisturbed)


def assert_same_thresholds(topics: Topics, undisturbed: Topics) -> None:
    """The thresholds that the ledgers hold, at the time of each event."""
    times = np.array([orjson.loads(event.value())["time"] for event in topics.read_topic(topics.events)])
    found, expected = (
        RecordedThresholds.read(one.settings(tenant=topics.events)).at(times) for one in (topics, undisturbed)
    )
    assert len(set(expected)) > TEST_DAYS
    assert_same_p_values(found, expected)


def created(topics: Topics) -> set[int]:
    """The offsets of the events that an alert begins with."""
    alerts = [body for _, body in alerts_of(topics).values()]
    return {int(body["unmapped"]["source"]["offset"]) for body in alerts if body["activity_name"] == "Create"}


def test_incidents_are_found_within_the_budget(undisturbed_week: Topics, week: Path) -> None:
    with (week / "labels.csv").open(newline="") as rows:
        incident = [row["sequence"] for row in csv.DictReader(rows)]
    alerted = [incident[offset] for offset in created(undisturbed_week)]
    found, planned = set(alerted) - {""}, set(incident) - {""}
    print(f"{len(found)} of {len(planned)} incidents, {alerted.count('')} false alarms in {TEST_DAYS} days")
    assert len(found) >= len(planned) / 2
    assert alerted.count("") <= 1.5 * 20 * TEST_DAYS


def test_sigkill_leaves_the_alerts_and_scores_of_an_undisturbed_run(
    undisturbed_week: Topics, topics: Topics, week: Path, redis_url: str
) -> None:
    n = len(lines(week / "test.ndjson"))
    service = Service(topics, week / "bundle", redis_url, 9, **DEFAULT_THRESHOLD, **SMALL_BATCHES)
    service.run_until(n // 2, kill=True, seconds=240)
    assert service.done() < n
    service.run_until(n, seconds=240)
    assert_as_undisturbed(topics, undisturbed_week)


def test_a_worker_that_joins_and_one_that_leaves_change_no_alert_and_no_score(
    undisturbed_week: Topics, topics: Topics, week: Path, redis_url: str
) -> None:
    """One reads all, another takes one of its two partitions, and the first leaves: the partition that holds the events
    moves at the one or the other. The first stands still while the second starts, so that there are events left."""
    n = len(lines(week / "test.ndjson"))

    def worker(name: str) -> Service:
        # Whoever stands still keeps its place in the group and its transaction, however long the other takes to start.
        # Kafka may miss the goodbye of one that leaves in the middle of a rebalance; then it is gone after that time.
        properties = ("session.timeout.ms=120000", "transaction.timeout.ms=300000", "heartbeat.interval.ms=500")
        more = {"kafka_instance_id": name, "kafka_property": properties, "batch_size": 20, "transaction_latency_ms": 5}
        more["metrics_port"] = port if name == "two" else 0
        return Service(topics, week / "bundle", redis_url, 10, **DEFAULT_THRESHOLD, **more)

    def readiness() -> str:
        """What /readyz of the second says; empty while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return ""

    port = free_port()
    first, second = worker("one"), worker("two")
    with ExitStack() as outlives:
        with first.running() as leaving:
            until(lambda: first.done() > 200)
            leaving.send_signal(signal.SIGSTOP)
            staying = outlives.enter_context(second.running())
            until(lambda: "no partitions" in readiness())
            leaving.send_signal(signal.SIGCONT)
            until(lambda: readiness().startswith("ok"))
            assert first.done() < n, "all was read before a partition moved"
        until(lambda: staying.poll() is not None or second.done() >= n, 240)
        assert staying.poll() is None
    assert_as_undisturbed(topics, undisturbed_week)


@pytest.mark.extended
def test_a_broker_that_restarts_changes_no_alert_no_score_and_no_threshold(
    undisturbed_week: Topics, week: Path, redis_url: str
) -> None:
    events = lines(week / "test.ndjson")
    n = len(events)
    with KafkaServer() as server:
        topics = create(server.bootstrap, undisturbed_week.name)  # Ids of alerts hold the name of the topic.
        topics.produce(list(events), 0)
        service = Service(topics, week / "bundle", redis_url, 11, **DEFAULT_THRESHOLD, **SMALL_BATCHES)
        with service.running() as process:
            for part, kill in ((n // 4, True), (n // 2, False)):
                until(lambda part=part: service.done() > part)
                server.restart(kill=kill)
                assert service.done() < n, "all was read before the broker restarted"
            until(lambda: process.poll() is not None or service.done() >= n, 240)
            assert process.poll() is None
        assert_as_undisturbed(topics, undisturbed_week)


@pytest.mark.extended
def test_a_redis_that_restarts_with_its_data_changes_no_alert_no_score_and_no_threshold(
    undisturbed_week: Topics, topics: Topics, week: Path
) -> None:
    n = len(lines(week / "test.ndjson"))
    with ValkeyServer({"appendonly": "yes"}) as valkey:
        service = Service(topics, week / "bundle", valkey.url, 0, **DEFAULT_THRESHOLD, **SMALL_BATCHES)
        with service.running() as process:
            for part, kill in ((n // 4, True), (n // 2, False)):
                until(lambda part=part: service.done() > part)
                valkey.restart(kill=kill)
                assert service.done() < n, "all was read before Redis restarted"
            until(lambda: process.poll() is not None or service.done() >= n, 240)
            assert process.poll() is None
    assert_as_undisturbed(topics, undisturbed_week)


@pytest.mark.parametrize(
    "loss",
    [wipe, pytest.param(lambda valkey: valkey.restart(kill=True), marks=pytest.mark.extended)],
    ids=["flushed", "restarted empty"],
)
def test_windows_that_redis_lost_are_filled_again_and_no_score_changes(
    undisturbed_week: Topics, topics: Topics, week: Path, loss: Callable[[ValkeyServer], None]
) -> None:
    n = len(lines(week / "test.ndjson"))
    with ValkeyServer() as valkey:
        service = Service(topics, week / "bundle", valkey.url, 0, **DEFAULT_THRESHOLD, **SMALL_BATCHES)
        with service.running() as process:
            until(lambda: service.done() > n // 3)
            loss(valkey)
            assert service.done() < n, "all was read before Redis lost its windows"
            until(lambda: process.poll() is not None or service.done() >= n, 240)
            assert process.poll() is None
    assert_same_scores(scores_of(topics), scores_of(undisturbed_week))
    assert_same_thresholds(topics, undisturbed_week)
    # Episodes that were open begin anew, so there may be more alerts, and there are none fewer.
    assert created(topics) >= created(undisturbed_week) != set()


def test_a_replay_gives_the_alerts_and_scores_of_the_service(
    undisturbed_week: Topics, week: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"bundle": week / "bundle", "events": undisturbed_week.events, "device": "cpu"}
    flags |= {"tenant": undisturbed_week.events, "ledger": f"{undisturbed_week.name}-ledger"}
    flags |= {"kafka-bootstrap-servers": undisturbed_week.bootstrap, "kafka-group-id": undisturbed_week.name}
    flags |= {"out": "alerts", "scores": "scores", "batch-size": 700}
    done = ripcurrent("replay", *(f"--{name}={value}" for name, value in flags.items()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # The service waits a minute for a partition that brings nothing before it says that an entity is silent; this run
    # is over before. test_inactivity.py compares these.
    alerts = [orjson.loads(line) for line in lines(tmp_path / "alerts")]
    uids = [alert["metadata"]["uid"] for alert in alerts if alert["unmapped"]["cause"] != "sequence:silence"]
    expected = alerts_of(undisturbed_week).items()
    told = [uid for uid, (_, alert) in expected if alert["unmapped"]["cause"] != "sequence:silence"]
    assert sorted(uids) == sorted(told) != []
    scores = [orjson.loads(line) for line in lines(tmp_path / "scores")]
    assert_same_scores({(s["offset"], s["index"]): s["p_value"] for s in scores}, scores_of(undisturbed_week))
