"""Positions of a command in Kafka: offsets of a group without members, committed in one transaction with what was
written up to them.

Promises: after a crash either both are there or neither. Two of the same name do not write side by side: the later one
fences the earlier.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from state.errors import SourcePartition
from streamer.errors import StreamError
from streamer.kafka.client import (
    Offsets,
    TransactionAbortedError,
    build,
    client_properties,
    committed_offsets,
    topic_partitions,
)
from streamer.kafka.producer import Output, TransactionalPublisher
from streamer.settings import Settings

ABORTS = 5
"""Times that a transaction is tried again: Kafka says when it is worth it."""


class OffsetStore:
    """What a command has written, and how far it had read.

    Args:
        group: the group's name, which is nobody else's.
        topics: what is written to.
    """

    def __init__(self, settings: Settings, group: str, topics: Sequence[str]) -> None:
        self.group = group
        kafka = settings.kafka.model_copy(update={"group_id": group})
        # The publisher asks these topics how large a message may be.
        own = {"kafka": kafka, "alerts": topics[0], "dead_letters": topics[-1], "scores": ""}
        self._settings = settings.model_copy(update=own)
        properties = client_properties(self._settings) | {"group.id": group, "enable.auto.commit": False}
        self._consumer = build(Consumer, properties)
        self._publisher = TransactionalPublisher(self._settings, self, "writer")

    def open(self) -> None:
        """Be ready to write; fences a process that does the same. Raises StreamError."""
        self._publisher.open()

    def committed(self, sources: Iterable[SourcePartition]) -> Offsets:
        """Positions of those that have one."""
        return committed_offsets(self._consumer, [TopicPartition(*source) for source in sources])

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> set[str]:
        """Write and commit as one. Returns the origins of outputs too large for their topic: they are left out.

        Raises:
            StreamError: Kafka refuses, or does not answer; nothing of these outputs is written.
        """
        aborts = 0
        leaving_out = [output._replace(instead=lambda: None) for output in outputs]
        while True:
            try:
                return {output.origin for output in self._publisher.publish(leaving_out, offsets)}
            except TransactionAbortedError as error:
                aborts += 1
                if aborts == ABORTS:
                    raise StreamError(f"writing to Kafka: {error}; run it again to go on") from error
                time.sleep(0.1 * 2**aborts)

    def close(self) -> None:
        """Give the connection back."""
        self._consumer.close()

    def remove(self) -> None:
        """Remove the group, if there is one."""
        admin = build(AdminClient, client_properties(self._settings))
        for future in admin.delete_consumer_groups([self.group], request_timeout=10).values():
            future.exception(15)

    # What the publisher needs of where events come from: the group has no members, so nothing of it rebalances.

    def group_metadata(self) -> Any:
        return self._consumer.consumer_group_metadata()

    def owns(self, partitions: Iterable[SourcePartition]) -> bool:
        return True

    def commits(self, offsets: Mapping[SourcePartition, int]) -> list[TopicPartition]:
        return topic_partitions(offsets)

    def commit(self, offsets: Mapping[SourcePartition, int]) -> None:
        raise NotImplementedError("positions go out in the transaction")
