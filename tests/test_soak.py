"""What months of running ask of memory, in half an hour: once all is warm, it stays for twenty minutes where it is."""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from confluent_kafka import Producer
from loop_harness import create
from service_process import Service

from streamer.devtools.servers import ValkeyServer
from streamer.devtools.simulator.generator import simulate

RATE = 200
"""Events a second: a simulated company's day in a minute and a half, with names and values that are new each day."""
WARM_S, SOAK_S, SPAN_S = 660, 1200, 120
"""Memory of the last SPAN_S seconds is held against that of the first after WARM_S: by then the week has passed that
drift looks back, and caches of values have been full."""


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_memory_stays_flat(kafka: str, unique: Callable[[str], str], folder: Path) -> None:
    topics = create(kafka, unique("soak"))
    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 20})
    days = simulate(seed=9, days=100)
    events = (event for day in days for event in day.events)
    chance = random.Random(9)
    seen: list[tuple[float, int]] = []
    with ValkeyServer() as valkey, redis.Redis.from_url(valkey.url) as server:
        # Few alerts: one that falls behind holds what is fetched ahead, too.
        service = Service(topics, folder / "bundle", valkey.url, 0, threshold=0.0005)
        with service.running() as process:
            began, sent = time.monotonic(), 0
            while (now := time.monotonic() - began) < WARM_S + SOAK_S:
                assert process.poll() is None
                while sent < now * RATE:
                    value = next(events) if chance.random() > 0.001 else chance.randbytes(100)
                    producer.produce(topics.events, value, partition=sent % topics.partitions)
                    sent += 1
                producer.poll(0.2)
                if not seen or now - seen[-1][0] > 1:
                    seen.append((now, resident(process.pid)))
                    if len(seen) % 60 == 0:
                        held = f"{seen[-1][1] / 1e6:.0f} MB, Redis {server.info('memory')['used_memory'] / 1e6:.0f} MB"
                        print(f"{now:.0f} s, {sent:,} sent, {sent - service.done():,} behind: {held}", flush=True)
            producer.flush(30)
            topics.wait_until_read(sent)
    after = statistics.median(size for at, size in seen if WARM_S <= at < WARM_S + SPAN_S)
    at_last = statistics.median(size for at, size in seen if at >= WARM_S + SOAK_S - SPAN_S)
    print(f"{sent:,} messages: {after / 1e6:.0f} MB after {WARM_S} s, {at_last / 1e6:.0f} MB at the end")
    assert at_last < 1.05 * after
