"""The promises of conditional rarity: exact counts, the surprise that they imply, new names that alone do not alarm."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from test_schema import decoded, learn

from encoder.rarity import NEW_NAME_SURPRISE, ContextRarity
from encoder.schema import Schema
from encoder.vectorize import FeatureBatch, Vectorizer


def event(action: str, user: str = "ann", actor: str = "shell", activity: int = 1) -> dict[str, Any]:
    return {
        "activity_id": activity,
        "type_uid": None,
        "unmapped": {"action": action},
        "user": {"name": user},
        "actor": {"process": {"name": actor}},
    }


TRAINING = (
    [event("read")] * 60
    + [event("write", actor="backup")] * 30
    + [event("erase")] * 10
    + [event("read", activity=2)] * 7
)


def fitted(training: Sequence[dict[str, Any]] = TRAINING) -> tuple[Schema, Vectorizer, ContextRarity]:
    schema = learn(training)
    vectorizer = Vectorizer(schema)
    features = vectorizer(decoded(training))
    first, like = features.distinct()
    return schema, vectorizer, ContextRarity.fit(schema, features.take(first), np.bincount(like).astype(np.float64))


SCHEMA, VECTORIZER, RARITY = fitted()


def features(*events: dict[str, Any]) -> FeatureBatch:
    return VECTORIZER(decoded(events))


def surprise(name: str, *events: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By type and by actor, of one field."""
    found, at = RARITY(features(*events)), RARITY.names.index(name)
    return found.by_type[:, at].tolist(), found.by_actor[:, at].tolist()


def expected(hits: int, seen: int) -> float:
    return -log((hits + 0.5) / (seen + 5))


def test_surprise_is_that_of_the_counts_given_type_and_given_actor() -> None:
    by_type, by_actor = surprise(
        "unmapped.action",
        event("read"),
        event("write"),
        event("write", actor="backup"),
        event("erase"),
        event("never"),
        event("erase", activity=2),
    )
    assert by_type == pytest.approx(
        [expected(60, 100), expected(30, 100), expected(30, 100), expected(10, 100), expected(0, 100), expected(0, 7)]
    )
    assert by_actor == pytest.approx(
        [expected(60, 70), expected(0, 70), expected(30, 30), expected(10, 70), expected(0, 70), expected(0, 7)]
    )


def test_a_type_never_seen_has_nothing_to_be_surprised_by() -> None:
    by_type, by_actor = surprise("unmapped.action", event("read", activity=9))
    assert by_type == by_actor == pytest.approx([expected(0, 0)])


def test_a_new_name_alone_costs_little_and_a_known_one_in_a_new_place_more() -> None:
    _, vectorizer, rarity = fitted([*TRAINING, *[event("read", user="bob", activity=2)] * 300])
    at = rarity.names.index("user.name")
    found = rarity(vectorizer(decoded([event("read", user="carol", activity=2), event("read", user="bob")])))
    new, misplaced = found.by_type[:, at].tolist()
    assert new == NEW_NAME_SURPRISE and misplaced == pytest.approx(expected(0, 100))


def test_a_value_never_seen_is_as_likely_as_those_seen_once() -> None:
    """Where new values come all the time, one more says little."""
    letters = "bcdfghjklmnp"
    _, vectorizer, rarity = fitted([event("read")] * 50 + [event(f"job-{letter}") for letter in letters])
    found = rarity(vectorizer(decoded([event("job-z"), event("job-b")])))
    by_type = found.by_type[:, rarity.names.index("unmapped.action")].tolist()
    total = 50 + len(letters)
    assert by_type == pytest.approx([expected(len(letters), total), expected(1, total)])


def test_weights_are_counts() -> None:
    rows = VECTORIZER(decoded(TRAINING))
    one_by_one = ContextRarity.fit(SCHEMA, rows, np.ones(len(rows)))
    assert torch.equal(one_by_one.keys, RARITY.keys) and torch.equal(one_by_one.counts, RARITY.counts)


def test_keys_ascend_and_none_is_shared() -> None:
    assert torch.all(RARITY.keys[1:] > RARITY.keys[:-1]) and torch.all(RARITY.counts > 0)


def test_surprise_does_not_depend_on_the_batch() -> None:
    events = [event("read"), event("never", user="x", actor="y"), {}, event("erase", activity=2)]
    together = RARITY(features(*events))
    apart = [RARITY(features(e)) for e in events]
    assert torch.equal(together.by_type, torch.cat([a.by_type for a in apart]))
    assert torch.equal(together.by_actor, torch.cat([a.by_actor for a in apart]))


def test_one_thing_said_in_other_words_is_one_thing_where_training_says_so() -> None:
    def logon(host: int, source: int, activity: int) -> dict[str, Any]:
        return {
            "activity_id": activity,
            "type_uid": None,
            "device": {"hostname": "host-" + "abcdefgh"[host], "ip": f"10.0.0.{host}"},
            "dst_endpoint": {"ip": f"10.0.0.{host if activity == 1 else source}"},
            "src_endpoint": {"ip": f"10.9.9.{source}"},
        }

    training = [logon(host, source, activity) for host in range(8) for source in range(9) for activity in (1, 2)]
    _, vectorizer, rarity = fitted(training)
    rows = vectorizer(decoded([logon(3, 4, 1), logon(3, 4, 2)]))
    one, other = (
        dict(zip(rarity.names, groups, strict=True)) for groups in rarity.groups[rows.codes[:, 0].tolist()].tolist()
    )
    server = {"device.hostname", "device.ip", "dst_endpoint.ip"}
    assert len({one[name] for name in server}) == 1
    assert len({other[name] for name in server - {"dst_endpoint.ip"}}) == 1
    assert one["src_endpoint.ip"] not in {one[name] for name in server}
    assert other["dst_endpoint.ip"] != other["device.ip"]
    seen = rarity(rows)
    for row, groups in enumerate((one, other)):
        by_actor = dict(zip(rarity.names, seen.by_actor[row].tolist(), strict=True))
        once = [max(by_actor[name] for name in groups if groups[name] == group) for group in set(groups.values())]
        assert float(rarity.summary(seen)[1][row]) == pytest.approx(sum(max(nats, 0.0) for nats in once), rel=1e-5)


def test_it_is_the_same_after_a_journey_through_arrays() -> None:
    again = ContextRarity(SCHEMA, *(torch.from_numpy(a.numpy()) for a in (RARITY.keys, RARITY.counts, RARITY.groups)))
    rows = features(event("read"), event("never"))
    assert torch.equal(again(rows).by_type, RARITY(rows).by_type)
