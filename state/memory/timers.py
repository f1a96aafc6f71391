"""Timers in this process: the second implementation of the contract in `state.timers`."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from state.errors import SourcePartition, StateLostError
from state.timers import AFTER, MAX_EVENTS, MAX_OPEN, Activity, ClockAdvance, Inactivity, Span


@dataclass
class _Timer:
    last: Activity
    due: int


@dataclass
class _PartitionClock:
    applied: tuple[int, int] = (-1, 0)
    clock: int = -1
    due: list[tuple[int, str]] = field(default_factory=list)
    """A heap of (time, entity): no later than the timer is due, which is looked up when it is reached."""
    noticed: list[Inactivity] = field(default_factory=list)


class MemoryTimers:
    """Timers in this process, for `score`, evaluation and replay: of one source, or of several merged by time, where no
    source is ahead of another; so none waits for the others.

    keeps_events: whether whoever asks needs `Activity.event`.
    """

    def __init__(self, *, keeps_events: bool = True, max_open: int = MAX_OPEN, max_events: int = MAX_EVENTS) -> None:
        self.keeps_events = keeps_events
        self._max_open, self._max_events = max_open, max_events
        self._open: dict[str, _Timer] = {}
        self._sources: dict[SourcePartition, _PartitionClock] = {}
        self._topics: dict[SourcePartition, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def advance(
        self, steps: Sequence[Activity | ClockAdvance], spans: Mapping[SourcePartition, Span]
    ) -> list[Inactivity]:
        for step in steps:
            source = self._sources.setdefault(step.source, _PartitionClock())
            if (step.offset, step.index) <= source.applied:
                continue
            if isinstance(step, Activity):
                self._hear(step, source)
            elif step.clock > source.clock:
                source.clock = step.clock
                source.noticed += self._fallen(step, source)
        for name, span in spans.items():
            source = self._sources.setdefault(name, _PartitionClock())
            source.applied = max(source.applied, (span.last, AFTER))
        return [
            inactivity
            for name, span in spans.items()
            for inactivity in self._sources[name].noticed
            if span.first <= inactivity.offset <= span.last
        ]

    def finish(self) -> list[Activity]:
        """The stream is over: all who were waited for, by their last event."""
        left = sorted((timer.last for timer in self._open.values()), key=lambda last: (last.key, last.entity))
        self._open.clear()
        return left

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Nothing needs to be told from memory that is gone."""

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        for name, offset in offsets.items():
            if (source := self._sources.get(name)) is not None and source.noticed:
                source.noticed = [inactivity for inactivity in source.noticed if inactivity.offset >= offset]

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        for source, topic in topics.items():
            if self._topics.get(source, topic) != topic and (held := self._sources.get(source)) is not None:
                held.applied, held.noticed = (-1, 0), []
        self._topics |= topics

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Timers in memory start with the windows in memory, which say what is missing."""

    def begin_rebuild(self, lost: StateLostError) -> None:
        """As `check_epoch`."""

    def _hear(self, activity: Activity, source: _PartitionClock) -> None:
        timer, due = self._open.get(activity.entity), max(activity.time, source.clock) + activity.timeout
        if timer is not None and (not activity.newest or timer.last.key > activity.key):
            timer.due = max(timer.due, due)
            if not activity.newest:
                timer.last = replace(timer.last, p_value=activity.p_value, complete=activity.complete)
        elif activity.newest and (timer is not None or len(self._open) < self._max_open):
            kept = activity if len(self._open) < self._max_events else replace(activity, event=b"")
            self._open[activity.entity] = _Timer(kept, due)
            if timer is None or timer.last.source != activity.source:
                heapq.heappush(source.due, (due, activity.entity))

    def _fallen(self, tick: ClockAdvance, source: _PartitionClock) -> list[Inactivity]:
        found: list[Activity] = []
        while source.due and source.due[0][0] < tick.clock:
            _, entity = heapq.heappop(source.due)
            timer = self._open.get(entity)
            if timer is None or timer.last.source != tick.source:
                continue
            if timer.due >= tick.clock:
                heapq.heappush(source.due, (timer.due, entity))
            else:
                del self._open[entity]
                found.append(timer.last)
        found.sort(key=lambda last: (last.key, last.entity))
        return [Inactivity(last, tick.offset, tick.index) for last in found]
