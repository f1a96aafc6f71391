"""Topics change under a group: partitions are added, a topic is deleted and created again. No event is left out, none
is taken for another, and nothing of it is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from loop_harness import (
    EVENT,
    LINE,
    EachRow,
    HashDetector,
    Topics,
    WindowDetector,
    create,
    findings,
    running,
    until,
)
from structlog.testing import capture_logs

from encoder.ocsf.events import Message
from state.redis.windows import RedisWindows
from streamer.errors import StreamError
from streamer.service.loop import Service
from streamer.service.ports import EntityStore

NOTICED_S = {"session.timeout.ms": 6000, "topic.metadata.refresh.interval.ms": 1000}


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("changes"))


@pytest.fixture
def windows(redis_url: str, unique: Callable[[str], str]) -> Iterator[Callable[[], RedisWindows]]:
    tenant, opened = unique("tenant"), []

    def build() -> RedisWindows:
        opened.append(RedisWindows(redis_url, encoder="test", dim=4, tenant=tenant))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


def service_for(
    topics: Topics, detector: HashDetector | None = None, *, windows: EntityStore | None = None, **more: Any
) -> Service:
    flags: dict[str, Any] = {"start": "latest", "kafka.properties": NOTICED_S} | more
    return Service(topics.settings(**flags), detector or HashDetector(), EachRow(), threshold=LINE, windows=windows)


def add_partitions(topics: Topics, total: int) -> None:
    admin = AdminClient({"bootstrap.servers": topics.bootstrap})
    admin.create_partitions([NewPartitions(topics.events, total)])[topics.events].result(20)
    until(lambda: len(admin.list_topics(topics.events, 10).topics[topics.events].partitions) == total)


def recreate(topics: Topics, partitions: int, gone_s: float = 0.0) -> None:
    admin = AdminClient({"bootstrap.servers": topics.bootstrap})
    admin.delete_topics([topics.events])[topics.events].result(20)

    time.sleep(gone_s)

    def created() -> bool:
        try:
            admin.create_topics([NewTopic(topics.events, partitions, 1)])[topics.events].result(20)
        except KafkaException:
            return False
        return True

    until(created)


def scored(topics: Topics) -> list[tuple[int, int]]:
    """(partition, offset) of each score, in order."""
    return sorted((body["partition"], body["offset"]) for body in map(orjson.loads, values(topics, "scores")))


def values(topics: Topics, suffix: str) -> list[bytes]:
    return [message.value() for message in topics.read(suffix)]


def of(partition: int, offsets: range) -> list[tuple[int, int]]:
    return [(partition, offset) for offset in offsets]


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_partition_that_is_added_is_read_from_its_beginning_also_with_latest(topics: Topics, protocol: str) -> None:
    properties = {name: value for name, value in NOTICED_S.items() if protocol == "classic" or "session" not in name}
    more = {"kafka.group_protocol": protocol, "kafka.properties": properties}
    topics.produce_events(10)
    with running(service_for(topics, **more)) as raised:
        until(lambda: topics.committed() == {0: 5, 1: 5})
        add_partitions(topics, 3)
        topics.produce([orjson.dumps(EVENT)] * 100, 2)  # Senders know of it before the service does.
        topics.produce_events(10)
        until(lambda: len(scored(topics)) == 110)
    assert raised == []
    add_partitions(topics, 4)
    topics.produce([orjson.dumps(EVENT)] * 50, 3)  # While nobody reads.
    with running(service_for(topics, **more)) as raised:
        until(lambda: len(scored(topics)) == 160)
    assert raised == []
    assert scored(topics) == of(0, range(5, 10)) + of(1, range(5, 10)) + of(2, range(100)) + of(3, range(50))


def test_a_first_start_is_recorded_before_anything_is_read(topics: Topics) -> None:
    """A process that is killed before its first commit leaves out nothing that came since it began."""
    topics.produce_events(10)
    taken, going_on = threading.Event(), threading.Event()

    def hold(_: Sequence[Message]) -> None:
        taken.set()
        going_on.wait(60)

    service = service_for(topics, HashDetector(hold))
    with running(service) as raised:
        until(lambda: topics.committed() == {0: 5, 1: 5})
        topics.produce_events(10)
        until(taken.is_set)
        service._commit = service._release = lambda *_: None  # type: ignore[method-assign, assignment]
        service._source._release = service._release
        going_on.set()
    assert raised == []
    assert scored(topics) == []
    topics.produce_events(10)
    with running(service_for(topics)) as raised:
        until(lambda: len(scored(topics)) == 20)
    assert raised == []


def test_of_several_members_the_later_ones_start_at_latest_too(topics: Topics) -> None:
    topics.produce_events(10)
    with running(service_for(topics)) as raised:
        until(lambda: topics.committed() == {0: 5, 1: 5})
    assert raised == []
    forget_commit(topics, 1)  # As if its member had died before it recorded its start.
    topics.produce_events(10)
    with running(service_for(topics)) as raised:
        until(lambda: topics.committed() == {0: 10, 1: 10})
        topics.produce_events(2)
        until(lambda: topics.committed() == {0: 11, 1: 11})
    assert raised == []
    assert scored(topics) == of(0, range(5, 11)) + of(1, range(10, 11))


def forget_commit(topics: Topics, partition: int) -> None:
    """What deletes single offsets of a group is not in the client: commit the others to a group of the same name."""
    from confluent_kafka import Consumer, ConsumerGroupTopicPartitions

    admin = AdminClient({"bootstrap.servers": topics.bootstrap})
    (found,) = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(topics.name)]).values()
    kept = [p for p in found.result(20).topic_partitions if p.partition != partition]
    until(lambda: admin.delete_consumer_groups([topics.name])[topics.name].exception(20) is None)
    consumer = Consumer({"bootstrap.servers": topics.bootstrap, "group.id": topics.name})
    consumer.commit(
        offsets=[TopicPartition(p.topic, p.partition, p.offset, metadata=p.metadata) for p in kept], asynchronous=False
    )
    consumer.close()


def test_a_topic_that_is_added_to_the_settings_begins_by_start(topics: Topics, unique: Callable[[str], str]) -> None:
    topics.produce_events(10)
    with running(service_for(topics)) as raised:
        until(lambda: topics.committed() == {0: 5, 1: 5})
    assert raised == []
    other = create(topics.bootstrap, unique("other"))
    other.produce_events(10)
    with running(service_for(topics, events=f"{topics.events},{other.events}")) as raised:
        group = Topics(topics.bootstrap, topics.name, 2, source=other.events)
        until(lambda: group.committed() == {0: 5, 1: 5})
        other.produce_events(4)
        until(lambda: len(scored(topics)) == 4)
    assert raised == []


@pytest.mark.parametrize(("policy", "gone_s"), [("stop", 0), ("continue", 0), ("continue", 4)])
def test_a_topic_that_is_recreated_while_it_is_read(
    topics: Topics, windows: Callable[[], RedisWindows], policy: str, gone_s: float
) -> None:
    store = windows()
    topics.produce_events(200)
    with (
        running(
            service_for(topics, WindowDetector(store), windows=store, start="earliest", on_missing_offsets=policy)
        ) as raised,
        capture_logs() as logs,
    ):
        until(lambda: len(scored(topics)) == 200)
        recreate(topics, 2, gone_s)
        topics.produce_events(600)  # More than the old position.
        if policy == "stop":
            until(lambda: bool(raised))
        else:
            until(lambda: len(scored(topics)) == 800 or bool(raised))
    if policy == "stop":
        assert isinstance(raised[0], StreamError)
        assert f"topic '{topics.events}' was deleted and created again" in str(raised[0])
        assert "--on-missing-offsets continue" in str(raised[0])
        assert len(scored(topics)) == 200
        store = windows()
        with running(
            service_for(topics, WindowDetector(store), windows=store, on_missing_offsets="continue")
        ) as raised:
            until(lambda: len(scored(topics)) == 800)
    else:
        told = [line for line in logs if "going on at the beginning" in line["event"]]
        assert len(told) == 1
    assert raised == []
    assert scored(topics) == sorted(of(0, range(100)) + of(1, range(100)) + of(0, range(300)) + of(1, range(300)))


def test_a_topic_that_was_recreated_while_nobody_read_is_told_by_what_windows_remember(
    topics: Topics, windows: Callable[[], RedisWindows]
) -> None:
    store = windows()
    topics.produce_events(200)
    with running(service_for(topics, WindowDetector(store), windows=store, start="earliest")) as raised:
        until(lambda: len(scored(topics)) == 200)
    assert raised == []
    recreate(topics, 3)
    topics.produce_events(100)
    store = windows()
    with running(service_for(topics, WindowDetector(store), windows=store)) as raised:
        until(lambda: bool(raised))
    assert "was deleted and created again" in str(raised[0])
    store = windows()
    more = Topics(topics.bootstrap, topics.name, 3)
    more.produce([orjson.dumps(EVENT)] * 10, 2)
    detector = WindowDetector(store)
    with running(service_for(topics, detector, windows=store, on_missing_offsets="continue")) as raised:
        until(lambda: len(scored(topics)) == 310)
    assert raised == []
    store = windows()
    with running(service_for(topics, WindowDetector(store), windows=store)) as raised:
        topics.produce_events(10)
        until(lambda: len(scored(topics)) == 320)
    assert raised == []


def test_events_of_a_recreated_topic_are_not_taken_for_redelivered_ones(
    topics: Topics, windows: Callable[[], RedisWindows], redis_url: str, unique: Callable[[str], str]
) -> None:
    """Their coordinates are those of events that windows and episodes know. Windows go on with both."""
    tenant = unique("tenant")
    single = create(topics.bootstrap, unique("single"), partitions=1)

    def run(first: int, n: int, total: int) -> None:
        store = windows()
        detector = WindowDetector(store)
        settings = single.settings(on_missing_offsets="continue")
        service = Service(settings, detector, findings(detector, redis_url, tenant), threshold=1.0, windows=store)
        with running(service) as raised:
            single.produce_events_from(first, n)
            until(lambda: len(values(single, "scores")) == total)
        assert raised == []

    run(0, 100, 100)
    told = len(values(single, "alerts"))
    recreate(single, 1)
    run(100, 60, 160)
    assert len(values(single, "alerts")) > told
    store = windows()
    store.identify(store.identified())
    store.check_epoch({})
    found = store.latest([f"user:{n}" for n in range(7)])
    # 160 events of 7 users; each window ends with those of the new topic.
    newest = [found.offset[row, -found.length[row] :].tolist() for row in range(7)]
    old_then_new = [found.sources[source][0] for source in found.source[0, -found.length[0] :].tolist()]
    assert old_then_new[-8:] == [single.events] * 8
    assert set(old_then_new[:-9]) == {next(name for name, _ in found.sources if "#" in name)}
    assert sorted(offset for offsets in newest for offset in offsets[-8:] if offset < 60)[-1] == 59


def test_a_check_that_finds_another_topic_commits_nothing_of_the_one_before(topics: Topics) -> None:
    """A batch of the old topic is in hand when the topic is created anew."""
    taken, going_on = threading.Event(), threading.Event()

    def hold(_: Sequence[Message]) -> None:
        taken.set()
        going_on.wait(30)

    topics.produce_events(40)
    service = service_for(topics, HashDetector(hold), start="earliest", on_missing_offsets="continue")
    with running(service) as raised:
        until(taken.is_set)
        recreate(topics, 2)
        topics.produce_events(100)
        going_on.set()
        until(lambda: len(scored(topics)) == 100 or bool(raised))
        time.sleep(0.5)
    assert raised == []
    assert scored(topics) == of(0, range(50)) + of(1, range(50))
    assert topics.committed() == {0: 50, 1: 50}


def test_a_topic_that_stays_gone_ends_the_service(topics: Topics) -> None:
    topics.produce_events(20)
    with running(service_for(topics, start="earliest", on_missing_offsets="continue")) as raised:
        topics.wait_until_read(20)
        admin = AdminClient({"bootstrap.servers": topics.bootstrap})
        admin.delete_topics([topics.events])[topics.events].result(20)
        until(lambda: bool(raised), 60)
    assert isinstance(raised[0], StreamError)
    assert topics.events in str(raised[0])
    assert len(topics.read("scores")) == 20
