"""The edge to Kafka: polling never stops, a rewind gives the same again, names are unique, outages are outlived."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from loop_harness import EVENT, LINE, EachRow, HashDetector, Topics, before_offsets_are_sent, create, running, until

from encoder.ocsf.events import Message
from streamer.cli.doctor import examine, transactions
from streamer.devtools.servers import KafkaServer
from streamer.errors import ConfigurationError, StreamError
from streamer.kafka import consumer as source_module
from streamer.kafka import held_back as held_back_module
from streamer.kafka import producer as publishing
from streamer.kafka.client import TransactionAbortedError, check_topics, claim_instance, patiently
from streamer.kafka.consumer import QUEUED_BATCHES, STALL_S, EventConsumer
from streamer.kafka.partition_reader import PartitionReader
from streamer.kafka.producer import TransactionalPublisher
from streamer.service.loop import Service


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("kafka"))


def test_polling_goes_on_while_nobody_takes_batches_and_nothing_is_lost_by_the_pause(topics: Topics) -> None:
    topics.produce_events(1000)
    prepared: list[int] = []

    def prepare(messages: Sequence[Message]) -> int:
        prepared.append(len(messages))
        return len(messages)

    source = EventConsumer(topics.settings(), lambda gone, lost: None, prepare)
    source.open()
    try:
        until(lambda: len(prepared) == QUEUED_BATCHES)
        full_at = time.monotonic()
        until(lambda: source.polled_at > full_at + 3 * STALL_S)
        assert len(prepared) <= QUEUED_BATCHES + 1
        seen: list[tuple[int, int]] = []

        def take() -> bool:
            source.wait(0.1)
            with source.guard:
                batch = source.take()
            if batch:
                assert batch.prepared.result(0) == len(batch.messages)
                seen.extend((m.partition, m.offset) for m in batch.messages)
            return len(seen) >= 1000

        until(take)
        assert [offset for partition, offset in seen if partition == 0] == list(range(500))
        assert [offset for partition, offset in seen if partition == 1] == list(range(500))
    finally:
        source.close()


def test_a_rewind_gives_again_what_is_not_committed(topics: Topics) -> None:
    topics.produce_events(400)
    source = EventConsumer(topics.settings(), lambda gone, lost: None, len)
    source.open()
    try:
        wanted = {(0, offset) for offset in range(50, 200)} | {(1, offset) for offset in range(200)}
        for _ in range(3):
            seen: set[tuple[int, int]] = set()

            def take(seen: set[tuple[int, int]] = seen) -> bool:
                source.wait(0.1)
                with source.guard:
                    batch = source.take()
                seen.update((m.partition, m.offset) for m in batch.messages) if batch else None
                return seen >= wanted

            source.committed({(topics.events, 0): 50})
            until(take)
            with source.guard:
                source.rewind()
    finally:
        source.close()


@pytest.mark.extended
def test_what_is_read_again_after_partitions_went_and_came_back_is_in_no_batch_twice(topics: Topics) -> None:
    """Both within the time in which a batch fills."""
    topics.produce_events(600)
    source = EventConsumer(topics.settings(linger_ms=15_000, batch_size=100_000), lambda gone, lost: None, len)
    source.open()
    other = Consumer(
        {
            "bootstrap.servers": topics.bootstrap,
            "group.id": topics.name,
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
        }
    )
    try:
        until(lambda: len(source.owned()) == 2)
        time.sleep(1)  # What there is has been read into the batch, of which nothing can be seen.
        other.subscribe([topics.events])
        until(lambda: len(source.owned()) == 1 or bool(other.poll(0.1)))
        until(lambda: bool(other.assignment()) or bool(other.poll(0.1)))
        other.close()
        until(lambda: len(source.owned()) == 2)
        topics.produce_events(20)
        until(lambda: bool(source._queue), 40)
        with source.guard:
            source.wait(5)
            batch = source.take()
        assert batch is not None
        seen = [(m.partition, m.offset) for m in batch.messages]
        assert sorted(seen) == [(p, offset) for p in (0, 1) for offset in range(310)]
        for partition in (0, 1):
            assert [offset for p, offset in seen if p == partition] == list(range(310))
    finally:
        source.close()


@pytest.mark.extended
def test_a_broker_that_restarts_costs_nothing_but_time(unique: Callable[[str], str]) -> None:
    with KafkaServer() as server:
        topics = create(server.bootstrap, unique("restart"))
        topics.produce_events(600)
        detector = HashDetector(lambda _: time.sleep(0.05))
        service = Service(topics.settings(), detector, EachRow(), threshold=LINE)
        with running(service) as raised:
            until(lambda: len(detector.batches) > 3)
            server.restart(kill=True)
            topics.produce_events(200)
            topics.wait_until_read(800)
        assert raised == []
        assert topics.alerts() == topics.expected_alerts(800)
        assert len({message.key() for message in topics.read("scores")}) == len(topics.read("scores")) == 800


@pytest.mark.extended
def test_the_end_of_a_topic_is_read_after_its_broker_has_restarted(unique: Callable[[str], str]) -> None:
    """Each start of a broker gives its partitions a new leader epoch, and a question with an old one is refused."""
    with KafkaServer() as server:
        topics = create(server.bootstrap, unique("epoch"), partitions=1)
        topics.produce_events(5)
        source = (topics.events, 0)
        reader = PartitionReader(topics.settings(), "reader")
        assert reader.written([source]) == {source: 5}
        for kill in (True, False):
            server.restart(kill=kill)
            assert patiently("the end", lambda: reader.written([source]), lambda: 20.0) == {source: 5}
            assert patiently("the bounds", lambda: reader.bounds([source]), lambda: 20.0) == {source: (0, 5)}
        reader.close()


@pytest.mark.extended
def test_a_broker_that_is_away_is_named_by_readyz_until_it_is_back(unique: Callable[[str], str]) -> None:
    with KafkaServer() as server:
        topics = create(server.bootstrap, unique("away"))
        topics.produce_events(20)
        service = Service(topics.settings(), HashDetector(), EachRow(), threshold=LINE)
        with running(service) as raised:
            topics.wait_until_read(20)
            assert service.not_ready() == ""
            server.kill()
            until(lambda: service.not_ready() != "")
            assert service.not_ready() in ("no broker is connected", "no partitions are assigned")
            assert service.not_alive() == ""
            server.start()
            until(lambda: service.not_ready() == "")
            topics.produce_events(20)
            topics.wait_until_read(40)
        assert raised == []


@pytest.mark.extended
def test_a_producer_whose_transaction_cannot_be_aborted_is_made_anew(
    unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "SEND_OFFSETS_S", 1.0)
    with KafkaServer() as server:
        topics = create(server.bootstrap, unique("anew"))
        topics.produce_events(600)
        sent: list[bool] = []

        def freeze() -> None:
            if len(sent) == 2:  # The outputs of the third transaction are written, its offsets are not.
                server.suspend()
                threading.Timer(4, server.resume).start()
            sent.append(True)

        made = before_offsets_are_sent(monkeypatch, freeze)
        service = Service(topics.settings(), HashDetector(lambda _: time.sleep(0.02)), EachRow(), threshold=LINE)
        with running(service) as raised:
            topics.wait_until_read(600)
        assert raised == []
        assert len(made) > 1
        assert topics.alerts() == topics.expected_alerts(600)
        keys = [message.key() for message in topics.read("scores")]
        assert len(keys) == len(set(keys)) == 600
        assert len(topics.read("scores", "read_uncommitted")) > 600  # There was something to abort.


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KafkaError(KafkaError._TIMED_OUT), "again"),
        (KafkaError(KafkaError._TRANSPORT), "again"),
        (KafkaError(KafkaError.COORDINATOR_NOT_AVAILABLE, retriable=True), "again"),
        (KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS, retriable=True), "again"),
        (KafkaError(KafkaError.NOT_COORDINATOR, retriable=True), "again"),
        (KafkaError(KafkaError.CONCURRENT_TRANSACTIONS, retriable=True), "again"),
        (KafkaError(KafkaError.ILLEGAL_GENERATION, txn_requires_abort=True), TransactionAbortedError),
        (KafkaError(KafkaError.UNKNOWN_MEMBER_ID, txn_requires_abort=True), TransactionAbortedError),
        (KafkaError(KafkaError._PURGE_QUEUE, txn_requires_abort=True), TransactionAbortedError),
        (KafkaError(KafkaError._STATE), KafkaException),
        (KafkaError(KafkaError.INVALID_TXN_STATE, fatal=True), StreamError),
        (KafkaError(KafkaError._FENCED, fatal=True), StreamError),
        (KafkaError(KafkaError.INVALID_PRODUCER_EPOCH, txn_requires_abort=True), StreamError),
        (KafkaError(KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED), StreamError),
        (KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED, txn_requires_abort=True), StreamError),
    ],
    ids=lambda value: value.name() if isinstance(value, KafkaError) else None,
)
def test_errors_are_told_apart(topics: Topics, error: KafkaError, outcome: Any) -> None:
    """Again: what waiting mends. Aborted: what reading again mends. StreamError: what needs a person."""
    publisher = TransactionalPublisher(topics.settings(), EventConsumer(topics.settings(), lambda *_: None, len), "one")
    calls = []

    def call() -> None:
        calls.append(True)
        if len(calls) == 1:
            raise KafkaException(error)

    if outcome == "again":
        publisher._call("commit_transaction", call)
        assert len(calls) == 2
    else:
        with pytest.raises(outcome):
            publisher._call("commit_transaction", call)
        assert len(calls) == 1


def test_a_partition_whose_leader_is_not_ready_is_waited_for(topics: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    topics.produce_events(20)
    asked = []

    def watermarks(consumer: Any, source: Any) -> tuple[int, int]:
        def read() -> tuple[int, int]:
            asked.append(source)
            if len(asked) < 4:
                raise KafkaException(KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION, retriable=True))
            return 0, 10

        return patiently("offsets", read)

    monkeypatch.setattr(source_module, "watermarks", watermarks)
    with running(Service(topics.settings(), HashDetector(), EachRow(), threshold=LINE)) as raised:
        topics.wait_until_read(20)
    assert raised == []
    assert len(asked) == 5


def test_what_fails_while_partitions_are_assigned_ends_the_service(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watermarks(consumer: Any, source: Any) -> tuple[int, int]:
        raise KafkaException(KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION))

    monkeypatch.setattr(source_module, "watermarks", watermarks)
    with running(Service(topics.settings(), HashDetector(), EachRow(), threshold=LINE)) as raised:
        until(lambda: bool(raised))
    assert "NOT_LEADER_FOR_PARTITION" in str(raised[0])


def test_processes_on_one_host_have_different_names_that_a_restart_keeps(topics: Topics) -> None:
    settings = topics.settings(**{"kafka.instance_id": None})
    group = settings.kafka.group_id
    program = (
        "import sys; from streamer.kafka.client import claim_instance; from streamer.settings import load\n"
        "print(claim_instance(load({'kafka.group_id': sys.argv[1]})), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, group]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as first:
        assert first.stdout is not None
        name = first.stdout.readline().strip()
        with start() as second:
            assert second.stdout is not None
            assert second.stdout.readline().strip() != name
            second.kill()
        first.kill()
    with start() as again:
        assert again.stdout is not None
        assert again.stdout.readline().strip() == name
        again.kill()
    assert claim_instance(topics.settings()) == "one"


def test_a_broker_that_calls_itself_what_nobody_here_knows_is_named_at_start(unique: Callable[[str], str]) -> None:
    with KafkaServer({"advertised.listeners": "PLAINTEXT://broker.inside.invalid:9092"}) as server:
        settings = Topics(server.bootstrap, unique("advertised"), 1).settings()
        said = rf"answers at {server.bootstrap}, but broker 1 calls itself broker\.inside\.invalid:9092, which cannot"
        with pytest.raises(ConfigurationError, match=f"{said} be resolved here; set advertised.listeners"):
            check_topics(settings)
        (kafka,) = [check for check in examine(settings) if check.what == "kafka"]
        assert kafka.mark == "bad"
        assert "broker.inside.invalid:9092" in kafka.text


def test_a_partition_that_an_open_transaction_holds_back_is_named(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_back_module, "HELD_BACK_S", 3.0)
    topics.produce_events(20)
    service = Service(topics.settings(), HashDetector(), EachRow(), threshold=LINE)
    producer = Producer({"bootstrap.servers": topics.bootstrap, "transactional.id": topics.name})
    producer.init_transactions(20)
    with running(service) as raised:
        topics.wait_until_read(20)
        until(lambda: service.not_ready() == "")
        producer.begin_transaction()
        producer.produce(topics.events, orjson.dumps(EVENT), partition=1)
        producer.flush(10)
        topics.produce_events(20)
        until(lambda: service.not_ready() != "")
        said = f"{topics.events}:1 stands at offset 10 for"
        assert service.not_ready().startswith(said)
        assert "and 11 messages wait behind it" in service.not_ready()
        assert service.not_alive() == ""
        (found,) = transactions(topics.settings())
        assert (found.mark, found.text.startswith(said)) == ("warn", True)
        assert f"describe-producers --topic {topics.events} --partition 1" in found.text
        producer.commit_transaction(20)
        until(lambda: service.not_ready() == "")
        topics.wait_until_read(41)
        assert list(transactions(topics.settings())) == []
    assert raised == []


def test_what_is_missing_or_wrong_is_named_before_anything_starts(topics: Topics) -> None:
    check_topics(topics.settings())
    with pytest.raises(ConfigurationError, match=r"no such topic .*: nowhere;"):
        check_topics(topics.settings(events=f"{topics.events},nowhere"))
    with pytest.raises(ConfigurationError, match="is both read and written"):
        check_topics(topics.settings(alerts=topics.events))
