"""The contract of episodes, run over both implementations: one story is told once, decided once, updated and closed."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from state.episode_rules import EPISODE_MS, MASS_EVENT, MINUTE_MS, SAME_MS, TIMEOUT_MS, UPDATE_MS
from state.episodes import CLOSE, CREATE, UPDATE, Anomaly, Decision, End, EpisodeStore
from state.memory.episodes import MemoryEpisodes
from state.redis.client import RedisServer
from state.redis.episodes import RedisEpisodes
from streamer.devtools.servers import ValkeyServer

A, B = ("events", 0), ("events", 1)
PORT, FILE, ORDER = "record:dst_endpoint.port", "record:file.name", "sequence:order"
Make = Callable[..., EpisodeStore]
AT = 1_700_000_000_000


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Builds stores; those of one test share what they remember, as the processes of a tenant do."""
    opened: list[RedisEpisodes] = []
    tenant = uuid.uuid4().hex
    memory = MemoryEpisodes()

    def build() -> EpisodeStore:
        if request.param == "memory":
            return memory
        opened.append(RedisEpisodes(request.getfixturevalue("redis_url"), tenant=tenant))
        return opened[-1]

    yield build
    for store in opened:
        store.close()


def anomaly(offset: int, minutes: float = 0, entity: str = "user:bob", cause: str = PORT, **more: Any) -> Anomaly:
    given: dict[str, Any] = {"source": A, "index": 0, "severity": 50.0, "level": 3, "p_value": 1e-4, "shown": entity}
    given |= {"type_uid": 400101, "what": f"value {offset}", "named": (entity,)}
    return Anomaly(offset=offset, time=AT + int(minutes * MINUTE_MS), entity=entity, cause=cause, **given | more)


def decide(store: EpisodeStore, *anomalies: Anomaly, clock: float = 0, first: int | None = None) -> list[Decision]:
    """One batch of a source that holds these anomalies, with its event time at least `clock` minutes on."""
    source = anomalies[0].source if anomalies else A
    offsets = [a.offset for a in anomalies] or [first or 0]
    time = max([AT + int(clock * MINUTE_MS), *(a.time for a in anomalies)])
    start = offsets[0] if first is None else first
    return store.decide(anomalies, {source: End(start, offsets[-1], time)})


def noticed_at(decisions: Sequence[Decision]) -> list[tuple[int, int]]:
    return [(d.activity, d.offset) for d in decisions]


def test_a_thousand_identical_anomalies_are_one_alert_with_a_count(make: Make) -> None:
    store = make()
    found = [d for start in range(0, 1000, 50) for d in decide(store, *[anomaly(start + i) for i in range(50)])]
    assert noticed_at(found) == [(CREATE, 0), (UPDATE, 1), (UPDATE, 9), (UPDATE, 99), (UPDATE, 999)]
    assert [d.episode.count for d in found] == [1, 2, 10, 100, 1000]
    assert {d.episode.first for d in found} == {"events:0:0:0"}
    assert found[-1].episode.last == "events:0:999:0"
    assert store.open() == 1


def test_an_episode_that_goes_on_is_told_now_and_then_and_closed_after_quiet_by_event_time(make: Make) -> None:
    store = make()
    minutes = [0, 5, 20, 36, 40, 90, 91]
    found = [decision for i, at in enumerate(minutes) for decision in decide(store, anomaly(i, at))]
    assert noticed_at(found) == [(CREATE, 0), (UPDATE, 1), (UPDATE, 3), (UPDATE, 5)]
    quiet = 91 + TIMEOUT_MS / MINUTE_MS
    assert decide(store, clock=quiet, first=10) == []
    (closed,) = decide(store, clock=quiet + 1, first=11)
    assert (closed.activity, closed.offset, closed.episode.count) == (CLOSE, 11, 7)
    assert closed.episode.last_seen - closed.episode.first_seen == 91 * MINUTE_MS
    assert store.open() == 0
    assert decide(store, clock=quiet + 5, first=11) == [closed], "until it is committed it is given again"
    store.committed({A: 12})
    assert decide(store, clock=quiet + 5, first=12) == []
    assert noticed_at(decide(store, anomaly(13, quiet + 6))) == [(CREATE, 13)]


