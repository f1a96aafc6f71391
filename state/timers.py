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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from state.errors import SourcePartition, StateLostError
from state.windows import source_id

TICK_MS = 1000
"""Steps of a clock: timers are looked at as often."""
MAX_OPEN = 1_000_000
"""Entities waited for at once. Of more the newest are not waited for, and nothing is said of their silence."""
MAX_EVENTS = 65_536
"""Entities waited for with their last event. While more are open, what is heard is kept without it: silence is found
all the same, and the alert shows less."""
AFTER = 1 << 23
"""An index in a message that comes after all of them."""


@dataclass(frozen=True)
class Activity:
    """An event of an entity that may fall silent: its coordinates and time (ms); quiet: ms that it is given; p_value of
    its being the last, and whether the window that says so was complete; event: as whoever asks keeps it; newest: False
    for one that came late, of which all but the judgement is then passed over."""

    entity: str
    source: SourcePartition
    offset: int
    index: int
    time: int
    timeout: int
    p_value: float
    complete: bool = True
    event: bytes = b""
    newest: bool = True

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Where it stands in the order of its entity's events, as in windows."""
        return self.time, source_id(self.source), self.offset, self.index


@dataclass(frozen=True)
class ClockAdvance:
    """The event that moves a partition's clock (ms) on: before what it says of entities."""

    source: SourcePartition
    offset: int
    index: int
    clock: int


@dataclass(frozen=True)
class Inactivity:
    """An entity that fell silent after its last event, and the coordinates in the same source where that was clear."""

    last: Activity
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

    def advance(
        self, steps: Sequence[Activity | ClockAdvance], spans: Mapping[SourcePartition, Span]
    ) -> list[Inactivity]:
        """Take what a batch says, in stream order, and return who fell silent at its events, in that order; also what
        was found there before. spans: of all its sources. Raises a `StateError`, and then may be called again with
        the same."""
        ...

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        """As `WindowStore.prepare`."""
        ...

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed: what was told before them is not asked for again."""
        ...

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        """As `WindowStore.identify`. Entities that were last active in a topic that is gone are waited for by the clock
        of the one that has its name now."""
        ...

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Compare with what Kafka holds as committed, at start and on assignment. Raises `StateLostError`."""
        ...

    def begin_rebuild(self, lost: StateLostError) -> None:
        """What was lost will be appended again: it is no news that it is missing."""
        ...
