"""The contract of timers, run over both implementations: who falls silent is found by event time, once, and again until
it is committed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from state.errors import StateLostError
from state.memory.timers import MemoryTimers
from state.redis.timers import RedisTimers
from state.timers import AFTER, Activity, ClockAdvance, Inactivity, Span, TimerStore

A, B = ("events", 0), ("events", 1)
QUIET = 60_000
Make = Callable[..., TimerStore]
Row = tuple[str, int]
"""(entity, seconds)"""


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Builds stores; those of one test share what they remember, as the processes of a tenant do."""
    opened: list[RedisTimers] = []
    tenant = uuid.uuid4().hex
    memory = MemoryTimers(max_open=50, max_events=30)

    def build() -> TimerStore:
        if request.param == "memory":
            return memory
        url = request.getfixturevalue("redis_url")
        opened.append(RedisTimers(url, space="abc", tenant=tenant, idle_ms=0, max_open=50, max_events=30))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


def steps(rows: Sequence[Row], first: int = 0, source: Any = A, **more: Any) -> list[Activity | ClockAdvance]:
    """Each row an event, at offsets from `first` on."""
    found: list[Activity | ClockAdvance] = []
    clock = -1
    for offset, (entity, seconds) in enumerate(rows, first):
        clock = max(clock, seconds * 1000)
        found.append(ClockAdvance(source, offset, 0, clock))
        if entity:
            given = {"p_value": 1 / (offset + 2), "event": b"%d" % offset} | more
            found.append(Activity(entity, source, offset, 0, seconds * 1000, QUIET, **given))
    return found


def advance(store: TimerStore, rows: Sequence[Row], first: int = 0, source: Any = A, **more: Any) -> list[Inactivity]:
    return store.advance(steps(rows, first, source, **more), {source: Span(first, first + len(rows) - 1)})


def told(inactive: Sequence[Inactivity]) -> list[tuple[str, int, int]]:
    """(entity, offset of its last event, offset at which its silence was clear)"""
    return [(silence.last.entity, silence.last.offset, silence.offset) for silence in inactive]


def test_silence_is_told_at_the_first_event_after_it_was_due_and_once(make: Make) -> None:
    store = make()
    rows = [("run:1", 0), ("run:2", 10), ("run:1", 20), ("", 70), ("", 71), ("", 80), ("", 81), ("", 500)]
    found = advance(store, rows)
    assert told(found) == [("run:2", 1, 4), ("run:1", 2, 6)]
    assert [(s.last.event, s.last.p_value, s.last.complete) for s in found] == [
        (b"1", 1 / 3, True),
        (b"2", 1 / 4, True),
    ]
    assert advance(store, [("", 1000)], 8) == []


def test_who_comes_back_too_late_was_silent_and_is_waited_for_again(make: Make) -> None:
    found = advance(make(), [("run:1", 0), ("run:1", 61), ("run:1", 100), ("", 300)])
    assert told(found) == [("run:1", 0, 1), ("run:1", 2, 3)]


def test_what_comes_late_takes_over_nothing_and_gives_time(make: Make) -> None:
    """An event from before the last one: the silence stays where it is, judged by the window as it is now."""
    store = make()
    assert advance(store, [("run:1", 100), ("", 130)]) == []
    assert advance(store, [("run:1", 40)], 2, newest=False, p_value=0.5, complete=False) == []
    assert advance(store, [("", 170), ("", 185)], 3) == []
    (silence,) = advance(store, [("", 191)], 5)
    assert told([silence]) == [("run:1", 0, 5)]
    assert (silence.last.time, silence.last.p_value, silence.last.complete) == (100_000, 0.5, False)
    assert silence.last.event == b"0"
    assert advance(store, [("run:1", 50), ("", 900)], 6, newest=False) == [], "it was told already"


def test_a_backlog_that_arrives_late_is_not_a_silence_at_each_of_its_events(make: Make) -> None:
    store = make()
    advance(store, [("", 7200)])
    assert advance(store, [("run:1", 0), ("", 7210), ("run:1", 300), ("", 7220), ("run:1", 600), ("", 7250)], 1) == []
    assert told(advance(store, [("", 7281)], 7)) == [("run:1", 5, 7)]


