"""What happens to windows when Redis hangs, fills up, is wiped, restarted, set back or shared: on real servers."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import redis
from test_windows import AGE, DIM, SOURCES, WIDTH, Row, assert_same, entries, members, model

from state.errors import StateError, StateLostError, StoreFullError, StoreRefusedError, StoreUnavailableError
from state.memory.windows import MemoryWindows
from state.redis.client import RedisServer
from state.redis.windows import RedisWindows
from state.windows import Windows
from streamer.devtools.servers import ValkeyServer

Open = Callable[..., RedisWindows]


@pytest.fixture
def connect() -> Iterator[Open]:
    opened: list[RedisWindows] = []

    def build(url: str, **options: object) -> RedisWindows:
        defaults = {"encoder": "abc", "dim": DIM, "width": WIDTH, "age_ms": AGE, "tenant": "t", "timeout_s": 2.0}
        opened.append(RedisWindows(url, **(defaults | options)))  # type: ignore[arg-type]
        return opened[-1]

    yield build
    for store in opened:
        store.close()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[ValkeyServer]:
    with ValkeyServer(getattr(request, "param", None)) as running:
        yield running


ROWS: list[Row] = [(f"user:{i % 3}", 10 * (i ^ 1), i % 2, i) for i in range(40)]


def undisturbed(rows: list[Row]) -> Windows:
    return MemoryWindows(dim=DIM, width=WIDTH, age_ms=AGE).append(entries(rows))


def assert_tail(windows: Windows, rows: list[Row]) -> None:
    """These are the windows that an undisturbed run gives the last of these rows."""
    straight = undisturbed(rows)
    skipped = len(rows) - len(windows)
    assert [members(windows, i) for i in range(len(windows))] == [
        members(straight, skipped + i) for i in range(len(windows))
    ]


def test_a_store_is_not_used_before_it_was_checked(server: ValkeyServer, connect: Open) -> None:
    with pytest.raises(StateError, match="check_epoch"):
        connect(server.url).append(entries(ROWS))


def test_consumers_of_an_entity_share_its_window(server: ValkeyServer, connect: Open) -> None:
    first, second = connect(server.url), connect(server.url)
    first.check_epoch({})
    second.check_epoch({})
    for i, row in enumerate(ROWS):
        windows = (first, second)[row[2]].append(entries([row]))
        assert members(windows, 0) == model(ROWS[: i + 1])[-1]


def test_a_crash_before_the_commit_changes_no_window(server: ValkeyServer, connect: Open) -> None:
    before = connect(server.url)
    before.check_epoch({})
    before.append(entries(ROWS[:10]))
    before.prepare({SOURCES[0]: 10, SOURCES[1]: 10})
    before.append(entries(ROWS[10:30]))
    after = connect(server.url)
    after.check_epoch({SOURCES[0]: 10, SOURCES[1]: 10})
    windows = after.append(entries(ROWS[10:]))
    assert windows.complete.all()
    assert_tail(windows, ROWS)


@pytest.mark.parametrize("server", [{"appendonly": "yes", "appendfsync": "always"}], indirect=True)
def test_a_restart_with_appendfsync_always_loses_nothing(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:25]))
    store.prepare({SOURCES[0]: 25, SOURCES[1]: 24})
    server.restart(kill=True)
    windows = store.append(entries(ROWS[20:]))
    assert windows.complete.all()
    assert_tail(windows, ROWS)
    connect(server.url).check_epoch({SOURCES[0]: 25, SOURCES[1]: 24})


def test_windows_are_the_same_over_a_restart_while_the_stream_waits(connect: Open) -> None:
    with ValkeyServer({"appendonly": "yes", "appendfsync": "always"}) as server:
        store = connect(server.url, retries=7)
        store.check_epoch({})
        store.append(entries(ROWS[:20]))
        server.kill()
        threading.Timer(0.4, server.start).start()
        assert_tail(store.append(entries(ROWS[20:])), ROWS)


@pytest.mark.parametrize("wipe", ["flush", "restart"])
def test_a_wipe_is_noticed_before_a_window_is_returned_and_windows_are_filled_again(
    server: ValkeyServer, connect: Open, wipe: str
) -> None:
    store, other = connect(server.url), connect(server.url)
    for consumer in (store, other):
        consumer.check_epoch({})
    store.append(entries(ROWS[:20]))
    if wipe == "flush":
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
    else:
        server.restart(kill=True)
    for use in (lambda: store.append(entries(ROWS[20:])), lambda: store.latest(["user:0"]), lambda: store.prepare({})):
        with pytest.raises(StateLostError) as lost:
            use()
        assert lost.value.wiped
    with pytest.raises(StateLostError):
        connect(server.url).check_epoch({SOURCES[0]: 20})
    store.begin_rebuild(lost.value)
    assert not store.append(entries(ROWS[:20])).complete.any()
    store.finish_rebuild(lost.value.resume)
    windows = store.append(entries(ROWS[20:]))
    assert windows.complete.all()
    assert_tail(windows, ROWS)
    with pytest.raises(StateLostError):
        other.append(entries([("user:0", 1, 2, 0)]))


def test_what_a_lagging_consumer_wrote_after_a_wipe_does_not_count(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:20]))
    with redis.Redis.from_url(server.url) as client:
        keys = client.keys("*user*")
        saved = {key: client.dump(key) for key in keys}
        client.flushall()
        with pytest.raises(StateLostError) as lost:
            store.append(entries(ROWS[20:]))
        store.begin_rebuild(lost.value)
        for key, value in saved.items():
            client.restore(key, 0, value)
    store.append(entries(ROWS[17:20]))
    store.finish_rebuild(lost.value.resume)
    assert_tail(store.append(entries(ROWS[20:])), ROWS[17:])


def between_check_and_push(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen when the next batch is about to be pushed."""
    execute = RedisServer.execute

    def interrupted(server: RedisServer, commands: Sequence[tuple[object, ...]]) -> list[object]:
        if len(commands) > 1:
            monkeypatch.setattr(RedisServer, "execute", execute)
            happens()
        return execute(server, commands)

    monkeypatch.setattr(RedisServer, "execute", interrupted)


