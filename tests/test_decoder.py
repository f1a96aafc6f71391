"""The promises of the decoder: what can be read becomes an event, each repair is counted, and what cannot be read is
returned alone. None of it depends on how a stream was cut into messages and batches."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.ocsf.decoder import MAX_FIELDS, MAX_LIST, decode, event_times
from encoder.ocsf.event_time import NO_TIME, TimeBounds
from encoder.ocsf.events import EventBatch, Message, Reject

settings.register_profile("ripcurrent", deadline=None)  # a shared machine is slow at times
settings.load_profile("ripcurrent")

DATA = os.environ.get("RIPCURRENT_EVAL_DATA")
NOW = 1_750_000_000_000
EVENT: dict[str, Any] = {
    "class_uid": 3002,
    "type_uid": 300201,
    "activity_id": 1,
    "time": NOW,
    "metadata": {"version": "1.8.0"},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
names = st.sampled_from(["a", "b", "a.b", "[]", "", "time", "class_uid", "type_uid", "unmapped", "metadata"]) | st.text(
    max_size=6
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=20
)
given_times = (
    scalars | st.integers(0, 10**19) | st.sampled_from(["--5", "2024-01-01", "0001-01-01T00:00:00Z", "nan", "inf", "²"])
)
events = st.fixed_dictionaries(
    {},
    optional={
        "time": given_times,
        "time_dt": given_times,
        "class_uid": scalars | st.sampled_from([3002, "3002", 3005, "--5", -7, 10**12]),
        "type_uid": scalars | st.sampled_from([300201, "300201", 300502, -1]),
        "activity_id": scalars | st.sampled_from([1, 99, "2", -1]),
        "metadata": values | st.just({"version": "1.0.0-rc.2"}),
        "unmapped": values | st.sampled_from(['{"a": 1}', "[1]", "{", "text"]),
        "actor": values,
        "resources": st.lists(values, max_size=3),
        "events": values,
    },
)


def message(value: bytes | None, offset: int = 0, timestamp: int = NOW) -> Message:
    return Message("events", 0, offset, timestamp, value)


def of(*given: Any, timestamp: int = NOW) -> tuple[EventBatch, list[Reject]]:
    """Decode values, each a message of its own; what is not bytes is written as JSON."""
    return decode(
        [
            message(value if value is None or isinstance(value, bytes) else json.dumps(value).encode(), i, timestamp)
            for i, value in enumerate(given)
        ]
    )


def one(timestamp: int = NOW, **changes: Any) -> EventBatch:
    """The batch of one event with attributes changed; None takes one away."""
    record = {key: value for key, value in {**EVENT, **changes}.items() if value is not None}
    batch, rejects = of(record, timestamp=timestamp)
    assert len(batch) == 1 and not rejects
    return batch


def by_event(batch: EventBatch) -> list[tuple[int, int, int, dict[str, Any]]]:
    """What each event of a batch came to, without its place in the batch."""
    found: list[dict[str, Any]] = [{} for _ in range(len(batch))]
    for path, column in batch.columns.items():
        assert column.rows.dtype == np.int32 and np.all(np.diff(column.rows) > 0)
        for row, value in zip(column.rows.tolist(), column.values, strict=True):
            found[row][path] = value
    return list(zip(batch.time.tolist(), batch.class_uid.tolist(), batch.type_uid.tolist(), found, strict=True))


# Nothing raises, nothing is lost


@given(st.lists(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()) | st.none(), max_size=6))
def test_any_message_is_an_event_or_a_reject(given: list[bytes | None]) -> None:
    batch, rejects = of(*given)
    decoded = set(batch.coordinates.offset.tolist())
    refused = {reject.message for reject in rejects}
    assert decoded | refused == set(range(len(given)))
    for reject in rejects:
        assert reject.stage == "decode" and reject.exception and reject.reason
        assert reject.index >= 0 or reject.value == given[reject.message]


@given(st.lists(events, min_size=1, max_size=6))
def test_any_object_is_an_event_with_a_readable_type_and_time(given: list[dict[str, Any]]) -> None:
    batch, rejects = of(*({**event, "class_uid": event.get("class_uid", 0)} for event in given))
    assert not rejects and len(batch) == len(given)
    assert np.all(batch.time >= 0) and np.all(batch.class_uid >= 0)
    assert np.array_equal(batch.type_uid // 100, batch.class_uid)


@given(st.lists(events, min_size=1, max_size=6), st.integers(0, 6))
def test_an_event_does_not_depend_on_its_batch_or_message(given: list[dict[str, Any]], cut: int) -> None:
    given = [{**event, "class_uid": event.get("class_uid", 0)} for event in given]
    together, _ = of(*given)
    apart = [event for part in (given[:cut], given[cut:]) for event in by_event(of(*part)[0])]
    assert apart == by_event(together)
    assert by_event(of({"events": given})[0]) == apart
    ndjson = b"\n".join(json.dumps(event).encode() for event in given)
    assert by_event(of(ndjson)[0]) == apart


@given(events)
def test_a_record_can_be_written_and_read_again(event: dict[str, Any]) -> None:
    event["class_uid"] = event.get("class_uid", 0)
    batch, _ = of(event)
    again, rejects = of(orjson.dumps(batch.records[0]))
    assert not rejects and by_event(again) == by_event(batch)


def test_the_cycle_collector_runs_again_afterwards() -> None:
    of(EVENT, b"garbage")
    assert gc.isenabled()


# Messages


def test_a_message_holds_one_event_a_bundle_or_lines() -> None:
    bundle = {"events": [EVENT, {**EVENT, "activity_id": 2, "type_uid": 300202}], "count": 2}
    lines = orjson.dumps(EVENT) + b"\r\n\n" + orjson.dumps(EVENT) + b"\n"
    batch, rejects = of(EVENT, bundle, lines)
    assert not rejects
    assert [batch.coordinates.label(row) for row in range(5)] == [
        "events:0:0:0",
        "events:0:1:0",
        "events:0:1:1",
        "events:0:2:0",
        "events:0:2:1",
    ]
    assert batch.type_uid.tolist() == [300201, 300201, 300202, 300201, 300201]


def test_an_event_with_a_class_and_a_list_named_events_is_no_bundle() -> None:
    batch, rejects = of({**EVENT, "events": [1, 2]})
    assert len(batch) == 1 and not rejects


def test_one_bad_member_takes_nothing_with_it() -> None:
    batch, rejects = of({"events": [EVENT, 7, EVENT]}, orjson.dumps(EVENT) + b"\n{garbage\n[1]\n" + orjson.dumps(EVENT))
    assert batch.coordinates.index.tolist() == [0, 2, 0, 3]
    assert [(r.message, r.index, r.value) for r in rejects] == [(0, 1, b"7"), (1, 1, b"{garbage"), (1, 2, b"[1]")]


@pytest.mark.parametrize(
    ("value", "exception"),
    [
        (None, "EmptyMessage"),
        (b"", "EmptyMessage"),
        (b"   ", "JSONDecodeError"),
        (b"garbage", "JSONDecodeError"),
        (b'{"class_uid": NaN}', "JSONDecodeError"),
        (b"null", "NotAnObject"),
        (b"[]", "NotAnObject"),
        (b'"text"', "NotAnObject"),
        (b'{"events": []}', "EmptyBundle"),
        (b"\x00\x00\x00\x00\x07", "JSONDecodeError"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "JSONDecodeError"),
    ],
)
def test_what_is_no_object_is_refused_whole_and_unchanged(value: bytes | None, exception: str) -> None:
    batch, rejects = of(EVENT, value, EVENT)
    assert batch.coordinates.offset.tolist() == [0, 2]
    (reject,) = rejects
    assert (reject.message, reject.index, reject.value, reject.exception) == (1, -1, value, exception)


@pytest.mark.parametrize("prefix", [b"\x00\x00\x00\x00\x2a", b"\xef\xbb\xbf", b"\x00\x00\x00\x00\x2a\xef\xbb\xbf"])
def test_confluents_prefix_and_a_byte_order_mark_are_passed_over(prefix: bytes) -> None:
    batch, rejects = of(prefix + orjson.dumps(EVENT))
    assert not rejects and by_event(batch) == by_event(one())


def test_bytes_that_are_no_utf8_are_repaired() -> None:
    batch, rejects = of(orjson.dumps({**EVENT, "message": "caf?"}).replace(b"caf?", b"caf\xe9"))
    assert not rejects and batch.columns["message"].values == ["caf\ufffd"]
    assert batch.repairs == {"invalid_utf8": 1}


def test_half_a_surrogate_pair_is_repaired_and_nothing_else() -> None:
    text = rb'"cut \ud83d, whole \ud83d\ude00, escaped \\ud83d"'
    batch, rejects = of(orjson.dumps(EVENT)[:-1] + b',"message":' + text + b"}")
    assert not rejects and batch.repairs == {"half_surrogate": 1}
    assert batch.columns["message"].values == ["cut \ufffd, whole \U0001f600, escaped \\ud83d"]


def test_the_last_of_two_equal_keys_stands() -> None:
    batch, _ = of(orjson.dumps(EVENT)[:-1] + b',"message":"a","message":"b"}')
    assert batch.columns["message"].values == ["b"]


def test_a_redelivered_message_is_decoded_again_with_its_coordinates() -> None:
    batch, _ = decode([message(orjson.dumps(EVENT), 7)] * 2)
    assert batch.coordinates.label(0) == batch.coordinates.label(1) == "events:0:7:0"


# Repairs


@pytest.mark.parametrize(
    ("given", "read", "repair"),
    [
        (NOW, NOW, None),
        (NOW // 1000, NOW, "time_seconds"),
        (1_749_999_999.25, 1_749_999_999_250, "time_seconds"),
        (NOW * 1000, NOW, "time_microseconds"),
        (NOW * 1_000_000, NOW, "time_nanoseconds"),
        (str(NOW), NOW, "time_text"),
        (str(NOW // 1000), NOW, "time_text"),
        ("2025-06-15T15:06:40Z", NOW, "time_text"),
        ("2025-06-15T17:06:40.123456789+02:00", NOW + 123, "time_text"),
        ("2025-06-15 15:06:40", NOW, "time_text"),
        (True, NOW - 5, "time_unreadable"),
        ("soon", NOW - 5, "time_unreadable"),
        ("nan", NOW - 5, "time_unreadable"),
        ("0001-01-01T00:00:00Z", NOW - 5, "time_unreadable"),
        (-1, NOW - 5, "time_unreadable"),
        (0, NOW - 5, "time_unreadable"),
        ([NOW], NOW - 5, "time_unreadable"),
        (None, NOW - 5, "time_missing"),
    ],
)
def test_times_of_every_kind(given: Any, read: int, repair: str | None) -> None:
    """The message's own timestamp, here five ms earlier, stands where there is nothing to read."""
    batch = one(timestamp=NOW - 5, time=given)
    assert batch.time.tolist() == [read]
    assert batch.repairs == ({repair: 1} if repair else {})


