"""Filling windows again after Redis lost them: events that were committed long ago are read and appended once more.

Promises: reads back as far as the windows' age reaches and Kafka's retention allows, and says from when on nothing is
missing; appends nothing beyond the commit and publishes nothing; may be cut short at any point and begun again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog

from encoder.ocsf.event_time import FUTURE_TOLERANCE_MS, NO_TIME, YEAR_2000_MS
from encoder.ocsf.events import Message
from state.errors import SourcePartition, StateLostError
from streamer.kafka.client import KafkaUnavailableError, Offsets, label
from streamer.kafka.consumer import CHUNK, message_of
from streamer.kafka.partition_reader import PartitionReader
from streamer.service.ports import Rebuildable
from streamer.settings import Settings

READ_S = 0.5
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
        self._steps: deque[Callable[[], None]] = deque([self._begin, self._locate])
        self._reader = PartitionReader(settings, settings.kafka.group_id)

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
        except KafkaUnavailableError as error:
            _log.warning("waiting for kafka", reason=str(error))
            time.sleep(READ_S)
        return not self._targets and not self._steps

    def close(self) -> None:
        """Give the connection back."""
        self._reader.close()

    def _begin(self) -> None:
        others: list[SourcePartition] = []
        if self._lost.wiped:
            committed = self._reader.committed(self._reader.partitions(self._settings.events))
            others = [source for source, offset in committed.items() if offset > 0]
        own = {source: self._lost.resume[source] for source in self._targets}
        lost = StateLostError(str(self._lost), wiped=self._lost.wiped, resume=own)
        self._windows.begin_rebuild(lost, [source for source in others if source not in own])

    def _locate(self) -> None:
        """Find where to read from, and from when on nothing is missing if Kafka does not reach back that far."""
        wanted = {source: offset for source, offset in self._lost.resume.items() if source in self._targets}
        at = self._reader.offsets_for_times(dict.fromkeys(wanted, self._now_ms - self._windows.age_ms))
        dated = self._reader.offsets_for_times(dict.fromkeys(wanted, YEAR_2000_MS))
        bounds = self._reader.bounds(wanted)
        for source, offset in wanted.items():
            low, _ = bounds[source]
            # Where all of it is older than that, the answer is -1; also where no timestamp is a date in milliseconds:
            # then all of it is read.
            first = low if at[source] < 0 and dated[source] < 0 else at[source]
            old_enough = first if first >= 0 else self._targets[source]
            self._positions[source] = min(max(old_enough, offset or 0), self._targets[source])
            if 0 <= first <= low and low > (offset or 0):
                self._horizon_ms[source] = _UNKNOWN
            _log.warning(
                "windows are filled again",
                partition=label([source]),
                start=self._positions[source],
                end=self._targets[source],
            )
        self._reader.assign(self._positions)
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
            for raw in self._reader.read(min(CHUNK, self._settings.batch_size - len(messages)), left):
                source = raw.topic(), raw.partition()
                if source not in self._targets:
                    continue
                if raw.offset() < self._targets[source]:
                    messages.append(message_of(raw))
                    if self._horizon_ms.get(source) == _UNKNOWN:
                        recorded_at = messages[-1].recorded_at
                        since = self._now_ms if recorded_at == NO_TIME else recorded_at
                        self._horizon_ms[source] = since + FUTURE_TOLERANCE_MS
                else:
                    self._reader.at_end.add(source)
            if self._reader.at_end >= set(self._targets):
                break
        return messages

    def _finish(self) -> None:
        """Tell the windows of the partitions that have reached their commit."""
        done = [s for s, target in self._targets.items() if s in self._reader.at_end or self._positions[s] >= target]
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
            self._reader.leave(source)
