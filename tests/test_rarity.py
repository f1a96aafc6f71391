"""The promises of conditional rarity: how often a value is no likelier, judged by other times; what comes often is
usual; new names alone do not alarm."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from test_schema import decoded, learn

from encoder.features.schema import Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models.rarity import ENOUGH, NEW_NAME_SURPRISE, TENSORS, ContextRarity


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
DAYS = 3


def fitted(training: Sequence[dict[str, Any]] = TRAINING, days: int = DAYS) -> tuple[Schema, Vectorizer, ContextRarity]:
    """Of so many days, each of which was the same."""
    return over([training] * days)


def over(days: Sequence[Sequence[dict[str, Any]]]) -> tuple[Schema, Vectorizer, ContextRarity]:
    whole = [e for day in days for e in day]
    schema = learn(whole)
    vectorizer = Vectorizer(schema)
    features = vectorizer(decoded(whole))
    first, like = features.distinct()
    weights = np.zeros((len(first), len(days)))
    np.add.at(weights, (like, np.repeat(np.arange(len(days)), [len(day) for day in days])), 1)
    return schema, vectorizer, ContextRarity.fit(schema, features.take(first), weights)


SCHEMA, VECTORIZER, RARITY = fitted()


def features(*events: dict[str, Any]) -> FeatureBatch:
    return VECTORIZER(decoded(events))


def surprise(name: str, *events: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By type and by actor, of one field."""
    found, at = RARITY(features(*events)), RARITY.names.index(name)
    return found.by_type[:, at].tolist(), found.by_actor[:, at].tolist()


def expected(no_likelier: int, seen: int) -> float:
    """Of one day's counts."""
    return -log((DAYS * no_likelier + 0.5) / (DAYS * seen + 5))


def test_surprise_is_how_often_a_value_is_no_likelier_given_type_and_given_actor() -> None:
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
        [expected(100, 100), expected(40, 100), expected(40, 100), expected(10, 100), expected(0, 100), expected(0, 7)],
        abs=1e-6,
    )
    assert by_actor == pytest.approx(
        [expected(70, 70), expected(0, 70), expected(30, 30), expected(10, 70), expected(0, 70), expected(0, 7)],
        abs=1e-6,
    )


def test_what_comes_often_is_usual_beside_what_comes_far_more_often() -> None:
    rare = int(ENOUGH)
    _, vectorizer, rarity = fitted([event("read")] * 20 * rare + [event("erase")] * rare + [event("wipe")] * 2)
    found = rarity(vectorizer(decoded([event("read"), event("erase"), event("wipe")])))
    usual, rarely, seldom = found.by_type[:, rarity.names.index("unmapped.action")].tolist()
    assert usual == rarely == pytest.approx(0, abs=0.01)
    assert seldom > 6


def test_where_every_value_is_rare_another_rare_one_is_nothing() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    _, vectorizer, rarity = fitted([event(f"job-{a}{b}") for a in letters for b in letters])
    found = rarity(vectorizer(decoded([event("job-qx")])))
    assert found.by_type[:, rarity.names.index("unmapped.action")].item() == pytest.approx(0, abs=0.01)


def test_a_type_never_seen_has_nothing_to_be_surprised_by() -> None:
    by_type, by_actor = surprise("unmapped.action", event("read", activity=9))
    assert by_type == by_actor == pytest.approx([expected(0, 0)])


def test_a_new_name_alone_costs_little_and_a_known_one_in_a_new_place_more() -> None:
    _, vectorizer, rarity = fitted([*TRAINING, *[event("read", user="bob", activity=2)] * 300])
    at = rarity.names.index("user.name")
    found = rarity(vectorizer(decoded([event("read", user="carol", activity=2), event("read", user="bob")])))
    new, misplaced = found.by_type[:, at].tolist()
    assert new == NEW_NAME_SURPRISE and misplaced == pytest.approx(expected(0, 100))


def test_a_name_that_came_lately_is_no_odder_than_one_that_is_new() -> None:
    usual = [event("read")] * 500
    days = [usual, usual, [*usual, *[event("read", user="bob")] * 10]]
    _, vectorizer, rarity = over(days)
    found = rarity(vectorizer(decoded([event("read", user="bob"), event("read", user="carol")])))
    lately, new = found.by_type[:, rarity.names.index("user.name")].tolist()
    assert lately == new == NEW_NAME_SURPRISE


def test_a_value_never_seen_is_as_likely_as_what_came_in_one_block_alone() -> None:
    """Where each day brings something new, which then goes on for hours, another news says little."""
    usual = [event("read")] * 60
    steady = [[*usual, *[event("list")] * 20]] * DAYS
    restless = [[*usual, *[event(f"job-{letter}")] * 20] for letter in "bcd"]
    for days, news in ((steady, 0), (restless, 20)):
        _, vectorizer, rarity = over(days)
        found = rarity(vectorizer(decoded([event("job-z")])))
        assert found.by_type[:, rarity.names.index("unmapped.action")].tolist() == pytest.approx([expected(news, 80)])


def test_weights_are_counts() -> None:
    rows = VECTORIZER(decoded(TRAINING))
    one_by_one = ContextRarity.fit(SCHEMA, rows, np.ones((len(rows), DAYS)))
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
    again = ContextRarity(SCHEMA, *(torch.from_numpy(getattr(RARITY, name).numpy()) for name in TENSORS))
    rows = features(event("read"), event("never"))
    assert torch.equal(again(rows).by_type, RARITY(rows).by_type)
