"""Reading partitions from given offsets on, as they grow: for whoever has other things to do between two reads.

Promises: no group is joined and nothing is committed, so nothing live notices; a call returns within its time, and an
error that passes is logged and read over. `streamer.kafka.range_reader` waits for a range and puts it in order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import structlog
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from state.errors import SourcePartition
from streamer.kafka.client import (
    Offsets,
    build,
    client_properties,
    consumer_properties,
    label,
    topic_partitions,
    unavailable,
)
from streamer.kafka.offset_ranges import KAFKA_S, Range, bounds_of, offsets_for_times
from streamer.settings import Settings

_log = structlog.get_logger("ripcurrent.reader")


class PartitionReader:
    """The messages of assigned partitions, each partition in its order. For one thread.

    Its questions raise KafkaUnavailableError where Kafka does not answer: ask again.

    Args:
        group: whose commits `committed` asks for; it is not joined.
    """

    def __init__(self, settings: Settings, group: str) -> None:
        self.at_end: set[SourcePartition] = set()
        """Partitions that were read up to what was their end then."""
        own = {"group.id": group, "enable.partition.eof": True, "auto.offset.reset": "earliest"}
        self._consumer = build(Consumer, consumer_properties(settings) | own)
        self._admin = build(AdminClient, client_properties(settings))

    def assign(self, offsets: Offsets) -> None:
        """Read these partitions, from these offsets on, and no others."""
        self._consumer.assign(topic_partitions(offsets))

    def leave(self, source: SourcePartition) -> None:
        """Read an assigned partition no longer."""
        self._consumer.incremental_unassign([TopicPartition(*source)])

    def read(self, limit: int, seconds: float) -> list[Any]:
        """librdkafka's messages that arrive within this time, at most `limit`."""
        messages: list[Any] = []
        with unavailable():
            for raw in self._consumer.consume(limit, seconds):
                error, source = raw.error(), (raw.topic(), raw.partition())
                if error is None:
                    messages.append(raw)
                elif error.code() == KafkaError._PARTITION_EOF:
                    self.at_end.add(source)
                else:
                    _log.warning("reading again", partition=label([source]), reason=error.str())
        return messages

    def partitions(self, topics: Iterable[str]) -> list[SourcePartition]:
        """All that these topics have now."""
        found: list[SourcePartition] = []
        with unavailable():
            for name in topics:
                topic = self._consumer.list_topics(name, KAFKA_S).topics[name]
                if topic.error is not None:
                    raise KafkaException(topic.error)
                found.extend((name, partition) for partition in sorted(topic.partitions))
        return found

    def committed(self, sources: Iterable[SourcePartition]) -> Offsets:
        """What the group has committed of those partitions that it has committed any of."""
        with unavailable():
            found = self._consumer.committed([TopicPartition(*source) for source in sources], timeout=KAFKA_S)
        return {(p.topic, p.partition): p.offset for p in found if p.offset >= 0}

    def bounds(self, sources: Iterable[SourcePartition]) -> Range:
        """The first offset that each partition still has, and the one after its last."""
        with unavailable():
            return bounds_of(self._consumer, sources)

    def written(self, sources: Collection[SourcePartition]) -> Offsets:
        """The offset after the last of each partition, open transactions included; `bounds` ends before them."""
        latest: Any = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        asked = {TopicPartition(*source): latest for source in sources}
        isolation, seconds = IsolationLevel.READ_UNCOMMITTED, KAFKA_S
        with unavailable():
            for topic in {topic for topic, _ in sources}:
                # Or the client asks as before a restart of the broker, and is refused until its metadata expire.
                self._admin.list_topics(topic, seconds)
            answers = self._admin.list_offsets(asked, isolation_level=isolation, request_timeout=seconds)
            return {(p.topic, p.partition): answer.result(seconds + 2).offset for p, answer in answers.items()}

    def offsets_for_times(self, times: dict[SourcePartition, int]) -> Offsets:
        """The first offset with a timestamp of at least this (epoch ms); -1 where there is none."""
        with unavailable():
            return offsets_for_times(self._consumer, times)

    def close(self) -> None:
        """Give the connection back."""
        self._consumer.close()
