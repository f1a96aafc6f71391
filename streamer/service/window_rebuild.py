"""Filling windows again after Redis lost them: events that were committed long ago are read and appended once more.

Promises: reads back as far as the windows' age reaches and Kafka's retention allows, and says from when on nothing is
missing; appends nothing beyond the commit and publishes nothing; may be cut short at any point and begun again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from encoder.ocsf.events import Message
from encoder.ocsf.repairs import FUTURE_TOLERANCE_MS
from state.errors import SourcePartition, StateLostError
from streamer.kafka.client import Offsets, build, consumer_properties, label, reason_of, topic_partitions
from streamer.kafka.consumer import CHUNK, message_of
from streamer.service.ports import Rebuildable
from streamer.settings import Settings

READ_S = 0.5
KAFKA_S = 10.0
_UNKNOWN = -1
"""A horizon that the first message that Kafka still has will tell."""

_log = structlog.get_logger("ripcurrent.rebuild")


class Rebuild:
    """One rebuild, done in steps of at most a second or so, so that whoever drives it can do other things between.

    Args:
        lost: what the store said; `lost.resume` names what to append again and from where.
        targets: committed offsets of the partitions that are this process's: others fill theirs.
        remember: appends messages to the windows without scoring them.
        now_ms: epoch ms from which the windows' age is counted back.
    """

    def __init__(
        self,
        settings: Settings,
        windows: Rebuildable,
        remember: Callable[[Sequence[Message]], None],
        lost: StateLostError,
        targets: Offsets,
        *,
        now_ms: int,
    ) -> None:
        self.left = 0
        """Messages that are still to be read, as far as is known."""
        self._settings = settings
        self._windows = windows
        self._remember = remember
        self._lost = lost
        self._now_ms = now_ms
        self._targets = {source: targets[source] for source in lost.resume if source in targets}
        self._positions: Offsets = {}
        self._horizon_ms: dict[SourcePartition, int] = {}
        self._chunk: list[Message] = []
        self._at_end: set[SourcePartition] = set()
        self._steps: deque[Callable[[], None]] = deque([self._begin, self._locate])
        properties = consumer_properties(settings) | {"enable.partition.eof": True, "auto.offset.reset": "earliest"}
        self._consumer = build(Consumer, properties)

    @property
    def resume(self) -> dict[SourcePartition, int | None]:
        """Where another rebuild has to take up what this one leaves."""
        return {source: self._positions.get(source, self._lost.resume[source]) for source in self._targets}

    def step(self, owned: Iterable[SourcePartition]) -> bool:
        """Do the next piece of it; True once all is filled. Partitions that are no longer `owned` are left to others.

        Raises:
            StateError: from the store; call again.
        """
        for source in set(self._targets) - set(owned):
            self._leave(source)
        try:
            if self._steps:
                self._steps[0]()
                self._steps.popleft()
            else:
                self._fill()
        except KafkaException as error:
            _log.warning("waiting for kafka", reason=reason_of(error))
            time.sleep(READ_S)
        return not self._targets and not self._steps

    def close(self) -> None:
        """Give the connection back."""
        self._consumer.close()

    def _begin(self) -> None:
        others: list[SourcePartition] = []
        if self._lost.wiped:
            known = {topic: self._consumer.list_topics(topic, KAFKA_S).topics[topic] for topic in self._settings.events}
            partitions = [TopicPartition(name, p) for name, topic in known.items() for p in topic.partitions]
            committed = self._consumer.committed(partitions, timeout=KAFKA_S)
            others = [(p.topic, p.partition) for p in committed if p.offset > 0]
        own = {source: self._lost.resume[source] for source in self._targets}
        lost = StateLostError(str(self._lost), wiped=self._lost.wiped, resume=own)
        self._windows.begin_rebuild(lost, [source for source in others if source not in own])

    def _locate(self) -> None:
        """Find where to read from, and from when on nothing is missing if Kafka does not reach back that far."""
        wanted = {source: offset for source, offset in self._lost.resume.items() if source in self._targets}
        by_age = [TopicPartition(*source, self._now_ms - self._windows.age_ms) for source in wanted]
        at = {(p.topic, p.partition): p.offset for p in self._consumer.offsets_for_times(by_age, timeout=KAFKA_S)}
        for source, offset in wanted.items():
            low, _ = self._consumer.get_watermark_offsets(TopicPartition(*source), timeout=KAFKA_S)
            # Where all of it is older than that, the answer is -1.
            old_enough = at[source] if at[source] >= 0 else self._targets[source]
            self._positions[source] = min(max(old_enough, offset or 0), self._targets[source])
            if 0 <= at[source] <= low and low > (offset or 0):
                self._horizon_ms[source] = _UNKNOWN
            _log.warning(
                "windows are filled again",
                partition=label([source]),
                start=self._positions[source],
                end=self._targets[source],
            )
        self._consumer.assign(topic_partitions(self._positions))
        self._finish()

    def _fill(self) -> None:
        if not self._chunk:
            self._chunk = self._read()
        if self._chunk:
            self._remember(self._chunk)  # Before the chunk is let go: if the store is away, it is appended again.
            for message in self._chunk:
                self._positions[message.topic, message.partition] = message.offset + 1
            self._chunk = []
        self._finish()

    def _read(self) -> list[Message]:
        """The next messages before the targets, at most a batch."""
        messages: list[Message] = []
        deadline = time.monotonic() + READ_S
        while len(messages) < self._settings.batch_size and (left := deadline - time.monotonic()) > 0:
            for raw in self._consumer.consume(min(CHUNK, self._settings.batch_size - len(messages)), left):
                source = raw.topic(), raw.partition()
                error = raw.error()
                if source not in self._targets:
                    continue
                if error is None and raw.offset() < self._targets[source]:
                    messages.append(message_of(raw))
                    if self._horizon_ms.get(source) == _UNKNOWN:
                        self._horizon_ms[source] = max(messages[-1].timestamp, 0) + FUTURE_TOLERANCE_MS
                elif error is None or error.code() == KafkaError._PARTITION_EOF:
                    self._at_end.add(source)
                else:
                    _log.warning("reading again", partition=label([source]), reason=error.str())
            if self._at_end >= set(self._targets):
                break
        return messages

    def _finish(self) -> None:
        """Tell the windows of the partitions that have reached their commit."""
        done = [s for s, target in self._targets.items() if s in self._at_end or self._positions[s] >= target]
        if done:
            # What lies between the last message and the commit are marks of transactions: nothing to append.
            self._windows.prepare({source: self._targets[source] for source in done})
            horizon = [self._horizon_ms.get(source, 0) for source in done]
            unknown = self._now_ms + FUTURE_TOLERANCE_MS  # nothing is left to read
            self._windows.finish_rebuild(done, max(unknown if at == _UNKNOWN else at for at in horizon))
            for source in done:
                self._leave(source)
            _log.warning("windows are filled", partitions=label(done), left=len(self._targets))
        self.left = sum(max(target - self._positions[source], 0) for source, target in self._targets.items())

    def _leave(self, source: SourcePartition) -> None:
        del self._targets[source]
        self._chunk = [message for message in self._chunk if (message.topic, message.partition) != source]
        if source in self._positions:
            self._consumer.incremental_unassign([TopicPartition(*source)])