def test_a_wipe_in_the_middle_of_a_batch_is_noticed(
    server: ValkeyServer, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:20]))
    with redis.Redis.from_url(server.url) as client:
        between_check_and_push(monkeypatch, client.flushall)
        with pytest.raises(StateLostError) as lost:
            store.append(entries(ROWS[20:30]))
    store.begin_rebuild(lost.value)
    store.append(entries(ROWS[:20]))
    store.finish_rebuild(lost.value.resume)
    assert_tail(store.append(entries(ROWS[20:])), ROWS)


def test_what_was_written_over_a_gap_does_not_keep_it_from_being_filled(
    server: ValkeyServer, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:10]))
    with redis.Redis.from_url(server.url) as client:
        saved = {key: client.dump(key) for key in client.keys("*")}
        store.append(entries(ROWS[10:20]))

        def go_back() -> None:
            for key, value in saved.items():
                client.restore(key, 0, value, replace=True)

        between_check_and_push(monkeypatch, go_back)
        with pytest.raises(StateLostError) as lost:
            store.append(entries(ROWS[20:23]))
    assert lost.value.resume == {SOURCES[0]: 9, SOURCES[1]: 10}
    store.begin_rebuild(lost.value)
    store.append(entries(ROWS[9:23]))
    store.finish_rebuild(lost.value.resume)
    assert_tail(store.append(entries(ROWS[23:])), ROWS)


def test_no_window_is_complete_before_every_consumer_has_filled_its_part(server: ValkeyServer, connect: Open) -> None:
    stores = [connect(server.url), connect(server.url)]
    halves = [[row for row in ROWS[:20] if row[2] == source] for source in (0, 1)]
    for store, half in zip(stores, halves, strict=True):
        store.check_epoch({})
        store.append(entries(half))
    third = connect(server.url)
    third.check_epoch({})
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    for i, store in enumerate(stores):
        with pytest.raises(StateLostError) as lost:
            store.prepare({})
        assert list(lost.value.resume) == [SOURCES[i]]
        store.begin_rebuild(lost.value, others=[SOURCES[1 - i]])
        store.append(entries(halves[i]))
    stores[0].finish_rebuild([SOURCES[0]])
    assert not stores[0].append(entries([("user:0", 400, 0, 40)])).complete.any()
    stores[1].finish_rebuild([SOURCES[1]])
    with pytest.raises(StateLostError) as lost:  # a third that noticed late waits for nobody
        third.prepare({})
    third.begin_rebuild(lost.value, others=SOURCES[:2])
    windows = stores[0].append(entries([("user:0", 410, 0, 41)]))
    assert windows.complete.all()
    assert members(windows, 0) == model([*ROWS[:20], ("user:0", 400, 0, 40), ("user:0", 410, 0, 41)])[-1]


