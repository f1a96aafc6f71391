"""The contract of entity windows, run over both implementations: idempotent, ordered by event time, bounded, honest."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.ocsf.activity_counts import ActivityCounts
from state.errors import StateLostError
from state.memory.windows import MemoryWindows
from state.redis.windows import RedisWindows
from state.rolling_counts import HOUR_MS, LEVELS, PARTNERS, count, level_of
from state.windows import REMEMBERED, WindowEntries, Windows, WindowStore, source_id

DIM, WIDTH, AGE = 4, 4, 1000
SOURCES = (("events", 0), ("events", 1), ("other", 0))
Make = Callable[..., WindowStore]
Row = tuple[str, int, int, int]
"""(entity, event time, source, offset)"""


def entries(rows: Sequence[Row]) -> WindowEntries:
    """Entries whose vectors tell them apart: the same coordinates and entity always have the same vector."""
    m = len(rows)
    vectors = np.array([[source + 1, offset, time % 4096, 1] for _, time, source, offset in rows], np.float16)
    return WindowEntries(
        entity=[row[0] for row in rows],
        time=np.array([row[1] for row in rows], np.int64),
        vectors=vectors.reshape(m, DIM),
        sources=SOURCES,
        source=np.array([row[2] for row in rows], np.int32),
        offset=np.array([row[3] for row in rows], np.int64),
        index=np.zeros(m, np.int32),
        activity_counts=acts_of(rows),
    )


def acts_of(rows: Sequence[Row]) -> ActivityCounts:
    """What the rows add to the counts: hosts nothing, every third offset a failure, two partners of forty, one or no
    partner, none, or the same twice."""
    offsets = np.array([offset for _, _, _, offset in rows], np.int64)
    partners = np.full((len(rows), PARTNERS), -1, np.int16)
    partners[:, 1] = 6 * offsets % 256
    partners[:, 3] = np.where(offsets % 5 == 4, -1, offsets % 7)
    counted = np.array([not entity.startswith("host:") for entity, *_ in rows], bool)
    return ActivityCounts(counted, offsets % 3 == 2, 1000 * offsets**4 * (offsets % 2), partners)


def members(windows: Windows, row: int) -> list[tuple[int, tuple[str, int], int]]:
    """(time, source, offset) of a window's members, oldest first; checks that vectors and unused slots agree."""
    used = windows.mask[row]
    assert not windows.vectors[row][~used].any()
    assert (windows.partners[row][~used] == -1).all()
    assert not windows.times[row][~used].any()
    assert (windows.source[row][~used] == -1).all()
    found = []
    for slot in np.flatnonzero(used):
        source = windows.sources[windows.source[row, slot]]
        time, offset = int(windows.times[row, slot]), int(windows.offset[row, slot])
        expected = np.array([SOURCES.index(source) + 1, offset, time % 4096, 1], np.float16)
        np.testing.assert_array_equal(windows.vectors[row, slot], expected)
        partners = acts_of([("", time, SOURCES.index(source), offset)]).partners[0]
        np.testing.assert_array_equal(windows.partners[row, slot], partners)
        found.append((time, source, offset))
    return found


