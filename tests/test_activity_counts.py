"""What events add to the counts of their entities: failures, bytes, and whom they reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from encoder.ocsf.activity_counts import NOBODY, PARTNERS, ActivityCounts, activity_counts
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import KINDS, Entities, entities
from encoder.ocsf.events import Message
from state import rolling_counts as tally

Json = dict[str, Any]
LOGON: Json = {
    "class_uid": 3002,
    "activity_id": 1,
    "time": 1_790_000_000_000,
    "status_id": 1,
    "user": {"name": "bob"},
    "src_endpoint": {"ip": "10.0.0.5"},
    "device": {"hostname": "PC-7"},
    "metadata": {"version": "1.5.0", "correlation_uid": "run-1"},
}


def added(*events: Json) -> tuple[Entities, ActivityCounts]:
    batch, rejects = decode([Message("t", 0, i, 0, orjson.dumps(event)) for i, event in enumerate(events)])
    assert not rejects
    named = entities(batch)
    return named, activity_counts(batch, named)


def partners(named: Entities, counts: ActivityCounts, entity: str) -> set[int]:
    return {int(place) for place in counts.partners[named.entity.index(entity)] if place != NOBODY}


def test_store_and_encoder_agree_on_how_many_partners_an_event_has() -> None:
    assert PARTNERS == tally.PARTNERS


def test_those_that_an_event_names_are_each_others_partners_and_nobody_is_their_own() -> None:
    named, counts = added(LOGON, {**LOGON, "device": {"hostname": "PC-8"}})
    bob, address, host = (partners(named, counts, name) for name in ("user:bob", "address:10.0.0.5", "host:pc-7"))
    assert len(bob) == len(address) == len(host) == 2
    assert len(bob & host) == 1  # the address
    assert len(bob | address | host) == 3
    assert counts.partners.dtype == np.int16


def test_what_lives_for_one_run_has_no_habits() -> None:
    named, counts = added(LOGON)
    counted = {KINDS[kind]: bool(yes) for kind, yes in zip(named.kind.tolist(), counts.counted.tolist(), strict=True)}
    assert counted == {"correlation": False, "user": True, "address": True, "host": True}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, False),
        ({"status_id": 2}, True),
        ({"action_id": 2}, True),
        ({"disposition_id": 2}, True),
        ({"disposition_id": 1}, False),
        ({"class_uid": 4001, "activity_id": 5}, True),
        ({"class_uid": 4001, "activity_id": 6}, False),
        ({"status_id": [2]}, False),
    ],
)
def test_a_failure_is_what_ocsf_says_is_one(changes: Json, failed: bool) -> None:
    _, counts = added({**LOGON, **changes})
    assert counts.failed.tolist() == [failed] * len(counts)


@pytest.mark.parametrize(
    ("traffic", "amount"),
    [
        ({"bytes_out": 5, "bytes": 9}, 5),
        ({"bytes": 9}, 9),
        ({"bytes_out": -1}, 0),
        ({"bytes_out": "7"}, 0),
        ({"bytes_out": 1 << 60}, 0),
        ({}, 0),
    ],
)
def test_bytes_that_leave_count_before_all_bytes_and_nonsense_not_at_all(traffic: Json, amount: int) -> None:
    _, counts = added({**LOGON, "class_uid": 4001, "activity_id": 6, "traffic": traffic})
    assert set(counts.amount.tolist()) == {amount}
