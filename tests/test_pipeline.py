"""What is published is told once: through kill -9 at the worst moment, in a storm, and from a file as from a topic."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import NOW, WORD, check, explanation, scored
from cpu_time import least_cpu_s
from loop_harness import HashDetector, Topics, create, findings, running

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from state.episodes import CLOSE, CREATE, UPDATE
from state.memory.episodes import MemoryEpisodes
from streamer.alerting.finding_frame import Alert
from streamer.alerting.pipeline import AlertPipeline
from streamer.detection.batches import ScoredBatch
from streamer.redaction import Redactor
from streamer.service.loop import Service

Json = dict[str, Any]


class Quiet:
    """Explains nothing, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def explain(self, scored: ScoredBatch, rows: np.ndarray[Any, Any]) -> list[Any]:
        self.asked += len(rows)
        return [explanation() for _ in rows]


def with_threshold(batch: ScoredBatch) -> ScoredBatch:
    return replace(batch, threshold=np.full(len(batch), 1e-4))


def published(batch: ScoredBatch, **options: Any) -> list[Alert]:
    return AlertPipeline(Quiet(), MemoryEpisodes(), bundle_version="b", **options).alerts(
        with_threshold(batch), np.arange(len(batch))
    )


def test_a_storm_is_explained_a_few_times_and_costs_less_than_scoring_it() -> None:
    hosts = [{**WORD, "device": {"hostname": f"PC-{i % 700}"}, "time": WORD["time"] + i} for i in range(8192)]
    batches = [scored(hosts[start : start + 2048]) for start in range(0, 8192, 2048)]
    for number, batch in enumerate(batches):
        batch.coordinates.offset[:] += 2048 * number
        batch.entity[:] = [f"host:pc-{record['device']['hostname'][3:]}" for record in batch.records]
    quiet = Quiet()
    made = AlertPipeline(quiet, MemoryEpisodes(), bundle_version="b")
    began = time.process_time()
    alerts = [alert for batch in batches for alert in made.alerts(with_threshold(batch), np.arange(len(batch)))]
    per_event = (time.process_time() - began) / 8192
    assert Counter(alert.activity for alert in alerts) == {CREATE: 1, UPDATE: 4}
    assert quiet.asked == 5
    messages = [Message("events", 0, i, -1, orjson.dumps(record)) for i, record in enumerate(hosts)]
    ratio = per_event / (least_cpu_s(lambda: decode(messages), 2) / len(messages))
    print(f"an event of the storm costs {ratio:.1f} times what decoding it does; scoring it costs a dozen times")
    assert ratio < 12


def test_the_entity_of_a_story_is_masked_also_where_its_close_is_told() -> None:
    batch = scored([{**WORD, "time": WORD["time"] + 7_200_000 * i} for i in range(2)], entity="user:bob")
    alerts = published(batch, redactor=Redactor(["actor.user.name"]))
    assert [alert.activity for alert in alerts] == [CREATE, CREATE, CLOSE]
    for alert in alerts:
        check(alert)
        assert b"bob" not in alert.value
        assert alert.key == b"user:[masked]"


def test_a_batch_delivered_again_gives_the_same_messages() -> None:
    batch = with_threshold(scored([WORD] * 12))
    made = AlertPipeline(Quiet(), MemoryEpisodes(), bundle_version="b", clock=lambda: NOW / 1000)
    rows = np.arange(12)
    first = made.alerts(batch, rows)
    assert [alert.activity for alert in first] == [CREATE, UPDATE, UPDATE]
    assert made.alerts(batch, rows) == first
    assert made.alerts(batch, rows[:0]) == first, "also where the line has moved meanwhile"


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Iterator[Topics]:
    yield create(kafka, unique("findings"), partitions=1)


def findings_of(topics: Topics) -> dict[str, Json]:
    """By id; each is there once."""
    found = [orjson.loads(message.value()) for message in topics.read("alerts")]
    by_uid = {finding["metadata"]["uid"]: finding for finding in found}
    assert len(by_uid) == len(found)
    return by_uid


def test_kill_9_between_the_write_to_redis_and_the_commit_loses_and_doubles_nothing(
    topics: Topics, redis_url: str
) -> None:
    """The decision is stored and Kafka knows nothing of it: the next start publishes what was decided."""
    n = 3000
    topics.produce_events(n)
    straight = replace(create(topics.bootstrap, f"{topics.name}-straight", partitions=1), source=topics.events)
    detector = HashDetector()
    service = Service(straight.settings(), detector, findings(detector, redis_url, straight.name), threshold=0.02)
    with running(service) as raised:
        straight.wait_until_read(n)
    assert raised == []

    arguments = {"kafka.bootstrap_servers": topics.bootstrap, "kafka.group_id": topics.name, "events": topics.events}
    arguments |= {"kafka.instance_id": "one", "kafka.properties": {"session.timeout.ms": 6000}, "metrics_port": 0}
    names = {name: f"{topics.name}-{suffix}" for name, suffix in (("alerts", "alerts"), ("dead_letters", "dead"))}
    arguments |= {"start": "earliest", "batch_size": 50, "linger_ms": 10, **names}
    for dies_at in (1, 2):
        command = [sys.executable, str(Path(__file__).with_name("loop_harness.py"))]
        command.append(json.dumps(arguments | {"episodes": redis_url, "dies_at": dies_at}))
        assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    command[-1] = json.dumps(arguments | {"episodes": redis_url})
    with subprocess.Popen(command) as process:
        topics.wait_until_read(n)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0

    expected, found = findings_of(straight), findings_of(topics)
    assert found.keys() == expected.keys()
    assert sum(finding["activity_id"] == CREATE for finding in found.values()) == 5
    for uid, finding in expected.items():
        for name in ("count", "activity_id", "start_time", "end_time"):
            assert found[uid][name] == finding[name]
    assert max(finding["count"] for finding in found.values()) >= 10
