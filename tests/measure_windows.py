"""Measure windows, in memory and in a Valkey of its own: `python tests/measure_windows.py [ENTITIES]`; a minute."""

from __future__ import annotations

import sys
import time

import numpy as np
import redis
from numpy.typing import NDArray

from encoder.ocsf.activity_counts import PARTNERS, ActivityCounts
from state.memory.windows import MemoryWindows
from state.redis.windows import RedisWindows
from state.windows import WindowEntries, WindowStore
from streamer.devtools.servers import ValkeyServer

SOURCE = ("events", 0)
DIM, BATCH = 64, 2000
STEP_MS = 100


def some_acts(at: NDArray[np.int64]) -> ActivityCounts:
    """Every tenth a failure, some bytes, two partners each."""
    partners = np.full((len(at), PARTNERS), -1, np.int16)
    partners[:, :2] = np.column_stack([at * 7 % 256, at // 3 % 256])
    return ActivityCounts(np.ones(len(at), bool), at % 10 == 0, at % 1500, partners)


def push(store: WindowStore, entity: list[str], first: int) -> float:
    """Append one entry for each name, in micro-batches that are committed one after another; returns seconds."""
    vectors = np.random.default_rng(first).normal(size=(BATCH, DIM)).astype(np.float16)
    started = time.perf_counter()
    for start in range(0, len(entity), BATCH):
        names = entity[start : start + BATCH]
        at = np.arange(first + start, first + start + len(names))
        zero, prints = np.zeros(len(names), np.int32), (at + 1).astype(np.uint32)
        entries = WindowEntries(
            names, STEP_MS * at, vectors[: len(names)], (SOURCE,), zero, at, zero, some_acts(at), prints
        )
        store.append(entries)
        end = {SOURCE: first + start + len(names)}
        store.prepare(end)
        store.committed(end)
    return time.perf_counter() - started


def main(entities: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"user:name-{i:06d}" for i in range(entities)]
    memory = MemoryWindows(dim=DIM)
    skewed = [names[i] for i in rng.zipf(1.3, 100_000) % entities]
    print(
        f"in memory: {len(skewed) / push(memory, skewed, 0):,.0f} appends/s (100,000 in batches of {BATCH}, W=32, d=64)"
    )
    with ValkeyServer() as server, redis.Redis.from_url(server.url) as client:
        store = RedisWindows(server.url, encoder="0123abcd", dim=DIM)
        store.check_epoch({})
        before, at = client.info("memory")["used_memory"], 0
        for _ in range(9):  # fill the windows
            four = [names[i] for block in np.array_split(rng.permutation(entities), 20) for i in np.tile(block, 4)]
            push(store, four, at)
            at += len(four)
        used = (client.info("memory")["used_memory"] - before) / entities
        sample = [client.memory_usage(key, samples=0) for key in client.scan_iter("*user:name-*1}*", count=1000)]
        print(f"Redis: {np.mean(sample):,.0f} B an entity (MEMORY USAGE), {used:,.0f} (used_memory), {entities:,} full")
        for depth in (1, 16, 64, 256, 1024):
            store = RedisWindows(server.url, encoder="0123abcd", dim=DIM, depth=depth)
            store.check_epoch({SOURCE: at})
            some = names[: 5000 if depth == 1 else 20_000]
            client.config_resetstat()
            seconds = push(store, some, at)
            at += len(some)
            calls = client.info("commandstats")["cmdstat_fcall"]["usec_per_call"]
            print(
                f"Redis, depth {depth}: {len(some) / seconds:,.0f} windows/s at 1 event a call ({calls:.0f} us there)"
            )
        four = [names[i] for start in range(0, 20_000, BATCH // 4) for i in [*range(start, start + BATCH // 4)] * 4]
        print(f"Redis, depth 1024: {len(four) / push(store, four, at):,.0f} windows/s at 4 events a call")
        store.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