def model(rows: Sequence[Row], width: int = WIDTH, age: int = AGE) -> list[list[tuple[int, tuple[str, int], int]]]:
    """What DESIGN.md says, word by word: the window at each row, all rows new."""
    seen: dict[str, list[tuple[int, int, int, tuple[str, int]]]] = {}
    result = []
    for entity, time, source, offset in rows:
        numbered = seen.setdefault(entity, [])
        numbered.append((time, source_id(SOURCES[source]), offset, SOURCES[source]))
        ordered = sorted(numbered)
        window = [entry for entry in ordered if entry[0] >= ordered[-1][0] - age][-width:]
        result.append([(entry[0], entry[3], entry[2]) for entry in window])
    return result


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes stores; in Redis, stores with the same `space` share their windows."""
    opened: list[RedisWindows] = []

    def build(space: str | None = None, *, check: bool = True, **options: int) -> WindowStore:
        store: WindowStore
        if request.param == "memory":
            store = MemoryWindows(**{"dim": DIM, "width": WIDTH, "age_ms": AGE, **options})
        else:
            url = request.getfixturevalue("redis_url")
            options = {"dim": DIM, "width": WIDTH, "age_ms": AGE, **options}
            opened.append(RedisWindows(url, encoder="abc", tenant=space or uuid.uuid4().hex, **options))
            store = opened[-1]
        if check:
            store.check_epoch({})
        return store

    yield build
    for store in opened:
        store.close()


def assert_same(first: Windows, second: Windows) -> None:
    np.testing.assert_array_equal(first.levels, second.levels)
    assert [members(first, i) for i in range(len(first))] == [members(second, i) for i in range(len(second))]
    np.testing.assert_array_equal(first.own, second.own)


def test_each_entry_gets_the_window_that_ends_at_it(make: Make) -> None:
    rows = [("user:a", 10 * i, 0, i) for i in range(7)] + [("host:b", 5, 0, 7)]
    windows = make().append(entries(rows))
    assert [members(windows, i) for i in range(8)] == model(rows)
    assert windows.vectors.shape == (8, WIDTH, DIM)
    assert windows.vectors.dtype == np.float16
    assert windows.length.tolist() == [1, 2, 3, 4, 4, 4, 4, 1]
    assert windows.own.tolist() == [WIDTH - 1] * 8
    assert windows.complete.all()


def test_how_the_stream_is_cut_into_batches_changes_no_window(make: Make) -> None:
    rows = [(f"user:{i % 3}", 7 * i % 50, i % 2, i) for i in range(40)]
    whole, store = make().append(entries(rows)), make()
    for i, row in enumerate(rows):
        windows = store.append(entries([row]))
        assert members(windows, 0) == members(whole, i)
        store.committed({SOURCES[row[2]]: row[3] + 1})


def test_an_entry_out_of_order_is_placed_by_its_time(make: Make) -> None:
    rows = [("user:a", time, 0, i) for i, time in enumerate([100, 300, 200])]
    windows = make().append(entries(rows))
    assert [time for time, _, _ in members(windows, 2)] == [100, 200, 300]
    assert windows.own.tolist() == [WIDTH - 1, WIDTH - 1, WIDTH - 2]


def test_an_entry_older_than_a_full_window_or_than_the_age_is_late(make: Make) -> None:
    full = [("user:a", 100 + i, 0, i) for i in range(WIDTH)]
    aged = [("user:b", 5000, 0, 5), ("user:b", 5000 - AGE - 1, 0, 6), ("user:b", 5000 - AGE, 0, 7)]
    rows = [*full, ("user:a", 99, 0, 4), *aged]
    store = make()
    windows = store.append(entries(rows))
    assert [members(windows, i) for i in range(len(rows))] == model(rows)
    assert windows.own.tolist() == [3, 3, 3, 3, -1, 3, -1, 2]
    assert_same(store.append(entries(rows)), windows)


def test_an_entry_is_the_newest_unless_another_is_newer(make: Make) -> None:
    stream = [(100, 0), (300, 1), (200, 0), (300, 0), (400, 0), (50, 1), (400, 1)]
    rows = [("user:a", time, source, i) for i, (time, source) in enumerate(stream)]
    windows = make().append(entries(rows))
    assert windows.newest.tolist() == [True, True, False, True, True, False, True]
    assert (windows.own[windows.newest] < WIDTH - 1).any()  # equal times are ordered by source


def test_a_jump_in_time_leaves_the_old_behind(make: Make) -> None:
    rows = [("user:a", 0, 0, 0), ("user:a", 10, 0, 1), ("user:a", AGE + 5, 0, 2), ("user:a", 9 * AGE, 0, 3)]
    windows = make().append(entries(rows))
    assert windows.length.tolist() == [1, 2, 2, 1]


def test_a_redelivered_event_gets_the_window_that_it_got_first(make: Make) -> None:
    store = make()
    rows = [("user:a", 10 * (i ^ 1), i % 3, i) for i in range(30)]
    first = store.append(entries(rows[:20]))
    store.committed(dict.fromkeys(SOURCES, 10))
    second = store.append(entries(rows[20:]))
    again = store.append(entries(rows[10:]))
    for i in range(20):
        assert members(again, i) == (members(first, 10 + i) if i < 10 else members(second, i - 10))
    assert again.complete.all()
    assert members(store.latest(["user:a"]), 0) == model(rows)[-1]


def test_members_keep_their_partners_also_where_nothing_is_counted(make: Make) -> None:
    """`members` compares those of every window of every test with what the entries had."""
    store = make()
    rows = [(name, 10 * (i ^ 1), 0, 3 * i + k) for i in range(6) for k, name in enumerate(("user:a", "host:b"))]
    windows = store.append(entries(rows))
    assert windows.partners.dtype == np.int16
    assert {int(p) for p in windows.partners[windows.mask][:, 3]} > {-1, 0}
    whole = [members(windows, i) for i in range(len(rows))]
    again = store.append(entries(rows))
    assert [members(again, i) for i in range(len(rows))] == whole
    bare = replace(entries([("user:c", 5, 0, 99)]), activity_counts=None)
    assert (store.append(bare).partners == -1).all()


def test_a_redelivery_that_can_no_longer_be_answered_says_so(make: Make) -> None:
    store = make()
    rows = [("user:a", i, 0, i) for i in range(12)]
    store.append(entries(rows[:10]))
    store.committed({SOURCES[0]: 10})
    store.append(entries(rows[10:]))
    again = store.append(entries(rows))
    assert not again.complete[:9].any()
    assert again.complete[10:].all()
    assert members(store.latest(["user:a"]), 0) == model(rows)[-1]


def test_what_is_kept_for_redelivery_is_bounded(make: Make) -> None:
    store = make(max_slack=8)
    rows = [("user:a", i, 0, i) for i in range(60)]
    for row in rows:
        store.append(entries([row]))
    again = store.append(entries(rows))
    assert not again.complete[:40].any()
    assert again.complete[-8:].all()


def test_members_of_one_message_are_told_apart(make: Make) -> None:
    store = make()
    rows = entries([("user:a", 5, 0, 3)] * 3)
    rows.index[:] = [0, 1, 2]
    windows = store.append(rows)
    assert windows.length.tolist() == [1, 2, 3]
    assert windows.index[2].tolist()[1:] == [0, 1, 2]
    assert store.append(rows).length.tolist() == [1, 2, 3]


def test_the_same_entity_twice_in_one_event_counts_once(make: Make) -> None:
    windows = make().append(entries([("user:a", 5, 0, 3), ("user:a", 5, 0, 3)]))
    assert windows.length.tolist() == [1, 1]


def test_latest_of_an_unknown_entity_is_empty(make: Make) -> None:
    store = make()
    store.append(entries([("user:a", 5, 0, 3)]))
    windows = store.latest(["user:nobody", "user:a"])
    assert windows.length.tolist() == [0, 1]
    assert windows.own.tolist() == [-1, WIDTH - 1]


def test_events_failures_partners_and_bytes_are_counted_over_an_hour_and_a_day(make: Make) -> None:
    day = 24 * HOUR_MS
    store = make(age_ms=7 * day, width=32)
    rows = [("user:a", HOUR_MS * i + 60_000, 0, i) for i in range(60)] + [("host:b", 60_000, 0, 60)]
    levels = store.append(entries(rows)).levels
    for column, (name, whole) in enumerate(zip(LEVELS, model_counts(rows), strict=True)):
        of = name.partition(".")[0]
        for row in np.flatnonzero(levels[:60, column]).tolist():
            low, high = count(levels[row, column]), count(levels[row, column] + 1)
            slack = 0.1 * whole[row] if of == "partners" else 0  # linear counting is an estimate
            assert low - slack <= whole[row] < high + slack + 1e-6, (name, row)
        assert levels[:60, column].any(), name
    activity_counts = acts_of(rows)
    assert not levels[:60, LEVELS.index("failures.day")][~activity_counts.failed[:60]].any()
    assert not levels[:60, LEVELS.index("bytes.day")][activity_counts.amount[:60] == 0].any()
    assert levels[:4, 1].tolist() == [6, 9, 12, 13]  # 1, 2, 3, 4 events
    assert not levels[60].any()  # hosts are not counted here
    np.testing.assert_array_equal(store.latest(["user:a"]).raised[0], levels[28:60])
    assert levels.dtype == np.uint8


def model_counts(rows: Sequence[Row]) -> list[np.ndarray]:
    """Of each row of user:a, the true counts in the order of LEVELS: of its hour and the one before, and of 24."""
    activity_counts = acts_of(rows)
    mine = [i for i, row in enumerate(rows) if row[0] == "user:a"]
    found: list[list[float]] = [[] for _ in LEVELS]
    for i in mine:
        for s, hours in enumerate((2, 24)):
            span = [k for k in mine if k <= i and rows[k][1] // HOUR_MS > rows[i][1] // HOUR_MS - hours]
            partners = {int(p) for k in span for p in activity_counts.partners[k] if p >= 0}
            values = (len(span), activity_counts.failed[span].sum(), len(partners), activity_counts.amount[span].sum())
            for c, value in enumerate(values):
                found[2 * c + s].append(float(value))
    return [np.array(values) for values in found]


def test_a_redelivered_event_raises_what_it_raised_first_and_is_counted_once(make: Make) -> None:
    store, straight = make(), make()
    rows = [("user:a", 10 * (i ^ 1), i % 3, i) for i in range(30)]
    whole = straight.append(entries(rows)).levels
    assert whole.any(axis=0).all()
    first = store.append(entries(rows[:20])).levels
    store.committed(dict.fromkeys(SOURCES, 10))
    again = store.append(entries(rows[10:])).levels
    np.testing.assert_array_equal(np.concatenate([first, again[10:]]), whole)
    np.testing.assert_array_equal(again[:10], first[10:])


def test_an_event_more_than_a_day_behind_raises_nothing(make: Make) -> None:
    store = make(age_ms=7 * 24 * HOUR_MS)
    rows = [("user:a", 30 * HOUR_MS, 0, 0), ("user:a", 6 * HOUR_MS, 0, 1), ("user:a", 7 * HOUR_MS, 0, 2)]
    levels = store.append(entries(rows)).levels
    assert levels[:, 1].tolist() == [6, 0, 9]
    assert levels[:, 0].tolist() == [6, 0, 0]  # nor the last hours, if it lies before them


def test_an_empty_batch_is_no_special_case(make: Make) -> None:
    store = make()
    assert len(store.append(entries([]))) == 0
    assert len(store.latest([])) == 0


@pytest.mark.parametrize("name", ["user:{x}", "user:", "cmd:a b\n\0c", "user:Ä" * 300, "user:\ud800"])
def test_any_string_names_an_entity(make: Make, name: str) -> None:
    store = make()
    rows = [(name, 5, 0, 3), (name + "x", 6, 0, 4)]
    assert store.append(entries(rows)).length.tolist() == [1, 1]
    assert store.latest([name]).length.tolist() == [1]


def test_values_that_no_store_could_keep_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="time of window entries"):
        make().append(entries([("user:a", -1, 0, 0)]))
    bad = entries([("user:a", 1, 0, 0)])
    with pytest.raises(ValueError, match="do not fit together"):
        make().append(replace(bad, vectors=bad.vectors[:, :2]))


def test_a_store_that_knows_less_than_kafka_has_committed_is_lost_and_can_be_filled_again(make: Make) -> None:
    rows = [("user:a", 10 * i, 0, i) for i in range(9)]
    store = make(check=False)
    with pytest.raises(StateLostError) as lost:
        store.check_epoch({SOURCES[0]: 8})
    assert lost.value.wiped
    assert lost.value.resume == {SOURCES[0]: None}
    store.begin_rebuild(lost.value)
    assert not store.append(entries(rows[2:8])).complete.any()
    store.finish_rebuild([SOURCES[0]])
    store.check_epoch({SOURCES[0]: 8})
    windows = store.append(entries(rows[8:]))
    assert members(windows, 0) == model(rows)[-1]
    assert windows.complete.all()


def test_after_a_rebuild_that_kafka_cut_short_windows_are_incomplete_until_full_or_old(make: Make) -> None:
    store = make(check=False)
    with pytest.raises(StateLostError) as lost:
        store.check_epoch({SOURCES[0]: 100})
    store.begin_rebuild(lost.value)
    store.finish_rebuild([SOURCES[0]], horizon_ms=2000)
    store.prepare({SOURCES[0]: 100})
    times = [2500, 2501, 2502, 2503, 2999, 3000]
    rows = [("user:a" if i < 4 else "user:b", time, 0, 100 + i) for i, time in enumerate(times)]
    assert store.append(entries(rows)).complete.tolist() == [False, False, False, True, False, True]


def test_progress_without_entities_is_not_mistaken_for_a_loss(make: Make) -> None:
    store = make()
    store.append(entries([("user:a", 1, 0, 0)]))
    store.prepare({SOURCES[0]: 50, SOURCES[1]: 7})
    store.check_epoch({SOURCES[0]: 50, SOURCES[1]: 7})


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[list[Row]], list[tuple[int, int, int]]]:
    """Events of three partitions, and steps (partition, batch size, events to go back first) that deliver them."""
    partitions: list[list[Row]] = []
    for source in range(3):
        times = draw(st.lists(st.integers(0, 2 * AGE), min_size=0, max_size=14))
        partitions.append([(f"user:{draw(st.integers(0, 1))}", t, source, 2 * i) for i, t in enumerate(times)])
    step = st.tuples(st.integers(0, 2), st.integers(1, 6), st.sampled_from([0, 0, 1, 3, 9]))
    return partitions, draw(st.lists(step, max_size=14))


@settings(max_examples=120, deadline=None)
@given(deliveries())
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_any_interleaving_and_redelivery_gives_the_same_windows(
    kind: str, request: pytest.FixtureRequest, plan: tuple[list[list[Row]], list[tuple[int, int, int]]]
) -> None:
    """Each partition is read in order by a consumer of its own, some batches again from the last commit on."""
    partitions, steps = plan
    consumers: list[WindowStore]
    if kind == "memory":
        consumers = [MemoryWindows(dim=DIM, width=WIDTH, age_ms=AGE)] * 3
    else:
        url, space = request.getfixturevalue("redis_url"), uuid.uuid4().hex
        consumers = [RedisWindows(url, encoder="abc", tenant=space, dim=DIM, width=WIDTH, age_ms=AGE) for _ in range(3)]
    for consumer in consumers:
        consumer.check_epoch({})
    first: dict[Row, list[tuple[int, tuple[str, int], int]]] = {}
    raised: dict[Row, list[int]] = {}
    order: list[Row] = []
    at, committed = [0, 0, 0], [0, 0, 0]
    for source, size, back in [*steps, *((source, 99, 0) for source in range(3))]:
        begin = max(at[source] - back, committed[source])
        rows = partitions[source][begin : begin + size]
        windows = consumers[source].append(entries(rows))
        assert windows.complete.all()
        for i, row in enumerate(rows):
            if row not in first:
                order.append(row)
                first[row] = members(windows, i)
                raised[row] = windows.levels[i].tolist()
            assert windows.levels[i].tolist() == raised[row]
            assert members(windows, i) == first[row]
        at[source] = max(at[source], begin + len(rows))
        if back % 2 == 0 and begin + len(rows) == at[source] > 0:
            committed[source] = at[source]
            consumers[source].committed({SOURCES[source]: 2 * at[source]})
    assert [first[row] for row in order] == model(order)
    once = MemoryWindows(dim=DIM, width=WIDTH, age_ms=AGE).append(entries(order))
    assert [raised[row] for row in order] == once.levels.tolist()
    straight = [row for partition in partitions for row in partition]
    for name in {row[0] for row in straight}:
        last = [window for row, window in zip(straight, model(straight), strict=True) if row[0] == name][-1]
        for consumer in consumers:
            assert members(consumer.latest([name]), 0) == last
    if kind == "redis":
        for consumer in consumers:
            consumer.close()  # type: ignore[attr-defined]


def printed(rows: Sequence[Row], prints: Sequence[int]) -> WindowEntries:
    """Entries with fingerprints."""
    return replace(entries(rows), fingerprint=np.array(prints, np.uint32))


def test_a_repeat_changes_no_window_and_raises_no_count(make: Make) -> None:
    store, straight = make(), make()
    rows = [("user:a", 10 * i, 0, i) for i in range(6)]
    once = straight.append(printed(rows[:5], [1, 2, 3, 4, 5]))
    store.append(printed(rows[:3], [1, 2, 3]))
    again = store.append(printed([("user:a", 10, 0, 40), ("user:a", 20, 1, 0)], [2, 3]))
    assert again.own.tolist() == [-1, -1]
    assert not again.levels.any()
    assert again.complete.all()
    assert [members(again, i) for i in range(2)] == [members(once, 2)] * 2
    later = store.append(printed([("user:a", 30, 0, 41), ("user:a", 40, 0, 42)], [4, 5]))
    np.testing.assert_array_equal(later.levels[:, 0], once.levels[3:, 0])
    np.testing.assert_array_equal(later.times, once.times[3:])
    np.testing.assert_array_equal(store.latest(["user:a"]).times, straight.latest(["user:a"]).times)


def test_a_repeat_that_is_redelivered_gets_the_window_that_it_got_first(make: Make) -> None:
    store = make()
    rows = [("user:a", 10 * (i // 2), 0, i) for i in range(20)]
    prints = [1 + i // 2 for i in range(20)]  # each twice
    first = [store.append(printed(rows[i : i + 4], prints[i : i + 4])) for i in range(0, 20, 4)]
    assert [own for windows in first for own in windows.own.tolist()] == [WIDTH - 1, -1] * 10
    again = store.append(printed(rows, prints))
    assert again.complete.all()
    np.testing.assert_array_equal(again.own, np.concatenate([windows.own for windows in first]))
    np.testing.assert_array_equal(again.levels, np.concatenate([windows.levels for windows in first]))
    assert [members(again, i) for i in range(20)] == [members(w, i) for w in first for i in range(4)]


def test_repeats_that_are_appended_again_to_fill_what_was_lost_are_repeats_still(make: Make) -> None:
    store = make(width=8)
    rows = [("user:a", 10 * (i // 2), 0, i) for i in range(20)]
    prints = [1 + i // 2 for i in range(20)]  # each twice
    store.append(printed(rows, prints))
    store.committed({SOURCES[0]: 20})
    store.append(printed([("user:a", 100, 0, 20)], [11]))  # what no redelivery needs is forgotten here
    before = store.latest(["user:a"])
    lost = StateLostError("set back", wiped=False, resume={SOURCES[0]: 0})
    store.begin_rebuild(lost)
    store.append(printed(rows, prints))
    store.finish_rebuild(lost.resume)
    after = store.latest(["user:a"])
    assert members(after, 0) == members(before, 0)
    np.testing.assert_array_equal(after.raised, before.raised)
    assert after.complete.all()


def test_equal_events_without_a_fingerprint_are_different_events(make: Make) -> None:
    windows = make().append(printed([("user:a", 5, 0, 0), ("user:a", 5, 0, 1), ("user:a", 5, 0, 2)], [0, 0, 0]))
    assert windows.length.tolist() == [1, 2, 3]
    assert windows.levels[:, 1].tolist() == [6, 9, 12]


def test_an_event_repeats_only_one_of_the_same_entity(make: Make) -> None:
    windows = make().append(printed([("user:a", 5, 0, 0), ("user:b", 5, 0, 1), ("user:a", 5, 0, 2)], [7, 7, 7]))
    assert windows.own.tolist() == [WIDTH - 1, WIDTH - 1, -1]


def test_as_many_fingerprints_are_kept_as_promised_and_no_more(make: Make) -> None:
    store, n = make(age_ms=7 * 24 * HOUR_MS), REMEMBERED + 1
    store.append(printed([("user:a", i, 0, i) for i in range(n)], range(1, n + 1)))
    store.committed({SOURCES[0]: n})
    late = store.append(printed([("user:a", 1, 0, n), ("user:a", 0, 0, n + 1)], [2, 1]))
    assert late.own.tolist() == [-1, -1]
    rows = [("user:a", n + i, 0, n + 2 + i) for i in range(20)]
    events = range(n + 2, n + 22)  # one of the two was counted: its fingerprint was forgotten
    expected = [level_of(k) if level_of(k) > level_of(k - 1) else 0 for k in events]
    assert store.append(printed(rows, range(500, 520))).levels[:, 1].tolist() == expected


def test_a_fingerprint_is_no_part_of_two_others(make: Make) -> None:
    rows = [("user:a", i, 0, i) for i in range(4)]
    windows = make().append(printed(rows, [0x11223344, 0x55667788, 0x77881122, 0x33445566]))
    assert windows.own.tolist() == [WIDTH - 1] * 4
    across = int.from_bytes((0x11223344).to_bytes(4, "little")[2:] + (0x55667788).to_bytes(4, "little")[:2], "little")
    store = make()
    store.append(printed(rows[:2], [0x11223344, 0x55667788]))
    assert store.append(printed(rows[2:3], [across])).own.tolist() == [WIDTH - 1]
    assert store.append(printed(rows[3:], [0x55667788])).own.tolist() == [-1]


def test_fingerprints_that_do_not_fit_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="fingerprints"):
        make().append(printed([("user:a", 1, 0, 0)], [1, 2]))


@st.composite
def repetitions(draw: st.DrawFn) -> tuple[list[tuple[str, int]], list[int], list[int], list[tuple[int, int]]]:
    """Events (entity, time); the order in which they and repeats of them are delivered; sizes of batches; and how far
    to go back, and whether to commit, after each."""
    events = draw(st.lists(st.tuples(st.sampled_from(["user:a", "user:b"]), st.integers(0, 2 * AGE)), max_size=16))
    order: list[int] = []
    for event in range(len(events)):
        order.append(event)
        order += [event - back for back in draw(st.lists(st.integers(0, 6), max_size=2)) if back <= event]
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    backs = draw(st.lists(st.tuples(st.sampled_from([0, 0, 1, 3, 9]), st.integers(0, 1)), min_size=1, max_size=8))
    return events, order, sizes, backs


@settings(max_examples=150, deadline=None)
@given(repetitions())
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_stream_with_repeats_gives_the_windows_and_counts_of_the_stream_without(
    kind: str,
    request: pytest.FixtureRequest,
    plan: tuple[list[tuple[str, int]], list[int], list[int], list[tuple[int, int]]],
) -> None:
    """Also where some of it is redelivered, and whatever is committed meanwhile."""
    events, order, sizes, backs = plan
    rows = [(events[event][0], events[event][1], 0, offset) for offset, event in enumerate(order)]
    # Each event counts and looks as its first delivery.
    like = [order.index(event) for event in order]
    whole = replace(
        entries([(entity, time, 0, like[offset]) for entity, time, _, offset in rows]),
        offset=np.arange(len(rows), dtype=np.int64),
        fingerprint=np.array([event + 1 for event in order], np.uint32),
    )
    news = [i for i in range(len(order)) if like[i] == i]
    expected = MemoryWindows(dim=DIM, width=WIDTH, age_ms=AGE).append(part_of(whole, news))
    store: WindowStore
    if kind == "memory":
        store = MemoryWindows(dim=DIM, width=WIDTH, age_ms=AGE)
    else:
        url = request.getfixturevalue("redis_url")
        store = RedisWindows(url, encoder="abc", tenant=uuid.uuid4().hex, dim=DIM, width=WIDTH, age_ms=AGE)
    store.check_epoch({})
    first: dict[int, tuple[object, ...]] = {}
    at = committed = step = 0
    while at < len(rows):
        back, commits = backs[step % len(backs)]
        begin = max(at - back, committed)
        end = begin + sizes[step % len(sizes)] + (at - begin)
        chosen = list(range(begin, min(end, len(rows))))
        windows = store.append(part_of(whole, chosen))
        assert windows.complete.all()
        for place, i in enumerate(chosen):
            names = ("vectors", "times", "offset", "length", "levels", "own", "partners")
            values = tuple(getattr(windows, name)[place].tolist() for name in names)
            assert first.setdefault(i, values) == values
            if like[i] == i:
                assert values == tuple(getattr(expected, name)[news.index(i)].tolist() for name in names)
            else:
                assert (int(windows.own[place]), int(windows.levels[place].max())) == (-1, 0)
        at, step = max(at, chosen[-1] + 1), step + 1
        if commits:
            committed = at
            store.committed({SOURCES[0]: at})
    if kind == "redis":
        store.close()  # type: ignore[attr-defined]


def part_of(whole: WindowEntries, rows: list[int]) -> WindowEntries:
    """Some of the entries, in order."""
    counts = whole.activity_counts
    assert isinstance(counts, ActivityCounts)
    assert whole.fingerprint is not None
    arrays = {name: getattr(whole, name)[rows] for name in ("time", "vectors", "source", "offset", "index")}
    chosen = counts.take(np.array(rows, np.intp))
    names = [whole.entity[i] for i in rows]
    return replace(whole, entity=names, activity_counts=chosen, fingerprint=whole.fingerprint[rows], **arrays)


def test_memory_is_bounded_and_says_what_it_forgot() -> None:
    store = MemoryWindows(dim=DIM, width=WIDTH, age_ms=AGE, max_entities=10)
    for i in range(300):
        row = (f"user:{i % 30}", 3 * i, 0, i)
        windows = store.append(entries([row]))
        store.committed({SOURCES[0]: i + 1})
        assert len(store) <= 10
        assert windows.complete.tolist() == [i <= 10]  # the first was forgotten after the eleventh
    assert store.append(entries([("user:0", 2 * AGE, 0, 300)])).complete.all()  # all forgotten is older than the age
    assert store.append(entries([("user:1", 9 * AGE, 0, 301)])).length.tolist() == [1]
    assert len(store) == 1


def test_events_of_a_topic_that_was_created_again_are_new_and_follow_those_of_the_one_before(make: Make) -> None:
    store = make()
    store.identify({SOURCES[0]: 7})
    rows = [("user:a", 10 * i, 0, i) for i in range(3)]
    store.append(entries(rows))
    store.prepare({SOURCES[0]: 3})
    store.committed({SOURCES[0]: 3})
    store.identify({SOURCES[0]: 7})
    store.append(entries(rows))
    assert store.latest(["user:a"]).length.tolist() == [3], "of the same topic they are delivered again"
    store.identify({SOURCES[0]: 8})
    assert store.identified() == {SOURCES[0]: 8}
    store.check_epoch({})
    later = [("user:a", 100 + 10 * i, 0, i) for i in range(2)]
    windows = store.append(entries(later))
    assert windows.length.tolist() == [4, 4]
    assert windows.times[1].tolist() == [10, 20, 100, 110]
    assert store.append(entries(later)).times.tolist() == windows.times.tolist()
    assert store.latest(["user:a"]).times.tolist() == [[10, 20, 100, 110]]
    store.prepare({SOURCES[0]: 2})
    store.check_epoch({SOURCES[0]: 2})
