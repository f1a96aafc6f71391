"""Event times: reading them as senders write them, and bounding them by a clock that the sender does not set.

An event time is believed if it lies within the `TimeBounds` of its message: for Kafka those that the record's timestamp
gives, for a file those that the other times of the file give. Every other time, and an absent one, becomes the
stand-in of the bounds. So no single event can move a clock, a window or a statistic of time further than that.
Nothing here reads the wall clock, so a replay decides as the service did.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_TIME = -1
"""The event time of an event that has none, and for which nothing can stand in."""
FUTURE_TOLERANCE_MS = 5 * 60 * 1000
"""How far an event time may lie after the timestamp of its record."""
DAY_MS = 86_400_000
MAX_ISO = 128
"""Characters of a timestamp as text."""
OUTLYING_SHARE = 0.05
"""More of the events of a file than this are never called outliers, however far they lie from the others."""
YEAR_2000_MS, YEAR_2100_MS = 946_684_800_000, 4_102_444_800_000
"""A record's timestamp that is no date between them is not believed."""
_END = (1 << 48) - 1
"""Windows keep times of 48 bits."""


class TimeBounds(NamedTuple):
    """Between which times (epoch ms, inclusive) an event of a message is believed to lie, and the time that stands in
    for one that does not, or that is absent."""

    earliest: int
    latest: int
    stand_in: int


UNBOUNDED = TimeBounds(0, _END, NO_TIME)


def parse_iso(text: str) -> int | None:
    """Epoch ms of an ISO date or time, UTC unless it says otherwise; None where it is none. A longer text than MAX_ISO
    is none, and the cache would hold it whole."""
    return _parse_iso(text) if len(text) <= MAX_ISO else None


@lru_cache(maxsize=16_384)
def _parse_iso(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _number_to_ms(value: float) -> tuple[int | None, str]:
    """Epoch ms and the unit told apart by magnitude ("": ms): ms since 1973 have at least twelve digits."""
    if not 0 < value < 1e20:
        return None, "unreadable"
    if value < 1e11:
        return round(value * 1000), "seconds"
    if value < 1e14:
        return int(value), ""
    return (int(value // 1000), "microseconds") if value < 1e17 else (int(value // 1_000_000), "nanoseconds")


def read_time(value: Any) -> tuple[int | None, str]:
    """A timestamp as senders write it in epoch ms, None where it cannot be read, and the name of the repair."""
    if type(value) is int or type(value) is float:
        time, repair = _number_to_ms(value)
        return time, repair and f"time_{repair}"
    if type(value) is str:
        iso = parse_iso(value) if not value.replace(".", "", 1).isdigit() else None
        try:
            time = _number_to_ms(float(value))[0] if iso is None else iso
        except ValueError:
            time = None
        # Some senders write the first day of the year 1 where they have no time.
        return (time, "time_text") if time is not None and time > 0 else (None, "time_unreadable")
    return None, "time_unreadable"


def record_time(timestamp: int) -> tuple[int, str]:
    """The timestamp of a Kafka record in epoch ms, NO_TIME where it cannot be a date of these days, and the name of the
    repair. A producer sets it, in seconds at times, or to a clock that was reset."""
    if YEAR_2000_MS <= timestamp < YEAR_2100_MS:
        return timestamp, ""
    if timestamp < 0:
        return NO_TIME, ""
    time, unit = _number_to_ms(timestamp)
    if unit and time is not None and YEAR_2000_MS <= time < YEAR_2100_MS:
        return time, f"record_timestamp_{unit}"
    return NO_TIME, "record_timestamp_unusable"


def bounds_by_record(timestamp: int) -> TimeBounds:
    """What the timestamp of a record, as `record_time` gives it, says of the event times in it."""
    return UNBOUNDED if timestamp < 0 else TimeBounds(0, timestamp + FUTURE_TOLERANCE_MS, timestamp)


def common_range(time: NDArray[np.int64]) -> tuple[int, int] | None:
    """The earliest and latest of n event times (int64 [n], ms, any order, NO_TIME left out) that belong together; None
    where there is no time.

    A group at either end is left out where it is at most OUTLYING_SHARE of the events (or a single one of five or more)
    and the gap to the others exceeds a day and half of the span of the middle 90 %.
    """
    times = np.sort(time[time != NO_TIME])
    n = len(times)
    if not n:
        return None
    few = max(int(OUTLYING_SHARE * n), int(n >= 5))
    first, last = few, n - 1 - few
    limit = max(int(times[last] - times[first]) // 2, DAY_MS)
    wide = np.diff(times) > limit
    before = np.flatnonzero(wide[:first])
    after = np.flatnonzero(wide[last:])
    low = times[before[-1] + 1] if len(before) else times[0]
    high = times[last + after[0]] if len(after) else times[-1]
    return int(low), int(high)


def stand_ins(time: NDArray[np.int64], earliest: int, latest: int) -> NDArray[np.int64]:
    """For each of n events in stream order the last believed time up to it, or the first after it; NO_TIME where no
    time is believed. time: int64 [n], ms."""
    believed = (time >= earliest) & (time <= latest) & (time != NO_TIME)
    if not believed.any():
        return np.full(len(time), NO_TIME, np.int64)
    place = np.maximum.accumulate(np.where(believed, np.arange(len(time)), -1))
    return time[np.where(place < 0, int(believed.argmax()), place)]
