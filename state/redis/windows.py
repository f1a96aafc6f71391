"""Entity windows in Valkey or Redis (7 or later): one key an entity, one server-side function that changes it.

Promises what `state.windows` says, across restarts and consumers: each entity of a batch costs one call that sends its
entries once and gets the key's value back; the overlapping windows are cut from that here. What the server lost is
noticed before any window is returned. Does not promise durability: that is the server's (appendonly, replicas).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.errors import SourcePartition, StateError, StateLostError
from state.redis import formats
from state.redis.client import RedisServer
from state.rolling_counts import PARTNERS
from state.windows import DAY_MS, MAX_SLACK, WindowEntries, Windows, is_complete, progress_of, source_id, validate

_FUNCTIONS = files("state.redis").joinpath("windows.lua").read_text()
_HEADER, _SOURCE, _HEAD, _ENTRY = 28, 21, 36, 43
"""Sizes of the records that windows.lua describes."""
_REPEAT = 128
"""The flag of an entry that is a repeat."""
_Bytes = NDArray[np.uint8]


class RedisWindows:
    """Windows of one encoder in one Valkey or Redis, for one thread.

    Args:
        url: redis://, rediss:// (TLS) or unix://, with user and password where the server wants them.
        encoder: hash of the encoder whose vectors these are; with width, age and format part of every key, so that
            another encoder, width, age or format begins with windows of its own.
        dim: d, the length of a vector.
        ttl_ms: wall-clock time after which an untouched entity is garbage; longer than the age and the downtime to
            survive, and a week longer than the age by default.
        timeout_s, retries, depth, connection: as in `RedisServer`.
    """

    def __init__(
        self,
        url: str,
        *,
        encoder: str,
        dim: int,
        width: int = 32,
        age_ms: int = 7 * DAY_MS,
        tenant: str = "default",
        ttl_ms: int | None = None,
        max_slack: int = MAX_SLACK,
        timeout_s: float = 5.0,
        retries: int = 3,
        depth: int = 256,
        **connection: Any,
    ) -> None:
        for name, value in (("tenant", tenant), ("encoder", encoder)):
            if not value or set(value) & set("{}:"):
                raise ValueError(
                    f"{name} {value!r} would not make a key: it must be non-empty, without '{{', '}}' and ':'"
                )
        self.dim, self.width, self.age_ms = dim, width, age_ms
        self.ttl_ms = age_ms + 7 * DAY_MS if ttl_ms is None else ttl_ms
        if self.ttl_ms <= age_ms:
            raise ValueError(f"a ttl of {self.ttl_ms} ms must be longer than the age of {age_ms} ms")
        space = f"{encoder}-{width}-{age_ms}"
        self._tenant, self._space = tenant, space + formats.suffix("windows", formats.WINDOWS)
        marker = f"{{{tenant}}}:marker:"
        self._marker = marker + self._space
        self._earlier_markers = [marker + space + of for of in formats.earlier("windows", formats.WINDOWS)]
        self._max_slack = max_slack
        functions = _FUNCTIONS.replace("FORMAT", str(formats.WINDOWS))
        self._server = RedisServer(url, functions, timeout_s=timeout_s, retries=retries, depth=depth, **connection)
        self._epoch: int | None = None
        self._state = (0, 0)
        self._progress: dict[SourcePartition, int] = {}
        self._committed: dict[SourcePartition, int] = {}
        self._refilling: set[SourcePartition] = set()
        self._names: dict[int, SourcePartition] = {}
        self._topics: dict[SourcePartition, int] = {}
        self._renamed: dict[SourcePartition, SourcePartition] = {}
        """Sources of a topic that was deleted and created again, by the names that their marks have."""
        self._crowded: set[str] = set()

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._server.close()

    def round_trips(self) -> dict[str, float]:
        """How long the server takes to answer, in seconds, by its name; empty before its first answer."""
        return {self._server.place: self._server.round_trip_s} if self._server.round_trip_s else {}

    def append(self, entries: WindowEntries) -> Windows:
        validate(entries, self.dim)
        return self._server.retried(lambda: self._append(entries))

    def latest(self, entities: Sequence[str]) -> Windows:
        table = self._server.retried(lambda: self._latest(entities))
        rows = np.maximum(table.end[:, None] + np.arange(-self.width, 0), -1)
        picked = np.where(rows >= (table.end - table.live)[:, None], rows, -1)
        own = np.where(table.live > 0, self.width - 1, -1).astype(np.int32)
        found = self._windows(table, picked, own, np.ones(len(entities), np.bool_))
        return replace(found, raised=table.levels[picked])

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._server.retried(lambda: self._check(self._server.call("mark", self._marker, self._marks(offsets))))
        self._remember(offsets)

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        for source, offset in offsets.items():
            self._committed[source] = max(offset, self._committed.get(source, 0))

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        self._server.retried(lambda: self._identify(topics))
        for source, topic in topics.items():
            if self._topics.get(source, topic) != topic:
                self._progress.pop(source, None)
                self._committed.pop(source, None)
                self._refilling.discard(source)
        self._topics |= topics

    def identified(self) -> dict[SourcePartition, int]:
        marker = self._server.retried(lambda: self._server.hash(self._marker))
        return {_source(field[2:]): topic for field, topic in marker.items() if field.startswith("n|")}

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._server.retried(self._server.refuse_eviction)
        for earlier in self._earlier_markers:
            self._leave(earlier, offsets)
        marker = self._server.retried(lambda: self._server.hash(self._marker))
        read_before = {source: offset for source, offset in offsets.items() if offset > 0}
        epoch = marker.get("epoch", 0)
        if not epoch and not read_before and self._epoch is None:
            self._take(self._server.retried(lambda: self._server.call("begin", self._marker, ["0", "1"])))
        elif not epoch or self._epoch not in (None, epoch):
            self._progress.update(read_before)
            raise self._lost()
        else:
            self._epoch = epoch
            behind: dict[SourcePartition, int | None] = {}
            for source, offset in read_before.items():
                progress = marker.get(f"p|{self._name(source)}")
                if progress is None or progress < offset or f"r|{self._name(source)}" in marker:
                    behind[source] = progress
            if behind:
                raise self._fell_behind(behind)
        self._remember(read_before)
        self.committed(read_before)

    def begin_rebuild(self, lost: StateLostError, others: Iterable[SourcePartition] = ()) -> None:
        waited_for = {*lost.resume, *(others if lost.wiped else ())}
        # If the marker is gone, so are the marks of topics that were before these.
        self._server.retried(lambda: self._identify(self._topics))
        arguments = [str(self._epoch or 0), "1" if lost.wiped else "0", *map(self._name, waited_for)]
        self._take(self._server.retried(lambda: self._server.call("begin", self._marker, arguments)))
        if lost.wiped:
            self._progress.clear()
        self._progress.update({source: offset or 0 for source, offset in lost.resume.items()})
        self._refilling = set(lost.resume)

    def finish_rebuild(self, sources: Iterable[SourcePartition], horizon_ms: int = 0) -> None:
        done = set(sources)
        self._take(
            self._server.retried(
                lambda: self._server.call("finish", self._marker, [str(horizon_ms), *map(self._name, done)])
            )
        )
        self._refilling -= done

    def _leave(self, marker: str, sources: Iterable[SourcePartition]) -> None:
        # Read before, as there is seldom anything to leave, and a replica can be read and not written.
        if self._server.retried(lambda: self._server.hash(marker)):
            self._server.retried(lambda: self._server.call("leave", marker, list(map(_name, sources))))

    # What follows runs once and is repeated as a whole by `retried`.

    def _append(self, entries: WindowEntries) -> Windows:
        progress = progress_of(entries)
        # Before: nothing may be written after what is missing. Again after: it may have gone missing meanwhile.
        self._check(self._server.call("mark", self._marker, self._marks(dict.fromkeys(progress, 0))))
        names: dict[str, int] = {}
        entity = np.array([names.setdefault(name, len(names)) for name in entries.entity], np.intp)
        order = np.argsort(entity, kind="stable")
        bounds = np.searchsorted(entity[order], np.arange(len(names) + 1))
        commands = self._push_commands(entries, list(names), order, bounds)
        commands.append(self._server.command("mark", self._marker, self._marks(progress)))
        replies = self._server.execute(commands)
        self._check(replies.pop())  # also where a push found that another consumer has begun anew
        self._remember(progress)
        self._names.update({self._id(source): source for source in entries.sources})

        table = self._table(replies)
        self._watch_slack(list(names), table)
        number = np.zeros(len(entries), np.int64)
        number[order] = _uint(np.frombuffer(b"".join(reply[0] for reply in replies), np.uint8).reshape(-1, 5))
        picked, own = self._pick(table, entity, number, entries)
        exact = (number > 0) & (number >= table.trimmed[entity])
        return self._windows(table, picked, own, exact)

    def _latest(self, entities: Sequence[str]) -> _Table:
        self._check(self._server.call("mark", self._marker, self._marks({})))
        parameters = self._parameters()
        commands = [self._server.command("push", self._key(name), [parameters, b"", b"", b""]) for name in entities]
        return self._table(self._server.execute(commands))

    def _table(self, replies: Sequence[Sequence[bytes]]) -> _Table:
        if any(len(reply) == 1 for reply in replies):
            raise self._lost("it has values of another format under keys of this one")
        return _Table(replies, self.dim)

    def _push_commands(
        self, entries: WindowEntries, names: list[str], order: NDArray[np.intp], bounds: NDArray[np.intp]
    ) -> list[tuple[Any, ...]]:
        ids = np.array([self._id(source) for source in entries.sources], np.int64)
        done = np.array([self._committed.get(source, 0) for source in entries.sources], np.int64)
        columns = ((ids[entries.source], 6), (entries.time, 6), (entries.offset, 6), (entries.index, 3))
        packed = [_bytes(column[order], size) for column, size in (*columns, (done[entries.source], 6))]
        packed += [_act_bytes(entries)[order], entries.fingerprint_bytes[order]]
        heads = memoryview(np.ascontiguousarray(np.concatenate(packed, axis=1)).tobytes())
        vectors = memoryview(np.ascontiguousarray(entries.vectors[order]).tobytes())
        parameters, size, stride = self._parameters(), _ENTRY, 2 * self.dim
        crowded = self._all_committed() if not self._crowded.isdisjoint(names) else b""
        commands = []
        for name, start, end in zip(names, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            known = crowded if name in self._crowded else b""
            parts = [parameters, known, heads[start * size : end * size], vectors[start * stride : end * stride]]
            commands.append(self._server.command("push", self._key(name), parts))
        return commands

    def _parameters(self) -> bytes:
        if self._epoch is None:
            raise StateError("check_epoch must be called before windows are used: the store may have lost some")
        numbers = ((self._epoch, 6), (self.width, 2), (2 * self.dim, 2), (self.age_ms, 6), (self.ttl_ms, 6))
        flags = ((self._max_slack, 4), (int(bool(self._refilling)), 1))
        return b"".join(number.to_bytes(size, "little") for number, size in (*numbers, *flags))

    def _pick(
        self, table: _Table, entity: NDArray[np.intp], number: NDArray[np.int64], entries: WindowEntries
    ) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """The table's rows in the window at each entry, [m, W] with -1 for unused slots, and the entry's own slot.

        Where an entity's entries came in order, as most do, row order is number order and a window is a stretch of rows
        that ends at the entry; all of those are found at once.
        """
        width, age = self.width, self.age_ms
        picked = np.full((len(entries), width), -1, np.intp)
        own = np.full(len(entries), width - 1, np.int32)
        ordered = table.ordered
        candidates = np.flatnonzero(ordered[table.entity])
        rank = table.entity[candidates] << 40 | table.number[candidates]
        easy = np.flatnonzero(ordered[entity] & (number > 0))
        at = candidates[np.searchsorted(rank, entity[easy] << 40 | number[easy])] if len(easy) else easy
        rows = np.maximum(at[:, None] + np.arange(1 - width, 1), -1)
        inside = (rows >= table.start[entity[easy], None]) & (table.time[rows] >= table.time[at, None] - age)
        picked[easy] = np.where(inside, rows, -1)
        for i in np.flatnonzero(~(ordered[entity] & (number > 0))):
            start, end = table.start[entity[i]], table.end[entity[i]]
            if number[i]:
                rows = start + np.flatnonzero((table.number[start:end] <= number[i]) & ~table.repeat[start:end])
            else:
                source = self._id(entries.sources[entries.source[i]])
                key = (int(entries.time[i]), source, int(entries.offset[i]), int(entries.index[i]))
                others = start + np.flatnonzero(~table.repeat[start:end])
                rows = np.array([row for row in others.tolist() if table.key(row) <= key], np.intp)
            if len(rows):
                rows = rows[table.time[rows] >= table.time[rows[-1]] - age][-width:]
                picked[i, width - len(rows) :] = rows
            place = np.flatnonzero(table.number[rows] == number[i])
            own[i] = width - len(rows) + place[0] if len(place) else -1
        return picked, own

    def _windows(
        self, table: _Table, picked: NDArray[np.intp], own: NDArray[np.int32], exact: NDArray[np.bool_]
    ) -> Windows:
        horizon, pending = self._state
        times = table.time[picked]
        length = (picked >= 0).sum(axis=1).astype(np.int32)
        ids, source = np.unique(table.source, return_inverse=True)
        # The last row of the table is the unused one: its id 0 sorts first, hence the -1.
        return Windows(
            vectors=table.vectors[picked],
            times=times,
            length=length,
            own=own,
            complete=is_complete(exact & (pending == 0), length, times[:, -1], horizon, self.width, self.age_ms),
            sources=self._sources(ids[1:]),
            source=(source[picked] - 1).astype(np.int32),
            offset=table.offset[picked],
            index=table.index[picked],
            levels=table.levels[np.where(own >= 0, picked[np.arange(len(own)), own], -1)],
            raised=np.zeros((len(own), 0, table.levels.shape[1]), np.uint8),
            partners=table.partners[picked],
        )

    def _sources(self, ids: NDArray[np.int64]) -> tuple[SourcePartition, ...]:
        if any(number not in self._names for number in ids.tolist()):
            for field in self._server.retried(lambda: self._server.hash(self._marker)):
                if field.startswith("p|"):
                    source = _source(field[2:])
                    self._names[source_id(source)] = source
        return tuple(self._names.get(number, (f"source-{number:012x}", -1)) for number in ids.tolist())

    def _watch_slack(self, names: list[str], table: _Table) -> None:
        """An entity whose displaced entries pile up waits for the commit of a partition that others read: its next call
        tells it all commits that the marker knows of."""
        for i in np.flatnonzero(table.end - table.start - table.live > self.width):
            self._crowded.add(names[i])
        if len(self._crowded) > 100_000:
            self._crowded.clear()

    def _all_committed(self) -> bytes:
        known = ((field, offset) for field, offset in self._server.hash(self._marker).items() if field.startswith("c|"))
        pairs = ((source_id(_source(field[2:])), offset) for field, offset in known)
        return b"".join(number.to_bytes(6, "little") for pair in pairs for number in pair)

    # The marker.

    def _identify(self, topics: Mapping[SourcePartition, int]) -> None:
        """Sources whose topic is not the first of its name get other marks: their offsets are those of other events."""
        if not topics:
            return
        arguments = [str(word) for source, topic in topics.items() for word in (_name(source), topic)]
        first = self._server.call("identify", self._marker, arguments)
        for (source, topic), number in zip(topics.items(), first, strict=True):
            (name, partition), before = source, int(number)
            self._renamed.pop(source, None)
            if topic != before:
                self._renamed[source] = f"{name}#{topic:012x}", partition
                self._names[source_id(source)] = f"{name}#{before:012x}", partition
            self._names[self._id(source)] = source

    def _id(self, source: SourcePartition) -> int:
        return source_id(self._renamed.get(source, source))

    def _name(self, source: SourcePartition) -> str:
        return _name(self._renamed.get(source, source))

    def _marks(self, progress: Mapping[SourcePartition, int]) -> list[Any]:
        if self._epoch is None:
            raise StateError("check_epoch must be called before windows are used: the store may have lost some")
        arguments: list[Any] = [self._epoch]
        for source, offset in progress.items():
            least = self._progress.get(source, 0)
            arguments += [self._name(source), least, max(offset, least), self._committed.get(source, 0)]
        return arguments

    def _check(self, state: list[int]) -> None:
        """Take what the marker says; raise `StateLostError` if it is not what this client had been told."""
        if state[0] != self._epoch:
            raise self._lost()
        self._state = (state[1], state[2])
        if len(state) > 3 and state[3]:
            raise self._fell_behind()

    def _take(self, state: list[int]) -> None:
        self._epoch = self._epoch if state[0] == 0 else state[0]
        self._check(state)

    def _remember(self, progress: Mapping[SourcePartition, int]) -> None:
        for source, offset in progress.items():
            self._progress[source] = max(offset, self._progress.get(source, 0))

    def _lost(self, how: str = "its marker is missing or of another epoch") -> StateLostError:
        return StateLostError(
            f"{self._server.place} has lost the windows {self._space} ({how}): append the events of "
            f"the last {self.age_ms / DAY_MS:g} days again",
            wiped=True,
            resume=dict.fromkeys(self._progress),
        )

    def _fell_behind(self, behind: dict[SourcePartition, int | None] | None = None) -> StateLostError:
        if behind is None:
            behind = {}
            marker = self._server.hash(self._marker)
            for source, offset in self._progress.items():
                progress = marker.get(f"p|{self._name(source)}")
                if offset > (progress or 0):
                    behind[source] = progress
        return StateLostError(
            f"{self._server.place} has gone back to an earlier state (a snapshot, or a failover): append the events of "
            f"{len(behind)} partitions again, from the offsets given",
            wiped=False,
            resume=behind,
        )

    def _key(self, entity: str) -> bytes:
        name = entity.encode("utf-8", "surrogatepass")
        if len(name) > 256:
            name = name[:64] + b"~" + blake2b(name, digest_size=16).hexdigest().encode()
        return b"{%s:%s}:%s" % (self._tenant.encode(), name, self._space.encode())


class _Table:
    """All entries of the keys that a batch touched, as columns: one row an entry, in the order of its entity, entities
    one after another, and last a row of zeros that stands for "unused".

    Of R rows: entity, number, time, source (48-bit id), offset, index, levels uint8 [R, 8], partners int16 [R,
    PARTNERS], repeat bool [R], vectors float16 [R, d]. Of E entities: start, end (rows), live, trimmed, ordered (row
    order is number order). None with a repeat is ordered: it stands first, and members from before it are kept as long.
    """

    def __init__(self, replies: Sequence[Sequence[bytes]], dim: int) -> None:
        values = [reply[1] or bytes(_HEADER) for reply in replies]
        header = np.frombuffer(b"".join([value[:_HEADER] for value in values]), np.uint8).reshape(-1, _HEADER)
        kept, self.live, sources = (_uint(header[:, a:b]) for a, b in ((17, 21), (21, 23), (23, 25)))
        self.trimmed = _uint(header[:, 12:17])
        heads_at = _HEADER + sources * _SOURCE + (kept - self.live) * 5
        vectors_at = heads_at + kept * _HEAD
        spans = list(zip(values, heads_at.tolist(), vectors_at.tolist(), kept.tolist(), sources.tolist(), strict=True))
        tables = b"".join([value[_HEADER : _HEADER + _SOURCE * count] for value, _, _, _, count in spans])
        heads = b"".join([value[a:b] for value, a, b, _, _ in spans]) + bytes(_HEAD)
        vectors = b"".join([value[b : b + 2 * dim * k] for value, _, b, k, _ in spans]) + bytes(2 * dim)
        head = np.frombuffer(heads, np.uint8).reshape(-1, _HEAD)
        self.number, self.time, place, self.offset, index = (
            _uint(head[:, a:b]) for a, b in ((0, 5), (5, 11), (11, 13), (13, 19), (19, 22))
        )
        self.index = index.astype(np.int32)
        self.levels = head[:, 22:30]
        self.repeat = head[:, 30] >= _REPEAT
        there = head[:, 30:31] >> np.arange(2, 2 + PARTNERS) & 1
        self.partners = np.where(there, head[:, 31:], np.int16(-1)).astype(np.int16)
        self.vectors = np.frombuffer(vectors, np.float16).reshape(-1, dim)
        self.end = np.cumsum(kept)
        self.start = self.end - kept
        self.entity = np.append(np.repeat(np.arange(len(values)), kept), -1)
        ids = np.append(_uint(np.frombuffer(tables, np.uint8).reshape(-1, _SOURCE)[:, :6]), 0)
        table_start = np.append(np.cumsum(sources) - sources, 0)
        self.source = ids[np.where(place > 0, table_start[self.entity] + place - 1, -1)]
        falls = np.flatnonzero((np.diff(self.number) < 0) & (np.diff(self.entity) == 0))
        self.ordered = np.ones(len(values) + 1, np.bool_)
        self.ordered[-1] = False  # the last row's entity, -1
        self.ordered[self.entity[falls]] = False

    def key(self, row: int) -> tuple[int, int, int, int]:
        """Where a row stands in the order of its entity."""
        return int(self.time[row]), int(self.source[row]), int(self.offset[row]), int(self.index[row])


def _uint(column: _Bytes) -> NDArray[np.int64]:
    """Little-endian unsigned integers of up to 7 bytes, uint8 [n, k], as int64 [n]."""
    wide = np.zeros((len(column), 8), np.uint8)
    wide[:, : column.shape[1]] = column
    return wide.view("<i8")[:, 0]


def _bytes(column: NDArray[Any], size: int) -> _Bytes:
    """The inverse of `_uint`: integers [n] as uint8 [n, size]."""
    return column.astype("<i8")[:, None].view(np.uint8)[:, :size]


def _act_bytes(entries: WindowEntries) -> _Bytes:
    """What each entry adds to the counts, as windows.lua unpacks it: uint8 [m, 12]."""
    packed = np.zeros((len(entries), 7 + PARTNERS), np.uint8)
    if (activity_counts := entries.activity_counts) is not None:
        there = (activity_counts.partners >= 0) << np.arange(2, 2 + PARTNERS)
        packed[:, 0] = activity_counts.counted + 2 * activity_counts.failed + there.sum(1)
        packed[:, 1:7] = _bytes(activity_counts.amount, 6)
        packed[:, 7:] = np.maximum(activity_counts.partners, 0)
    return packed


def _name(source: SourcePartition) -> str:
    return f"{source[1]}|{source[0]}"


def _source(name: str) -> SourcePartition:
    partition, topic = name.split("|", 1)
    return topic, int(partition)
