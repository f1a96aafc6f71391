"""A change of what stands in Redis: releases of two formats on one server, one after the other and side by side.

The release to come is this one with another number in `state.redis.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import orjson
import pytest
import redis
from loop_harness import EVENT, create, running, until
from test_episodes import anomaly, decide, noticed_at
from test_redis_windows import ROWS, assert_tail
from test_timers import A, advance, told
from test_window_rebuild import USERS, service_for, valkey, windows_of
from test_windows import AGE, DIM, SOURCES, WIDTH, entries

from state.episodes import CREATE, UPDATE
from state.errors import StateLostError, StoreRefusedError
from state.redis import formats
from state.redis.episodes import RedisEpisodes
from state.redis.timers import RedisTimers
from state.redis.windows import RedisWindows
from streamer.devtools.servers import ValkeyServer
from streamer.service.loop import Service

__all__ = ["valkey"]  # a fixture

FIRST, SECOND = SOURCES[:2]
Open = Callable[..., Any]


@contextmanager
def next_release() -> Iterator[None]:
    """What is opened within has the next format of everything."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WINDOWS", "TIMERS", "EPISODES"):
            patch.setattr(formats, name, getattr(formats, name) + 1)
        yield


@pytest.fixture
def tenant(unique: Callable[[str], str]) -> str:
    return unique("t")


@pytest.fixture
def connect(redis_url: str, tenant: str) -> Iterator[Open]:
    opened: list[Any] = []

    def build(kind: type, **options: Any) -> Any:
        opened.append(kind(redis_url, tenant=tenant, **options))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


WINDOWS: dict[str, Any] = {"encoder": "abc", "dim": DIM, "width": WIDTH, "age_ms": AGE}


def of(source: int, start: int, end: int) -> Any:
    """The rows of a source with offsets from `start` to before `end`."""
    return entries([row for row in ROWS[start:end] if row[2] == source])


def test_windows_of_two_formats_never_mix_and_say_what_they_lack_while_both_are_written(connect: Open) -> None:
    old = connect(RedisWindows, **WINDOWS)
    old.check_epoch({})
    old.append(entries(ROWS[:20]))
    old.prepare({FIRST: 20, SECOND: 20})
    with next_release():
        new = connect(RedisWindows, **WINDOWS)

    with pytest.raises(StateLostError) as lost:
        new.check_epoch({SECOND: 20})
    assert lost.value.wiped
    new.begin_rebuild(lost.value, [FIRST])
    new.append(of(1, 0, 20))
    new.finish_rebuild([SECOND])
    assert not new.append(of(1, 20, 30)).complete.any(), "it has nothing of the other partition yet"
    assert not old.append(of(0, 20, 30)).complete.any(), "it gets nothing of this partition any more"
    new.prepare({SECOND: 30})
    old.prepare({FIRST: 30})

    with pytest.raises(StateLostError) as lost:
        new.check_epoch({FIRST: 30, SECOND: 30})
    assert (lost.value.wiped, lost.value.resume) == (False, {FIRST: None})
    new.begin_rebuild(lost.value)
    new.append(of(0, 0, 30))
    new.finish_rebuild([FIRST])
    windows = new.append(entries(ROWS[30:]))
    assert windows.complete.all()
    assert_tail(windows, ROWS)
    new.prepare({FIRST: 40, SECOND: 40})

    back = connect(RedisWindows, **WINDOWS)  # and the release before may come back
    with pytest.raises(StateLostError) as lost:
        back.check_epoch({FIRST: 40, SECOND: 40})
    assert (lost.value.wiped, lost.value.resume) == (False, {FIRST: 30, SECOND: 20})
    back.begin_rebuild(lost.value)
    back.append(of(1, 20, 40))
    back.append(of(0, 30, 40))
    back.finish_rebuild([FIRST, SECOND])
    names = [f"user:{number}" for number in range(3)]
    assert back.latest(names).complete.all()
    assert back.latest(names).offset.tolist() == new.latest(names).offset.tolist()


