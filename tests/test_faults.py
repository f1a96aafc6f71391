"""Faults that last, that come often, or that hit in the middle: no event is lost, no alert is doubled.

Most take a minute and are `slow`. docs/reliability.md has a line for each.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from loop_harness import (
    EVENT,
    LINE,
    EachRow,
    HashDetector,
    Topics,
    before_offsets_are_sent,
    create,
    figure,
    p_value,
    running,
    until,
)
from service_process import Service as FittedService
from service_process import alerts_of, lines
from test_window_rebuild import assert_undisturbed
from test_window_rebuild import service_for as service_with_windows

from encoder.ocsf.events import Message
from state.baseline.baseline import Baseline
from streamer.devtools.servers import KafkaServer, ValkeyServer
from streamer.errors import StreamError
from streamer.kafka import consumer as source_module
from streamer.service.loop import Service

STREAM = Path(__file__).with_name("loop_harness.py")


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("faults"))


@pytest.fixture
def own_kafka(request: pytest.FixtureRequest) -> Iterator[KafkaServer]:
    """A broker that may be killed."""
    with KafkaServer(getattr(request, "param", {})) as server:
        yield server


def slow_detector(seconds: float) -> HashDetector:
    return HashDetector(lambda _: time.sleep(seconds))


def service_for(topics: Topics, detector: HashDetector | None = None, **more: Any) -> Service:
    return Service(topics.settings(**more), detector or HashDetector(), EachRow(), threshold=LINE)


def assert_each_once(topics: Topics, n: int) -> None:
    """Each of `produce_events(n)` has one score, and each alert is there once."""
    labels = Counter(message.key() for message in topics.read("scores"))
    assert (len(labels), set(labels.values())) == (n, {1})
    assert topics.alerts() == topics.expected_alerts(n)


def assert_scored(topics: Topics, n: int) -> None:
    labels = Counter(message.key() for message in topics.read("scores"))
    assert (len(labels), set(labels.values())) == (n, {1})


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def process_of(topics: Topics, *, delay: float, **more: Any) -> list[str]:
    """The command line of a service that can be killed."""
    given = json.loads(topics.settings().model_dump_json())
    arguments = {k: v for k, v in given.items() if k not in ("kafka", "redis", "threshold", "events")}
    arguments |= {"kafka.bootstrap_servers": topics.bootstrap, "kafka.group_id": topics.name, "events": topics.events}
    arguments |= {"kafka.instance_id": "one", "kafka.properties": {"session.timeout.ms": 6000}, "delay": delay} | more
    return [sys.executable, str(STREAM), json.dumps(arguments)]


def produce(topics: Topics, values: Iterable[bytes]) -> None:
    """Many messages, one partition after the other."""
    limits = {"message.max.bytes": 8_000_000, "queue.buffering.max.kbytes": 65_536, "linger.ms": 20}
    producer = Producer(limits | {"bootstrap.servers": topics.bootstrap, "enable.idempotence": True})
    for i, value in enumerate(values):
        while True:
            try:
                producer.produce(topics.events, value, partition=i % topics.partitions)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0


def done(topics: Topics) -> int:
    return sum(max(offset, 0) for offset in topics.committed().values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigkill_at_twenty_random_moments(topics: Topics) -> None:
    n = 12_000
    topics.produce_events(n)
    command = process_of(topics, delay=0.01, batches_per_transaction=3)
    moments = random.Random(11)
    for _ in range(20):
        before = done(topics)
        with subprocess.Popen(command) as process:
            until(lambda before=before: done(topics) > before)
            time.sleep(moments.random() * 0.2)
            assert process.poll() is None
            process.kill()
    assert done(topics) < n
    with subprocess.Popen(command) as process:
        topics.wait_until_read(n, 120)
        process.terminate()
        assert process.wait(30) == 0
    assert_each_once(topics, n)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [60])
def test_a_broker_that_is_down_for_a_minute(own_kafka: KafkaServer, unique: Callable[[str], str], seconds: int) -> None:
    topics = create(own_kafka.bootstrap, unique("down"))
    topics.produce_events(2000)
    detector = slow_detector(0.05)
    service = service_for(topics, detector)
    with running(service) as raised:
        until(lambda: len(detector.batches) > 3)
        own_kafka.kill()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert service.not_alive() == ""
            assert raised == []
            time.sleep(0.5)
        own_kafka.start()
        came_back = time.monotonic()
        at_first = done(topics)
        until(lambda: done(topics) > at_first)
        print(f"scored again {time.monotonic() - came_back:.1f} s after the broker was back")
        topics.wait_until_read(2000)
    assert raised == []
    assert_each_once(topics, 2000)


@pytest.mark.slow
def test_a_broker_that_stands_still(own_kafka: KafkaServer, unique: Callable[[str], str]) -> None:
    topics = create(own_kafka.bootstrap, unique("still"))
    topics.produce_events(2000)
    detector = slow_detector(0.05)
    with running(service_for(topics, detector)) as raised:
        until(lambda: len(detector.batches) > 3)
        own_kafka.suspend()
        time.sleep(20)
        own_kafka.resume()
        topics.wait_until_read(2000)
    assert raised == []
    assert_each_once(topics, 2000)


def leader(bootstrap: str, topic: str, name: str) -> int:
    """The broker that leads the partition of an internal topic that a group or transactional id belongs to."""
    hashed = 0
    for character in name:  # As Java does it.
        hashed = (31 * hashed + ord(character)) & 0xFFFFFFFF
    partitions = AdminClient({"bootstrap.servers": bootstrap}).list_topics(topic, timeout=10).topics[topic].partitions
    return int(partitions[(hashed & 0x7FFFFFFF) % len(partitions)].leader) if partitions else -1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_coordinators_that_move_and_die(unique: Callable[[str], str], protocol: str) -> None:
    """The broker that coordinates group and transactions is killed, and gets both back when it is there again."""
    two = {f"{name}.replication.factor": "2" for name in ("offsets.topic", "transaction.state.log", "default")}
    quick = {"broker.session.timeout.ms": "2000", "broker.heartbeat.interval.ms": "500"}
    back = {"leader.imbalance.check.interval.seconds": "1", "leader.imbalance.per.broker.percentage": "0"}
    with KafkaServer(two | quick | back) as first, KafkaServer(two | quick, beside=first) as second:
        where = first.bootstrap
        throwaway = Producer({"bootstrap.servers": where, "transactional.id": "throwaway"})
        throwaway.init_transactions(30)  # Makes the topic of transactions; asking for commits makes that of groups.
        Topics(where, "throwaway", 1).committed()

        def moved(name: str) -> bool:
            leaders = leader(where, "__consumer_offsets", name), leader(where, "__transaction_state", f"{name}-one")
            return leaders == (2, 2)

        names = [unique("coordinators") for _ in range(100)]
        until(lambda: any(map(moved, names)))  # Once the second broker leads what it should.
        name = next(filter(moved, names))
        topics = create(where, name, replicas=2)
        more = {"kafka.group_protocol": protocol}
        more |= {"kafka.properties": {}} if protocol == "consumer" else {}
        fed, ended = [0], threading.Event()

        def feed() -> None:
            while not ended.wait(0.2):
                topics.produce_events_from(fed[0], 50)
                fed[0] += 50

        feeding = threading.Thread(target=feed)
        with running(service_for(topics, slow_detector(0.02), **more)) as raised:
            feeding.start()
            try:
                topics.wait_until_read(200)
                for stop in (second.kill, second.stop, second.kill):
                    stop()
                    began, at_first = time.monotonic(), done(topics)
                    until(lambda at_first=at_first: done(topics) > at_first + 100)
                    print(f"went on {time.monotonic() - began:.1f} s after its coordinator had gone")
                    second.start()
                    until(lambda: moved(name))
                    at_first = done(topics)
                    until(lambda at_first=at_first: done(topics) > at_first + 100)
            finally:
                ended.set()
                feeding.join()
            topics.wait_until_read(fed[0], 120)
        assert raised == []
        assert_each_once(topics, fed[0])


@pytest.mark.slow
def test_a_redis_that_is_down_for_a_minute(kafka: str, unique: Callable[[str], str]) -> None:
    topics = create(kafka, unique("redis"), partitions=1)
    topics.produce_events(1500)
    with ValkeyServer({"appendonly": "yes"}) as valkey:
        service = service_with_windows(topics, valkey)
        with running(service) as raised:
            topics.wait_until_read(300)
            valkey.stop()
            end = time.monotonic() + 60
            until(lambda: service.not_ready() != "")
            while time.monotonic() < end:
                assert service.not_alive() == ""
                time.sleep(0.5)
            valkey.start()
            topics.wait_until_read(1500)
        assert raised == []
        assert figure(service, "window_losses_total") == 0
        assert_undisturbed(topics, 1500, valkey)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_worker_that_joins_and_leaves_every_few_seconds(
    kafka: str, unique: Callable[[str], str], protocol: str
) -> None:
    n = 12_000
    topics = create(kafka, unique("restless"), partitions=4)
    more = {"kafka.group_protocol": protocol}
    more |= {"kafka.properties": {}} if protocol == "consumer" else {}
    first = service_for(topics, slow_detector(0.01), **more)
    joined = 0
    with running(first) as raised:
        feeding = threading.Thread(target=topics.produce_events_slowly, args=(n, 25.0))
        feeding.start()
        while feeding.is_alive():
            second = service_for(topics, slow_detector(0.01), **more, **{"kafka.instance_id": "two"})
            with running(second) as raised_second:
                time.sleep(2)
            assert raised_second == []
            joined += bool(second.detector.batches)
            time.sleep(1)
        topics.wait_until_read(n)
    assert raised == []
    assert joined >= 3
    assert_each_once(topics, n)


@pytest.mark.parametrize("patience", [20.0, 1.0], ids=["waited for", "thrown away"])
def test_a_rebalance_in_the_middle_of_a_batch(topics: Topics, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
    monkeypatch.setattr(source_module, "REVOKE_S", patience)
    topics.produce_events(400)
    slow = threading.Event()

    def before(_: Sequence[Message]) -> None:
        if not slow.is_set():
            slow.set()
            time.sleep(4)

    first = service_for(topics, HashDetector(before))
    with running(first) as raised:
        until(slow.is_set)
        with running(service_for(topics, **{"kafka.instance_id": "two"})) as raised_second:
            topics.wait_until_read(400)
        topics.produce_events_from(400, 100)  # The first goes on with what the second leaves.
        topics.wait_until_read(500)
    assert raised == raised_second == []
    assert_each_once(topics, 500)


QUICK = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "200"}


@pytest.mark.extended
@pytest.mark.parametrize("own_kafka", [QUICK], indirect=True)
def test_a_transaction_that_times_out_while_it_is_open(
    own_kafka: KafkaServer, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = create(own_kafka.bootstrap, unique("timeout"))
    topics.produce_events(600)
    properties = {"session.timeout.ms": 6000, "transaction.timeout.ms": 1000}
    sent: list[bool] = []

    def hold() -> None:
        sent.append(True)
        if len(sent) == 3:  # The first may hold starting offsets alone, and then is no transaction to the broker.
            time.sleep(4)

    before_offsets_are_sent(monkeypatch, hold)
    service = service_for(topics, batches_per_transaction=1, **{"kafka.properties": properties})
    with running(service) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert "took over while this one stood still" in str(raised[0])
    assert done(topics) < 600
    with running(service_for(topics)) as again:
        topics.wait_until_read(600)
    assert again == []
    assert_each_once(topics, 600)


@pytest.mark.slow
@pytest.mark.parametrize("own_kafka", [QUICK], indirect=True)
def test_a_process_that_stands_still_and_goes_on(own_kafka: KafkaServer, unique: Callable[[str], str]) -> None:
    n = 8000
    topics = create(own_kafka.bootstrap, unique("stopped"))
    topics.produce_events(n)
    properties = {"session.timeout.ms": 6000, "transaction.timeout.ms": 3000}
    command = process_of(topics, delay=0.02, **{"kafka.properties": properties})
    other = process_of(topics, delay=0.02, **{"kafka.properties": properties, "kafka.instance_id": "two"})
    moments, codes = random.Random(5), []
    with subprocess.Popen(other) as second:
        for _ in range(4):
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                time.sleep(4 + moments.random())
                process.send_signal(signal.SIGSTOP)
                time.sleep(10)  # The group gives its partitions to the other, and its transaction is aborted.
                process.send_signal(signal.SIGCONT)
                time.sleep(4)
                process.terminate()
                codes.append((process.wait(30), (process.stderr.read() if process.stderr else "")[-300:]))
        topics.wait_until_read(n, 120)
        second.terminate()
        assert second.wait(30) == 0
    print(codes)
    assert_each_once(topics, n)


def test_a_clock_that_jumps_changes_no_alert_and_no_score(topics: Topics) -> None:
    topics.produce_events(600)
    moments = random.Random(3)

    def jumping() -> float:
        return time.time() + moments.choice([0, 3000, -3000, -86_400, -31_536_000])

    service = Service(topics.settings(), HashDetector(), EachRow(), threshold=LINE, clock=jumping)
    with running(service) as raised:
        topics.wait_until_read(600)
    assert raised == []
    assert_each_once(topics, 600)


@pytest.mark.extended
def test_a_clock_far_ahead_of_the_brokers_ends_the_service_in_one_line_and_costs_nothing(topics: Topics) -> None:
    topics.produce_events(600)
    ahead = Service(topics.settings(), HashDetector(), EachRow(), threshold=LINE, clock=lambda: time.time() + 86_400)
    with running(ahead) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert "is the clock of this host ahead of the broker's?" in str(raised[0])
    assert topics.read("scores") == []
    with running(service_for(topics)) as raised:
        topics.wait_until_read(600)
    assert raised == []
    assert_each_once(topics, 600)


FULL = """
import resource, signal, sys
from pathlib import Path
from streamer.bundles.bundle_files import load, save
from streamer.errors import RipcurrentError
bundle = load(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    save(Path(sys.argv[2]), encoder=bundle.encoder, scorer=bundle.scorer, exemplars=bundle.exemplars,
         anonymised=bundle.anonymised, profile=bundle.profile, training=bundle.manifest["training"], codes=bundle.codes)
except RipcurrentError as error:
    print(error)
"""


@pytest.mark.extended
@pytest.mark.parametrize("cut", ["baseline.hnsw", "encoder.safetensors", "exemplars.ndjson"])
def test_a_full_disk_leaves_the_bundle_that_was_there(folder: Path, tmp_path: Path, cut: str) -> None:
    target = tmp_path / "bundle"
    shutil.copytree(folder / "bundle", target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    command = [sys.executable, "-c", FULL, folder / "bundle", target, str(len(before[cut]) - 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{target} cannot be written" in done.stdout
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_index_that_is_cut_off_by_a_full_disk_is_noticed(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float16)
    baseline = Baseline.build(vectors, seed=0)
    baseline.save(tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        with pytest.raises(OSError, match=f"{size - 1} of {size} bytes"):
            baseline.save(tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def poison(seed: int) -> bytes:
    """What arrives where an event was meant: cut off, garbled, of another form, no JSON at all. All are distinct."""
    chance = random.Random(seed)
    event = json.dumps(EVENT | {"message": f"poison {seed}"}).encode()
    kind = seed % 8
    if kind == 0:
        return event[: chance.randrange(1, len(event))] + b"%d" % seed
    if kind == 1:
        place = chance.randrange(len(event))
        return event[:place] + chance.randbytes(3) + event[place + 1 :]
    if kind == 2:
        return chance.randbytes(chance.randrange(1, 200)) + b"%d" % seed
    if kind == 3:
        return b"[%s, %d]" % (event, seed)
    if kind == 4:
        return b'"%d' % seed + b"x" * chance.randrange(50) + b'"'
    if kind == 5:
        return b"%d" % seed
    if kind == 6:
        return b'{"a":' * chance.randrange(20, 2000) + b"%d" % seed
    return json.dumps({"events": [chance.choice([None, 1, "x", [], seed]), seed]}).encode()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("malformed", "every"), [(2000, 101), (100_010, 3)])
def test_poison_changes_nothing_for_the_rest(topics: Topics, malformed: int, every: int) -> None:
    n = malformed * every
    event = orjson.dumps(EVENT)
    places = {i: poison(i // every) for i in range(0, n, every)}
    assert len(set(places.values())) >= malformed // 1000 * 1000
    produce(topics, (places.get(i, event) for i in range(n)))
    began = time.monotonic()
    service = service_for(topics, batch_size=2048)
    with running(service) as raised:
        topics.wait_until_read(n, 600)
    assert raised == []
    print(f"{n:,} messages, {malformed:,} of them malformed, in {time.monotonic() - began:.0f} s")

    def coordinates(i: int) -> str:
        return f"{topics.events}:{i % 2}:{i // 2}"

    rejected = Counter(
        ":".join(dict(m.headers())[f"__connect.errors.{part}"].decode() for part in ("topic", "partition", "offset"))
        for m in topics.read("dead")
    )
    scored = Counter(message.key().decode() for message in topics.read("scores"))
    assert set(scored.values()) == {1}
    # All that is malformed is a dead letter or, where it could be repaired, an event; and so is all that is not.
    good = {f"{coordinates(i)}:0" for i in range(n) if i not in places}
    assert good <= scored.keys()
    read = {label.rpartition(":")[0] for label in scored.keys() - good}
    bad = {coordinates(i) for i in places}
    assert read | rejected.keys() == bad
    assert topics.alerts() == sorted(label for label in scored if p_value(label) <= LINE)


def run_with_faults(
    own_kafka: KafkaServer, topics: Topics, n: int, command: Callable[[str], Sequence[str]], limit_s: float
) -> None:
    """Two workers or three read n messages while SIGKILL, SIGTERM, SIGSTOP, a worker more or less, and a broker that is
    killed or stands still come at random, 40 of them at most. command: of the worker with this instance id."""
    chance = random.Random(17)
    workers: dict[str, subprocess.Popen[bytes]] = {}
    faults: Counter[str] = Counter()

    def start(name: str) -> None:
        workers[name] = subprocess.Popen(command(name))

    def fault() -> None:
        name = chance.choice(sorted(workers))
        kind = chance.choice(["SIGKILL", "SIGTERM", "SIGSTOP", "joins", "broker killed", "broker stands still"])
        faults[kind] += 1
        if kind in ("SIGKILL", "SIGTERM"):
            workers[name].send_signal(getattr(signal, kind))
            workers.pop(name).wait(40)
        elif kind == "SIGSTOP":
            workers[name].send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.5, 12))
            workers[name].send_signal(signal.SIGCONT)
        elif kind == "joins" and len(workers) < 3:
            start(f"w{len(faults)}-{sum(faults.values())}")
        elif kind == "broker killed":
            own_kafka.restart(kill=True)
        elif kind == "broker stands still":
            own_kafka.suspend()
            time.sleep(chance.uniform(0.5, 5))
            own_kafka.resume()

    began = time.monotonic()
    try:
        start("a")
        start("b")
        while done(topics) < n and time.monotonic() - began < limit_s:
            time.sleep(chance.uniform(1, 6))
            if sum(faults.values()) < 40:
                fault()
            for name in [name for name, worker in workers.items() if worker.poll() is not None]:
                faults["ended by itself"] += 1
                del workers[name]
            for name in ("a", "b"):
                if name not in workers:
                    start(name)
    finally:
        for worker in workers.values():
            worker.send_signal(signal.SIGCONT)
            worker.terminate()
        for worker in workers.values():
            worker.wait(60)
    print(f"{n:,} messages in {time.monotonic() - began:.0f} s with {dict(faults)}")
    assert done(topics) == n


def assert_each_scored_or_dead(topics: Topics, n: int, garbage_every: int) -> set[str]:
    """Of n messages, each `garbage %d` is once in the dead letters, and each other once in the scores. Returns the
    labels of these."""
    scored = Counter(message.key().decode() for message in topics.read("scores"))
    assert (len(scored), set(scored.values())) == (n - n // garbage_every, {1})
    dead = Counter(message.value() for message in topics.read("dead"))
    assert dead == Counter(b"garbage %d" % i for i in range(0, n, garbage_every))
    return set(scored)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_events_with_faults_at_random(own_kafka: KafkaServer, unique: Callable[[str], str]) -> None:
    n, garbage_every = 1_000_000, 1000
    topics = create(own_kafka.bootstrap, unique("million"), partitions=8)
    event = orjson.dumps(EVENT)
    produce(topics, (b"garbage %d" % i if i % garbage_every == 0 else event for i in range(n)))
    settings = {"batch_size": 1000, "delay": 0.05, "kafka.properties": {"session.timeout.ms": 6000}}
    run_with_faults(
        own_kafka, topics, n, lambda name: process_of(topics, **settings, **{"kafka.instance_id": name}), 1800
    )
    scored = assert_each_scored_or_dead(topics, n, garbage_every)
    assert topics.alerts() == sorted(label for label in scored if p_value(label) <= LINE) != []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_events_with_a_fitted_bundle_and_faults_at_random(
    own_kafka: KafkaServer, unique: Callable[[str], str], folder: Path
) -> None:
    """The events of a simulated day, day after day, with a threshold that follows the budget."""
    n, garbage_every = 100_000, 1000
    topics = create(own_kafka.bootstrap, unique("bundle"), partitions=8)
    day = [orjson.loads(line) for line in lines(folder / "test.ndjson")]

    def value(i: int) -> bytes:
        if i % garbage_every == 0:
            return b"garbage %d" % i
        days, event = divmod(i, len(day))
        return orjson.dumps(day[event] | {"time": day[event]["time"] + days * 86_400_000})

    produce(topics, map(value, range(n)))
    with ValkeyServer() as valkey:

        def command(name: str) -> Sequence[str]:
            return FittedService(
                topics, folder / "bundle", valkey.url, 0, kafka_instance_id=name, threshold=None
            ).command

        run_with_faults(own_kafka, topics, n, command, 1800)
    assert_each_scored_or_dead(topics, n, garbage_every)
    assert alerts_of(topics)


@pytest.mark.slow
def test_a_topic_of_two_hundred_partitions_most_of_them_idle(kafka: str, unique: Callable[[str], str]) -> None:
    topics = create(kafka, unique("wide"), partitions=200)
    with running(service_for(topics)) as raised:
        topics.produce_events(1000)
        topics.wait_until_read(1000)
        for quiet in range(3):  # Only one partition goes on.
            topics.produce([orjson.dumps(EVENT)] * 10, partition=quiet)
            topics.wait_until_read(1000 + 10 * (quiet + 1))
    assert raised == []
    assert_scored(topics, 1030)


@pytest.mark.slow
def test_messages_of_a_megabyte_are_read_in_bounded_memory(topics: Topics) -> None:
    large = [orjson.dumps(EVENT | {"message": random.Random(i).randbytes(500_000).hex()}) for i in range(20)]
    produce(topics, (large[i % 20] for i in range(1200)))  # 1.2 GB
    most = 0
    detector = HashDetector(lambda _: detector.batches.clear())  # It would keep all that it has seen.
    with running(service_for(topics, detector, batch_size=2048)) as raised:
        before = resident()
        deadline = time.monotonic() + 120
        while done(topics) < 1200 and time.monotonic() < deadline:
            most = max(most, resident())
            time.sleep(0.1)
    assert raised == []
    assert_scored(topics, 1200)
    print(f"{(most - before) / 1e6:.0f} MB more at most")
    assert most - before < 450e6