def test_until_it_is_committed_it_is_told_again_to_whoever_asks_and_however_it_is_cut(make: Make) -> None:
    rows = [("run:1", 0), ("run:2", 1), ("", 61), ("run:3", 62), ("run:2", 63), ("", 122), ("", 123), ("", 124)]
    first = advance(make(), rows)
    assert told(first) == [("run:1", 0, 2), ("run:2", 1, 3), ("run:3", 3, 6), ("run:2", 4, 7)]
    again = make()
    assert advance(again, rows[:4]) + advance(again, rows[4:7], 4) + advance(again, rows[7:], 7) == first
    again.committed({A: 4})
    advance(again, [("", 125)], 8)
    assert advance(again, rows[2:7], 2) == [silence for silence in first if silence.offset == 6]


def test_an_entity_is_waited_for_where_it_was_last(make: Make) -> None:
    """Its last event lies in the other partition: there it is told, by the clock of that one."""
    store = make()
    advance(store, [("run:1", 0)])
    advance(store, [("run:1", 5)], 0, B)
    assert advance(store, [("", 500)], 1) == []
    (silence,) = advance(store, [("", 66)], 1, B)
    assert (silence.last.source, silence.last.offset, silence.offset) == (B, 0, 1)
    advance(store, [("run:1", 600)], 2)
    advance(store, [("run:1", 610)], 2, B)
    assert advance(store, [("run:1", 605)], 3, newest=False) == []
    assert told(advance(store, [("", 900)], 3, B)) == [("run:1", 2, 3)]


def test_who_is_too_many_is_not_waited_for(make: Make) -> None:
    store = make()
    advance(store, [(f"run:{i}", i // 10) for i in range(60)])
    assert len(advance(store, [("", 900)], 60)) == 50


def test_of_many_only_so_many_are_kept_with_their_events(make: Make) -> None:
    store = make()
    advance(store, [(f"run:{i}", 0) for i in range(40)])
    advance(store, [(f"run:{i}", 1) for i in range(0, 40, 2)], 40)
    silent = advance(store, [("", 900)], 60)
    assert {silence.last.entity for silence in silent} == {f"run:{i}" for i in range(40)}
    assert {silence.last.entity for silence in silent if silence.last.event} == {f"run:{i}" for i in range(1, 30, 2)}


@st.composite
def streams(draw: st.DrawFn) -> list[Row]:
    count, now = draw(st.integers(1, 40)), 0
    rows = []
    for _ in range(count):
        now += draw(st.sampled_from([0, 1, 5, 30, 61]))
        late = draw(st.sampled_from([0, 0, 0, 20, 90]))
        rows.append((draw(st.sampled_from(["", "run:1", "run:2", "run:3"])), max(now - late, 0)))
    return rows


def model(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """The rules, word by word, for one partition."""
    clock, waiting, found = -1, dict[str, list[int]](), []
    for offset, (entity, seconds) in enumerate(rows):
        if seconds > clock:
            clock = seconds
            fallen = [(last[:2], name) for name, last in waiting.items() if last[2] < clock]
            for last, name in sorted(fallen):
                found.append((name, last[1], offset))
                del waiting[name]
        if not entity:
            continue
        due, last = max(seconds, clock) + QUIET // 1000, waiting.get(entity)
        if last is not None and last[:2] > [seconds, offset]:
            last[2] = max(last[2], due)
        else:
            waiting[entity] = [seconds, offset, due]
    return found


@settings(max_examples=80, deadline=None)
@given(streams(), st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 3, 8])), max_size=12))
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_however_it_is_cut_and_delivered_again_the_same_is_told(
    kind: str, request: pytest.FixtureRequest, rows: list[Row], cuts: list[tuple[int, int]]
) -> None:
    store = stores(kind, request)
    at, committed, found = 0, 0, dict[tuple[str, int], int]()
    for size, back in [*cuts, (len(rows), 0)]:
        begin = max(at - back, committed)
        batch = rows[begin : begin + size] if size < len(rows) else rows[begin:]
        if not batch:
            continue
        for entity, last, clear in told(advance(store, batch, begin)):
            assert found.setdefault((entity, last), clear) == clear
        at = max(at, begin + len(batch))
        if back == 0:
            committed = at
            store.committed({A: committed})
    assert [(entity, last, clear) for (entity, last), clear in found.items()] == model(rows)
    assert AFTER < 1 << 24


def stores(kind: str, request: pytest.FixtureRequest) -> TimerStore:
    if kind == "memory":
        return MemoryTimers()
    return RedisTimers(request.getfixturevalue("redis_url"), space="abc", tenant=uuid.uuid4().hex, idle_ms=0)


