"""Outputs above the limit of their topic: each is replaced by something small, and none stops the stream or waits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)
from loop_harness import EVENT, LINE, EachRow, HashDetector, Topics, create, p_value, running, until

from state.episode_rules import TIMEOUT_MS
from state.memory.episodes import MemoryEpisodes
from streamer.alerting.pipeline import AlertPipeline
from streamer.errors import StreamError
from streamer.kafka.dead_letter_reader import letter_of, redrive
from streamer.service.loop import Service

Limited = Callable[[str, int], str]


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("large"), partitions=1)


@pytest.fixture
def limited(topics: Topics) -> Limited:
    """Makes a topic that takes no more than so many bytes at once: limited("dead", 20_000)."""

    def make(suffix: str, size: int) -> str:
        name = f"{topics.name}-{suffix}-limited"
        new = NewTopic(name, 1, 1, config={"max.message.bytes": str(size)})
        admin = AdminClient({"bootstrap.servers": topics.bootstrap})
        admin.create_topics([new])[name].result(20)
        return name

    return make


def events(n: int, time: int = EVENT["time"]) -> list[bytes | None]:
    return [orjson.dumps(EVENT | {"time": time + i}) for i in range(n)]


def noise(n: int, size: int) -> list[bytes | None]:
    return [random.Random(i).randbytes(size) for i in range(n)]


def aborted(service: Service) -> float:
    return service.metrics.registry.get_sample_value("ripcurrent_transactions_total", {"outcome": "aborted"}) or 0


def stubs(messages: list[Any]) -> dict[int, Any]:
    """The body of each stub, by the offset that it is about."""
    bodies = [orjson.loads(m.value()) for m in messages if "ripcurrent.stub" in dict(m.headers())]
    return {body["offset"]: body for body in bodies}


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_a_hundred_dead_letters_that_are_too_large_are_stubs_at_once(
    topics: Topics, limited: Limited, delivery: str
) -> None:
    dead, large = limited("dead", 20_000), noise(100, 40_000)
    repeated = b"{" * 40_000  # compressed it is small, and Kafka takes it
    topics.produce([*large, b"small", repeated, *events(50)])
    service = Service(topics.settings(dead_letters=dead, delivery=delivery), HashDetector(), EachRow(), threshold=LINE)
    with running(service) as raised:
        topics.wait_until_read(152)
    assert raised == []
    assert aborted(service) == 0
    found = topics.read_topic(dead)
    assert len(found) == 102
    assert {message.value() for message in found} >= {b"small", repeated}
    hashes = {offset: body["sha256"] for offset, body in stubs(found).items()}
    assert hashes == {i: hashlib.sha256(value or b"").hexdigest() for i, value in enumerate(large)}
    assert len(topics.read("scores")) == 50


def test_a_limit_that_falls_while_the_service_runs_makes_stubs_of_what_is_above_it_alone(
    topics: Topics, limited: Limited
) -> None:
    dead, large = limited("dead", 1_000_000), noise(20, 40_000)
    service = Service(topics.settings(dead_letters=dead), HashDetector(), EachRow(), threshold=LINE)
    with running(service) as raised:
        topics.produce([b"first"])
        topics.wait_until_read(1)
        entry = ConfigEntry("max.message.bytes", "20000", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, dead, incremental_configs=[entry])
        admin = AdminClient({"bootstrap.servers": topics.bootstrap})
        admin.incremental_alter_configs([resource])[resource].result(20)
        small = [f"small {i}".encode() for i in range(20)]
        topics.produce([value for pair in zip(large, small, strict=True) for value in pair])
        topics.wait_until_read(41)
    assert raised == []
    assert aborted(service) == 0
    found = topics.read_topic(dead)
    assert sorted(m.value() for m in found if "ripcurrent.stub" not in dict(m.headers())) == sorted([b"first", *small])
    assert sorted(stubs(found)) == list(range(1, 41, 2))


def test_alerts_that_are_too_large_are_dead_letters_also_the_close_of_an_episode(
    topics: Topics, limited: Limited
) -> None:
    n = 1500
    topics.produce([*events(n), *events(10, EVENT["time"] + 2 * TIMEOUT_MS)])
    alerts = limited("alerts", 600)
    detector = HashDetector()
    pipeline = AlertPipeline(detector, MemoryEpisodes(), bundle_version="b")
    service = Service(topics.settings(alerts=alerts), detector, pipeline, threshold=LINE)
    with running(service) as raised:
        topics.wait_until_read(n + 10)
    assert raised == []
    assert aborted(service) == 0
    assert topics.read_topic(alerts) == []
    letters = [letter_of(message) for message in topics.read("dead")]
    findings = [orjson.loads(letter.value or b"") for letter in letters]
    assert {letter.exception for letter in letters} == {"AlertTooLarge"}
    assert {finding["activity_name"] for finding in findings} == {"Create", "Update", "Close"}
    crossed = {offset for offset in range(n + 10) if p_value(f"{topics.events}:0:{offset}:0") <= LINE}
    assert {letter.source[2] for letter in letters} <= crossed
    assert len({finding["metadata"]["uid"] for finding in findings}) == len(findings)
    counted = service.metrics.registry.get_sample_value
    assert counted("ripcurrent_rejects_total", {"exception": "AlertTooLarge"}) == len(findings)
    assert counted("ripcurrent_alerts_total") == 0


def test_an_alert_among_the_dead_letters_is_not_sent_back_as_an_event(topics: Topics, limited: Limited) -> None:
    topics.produce_events(300)
    alerts = limited("alerts", 600)
    detector = HashDetector()
    pipeline = AlertPipeline(detector, MemoryEpisodes(), bundle_version="b")
    with running(Service(topics.settings(alerts=alerts), detector, pipeline, threshold=LINE)) as raised:
        topics.wait_until_read(300)
    assert raised == []
    letters = [letter_of(message) for message in topics.read("dead")]
    assert letters

    class Nothing:
        def publish(self, outputs: list[Any], offsets: Any) -> set[str]:
            assert outputs == []
            return set()

    done = redrive(topics.settings(), [letters], Nothing())  # type: ignore[arg-type]
    assert done.left["alerts that were too large for their topic"] == len(letters)


def test_a_topic_that_takes_not_even_a_score_ends_the_service_with_its_name_and_setting(
    topics: Topics, limited: Limited
) -> None:
    topics.produce_events(10)
    scores = limited("scores", 100)
    service = Service(topics.settings(scores=scores), HashDetector(), EachRow(), threshold=LINE)
    with running(service) as raised:
        until(lambda: raised != [], 40)
    assert isinstance(raised[0], StreamError)
    assert scores in str(raised[0])
    assert "max.message.bytes" in str(raised[0])
    assert topics.committed() == {0: -1001} or topics.committed() == {0: 0}