@pytest.mark.parametrize("running", [True, False], ids=["while running", "at start"])
def test_an_old_snapshot_is_noticed_and_only_what_it_lacks_is_appended_again(
    server: ValkeyServer, connect: Open, running: bool
) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:10]))
    store.prepare({SOURCES[0]: 10, SOURCES[1]: 10})
    with redis.Redis.from_url(server.url) as client:
        client.save()
    snapshot = server.directory / "dump.rdb"
    shutil.copy(snapshot, server.directory / "old.rdb")
    store.append(entries(ROWS[10:30]))
    store.prepare({SOURCES[0]: 30, SOURCES[1]: 30})
    server.kill()
    shutil.copy(server.directory / "old.rdb", snapshot)
    server.start()
    if not running:
        store = connect(server.url)
    with pytest.raises(StateLostError) as lost:
        if running:
            store.append(entries(ROWS[30:]))
        else:
            store.check_epoch({SOURCES[0]: 30, SOURCES[1]: 30})
    assert not lost.value.wiped
    assert lost.value.resume == {SOURCES[0]: 10, SOURCES[1]: 10}
    store.begin_rebuild(lost.value)
    assert not store.append(entries(ROWS[10:30])).complete.any()
    store.finish_rebuild(lost.value.resume)
    windows = store.append(entries(ROWS[30:]))
    assert windows.complete.all()
    assert_tail(windows, ROWS)


def test_a_rebuild_cut_short_by_a_crash_goes_on_where_it_was(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url)
    with pytest.raises(StateLostError) as lost:
        store.check_epoch({SOURCES[0]: 30, SOURCES[1]: 30})
    store.begin_rebuild(lost.value)
    store.append(entries(ROWS[:12]))
    store = connect(server.url)
    with pytest.raises(StateLostError) as lost:
        store.check_epoch({SOURCES[0]: 30, SOURCES[1]: 30})
    assert lost.value.resume == {SOURCES[0]: 11, SOURCES[1]: 12}
    store.begin_rebuild(lost.value)
    store.append(entries(ROWS[11:30]))
    store.finish_rebuild(lost.value.resume)
    assert_tail(store.append(entries(ROWS[30:])), ROWS)


@pytest.mark.parametrize("server", [{"maxmemory": "12mb"}], indirect=True)
def test_a_full_server_pauses_and_then_goes_on_as_if_nothing_was(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:20]))
    with redis.Redis.from_url(server.url) as client:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            for i in range(20_000):
                client.set(f"filler{i}", "x" * 10_000)
        with pytest.raises(StoreFullError, match="is full"):
            store.append(entries(ROWS[20:]))
        client.delete(*client.keys("filler*"))
    assert_tail(store.append(entries(ROWS[20:])), ROWS)


@pytest.mark.parametrize("server", [{"maxmemory": "50mb", "maxmemory-policy": "volatile-lru"}], indirect=True)
def test_a_server_that_would_evict_windows_is_refused(server: ValkeyServer, connect: Open) -> None:
    with pytest.raises(StoreRefusedError, match="noeviction"):
        connect(server.url).check_epoch({})


def test_a_server_that_hangs_or_is_gone_is_unavailable_and_not_waited_for(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url, timeout_s=0.2, retries=1)
    store.check_epoch({})
    store.append(entries(ROWS[:20]))
    server.suspend()
    with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{server.port}"):  # It would hang until `resume`.
        store.append(entries(ROWS[20:]))
    server.resume()
    assert_tail(store.append(entries(ROWS[20:])), ROWS)
    server.kill()
    with pytest.raises(StoreUnavailableError):
        store.append(entries(ROWS[20:]))


