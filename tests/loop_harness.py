"""What the tests of the loop share: topics, reading what subscribers see, and a detector that needs no bundle.

Run as a program it is a service with that detector, to be killed:
`python tests/loop_harness.py '{"events": "topic", ...}'`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from numpy.typing import NDArray

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Coordinates, Message
from state.redis.episodes import RedisEpisodes
from state.windows import WindowEntries, Windows, WindowStore
from streamer.alerting.finding_frame import Alert
from streamer.alerting.pipeline import AlertPipeline
from streamer.alerting.threshold_ledger import ThresholdLedger
from streamer.detection.batches import ScoredBatch
from streamer.detection.live_calibration import Evidence, LiveCalibration
from streamer.detection.record_score import PARTS
from streamer.explain.attribution import Explanation
from streamer.kafka import producer as producer_module
from streamer.service.loop import Service
from streamer.settings import Settings, load

LINE = 0.02
PATIENCE_S = 120.0
EVENT = {
    "class_uid": 3002,
    "type_uid": 300201,
    "activity_id": 1,
    "time": 1_700_000_000_000,
    "metadata": {"version": "1.8.0"},
}


def p_value(label: str) -> float:
    """What `HashDetector` gives an event: uniform in (0, 1), a function of its coordinates alone."""
    return (int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big") + 1) / (2**56 + 1)


class HashDetector:
    """Scores events by a hash of their coordinates. before: called with each batch, to be slow or to fail."""

    live: LiveCalibration | None = None

    def __init__(self, before: Callable[[Sequence[Message]], None] = lambda _: None) -> None:
        self.before = before
        self.batches: list[list[Message]] = []
        self.remembered: list[Message] = []

    def score(self, messages: Sequence[Message]) -> ScoredBatch:
        return self.judge(self.prepare(messages))

    def prepare(self, messages: Sequence[Message]) -> tuple[HashDetector, Sequence[Message]]:
        return self, messages

    def judge(self, prepared: tuple[HashDetector, Sequence[Message]]) -> ScoredBatch:
        by, messages = prepared
        assert by is self, "what another detector prepared"
        began = time.perf_counter()
        self.before(messages)
        self.batches.append(list(messages))
        batch, rejects = decode(messages)
        n = len(batch)
        p_values = np.array([p_value(batch.coordinates.label(row)) for row in range(n)], np.float64)
        severity = np.full(n, 50, np.float32)
        entity = np.array([f"user:{offset % 5}" for offset in batch.coordinates.offset.tolist()], object)
        cause = np.array([f"record:cause.{offset % 5}" for offset in batch.coordinates.offset.tolist()], object)
        scored = (batch.coordinates, batch.time, p_values, severity, entity, cause, batch.records, rejects)
        return ScoredBatch(*scored, batch.repairs, seconds={"judge": time.perf_counter() - began})

    def remember(self, messages: Sequence[Message]) -> None:
        self.remembered.extend(messages)

    def explain(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Explanation]:
        return [Explanation((), (), 0.0, 0.0) for _ in rows]


class _RarityAlone:
    """One part, to which a new value adds 8 nats."""

    def __init__(self, parts: NDArray[np.float64], new: NDArray[np.bool_]) -> None:
        self.parts, self.new = parts, new

    def without_news(self, rows: NDArray[np.intp], columns: Sequence[int]) -> NDArray[np.float64]:
        rest = self.parts[:, rows].copy()
        rest[0] -= 8.0 * self.new[rows]
        return rest

    def joint(self, parts: NDArray[np.float64], _: NDArray[np.int64]) -> NDArray[np.float64]:
        return parts.sum(0)


class NewsDetector(HashDetector):
    """Scores events by a hash of their coordinates and by whether they have a name ("new") that training did not have,
    as far as the live calibration still counts it."""

    def __init__(self, before: Callable[[Sequence[Message]], None] = lambda _: None, bundle: str = "b") -> None:
        super().__init__(before)
        self.live = LiveCalibration(bundle, ("300201",), ("device.hostname",))

    def judge(self, prepared: tuple[HashDetector, Sequence[Message]]) -> ScoredBatch:
        scored, live = super().judge(prepared), self.live.copy()
        new = np.array([record.get("device", {}).get("hostname") == "new" for record in scored.records], np.bool_)
        evidence = -np.log(scored.p_value) + 8.0 * new
        parts = np.zeros((len(PARTS), len(scored)))
        parts[0] = evidence
        seen = Evidence(
            scored.time, np.full(len(scored), 2), new.reshape(-1, 1), scored.entity.tolist(), parts, evidence
        )
        record, lowered = live.judge(seen, _RarityAlone(parts, new))
        return replace(scored, p_value=np.exp(-record), live=live, lowered=lowered)


class WindowDetector(HashDetector):
    """Scores events by a hash of the windows that end at them: a window that lacks an entry gives another score."""

    def __init__(self, windows: WindowStore, before: Callable[[Sequence[Message]], None] = lambda _: None) -> None:
        super().__init__(before)
        self.windows = windows

    def judge(self, prepared: tuple[HashDetector, Sequence[Message]]) -> ScoredBatch:
        scored = super().judge(prepared)
        windows = self._append(scored.coordinates, scored.time)
        members = [str(windows.offset[row, -windows.length[row] :].tolist()) for row in range(len(scored))]
        labels = [scored.coordinates.label(row) + "|" + members[row] for row in range(len(scored))]
        p_values = np.array([p_value(label) for label in labels], np.float64)
        return replace(scored, p_value=p_values, complete=windows.complete)

    def remember(self, messages: Sequence[Message]) -> None:
        super().remember(messages)
        batch, _ = decode(messages)
        self._append(batch.coordinates, batch.time)

    def _append(self, at: Coordinates, time: NDArray[np.int64]) -> Windows:
        entity = [f"user:{number % 7}" for number in time.tolist()]
        vectors = np.repeat(at.offset.astype(np.float16)[:, None] % 1000, self.windows.dim, 1)
        return self.windows.append(WindowEntries(entity, time, vectors, at.sources, at.source, at.offset, at.index))


class EachRow:
    """An alert for each row, so that what is lost or doubled shows."""

    def alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Alert]:
        uids = [scored.coordinates.label(row) for row in rows]
        return [
            Alert(uid, uid.encode(), orjson.dumps({"uid": uid}), [("schema", b"1.8.0")], row=row)
            for uid, row in zip(uids, rows.tolist(), strict=True)
        ]

    def take_suppressed(self) -> dict[str, int]:
        return {}

    def identify(self, topics: Mapping[tuple[str, int], int]) -> None:
        """Nothing is remembered."""

    def committed(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class Topics:
    """Fresh topics on a broker, and how to fill and read them. source: another topic to read events from."""

    bootstrap: str
    name: str
    partitions: int

    source: str = ""

    @property
    def events(self) -> str:
        return self.source or f"{self.name}-events"

    def settings(self, **more: Any) -> Settings:
        flags = {
            "kafka.bootstrap_servers": self.bootstrap,
            "kafka.group_id": self.name,
            "kafka.instance_id": "one",
            "kafka.properties": {"session.timeout.ms": 6000},
            "events": self.events,
            "alerts": f"{self.name}-alerts",
            "dead_letters": f"{self.name}-dead",
            "scores": f"{self.name}-scores",
            "ledger": f"{self.name}-ledger",
            "start": "earliest",
            "batch_size": 50,
            "linger_ms": 10,
            "transaction_latency_ms": 50,
            "metrics_port": 0,
        }
        return load({key: value for key, value in (flags | more).items() if value is not None})

    def produce(self, values: Sequence[bytes | None], partition: int | None = None, **more: Any) -> None:
        producer = Producer(
            {
                "enable.idempotence": True,
                "bootstrap.servers": self.bootstrap,
                "message.max.bytes": 10_000_000,
                "linger.ms": 5,
            }
        )
        failed: list[Any] = []
        for i, value in enumerate(values):
            to = i % self.partitions if partition is None else partition
            report = lambda error, _: failed.append(error) if error else None  # noqa: E731
            producer.produce(self.events, value, partition=to, on_delivery=report, **more)
            producer.poll(0)
        assert producer.flush(30) == 0
        assert not failed, failed

    def produce_events(self, n: int) -> None:
        self.produce_events_from(0, n)

    def produce_events_from(self, first: int, n: int) -> None:
        """Events first, first + 1, ..., n of them: event i has the time of the first of all plus i ms."""
        self.produce([orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(first, first + n)])

    def produce_events_slowly(self, n: int, seconds: float = 4.0) -> None:
        """`produce_events(n)`, spread over some seconds."""
        steps = 40
        per_step = n // steps
        for _ in range(steps):
            self.produce_events(per_step)
            time.sleep(seconds / steps)

    def read(self, suffix: str, isolation: str = "read_committed") -> list[Any]:
        """All messages of one of these topics up to its end, as a subscriber sees them."""
        return self.read_topic(f"{self.name}-{suffix}", isolation)

    def read_topic(self, topic: str, isolation: str = "read_committed") -> list[Any]:
        """The same, of any topic of the broker."""
        properties = {"bootstrap.servers": self.bootstrap, "group.id": "reader", "enable.partition.eof": True}
        consumer = Consumer(properties | {"isolation.level": isolation, "auto.offset.reset": "earliest"})
        partitions = list(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
        found, ended = [], 0
        deadline = time.monotonic() + 120
        while ended < len(partitions) and time.monotonic() < deadline:
            message = consumer.poll(1)
            if message is None:
                continue
            if message.error():
                ended += 1
            else:
                found.append(message)
        consumer.close()
        assert ended == len(partitions)
        return found

    def alerts(self) -> list[str]:
        return sorted(orjson.loads(message.value())["uid"] for message in self.read("alerts"))

    def committed(self) -> dict[int, int]:
        """The group's committed offsets; -1001 where there is none."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": self.name, "log_level": 0})
        partitions = [TopicPartition(self.events, p) for p in range(self.partitions)]
        for _ in range(40):
            try:
                return {p.partition: p.offset for p in consumer.committed(partitions, timeout=20)}
            except KafkaException:  # The coordinator of a fresh broker is still being made.
                time.sleep(0.25)
        raise AssertionError("committed offsets cannot be read")

    def members(self) -> list[int]:
        """Of each member of the group, to how many partitions it is assigned."""
        groups = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0}).describe_consumer_groups(
            [self.name]
        )
        try:
            members = groups[self.name].result(20).members
        except KafkaException:  # There is no such group yet.
            return []
        return [len(member.assignment.topic_partitions) if member.assignment else 0 for member in members]

    def wait_until_read(self, n: int, seconds: float = PATIENCE_S) -> None:
        """Until n messages in all are committed."""
        until(lambda: sum(max(offset, 0) for offset in self.committed().values()) >= n, seconds)

    def expected_alerts(self, n: int) -> list[str]:
        """The alerts of an undisturbed run over `produce_events(n)`."""
        labels = [f"{self.events}:{i % self.partitions}:{i // self.partitions}:0" for i in range(n)]
        return sorted(label for label in labels if p_value(label) <= LINE)