def test_a_value_of_another_format_under_a_key_of_this_one_is_a_loss(
    connect: Open, redis_url: str, tenant: str
) -> None:
    store = connect(RedisWindows, **WINDOWS)
    store.check_epoch({})
    store.append(entries(ROWS[:20]))
    with redis.Redis.from_url(redis_url) as client:
        for key in client.keys(f"{{{tenant}:user:1}}*"):
            client.setrange(key, 0, bytes([formats.WINDOWS + 1]))
    for use in (lambda: store.append(entries(ROWS[20:])), lambda: store.latest(["user:1"])):
        with pytest.raises(StateLostError, match="another format") as lost:
            use()
        assert lost.value.wiped
    store.begin_rebuild(lost.value)
    store.append(entries(ROWS[:20]))
    store.finish_rebuild(lost.value.resume)
    windows = store.append(entries(ROWS[20:]))
    assert windows.complete.all()
    assert_tail(windows, ROWS)


def test_timers_of_another_format_are_missed_at_start_and_those_before_go_on(connect: Open) -> None:
    options = {"space": "abc", "idle_ms": 0}
    old = connect(RedisTimers, **options)
    rows = [("run:1", 0), ("run:2", 10), ("", 11)]
    advance(old, rows)
    old.prepare({A: 3})
    with next_release():
        new = connect(RedisTimers, **options)
    with pytest.raises(StateLostError) as lost:
        new.check_epoch({A: 3})
    assert lost.value.resume == {A: None}
    new.begin_rebuild(lost.value)
    advance(new, rows)
    new.check_epoch({A: 3})
    for store in (new, old):
        assert told(advance(store, [("", 61), ("", 71)], 3)) == [("run:1", 0, 3), ("run:2", 1, 4)]


def test_episodes_are_copied_from_the_format_before_which_goes_on_with_its_own(connect: Open) -> None:
    old = connect(RedisEpisodes)
    assert noticed_at(decide(old, anomaly(0), anomaly(1))) == [(CREATE, 0), (UPDATE, 1)]
    with next_release():
        new, other = connect(RedisEpisodes), connect(RedisEpisodes)
    (again, update) = decide(new, *(anomaly(i) for i in range(1, 10)))
    assert noticed_at([again, update]) == [(UPDATE, 1), (UPDATE, 9)], "what was decided is decided, and counts go on"
    assert update.episode.first == "events:0:0:0"
    assert update.episode.count == 10
    (update,) = decide(other, *(anomaly(i) for i in range(10, 100)))
    assert update.episode.count == 100
    assert noticed_at(decide(old, *(anomaly(i) for i in range(2, 10)))) == [(UPDATE, 9)]
    with next_release(), next_release():
        latest = connect(RedisEpisodes)
    (update,) = decide(latest, *(anomaly(i) for i in range(100, 1000)))
    assert update.episode.count == 1000, "of two formats before it is the newer"


def test_a_field_that_a_later_release_adds_to_episodes_is_left_out(connect: Open, redis_url: str, tenant: str) -> None:
    decide(connect(RedisEpisodes), anomaly(0))
    key = f"{{{tenant}}}:episodes:stream"
    with redis.Redis.from_url(redis_url) as client:
        for name, value in client.hgetall(key).items():
            if name != b"v":
                client.hset(key, name, orjson.dumps(with_more(orjson.loads(value))))
    assert noticed_at(decide(connect(RedisEpisodes), anomaly(1))) == [(UPDATE, 1)]


