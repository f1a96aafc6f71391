"""Co-occurrence of partners: how often two partners of an entity came within an hour of each other.

Both partners may be usual, and alternating between them, too; unusual is both within an hour. Partners (addresses,
hosts, services, destinations) are hashed into 256 places for each sort (`Windows.partners`), so two may share a place:
that can hide a pair, never raise one. Promises to judge only entities and partners that are well known from training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.rate_profiles import hashed
from state.rolling_counts import HOUR_MS, PARTNERS, PLACES
from state.windows import Windows

SPAN_MS = HOUR_MS
LEAST = 5
"""The least events of an entity with a partner that make the partner well known."""
MAX_COUNTS = 4_000_000
"""12 bytes each; of more, those of the entities seen first are kept."""
_ANY = PLACES
_BASE = PLACES + 1
_NONE = -1
_Places = NDArray[np.int64] | int


def near(windows: Windows) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """For m entries: their own partners, int16 [m, PARTNERS], and those of earlier members within SPAN_MS, int16 [m, W,
    PARTNERS]; -1 for none, and for an entry that is not a member of its window."""
    m, width = windows.times.shape
    rows, own = np.arange(m), windows.own
    before = windows.mask & (np.arange(width) < own[:, None])
    before &= windows.times[rows, own][:, None] - windows.times <= SPAN_MS
    mine = np.where((own >= 0)[:, None], windows.partners[rows, own], np.int16(_NONE))
    return mine, np.where(before[:, :, None], windows.partners, np.int16(_NONE))


class Cooccurrence:
    """The pair counts of e entities. keys: uint64 [e], ascending hashes; events: int32 [e, PARTNERS], events with a
    partner of each sort; pairs: int64 [k], ascending, packed (entity, sort, place, earlier place), each place may stand
    for any; counts: int32 [k], the events of each pair."""

    def __init__(
        self,
        keys: NDArray[np.uint64],
        events: NDArray[np.int32],
        pairs: NDArray[np.int64],
        counts: NDArray[np.int32],
    ) -> None:
        self.keys, self.events, self.pairs, self.counts = keys, events, pairs, counts

    def surprise(
        self, entities: Sequence[str], own: NDArray[np.int16], before: NDArray[np.int16]
    ) -> NDArray[np.float64]:
        """float64 [m, PARTNERS], nats: log of expected over observed events of the partner of each sort with one of the
        earlier ones, the maximum over these; 0 where no pair is rarer than expected. Arrays as from `near`."""
        surprise = np.zeros(own.shape)
        if not len(self.keys) or not len(self.pairs):
            return surprise
        wanted = hashed(entities)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        rows, sort, now, then = _met(own, before)
        fine = (self.keys[at] == wanted)[rows] & (now != then)
        rows, sort, now, then = rows[fine], sort[fine], now[fine], then[fine]
        entity = at[rows]
        n_now, n_then = (self._count(entity, sort, place, _ANY) for place in (now, then))
        fine = (n_now >= LEAST) & (n_then >= LEAST)
        rows, sort, now, then, entity, n_now, n_then = (x[fine] for x in (rows, sort, now, then, entity, n_now, n_then))
        share_now, share_then = (self._count(entity, sort, _ANY, place) for place in (now, then))
        by_chance = (n_now * share_then + n_then * share_now) / np.maximum(self.events[entity, sort], 1)
        together = self._count(entity, sort, now, then) + self._count(entity, sort, then, now)
        np.maximum.at(surprise, (rows, sort), np.log((by_chance + 0.5) / (together + 0.5)))
        return surprise

    def changing(self, entity: str, sort: int) -> tuple[int, int]:
        """The number of other entities that changed between two well known partners of this sort within an hour, and of
        those that had a partner of this sort."""
        peers = self.keys != hashed([entity])[0]
        return int((self._changed[:, sort] & peers).sum()), int(((self.events[:, sort] > 0) & peers).sum())

    @cached_property
    def _changed(self) -> NDArray[np.bool_]:
        """bool [e, PARTNERS]: whether the entity changed between two partners of a sort within an hour."""
        base, then = np.divmod(self.pairs, _BASE)
        base, now = np.divmod(base, _BASE)
        changed = np.zeros(self.events.size, np.bool_)
        changed[base[(now != _ANY) & (then != _ANY) & (now != then)]] = True
        return changed.reshape(self.events.shape)

    def _count(
        self, entity: NDArray[np.intp], sort: NDArray[np.intp], now: _Places, then: _Places
    ) -> NDArray[np.int64]:
        wanted = _packed(entity, sort, now, then)
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return np.where(self.pairs[at] == wanted, self.counts[at], 0).astype(np.int64)


class CooccurrenceCounts:
    """Counts training, batch by batch, into `Cooccurrence`."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._pairs: list[NDArray[np.int64]] = []
        self._counts: list[NDArray[np.int64]] = []
        self._held = 0

    def add(self, entities: Sequence[str], own: NDArray[np.int16], before: NDArray[np.int16]) -> None:
        """Add m pairs of event and entity; arrays as from `near`."""
        number = np.array([self._number.setdefault(name, len(self._number)) for name in entities], np.int64)
        rows, sort = np.nonzero(own >= 0)
        now = own[rows, sort].astype(np.int64)
        row, of, place, then = _met(own, before)
        _, once = np.unique(np.column_stack([row, of, then]), axis=0, return_index=True) if len(row) else (None, row)
        row, of, place, then = row[once], of[once], place[once], then[once]
        entity = number[row]
        keys = [
            _packed(number[rows], sort, _ANY, _ANY),
            _packed(number[rows], sort, now, _ANY),
            _packed(entity, of, _ANY, then),
            _packed(entity, of, place, then),
        ]
        pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
        self._pairs.append(pairs)
        self._counts.append(counts)
        self._held += len(pairs)
        if self._held > 2 * MAX_COUNTS:
            self._merge()

    def _merge(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pairs, which = np.unique(np.concatenate([np.empty(0, np.int64), *self._pairs]), return_inverse=True)
        counts = np.zeros(len(pairs), np.int64)
        np.add.at(counts, which.ravel(), np.concatenate([np.empty(0, np.int64), *self._counts]))
        self._pairs, self._counts, self._held = [pairs], [counts], len(pairs)
        return pairs, counts

    def finish(self) -> Cooccurrence:
        """The counts of all well known partners."""
        pairs, counts = self._merge()
        base, then = np.divmod(pairs, _BASE)
        base, now = np.divmod(base, _BASE)
        entity, sort = np.divmod(base, PARTNERS)
        events = np.zeros((len(self._number), PARTNERS), np.int32)
        total = (now == _ANY) & (then == _ANY)
        events[entity[total], sort[total]] = counts[total]
        well_known = np.zeros((len(self._number) * PARTNERS, _BASE), np.bool_)
        of_place = (now != _ANY) & (then == _ANY)
        well_known[base[of_place], now[of_place]] = counts[of_place] >= LEAST
        well_known[:, _ANY] = True
        kept = np.flatnonzero(well_known[base, now] & well_known[base, then] & ~total)[:MAX_COUNTS]
        keys = hashed(list(self._number))
        order = np.argsort(keys, kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        packed = _packed(rank[entity[kept]], sort[kept], now[kept], then[kept])
        by_key = np.argsort(packed, kind="stable")
        return Cooccurrence(keys[order], events[order], packed[by_key], counts[kept][by_key].astype(np.int32))


def _met(
    own: NDArray[np.int16], before: NDArray[np.int16]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """All pairs of an event's partner and an earlier one of the same sort: row, sort, place, earlier place."""
    row, slot, sort = np.nonzero((before >= 0) & (own >= 0)[:, None])
    return row, sort, own[row, sort].astype(np.int64), before[row, slot, sort].astype(np.int64)


def _packed(entity: NDArray[Any], sort: NDArray[np.intp], now: _Places, then: _Places) -> NDArray[np.int64]:
    packed: NDArray[np.int64] = ((entity.astype(np.int64) * PARTNERS + sort) * _BASE + now) * _BASE + then
    return packed
