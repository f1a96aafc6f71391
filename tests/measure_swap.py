"""What a promotion costs those who wait for alerts, for docs/performance.md. Not a test.

`python tests/measure_swap.py`, four minutes: a steady stream through `ripcurrent run`, on a real Kafka and Valkey;
after a while a bundle of the same encoder is promoted, then one of another, whose windows must be filled first. Prints
how long after its production the score of an event is committed.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
from confluent_kafka import Consumer, Producer, TopicPartition
from loop_harness import Topics, create
from service_process import Service, lines, short_training

from streamer.bundles.store import Store
from streamer.devtools import servers
from streamer.devtools.simulator.generator import simulate, write
from streamer.training.fit import fit
from streamer.training.refresh import refresh

RATE = 100
"""Events a second."""
STAGE_S = 40


def main() -> None:
    with tempfile.TemporaryDirectory() as name, servers.kafka() as kafka, servers.valkey() as redis_url:
        folder = Path(name)
        days = list(simulate(seed=3, days=8, events_per_day=2600))
        write(days[:1], folder / "train.ndjson")
        write(days[1:], folder / "later.ndjson")
        with short_training():
            fit([folder / "train.ndjson"], folder / "one")
            fit([folder / "train.ndjson"], folder / "other", seed=1)
        refresh([folder / "later.ndjson"], folder / "one", folder / "same", alerts_per_day=20)
        store = Store(folder / "store")
        store.promote(str(folder / "one"))
        topics = create(kafka, "swap", partitions=1)
        events = lines(folder / "later.ndjson")
        service = Service(topics, store.path, redis_url, 0)
        with service.running():
            sent, took = _stream(
                topics, events, {STAGE_S: (store, folder / "same"), 2 * STAGE_S: (store, folder / "other")}
            )
    by_stage = [took[(sent >= at) & (sent < at + STAGE_S)] for at in range(0, 3 * STAGE_S, STAGE_S)]
    usual = float(np.median(by_stage[0]))
    for what, part in zip(("before", "same encoder", "another encoder"), by_stage, strict=True):
        p50, p99, most = np.quantile(part, [0.5, 0.99, 1.0]) / usual
        print(f"{what}: {len(part)} events, median {p50:.2f}, 99 % {p99:.2f}, most {most:.2f} times the usual")
    print(f"the usual: {usual:.2f} s")


def _stream(
    topics: Topics, events: Sequence[bytes], promotions: dict[int, tuple[Store, Path]]
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds at which each event was sent, from when the service was ready, and until its score was committed."""
    reader = Consumer({"bootstrap.servers": topics.bootstrap, "group.id": "swap", "isolation.level": "read_committed"})
    reader.assign([TopicPartition(f"{topics.name}-scores", partition, 0) for partition in range(2)])
    seen: dict[int, float] = {}
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for message in reader.consume(500, 0.02):
                if message.error() is None:
                    seen[orjson.loads(message.value())["offset"]] = time.monotonic()

    producer = Producer({"bootstrap.servers": topics.bootstrap, "linger.ms": 5})

    def send(first: int, n: int) -> None:
        for i in range(first, first + n):
            producer.produce(topics.events, events[i % len(events)], partition=0)
        producer.poll(0)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    send(0, RATE)
    while len(seen) < RATE:
        time.sleep(0.1)
    sent: list[float] = []
    begun = time.monotonic()
    for step in range(3 * STAGE_S * 10):
        at = begun + step / 10
        time.sleep(max(0.0, at - time.monotonic()))
        if step % 10 == 0 and step // 10 in promotions:
            store, bundle = promotions[step // 10]
            threading.Thread(target=store.promote, args=(str(bundle),)).start()
        first = RATE + len(sent)
        sent += [time.monotonic()] * (RATE // 10)
        send(first, RATE // 10)
    producer.flush()
    while len(seen) < RATE + len(sent):
        time.sleep(0.1)
    done.set()
    reading.join()
    reader.close()
    moments = np.array(sent)
    return moments - begun, np.array([seen[RATE + i] for i in range(len(sent))]) - moments


if __name__ == "__main__":
    main()
