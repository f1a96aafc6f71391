"""The alert line in Kafka: recorded with the alerts that crossed it, the same after a crash, shared by the processes of
a group, and there for a replay."""

from __future__ import annotations

import base64
import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import loop_harness
import numpy as np
import orjson
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from loop_harness import EVENT, EachRow, HashDetector, Topics, create, figure, p_value, partitions_of, running, until

from encoder.ocsf.events import Message
from streamer.alerting.threshold import HOUR_MS, HourCounts, MovingThreshold, threshold_at
from streamer.alerting.threshold_ledger import RecordedThresholds, ThresholdLedger
from streamer.devtools.servers import KafkaServer
from streamer.errors import ConfigurationError
from streamer.kafka.client import TransactionAbortedError
from streamer.kafka.producer import TransactionalPublisher
from streamer.service.loop import Service

RATE = 4000.0
START = EVENT["time"] // HOUR_MS * HOUR_MS


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("ledger"), partitions=1)


def produce_hours(topics: Topics, first: int, n: int) -> None:
    """Events first to first + n of a stream of 200 events an hour."""
    topics.produce([orjson.dumps(EVENT | {"time": START + i * HOUR_MS // 200}) for i in range(first, first + n)])


def service_for(
    topics: Topics, instance: str = "one", before: Callable[[Sequence[Message]], None] = lambda _: None, **more: Any
) -> Service:
    settings = topics.settings(**({"alerts_per_day": 60, "kafka.instance_id": instance} | more))
    ledger = ThresholdLedger(settings, instance, RATE)
    return Service(settings, HashDetector(before), EachRow(), threshold=ledger, instance=instance)


def expected(topics: Topics, n: int) -> tuple[list[str], MovingThreshold]:
    """The alerts of an undisturbed run over `produce_hours(topics, 0, n)` on one partition, and its budget."""
    budget = MovingThreshold(60, RATE)
    labels = [f"{topics.events}:0:{i}:0" for i in range(n)]
    p = np.array([p_value(label) for label in labels])
    episode = [f"record:cause.{i % 5} user:{i % 5}" for i in range(n)]
    threshold = budget.judge(START + np.arange(n) * HOUR_MS // 200, p, episode_key=episode.__getitem__)
    return sorted(label for label, alert in zip(labels, p <= threshold, strict=True) if alert), budget


def test_lines_are_recorded_with_the_alerts_and_give_the_same_alerts_again(topics: Topics) -> None:
    n = 4000
    produce_hours(topics, 0, n)
    service = service_for(topics)
    with running(service) as raised:
        topics.wait_until_read(n)
    assert raised == []
    alerts, budget = expected(topics, n)
    assert topics.alerts() == alerts != []
    assert len(RecordedThresholds.read(topics.settings())) == 0  # for another budget
    thresholds = RecordedThresholds.read(topics.settings(alerts_per_day=60))
    assert len(thresholds) == len(budget.thresholds) >= 20
    labels = [f"{topics.events}:0:{i}:0" for i in range(n)]
    replayed = thresholds.at(START + np.arange(n) * HOUR_MS // 200)
    assert (
        sorted(x for x, threshold in zip(labels, replayed.tolist(), strict=True) if p_value(x) <= threshold) == alerts
    )
    assert figure(service, "line_p_value") == budget.thresholds[-1].in_force


def assert_undisturbed(topics: Topics, n: int) -> None:
    """Alerts and recorded thresholds are those of an undisturbed run over `produce_hours(topics, 0, n)`."""
    alerts, budget = expected(topics, n)
    assert topics.alerts() == alerts != []
    times = START + np.arange(n) * HOUR_MS // 200
    recorded = RecordedThresholds.read(topics.settings(alerts_per_day=60))
    assert recorded.at(times).tolist() == threshold_at(budget.thresholds, times).tolist()


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["the same", "another"])
def test_a_process_that_is_started_again_goes_on_with_what_was_spent_and_by_which_episodes(
    topics: Topics, names: list[str]
) -> None:
    n, parts = 4000, 5
    for part in range(parts):
        produce_hours(topics, part * n // parts, n // parts)
        with running(service_for(topics, names[part % len(names)])) as raised:
            topics.wait_until_read((part + 1) * n // parts)
        assert raised == []
    assert_undisturbed(topics, n)


@pytest.mark.extended
def test_a_process_that_is_killed_and_started_again_has_the_thresholds_of_an_undisturbed_run(topics: Topics) -> None:
    n = 4000
    produce_hours(topics, 0, n)
    flags = json.loads(topics.settings(alerts_per_day=60, batches_per_transaction=3).model_dump_json())
    arguments = {k: v for k, v in flags.items() if k not in ("kafka", "redis", "threshold", "events")}
    arguments |= {"kafka.bootstrap_servers": topics.bootstrap, "kafka.group_id": topics.name, "events": topics.events}
    arguments |= {"kafka.instance_id": "one", "kafka.properties": {"session.timeout.ms": 6000}}
    arguments |= {"delay": 0.02, "events_per_day": RATE}
    command = [sys.executable, loop_harness.__file__, json.dumps(arguments)]
    done = lambda: sum(max(offset, 0) for offset in topics.committed().values())  # noqa: E731
    for part in range(1, 4):
        with subprocess.Popen(command) as process:
            until(lambda part=part: done() >= part * n // 5 or process.poll() is not None, 60)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert done() < n
    with subprocess.Popen(command) as process:
        until(lambda: done() >= n or process.poll() is not None, 60)
        process.terminate()
    assert process.returncode == 0
    assert_undisturbed(topics, n)


def test_the_new_owner_of_a_partition_knows_the_episodes_of_the_one_before(topics: Topics) -> None:
    settings = topics.settings(alerts_per_day=60)
    before, after = (ThresholdLedger(settings, name, RATE) for name in ("before", "after"))
    producer = Producer({"bootstrap.servers": topics.bootstrap})
    scored = HashDetector().score([Message(topics.events, 1, i, -1, orjson.dumps(EVENT)) for i in range(3)])
    alerted = replace(scored, p_value=np.full(3, 0.5 * 60 / RATE))
    for ledger in (before, after):
        ledger.open()
    after.judge(HashDetector().score([]), {(topics.events, 0): 0})
    before.judge(alerted, {(topics.events, 1): 0})
    for output in before.outputs(0):
        producer.produce(output.topic, output.value, output.key)
    assert producer.flush(10) == 0
    after.judge(alerted, {(topics.events, 0): 0, (topics.events, 1): 3})
    counted = [orjson.loads(output.value or b"") for output in after.outputs(0) if b":tally:" in (output.key or b"")]
    for ledger in (before, after):
        ledger.close()
    assert [tally["events"] for tally in counted] == [3]
    assert [tally["spent"] for tally in counted] == [0]


def test_episodes_that_are_over_leave_the_ledger_also_those_of_a_process_that_is_gone(topics: Topics) -> None:
    produce_hours(topics, 0, 1000)
    with running(service_for(topics, "gone")) as raised:
        topics.wait_until_read(1000)
    produce_hours(topics, 1000, 3000)
    with running(service_for(topics, "here")) as raised_too:
        topics.wait_until_read(4000)
    assert raised == raised_too == []
    kept: dict[str, bytes | None] = {message.key().decode(): message.value() for message in topics.read("ledger")}
    episodes = [key for key, value in kept.items() if ":episode:" in key and value is not None]
    assert {key.rsplit(":", 1)[1] for key in episodes} == {"here"}
    assert len(episodes) <= 5
    assert any(":episode:" in key and key.endswith(":gone") for key in kept)


def test_the_ledger_of_the_release_before_is_read(topics: Topics) -> None:
    folder = Path(__file__).parent / "fixtures" / "release-0.1.0" / "half"
    newest, in_force = -1, 0.0
    producer = Producer({"bootstrap.servers": topics.bootstrap})
    with gzip.open(folder / "ledger.ndjson.gz") as file:
        for record in map(orjson.loads, file):
            key, value = (record[name] and base64.b64decode(record[name]) for name in ("key", "value"))
            producer.produce(f"{topics.name}-ledger", value, key)
            _, kind, number = key.decode().split(":")[:3]
            if kind == "line" and int(number) > newest:
                newest, in_force = int(number), orjson.loads(value)["in_force"]
    assert producer.flush(10) == 0
    ledger = ThresholdLedger(topics.settings(tenant="release"), "one", RATE)
    ledger.open()
    ledger.close()
    assert ledger.threshold == in_force > 0


def test_what_was_judged_in_an_aborted_transaction_is_not_spent(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 2000
    produce_hours(topics, 0, n)
    service = service_for(topics, transaction_latency_ms=1000)
    publish, calls = TransactionalPublisher.publish, [0]

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 4):
            raise TransactionAbortedError("as if the broker had gone away")
        return publish(*arguments)

    monkeypatch.setattr(TransactionalPublisher, "publish", failing)
    with running(service) as raised:
        topics.wait_until_read(n)
    assert raised == []
    assert calls[0] > 4
    assert topics.alerts() == expected(topics, n)[0]


def test_what_a_thousand_instances_that_are_gone_have_counted_is_removed_in_time(topics: Topics) -> None:
    """One restart an hour, each under a new name, in the thousand hours before the stream."""
    producer = Producer({"bootstrap.servers": topics.bootstrap, "linger.ms": 5})
    newest, tenant = START // HOUR_MS, topics.settings().tenant
    for age in range(1000, 0, -1):
        counts = orjson.dumps(asdict(HourCounts(events=200, expected=1.0, uncorrected=1.0)))
        for hour in (newest - age, newest - age - 1):
            producer.produce(f"{topics.name}-ledger", counts, f"{tenant}:tally:{hour}:pod-{age}")
        last = orjson.dumps({"last": (newest - age) * HOUR_MS})
        producer.produce(f"{topics.name}-ledger", last, f"{tenant}:episode:{age:016x}:pod-{age}")
    assert producer.flush(30) == 0
    produce_hours(topics, 0, 400)
    with running(service_for(topics)) as raised:
        topics.wait_until_read(400)
    assert raised == []
    reader = ThresholdLedger(topics.settings(), "reader", RATE)
    reader.open()
    reader.close()
    hours = {hour for hour, instance in reader._records.tallies if instance != "one"}
    assert hours == set(range(newest + 1 - 174, newest))
    assert len(reader._records.tallies) <= 2 * 174
    assert len([digest for digest, instance in reader._records.episodes if instance != "one"]) <= 3


def test_two_processes_share_one_line_and_one_budget(kafka: str, unique: Callable[[str], str]) -> None:
    topics = create(kafka, unique("ledger"), partitions=4)
    slow = lambda _: time.sleep(0.01)  # noqa: E731
    first, second = service_for(topics, "a", slow), service_for(topics, "b", slow)
    with running(first) as raised, running(second) as raised_too:
        until(lambda: partitions_of(first) == partitions_of(second) == 2)
        for step in range(10):
            produce_hours(topics, step * 200, 200)
            time.sleep(0.2)
        topics.wait_until_read(2000)
    assert raised == raised_too == []
    records = [(message.key().decode(), message.value()) for message in topics.read("ledger")]
    decided = [key for key, _ in records if ":line:" in key]
    assert len(decided) == len(set(decided)) >= 8, "one of the two decides each threshold"
    counted: Counter[int] = Counter()
    spent_in: Counter[int] = Counter()
    for key, value in dict(records).items():
        if ":tally:" in key and value is not None:
            hour, tally = int(key.split(":")[2]), orjson.loads(value)
            counted[hour] += tally["events"]
            spent_in[hour] += tally["spent"]
    assert counted.total() == 2000
    spent = [sum(spent_in[h] for h in counted if h0 <= h < h0 + 6) for h0 in counted]
    assert 0 < max(spent) <= 30 + 5  # Until one has read what the other spent, it may spend too.
    assert len(topics.alerts()) >= spent_in.total() > 0


def test_a_broker_that_is_away_while_a_rebalance_makes_a_process_decide_lines_is_waited_for(
    unique: Callable[[str], str],
) -> None:
    n = 600
    with KafkaServer() as server:
        topics = create(server.bootstrap, unique("away"), partitions=1)
        produce_hours(topics, 0, n)
        taken, away = threading.Event(), threading.Event()

        def hold(_: Sequence[Message]) -> None:
            """The first batch is in hand, and its lines are decided next, when the broker goes away."""
            taken.set()
            assert away.wait(30)

        service = service_for(topics, before=hold)
        with running(service) as raised:
            assert taken.wait(60)
            server.kill()
            away.set()
            until(lambda: service.not_ready() != "" or raised != [])
            server.start()
            until(lambda: raised != [] or sum(topics.committed().values()) >= n, 90)
        assert raised == []
        assert topics.alerts() == expected(topics, n)[0] != []


def test_a_ledger_that_kafka_would_forget_is_refused(kafka: str, unique: Callable[[str], str], topics: Topics) -> None:
    name = unique("forgetful")
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(name, 1, 1)])[name].result(10)
    with pytest.raises(ConfigurationError, match=r"cleanup\.policy=compact"):
        ThresholdLedger(topics.settings(ledger=name), "one", RATE).open()
    with pytest.raises(ValueError, match="no threshold"):
        RecordedThresholds.read(topics.settings()).at(np.array([0]))
