"""Which topic a name stands for, and where a partition that the group has no commit for is begun.

A topic that is deleted and created again keeps its name and begins at offset 0, so a name and an offset do not say
which event is meant. Kafka gives each topic an id. The id is kept in the metadata of each commit, and compared when a
partition is assigned and before each commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicCollection

from state.errors import SourcePartition
from streamer.kafka.client import patiently

KAFKA_S = 5.0
_NO_ID = "AAAAAAAAAAAAAAAAAAAAAA"
"""What brokers before Kafka 2.8 answer."""


@dataclass(frozen=True)
class Topic:
    """What a name stands for now. id: Kafka's UUID, as Kafka writes it, empty where the broker does not know one."""

    id: str
    partitions: int

    @property
    def number(self) -> int:
        """48 bits that stand for the id, 0 where there is none."""
        return topic_number(self.id)


@dataclass(frozen=True)
class CommitNote:
    """What stands in the metadata of a commit. topic_id: of the topic that the offset is of, empty if not known.
    partitions: how many the topic had when the group first read it. Partitions beyond it were added later. 0: all that
    the group has no commit for were added later."""

    topic_id: str = ""
    partitions: int = 0

    @classmethod
    def parse(cls, metadata: str | None) -> CommitNote:
        """A commit of an earlier version, or of another program, has no note: nothing is known."""
        kind, _, rest = (metadata or "").partition(" ")
        topic_id, _, partitions = rest.partition(" ")
        known = kind == "topic" and partitions.isdecimal()
        return cls(topic_id.strip("-"), int(partitions)) if known else cls()

    def __str__(self) -> str:
        return f"topic {self.topic_id or '-'} {self.partitions}"


def topic_number(topic_id: str) -> int:
    """48 bits that stand for an id wherever windows, timers and episodes are kept, 0 for none."""
    return int.from_bytes(blake2b(topic_id.encode(), digest_size=6).digest(), "little") if topic_id else 0


def describe(admin: Any, names: Iterable[str]) -> dict[str, Topic]:
    """What these names stand for now. Raises KafkaException: no answer, or no such topic."""
    found = admin.describe_topics(TopicCollection(list(names)), request_timeout=KAFKA_S)
    told = {name: _answer(future) for name, future in found.items()}
    return {
        name: Topic("" if str(topic.topic_id) == _NO_ID else str(topic.topic_id), len(topic.partitions))
        for name, topic in told.items()
    }


def notes_of_group(admin: Any, group: str, topics: Iterable[str]) -> dict[str, list[CommitNote]]:
    """The notes of all commits that a group has of these topics, also of partitions that other members read. Raises
    StreamError."""
    wanted = set(topics)

    def read() -> list[Any]:
        # Transactions that are under way are not waited for: some member always has one.
        asked = [ConsumerGroupTopicPartitions(group)]
        futures = admin.list_consumer_group_offsets(asked, require_stable=False, request_timeout=KAFKA_S)
        return list(_answer(futures[group]).topic_partitions)

    notes: dict[str, list[CommitNote]] = {topic: [] for topic in wanted}
    for commit in patiently("committed offsets of the group", read):
        if commit.topic in wanted and commit.offset >= 0:
            notes[commit.topic].append(CommitNote.parse(commit.metadata))
    return notes


def _answer(future: Any) -> Any:
    """What the client answers. It keeps the time itself; a busy host may be late to say so."""
    try:
        return future.result(2 * KAFKA_S)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from None


def is_recreated(name: str, topic: Topic, note: CommitNote | None, known: Mapping[SourcePartition, int]) -> bool:
    """Whether a partition's offsets are of a topic of the same name that is gone. note: of its commit, None if it has
    none. known: numbers of the topics of partitions as they were last read; Kafka deletes commits with their topic."""
    if not topic.id:
        return False
    if note is not None:
        return bool(note.topic_id) and note.topic_id != topic.id
    return any(
        number != topic.number
        for (of, partition), number in known.items()
        if of == name and partition < topic.partitions
    )


def is_added(partition: int, notes: Iterable[CommitNote]) -> bool:
    """Whether a partition without a commit was added to its topic after the group had first read the topic. notes: of
    the group's commits of the topic."""
    first = [note.partitions for note in notes]
    return bool(first) and partition >= min(first)