def test_after_quiet_the_next_is_a_new_alert_even_before_the_old_one_is_closed(make: Make) -> None:
    store = make()
    decide(store, anomaly(0))
    found = decide(store, anomaly(1, 61))
    assert noticed_at(found) == [(CREATE, 1), (CLOSE, 1)]
    assert [d.episode.first for d in found] == ["events:0:1:0", "events:0:0:0"]


def test_severity_may_rise_and_says_so_at_once_and_never_falls(make: Make) -> None:
    store = make()
    found = decide(
        store,
        *[anomaly(i) for i in range(5)],
        anomaly(5, severity=80.0, level=4, p_value=1e-7),
        anomaly(6),
    )
    assert noticed_at(found)[-1] == (UPDATE, 5)
    later = decide(store, *[anomaly(i) for i in range(7, 10)])[-1].episode
    assert (later.level, later.severity, later.p_value, later.count) == (4, 80.0, 1e-7, 10)


def test_another_cause_or_another_user_of_the_same_host_is_another_alert(make: Make) -> None:
    store = make()
    found = decide(
        store,
        anomaly(0, entity="user:bob", named=("user:bob", "host:fs01")),
        anomaly(1, entity="user:eve", named=("user:eve", "host:fs01")),
        anomaly(2, entity="user:bob", cause=FILE, named=("user:bob", "host:fs01")),
    )
    assert noticed_at(found) == [(CREATE, 0), (CREATE, 1), (CREATE, 2)]


def test_entities_that_share_events_are_one_story(make: Make) -> None:
    store = make()
    decide(store, anomaly(0, entity="user:bob", named=("user:bob", "host:pc-7", "process:x@pc-7")))
    found = decide(store, anomaly(1, entity="host:pc-7", named=("host:pc-7",)))
    assert noticed_at(found) == [(UPDATE, 1)]
    assert (found[0].episode.entity, found[0].episode.entities) == ("user:bob", 1)
    assert noticed_at(decide(store, anomaly(2, entity="process:y@pc-7", named=("process:y@pc-7", "user:bob")))) == []
    assert noticed_at(decide(store, anomaly(3, entity="host:pc-8", named=("host:pc-8",)))) == [(CREATE, 3)]


@pytest.mark.parametrize("causes", [(PORT, ORDER), (ORDER, PORT)])
def test_what_is_odd_by_itself_and_in_its_sequence_is_one_story(make: Make, causes: tuple[str, str]) -> None:
    store = make()
    named = ("user:bob", "host:pc-7")
    decide(store, anomaly(0, cause=causes[0], named=named))
    (told_again,) = decide(store, anomaly(1, 5, entity="host:pc-7", cause=causes[1], named=named))
    assert (told_again.activity, told_again.episode.causes) == (UPDATE, causes)
    later = decide(store, anomaly(2, 5, cause=FILE, named=named))
    assert noticed_at(later) == [(CREATE, 2)], "a second way in which events are odd is another story"


def test_a_rate_over_an_hour_and_over_a_day_are_one_story_and_another_count_is_another(make: Make) -> None:
    store = make()
    decide(store, anomaly(0, cause="rate:bytes.hour"))
    (more,) = decide(store, anomaly(1, 20, cause="rate:bytes.day"))
    assert (more.activity, more.episode.causes) == (UPDATE, ("rate:bytes.hour", "rate:bytes.day"))
    assert noticed_at(decide(store, anomaly(2, 20, cause="rate:failures.hour"))) == [(CREATE, 2)]


def test_a_sequence_long_after_is_a_story_of_its_own_and_so_is_what_comes_in_a_storm(make: Make) -> None:
    store = make()
    decide(store, anomaly(0))
    minutes = EPISODE_MS / MINUTE_MS
    assert noticed_at(decide(store, anomaly(1, minutes + 1, cause=ORDER))) == [(CREATE, 1)]
    decide(store, *[anomaly(i, entity="user:eve", cause=ORDER) for i in range(10, 30)])
    assert noticed_at(decide(store, anomaly(30, entity="user:eve"))) == [(CREATE, 30)]


