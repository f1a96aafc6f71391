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
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from state.errors import Source, StateLostError
from state.rolling_counts import LEVELS, PARTNERS, Acts, Tally, bitmaps

DAY_MS = 86_400_000
MAX_SLACK = 16_384
"""Displaced entries kept for one entity: one partition that never commits must not fill the memory. Beyond it the
oldest go, and a redelivered event that would have needed them is marked incomplete."""


@dataclass(frozen=True)
class WindowEntries:
    """m (event, entity) pairs in stream order: within a source, by ascending coordinates; whole messages.

    entity: m strings `kind:value`; time: int64 [m], event ms >= 0; vectors: float16 [m, d]; sources: distinct (topic,
    partition) pairs; source: int32 [m], index into them; offset: int64 [m]; index: int32 [m], place in the message;
    acts: what each adds to the counts of its entity (None: nothing is counted).
    """

    entity: Sequence[str]
    time: NDArray[np.int64]
    vectors: NDArray[np.float16]
    sources: tuple[Source, ...]
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    index: NDArray[np.int32]
    acts: Acts | None = None

    def __len__(self) -> int:
        return len(self.entity)


@dataclass(frozen=True)
class Windows:
    """The windows at m entries, right-aligned: the newest member stands in slot W - 1, unused slots on the left.

    vectors: float16 [m, W, d], unused slots zero; times: int64 [m, W], event ms, unused 0; length: int32 [m], members;
    own: int32 [m], the slot of the entry itself (W - 1 unless it came out of order, -1: late, not a member); complete:
    bool [m], False where members are known to be missing. Coordinates of the members: sources, with source: int32
    [m, W] (index into them, -1 unused), offset: int64 [m, W] and index: int32 [m, W]. levels: uint8 [m, 8], what the
    entry raised (`tally.LEVELS`), all 0 where it is not a member. raised: uint8 [m, W, 8], what each member raised;
    only from `latest`, else [m, 0, 8]. partners: int16 [m, W, PARTNERS], those of each member (`tally.Acts`), -1 for
    none.
    """

    vectors: NDArray[np.float16]
    times: NDArray[np.int64]
    length: NDArray[np.int32]
    own: NDArray[np.int32]
    complete: NDArray[np.bool_]
    sources: tuple[Source, ...]
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    index: NDArray[np.int32]
    levels: NDArray[np.uint8]
    raised: NDArray[np.uint8]
    partners: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.length)

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

    def prepare(self, offsets: Mapping[Source, int]) -> None:
        """Record, before they are committed to Kafka, how far the sources have been appended."""
        ...

    def committed(self, offsets: Mapping[Source, int]) -> None:
        """These offsets are committed: what only a redelivery before them would need may be forgotten."""
        ...

    def check_epoch(self, offsets: Mapping[Source, int]) -> None:
        """Compare with what Kafka holds as committed (sources without a commit left out), at start and on assignment.
        Raises `StateLostError` where the store remembers less."""
        ...

    def begin_rebuild(self, lost: StateLostError, others: Iterable[Source] = ()) -> None:
        """From here on appended entries fill what was lost, and no window is complete until `finish_rebuild` was called
        for all of `lost.resume` and, where all was lost, for the `others` (partitions with commits) by the
        consumers that read those."""
        ...

    def finish_rebuild(self, sources: Iterable[Source], horizon_ms: int = 0) -> None:
        """These sources are appended again up to their commit. horizon_ms: event time from which on nothing is
        missing, 0 if the replay reached back as far as the windows' age."""
        ...


@lru_cache(maxsize=65536)
def source_id(source: Source) -> int:
    """48 bits that stand for a source wherever windows are kept and in the order of entries with equal times."""
    return int.from_bytes(blake2b(f"{source[0]}\0{source[1]}".encode(), digest_size=6).digest(), "little")


