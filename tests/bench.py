"""Measure the service end to end beside what any Python program pays: `make bench`; a few minutes on two cores.

For events of 1 KB and of 3 KB: events/s of the real service on a real Kafka and a real Valkey; the same with each batch
prepared only when the one before is done; events/s of the same process when it only consumes the same topic and parses
it; where the service's time goes; and how fast the two networks are trained and run. `bench.py far` puts both servers
2 ms away (1 KB alone). The topic is full before the clock starts, so that nothing else competes for the machine.
Promises ratios that mean something on other machines; the rates themselves are this machine's.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import orjson
import tcp_proxy
import torch
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

import encoder.features.vectorizer
import encoder.models.rarity
import encoder.models.record_encoder
import encoder.training.replaced_fields
import encoder.training.sequence
import state.baseline.baseline
import state.redis.windows
import streamer.alerting.pipeline
import streamer.detection.detector
import streamer.detection.inactivity
import streamer.detection.rate_score
import streamer.detection.record_score
import streamer.detection.sequence_score
import streamer.kafka.consumer
import streamer.kafka.producer
import streamer.service.loop
from encoder.models.temporal_convolution import WIDTH
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.detection.bundle import Bundle
from streamer.devtools import servers
from streamer.devtools.simulator.generator import simulate
from streamer.explain.attribution import Explainer
from streamer.kafka.client import consumer_properties
from streamer.service.entity_state import open_detector
from streamer.service.logs import configure_logging
from streamer.settings import Settings, load
from streamer.training.fit import fit

SIZES = (1024, 3072)
FIT_DAYS, EVENTS = 1, 30_000
"""Fitted on Monday; what is streamed begins on Tuesday."""
STEPS = 100
"""Of training, in place of 500 and 800: a network runs as fast whatever it learned."""
RUNS = 2
"""Of the service, each way; the floor is taken before and after each."""
WINDOWS = 10_000
"""Given to the sequence network at once."""
AWAY_S = 0.001
"""How long a byte takes to a server that is far, and as long back: 2 ms to and fro, as between sites of a region."""

STAGES: Sequence[tuple[str, Any, tuple[str, ...]]] = (
    ("decode", streamer.detection.detector, ("decode",)),
    ("vectorize", encoder.features.vectorizer.Vectorizer, ("__call__",)),
    ("vectorize", encoder.features.vectorizer.FeatureBatch, ("distinct", "take")),
    ("encode: conditional rarity", encoder.models.rarity.ContextRarity, ("__call__", "summary")),
    ("encode: network", encoder.models.record_encoder.RecordEncoder, ("encode", "anonymised")),
    ("score records: baseline", state.baseline.baseline.Baseline, ("search",)),
    ("score records: group distance", state.baseline.group_distance.GroupDistance, ("__call__",)),
    ("score records: calibration", streamer.detection.record_score.RecordScorer, ("raw", "parts", "evidence")),
    ("entities, what each adds", streamer.detection.detector, ("find_entities", "activity_counts")),
    ("windows (Redis)", state.redis.windows.RedisWindows, ("append", "prepare", "committed", "check_epoch")),
    ("encode and score sequences", streamer.detection.sequence_score.SequenceScorer, ("raw", "evidence")),
    ("score rates", streamer.detection.rate_score.RateScorer, ("evidence",)),
    ("timers of silence", streamer.detection.inactivity.InactivityMonitor, ("advance",)),
    ("rest of the detector", streamer.detection.detector.Detector, ("prepare", "judge")),
    ("explain, build alerts", streamer.service.loop.Service, ("_alerts",)),
    ("produce and commit", streamer.kafka.producer.TransactionalPublisher, ("publish",)),
    ("wait for messages", streamer.kafka.consumer.EventConsumer, ("wait",)),
)
"""(stage, where, what): a stage's time is that of its functions without that of other stages called from them."""