def hosts(first: int, n: int, minutes: float = 0, **more: Any) -> list[Anomaly]:
    return [anomaly(first + i, minutes, f"host:h{first + i}", **more) for i in range(n)]


def test_half_of_all_hosts_at_once_are_one_alert_and_what_differs_is_not_hidden(make: Make) -> None:
    store = make()
    storm: dict[str, Any] = {"what": "update.exe", "cause": FILE}
    other_host = anomaly(250, entity="host:new", what="evil.exe", cause=FILE)
    other_cause = anomaly(251, entity="host:h4", what="update.exe")
    found = decide(store, *hosts(0, 250, **storm), other_host, other_cause)
    assert noticed_at(found) == [(CREATE, 0), (UPDATE, 1), (UPDATE, 9), (UPDATE, 99), (CREATE, 250), (CREATE, 251)]
    found = decide(store, *hosts(300, 750, **storm))
    assert noticed_at(found) == [(UPDATE, 1049)]
    last = found[0].episode
    assert (last.first, last.count, last.entities) == ("events:0:0:0", 1000, 1000)
    assert len(last.others) <= 32
    (evil,) = decide(store, anomaly(1100, entity="host:h3", what="evil.exe", cause=FILE))
    assert (evil.activity, evil.episode.first) == (UPDATE, "events:0:250:0")


def test_the_same_at_another_entity_much_later_is_another_alert(make: Make) -> None:
    store = make()
    minutes = SAME_MS / MINUTE_MS
    assert noticed_at(decide(store, *hosts(0, 1, what="x"))) == [(CREATE, 0)]
    assert noticed_at(decide(store, *hosts(1, 1, minutes + 1, what="x"))) == [(CREATE, 1)]


def test_a_crowd_with_values_of_its_own_becomes_one_alert_but_what_is_worse_stands_out(make: Make) -> None:
    store = make()
    found = decide(store, *hosts(0, 200))
    assert [d.offset for d in found if d.activity == CREATE] == list(range(MASS_EVENT))
    worse = decide(store, *hosts(200, 1, severity=95.0, level=5))
    assert noticed_at(worse) == [(CREATE, 200)]
    for minutes in range(10, 200, 10):
        on = decide(store, *hosts(1000 + minutes, 3, minutes))
        assert not [d for d in on if d.activity == CREATE], "as long as it goes on"


def test_events_that_name_nobody_are_gathered_by_what_was_odd(make: Make) -> None:
    store = make()
    nobody: dict[str, Any] = {"entity": "", "named": ()}
    found = decide(store, *[anomaly(i, what="7", **nobody) for i in range(20)], anomaly(20, what="8", **nobody))
    assert noticed_at(found) == [(CREATE, 0), (UPDATE, 1), (UPDATE, 9), (CREATE, 20)]
    assert {d.episode.entities for d in found} == {1}


def test_a_crash_before_the_commit_gives_the_same_decisions_again_and_counts_once(make: Make) -> None:
    before = make()
    rows = [anomaly(i, entity=f"user:{i % 3}", what=f"value of {i % 3}") for i in range(30)]
    first = decide(before, *rows)
    after = make()
    assert decide(after, *rows[:10]) + decide(after, *rows[10:]) == first
    after.committed({A: 30})
    assert decide(after, anomaly(30, entity="user:0"))[-1:] == []
    (again,) = decide(after, anomaly(31, UPDATE_MS / MINUTE_MS, entity="user:0"))
    assert again.episode.count == 12