def validate(entries: WindowEntries, dim: int) -> None:
    """Raise ValueError for arrays that do not fit together, and for values that no store could keep."""
    m = len(entries)
    shapes = {name: getattr(entries, name).shape for name in ("time", "vectors", "source", "offset", "index")}
    expected = {name: (m, dim) if name == "vectors" else (m,) for name in shapes}
    if shapes != expected:
        raise ValueError(f"window entries do not fit together: {shapes}, expected {expected}")
    if entries.acts is not None and entries.acts.partners.shape != (m, PARTNERS):
        raise ValueError(f"acts with partners {entries.acts.partners.shape} do not fit: [{m}, {PARTNERS}] was expected")
    if entries.vectors.dtype != np.float16:
        raise ValueError(f"window vectors must be float16, not {entries.vectors.dtype}")
    if m:
        for name, bits in (("time", 48), ("offset", 48), ("index", 24)):
            low, high = int(getattr(entries, name).min()), int(getattr(entries, name).max())
            if low < 0 or high >= 1 << bits:
                raise ValueError(f"{name} of window entries must be in 0..2^{bits}, got {low}..{high}")


def progress_of(entries: WindowEntries) -> dict[Source, int]:
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


_Key = tuple[int, int, int, int]
"""Where an entry stands in the order of its entity: (event time, source id, offset, index)."""


class _Entity:
    """One entity: slots of the window's members in order, and of displaced entries with the number that did it."""

    __slots__ = ("applied", "batch", "horizon", "live", "newest", "next", "slack", "tally", "trimmed")

    def __init__(self, horizon: int) -> None:
        self.live = array("i")
        self.slack: list[tuple[int, int]] = []
        self.applied: dict[int, tuple[int, int]] = {}
        self.newest: _Key = (-1, 0, 0, 0)
        self.next = 1
        self.trimmed = 0
        self.horizon = horizon
        self.batch = 0
        self.tally: Tally | None = None


