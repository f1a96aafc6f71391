"""Each event is scored, each alert is seen once, each message that cannot be read is kept; whatever dies in between."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer
from loop_harness import EVENT, LINE, EachRow, HashDetector, Topics, create, p_value, partitions_of, running, until

from encoder.ocsf.events import Message
from state.errors import StateLostError, StoreUnavailableError
from streamer.detection.batches import ScoredBatch
from streamer.devtools.servers import free_port
from streamer.errors import ConfigurationError, StreamError
from streamer.kafka.consumer import QUEUED_BATCHES
from streamer.service import loop as service_module
from streamer.service.loop import Service


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("service"))


def service_for(topics: Topics, detector: HashDetector | None = None, *, windows: Any = None, **more: Any) -> Service:
    return Service(topics.settings(**more), detector or HashDetector(), EachRow(), threshold=LINE, windows=windows)


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_alerts_scores_and_offsets_of_a_stream(topics: Topics, delivery: str, protocol: str) -> None:
    topics.produce_events(500)
    more = {"kafka.group_protocol": protocol, "delivery": delivery}
    more |= {"kafka.properties": {}} if protocol == "consumer" else {}
    with running(service_for(topics, **more)) as raised:
        topics.wait_until_read(500)
    assert raised == []
    assert topics.committed() == {0: 250, 1: 250}
    assert topics.alerts() == topics.expected_alerts(500) != []
    scores = [orjson.loads(message.value()) for message in topics.read("scores")]
    assert len(scores) == 500
    for score in scores:
        label = f"{score['topic']}:{score['partition']}:{score['offset']}:{score['index']}"
        assert score["p_value"] == p_value(label)
    alert = topics.read("alerts")[0]
    assert alert.headers() == [("schema", b"1.8.0")]
    assert alert.key() == orjson.loads(alert.value())["uid"].encode()


class Overlapping(HashDetector):
    """Judges a batch only once the next is prepared, and writes down how many are prepared and not judged."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left, self.ahead, self.most = batches, 0, 0
        self.changed = threading.Condition()

    def prepare(self, messages: Sequence[Message]) -> tuple[HashDetector, Sequence[Message]]:
        with self.changed:
            self.ahead += 1
            self.most = max(self.most, self.ahead)
            self.changed.notify_all()
        return super().prepare(messages)

    def judge(self, prepared: tuple[HashDetector, Sequence[Message]]) -> ScoredBatch:
        with self.changed:
            self.left -= 1
            assert self.changed.wait_for(lambda: self.ahead > 1 or not self.left, 20), "nothing was prepared meanwhile"
            self.ahead -= 1
        time.sleep(0.02)
        return super().judge(prepared)


def test_the_next_batch_is_prepared_while_the_one_before_is_judged_and_no_more_than_wait(topics: Topics) -> None:
    topics.produce_events(1000)
    detector = Overlapping(20)
    with running(service_for(topics, detector, linger_ms=5000)) as raised:
        topics.wait_until_read(1000)
    assert raised == []
    assert detector.left == 0
    assert 2 <= detector.most <= QUEUED_BATCHES + 1
    assert topics.alerts() == topics.expected_alerts(1000)


def test_what_cannot_be_prepared_ends_the_service_and_commits_nothing_of_it(topics: Topics) -> None:
    class Failing(HashDetector):
        def prepare(self, messages: Sequence[Message]) -> tuple[HashDetector, Sequence[Message]]:
            raise MemoryError("no memory left on the device")

    topics.produce_events(10)
    with running(service_for(topics, Failing())) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], MemoryError)
    assert sum(max(offset, 0) for offset in topics.committed().values()) == 0


@pytest.mark.extended
def test_a_group_is_committed_within_its_latency_however_little_comes(topics: Topics) -> None:
    service = service_for(topics, transaction_latency_ms=200, batches_per_transaction=1000)
    with running(service) as raised:
        until(lambda: service.not_ready() == "")
        topics.produce_events_slowly(80, 8.0)
        topics.wait_until_read(80)
    assert raised == []
    taken = service.metrics.registry.get_sample_value
    batches = taken("ripcurrent_batch_latency_seconds_count") or 0
    commits = taken("ripcurrent_transactions_total", {"outcome": "committed"}) or 0
    assert taken("ripcurrent_batch_latency_seconds_bucket", {"le": "2.5"}) == batches >= 20
    assert 8 <= commits <= 8 / 0.2 + 2  # Many batches share one, and none waits for the last.