def test_an_entity_that_fell_silent_is_told_where_that_was_clear_and_again_until_that_is_committed(make: Make) -> None:
    """Its last event is long committed when it is told; what a redelivery goes by is the event that made it clear."""
    store = make()
    decide(store, clock=1, first=4)
    store.committed({A: 5})
    bob = anomaly(2, 1, cause="sequence:silence", noticed_at=(40, 0, 1))
    eve = anomaly(2, 1, entity="user:eve", what="", cause="sequence:silence", noticed_at=(40, 0, 2))
    rows = [anomaly(40, 9, entity="user:kim"), bob, eve]
    found = store.decide(rows, {A: End(30, 50, AT + 9 * MINUTE_MS)})
    assert [(d.activity, d.place) for d in found] == [(CREATE, (40, 0, n)) for n in range(3)]
    assert [d.episode.first for d in found] == ["events:0:40:0", "events:0:2:0", "events:0:2:0"]
    assert make().decide(rows, {A: End(40, 40, AT + 9 * MINUTE_MS)}) == found, "another process, another batch"
    assert store.open() == 3
    store.committed({A: 51})
    assert decide(store, clock=9, first=51) == []


def test_what_is_read_again_from_before_the_commit_is_decided_again(make: Make) -> None:
    """An operator has set the group's offsets back: that is no redelivery."""
    store = make()
    (first,) = decide(store, anomaly(0))
    store.committed({A: 100})
    decide(store, clock=61, first=100)
    store.committed({A: 101})
    decide(store, clock=61, first=101)
    later = make()
    assert decide(later, anomaly(0))[0] == first


def test_a_batch_of_other_sources_closes_nothing_that_is_not_its_own(make: Make) -> None:
    store = make()
    decide(store, anomaly(0))
    far = anomaly(0, 500, entity="user:eve", source=B, cause=FILE)
    assert noticed_at(decide(store, far)) == [(CREATE, 0)]
    assert noticed_at(decide(store, clock=500, first=1)) == [(CLOSE, 1)]


def test_too_many_open_episodes_close_the_quietest(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.episode_rules.MAX_OPEN", 5)
    store = make()
    found = [d for i in range(8) for d in decide(store, anomaly(i, i, entity=f"user:{i}", cause=f"record:{i}"))]
    assert [d.episode.entity for d in found if d.activity == CLOSE] == ["user:0", "user:1", "user:2"]
    assert store.open() == 5


CAUSES = st.sampled_from([PORT, FILE, ORDER])
ENTITIES = st.sampled_from(["user:a", "user:b", "host:x", "host:y", ""])


@st.composite
def streams(draw: st.DrawFn) -> list[list[Anomaly]]:
    """Anomalies of two partitions, all within the time that an episode stays open."""
    partitions = []
    for source in (A, B):
        rows = []
        for offset in range(draw(st.integers(1, 16))):
            entity = draw(ENTITIES)
            level = draw(st.integers(1, 5))
            named = tuple({entity, *draw(st.lists(ENTITIES, max_size=2))} - {""})
            given = {"source": source, "cause": draw(CAUSES), "what": draw(st.sampled_from("xyz")), "level": level}
            rows.append(anomaly(offset, draw(st.integers(0, 55)), entity, named=named, severity=20.0 * level, **given))
        partitions.append(rows)
    return partitions


Step = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 6), st.sampled_from([0, 0, 2, 5]))


@settings(max_examples=60, deadline=None)
@given(streams(), st.lists(Step, max_size=14))
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_however_it_is_cut_shared_and_delivered_again_the_same_is_told(
    kind: str, request: pytest.FixtureRequest, partitions: list[list[Anomaly]], steps: list[tuple[int, int, int, int]]
) -> None:
    """Two partitions, three consumers that take turns, and batches that come again until they are committed."""
    stores: list[Any]
    if kind == "memory":
        stores = [MemoryEpisodes()] * 3
    else:
        url, tenant = request.getfixturevalue("redis_url"), uuid.uuid4().hex
        stores = [RedisEpisodes(url, tenant=tenant) for _ in range(3)]
    order: list[Anomaly] = []
    published: dict[tuple[Any, int], Decision] = {}
    at, committed = [0, 0], [0, 0]
    for source, consumer, size, back in [*steps, (0, 0, 99, 0), (1, 1, 99, 0)]:
        begin = max(at[source] - back, committed[source])
        rows = partitions[source][begin : begin + size]
        if not rows:
            continue
        found = decide(stores[consumer], *rows)
        order += rows[max(at[source] - begin, 0) :]
        for decision in found:
            key = decision.source, decision.offset
            assert published.setdefault(key, decision) == decision
        at[source] = max(at[source], begin + len(rows))
        if back == 0:
            committed[source] = at[source]
            for store in stores:
                store.committed({(A, B)[source]: committed[source]})
    straight = MemoryEpisodes()
    expected = [decision for row in order for decision in decide(straight, row)]
    assert list(published.values()) == expected or sorted(map(repr, published.values())) == sorted(map(repr, expected))
    assert sum(d.activity == CREATE for d in expected) <= len(order)
    if kind == "redis":
        for store in stores:
            store.close()


