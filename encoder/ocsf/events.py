"""The types that flow out of the decoder: messages, coordinates, and events as columns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.event_time import TimeBounds, record_time


class EncoderError(Exception):
    """Base of the errors of this package; the message names the value, the place and the way out."""


WHOLE = -1
"""The index that stands for a whole message."""


class Message(NamedTuple):
    """One Kafka message or one line of a file. `timestamp` as the source has it, -1 where it has none; skipped: indexes
    of its members that are not decoded, or WHOLE; bounds: of its event times, where the source knows better than the
    timestamp (None)."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    value: bytes | None
    skipped: frozenset[int] = frozenset()
    bounds: TimeBounds | None = None

    @property
    def recorded_at(self) -> int:
        """The timestamp in epoch ms; NO_TIME where there is none, or none that can be a date."""
        return record_time(self.timestamp)[0]


@dataclass(frozen=True)
class Coordinates:
    """Where n events stand in their streams: (topic, partition, offset, index in the message).

    sources: the distinct (topic, partition) pairs; source: int32 [n], index into them; offset: int64 [n]; index:
    int32 [n].
    """

    sources: tuple[tuple[str, int], ...]
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    index: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.source)

    def label(self, row: int) -> str:
        """`topic:partition:offset:index`, the form used in ids, alerts and messages to people."""
        topic, partition = self.sources[self.source[row]]
        return f"{topic}:{partition}:{self.offset[row]}:{self.index[row]}"


@dataclass(frozen=True)
class Column:
    """The values of one attribute path over a batch, sparse: rows int32 [k] ascending, values a list of k."""

    rows: NDArray[np.int32]
    values: list[Any]


@dataclass(frozen=True)
class EventBatch:
    """n events as columns.

    time: int64 [n], epoch ms, repaired, NO_TIME where an event has none; class_uid and type_uid: int32 [n], of the
    current OCSF numbering; columns: by attribute path (`actor.user.name`; a list of objects gives `resources[].uid`
    with a list as value; null is absence); records: the n decoded objects, repaired, for alerts: each can be written as
    JSON, and decoding that gives the same columns; repairs: how often each kind of repair was made.
    """

    coordinates: Coordinates
    time: NDArray[np.int64]
    class_uid: NDArray[np.int32]
    type_uid: NDArray[np.int32]
    columns: dict[str, Column]
    records: list[dict[str, Any]]
    repairs: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Reject:
    """What could not be read: the position of its message in the batch, its index in the message (-1: all of it), the
    bytes that go to the dead-letter topic (None: a tombstone) and why."""

    message: int
    index: int
    value: bytes | None
    stage: str
    exception: str
    reason: str