def create(
    bootstrap: str, name: str, partitions: int = 2, config: dict[str, str] | None = None, replicas: int = 1
) -> Topics:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    sizes = {"events": (partitions, config or {"max.message.bytes": "8000000"})}
    sizes |= {"alerts": (2, {}), "dead": (1, {"max.message.bytes": "6000000"}), "scores": (2, {})}
    sizes |= {"ledger": (1, {"cleanup.policy": "compact"})}
    new = [
        NewTopic(f"{name}-{suffix}", count, replicas, config=settings) for suffix, (count, settings) in sizes.items()
    ]
    for future in admin.create_topics(new).values():
        future.result(20)
    return Topics(bootstrap, name, partitions)


def figure(service: Service, name: str, **labels: str) -> float:
    """A metric of a service as a scrape shows it, without `ripcurrent_`; 0 if it is not there yet."""
    return service.metrics.registry.get_sample_value(f"ripcurrent_{name}", labels) or 0.0


def partitions_of(service: Service) -> int:
    """How many partitions a service reads, as its metrics show it, two seconds late at most."""
    families = service.metrics.registry.collect()
    return sum(len(family.samples) for family in families if family.name == "ripcurrent_lag_messages")


def before_offsets_are_sent(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> list[bool]:
    """Let something happen in each transaction between its outputs and its offsets. Returns a list that grows by an
    element for each producer that is made."""
    made: list[bool] = []

    class Intercepted(Producer):
        def __init__(self, properties: dict[str, Any]) -> None:
            super().__init__(properties)
            made.append(True)

        def send_offsets_to_transaction(self, *arguments: Any) -> Any:
            happens()
            return super().send_offsets_to_transaction(*arguments)

    monkeypatch.setattr(producer_module, "Producer", Intercepted)
    return made


def until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait for a condition. The limit is for what never comes: it must be far from what a busy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def running(service: Service) -> Iterator[list[BaseException]]:
    """The service in a thread; yields what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            service.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield raised
    finally:
        service.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def findings(detector: HashDetector, redis_url: str, tenant: str) -> AlertPipeline:
    """The real ones, with episodes in Redis."""
    episodes = RedisEpisodes(redis_url, tenant=tenant)
    return AlertPipeline(detector, episodes, bundle_version="b", tenant=tenant, clock=lambda: 1_700_000_000.0)


class Dying:
    """Findings that kill the process when they have stored their n-th decisions (0: never), before Kafka knows."""

    def __init__(self, inner: AlertPipeline, n: int) -> None:
        self.inner, self.left = inner, n

    def alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Alert]:
        found = self.inner.alerts(scored, rows)
        self.left -= bool(found)
        if found and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def take_suppressed(self) -> Mapping[str, int]:
        return self.inner.take_suppressed()

    def identify(self, topics: Mapping[tuple[str, int], int]) -> None:
        self.inner.identify(topics)

    def committed(self, offsets: Mapping[tuple[str, int], int]) -> None:
        self.inner.committed(offsets)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    delay, redis_url, dies_at, events_per_day, news = (
        arguments.pop(name, 0) for name in ("delay", "episodes", "dies_at", "events_per_day", "news")
    )
    detector = (NewsDetector if news else HashDetector)(lambda _: time.sleep(delay))
    alerting = Dying(findings(detector, redis_url, arguments["kafka.group_id"]), dies_at) if redis_url else EachRow()
    settings = load(arguments)
    ledger = ThresholdLedger(settings, settings.kafka.instance_id, events_per_day) if events_per_day else None
    service = Service(settings, detector, alerting, threshold=ledger or LINE)
    signal.signal(signal.SIGTERM, lambda *_: service.stop())
    service.run()


if __name__ == "__main__":
    main()
