"""The feedback topic: verdicts written to it, and the suppressions in force read from it and followed.

Promises: the service starts with all verdicts there are and takes up a new one within about a second; a topic that
cannot be read at start stops it, and one that cannot be read later changes nothing.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
import structlog
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from state.episodes import Anomaly
from streamer.alerting.alert_reader import Finding, between, parse
from streamer.alerting.verdicts import Suppression, Suppressions
from streamer.errors import ConfigurationError, StreamError
from streamer.kafka.client import build, client_properties, must_exist, reason_of
from streamer.settings import Settings

REFRESH_S = 1.0
_log = structlog.get_logger("ripcurrent.feedback")


class SuppressionFeed:
    """The suppressions of the feedback topic, followed as the topic grows. For one thread.

    Raises:
        ConfigurationError: the topic does not exist.
        StreamError: it cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        must_exist(settings, [settings.feedback])
        self._book = Suppressions()
        self._read_at = time.monotonic()
        own = {"group.id": f"{settings.kafka.group_id}-feedback", "enable.auto.commit": False}
        own |= {"auto.offset.reset": "earliest", "isolation.level": "read_committed"}
        self._consumer = build(Consumer, own | client_properties(settings))
        try:
            partitions = self._consumer.list_topics(settings.feedback, 10).topics[settings.feedback].partitions
            ends = {
                partition: self._consumer.get_watermark_offsets(TopicPartition(settings.feedback, partition), 10)[1]
                for partition in partitions
            }
            for finding in between(settings.model_copy(update={"alerts": settings.feedback}), [], []):
                self._book.add(finding)
            self._consumer.assign([TopicPartition(settings.feedback, p, end) for p, end in ends.items()])
        except KafkaException as error:
            raise StreamError(f"topic {settings.feedback!r} (feedback) cannot be read: {reason_of(error)}") from None

    def close(self) -> None:
        """Give the connection back."""
        self._consumer.close()

    def covering(self, anomaly: Anomaly) -> Suppression | None:
        """The suppression in force for this event, if any."""
        if time.monotonic() - self._read_at > REFRESH_S:
            self._read_at = time.monotonic()
            self._follow()
        return self._book.covering(anomaly)

    def _follow(self) -> None:
        for message in self._consumer.consume(1000, 0.0):
            if message.error() is not None:
                _log.warning("verdicts are read later", reason=message.error().str())
            elif (finding := parse(message.value())) is not None:
                self._book.add(finding)


def open_feedback(settings: Settings) -> SuppressionFeed | None:
    """The suppressions of the settings' feedback topic; None where there is none."""
    return SuppressionFeed(settings) if settings.feedback else None


def read_suppressions(settings: Settings) -> list[Suppression]:
    """All there ever were, in the order of their verdicts."""
    book = Suppressions()
    for finding in between(_topic(settings), [], []):
        book.add(finding)
    return book.all


def publish(settings: Settings, update: Finding) -> None:
    """Write a verdict to the feedback topic. Raises StreamError where Kafka does not take it."""
    must_exist(settings, [_topic(settings).alerts])
    failed: list[Any] = []
    producer = build(Producer, {"enable.idempotence": True} | client_properties(settings))
    producer.produce(
        settings.feedback,
        orjson.dumps(update),
        update["finding_info"]["uid"].encode(),
        headers=[("content-type", b"application/json")],
        on_delivery=lambda error, _: failed.append(error) if error else None,
    )
    if producer.flush(15) or failed:
        raise StreamError(f"the verdict was not written: {failed[0].str() if failed else 'Kafka does not answer'}")


def _topic(settings: Settings) -> Settings:
    if not settings.feedback:
        raise ConfigurationError("no topic for verdicts: set `feedback`, the same for the service and for this command")
    return settings.model_copy(update={"alerts": settings.feedback})