def test_a_replica_that_refuses_writes_is_unavailable_until_it_is_promoted(server: ValkeyServer, connect: Open) -> None:
    with ValkeyServer() as standby, redis.Redis.from_url(standby.url) as replica:
        store = connect(server.url)
        store.check_epoch({})
        store.append(entries(ROWS[:20]))
        replica.replicaof("127.0.0.1", server.port)
        deadline = time.monotonic() + 20
        while replica.info("replication")["master_link_status"] != "up":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        after = connect(standby.url, retries=0)
        after.check_epoch({SOURCES[0]: 19, SOURCES[1]: 20})
        with pytest.raises(StoreUnavailableError):
            after.append(entries(ROWS[20:]))
        server.kill()
        replica.replicaof("NO", "ONE")
        assert_tail(after.append(entries(ROWS[20:])), ROWS)


def test_functions_that_a_server_does_not_know_are_loaded(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url)
    store.check_epoch({})
    store.append(entries(ROWS[:20]))
    with redis.Redis.from_url(server.url) as client:
        client.function_flush()
    assert_tail(store.append(entries(ROWS[20:])), ROWS)


@pytest.mark.parametrize("server", [{"requirepass": "sesame"}], indirect=True)
def test_users_and_permissions(server: ValkeyServer, connect: Open) -> None:
    with pytest.raises(StoreRefusedError):
        connect(server.url).check_epoch({})
    with redis.Redis(port=server.port, password="sesame") as admin:
        admin.acl_setuser("weak", enabled=True, passwords=["+pw"], keys=["*"], commands=["+fcall", "+hgetall"])
        rights = "fcall function|load hgetall hkeys hget hset hdel hexists del get set time"
        admin.acl_setuser(
            "windows", enabled=True, passwords=["+pw"], keys=["{t*"], commands=[f"+{right}" for right in rights.split()]
        )
    with pytest.raises(StoreRefusedError, match="refuses"):
        connect(f"redis://weak:pw@127.0.0.1:{server.port}/0").check_epoch({})
    store = connect(f"redis://windows:pw@127.0.0.1:{server.port}/0")
    store.check_epoch({})
    assert_tail(store.append(entries(ROWS)), ROWS)


def test_keys_expire_after_the_age_and_are_tagged_for_a_cluster(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url, ttl_ms=50_000)
    store.check_epoch({})
    store.append(entries(ROWS))
    with redis.Redis.from_url(server.url) as client:
        keys = sorted(client.keys("*user*"))
        assert [key.split(b"}")[0] for key in keys] == [b"{t:user:0", b"{t:user:1", b"{t:user:2"]
        assert all(40_000 < client.pttl(key) <= 50_000 for key in keys)
        assert [client.pttl(key) for key in client.keys("*marker*")] == [-1]


def test_windows_of_another_encoder_width_or_age_are_another_space(server: ValkeyServer, connect: Open) -> None:
    connect(server.url).check_epoch({})
    for other in ({"encoder": "def"}, {"width": 8}, {"age_ms": 5000}):
        with pytest.raises(StateLostError) as lost:
            connect(server.url, **other).check_epoch({SOURCES[0]: 5})
        assert lost.value.wiped


def test_displaced_entries_go_when_the_consumer_that_held_them_commits(server: ValkeyServer, connect: Open) -> None:
    slow, fast = connect(server.url), connect(server.url)
    slow.check_epoch({})
    fast.check_epoch({})
    slow.append(entries([("user:a", 0, 0, 0)]))
    with redis.Redis.from_url(server.url) as client:

        def kept(*offsets: int) -> int:
            for offset in offsets:
                fast.append(entries([("user:a", offset, 1, offset)]))
                fast.committed({SOURCES[1]: offset + 1})
            return int(client.strlen(client.keys("*user:a*")[0]))

        small = kept(*range(1, 8))
        assert kept(*range(8, 30)) > 2 * small
        assert members(slow.append(entries([("user:a", 0, 0, 0)])), 0) == [(0, SOURCES[0], 0)]
        slow.prepare({SOURCES[0]: 1})
        slow.committed({SOURCES[0]: 1})
        slow.prepare({SOURCES[0]: 1})
        assert kept(30, 31, 32) < small


