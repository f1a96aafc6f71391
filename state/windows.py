"""Entity windows: the last W record embeddings of each user, host or address, as they were at each event.

Promises: appending is idempotent by coordinates; an event that is delivered again changes nothing and gets the window
that it got first, as long as it is not committed; any order that keeps each partition's order gives the same final
window; a window whose history is known to have gaps says so. Does not promise that what is in memory outlives it.

The rules, for both implementations. The entries of an entity stand in one total order: (event time, source id, offset,
index). An entry gets the entity's next number when it is first appended. The window at number n is the W greatest of
the entries numbered up to n, without those more than `age_ms` older than the greatest. An entry that later ones push
out is *displaced* at the number that did it and is kept (slack) until every entry with a smaller number is committed.
An entry that never enters a window (older than all of a full one, or than the age) is *late*: it has a number and is
counted, and its window is that of the others.

A source may deliver an event twice, under coordinates of its own each time. An entry whose fingerprint is among those
of the last `REMEMBERED` entries of the entity that had one and were no repeats is a *repeat*: it has a number, is never
a member and is not counted, and its window is that of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from state.errors import SourcePartition, StateLostError
from state.rolling_counts import PARTNERS, ActivityCounts

DAY_MS = 86_400_000
REMEMBERED = 32
"""Fingerprints kept for one entity, 4 bytes each."""
MAX_SLACK = 16_384
"""Displaced entries kept for one entity: one partition that never commits must not fill the memory. Beyond it the
oldest go, and a redelivered event that would have needed them is marked incomplete."""


@dataclass(frozen=True)
class WindowEntries:
    """m (event, entity) pairs in stream order: within a source, by ascending coordinates; whole messages.

    entity: m strings `kind:value`; time: int64 [m], event ms >= 0; vectors: float16 [m, d]; sources: distinct (topic,
    partition) pairs; source: int32 [m], index into them; offset: int64 [m]; index: int32 [m], place in the message;
    activity_counts: what each adds to the counts of its entity (None: nothing is counted); fingerprint: uint32 [m], a
    hash of what makes an event itself, 0 for one that cannot be told from another (None: all of them).
    """

    entity: Sequence[str]
    time: NDArray[np.int64]
    vectors: NDArray[np.float16]
    sources: tuple[SourcePartition, ...]
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    index: NDArray[np.int32]
    activity_counts: ActivityCounts | None = None
    fingerprint: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.entity)

    @property
    def fingerprint_bytes(self) -> NDArray[np.uint8]:
        """uint8 [m, 4], little endian."""
        prints = np.zeros(len(self), np.uint32) if self.fingerprint is None else self.fingerprint
        return prints.astype("<u4")[:, None].view(np.uint8)


@dataclass(frozen=True)
class Windows:
    """The windows at m entries, right-aligned: the newest member stands in slot W - 1, unused slots on the left.

    vectors: float16 [m, W, d], unused slots zero; times: int64 [m, W], event ms, unused 0; length: int32 [m], members;
    own: int32 [m], the slot of the entry itself (W - 1 unless it came out of order, -1: late or a repeat, no member);
    complete: bool [m], False where members are known to be missing. Coordinates of the members: sources, with source:
    int32 [m, W] (index into them, -1 unused), offset: int64 [m, W] and index: int32 [m, W]. levels: uint8 [m, 8], what
    the entry raised (`rolling_counts.LEVELS`), all 0 where it is not a member. raised: uint8 [m, W, 8], what each
    member raised; only from `latest`, else [m, 0, 8]. partners: int16 [m, W, PARTNERS], those of each member
    (`rolling_counts.ActivityCounts`), -1 for none.
    """

    vectors: NDArray[np.float16]
    times: NDArray[np.int64]
    length: NDArray[np.int32]
    own: NDArray[np.int32]
    complete: NDArray[np.bool_]
    sources: tuple[SourcePartition, ...]
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    index: NDArray[np.int32]
    levels: NDArray[np.uint8]
    raised: NDArray[np.uint8]
    partners: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.length)

    @property
    def newest(self) -> NDArray[np.bool_]:
        """bool [m]: whether the entry is its window's newest member, or as new as that."""
        own = self.times[np.arange(len(self)), self.own]
        known: NDArray[np.bool_] = (self.own >= 0) & (own == self.times[:, -1])
        return known

    @property
    def mask(self) -> NDArray[np.bool_]:
        """bool [m, W]: which slots are used."""
        width = self.times.shape[1]
        used: NDArray[np.bool_] = np.arange(width) >= width - self.length[:, None]
        return used

    def take(self, rows: NDArray[Any]) -> Windows:
        """Those of some entries."""
        per_window = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "sources"}
        return replace(self, **per_window)


