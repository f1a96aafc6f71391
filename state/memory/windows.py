"""Entity windows in this process: the second implementation of the contract in `state.windows`."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from state.errors import SourcePartition, StateLostError
from state.rolling_counts import LEVELS, PARTNERS, RollingCounts, bitmaps
from state.windows import (
    DAY_MS,
    MAX_SLACK,
    REMEMBERED,
    WindowEntries,
    Windows,
    is_complete,
    progress_of,
    source_id,
    validate,
)

_SIZE = 4
_UNKNOWN = bytes(_SIZE)
_Key = tuple[int, int, int, int]
"""Where an entry stands in the order of its entity: (event time, source id, offset, index)."""


class _Entity:
    """One entity: slots of the window's members in order, and of displaced entries with the number that did it."""

    __slots__ = ("applied", "batch", "fingerprints", "horizon", "live", "newest", "next", "slack", "tally", "trimmed")

    def __init__(self, horizon: int) -> None:
        self.live = array("i")
        self.slack: list[tuple[int, int]] = []
        self.applied: dict[int, tuple[int, int]] = {}
        self.newest: _Key = (-1, 0, 0, 0)
        self.next = 1
        self.trimmed = 0
        self.horizon = horizon
        self.batch = 0
        self.tally: RollingCounts | None = None
        self.fingerprints = b""

    def repeats(self, fingerprint: bytes) -> bool:
        """Whether an event with this one came before; remembers it."""
        if fingerprint == _UNKNOWN:
            return False
        at = self.fingerprints.find(fingerprint)
        while at > 0 and at % _SIZE:  # It begins within one and ends within the next.
            at = self.fingerprints.find(fingerprint, at + 1)
        if at < 0:
            self.fingerprints = (self.fingerprints + fingerprint)[-_SIZE * REMEMBERED :]
        return at >= 0


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
        self._sources: dict[SourcePartition, int] = {}
        self._source_names: list[SourcePartition] = []
        self._topics: dict[SourcePartition, int] = {}
        self._source_keys: list[int] = []
        self._committed: list[int] = []
        self._progress: dict[SourcePartition, int] = {}
        self._pending: set[SourcePartition] = set()
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
        self._repeat = np.zeros(1, np.bool_)

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
        if entries.activity_counts is not None:
            counted, failed = entries.activity_counts.counted.tolist(), entries.activity_counts.failed.tolist()
            amount, partners = entries.activity_counts.amount.tolist(), bitmaps(entries.activity_counts.partners)
        prints = entries.fingerprint_bytes.tobytes()
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
                repeat = entity.repeats(prints[_SIZE * i : _SIZE * i + _SIZE])
                if counted[i] and not repeat:
                    if entity.tally is None:
                        entity.tally = RollingCounts()
                    raised.append(entity.tally.add(time, failed[i], amount[i], partners[i]))
                    at.append(slot)
                key = (time, keys[source], offset, index)
                live = entity.live
                if repeat:
                    self._repeat[slot] = True
                    entity.slack.append((slot, number + 1))
                    own[i] = -1
                elif key > entity.newest:
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

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        for source, offset in offsets.items():
            self._progress[source] = max(offset, self._progress.get(source, 0))

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        self.prepare(offsets)
        for source, offset in offsets.items():
            number = self._source_number(source)
            self._committed[number] = max(offset, self._committed[number])

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        for source, topic in topics.items():
            if self._topics.get(source, topic) != topic:
                self._sources.pop(source, None)
                self._progress.pop(source, None)
        self._topics |= topics

    def identified(self) -> dict[SourcePartition, int]:
        return dict(self._topics)

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        lost = {source: None for source, offset in offsets.items() if self._progress.get(source, 0) < offset}
        if lost:
            raise StateLostError(
                f"windows in memory start empty, but {len(lost)} partitions were read before: fill them again",
                wiped=not self._progress,
                resume=lost,
            )

    def begin_rebuild(self, lost: StateLostError, others: Iterable[SourcePartition] = ()) -> None:
        self._pending.update(lost.resume, others)

    def finish_rebuild(self, sources: Iterable[SourcePartition], horizon_ms: int = 0) -> None:
        self._pending.difference_update(sources)
        self._horizon = max(self._horizon, horizon_ms)

    def _source_number(self, source: SourcePartition) -> int:
        number = self._sources.setdefault(source, len(self._source_keys))
        if number == len(self._source_keys):
            self._source_names.append(source)
            self._source_keys.append(source_id(source))
            self._committed.append(0)
        return number

    def _store(self, entries: WindowEntries, sources: NDArray[np.int32]) -> list[int]:
        """Put every entry into the table and return its slots."""
        m, size = len(entries), len(self._time)
        if len(self._free) < m:
            grown = max(2 * size, size + m, 1024)
            marks = ("_number", "_levels", "_partners", "_repeat")
            for name in ("_vectors", "_time", "_source", "_offset", "_index", *marks):
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
        self._repeat[at] = False
        self._partners[at] = -1 if entries.activity_counts is None else entries.activity_counts.partners
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
            members = [(at, slot) for at, slot in kept if self._number[slot] <= number and not self._repeat[slot]]
        else:
            number = 0
            members = [(at, slot) for at, slot in kept if at <= key and not self._repeat[slot]]
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
            sources=tuple(self._source_names),
            source=self._source[picked],
            offset=self._offset[picked],
            index=self._index[picked],
            levels=self._levels[np.where(own >= 0, picked[np.arange(len(own)), own], 0)],
            raised=np.zeros((len(own), 0, len(LEVELS)), np.uint8),
            partners=self._partners[picked],
        )
