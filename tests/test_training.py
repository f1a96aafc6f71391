"""The promises of training: the same seed gives the same weights, the identity path keeps distances and is not trained,
the network learns which values go together, and features of any kind can be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_schema import decoded, feed, learn

from encoder.features.schema import FIRST, Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models.record_network import HEAD_VALUES, network_codes, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.training import masked_fields as training
from encoder.training.masked_fields import fit_identity, initial_network, train
from encoder.training.trainer import TrainingRun


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few steps, on one thread: the threads of so small a network wait for each other on a busy machine."""
    monkeypatch.setattr(training, "STEPS", 200)
    monkeypatch.setattr(training, "BATCH", 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(events: Sequence[dict[str, Any]]) -> tuple[Schema, FeatureBatch, np.ndarray[Any, np.dtype[np.float64]]]:
    schema = learn(events)
    features = Vectorizer(schema)(decoded(events))
    first, like = features.distinct()
    return schema, features.take(first), np.bincount(like).astype(np.float64)


def trained(events: Sequence[dict[str, Any]], seed: int = 0) -> tuple[Schema, FeatureBatch, TabularResNet, TrainingRun]:
    schema, features, weights = rows(events)
    held = features.take(np.arange(len(features) // 2, len(features)))
    initial = initial_network(schema, features, weights, seed=seed)
    net, report = train(initial, schema, features, weights, held, seed=seed, device=torch.device("cpu"))
    return schema, features, net, report


def embedded(net: TabularResNet, features: FeatureBatch) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.from_numpy(network_codes(features.codes, net.sizes)), torch.from_numpy(features.quantiles))


def test_a_seed_gives_the_same_weights_and_another_gives_others() -> None:
    one, two, other = (trained(feed(), seed)[2].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["heads.weight"], other["heads.weight"])
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("identity"))


def test_the_weights_kept_are_those_of_the_least_validation_loss() -> None:
    _, _, net, report = trained(feed())
    assert report.steps <= 200 and len(report.losses) == len(report.validation) > 0
    assert np.all(np.isfinite(report.losses)) and report.losses[-1] < report.losses[0]
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_progress_is_told() -> None:
    schema, features, weights = rows(feed())
    told: list[tuple[int, int, float]] = []
    train(
        initial_network(schema, features, weights, seed=0),
        schema,
        features,
        weights,
        features,
        seed=0,
        device=torch.device("cpu"),
        progress=lambda step, steps, loss: told.append((step, steps, loss)),
    )
    assert [step for step, _, _ in told] == [100, 200] and {steps for _, steps, _ in told} == {200}


def test_the_network_learns_which_values_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 400)
    pairs = [{"unmapped": {"a": "xyz"[i % 3], "b": "uvw"[i % 3], "c": "klmnopq"[i % 7]}} for i in range(420)]
    schema, features, net, _ = trained(pairs)
    b = [field.name for field in schema.fields].index("unmapped.b")
    codes = torch.from_numpy(network_codes(features.codes, net.sizes))
    truth = codes[:, b].clone()
    codes[:, b] = net.mask_tokens[b]
    with torch.no_grad():
        p = net.log_probabilities(net(codes, torch.from_numpy(features.quantiles)))[b].exp()
    assert (p.argmax(1) == truth).all() and p.gather(1, truth[:, None]).min() > 0.5


def test_the_identity_path_keeps_distances_of_the_features() -> None:
    """With fewer directions than the embedding has, distances are those of scaled one-hots and quantiles."""
    schema, features, weights = rows([{"unmapped": {"a": "xyz"[i % 3], "n": float(i * i)}} for i in range(90)])
    net = TabularResNet(sizes=network_sizes(schema), numbers=1, width=16, depth=1, embedding=64)
    fit_identity(net, schema, features, weights)
    z = embedded(net, features).numpy()
    a = features.codes[:, [field.name for field in schema.fields].index("unmapped.a")]
    n = 2.0 * features.quantiles[:, 0]
    differ = 2.0 * (a[:, None] != a[None, :]) + (n[:, None] - n[None, :]) ** 2
    assert np.allclose(((z[:, None] - z[None, :]) ** 2).sum(-1), differ, atol=1e-4)
    assert np.allclose(np.average(z, axis=0, weights=weights), 0, atol=1e-4)


def test_a_new_name_moves_nothing_in_the_identity_path() -> None:
    schema, features, weights = rows(
        [{"user": {"name": "abcdef"[i % 6]}, "unmapped": {"a": "xy"[i % 2]}} for i in range(60)]
    )
    net = TabularResNet(sizes=network_sizes(schema), numbers=0, width=16, depth=1, embedding=64)
    fit_identity(net, schema, features, weights)
    vectorize = Vectorizer(schema)
    never, absent = embedded(
        net, vectorize(decoded([{"user": {"name": n}, "unmapped": {"a": "x"}} for n in ("new", None)]))
    )
    assert torch.allclose(never, absent, atol=1e-6)


def test_rare_values_share_the_last_code_of_the_network() -> None:
    schema, features, _ = rows([{"unmapped": {"a": chr(97 + i % 20) + chr(97 + i // 20 % 10)}} for i in range(1_000)])
    sizes = network_sizes(schema)
    at = [field.name for field in schema.fields].index("unmapped.a")
    codes = network_codes(features.codes, sizes)
    assert schema.fields[at].size == FIRST + 200 and sizes[at] == FIRST + HEAD_VALUES + 1
    assert codes.max(0)[at] == sizes[at] - 1 and np.all(codes < sizes)


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([{}] * 50, id="all events equal"),
        pytest.param([{"unmapped": {"n": float(i)}} for i in range(50)], id="one number and nothing else"),
        pytest.param([{"unmapped": {"a": "xy"[i % 2]}} for i in range(50)], id="no numbers"),
    ],
)
def test_poor_features_can_be_trained_on(events: list[dict[str, Any]]) -> None:
    _, features, net, report = trained(events)
    assert torch.all(torch.isfinite(embedded(net, features))) and np.all(np.isfinite(report.losses))


def test_training_without_a_validation_slice_keeps_the_last_weights() -> None:
    schema, features, weights = rows(feed())
    none = features.take(np.empty(0, np.intp))
    net = initial_network(schema, features, weights, seed=0)
    _, report = train(net, schema, features, weights, none, seed=0, device=torch.device("cpu"))
    assert report.validation == [] and report.steps == 200