def test_processes_in_a_storm_at_once_count_every_event_once(redis_url: str) -> None:
    """Eight partitions, a process each, all about the same: whoever is slower decides again on what the others left."""
    tenant, errors = uuid.uuid4().hex, []

    def work(partition: int) -> None:
        store = RedisEpisodes(redis_url, tenant=tenant)
        try:
            for start in range(0, 200, 20):
                decide(store, *[anomaly(start + i, source=("events", partition)) for i in range(20)])
        except Exception as error:
            errors.append(error)
        store.close()

    threads = [threading.Thread(target=work, args=(partition,)) for partition in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    store = RedisEpisodes(redis_url, tenant=tenant)
    (last,) = decide(store, anomaly(1000, UPDATE_MS / MINUTE_MS, source=("events", 9)))
    assert (last.activity, last.episode.count) == (UPDATE, 8 * 200 + 1)
    store.close()


def test_a_store_that_was_wiped_begins_anew_and_one_that_went_away_is_found_again(redis_url: str) -> None:
    with ValkeyServer({"appendonly": "yes"}) as server:
        store = RedisEpisodes(server.url, timeout_s=1.0)
        decide(store, anomaly(0))
        server.stop()
        server.start()
        assert noticed_at(decide(store, anomaly(1), anomaly(2))) == [(UPDATE, 1)]
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
        assert noticed_at(decide(store, anomaly(3))) == [(CREATE, 3)]
        assert replace(decide(store, anomaly(4))[0].episode, last="").first == "events:0:3:0"
        store.close()


def test_an_answer_that_got_lost_is_asked_for_again_and_nothing_is_counted_twice(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: the server has stored it and the connection breaks before it can say so."""
    store = RedisEpisodes(redis_url, tenant=uuid.uuid4().hex)
    decide(store, anomaly(0))
    call, lost = RedisServer.call, iter([True])

    def breaks(*arguments: Any) -> Any:
        reply = call(*arguments)
        if next(lost, False):
            raise redis.ConnectionError("the connection broke")
        return reply

    monkeypatch.setattr(RedisServer, "call", breaks)
    (update,) = decide(store, anomaly(1))
    assert (update.activity, update.episode.count) == (UPDATE, 2)
    store.close()


def test_events_of_a_topic_that_was_created_again_are_decided_anew(make: Make) -> None:
    store = make()
    store.identify({A: 7})
    assert noticed_at(decide(store, anomaly(5))) == [(CREATE, 5)]
    store.committed({A: 6})
    assert noticed_at(decide(store, anomaly(6, 1, entity="user:eve", cause=FILE))) == [(CREATE, 6)]  # Never committed.
    after = make()
    after.identify({A: 8})
    decisions = decide(after, anomaly(2, 2), anomaly(3, 2, entity="user:eve", cause=FILE), anomaly(4, 2, "user:joe"))
    assert noticed_at(decisions) == [(UPDATE, 2), (CREATE, 3), (CREATE, 4)]
    other = make()
    other.identify({A: 8})
    assert (
        decide(other, anomaly(2, 2), anomaly(3, 2, entity="user:eve", cause=FILE), anomaly(4, 2, "user:joe"))
        == decisions
    )
