"""Timers: who is expected to do something more, and until when; by event time, so that a replay finds the same silence.

Promises: whether an entity fell silent, and at which event that was clear, depends on the events of its partition and
their order and not on how they were cut into batches; the same is told again until it is committed; nothing is told
twice. Does not promise that what is in memory outlives it.

The rules, for both implementations. Every partition has a clock: its latest event time, in whole `TICK_MS`. An entity
is given until the later of its event's time and the clock, and its kind's quiet on top: what arrives late, as a backlog
does, is heard from when it arrives. It fell silent if the clock of the partition of its last event passes that first:
the event that moves the clock there is where it is told. The last event is the one with the greatest (time, source id,
offset, index), so that a late one takes over nothing; it only gives more time, and its window is judged anew. Where
events come from several partitions, none is told before those that are not idle have come as far: what makes an entity
look silent may only not have been read yet.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from state.errors import Source, StateLostError
from state.windows import source_id

TICK_MS = 1000
"""Steps of a clock: timers are looked at as often."""
MAX_OPEN = 1_000_000
"""Entities waited for at once. Of more the newest are not waited for, and nothing is said of their silence."""
AFTER = 1 << 23
"""An index in a message that comes after all of them."""


@dataclass(frozen=True)
class Heard:
    """An event of an entity that may fall silent: its coordinates and time (ms); quiet: ms that it is given; p_value of
    its being the last, and whether the window that says so was complete; event: as whoever asks keeps it; newest: False
    for one that came late, of which all but the judgement is then passed over."""

    entity: str
    source: Source
    offset: int
    index: int
    time: int
    quiet: int
    p_value: float
    complete: bool = True
    event: bytes = b""
    newest: bool = True

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Where it stands in the order of its entity's events, as in windows."""
        return self.time, source_id(self.source), self.offset, self.index


@dataclass(frozen=True)
class Tick:
    """The event that moves a partition's clock (ms) on: before what it says of entities."""

    source: Source
    offset: int
    index: int
    clock: int


@dataclass(frozen=True)
class Silence:
    """An entity that fell silent after its last event, and the coordinates in the same source where that was clear."""

    last: Heard
    offset: int
    index: int


@dataclass(frozen=True)
class Span:
    """First and last offset of a batch in a source."""

    first: int
    last: int


class TimerStore(Protocol):
    """What the detector and the service need of timers. Offsets are Kafka's: the next one to be read."""

    keeps_events: bool

    def advance(self, steps: Sequence[Heard | Tick], spans: Mapping[Source, Span]) -> list[Silence]:
        """Take what a batch says, in stream order, and return who fell silent at its events, in that order; also what
        was found there before. spans: of all its sources. Raises a `StateError`, and then may be called again with
        the same."""
        ...

    def prepare(self, offsets: Mapping[Source, int]) -> None:
        """As `WindowStore.prepare`."""
        ...

    def committed(self, offsets: Mapping[Source, int]) -> None:
        """These offsets are committed: what was told before them is not asked for again."""
        ...

    def check_epoch(self, offsets: Mapping[Source, int]) -> None:
        """Compare with what Kafka holds as committed, at start and on assignment. Raises `StateLostError`."""
        ...

    def begin_rebuild(self, lost: StateLostError) -> None:
        """What was lost will be appended again: it is no news that it is missing."""
        ...


@dataclass
class _Timer:
    last: Heard
    due: int


@dataclass
class _Source:
    applied: tuple[int, int] = (-1, 0)
    clock: int = -1
    due: list[tuple[int, str]] = field(default_factory=list)
    """A heap of (time, entity): no later than the timer is due, which is looked up when it is reached."""
    told: list[Silence] = field(default_factory=list)


class MemoryTimers:
    """Timers in this process, for `score`, evaluation and replay: of one source, or of several merged by time, where no
    source is ahead of another; so none waits for the others.

    keeps_events: whether whoever asks needs `Heard.event`.
    """

    def __init__(self, *, keeps_events: bool = True, max_open: int = MAX_OPEN) -> None:
        self.keeps_events = keeps_events
        self._max_open = max_open
        self._open: dict[str, _Timer] = {}
        self._sources: dict[Source, _Source] = {}

    def __len__(self) -> int:
        return len(self._open)

    def advance(self, steps: Sequence[Heard | Tick], spans: Mapping[Source, Span]) -> list[Silence]:
        for step in steps:
            source = self._sources.setdefault(step.source, _Source())
            if (step.offset, step.index) <= source.applied:
                continue
            if isinstance(step, Heard):
                self._hear(step, source)
            elif step.clock > source.clock:
                source.clock = step.clock
                source.told += self._fallen(step, source)
        for name, span in spans.items():
            source = self._sources.setdefault(name, _Source())
            source.applied = max(source.applied, (span.last, AFTER))
        return [
            silence
            for name, span in spans.items()
            for silence in self._sources[name].told
            if span.first <= silence.offset <= span.last
        ]

    def finish(self) -> list[Heard]:
        """The stream is over: all who were waited for, by their last event."""
        left = sorted((timer.last for timer in self._open.values()), key=lambda last: (last.key, last.entity))
        self._open.clear()
        return left

    def prepare(self, offsets: Mapping[Source, int]) -> None:
        """Nothing needs to be told from memory that is gone."""

    def committed(self, offsets: Mapping[Source, int]) -> None:
        for name, offset in offsets.items():
            if (source := self._sources.get(name)) is not None and source.told:
                source.told = [silence for silence in source.told if silence.offset >= offset]

    def check_epoch(self, offsets: Mapping[Source, int]) -> None:
        """Timers in memory start with the windows in memory, which say what is missing."""

    def begin_rebuild(self, lost: StateLostError) -> None:
        """As `check_epoch`."""

    def _hear(self, heard: Heard, source: _Source) -> None:
        timer, due = self._open.get(heard.entity), max(heard.time, source.clock) + heard.quiet
        if timer is not None and (not heard.newest or timer.last.key > heard.key):
            timer.due = max(timer.due, due)
            if not heard.newest:
                timer.last = replace(timer.last, p_value=heard.p_value, complete=heard.complete)
        elif heard.newest and (timer is not None or len(self._open) < self._max_open):
            self._open[heard.entity] = _Timer(heard, due)
            if timer is None or timer.last.source != heard.source:
                heapq.heappush(source.due, (due, heard.entity))

    def _fallen(self, tick: Tick, source: _Source) -> list[Silence]:
        found: list[Heard] = []
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
        return [Silence(last, tick.offset, tick.index) for last in found]
