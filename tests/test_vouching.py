"""Which training events vouch for others, and what the record score makes of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray

from encoder.features.learner import SchemaLearner
from encoder.features.schema import Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models.rarity import ContextRarity
from encoder.models.record_encoder import RecordEncoder
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from encoder.training import replaced_fields
from encoder.training.replaced_fields import initial_network
from streamer.detection.record_score import FAR, FOR_TYPE, NEAR, PARTS, REPLACED, strongest
from streamer.training.fit import fit_record
from streamer.training.vouching import OUTSIDERS, types_with_quantities, vouching

NORMAL, ATTACKS = 1500, 30


def flow(generator: np.random.Generator, *, attack: bool = False) -> dict[str, Any]:
    size = generator.lognormal(13 if attack else 6, 0.05 if attack else 0.5)
    return {
        "class_uid": 4001,
        "activity_id": 6,
        "time": 1_760_000_000_000,
        "connection_info": {"protocol_name": "udp" if attack else str(generator.choice(["tcp", "tcp", "icmp"]))},
        "traffic": {"bytes": int(size), "packets": int(size / 300) + 1},
    }


def features_of(events: list[dict[str, Any]]) -> tuple[Schema, FeatureBatch]:
    batch, _ = decode([Message("t", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)])
    learner = SchemaLearner()
    learner.add(batch)
    schema = learner.finish()
    return schema, Vectorizer(schema)(batch)


def spread(n: int) -> NDArray[np.float64]:
    """Each row in one block of seven, by turns of a run."""
    return np.eye(7)[np.arange(n) * 7 // n]


@pytest.fixture(scope="module")
def dirty() -> tuple[Schema, FeatureBatch, NDArray[np.bool_]]:
    """Flows of which 2 % are attacks that nobody labelled, anywhere in time."""
    generator = np.random.default_rng(0)
    attack = generator.permutation(np.arange(NORMAL + ATTACKS) < ATTACKS)
    schema, features = features_of([flow(generator, attack=each) for each in attack.tolist()])
    return schema, features, attack


def test_unlabelled_attacks_do_not_vouch_and_hardly_anything_normal_is_lost(
    dirty: tuple[Schema, FeatureBatch, NDArray[np.bool_]],
) -> None:
    schema, features, attack = dirty
    weights = np.ones(len(features))
    in_block = spread(len(features))
    rarity = ContextRarity.fit(schema, features, in_block)
    net = initial_network(schema, features, weights, seed=0)
    vectors = RecordEncoder(schema, net, rarity, torch.device("cpu")).vectors(features)
    keep = vouching(schema, features, in_block, vectors, seed=0)
    assert not keep[attack].any()
    assert (~keep).sum() <= OUTSIDERS * len(features) + 1


def test_a_type_of_names_alone_loses_nothing() -> None:
    generator = np.random.default_rng(0)
    events = [
        {
            "class_uid": 3002,
            "activity_id": 1,
            "time": 1_760_000_000_000,
            "user": {"name": f"u{generator.integers(20)}"},
            "auth_protocol": str(generator.choice(["ntlm", "kerberos"])),
        }
        for _ in range(500)
    ]
    schema, features = features_of(events)
    assert len(types_with_quantities(schema, features, np.ones(500))) == 0
    assert vouching(schema, features, spread(500), np.zeros((500, 4), np.float16), seed=0).all()


def test_the_record_score_finds_the_next_attack_though_training_held_some(
    dirty: tuple[Schema, FeatureBatch, NDArray[np.bool_]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaced_fields, "STEPS", 100)
    schema, features, _ = dirty
    generator = np.random.default_rng(1)
    vectorize = Vectorizer(schema)

    def more(n: int, *, attack: bool) -> FeatureBatch:
        events = [flow(generator, attack=attack) for _ in range(n)]
        return vectorize(decode([Message("t", 0, i, -1, orjson.dumps(e)) for i, e in enumerate(events)])[0])

    held, normal, attacks = more(300, attack=False), more(300, attack=False), more(20, attack=True)
    part = fit_record(schema, features, spread(len(features)), held, seed=0, device=torch.device("cpu"))

    def judged(asked: FeatureBatch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        types = asked.codes[:, 0].astype(np.int64)
        parts = part.scorer.parts(part.scorer.raw(part.encoder.encode(asked), types), types)
        return parts, part.scorer.evidence(parts, types)

    (_, usual), (parts, odd) = judged(normal), judged(attacks)
    assert np.quantile(odd, 0.1) > np.quantile(usual, 0.99)
    assert parts[PARTS.index(FAR)].min() > 2 and parts[PARTS.index(NEAR)].min() > 2
    assert not parts[PARTS.index(FOR_TYPE)].any(), "it speaks of types without quantities alone"
    assert strongest(parts, np.isin(PARTS, (FAR, NEAR, REPLACED))).mean() > 0.5


def test_evidence_of_held_out_events_is_as_rare_as_it_says(
    dirty: tuple[Schema, FeatureBatch, NDArray[np.bool_]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaced_fields, "STEPS", 30)
    schema, features, _ = dirty
    half = np.arange(len(features)) % 2 == 0
    fitted, held = features.take(np.flatnonzero(half)), features.take(np.flatnonzero(~half))
    part = fit_record(schema, fitted, spread(len(fitted)), held, seed=0, device=torch.device("cpu"))
    for p in (0.5, 0.1, 0.02):
        assert np.mean(part.held_out >= -np.log(p)) == pytest.approx(p, rel=0.3)
