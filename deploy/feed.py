"""A simulated company for compose.yaml: its history to fit on, and its events as they happen.

`feed.py history FILE` writes the last week; `feed.py live` produces events to the first events topic, each at its time,
with incidents on every working day. Both are one company, so that what is normal in the first is normal in the second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from confluent_kafka import Producer

from streamer.devtools.simulator.generator import Day, schedule, simulate, write
from streamer.devtools.simulator.workday import DAY
from streamer.kafka.client import client_properties
from streamer.settings import load

EVENTS_PER_DAY = 40_000
DAYS = 35
"""After the last of them the feed ends, and is started again with the weeks that are then."""


def company(now_ms: int) -> Iterator[Day]:
    """From the Monday of the week before last on: clean until today, then with incidents."""
    midnight = now_ms - now_ms % DAY
    start = midnight - (time.gmtime(midnight // 1000).tm_wday + 7) * DAY
    today = (midnight - start) // DAY
    return simulate(start=start, days=DAYS, events_per_day=EVENTS_PER_DAY, incidents=schedule(DAYS, clean=today))


def history(out: Path, now_ms: int) -> int:
    """Write the days before today; returns how many events."""

    def past() -> Iterator[Day]:
        for day in company(now_ms):
            if day.start + DAY > now_ms:
                return
            yield day

    return write(past(), out)


def live(now_ms: int, seconds: float | None = None) -> int:
    """Produce what happens from now on, for some seconds (None: as long as there are days); returns how many."""
    settings = load()
    producer = Producer(client_properties(settings) | {"enable.idempotence": True, "linger.ms": 50})
    sent, end_ms = 0, None if seconds is None else now_ms + seconds * 1000
    for day in company(now_ms):
        for at, event in zip(day.times, day.events, strict=True):
            if at < now_ms:
                continue
            if end_ms is not None and at >= end_ms:
                producer.flush(30)
                return sent
            time.sleep(max(at / 1000 - time.time(), 0))
            producer.produce(settings.events[0], event, timestamp=at)
            producer.poll(0)
            sent += 1
    producer.flush(30)
    return sent


def main() -> None:
    now_ms = int(time.time() * 1000)
    if sys.argv[1:] == ["live"]:
        live(now_ms)
    elif sys.argv[1:2] == ["history"] and len(sys.argv) == 3:
        print(f"{history(Path(sys.argv[2]), now_ms):,} events in {sys.argv[2]}")
    else:
        sys.exit("feed.py history FILE, or feed.py live")


if __name__ == "__main__":
    main()