def test_the_time_as_text_stands_for_a_missing_time() -> None:
    batch = one(time=None, time_dt="2025-06-15T15:06:40Z")
    assert batch.time.tolist() == [NOW] and batch.repairs == {"time_from_dt": 1}


@pytest.mark.parametrize(("ahead", "read"), [(300_000, NOW + 300_000), (300_001, NOW)])
def test_a_time_too_far_past_the_messages_is_clamped(ahead: int, read: int) -> None:
    batch = one(time=NOW + ahead)
    assert batch.time.tolist() == [read] and batch.repairs == ({"time_future": 1} if read == NOW else {})


@pytest.mark.parametrize(
    ("timestamp", "repair"),
    [
        (NOW // 1000, "record_timestamp_seconds"),
        (NOW * 1000, "record_timestamp_microseconds"),
        (NOW * 1_000_000, "record_timestamp_nanoseconds"),
        (12, "record_timestamp_unusable"),
        (915_148_800_000, "record_timestamp_unusable"),  # 1999
        (5_000_000_000_000, "record_timestamp_unusable"),  # 2128
    ],
)
def test_a_right_time_stands_whatever_the_timestamp_of_its_record_is(timestamp: int, repair: str) -> None:
    batch = one(timestamp=timestamp, time=NOW)
    assert batch.time.tolist() == [NOW] and batch.repairs == {repair: 1}
    stood_in = one(timestamp=timestamp, time="soon").time.tolist()
    assert stood_in == [NO_TIME if repair.endswith("unusable") else NOW // 1000 * 1000 if timestamp < NOW else NOW]
    ahead = one(timestamp=timestamp, time=NOW + 3_600_000).time.tolist()
    assert ahead == ([NOW + 3_600_000] if repair.endswith("unusable") else stood_in)


def test_bounds_of_a_message_overrule_its_timestamp() -> None:
    bounds = TimeBounds(NOW, NOW + 1000, NOW + 7)
    given = [NOW - 1, NOW, NOW + 1000, NOW + 1001, None]
    batch, _ = decode(
        [
            Message("events", 0, i, -1, json.dumps(EVENT | {"time": t}).encode(), bounds=bounds)
            for i, t in enumerate(given)
        ]
    )
    assert batch.time.tolist() == [NOW + 7, NOW, NOW + 1000, NOW + 7, NOW + 7]
    assert batch.repairs == {"time_past": 1, "time_future": 1, "time_missing": 1}
    _, times = event_times(
        [
            Message("events", 0, i, -1, json.dumps(EVENT | {"time": t}).encode(), bounds=bounds)
            for i, t in enumerate(given)
        ]
    )
    assert times.tolist() == batch.time.tolist()


def test_a_file_has_no_timestamps_to_clamp_by() -> None:
    assert one(timestamp=-1, time=NOW * 2).time.tolist() == [NOW * 2]
    assert one(timestamp=-1, time=None).time.tolist() == [NO_TIME]


@pytest.mark.parametrize(
    ("changes", "type_uid", "repairs"),
    [
        ({"type_uid": 300299}, 300201, {"type_uid_mismatch": 1}),
        ({"type_uid": None}, 300201, {}),
        ({"type_uid": "300201", "class_uid": "3002", "activity_id": "1"}, 300201, {}),
        ({"activity_id": None}, 300201, {}),
        ({"activity_id": None, "type_uid": None}, 300200, {}),
        ({"class_uid": None}, 300201, {"class_missing": 1}),
        ({"class_uid": "--5"}, 300201, {"class_missing": 1}),
        ({"class_uid": 201001, "type_uid": 20100101}, 20100101, {}),
        ({"activity_id": 300}, 300299, {"activity_out_of_range": 1, "type_uid_mismatch": 1}),
        ({"metadata": None}, 300201, {"metadata_missing": 1}),
        ({"metadata": "text"}, 300201, {"metadata_missing": 1}),
    ],
)
def test_types_are_repaired(changes: dict[str, Any], type_uid: int, repairs: dict[str, int]) -> None:
    batch = one(**changes)
    assert batch.type_uid.tolist() == [type_uid] and batch.class_uid.tolist() == [type_uid // 100]
    assert batch.repairs == repairs
    assert batch.records[0]["class_uid"] == type_uid // 100 and isinstance(batch.records[0]["metadata"], dict)


@pytest.mark.parametrize("activity", [2, None])
def test_api_activity_of_the_release_candidate_has_its_number_of_today(activity: int | None) -> None:
    rc = {"class_uid": 3005, "type_uid": 300502, "activity_id": activity, "category_uid": 3}
    batch = one(**rc, metadata={"version": "1.0.0-rc.2"})
    assert batch.type_uid.tolist() == [600302] and batch.repairs == {"class_renumbered": 1}
    assert batch.records[0]["category_uid"] == 6
    assert one(**rc, metadata={"version": "1.8.0"}).type_uid.tolist() == [300502]


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [('{"a": {"b": 1}}', "unmapped.a.b", 1), ("[1]", "unmapped.text", "[1]"), ("{cut", "unmapped.text", "{cut")],
)
def test_unmapped_as_text_is_read(given: str, path: str, value: Any) -> None:
    batch = one(unmapped=given)
    assert batch.columns[path].values == [value] and batch.repairs == {"unmapped_text": 1}


# Columns


def test_paths_lists_and_nulls() -> None:
    batch = one(
        actor={"user": {"name": "ann", "uid": None}},
        answers=["a", None, 2],
        empty=[],
        resources=[{"uid": "x", "owner": {"name": "ann"}}, {"uid": "y", "tags": [1, 2]}],
    )
    found = by_event(batch)[0][3]
    assert {path: value for path, value in found.items() if path.split(".")[0].split("[")[0] not in EVENT} == {
        "actor.user.name": "ann",
        "answers": ["a", 2],
        "empty": [],
        "resources[].owner.name": ["ann"],
        "resources[].tags": ["[1,2]"],
        "resources[].uid": ["x", "y"],
    }


def test_keys_with_dots_are_the_same_path() -> None:
    nested, dotted = {**EVENT, "actor": {"user": {"name": "ann"}}}, {**EVENT, "actor.user.name": "bob"}
    batch, _ = of(nested, dotted, {**dotted, **nested}, {**nested, **dotted})
    assert batch.columns["actor.user.name"].values == ["ann", "bob", "ann", "ann"]


@pytest.mark.parametrize("opening", [b'{"a":', b"[", b'[{"a":'])
@pytest.mark.parametrize("depth", [20, 30, 300, 500])
@pytest.mark.parametrize("attribute", [b"x", b"metadata", b"unmapped", b"time", b"class_uid"])
def test_deep_nesting_is_read_as_text(opening: bytes, depth: int, attribute: bytes) -> None:
    closing = opening.translate(bytes.maketrans(b"{[", b"}]"), b'"a:')[::-1]
    deep = opening * depth + b"1" + closing * depth
    batch, rejects = of(b'{"class_uid": 3002, "message": "m", "%s": %s}' % (attribute, deep))
    if attribute != b"class_uid":
        assert batch.class_uid.tolist() == [3002]
    assert not rejects and batch.columns["message"].values == ["m"]
    again, _ = of(orjson.dumps(batch.records[0]))
    assert by_event(again) == by_event(batch)


def test_an_event_with_too_many_fields_is_read_in_part_and_its_batch_whole() -> None:
    many = {**EVENT, "unmapped": {f"k{i}": i for i in range(10 * MAX_FIELDS)}}
    exactly = {**EVENT, "unmapped": {f"k{i}": i for i in range(MAX_FIELDS - len(EVENT) - 2)}}
    batch, _ = of(many, exactly, EVENT)
    assert batch.repairs == {"too_many_fields": 1}
    assert [len(event[3]) <= MAX_FIELDS for event in by_event(batch)] == [True] * 3
    assert by_event(batch)[2] == by_event(one())[0]
    assert len(by_event(batch)[1][3]) == MAX_FIELDS - 2  # objects themselves are no values


def test_a_long_list_is_cut() -> None:
    batch = one(answers=list(range(10 * MAX_LIST)))
    assert batch.columns["answers"].values == [list(range(MAX_LIST))] and batch.repairs == {"list_cut": 1}


def test_a_long_key_gives_a_short_path() -> None:
    batch = one(**{"k" * 100_000: 1, "k" * 100_000 + "2": 2})
    assert max(map(len, batch.columns)) < 300


def test_a_message_of_five_megabytes_is_an_event() -> None:
    batch, rejects = of({**EVENT, "raw_data": "x" * 5_000_000})
    assert len(batch) == 1 and not rejects


@pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")
def test_the_example_events_of_the_schema_project_all_decode() -> None:
    lines = (Path(DATA or "") / "ocsf-examples.ndjson").read_bytes().splitlines()
    batch, rejects = decode([message(line, i) for i, line in enumerate(lines)])
    assert len(batch) == len(lines) == 93 and not rejects
    assert np.all(batch.time > 1_400_000_000_000)
    assert batch.repairs["time_seconds"] + batch.repairs["time_text"] >= 16
    assert isinstance(batch.repairs, Counter)