class WindowStore(Protocol):
    """What the detector and the service need of windows. Offsets are Kafka's: the next one to be read."""

    width: int
    dim: int
    age_ms: int

    def append(self, entries: WindowEntries) -> Windows:
        """Append the entries and return the window at each. Raises a `StateError`, and then may be called again
        with the same entries."""
        ...

    def latest(self, entities: Sequence[str]) -> Windows:
        """The windows as they are now (`own` is the newest member, length 0 where there is none)."""
        ...

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Record, before they are committed to Kafka, how far the sources have been appended."""
        ...

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed: what only a redelivery before them would need may be forgotten."""
        ...

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        """Say which topic each source is of: a number of 48 bits that is the topic's own, also where another had its
        name before. The events of that other one stay in the windows, and no event is taken for one of them. To be
        called before `check_epoch`."""
        ...

    def identified(self) -> Mapping[SourcePartition, int]:
        """The numbers that `identify` was last told, by any process."""
        ...

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Compare with what Kafka holds as committed (sources without a commit left out), at start and on assignment.
        Raises `StateLostError` where the store remembers less."""
        ...

    def begin_rebuild(self, lost: StateLostError, others: Iterable[SourcePartition] = ()) -> None:
        """From here on appended entries fill what was lost, and no window is complete until `finish_rebuild` was called
        for all of `lost.resume` and, where all was lost, for the `others` (partitions with commits) by the
        consumers that read those."""
        ...

    def finish_rebuild(self, sources: Iterable[SourcePartition], horizon_ms: int = 0) -> None:
        """These sources are appended again up to their commit. horizon_ms: event time from which on nothing is
        missing, 0 if the replay reached back as far as the windows' age."""
        ...


@lru_cache(maxsize=65536)
def source_id(source: SourcePartition) -> int:
    """48 bits that stand for a source wherever windows are kept and in the order of entries with equal times."""
    return int.from_bytes(blake2b(f"{source[0]}\0{source[1]}".encode(), digest_size=6).digest(), "little")


def validate(entries: WindowEntries, dim: int) -> None:
    """Raise ValueError for arrays that do not fit together, and for values that no store could keep."""
    m = len(entries)
    shapes = {name: getattr(entries, name).shape for name in ("time", "vectors", "source", "offset", "index")}
    expected = {name: (m, dim) if name == "vectors" else (m,) for name in shapes}
    if shapes != expected:
        raise ValueError(f"window entries do not fit together: {shapes}, expected {expected}")
    if entries.activity_counts is not None and entries.activity_counts.partners.shape != (m, PARTNERS):
        raise ValueError(
            f"acts with partners {entries.activity_counts.partners.shape} do not fit: [{m}, {PARTNERS}] was expected"
        )
    if (prints := entries.fingerprint) is not None and (prints.shape != (m,) or prints.dtype != np.uint32):
        raise ValueError(f"fingerprints of window entries {prints.dtype} {prints.shape}: uint32 ({m},) was expected")
    if entries.vectors.dtype != np.float16:
        raise ValueError(f"window vectors must be float16, not {entries.vectors.dtype}")
    if m:
        for name, bits in (("time", 48), ("offset", 48), ("index", 24)):
            low, high = int(getattr(entries, name).min()), int(getattr(entries, name).max())
            if low < 0 or high >= 1 << bits:
                raise ValueError(f"{name} of window entries must be in 0..2^{bits}, got {low}..{high}")


def progress_of(entries: WindowEntries) -> dict[SourcePartition, int]:
    """The next offset of each source after these entries."""
    top = np.full(len(entries.sources), -1, np.int64)
    np.maximum.at(top, entries.source, entries.offset)
    return {source: int(last) + 1 for source, last in zip(entries.sources, top, strict=True) if last >= 0}


def is_complete(
    exact: NDArray[np.bool_],
    length: NDArray[np.int32],
    newest: NDArray[np.int64],
    horizon: NDArray[np.int64] | int,
    width: int,
    age_ms: int,
) -> NDArray[np.bool_]:
    """Nothing is missing from a window if all of it was kept and history is known (from `horizon` on, event ms; 0:
    all of it) for as far back as it reaches: it is full, or its age ends after the horizon. All arrays [m]."""
    known: NDArray[np.bool_] = exact & ((np.asarray(horizon) == 0) | (length == width) | (newest - age_ms >= horizon))
    return known
