"""What reading from and writing to Kafka share: connections, offsets, errors told apart, and the checks at start.

Promises that wrong settings are named before anything runs, and that two processes of a group on one host never take
the same name. Does not read or write a message: `streamer.kafka.consumer` and `streamer.kafka.producer` do.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any, TypeVar

import orjson
import structlog
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]

from state.errors import SourcePartition
from streamer.errors import ConfigurationError, StreamError
from streamer.kafka.reachability import unreachable
from streamer.settings import Settings

Offsets = dict[SourcePartition, int]
"""Next offset to be read, by (topic, partition)."""

PATIENCE_S = 75.0
"""How long Kafka is waited for when partitions are assigned: longer than a transaction may stay open."""
DRAIN_S = 12.0
"""How long Kafka is waited for once the process is asked to end."""
START_S = 8.0
"""How long an unreachable broker is waited for at start: wrong settings must show within 15 seconds."""

STATISTICS_MS = 2000
"""How often clients say how they are."""

HOPELESS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
}
"""What waiting does not mend: a person must act."""
TRANSIENT = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE}

T = TypeVar("T")
_log = structlog.get_logger("ripcurrent.kafka")


class Connections:
    """What a client last said of its brokers, once it is built with `properties` and served.

    connected: whether there is one; round_trip_s: how long each takes to answer, 95 % of requests. A consumer's fetches
    are answered when there is something to fetch, so this says something of producers only.
    """

    def __init__(self) -> None:
        self.connected = True
        self.round_trip_s: dict[str, float] = {}

    def properties(self, take: Callable[[Mapping[str, Any]], None] = lambda _: None) -> dict[str, Any]:
        """librdkafka's. take: is given each statistics too."""

        def both(text: str) -> None:
            statistics = orjson.loads(text)
            self._take(statistics)
            take(statistics)

        return {"statistics.interval.ms": STATISTICS_MS, "stats_cb": both}

    def _take(self, statistics: Mapping[str, Any]) -> None:
        brokers = [broker for broker in statistics["brokers"].values() if broker["nodeid"] >= 0]
        self.connected = any(broker["state"] == "UP" for broker in brokers)
        answered = [broker for broker in brokers if broker["rtt"]["cnt"]]
        self.round_trip_s = {broker["nodename"]: broker["rtt"]["p95"] / 1e6 for broker in answered}


class TransactionAbortedError(Exception):
    """Outputs and offsets were not written; read again from what is committed."""


class KafkaUnavailableError(Exception):
    """Kafka did not answer a question; it may be asked again."""


@contextmanager
def unavailable() -> Iterator[None]:
    """Turns errors of the client into KafkaUnavailableError."""
    try:
        yield
    except KafkaException as error:
        raise KafkaUnavailableError(reason_of(error)) from error


def check_topics(settings: Settings) -> None:
    """Refuse to start where a broker does not answer or a topic does not exist.

    Raises:
        ConfigurationError: with the address, or the topics and how to make them.
    """
    written = [settings.alerts, settings.dead_letters] + ([settings.scores] if settings.scores else [])
    if settings.threshold is None:
        written.append(settings.ledger)
    if settings.feedback:
        written.append(settings.feedback)
    both = set(settings.events) & set(written)
    if both:
        raise ConfigurationError(f"topic {both.pop()!r} is both read and written")
    must_exist(settings, [*settings.events, *written])


def must_exist(settings: Settings, wanted: Iterable[str]) -> None:
    """Raise ConfigurationError where a broker does not answer or one of these topics does not exist."""
    known = partition_counts(settings)
    missing = [topic for topic in wanted if topic not in known]
    if missing:
        raise ConfigurationError(
            f"no such topic at {settings.kafka.bootstrap_servers}: {', '.join(missing)}; "
            f"create with kafka-topics.sh --create --topic {missing[0]}"
        )


def partition_counts(settings: Settings) -> dict[str, int]:
    """The topics there are, and how many partitions each has. Raises ConfigurationError where no broker answers, or one
    cannot be reached by the name that it gives itself."""
    where = settings.kafka.bootstrap_servers
    admin, deadline = build(AdminClient, client_properties(settings)), time.monotonic() + START_S
    while True:
        try:
            metadata = admin.list_topics(timeout=START_S)
        except KafkaException as error:
            raise ConfigurationError(
                f"no Kafka answers at {where} within {START_S:.0f} s ({reason_of(error)}); kafka.bootstrap_servers "
                "names it"
            ) from None
        problems = unreachable(metadata.brokers.values())
        if not problems:
            break
        # A broker that has just gone is named for a few seconds more.
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"Kafka answers at {where}, but {problems[0]}; set advertised.listeners of the broker to an address "
                "that can be reached from here"
            )
        time.sleep(0.5)
    return {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}


