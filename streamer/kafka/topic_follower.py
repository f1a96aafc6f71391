"""A small topic that is read whole and then followed: the ledger, the verdicts.

Promises: `catch_up` leaves out nothing that was committed when it was called, and waits for a broker that is away;
`new_records` returns at once. No group is joined and nothing is committed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import structlog

from streamer.kafka.client import DRAIN_S, PATIENCE_S, KafkaUnavailableError, Offsets, must_exist, patiently
from streamer.kafka.offset_ranges import Range
from streamer.kafka.partition_reader import PartitionReader
from streamer.kafka.range_reader import KeyedRecord, RangeReader, record_of
from streamer.settings import Settings

CHUNK = 1000
MARKERS_S = 2.0
"""How long transactions that are open are waited for: Kafka says that one is committed before every topic of it shows
that. One that a killed process left open lasts longer, and nothing of it counts."""

_log = structlog.get_logger("ripcurrent.follower")


class TopicFollower:
    """The records of a topic, each once: first all there are, then what comes. For one thread, but for `hurry`.

    Raises:
        ConfigurationError: the topic does not exist, or no broker answers.
    """

    def __init__(self, settings: Settings, topic: str) -> None:
        must_exist(settings, [topic])
        self._settings = settings
        self._topic = topic
        self._positions: Offsets = {}
        self._patience_s = PATIENCE_S
        self._reader = PartitionReader(settings, f"{settings.kafka.group_id}-follow")

    def hurry(self) -> None:
        """The process is asked to end: wait for Kafka no longer than DRAIN_S. For any thread."""
        self._patience_s = DRAIN_S

    def catch_up(self) -> Iterator[KeyedRecord]:
        """The records up to the present end that were not given yet, partitions merged by timestamp; for the caller to
        exhaust. Raises StreamError where Kafka does not answer for PATIENCE_S."""
        wanted = patiently(f"topic {self._topic!r}", self._unread, lambda: self._patience_s)
        with RangeReader(self._settings, wanted, record_of, patience_s=lambda: self._patience_s) as reader:
            for batch in reader.batches(CHUNK):
                yield from batch
        self._positions = {source: end for source, (_, end) in wanted.items()}
        self._reader.assign(self._positions)

    def new_records(self) -> list[KeyedRecord]:
        """What has arrived since; nothing while Kafka is away."""
        try:
            records = [record_of(raw) for raw in self._reader.read(CHUNK, 0.0)]
        except KafkaUnavailableError as error:
            _log.warning("read later", topic=self._topic, reason=str(error))
            return []
        self._positions |= {(record.topic, record.partition): record.offset + 1 for record in records}
        return records

    def close(self) -> None:
        """Give the connection back."""
        self._reader.close()

    def _unread(self) -> Range:
        sources = self._reader.partitions([self._topic])
        written = self._reader.written(sources)
        deadline = time.monotonic() + MARKERS_S
        bounds = self._reader.bounds(sources)
        while any(bounds[source][1] < written[source] for source in sources) and time.monotonic() < deadline:
            time.sleep(0.02)
            bounds = self._reader.bounds(sources)
        return {source: (max(self._positions.get(source, low), low), high) for source, (low, high) in bounds.items()}
