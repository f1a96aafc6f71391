"""Windows that Redis lost are filled again from Kafka, and every score is that of an undisturbed run.

The detector of these tests scores an event by the window that ends at it, so a window that is not what it was shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import orjson
import pytest
import redis
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from loop_harness import EVENT, LINE, EachRow, Topics, WindowDetector, create, figure, partitions_of, running, until

from encoder.ocsf.events import Message
from state.memory.windows import MemoryWindows
from state.redis.windows import RedisWindows
from streamer.devtools.servers import ValkeyServer
from streamer.service.loop import Service

USERS = [f"user:{n}" for n in range(7)]


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("rebuild"), partitions=1)


@pytest.fixture
def valkey(request: pytest.FixtureRequest) -> Iterator[ValkeyServer]:
    with ValkeyServer(getattr(request, "param", {})) as server:
        yield server


def windows_of(server: ValkeyServer) -> RedisWindows:
    return RedisWindows(server.url, encoder="test", dim=4, timeout_s=0.5, retries=1)


def service_for(topics: Topics, server: ValkeyServer, *, delay: float = 0.01, **more: Any) -> Service:
    windows = windows_of(server)
    detector = WindowDetector(windows, lambda _: time.sleep(delay))
    return Service(topics.settings(**more), detector, EachRow(), threshold=LINE, windows=windows)


def undisturbed(topics: Topics, n: int) -> tuple[list[str], dict[str, float], MemoryWindows]:
    """Alerts, score by label and final windows of a run over `produce_events(n)` on one partition."""
    windows = MemoryWindows(dim=4)
    values = [orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(n)]
    scored = WindowDetector(windows).score([Message(topics.events, 0, i, -1, value) for i, value in enumerate(values)])
    scores = {scored.coordinates.label(row): float(scored.p_value[row]) for row in range(n)}
    return sorted(label for label, p in scores.items() if p <= LINE), scores, windows


def assert_undisturbed(topics: Topics, n: int, server: ValkeyServer) -> None:
    alerts, scores, memory = undisturbed(topics, n)
    found = [(m.key().decode(), orjson.loads(m.value())["p_value"]) for m in topics.read("scores")]
    assert len(found) == n
    assert dict(found) == scores
    assert topics.alerts() == alerts != []
    store = windows_of(server)
    store.check_epoch({(topics.events, 0): n})
    assert store.latest(USERS).offset.tolist() == memory.latest(USERS).offset.tolist()
    assert store.latest(USERS).complete.all()


def wipe(server: ValkeyServer) -> None:
    redis.from_url(server.url).flushall()


@pytest.mark.parametrize("loss", [wipe, lambda server: server.restart(kill=True)], ids=["flushed", "restarted empty"])
def test_windows_lost_under_load_are_noticed_and_filled_and_no_score_changes(
    topics: Topics, valkey: ValkeyServer, loss: Callable[[ValkeyServer], None]
) -> None:
    topics.produce_events(2000)
    service = service_for(topics, valkey)
    with running(service) as raised:
        topics.wait_until_read(500)
        loss(valkey)
        until(lambda: figure(service, "window_losses_total") >= 1)
        topics.wait_until_read(2000)
        until(lambda: service.not_ready() == "")  # It still rebuilds if all was read before the loss.
    assert raised == []
    assert figure(service, "window_losses_total") >= 1
    assert_undisturbed(topics, 2000, valkey)


@pytest.mark.extended
def test_windows_lost_while_the_stream_is_idle_are_noticed_and_filled(topics: Topics, valkey: ValkeyServer) -> None:
    topics.produce_events(300)
    service = service_for(topics, valkey)
    with running(service) as raised:
        topics.wait_until_read(300)
        wipe(valkey)
        until(lambda: figure(service, "window_losses_total") == 1)
        until(lambda: service.not_ready() == "")
        topics.produce_events_from(300, 400)
        topics.wait_until_read(700)
    assert raised == []
    assert_undisturbed(topics, 700, valkey)


@pytest.mark.extended
def test_windows_lost_while_nobody_ran_are_filled_at_start(topics: Topics, valkey: ValkeyServer) -> None:
    topics.produce_events(300)
    with running(service_for(topics, valkey)):
        topics.wait_until_read(300)
    wipe(valkey)
    topics.produce_events_from(300, 400)
    with running(service_for(topics, valkey)) as raised:
        topics.wait_until_read(700)
    assert raised == []
    assert_undisturbed(topics, 700, valkey)


@pytest.mark.extended
@pytest.mark.parametrize("valkey", [{"appendonly": "yes"}], indirect=True)
def test_a_redis_that_is_down_for_seconds_costs_time_and_nothing_else(topics: Topics, valkey: ValkeyServer) -> None:
    topics.produce_events(1500)
    service = service_for(topics, valkey)
    with running(service) as raised:
        topics.wait_until_read(300)
        valkey.stop()
        until(lambda: "waiting" in service.not_ready() or "failed to answer" in service.not_ready())
        time.sleep(3)
        assert service.not_alive() == ""
        valkey.start()
        topics.wait_until_read(1500)
        assert service.not_ready() == ""
    assert raised == []
    assert figure(service, "window_losses_total") == 0
    assert_undisturbed(topics, 1500, valkey)


@pytest.mark.extended
def test_a_redis_that_comes_back_from_an_older_snapshot_is_brought_up_to_date(
    topics: Topics, valkey: ValkeyServer
) -> None:
    topics.produce_events(400)
    service = service_for(topics, valkey)
    with running(service) as raised:
        topics.wait_until_read(400)
        redis.from_url(valkey.url).save()
        topics.produce_events_from(400, 400)
        topics.wait_until_read(800)
        valkey.restart(kill=True)
        until(lambda: figure(service, "window_losses_total") == 1)
        topics.produce_events_from(800, 400)
        topics.wait_until_read(1200)
    assert raised == []
    assert {m.offset for m in service.detector.remembered} <= set(range(300, 801))
    assert_undisturbed(topics, 1200, valkey)


@pytest.mark.extended
def test_windows_that_kafka_no_longer_reaches_back_to_say_so(topics: Topics, valkey: ValkeyServer) -> None:
    topics.produce_events(400)
    with running(service_for(topics, valkey)):
        topics.wait_until_read(400)
    wipe(valkey)
    admin = AdminClient({"bootstrap.servers": topics.bootstrap})
    for future in admin.delete_records([TopicPartition(topics.events, 0, 350)]).values():
        future.result(10)
    topics.produce_events_from(400, 20)
    with running(service_for(topics, valkey)) as raised:
        topics.wait_until_read(420)
    assert raised == []
    store = windows_of(valkey)
    store.check_epoch({(topics.events, 0): 420})
    found = store.latest(USERS)
    assert found.length.tolist() == [10] * 7
    assert not found.complete.any()
    scores = [orjson.loads(message.value()) for message in topics.read("scores")]
    assert {score["offset"] for score in scores if not score["complete"]} == set(range(400, 420))


@pytest.mark.extended
def test_two_workers_that_share_lost_windows_fill_each_their_own(
    kafka: str, unique: Callable[[str], str], valkey: ValkeyServer
) -> None:
    topics = create(kafka, unique("rebuild"), partitions=4)
    topics.produce_events(1200)
    first, second = (service_for(topics, valkey, **{"kafka.instance_id": name}) for name in ("a", "b"))
    with ExitStack() as stack:
        raised = [stack.enter_context(running(service)) for service in (first, second)]
        until(lambda: partitions_of(first) == partitions_of(second) == 2)
        topics.wait_until_read(1200)
        wipe(valkey)
        until(lambda: all(figure(service, "window_losses_total") for service in (first, second)))
        until(lambda: first.not_ready() == second.not_ready() == "")
        topics.produce_events_from(1200, 800)
        topics.wait_until_read(2000)
    assert raised == [[], []]
    keys = [message.key() for message in topics.read("scores")]
    assert len(keys) == len(set(keys)) == 2000
    store = windows_of(valkey)
    store.check_epoch({(topics.events, partition): 500 for partition in range(4)})
    found = store.latest(USERS)
    assert found.complete.all()
    newest = [sorted(n for n in range(2000) if (EVENT["time"] + n) % 7 == user)[-32:] for user in range(7)]
    assert (found.times - EVENT["time"]).tolist() == newest


def test_windows_are_filled_though_the_records_timestamps_are_in_seconds(
    kafka: str, unique: Callable[[str], str], valkey: ValkeyServer
) -> None:
    """A search by time finds nothing then: everything is read, where once nothing was, and windows counted as whole."""
    topics = create(kafka, unique("rebuild"), partitions=1, config={"retention.ms": "-1"})
    values = [orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(300)]
    topics.produce(values, timestamp=int(time.time()))
    with running(service_for(topics, valkey)):
        topics.wait_until_read(300)
    wipe(valkey)
    service = service_for(topics, valkey)
    with running(service) as raised:
        until(lambda: service.metrics.losses._value.get() == 1)
        until(lambda: service._rebuild is None)
        topics.produce([orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(300, 400)])
        topics.wait_until_read(400)
    assert raised == []
    assert_undisturbed(topics, 400, valkey)