class MemoryWindows:
    """Windows in this process, for `score` and `evaluate`: bounded by entities (least recently used go first), count
    and age. All entries lie in one table that grows by doubling; an entity is a few lists of slots in it. Slot 0 is
    always zero and stands for "unused"."""

    def __init__(
        self,
        *,
        dim: int,
        width: int = 32,
        age_ms: int = 7 * DAY_MS,
        max_entities: int = 200_000,
        max_slack: int = MAX_SLACK,
    ) -> None:
        self.dim, self.width, self.age_ms = dim, width, age_ms
        self.max_entities, self.max_slack = max_entities, max_slack
        self._entities: OrderedDict[str, _Entity] = OrderedDict()
        self._sources: dict[Source, int] = {}
        self._source_keys: list[int] = []
        self._committed: list[int] = []
        self._progress: dict[Source, int] = {}
        self._pending: set[Source] = set()
        self._horizon = 0
        self._evicted = 0
        self._batch = 0
        self._newest = 0
        self._free: list[int] = []
        self._vectors = np.zeros((1, dim), np.float16)
        self._time = np.zeros(1, np.int64)
        self._source = np.full(1, -1, np.int32)
        self._offset = np.zeros(1, np.int64)
        self._index = np.zeros(1, np.int32)
        self._number = np.zeros(1, np.int64)
        self._levels = np.zeros((1, len(LEVELS)), np.uint8)
        self._partners = np.full((1, PARTNERS), -1, np.int16)

    def __len__(self) -> int:
        return len(self._entities)

    def append(self, entries: WindowEntries) -> Windows:
        validate(entries, self.dim)
        m, width, age = len(entries), self.width, self.age_ms
        sources = np.array([self._source_number(s) for s in entries.sources], np.int32)[entries.source]
        slots = self._store(entries, sources)
        self._batch += 1
        entities, keys, numbers, times_kept = self._entities, self._source_keys, self._number, self._time
        counted: Sequence[bool] = [False] * m
        if entries.acts is not None:
            counted, failed = entries.acts.counted.tolist(), entries.acts.failed.tolist()
            amount, partners = entries.acts.amount.tolist(), bitmaps(entries.acts.partners)
        raised: list[bytes] = []
        at: list[int] = []
        flat, length = array("i"), [0] * m
        freed: list[int] = []
        own = np.full(m, width - 1, np.int32)
        exact = np.ones(m, np.bool_)
        horizon = [0] * m
        columns = (entries.entity, slots, entries.time.tolist(), sources.tolist())
        rows = zip(*columns, entries.offset.tolist(), entries.index.tolist(), strict=True)
        for i, (name, slot, time, source, offset, index) in enumerate(rows):
            entity = entities.get(name)
            if entity is None:
                entity = entities[name] = _Entity(self._evicted)
            else:
                entities.move_to_end(name)
            if entity.batch != self._batch:
                entity.batch = self._batch
                if entity.slack:
                    self._release(entity, freed)
            horizon[i] = entity.horizon
            window: Sequence[int]
            if (offset, index) <= entity.applied.get(source, (-1, 0)):
                freed.append(slot)
                window, own[i], exact[i] = self._as_it_was(entity, (time, keys[source], offset, index), source)
            else:
                entity.applied[source] = (offset, index)
                number = entity.next
                entity.next = number + 1
                numbers[slot] = number
                if counted[i]:
                    if entity.tally is None:
                        entity.tally = Tally()
                    raised.append(entity.tally.add(time, failed[i], amount[i], partners[i]))
                    at.append(slot)
                key = (time, keys[source], offset, index)
                live = entity.live
                if key > entity.newest:
                    entity.newest = key
                    live.append(slot)
                    place = 0
                else:
                    place = self._insert(entity, key, slot, number)
                    own[i] = place
                oldest = entity.newest[0] - age
                while len(live) > width or times_kept[live[0]] < oldest:
                    entity.slack.append((live.pop(0), number))
                window = live
            flat.extend(window)
            length[i] = len(window)
        if m:
            self._newest = max(self._newest, int(entries.time.max()))
        self._levels[at] = np.frombuffer(b"".join(raised), np.uint8).reshape(-1, len(LEVELS))
        lengths = np.array(length, np.int32)
        picked = np.zeros((m, width), np.int32)
        picked[np.arange(width) >= width - lengths[:, None]] = np.array(flat, np.int32)
        self.prepare(progress_of(entries))
        windows = self._gather(picked, lengths, own, exact, np.array(horizon, np.int64))
        self._free.extend(freed)
        self._evict()
        return windows

    def latest(self, entities: Sequence[str]) -> Windows:
        m, width = len(entities), self.width
        picked = np.zeros((m, width), np.int32)
        length = np.zeros(m, np.int32)
        horizon = np.full(m, self._evicted, np.int64)
        for i, name in enumerate(entities):
            entity = self._entities.get(name)
            if entity is not None:
                length[i], horizon[i] = len(entity.live), entity.horizon
                picked[i, width - len(entity.live) :] = entity.live
        own = np.where(length > 0, width - 1, -1).astype(np.int32)
        found = self._gather(picked, length, own, np.ones(m, np.bool_), horizon)
        return replace(found, raised=np.where(found.mask[:, :, None], self._levels[picked], np.uint8(0)))

    def prepare(self, offsets: Mapping[Source, int]) -> None:
        for source, offset in offsets.items():
            self._progress[source] = max(offset, self._progress.get(source, 0))

    def committed(self, offsets: Mapping[Source, int]) -> None:
        self.prepare(offsets)
        for source, offset in offsets.items():
            number = self._source_number(source)
            self._committed[number] = max(offset, self._committed[number])

    def check_epoch(self, offsets: Mapping[Source, int]) -> None:
        lost = {source: None for source, offset in offsets.items() if self._progress.get(source, 0) < offset}
        if lost:
            raise StateLostError(
                f"windows in memory start empty, but {len(lost)} partitions were read before: fill them again",
                wiped=not self._progress,
                resume=lost,
            )

    def begin_rebuild(self, lost: StateLostError, others: Iterable[Source] = ()) -> None:
        self._pending.update(lost.resume, others)

    def finish_rebuild(self, sources: Iterable[Source], horizon_ms: int = 0) -> None:
        self._pending.difference_update(sources)
        self._horizon = max(self._horizon, horizon_ms)

    def _source_number(self, source: Source) -> int:
        number = self._sources.setdefault(source, len(self._sources))
        if number == len(self._source_keys):
            self._source_keys.append(source_id(source))
            self._committed.append(0)
        return number

    def _store(self, entries: WindowEntries, sources: NDArray[np.int32]) -> list[int]:
        """Put every entry into the table and return its slots."""
        m, size = len(entries), len(self._time)
        if len(self._free) < m:
            grown = max(2 * size, size + m, 1024)
            for name in ("_vectors", "_time", "_source", "_offset", "_index", "_number", "_levels", "_partners"):
                old = getattr(self, name)
                new = np.empty((grown, *old.shape[1:]), old.dtype)
                new[:size] = old
                setattr(self, name, new)
            self._free.extend(range(grown - 1, size - 1, -1))
        slots = self._free[len(self._free) - m :]
        del self._free[len(self._free) - m :]
        at = np.array(slots, np.intp)
        self._vectors[at], self._time[at], self._source[at] = entries.vectors, entries.time, sources
        self._offset[at], self._index[at], self._levels[at] = entries.offset, entries.index, 0
        self._partners[at] = -1 if entries.acts is None else entries.acts.partners
        return slots

    def _key(self, slot: int) -> _Key:
        source = self._source_keys[self._source[slot]]
        return int(self._time[slot]), source, int(self._offset[slot]), int(self._index[slot])

    def _insert(self, entity: _Entity, key: _Key, slot: int, number: int) -> int:
        """Place an entry that is not the newest; returns its slot in the window that results, -1 if it is late."""
        live, low, high = entity.live, 0, len(entity.live)
        while low < high:
            middle = (low + high) // 2
            if self._key(live[middle]) < key:
                low = middle + 1
            else:
                high = middle
        if key[0] < entity.newest[0] - self.age_ms or (low == 0 and len(live) >= self.width):
            entity.slack.append((slot, number + 1))
            return -1
        live.insert(low, slot)
        return self.width - (len(live) - low)

    def _as_it_was(self, entity: _Entity, key: _Key, source: int) -> tuple[list[int], int, bool]:
        """The window at an entry delivered again, the entry's slot in it, and whether that is the one it got first."""
        kept = sorted((self._key(slot), slot) for slot in (*entity.live, *(slot for slot, _ in entity.slack)))
        found = [slot for at, slot in kept if at[1:] == key[1:] and self._source[slot] == source]
        if found:
            number = int(self._number[found[0]])
            members = [(at, slot) for at, slot in kept if self._number[slot] <= number]
        else:
            number = 0
            members = [(at, slot) for at, slot in kept if at <= key]
        oldest = members[-1][0][0] - self.age_ms if members else 0
        window = [slot for at, slot in members if at[0] >= oldest][-self.width :]
        own = self.width - len(window) + window.index(found[0]) if found and found[0] in window else -1
        return window, own, number > 0 and number >= entity.trimmed

    def _release(self, entity: _Entity, freed: list[int]) -> None:
        """Forget the displaced entries that no redelivery can ask for."""
        committed, floor = self._committed, entity.next
        if any(offset >= committed[source] for source, (offset, _) in entity.applied.items()):
            kept = np.array([*entity.live, *(slot for slot, _ in entity.slack)], np.intp)
            flying = self._offset[kept] >= np.array(committed, np.int64)[self._source[kept]]
            floor = int(self._number[kept[flying]].min(initial=entity.next))
        if len(entity.slack) > self.max_slack:
            floor = max(floor, sorted(displaced for _, displaced in entity.slack)[-self.max_slack - 1])
        keep = []
        for slot, displaced in entity.slack:
            if displaced > floor:
                keep.append((slot, displaced))
            else:
                freed.append(slot)
                entity.trimmed = max(entity.trimmed, displaced)
        entity.slack = keep

    def _evict(self) -> None:
        """Drop the least recently used entities beyond the bound, and those whose whole window is long past its age."""
        while self._entities:
            oldest = next(iter(self._entities.values()))
            if len(self._entities) <= self.max_entities and oldest.newest[0] >= self._newest - 2 * self.age_ms:
                break
            self._entities.popitem(last=False)
            self._evicted = max(self._evicted, oldest.newest[0] + 1)
            self._free.extend(oldest.live)
            self._free.extend(slot for slot, _ in oldest.slack)

    def _gather(
        self,
        picked: NDArray[np.int32],
        length: NDArray[np.int32],
        own: NDArray[np.int32],
        exact: NDArray[np.bool_],
        horizon: NDArray[np.int64],
    ) -> Windows:
        times = self._time[picked]
        known = is_complete(
            exact & (not self._pending),
            length,
            times[:, -1],
            np.maximum(horizon, self._horizon),
            self.width,
            self.age_ms,
        )
        return Windows(
            vectors=self._vectors[picked],
            times=times,
            length=length,
            own=own,
            complete=known,
            sources=tuple(self._sources),
            source=self._source[picked],
            offset=self._offset[picked],
            index=self._index[picked],
            levels=self._levels[np.where(own >= 0, picked[np.arange(len(own)), own], 0)],
            raised=np.zeros((len(own), 0, len(LEVELS)), np.uint8),
            partners=self._partners[picked],
        )