def test_no_value_of_an_event_is_stored_with_its_episode_and_those_of_release_0_1_0_are_still_known(
    connect: Open, redis_url: str, tenant: str
) -> None:
    decide(connect(RedisEpisodes), anomaly(0, what="hunter2"))
    key, name = f"{{{tenant}}}:episodes:stream", "e|events:0:0:0"
    with redis.Redis.from_url(redis_url) as client:
        stored = orjson.loads(client.hget(key, name))
        assert "hunter2" not in str(stored)
        client.hset(key, name, orjson.dumps(stored | {"what": "hunter2"}))
    (update,) = decide(connect(RedisEpisodes), anomaly(1, entity="user:eve", what="hunter2"))
    assert (update.activity, update.episode.entities) == (UPDATE, 2), "the same value elsewhere is the same episode"
    with redis.Redis.from_url(redis_url) as client:
        assert b"hunter2" not in b"".join(client.hvals(key))
    assert noticed_at(decide(connect(RedisEpisodes), anomaly(2, entity="user:kim", what="other"))) == [(CREATE, 2)]


def with_more(value: Any) -> Any:
    """The value with a further field in each object."""
    if isinstance(value, list):
        return [with_more(item) for item in value]
    return {name: with_more(held) for name, held in value.items()} | {"more": 1} if isinstance(value, dict) else value


@pytest.mark.parametrize("value", [b"[1]", b"\xff", b'{"episode": 1}'])
@pytest.mark.parametrize("name", ["e|events:0:0:0", "a|0|events", "d|0|events"])
def test_episodes_that_cannot_be_read_are_an_error_that_says_what_to_do(
    connect: Open, redis_url: str, tenant: str, name: str, value: bytes
) -> None:
    decide(connect(RedisEpisodes), anomaly(0))
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"{{{tenant}}}:episodes:stream", name, value)
    with pytest.raises(StoreRefusedError, match=rf"`DEL \{{{tenant}\}}:episodes:stream` forgets them"):
        decide(connect(RedisEpisodes), anomaly(1))


def test_a_rolling_upgrade_to_another_format_loses_and_doubles_nothing(
    kafka: str, unique: Callable[[str], str], valkey: ValkeyServer
) -> None:
    """Two workers are replaced one after the other. While both formats are written no window counts as complete, and
    afterwards those of the new one hold every event."""
    topics = create(kafka, unique("rolling"), partitions=2)

    def worker(name: str) -> Service:
        return service_for(topics, valkey, **{"kafka.instance_id": name})

    def serve(service: Service) -> ExitStack:
        stack = ExitStack()
        raised.append(stack.enter_context(running(service)))
        return stack

    def shared(*services: Service) -> bool:
        return all(len(service._source.owned()) == 1 and service._rebuild is None for service in services)

    raised: list[list[BaseException]] = []
    old = worker("a"), worker("b")
    old_a, old_b = serve(old[0]), serve(old[1])
    until(lambda: shared(*old), 60)
    topics.produce_events(400)
    topics.wait_until_read(400)
    with next_release():
        new = worker("a"), worker("b")
    old_a.close()
    new_a = serve(new[0])
    until(lambda: shared(new[0], old[1]) and new[0].metrics.losses._value.get() == 1, 60)
    topics.produce_events_from(400, 200)
    topics.wait_until_read(600)
    old_b.close()
    new_b = serve(new[1])
    until(lambda: shared(*new) and new[1].metrics.losses._value.get() >= 1, 60)
    topics.produce_events_from(600, 200)
    topics.wait_until_read(800)
    new_b.close()
    new_a.close()

    assert raised == [[], [], [], []]
    scores = [orjson.loads(message.value()) for message in topics.read("scores")]
    assert len(scores) == len({(score["partition"], score["offset"]) for score in scores}) == 800
    complete = {score["partition"] + 2 * score["offset"]: score["complete"] for score in scores}
    assert [sum(complete[i] for i in span) for span in (range(400), range(400, 600), range(600, 800))] == [400, 0, 200]
    with next_release():
        store = windows_of(valkey)
    store.check_epoch({(topics.events, partition): 400 for partition in range(2)})
    found = store.latest(USERS)
    assert found.complete.all()
    newest = [sorted(n for n in range(800) if (EVENT["time"] + n) % 7 == user)[-32:] for user in range(7)]
    assert (found.times - EVENT["time"]).tolist() == newest