def topic_settings(settings: Settings, topics: Iterable[str], name: str) -> dict[str, str]:
    """The value of one setting of these topics, without the topics that this client may not describe."""
    asked = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
    values: dict[str, str] = {}
    with suppress(KafkaException):
        admin = build(AdminClient, client_properties(settings))
        for resource, answer in admin.describe_configs(asked, request_timeout=5).items():
            with suppress(KafkaException, KeyError, TimeoutError):
                values[resource.name] = answer.result(6)[name].value
    return values


def claim_instance(settings: Settings) -> str:
    """A name for this process that is the same after a restart and no other's: the setting, or host name and the first
    slot on this host that no living process has locked.

    Raises:
        ConfigurationError: no folder for temporary files can be written to, where the locks are.
    """
    if settings.kafka.instance_id:
        return settings.kafka.instance_id
    group = blake2b(settings.kafka.group_id.encode(), digest_size=6).hexdigest()
    for slot in range(1024):
        try:
            path = os.path.join(tempfile.gettempdir(), f"ripcurrent-{os.getuid()}-{group}-{slot}.lock")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"the lock that keeps the name of this process unique cannot be made ({error}); set kafka.instance_id "
                "to a name that no other process of the group has, or TMPDIR to a folder that can be written to"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue
        return f"{socket.gethostname()}-{slot}"  # The lock is held until the process ends, however it ends.
    raise ConfigurationError("1024 processes of this group run on this host; set kafka.instance_id")


def topic_partitions(offsets: Mapping[SourcePartition, int]) -> list[TopicPartition]:
    """As the client takes them."""
    return [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]


def label(partitions: Iterable[SourcePartition]) -> str:
    """As a person reads them."""
    return ", ".join(f"{topic}:{partition}" for topic, partition in sorted(partitions))


def reason_of(error: KafkaException) -> str:
    """The client's words."""
    return str(error.args[0].str())


def patiently(reading: str, call: Callable[[], T], patience_s: Callable[[], float] = lambda: PATIENCE_S) -> T:
    """What a call gives, once Kafka answers: a broker that has just begun to lead takes a while, and so does a
    transaction of a killed process that is still open. Raises StreamError after `patience_s()` seconds."""
    began = time.monotonic()
    while True:
        try:
            with unavailable():
                return call()
        except KafkaUnavailableError as error:
            if time.monotonic() - began > patience_s():
                raise StreamError(f"{reading} cannot be read: {error}") from error
        time.sleep(0.2)


def committed_partitions(consumer: Any, partitions: list[TopicPartition]) -> list[TopicPartition]:
    """What is committed of each, with its metadata; an offset below 0 where nothing is. Raises StreamError."""

    def read() -> list[TopicPartition]:
        found: list[TopicPartition] = consumer.committed(partitions, timeout=10)
        for partition in found:
            if partition.error is not None:
                raise KafkaException(partition.error)
        return found

    return patiently("committed offsets", read)


def committed_offsets(consumer: Any, partitions: list[TopicPartition]) -> Offsets:
    """Committed offsets of those that have one. Raises StreamError."""
    found = committed_partitions(consumer, partitions)
    return {(p.topic, p.partition): p.offset for p in found if p.offset >= 0}


def watermarks(consumer: Any, source: SourcePartition) -> tuple[int, int]:
    """The first offset that a partition still has, and the one after its last."""
    found: tuple[int, int] = patiently(
        f"offsets of {label([source])}", lambda: consumer.get_watermark_offsets(TopicPartition(*source), timeout=10)
    )
    return found


def client_properties(settings: Settings) -> dict[str, Any]:
    """librdkafka's properties that all clients share."""

    def report(error: Any) -> None:
        _log.warning("client", reason=error.str())

    return {"client.id": "ripcurrent", "error_cb": report, "log_level": 2} | settings.kafka.connection()


def build(kind: Any, properties: dict[str, Any]) -> Any:
    """A client of a kind. Raises ConfigurationError for properties that librdkafka refuses."""
    try:
        return kind(properties)
    except KafkaException as error:
        raise ConfigurationError(f"kafka settings: {reason_of(error).strip()}") from None


def consumer_properties(settings: Settings) -> dict[str, Any]:
    """librdkafka's properties of a consumer of the group."""
    classic = {"partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 10_000}
    classic |= {"heartbeat.interval.ms": 2_000}
    own: dict[str, Any] = {
        "group.id": settings.kafka.group_id,
        "group.protocol": settings.kafka.group_protocol,
        "enable.auto.commit": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "queued.max.messages.kbytes": 65_536,
        "fetch.error.backoff.ms": 100,
    } | (classic if settings.kafka.group_protocol == "classic" else {})
    return own | client_properties(settings)
