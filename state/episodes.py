"""Episodes: related anomalies are published as one alert, then updated and closed. This is the contract;
`state.episode_rules` has the rules.

Promises: the same coordinates get the same decision again until they are committed, so that neither a crash nor a
redelivery doubles or loses one; each anomaly is counted once; memory is bounded. Decisions depend on the anomalies and
their order within each partition, not on clocks or batches. A store that was wiped forgets: its open episodes begin
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from state.errors import SourcePartition

CREATE, UPDATE, CLOSE = 1, 2, 3
Place = tuple[int, int, int]
"""Where an alert is published within a source: offset, index, and its number among the alerts there (0: the event's
own)."""


@dataclass(frozen=True)
class Anomaly:
    """An event at or under the threshold.

    source, offset, index: its coordinates; time: event ms, negative where it has none (it then takes the clock of its
    source); entity, cause: as scored; named: all entities of the event; type_uid, what (the unusual value): equal for
    the same anomaly of different entities; severity: 0 to 100, level: of it; shown: the redacted entity; clock: the
    latest event time (ms) of its source up to `place`, if later than `time`; noticed_at: for an inactive entity, where
    in the same source that was detected; None: at its own coordinates.
    """

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
        """Its coordinates as text."""
        return label(self.source, self.offset, self.index)

    @property
    def place(self) -> Place:
        """Where its alert is published; redelivery and commit are compared with this."""
        return self.noticed_at or (self.offset, self.index, 0)


@dataclass(frozen=True)
class Episode:
    """An episode so far. The field names are keys of the stored JSON.

    first, last: coordinates (labels) of its first and latest event; entity, shown, cause: of the first; first_seen,
    last_seen: event ms; count: events; entities: the number of affected entities; severity, level, p_value: of its most
    unusual event; causes: all, in their order; others: further affected entities, redacted, at most MAX_SHARING.
    """

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
    """An alert to publish: a CREATE or an UPDATE at the `Anomaly.place` that caused it, or a CLOSE, caused by event
    time at these coordinates."""

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
    """The extent of a batch in a source: first and last offset, and latest event time (ms)."""

    first: int
    last: int
    time: int


@dataclass
class Position:
    """The position of this process: the latest event time (ms) and the known committed offset of each source."""

    clocks: dict[SourcePartition, int] = field(default_factory=dict)
    committed: dict[SourcePartition, int] = field(default_factory=dict)

    def advance(self, ends: Mapping[SourcePartition, End]) -> None:
        """Advance the clocks past a decided batch."""
        for source, end in ends.items():
            tick(self.clocks, source, end.time)

    def forget(self, sources: Iterable[SourcePartition]) -> None:
        """The offsets of these are of other events from here on. Their clocks go on."""
        for source in sources:
            self.committed.pop(source, None)

    def commit(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed."""
        for source, offset in offsets.items():
            self.committed[source] = max(offset, self.committed.get(source, 0))


class EpisodeStore(Protocol):
    """The interface of episode stores."""

    def decide(self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End]) -> list[Decision]:
        """The alerts to publish for one batch: by source, in the order of offsets. anomalies: in stream order; ends: of
        all sources of the batch. Includes earlier decisions at these offsets, so that they are published again with
        them. Raises a `StateError`; the same call may then be repeated."""
        ...

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed, with the decisions before them."""
        ...

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        """As `WindowStore.identify`. Open episodes go on. What was decided at offsets of a topic that is gone and never
        committed is forgotten, and with it the episodes that began there."""
        ...

    def open(self) -> int:
        """The number of open episodes that this process knows."""
        ...


def label(source: SourcePartition, offset: int, index: int) -> str:
    """Coordinates as text."""
    return f"{source[0]}:{source[1]}:{offset}:{index}"


def tick(clocks: dict[SourcePartition, int], source: SourcePartition, time: int) -> None:
    """Advance a source's clock to a time, never back."""
    clocks[source] = max(time, clocks.get(source, 0))
