"""Entities: whom an event is about, found by default in every stream that names anybody."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import KINDS, MAX_LENGTH, MAX_PER_EVENT, Entities, Rule, entities
from encoder.ocsf.events import EventBatch, Message

DATA = Path(os.environ.get("RIPCURRENT_EVAL_DATA", "/nonexistent"))


def batch(*records: dict[str, Any]) -> EventBatch:
    return decode([Message("events", 0, i, 0, orjson.dumps(record)) for i, record in enumerate(records)])[0]


def names(found: Entities, row: int = 0) -> set[str]:
    return {name for at, name in zip(found.row.tolist(), found.entity, strict=True) if at == row}


def test_an_event_names_several_entities_in_stream_order() -> None:
    logon = {"class_uid": 3002, "user": {"name": "ACME\\Ann"}, "src_endpoint": {"ip": "10.0.0.7"}}
    found = entities(batch({}, {**logon, "device": {"hostname": "FS01"}}, logon))
    assert found.row.tolist() == [1, 1, 1, 2, 2]
    assert names(found, 1) == {"user:ann", "address:10.0.0.7", "host:fs01"}
    assert found.primary == ["", "user:ann", "user:ann"]
    kinds = [KINDS[kind] for kind in found.kind]
    assert all(name.startswith(f"{kind}:") for kind, name in zip(kinds, found.entity, strict=True))


def test_who_logs_on_is_the_user_and_who_acts_is_the_user_elsewhere() -> None:
    people = {"actor": {"user": {"name": "admin1"}}, "user": {"name": "bob"}}
    found = entities(batch({"class_uid": 3002, **people}, {"class_uid": 3001, **people}))
    assert found.entity == ["user:bob", "user:admin1"]


def test_an_account_of_the_machine_is_not_one_person_on_all_machines() -> None:
    found = entities(
        batch(
            *({"user": {"name": "NT AUTHORITY\\SYSTEM"}, "device": {"hostname": host}} for host in ("a1", "a2")),
            {"user": {"name": "SYSTEM"}},
        )
    )
    assert names(found, 0) == {"user:system@a1", "host:a1"}
    assert names(found, 1) == {"user:system@a2", "host:a2"}
    assert names(found, 2) == {"user:system"}


def test_a_process_is_its_own_id_or_its_name_on_its_host() -> None:
    uid = "{19de6d3b-7bd6-64da-2b00-000000000c00}"
    on = {"device": {"hostname": "h"}}
    found = entities(
        batch(
            {"actor": {"process": {"uid": uid, "name": "cmd.exe"}}, **on},
            {"actor": {"process": {"name": "CMD.exe"}}, **on},
            {"actor": {"process": {"uid": 4711}}, **on},
        )
    )
    assert found.entity == [f"process:{uid}", "host:h", "process:cmd.exe@h", "host:h", "process:4711@h", "host:h"]


def test_a_launch_begins_the_history_of_what_it_starts() -> None:
    event = {"class_uid": 1007, "actor": {"process": {"uid": "p"}}, "process": {"uid": "c"}}
    found = entities(batch({**event, "activity_id": 1}, {**event, "activity_id": 3}))
    assert found.entity == ["process:p", "process:c", "process:p"]


@pytest.mark.parametrize("nobody", ["", "-", " N/A ", "NULL SID", "(null)", None])
def test_placeholders_name_nobody_and_the_next_attribute_is_asked(nobody: str | None) -> None:
    found = entities(batch({"actor": {"user": {"name": nobody, "uid": "S-1-5-21-7"}}, "src_endpoint": {"ip": "::"}}))
    assert found.entity == ["user:s-1-5-21-7"]


def test_addresses_have_one_spelling() -> None:
    spelled = ("fe80:0:0:0:1:2:3:4", "FE80::1:2:3:4%eth0", "::ffff:10.1.1.1", "10.1.1.1", "AWS Internal")
    found = entities(batch(*({"src_endpoint": {"ip": ip}} for ip in spelled)))
    assert found.entity == ["address:fe80::1:2:3:4"] * 2 + ["address:10.1.1.1"] * 2 + ["address:aws internal"]


def test_long_names_are_cut_and_stay_distinct() -> None:
    long = "x" * 5000
    found = entities(batch({"user": {"uid": long + "1"}}, {"user": {"uid": long + "2"}}))
    assert len(set(found.entity)) == 2
    assert max(map(len, found.entity)) <= MAX_LENGTH + len("user:")


def test_an_event_names_at_most_four_and_keeps_the_narrowest() -> None:
    event = {
        "class_uid": 1007, "activity_id": 1, "metadata": {"correlation_uid": "run-1"}, "device": {"hostname": "h"},
        "actor": {"user": {"name": "u"}, "process": {"uid": "p"}, "session": {"uid": "s"}}, "process": {"uid": "c"},
        "src_endpoint": {"ip": "10.0.0.1"}, "service": {"name": "mail"},
    }  # fmt: skip
    found = entities(batch(event))
    assert len(found) == MAX_PER_EVENT
    assert found.entity == ["correlation:run-1", "process:p@h", "process:c@h", "user:u"]
    assert found.primary == ["user:u"]


def test_paths_are_configurable() -> None:
    rules = (Rule("user", ("unmapped.badge",)), Rule("user", ("unmapped.door",), classes=(1008,)))
    records = [{"class_uid": uid, "unmapped": {"badge": "B7", "door": "D1"}} for uid in (1008, 1007)]
    assert entities(batch(*records), rules).entity == ["user:d1", "user:b7"]
    with pytest.raises(ValueError, match="'planet'"):
        entities(batch(*records), [Rule("planet", ("unmapped.door",))])


_INTEGERS = st.integers(-(2**63), 2**64 - 1)
_VALUES = st.one_of(
    st.none(), st.booleans(), _INTEGERS, st.floats(), st.text(max_size=200), st.lists(_INTEGERS, max_size=3)
)
_OBJECTS = st.dictionaries(st.sampled_from(["name", "uid", "hostname", "ip", "user", "process"]), _VALUES, max_size=4)
_RECORDS = st.dictionaries(
    st.sampled_from(["user", "actor", "device", "process", "src_endpoint", "session", "service", "metadata"]),
    st.one_of(_VALUES, _OBJECTS, st.dictionaries(st.sampled_from(["user", "process"]), _OBJECTS)),
)


@given(st.lists(_RECORDS, max_size=5))
def test_whatever_the_values_are_names_are_bounded_and_no_batch_changes_them(
    records: list[dict[str, Any]],
) -> None:
    dumped = [Message("t", 0, i, 0, orjson.dumps(record)) for i, record in enumerate(records)]
    found = entities(decode(dumped)[0])
    assert np.all(np.diff(found.row) >= 0)
    assert np.bincount(found.row, minlength=1).max() <= MAX_PER_EVENT
    assert all(len(name) <= 2 * MAX_LENGTH + 20 and name == name.lower() for name in found.entity)
    assert len(found.primary) == len(records)
    alone = [entities(decode([message])[0]) for message in dumped]
    assert [name for one in alone for name in one.entity] == found.entity
    assert [one.primary[0] for one in alone] == found.primary


@pytest.mark.skipif(not DATA.is_dir(), reason="RIPCURRENT_EVAL_DATA names no folder")
@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("windows-a", {"host", "process", "user"}),
        ("sequences-hdfs", {"correlation"}),
        ("cloud", {"user", "address"}),
        ("flows-nsl", set()),
    ],
)
def test_the_defaults_find_the_entities_of_every_recording(stream: str, expected: set[str]) -> None:
    with gzip.open(DATA / f"{stream}.test.ndjson.gz") as file:
        lines = file.read().splitlines()[:2000]
    found = entities(decode([Message("t", 0, i, 0, line) for i, line in enumerate(lines)])[0])
    kinds, counts = np.unique(found.kind, return_counts=True)
    assert expected <= {KINDS[kind] for kind, count in zip(kinds, counts, strict=True) if count > 20}
    assert bool(expected) == any(found.primary)
