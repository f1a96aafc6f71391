"""Rolling counts of an entity: events, failures, distinct partners and bytes of the last two hours and the last day.

There is a bucket for each of the last 24 hours of event time that had events. An event is judged by the levels that it
*raised*: for each count the new level, 0 if the level did not change. A level is a sixth of a doubling, so that an
entity that is busy all day raises a few dozen levels, not one at every event. Distinct partners are counted by linear
counting (Whang et al. 1990) in a bitmap of 256 places. The rules equal those of windows.lua.

Promises that any order of the same events gives the same buckets. The levels that late events raise depend on their
order: they are added to their own hour and compared with the counts at that moment.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

HOUR_MS = 3_600_000
HOURS = 24
"""Buckets kept, back from the entity's newest."""
NEAR = 2
"""The short span: the hour of the event and the one before it."""
PLACES = 256
PARTNERS = 5
"""Partners of one event."""
MOST = 255
MOST_BYTES = (1 << 47) - 1
"""The largest number of bytes of a bucket; more are not counted."""
COUNTS = ("events", "failures", "partners", "bytes")
SPANS = ("hour", "day")
LEVELS = tuple(f"{count}.{span}" for count in COUNTS for span in SPANS)
"""The columns of levels (uint8 [m, 8]): for each count the short span and the day."""
STEPS = 6


class ActivityCounts(Protocol):
    """What m entries add to the counts, as from `encoder.ocsf.activity_counts`. counted, failed: bool [m]; amount:
    int64 [m] in 0..2^44, bytes; partners: int16 [m, PARTNERS], places in 0..255, -1 for none."""

    @property
    def counted(self) -> NDArray[np.bool_]: ...
    @property
    def failed(self) -> NDArray[np.bool_]: ...
    @property
    def amount(self) -> NDArray[np.int64]: ...
    @property
    def partners(self) -> NDArray[np.int16]: ...


def count(level: NDArray[np.integer] | float) -> NDArray[np.float64]:
    """The least count of a level: the inverse of `level_of`."""
    return np.exp2(np.asarray(level, np.float64) / STEPS) - 1.0


def level_of(count: float) -> int:
    """The level of a count, floor(6 log2(1 + count)), at most 255."""
    return min(int(STEPS * math.log2(1.0 + count) + 1e-9), MOST)


_OF_COUNT = [level_of(count) for count in range(4096)]
_OF_PLACES = [level_of(-PLACES * math.log1p(-min(used, PLACES - 0.5) / PLACES)) for used in range(PLACES + 1)]


def _of_count(count: int) -> int:
    return _OF_COUNT[count] if count < 4096 else level_of(count)


class _Sums:
    """The sums of several buckets: events, failures, bytes, and the bitmap of partners."""

    __slots__ = ("amount", "events", "failures", "partners")

    def __init__(self) -> None:
        self.events = self.failures = self.amount = self.partners = 0

    def add(self, events: int, failures: int, amount: int, partners: int) -> tuple[int, int, int, int]:
        """Returns the levels that this raised, in the order of `COUNTS`, 0 for unchanged."""
        before = self.events, self.failures, self.partners, self.amount
        self.events += events
        self.failures += failures
        self.amount += amount
        self.partners |= partners
        return (
            _raised(_of_count(before[0]), _of_count(self.events)),
            _raised(_of_count(before[1]), _of_count(self.failures)) if failures else 0,
            _raised(_OF_PLACES[before[2].bit_count()], _OF_PLACES[self.partners.bit_count()]) if partners else 0,
            _raised(_of_count(before[3]), _of_count(self.amount)) if amount else 0,
        )


def _raised(before: int, now: int) -> int:
    return now if now > before else 0


class RollingCounts:
    """The counts of one entity."""

    __slots__ = ("buckets", "day", "hour", "near")

    def __init__(self) -> None:
        self.hour = -1
        self.buckets: dict[int, list[int]] = {}
        self.near, self.day = _Sums(), _Sums()

    def add(self, time: int, failed: bool, amount: int, partners: int) -> bytes:
        """Count an event at `time` (ms); partners: a bitmap. Returns the raised levels, a byte for each of `LEVELS`;
        all 0 for an event more than a day late."""
        hour = time // HOUR_MS
        if hour > self.hour:
            self._move(hour)
        if hour <= self.hour - HOURS:
            return bytes(len(LEVELS))
        bucket = self.buckets.setdefault(hour, [0, 0, 0, 0])
        failures = int(failed)
        bucket[0] += 1
        bucket[1] += failures
        amount = min(amount, MOST_BYTES - bucket[2])
        bucket[2] += amount
        bucket[3] |= partners
        day = self.day.add(1, failures, amount, partners)
        near = self.near.add(1, failures, amount, partners) if hour > self.hour - NEAR else (0, 0, 0, 0)
        return bytes(value for pair in zip(near, day, strict=True) for value in pair)

    def _move(self, hour: int) -> None:
        self.hour = hour
        self.buckets = {of: bucket for of, bucket in self.buckets.items() if of > hour - HOURS}
        self.near, self.day = _Sums(), _Sums()
        for of, bucket in self.buckets.items():
            self.day.add(*bucket)
            if of > hour - NEAR:
                self.near.add(*bucket)


def bitmaps(partners: NDArray[np.int16]) -> list[int]:
    """m bitmaps from places, int16 [m, PARTNERS]."""
    return [sum({1 << place for place in row if place >= 0}) for row in partners.tolist()]
