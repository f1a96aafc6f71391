"""Reading a frozen range of topics in one order: partitions merged by (record timestamp, coordinates).

Promises: the same range gives the same messages in the same order, each partition in its own; bounded memory however
unevenly the partitions are filled; no group is joined and nothing is committed, so nothing live notices. Does not wait
for messages beyond the range.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import structlog
from confluent_kafka import Consumer, KafkaError

from encoder.ocsf.event_time import record_time
from state.errors import SourcePartition
from streamer.errors import StreamError
from streamer.kafka.client import HOPELESS, build, consumer_properties, label, topic_partitions
from streamer.kafka.consumer import BATCH_BYTES
from streamer.kafka.offset_ranges import Range
from streamer.settings import Settings

CHUNK = 1000
"""Messages asked of librdkafka at once."""
AHEAD_BYTES = 128 << 20
"""What may be read ahead of the merge, of all partitions together: beyond its share of it a partition is paused."""
SILENT_S = 90.0
"""How long Kafka may give nothing of a range that is there: a transaction that somebody left open ends within 60 s."""

_log = structlog.get_logger("ripcurrent.range")


class Record(Protocol):
    """What the reader needs to know of what it reads: `encoder.ocsf.decoder.Message` and more."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def value(self) -> bytes | None: ...


R = TypeVar("R", bound=Record)


class KeyedRecord(NamedTuple):
    """A record of a topic that holds no events. timestamp: epoch ms."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


def record_of(raw: Any) -> KeyedRecord:
    """librdkafka's message as a record."""
    return KeyedRecord(raw.topic(), raw.partition(), raw.offset(), raw.timestamp()[1], raw.key(), raw.value())


class RangeReader(Generic[R]):
    """The messages of a range; a context manager. Partitions that are empty are not asked.

    Args:
        keep: librdkafka's message as it is wanted.
        patience_s: how long Kafka may give nothing.
    """

    def __init__(
        self,
        settings: Settings,
        wanted: Range,
        keep: Callable[[Any], R],
        *,
        patience_s: Callable[[], float] = lambda: SILENT_S,
    ) -> None:
        self._keep = keep
        self._patience_s = patience_s
        self._ends = {source: end for source, (start, end) in wanted.items() if start < end}
        self._share = AHEAD_BYTES // max(len(self._ends), 1)
        self._queues: dict[SourcePartition, deque[R]] = {source: deque() for source in self._ends}
        self._ahead = dict.fromkeys(self._ends, 0)
        self._missing = set(self._ends)
        """Partitions whose next message is not here yet: without it nobody knows whose turn it is."""
        self._unfinished = set(self._ends)
        self._paused: set[SourcePartition] = set()
        self._heads: list[tuple[int, str, int]] = []
        own = {"group.id": f"{settings.kafka.group_id}-range", "enable.partition.eof": True}
        self._consumer = build(Consumer, consumer_properties(settings) | own)
        self._consumer.assign(topic_partitions({source: wanted[source][0] for source in self._ends}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._consumer.close()

    def heads(self) -> dict[SourcePartition, int]:
        """The timestamp (epoch ms, -1: none) of the first message of each partition that has any."""
        self._fill()
        return {(topic, partition): timestamp for timestamp, topic, partition in self._heads}

    def batches(self, size: int) -> Iterator[list[R]]:
        """All messages in order, at most `size` (and about BATCH_BYTES) at a time.

        Raises:
            StreamError: messages of the range no longer exist, or Kafka does not answer.
        """
        batch: list[R] = []
        weight = 0
        while True:
            self._fill()
            if not self._heads:
                break
            _, topic, partition = self._heads[0]
            source = topic, partition
            queue = self._queues[source]
            message = queue.popleft()
            self._ahead[source] -= _size(message)
            if queue:
                heapq.heapreplace(self._heads, (record_time(queue[0].timestamp)[0], topic, partition))
            else:
                heapq.heappop(self._heads)
                if source in self._unfinished:
                    self._missing.add(source)
            batch.append(message)
            weight += _size(message)
            if len(batch) == size or weight >= BATCH_BYTES:
                yield batch
                batch, weight = [], 0
        if batch:
            yield batch

    def _fill(self) -> None:
        """Read until the next message of every partition is here."""
        last_message_at = time.monotonic()
        while self._missing:
            hungry = {source for source in self._paused if self._ahead[source] < self._share // 2}
            if hungry:
                self._consumer.resume(topic_partitions(dict.fromkeys(hungry, 0)))
                self._paused -= hungry
            for raw in self._consumer.consume(CHUNK, 0.5):
                if self._take(raw):
                    last_message_at = time.monotonic()
            if time.monotonic() - last_message_at > (patience_s := self._patience_s()):
                raise StreamError(f"Kafka gave nothing of {label(self._missing)} for {patience_s:.0f} s; start again")

    def _take(self, raw: Any) -> bool:
        """Queue a message, or see that its partition is done; False where it says nothing new."""
        source = raw.topic(), raw.partition()
        error = raw.error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            self._on_error(error, source)
            return False
        if source not in self._unfinished:
            return False
        if error is None and raw.offset() < self._ends[source]:
            message = self._keep(raw)
            queue = self._queues[source]
            queue.append(message)
            self._ahead[source] += _size(message)
            if source in self._missing:
                self._missing.discard(source)
                heapq.heappush(self._heads, (record_time(message.timestamp)[0], *source))
            if self._ahead[source] > self._share and source not in self._paused:
                self._paused.add(source)
                self._consumer.pause(topic_partitions({source: 0}))
        # What lies between the last message and the end are marks of transactions.
        if raw.offset() + (error is None) >= self._ends[source]:
            self._unfinished.discard(source)
            self._missing.discard(source)
            self._consumer.incremental_unassign(topic_partitions({source: 0}))
        return True

    def _on_error(self, error: Any, source: SourcePartition) -> None:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise StreamError(f"{label([source])}: messages of the range no longer exist ({error.str()})")
        if error.fatal() or error.code() in HOPELESS:
            raise StreamError(f"reading {source[0] or 'the range'}: {error.str()}")
        _log.warning("reading again", reason=error.str())


def _size(message: Record) -> int:
    """Bytes in memory, about."""
    return len(message.value or b"") + 200
