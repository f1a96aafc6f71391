"""Episodes: what is one story is told once, then updated and closed. This is the contract; `state.episode_rules` has
the rules.

Promises: the same coordinates get the same decision again, as long as they are not committed, so that neither a crash
nor a redelivery doubles or loses one; what is counted is counted once; memory is bounded. Decisions depend on the
anomalies and their order within each partition, on no clock and no batch. Does not promise that a store that was wiped
remembers: what was open then begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from state.errors import SourcePartition

CREATE, UPDATE, CLOSE = 1, 2, 3
Place = tuple[int, int, int]
"""Where something is told within a source: offset, index, and its number among what is told there: 0 for the event
itself."""


@dataclass(frozen=True)
class Anomaly:
    """An event at or under the line. source, offset, index: its coordinates; time: event ms; entity and cause: as
    scored; named: all entities of the event; type_uid and what (the value that was odd): what makes the anomalies of
    two entities the same thing; severity 0 to 100 with its level; shown: the entity as people may see it; clock: the
    latest event time of its source up to where it is told, where that is later than its own; told: where that is, as
    (offset, index, number among those told there): of an entity that fell silent the later event of the same source
    that made it clear; None: it is told where it stands."""

    source: SourcePartition
    offset: int
    index: int
    time: int
    entity: str
    cause: str
    severity: float
    level: int
    p_value: float
    named: tuple[str, ...] = ()
    type_uid: int = 0
    what: str = ""
    shown: str = ""
    clock: int = 0
    noticed_at: Place | None = None

    @property
    def label(self) -> str:
        """Its coordinates as one text."""
        return label(self.source, self.offset, self.index)

    @property
    def place(self) -> Place:
        """Where it is told: what a redelivery and a commit go by."""
        return self.noticed_at or (self.offset, self.index, 0)


@dataclass(frozen=True)
class Episode:
    """One story so far. first, last: coordinates (labels) of its first and latest event; entity, shown, cause: of the
    first; first_seen, last_seen: event ms; count: events; entities: how many it happened to; severity, level, p_value:
    of its most unusual event; causes: all, in the order they came; others: further entities, as people may see them,
    at most MAX_SHARING."""

    first: str
    last: str
    entity: str
    shown: str
    cause: str
    first_seen: int
    last_seen: int
    count: int = 1
    entities: int = 1
    severity: float = 0.0
    level: int = 0
    p_value: float = 1.0
    causes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What to tell, and where: a CREATE or an UPDATE at the `Anomaly.place` that it was caused by, a CLOSE by the
    passing of time at these coordinates."""

    activity: int
    source: SourcePartition
    offset: int
    index: int
    episode: Episode
    number: int = 0

    @property
    def place(self) -> Place:
        """As `Anomaly.place`."""
        return self.offset, self.index, self.number


@dataclass(frozen=True)
class End:
    """What a batch holds of a source: its first and last offset and its latest event time (ms)."""

    first: int
    last: int
    time: int


@dataclass
class Position:
    """Where this process stands: the latest event time it saw of each source, and what it knows to be committed."""

    clocks: dict[SourcePartition, int] = field(default_factory=dict)
    committed: dict[SourcePartition, int] = field(default_factory=dict)

    def advance(self, ends: Mapping[SourcePartition, End]) -> None:
        """The batch that ends so is decided."""
        for source, end in ends.items():
            tick(self.clocks, source, end.time)

    def commit(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed."""
        for source, offset in offsets.items():
            self.committed[source] = max(offset, self.committed.get(source, 0))


class EpisodeStore(Protocol):
    """What the flow needs of episodes."""

    def decide(self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End]) -> list[Decision]:
        """What to tell of one batch: by source, in the order of offsets. anomalies: in stream order; ends: of all
        sources of the batch. Gives also what was decided at these offsets before, so that it is published with them.
        Raises a `StateError`, and then may be called again with the same."""
        ...

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed, with what was decided before them."""
        ...

    def open(self) -> int:
        """How many episodes are open, as far as this process knows."""
        ...


def label(source: SourcePartition, offset: int, index: int) -> str:
    """Coordinates as one text, as everywhere."""
    return f"{source[0]}:{source[1]}:{offset}:{index}"


def tick(clocks: dict[SourcePartition, int], source: SourcePartition, time: int) -> None:
    """Move a source's clock on to a time, never back."""
    clocks[source] = max(time, clocks.get(source, 0))