@dataclass
class Clock:
    """Time by stage, of the thread that made it. What explaining calls is part of explaining."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    thread: int = field(default_factory=threading.get_ident)
    inner: list[float] = field(default_factory=lambda: [0.0])
    explaining: bool = False

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted towards a stage."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != self.thread or self.explaining:
                return function(*arguments, **named)
            self.explaining = stage.startswith("explain")
            began = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                self.explaining = False
                whole = time.perf_counter() - began
                self.seconds[stage] += whole - self.inner.pop()
                self.inner[-1] += whole

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """With each function of STAGES timed."""
        replaced = [(where, name, getattr(where, name), stage) for stage, where, names in STAGES for name in names]
        try:
            for where, name, function, stage in replaced:
                setattr(where, name, self.timed(stage, function))
            yield
        finally:
            for where, name, function, _ in replaced:
                setattr(where, name, function)


@dataclass(frozen=True)
class Run:
    """One pass of the service over the topic: seconds from its first batch to its last commit, in all, by stage (the
    loop's thread; what is in no stage is `rest`) and of CPU (all its threads); batch: mean of messages in a batch;
    ahead: whether the next was prepared meanwhile, as it is outside of benchmarks."""

    seconds: float
    cpu: float
    stages: dict[str, float]
    batch: float
    alerts: int
    ahead: bool


class Later(Future[Any]):
    """What is worked out when it is asked for, by whoever asks."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> Any:
        return self._call()


class OneAfterTheOther:
    """In the place of the thread that prepares."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Later:
        return Later(lambda: function(*arguments))

    def shutdown(self, **_: Any) -> None:
        """There is nothing to end."""


def padded(event: bytes, size: int, rng: random.Random) -> bytes:
    """The event made `size` bytes long as products do it: half of what lacks as the original text in `raw_data`, half
    as attributes of the vendor's own in `unmapped`: constants, few-valued ones, counters and ids."""
    record = orjson.loads(event)
    lacking = (size - len(event)) // 2
    text = " ".join(f"{key}={value}" for key, value in record.items() if key != "metadata").replace('"', "'")
    unmapped: dict[str, Any] = {}
    while len(orjson.dumps(unmapped)) < lacking - 40:
        kind, name = len(unmapped) % 4, f"vendor_field_{len(unmapped):02d}"
        drawn = ("enabled", rng.choice(("low", "medium", "high")), rng.randrange(10**6), rng.randbytes(6).hex())
        unmapped[name] = drawn[kind]
    record["unmapped"] = unmapped
    room = size - len(orjson.dumps(record)) - len(',"raw_data":""')
    record["raw_data"] = (text * (room // max(len(text), 1) + 1))[: max(room, 0)].encode("ascii", "replace").decode()
    return orjson.dumps(record)


def only_consume_and_parse(settings: Settings, events: int) -> tuple[float, float]:
    """Seconds and seconds of CPU from the first messages to the last, with the service's own consumer settings."""
    consumer = Consumer(consumer_properties(settings) | {"group.id": f"floor-{uuid.uuid4().hex}"})
    consumer.assign([TopicPartition(settings.events[0], 0, 0)])
    done, began, cpu = 0, 0.0, 0.0
    while done < events:
        messages = consumer.consume(streamer.kafka.consumer.CHUNK, 1.0)
        if messages and not done:
            began, cpu = time.perf_counter(), time.process_time()
        for message in messages:
            orjson.loads(message.value() or b"null")
        done += len(messages)
    taken = time.perf_counter() - began, time.process_time() - cpu
    consumer.close()
    return taken


def serve(settings: Settings, events: int, *, ahead: bool) -> Run:
    """Run the service over the whole topic."""
    configure_logging(settings)
    detector, windows = open_detector(settings, settings.bundle)
    threshold = detector.bundle.threshold(settings.alerts_per_day)
    findings = streamer.alerting.pipeline.open_findings(
        settings, Explainer(detector.bundle, detector.windows), streamer.alerting.pipeline.open_episodes(settings)
    )
    clock = Clock()
    with clock.watching():
        service = streamer.service.loop.Service(settings, detector, findings, threshold=threshold, windows=windows)
        source: Any = service._source
        if not ahead:
            source._ahead = OneAfterTheOther()
        began: list[float] = []
        enqueue = source._enqueue

        def first(raw: Any) -> None:
            if not began:
                clock.seconds.clear()
                began[:] = [time.perf_counter(), time.process_time()]
            enqueue(raw)

        source._enqueue = first
        count = service._count
        ended = [0.0, 0.0]
        stages: dict[str, float] = {}

        def committed(group: Any) -> None:
            count(group)
            if service.metrics.registry.get_sample_value("ripcurrent_events_total") == events:
                ended[:] = [time.perf_counter(), time.process_time()]
                stages.update(clock.seconds)
                service.stop()

        service._count = committed  # type: ignore[method-assign,assignment]
        service.run()
    seconds = ended[0] - began[0]
    stages["rest"] = seconds - sum(stages.values())
    alerts = service.metrics.registry.get_sample_value("ripcurrent_alerts_total") or 0
    batches = service.metrics.registry.get_sample_value("ripcurrent_batches_total") or 1
    return Run(seconds, ended[1] - began[1], stages, events / batches, int(alerts), ahead)


def fill(bootstrap: str, topic: str, events: Sequence[bytes]) -> None:
    """Make the topics and put all events into the first."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    new = [NewTopic(name, 1, 1) for name in (topic, f"{topic}-alerts", f"{topic}-dead-letters")]
    for made in admin.create_topics(new).values():
        made.result(30)
    producer = Producer({"bootstrap.servers": bootstrap, "compression.type": "lz4", "linger.ms": 20})
    for event in events:
        while True:
            try:
                producer.produce(topic, event, partition=0)
                break
            except BufferError:
                producer.poll(0.1)
    if producer.flush(60):
        raise SystemExit("the events could not all be produced")


def measure(size: int, folder: Path, bootstrap: str, redis_url: str) -> None:
    """One size: fit, fill the topic, measure, print."""
    rng = random.Random(size)
    days = simulate(seed=size, days=FIT_DAYS + 2)
    padded_days = [[padded(event, size, rng) for event in day.events] for day in days]
    history = folder / f"{size}.ndjson"
    history.write_bytes(b"\n".join(event for day in padded_days[:FIT_DAYS] for event in day))
    events = [event for day in padded_days[FIT_DAYS:] for event in day][:EVENTS]
    print(f"{size} bytes: {len(events):,} events", file=sys.stderr)
    trained, bundle = train(history, folder / f"bundle-{size}")
    fields = len(bundle.encoder.schema.fields)
    name = f"bench-{size}-{uuid.uuid4().hex[:6]}"
    fill(bootstrap, name, events)

    def settings(run: int) -> Settings:
        return load(
            {
                "kafka.bootstrap_servers": bootstrap,
                "redis.url": redis_url,
                "kafka.group_id": f"{name}-{run}",
                "tenant": f"{name}-{run}",
                "bundle": folder / f"bundle-{size}",
                "events": name,
                "alerts": f"{name}-alerts",
                "dead_letters": f"{name}-dead-letters",
                "start": "earliest",
                "metrics_port": 0,
                "log_level": "warning",
            }
        )

    floors, runs = [only_consume_and_parse(settings(0), len(events))], []
    for run in range(2 * RUNS):
        print(f"{size} bytes: run {run + 1}", file=sys.stderr)
        runs.append(serve(settings(run), len(events), ahead=run % 2 == 0))
        floors.append(only_consume_and_parse(settings(0), len(events)))
    report(size, len(events), fields, floors, runs)
    report_networks(trained, bundle, events)


def train(history: Path, out: Path) -> tuple[dict[str, float], Bundle]:
    """Fit, and say for each network how many events or windows a second of CPU it was trained on."""
    rates = {}
    with ExitStack() as patches:
        for name, where in (("record", encoder.training.replaced_fields), ("sequence", encoder.training.sequence)):

            def timed(
                *arguments: Any, name: str = name, where: Any = where, call: Any = where.train_network, **named: Any
            ) -> Any:
                began = time.process_time()
                found = call(*arguments, **named)
                rates[name] = found.steps * where.BATCH / (time.process_time() - began)
                return found

            patches.enter_context(patch.object(where, "train_network", timed))
        return rates, fit([history], out).bundle


def report_networks(trained: dict[str, float], bundle: Bundle, events: Sequence[bytes]) -> None:
    """Rows a second of CPU of each network, in training and in serving; no two rows are taken for one."""
    batch, _ = decode([Message("bench", 0, i, -1, event) for i, event in enumerate(events)])
    features, sequences = bundle.encoder.vectorize(batch), bundle.scorer.sequences
    began = time.process_time()
    vectors = bundle.encoder.vectors(features)
    served = {"record": len(vectors) / (time.process_time() - began)}
    print("\n| network | trained, rows a second of CPU | run |\n|---|---|---|")
    if sequences is not None:
        rows = np.arange(WINDOWS * WIDTH) % len(vectors)
        windows = vectors[rows].reshape(WINDOWS, WIDTH, -1)
        times = np.tile(np.arange(WIDTH, dtype=np.int64) * 1000, (WINDOWS, 1))
        length, kinds = np.full(WINDOWS, WIDTH, np.int32), np.zeros(WINDOWS, np.int8)
        began = time.process_time()
        sequences.model(windows, times, length, kinds)
        served["sequence"] = WINDOWS / (time.process_time() - began)
    for name, rate in trained.items():
        print(f"| {name} | {rate:,.0f} | {served.get(name, 0):,.0f} |")
    sys.stdout.flush()


def report(size: int, events: int, fields: int, floors: Sequence[tuple[float, float]], runs: Sequence[Run]) -> None:
    """The figures as docs/performance.md has them."""
    floor, floor_cpu = (statistics.median(times) for times in zip(*floors, strict=True))
    print(f"\n### {size // 1024} KB\n\n{events:,} events of {size} bytes, {fields} fields, {runs[0].alerts} alerts")
    print(f"batches of {statistics.fmean(run.batch for run in runs):,.0f} messages on average\n")
    print("| | events/s | events a second of CPU | CPU, floor = 1 |\n|---|---|---|---|")
    rows = [("only consume and `orjson.loads`", floor, floor_cpu)]
    how = {True: "the service", False: "the same, one batch after the other"}
    rows += [(f"{how[run.ahead]}, run {n // 2 + 1}", run.seconds, run.cpu) for n, run in enumerate(runs)]
    for name, seconds, cpu in rows:
        print(f"| {name} | {events / seconds:,.0f} | {events / cpu:,.0f} | {cpu / floor_cpu:.0f} |")
    print("\nOne batch after the other:\n\n| stage | share of time | us an event |\n|---|---|---|")
    runs = [run for run in runs if not run.ahead]
    whole = statistics.fmean(run.seconds for run in runs)
    for stage in dict.fromkeys([stage for stage, _, _ in STAGES] + ["rest"]):
        seconds = statistics.fmean(run.stages.get(stage, 0.0) for run in runs)
        print(f"| {stage} | {100 * seconds / whole:.1f} % | {seconds / events * 1e6:.1f} |")
    sys.stdout.flush()


@contextmanager
def far_servers() -> Iterator[tuple[str, str]]:
    """Bootstrap servers and URL of a Kafka and a Valkey of our own that are AWAY_S away."""
    with ExitStack() as stack:
        at = [servers.free_port() for _ in range(2)]
        kafka = servers.KafkaServer({"advertised.listeners": f"PLAINTEXT://127.0.0.1:{at[0]}"})
        valkey = stack.enter_context(servers.ValkeyServer())
        for port, server in zip(at, (kafka, valkey), strict=True):
            arguments = (port, server.port, AWAY_S)
            proxy = multiprocessing.get_context("spawn").Process(target=tcp_proxy.serve, args=arguments, daemon=True)
            proxy.start()
            stack.callback(proxy.terminate)
        stack.enter_context(kafka)
        yield f"127.0.0.1:{at[0]}", f"redis://127.0.0.1:{at[1]}/0"


@contextmanager
def near_servers() -> Iterator[tuple[str, str]]:
    """The same, beside this process, or those that the environment names."""
    with servers.kafka() as bootstrap, servers.valkey() as redis_url:
        yield bootstrap, redis_url


def main() -> None:
    for variable in [name for name in os.environ if name.startswith("RIPCURRENT_") and "_TEST_" not in name]:
        del os.environ[variable]
    far = sys.argv[1:] == ["far"]
    with tempfile.TemporaryDirectory() as folder, far_servers() if far else near_servers() as (bootstrap, redis_url):
        os.chdir(folder)
        torch.set_num_threads(1)  # as the command does
        encoder.training.replaced_fields.STEPS = encoder.training.sequence.STEPS = STEPS
        for size in SIZES[:1] if far else SIZES:
            measure(size, Path(folder), bootstrap, redis_url)


if __name__ == "__main__":
    main()