@pytest.mark.extended
def test_sigkill_in_the_middle_leaves_the_output_of_an_undisturbed_run(topics: Topics) -> None:
    n = 3000
    topics.produce_events(n)
    flags = json.loads(topics.settings().model_dump_json())
    arguments = {k: v for k, v in flags.items() if k not in ("kafka", "redis", "threshold", "events")}
    arguments |= {"kafka.bootstrap_servers": topics.bootstrap, "kafka.group_id": topics.name, "events": topics.events}
    arguments |= {"kafka.instance_id": "one", "kafka.properties": {"session.timeout.ms": 6000}, "delay": 0.02}
    arguments |= {"batches_per_transaction": 3}
    command = [sys.executable, str(Path(__file__).with_name("loop_harness.py")), json.dumps(arguments)]
    moments = random.Random(7)
    for _ in range(2):
        before = sum(max(offset, 0) for offset in topics.committed().values())
        with subprocess.Popen(command) as process:
            until(lambda before=before: sum(max(o, 0) for o in topics.committed().values()) > before)
            time.sleep(moments.random() * 0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert sum(topics.committed().values()) < n
    with subprocess.Popen(command) as process:
        topics.wait_until_read(n)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert topics.alerts() == topics.expected_alerts(n)
    labels = Counter(message.key() for message in topics.read("scores"))
    assert len(labels) == n
    assert set(labels.values()) == {1}


def test_what_cannot_be_read_goes_to_the_dead_letters_unchanged_and_the_stream_goes_on(topics: Topics) -> None:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    huge = orjson.dumps(EVENT | {"message": "x" * 5_000_000})
    bad: list[bytes | None] = [b"not json", b"", None, b"[1, 2]", deep, b"\xff\xfe\xfa", b"null", b"x" * 5_000_000]
    bundle = orjson.dumps({"events": [EVENT, 7, EVENT]})
    invalid_utf8 = orjson.dumps(EVENT | {"message": "MARK"}).replace(b"MARK", b"\xff\xfe")
    topics.produce(bad, 0, key=b"k", headers=[("h", b"v")], timestamp=1_700_000_000_123)
    topics.produce([bundle, huge, invalid_utf8, orjson.dumps(EVENT)], 0, key=b"k")
    with running(service_for(topics)) as raised:
        topics.wait_until_read(len(bad) + 4)
    assert raised == []
    dead = topics.read("dead")
    by_offset = {int(dict(message.headers())["__connect.errors.offset"]): message for message in dead}
    assert len(dead) == len(bad) + 1
    for offset, value in enumerate(bad):
        message = by_offset[offset]
        headers = dict(message.headers())
        assert (message.value(), message.key(), message.timestamp()[1]) == (value, b"k", 1_700_000_000_123)
        assert headers["h"] == b"v"
        assert headers["__connect.errors.topic"] == topics.events.encode()
        assert headers["__connect.errors.partition"] == b"0"
        assert headers["__connect.errors.stage"] == b"decode"
        assert headers["__connect.errors.exception.class.name"]
        assert headers["__connect.errors.exception.message"]
    member = by_offset[len(bad)]
    assert member.value() == b"7"
    assert b"member 1" in dict(member.headers())["__connect.errors.exception.message"]
    scored = {message.key().decode().split(":", 2)[2] for message in topics.read("scores")}
    first = len(bad)
    assert scored == {f"{first}:0", f"{first}:2", f"{first + 1}:0", f"{first + 2}:0", f"{first + 3}:0"}


def test_a_dead_letter_that_its_topic_refuses_becomes_a_stub(kafka: str, topics: Topics) -> None:
    garbage = random.Random(1).randbytes(7_000_000)
    topics.produce([b"bad", garbage, b"bad too", orjson.dumps(EVENT)], 0, key=b"k")
    with running(service_for(topics)) as raised:
        topics.wait_until_read(4)
    assert raised == []
    dead = topics.read("dead")
    assert [message.value() for message in dead if message.value().startswith(b"bad")] == [b"bad", b"bad too"]
    (stub,) = [message for message in dead if "ripcurrent.stub" in dict(message.headers())]
    body = orjson.loads(stub.value())
    assert body["sha256"] == hashlib.sha256(garbage).hexdigest()
    assert (body["topic"], body["partition"], body["offset"], body["size"]) == (topics.events, 0, 1, 7_000_000)
    assert len(topics.read("scores")) == 1


@pytest.mark.extended
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_workers_that_join_and_leave_lose_and_double_nothing(
    kafka: str, unique: Callable[[str], str], protocol: str
) -> None:
    n = 4000
    topics = create(kafka, unique("rebalance"), partitions=4)
    more = {"kafka.group_protocol": protocol}
    more |= {"kafka.properties": {}} if protocol == "consumer" else {}

    def worker(name: str) -> Service:
        detector = HashDetector(lambda _: time.sleep(0.01))
        return service_for(topics, detector, **more, **{"kafka.instance_id": name})

    first, second = worker("a"), worker("b")
    with running(first) as raised_first:
        until(lambda: first.not_ready() == "")
        feeding = threading.Thread(target=topics.produce_events_slowly, args=(n,))
        feeding.start()
        with running(second) as raised_second:
            until(lambda: bool(second.detector.batches) and partitions_of(second) == 2)
        feeding.join()
        topics.wait_until_read(n)
    assert raised_first == raised_second == []
    assert topics.alerts() == topics.expected_alerts(n)
    labels = Counter(message.key() for message in topics.read("scores"))
    assert (len(labels), set(labels.values())) == (n, {1})


def test_a_batch_that_fails_while_its_outputs_are_made_leaves_none_of_them(topics: Topics) -> None:
    class Unwritable:
        """An alert that cannot be written."""

        row, activity = 0, 1

        @property
        def key(self) -> bytes:
            raise RuntimeError("no alert")

    class FailingLater(EachRow):
        def __init__(self) -> None:
            self.batches = 0

        def alerts(self, scored: ScoredBatch, rows: Any) -> list[Any]:
            self.batches += 1
            return [*super().alerts(scored, rows), *([Unwritable()] if self.batches == 3 else [])]

    topics.produce_events(400)
    settings = topics.settings(transaction_latency_ms=30_000, batches_per_transaction=1000)
    service = Service(settings, HashDetector(), FailingLater(), threshold=1.0)
    with running(service) as raised:
        until(lambda: bool(raised))
    assert str(raised[0]) == "no alert"
    # What was done before is committed as the partitions are given up, with its alerts and no others.
    done = {(topic, p): offset for (topic, p), offset in ((("", p), max(o, 0)) for p, o in topics.committed().items())}
    expected = sorted(f"{topics.events}:{p}:{offset}:0" for (_, p), end in done.items() for offset in range(end))
    assert topics.alerts() == expected
    assert len(topics.read("scores")) == len(expected)


def test_sigterm_commits_what_is_scored_and_leaves_within_seconds(topics: Topics) -> None:
    topics.produce_events(400)
    detector = HashDetector(lambda _: time.sleep(0.2))
    service = service_for(topics, detector, transaction_latency_ms=30_000, batches_per_transaction=1000)
    with running(service) as raised:
        until(lambda: len(detector.batches) >= 2)
    assert raised == []
    done = sum(topics.committed().values())
    assert 0 < done < 400, "what waits is left to the next start"
    assert len(topics.read("scores")) == done


def test_a_store_that_is_away_is_waited_for_while_kafka_is_polled(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics.produce_events(1000)
    back = time.monotonic() + 4

    def away(_: Sequence[Message]) -> None:
        if time.monotonic() < back:
            raise StoreUnavailableError("redis at localhost:1 does not answer")

    service = service_for(topics, HashDetector(away))
    monkeypatch.setattr(service_module, "ALIVE_S", 2.0)
    with running(service) as raised:
        until(lambda: "does not answer" in service.not_ready())
        until(lambda: time.monotonic() > back)
        assert service.not_alive() == "", "Kafka was not polled for half of the time"
        topics.wait_until_read(1000)
        assert service.not_ready() == ""
    assert raised == []
    assert topics.alerts() == topics.expected_alerts(1000)


def test_a_store_that_stays_away_ends_the_service_with_a_clear_error(topics: Topics) -> None:
    def away(_: Sequence[Message]) -> None:
        raise StoreUnavailableError("redis at localhost:1 does not answer")

    topics.produce_events(10)
    with running(service_for(topics, HashDetector(away), **{"redis.patience_s": 0.5})) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert "redis.patience_s" in str(raised[0])
    assert sum(max(offset, 0) for offset in topics.committed().values()) == 0


class Log:
    """Windows that write down what they are told, and are lost when they are first asked if told so."""

    age_ms = 1_000_000_000

    def __init__(self, lost: StateLostError | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.lost = lost

    def prepare(self, offsets: Any) -> None:
        if offsets:
            self.calls.append(("prepare", dict(offsets)))

    def committed(self, offsets: Any) -> None:
        self.calls.append(("committed", dict(offsets)))

    def identify(self, topics: Any) -> None:
        """Nothing is remembered."""

    def identified(self) -> dict[Any, int]:
        return {}

    def round_trips(self) -> dict[str, float]:
        return {}

    def check_epoch(self, offsets: Any) -> None:
        self.calls.append(("check_epoch", dict(offsets)))
        lost, self.lost = self.lost, None
        if lost is not None:
            raise lost

    def begin_rebuild(self, lost: StateLostError, others: Any = ()) -> None:
        self.calls.append(("begin_rebuild", (lost.resume, list(others))))

    def finish_rebuild(self, sources: Any, horizon_ms: int = 0) -> None:
        self.calls.append(("finish_rebuild", (set(sources), horizon_ms)))


def test_windows_are_told_before_and_after_each_commit_and_asked_at_start(topics: Topics) -> None:
    topics.produce_events(20)
    log = Log()
    with running(service_for(topics, windows=log)):
        topics.wait_until_read(20)
    names = [name for name, _ in log.calls]
    assert log.calls[0] == ("check_epoch", {})
    assert names[1] == "prepare"  # Of what is owned: an entity's silence waits for each of its partitions.
    commits = [at for at, name in enumerate(names) if name == "committed"]
    assert commits
    for at in commits:  # What was just told is what is then committed.
        assert names[at - 1] == "prepare"
        assert log.calls[at - 1][1] == log.calls[at][1]
    assert set(names) == {"check_epoch", "prepare", "committed"}
    assert log.calls[-1] == ("committed", {(topics.events, 0): 10, (topics.events, 1): 10})


def test_lost_windows_are_filled_from_kafka_up_to_the_commit_before_anything_is_scored(topics: Topics) -> None:
    topics.produce_events(20)
    with running(service_for(topics)):
        topics.wait_until_read(20)
    first, second = (topics.events, 0), (topics.events, 1)
    log, detector = Log(StateLostError("gone", wiped=True, resume={first: 4, second: None})), HashDetector()
    topics.produce_events(20)
    service = service_for(topics, detector, windows=log)
    with running(service) as raised:
        topics.wait_until_read(40)
    assert raised == []
    assert sorted((m.partition, m.offset) for m in detector.remembered) == [(0, n) for n in range(4, 10)] + [
        (1, n) for n in range(10)
    ]
    asked, begun, *filling = log.calls
    assert asked == ("check_epoch", {first: 10, second: 10})
    assert begun == ("begin_rebuild", ({first: 4, second: None}, []))
    ends = [told for name, told in filling if name == "finish_rebuild"]
    assert set().union(*(sources for sources, _ in ends)) == {first, second}
    assert {horizon for _, horizon in ends} == {0}
    assert len(topics.read("scores")) == 40
    assert topics.alerts() == topics.expected_alerts(40)


def test_a_first_start_at_latest_skips_the_past_and_nothing_after_it(topics: Topics) -> None:
    topics.produce_events(10)
    with running(service_for(topics, start="latest")):
        until(lambda: topics.committed() == {0: 5, 1: 5})
    topics.produce_events(10)
    with running(service_for(topics, start="latest")):
        topics.wait_until_read(20)
    assert len(topics.read("scores")) == 10


def expire(topics: Topics, offset: int) -> None:
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": topics.bootstrap})
    for future in admin.delete_records([TopicPartition(topics.events, 0, offset)]).values():
        future.result(10)


def test_offsets_that_no_longer_exist_stop_the_service_with_the_gap_unless_told_to_go_on(topics: Topics) -> None:
    topics.produce_events(20)
    with running(service_for(topics)):
        topics.wait_until_read(20)
    topics.produce_events(20)
    expire(topics, 15)
    with running(service_for(topics)) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert f"{topics.events}:0 has offsets 15 to 19, and 10 is needed; 5 messages are lost" in str(raised[0])
    with running(service_for(topics, on_missing_offsets="continue")) as raised:
        topics.wait_until_read(40)
    assert raised == []
    assert len(topics.read("scores")) == 20 + 15


def test_a_twin_with_the_same_transactional_id_fences_the_older_with_a_clear_error(topics: Topics) -> None:
    topics.produce_events(10)
    with running(service_for(topics)) as raised:
        topics.wait_until_read(10)
        twin = Producer({"bootstrap.servers": topics.bootstrap, "transactional.id": f"{topics.name}-one"})
        twin.init_transactions(20)
        topics.produce_events(10)
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert "kafka.instance_id" in str(raised[0])
    with running(service_for(topics)) as raised:
        topics.wait_until_read(20)
    assert raised == []
    assert len(topics.read("scores")) == 20


def test_a_loop_that_stands_still_is_not_alive(topics: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "STUCK_S", 2.0)
    monkeypatch.setattr(service_module, "ALIVE_S", 1.9)
    going_on, stuck = threading.Event(), threading.Event()

    def stand_still(_: Sequence[Message]) -> None:
        stuck.set()
        going_on.wait(30)

    topics.produce_events(10)
    service = service_for(topics, HashDetector(stand_still))
    with running(service) as raised:
        until(stuck.is_set)
        assert service.not_alive() == ""
        # That Kafka is not polled would be said first.
        until(lambda: "the loop is at the same thing for" in service.not_alive())
        going_on.set()
        topics.wait_until_read(10)
        assert service.not_alive() == ""
    assert raised == []


def test_metrics_and_health_are_served(topics: Topics) -> None:
    port = free_port()
    topics.produce([*[orjson.dumps(EVENT)] * 999, b"garbage"])

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with running(service_for(topics, metrics_port=port)) as raised:
        topics.wait_until_read(1000)
        until(lambda: get("/readyz")[0] == 200)
        assert get("/healthz") == (200, "ok\n")
        assert get("/nothing")[0] == 404
        until(lambda: "ripcurrent_lag_messages{" in get("/metrics")[1])
        until(lambda: "ripcurrent_kafka_round_trip_seconds{" in get("/metrics")[1])
        text = get("/metrics")[1]
        with pytest.raises(ConfigurationError, match=f"metrics_port {port}"):
            service_for(topics, metrics_port=port, **{"kafka.instance_id": "two"}).run()
    assert raised == []
    figures = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    assert figures["ripcurrent_messages_total"] == 1000
    assert figures["ripcurrent_events_total"] == 999
    assert figures['ripcurrent_rejects_total{exception="JSONDecodeError"}'] == 1
    assert figures["ripcurrent_alerts_total"] == figures["ripcurrent_alert_latency_seconds_count"] > 0
    assert figures["ripcurrent_budget_spent_today"] == figures["ripcurrent_alerts_total"]
    assert figures["ripcurrent_line_p_value"] == LINE
    assert figures[f'ripcurrent_lag_messages{{partition="0",topic="{topics.events}"}}'] == 0
    assert figures["process_resident_memory_bytes"] > 1e6
    assert 0 < figures[f'ripcurrent_kafka_round_trip_seconds{{broker="{topics.bootstrap}"}}'] < 10
    for count in ('ripcurrent_stage_seconds_count{stage="judge"}', "ripcurrent_batch_latency_seconds_count"):
        assert figures[count] == figures["ripcurrent_batches_total"]