def test_a_hot_entity_in_one_batch(server: ValkeyServer, connect: Open) -> None:
    rng = np.random.default_rng(0)
    rows = [("host:hot", int(time), i % 3, i) for i, time in enumerate(rng.integers(0, 3 * AGE, 1500))]
    store = connect(server.url, depth=7)
    store.check_epoch({})
    windows = store.append(entries(rows))
    straight = undisturbed(rows)
    assert_same(windows, straight)
    assert_same(store.append(entries(rows)), straight)


@pytest.mark.parametrize("server", [{"cluster-enabled": "yes"}], indirect=True)
def test_every_call_touches_one_key_as_a_cluster_demands(server: ValkeyServer, connect: Open) -> None:
    store = connect(server.url)
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 20
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=True):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        store.check_epoch({})
        assert_tail(store.append(entries(ROWS)), ROWS)
        slots = {client.execute_command("CLUSTER", "KEYSLOT", key) for key in client.keys("*user*")}
        assert len(slots) == 3
        client.execute_command("CLUSTER", "DELSLOTSRANGE", 0, 16383)
        with pytest.raises(StoreUnavailableError):
            connect(server.url, retries=0).check_epoch({})


def test_the_server_counts_as_this_process_does(server: ValkeyServer, connect: Open) -> None:
    """Events of two days out of order, some of them late by hours, in batches of all sizes: the same levels."""
    rng = np.random.default_rng(4)
    times = np.maximum(np.arange(1500) * 100_000 - rng.integers(0, 30, 1500) ** 3 * 4_000, 0)
    rows: list[Row] = [(f"user:{rng.integers(3)}", int(time), 0, i) for i, time in enumerate(times)]
    options = {"age_ms": 7 * 86_400_000, "width": 32}
    store, straight = connect(server.url, **options), MemoryWindows(dim=DIM, age_ms=options["age_ms"], width=32)
    store.check_epoch({})
    start = 0
    while start < len(rows):
        end = start + int(rng.integers(1, 40))
        batch = entries(rows[start:end])
        np.testing.assert_array_equal(store.append(batch).levels, straight.append(batch).levels)
        start = end


def test_another_process_and_a_rebuild_know_which_topic_a_source_is_of(server: ValkeyServer, connect: Open) -> None:
    first = connect(server.url)
    first.identify({SOURCES[0]: 7})
    first.check_epoch({})
    first.append(entries([("user:a", 10 * i, 0, i) for i in range(3)]))  # Never committed, and gone with its topic.
    second = connect(server.url)
    assert second.identified() == {SOURCES[0]: 7}
    second.identify({SOURCES[0]: 8})
    second.check_epoch({})
    found = second.append(entries([("user:a", 100 + i, 0, i) for i in range(50)]))
    third = connect(server.url)
    assert third.identified() == {SOURCES[0]: 8}
    third.identify({SOURCES[0]: 8})
    third.check_epoch({SOURCES[0]: 50})
    again = third.append(entries([("user:a", 100 + i, 0, i) for i in range(45, 50)]))
    np.testing.assert_array_equal(again.times, found.times[45:])
    third.committed({SOURCES[0]: 50})
    third.append(entries([("user:a", 200 + i, 0, 50 + i) for i in range(2)]))
    third.append(entries([("user:a", 210 + i, 0, 52 + i) for i in range(2)]))
    value = redis.from_url(server.url).get(third._key("user:a"))
    assert isinstance(value, bytes)
    kept, live = int.from_bytes(value[17:21], "little"), int.from_bytes(value[21:23], "little")
    assert kept - live <= 2 * WIDTH, "what was in flight in the topic that is gone holds nothing back"

    redis.from_url(server.url).flushall()
    with pytest.raises(StateLostError) as lost:
        third.append(entries([("user:a", 220, 0, 54)]))
    third.begin_rebuild(lost.value)
    third.append(entries([("user:a", 100 + i, 0, i) for i in range(54)]))
    third.prepare({SOURCES[0]: 54})
    third.finish_rebuild([SOURCES[0]])
    last = connect(server.url)
    last.identify({SOURCES[0]: 8})
    last.check_epoch({SOURCES[0]: 54})
    assert last.append(entries([("user:a", 300, 0, 54)])).complete.all()