@pytest.fixture
def connect(redis_url: str) -> Iterator[Callable[..., RedisTimers]]:
    opened: list[RedisTimers] = []

    def build(tenant: str, **options: Any) -> RedisTimers:
        opened.append(RedisTimers(redis_url, space="abc", tenant=tenant, **options))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


Connect = Callable[..., RedisTimers]


def test_a_partition_that_is_ahead_waits_for_those_that_are_not_idle(connect: Connect, unique: Any) -> None:
    """What an entity does next may lie in a partition that is still to be read."""
    tenant = unique("t")
    store = connect(tenant, idle_ms=60_000)
    store.prepare({A: 5, B: 7})
    assert advance(store, [("run:1", 0), ("run:2", 0), ("", 500)], 10) == []
    assert advance(store, [("run:1", 30)], 10, B) == []
    assert advance(store, [("", 600)], 13) == []
    assert advance(store, [("", 70)], 11, B) == [], "run:1 is given until 90"
    assert told(advance(store, [("", 601)], 14)) == [("run:2", 11, 14)]
    assert told(advance(store, [("", 95)], 12, B)) == [("run:1", 10, 12)]


def test_a_partition_that_brings_nothing_is_not_waited_for_long(connect: Connect, unique: Any) -> None:
    store = connect(unique("t"), idle_ms=300)
    store.prepare({A: 5, B: 7})
    assert advance(store, [("run:1", 0), ("", 500)], 10) == []
    time.sleep(0.4)
    assert told(advance(store, [("", 501)], 12)) == [("run:1", 10, 12)]


def test_timers_that_were_lost_are_noticed_and_come_back(connect: Connect, unique: Any, redis_url: str) -> None:
    tenant = unique("t")
    store = connect(tenant, idle_ms=0)
    rows = [("run:1", 0), ("run:2", 1), ("run:1", 40), ("", 62)]
    assert told(advance(store, rows)) == [("run:2", 1, 3)]
    store.prepare({A: 4})
    store.committed({A: 4})
    with redis.Redis.from_url(redis_url) as server:
        server.delete(*server.keys(f"{{{tenant}}}:timers*"))
    for ask in (lambda: advance(store, [("", 101)], 4), lambda: store.prepare({A: 4})):
        with pytest.raises(StateLostError) as raised:
            ask()
        assert raised.value.resume == {A: None}
    with pytest.raises(StateLostError) as raised:
        connect(tenant, idle_ms=0).check_epoch({A: 4})
    store.begin_rebuild(raised.value)
    advance(store, rows)
    store.prepare({A: 4})
    assert told(advance(store, [("", 101)], 4)) == [("run:1", 2, 4)]
    connect(tenant, idle_ms=0).check_epoch({A: 5})


def test_a_process_takes_over_what_another_waited_for(connect: Connect, unique: Any) -> None:
    tenant = unique("t")
    first, second = connect(tenant, idle_ms=0), connect(tenant, idle_ms=0)
    advance(first, [("run:1", 0), ("run:2", 10)])
    first.prepare({A: 2})
    first.committed({A: 2})
    second.check_epoch({A: 2})
    found = advance(second, [("", 61)], 2)
    assert told(found) == [("run:1", 0, 2)]
    assert advance(first, [("", 61), ("", 71)], 2)[:1] == found, "not committed: whoever has it next tells it"
    (silence,) = advance(second, [("", 71)], 3)
    assert (silence.last.entity, silence.last.event, silence.last.p_value) == ("run:2", b"1", 1 / 3)


def test_those_last_heard_in_a_topic_that_was_created_again_are_waited_for_by_the_new_one(make: Make) -> None:
    store = make()
    store.identify({A: 7})
    advance(store, [("run:1", 0), ("run:2", 10)])
    store.prepare({A: 2})
    store.committed({A: 2})
    after = make()
    after.identify({A: 8})
    after.check_epoch({})
    rows = [("run:2", 40), ("", 70), ("", 101)]
    found = advance(after, rows)
    assert told(found) == [("run:1", 0, 1), ("run:2", 0, 2)]
    assert told(advance(after, rows)) == told(found), "until it is committed it is given again"
    after.identify({A: 8})
    assert told(advance(after, rows)) == told(found)
    after.committed({A: 3})
    after.prepare({A: 3})
    assert advance(after, [("", 300)], 3) == []
