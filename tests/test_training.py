"""The promises of training: the same seed gives the same weights, the identity path keeps distances and is not trained,
the network learns which values belong together and does not punish news, and features of any kind can be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_schema import decoded, feed, learn

from encoder.features.schema import FIRST, Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models.record_network import HEAD_VALUES, network_codes, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.training import replaced_fields as training
from encoder.training.replaced_fields import fit_identity, initial_network, train
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
    initial = initial_network(schema, features, weights, seed=seed)
    net, report = train(initial, schema, features, weights, seed=seed, device=torch.device("cpu"))
    return schema, features, net, report


def logits(net: TabularResNet, features: FeatureBatch) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.no_grad():
        codes = torch.from_numpy(network_codes(features.codes, net.sizes))
        return net(codes, torch.from_numpy(features.quantiles)).numpy()


def embedded(net: TabularResNet, features: FeatureBatch) -> torch.Tensor:
    with torch.no_grad():
        return net.embed(
            torch.from_numpy(network_codes(features.codes, net.sizes)), torch.from_numpy(features.quantiles)
        )


def test_a_seed_gives_the_same_weights_and_another_gives_others() -> None:
    one, two, other = (trained(feed(), seed)[2].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("identity"))


def test_a_trained_network_is_still() -> None:
    _, _, net, report = trained(feed())
    assert report.steps == 200 and len(report.losses) == 2
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
        seed=0,
        device=torch.device("cpu"),
        progress=lambda step, steps, loss: told.append((step, steps, loss)),
    )
    assert [step for step, _, _ in told] == [100, 200] and {steps for _, steps, _ in told} == {200}


def test_a_training_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    schema, features, weights = rows(feed())

    def run(checkpoint: Path | None, killed_at: int = 10_000) -> dict[str, torch.Tensor]:
        def progress(step: int, steps: int, loss: float) -> None:
            if step >= killed_at:
                raise KeyboardInterrupt

        net = initial_network(schema, features, weights, seed=0)
        cpu = torch.device("cpu")
        train(net, schema, features, weights, seed=0, device=cpu, checkpoint=checkpoint, progress=progress)
        return net.state_dict()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "kept", killed_at=100)
    whole, resumed = run(None), run(tmp_path / "kept")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def pairs(n: int) -> list[dict[str, Any]]:
    """a and b go together, c goes with neither, and the number goes with a."""
    generator = np.random.default_rng(0)
    return [
        {
            "unmapped": {
                "a": "xyz"[i % 3],
                "b": "uvw"[i % 3],
                "c": "klmnopq"[i % 7],
                "n": float(10.0 ** (1 + i % 3) * size),
            }
        }
        for i, size in enumerate(generator.uniform(1, 2, n).tolist())
    ]


def test_the_network_learns_which_values_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 500)
    schema, features, net, _ = trained(pairs(840))
    names = [field.name for field in schema.fields]
    never, usual = {"a": "x", "b": "v", "c": "k", "n": 15.0}, {"a": "x", "b": "u", "c": "q", "n": 15.0}
    heavy = usual | {"n": 1500.0}
    asked = Vectorizer(schema)(decoded([{"unmapped": values} for values in (never, usual, heavy)]))
    found = logits(net, asked)
    summed = np.logaddexp(0, found).sum(1)
    assert summed[0] > np.quantile(np.logaddexp(0, logits(net, features)).sum(1), 0.99) > summed[1]
    assert names[found[0].argmax()] == "unmapped.b", "a and n agree"
    assert summed[2] > summed[1] + 1 and found[2, names.index("unmapped.n")] > found[1, names.index("unmapped.n")]


def test_news_is_not_punished(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that training did not have costs nothing, and does not hide what is wrong beside it."""
    monkeypatch.setattr(training, "STEPS", 500)
    events = pairs(840)
    for i, event in enumerate(events):
        event["unmapped"]["word"] = f"w{i % 3}" if i % 4 else f"{'abcdefg'[i * 7 // 840]}{i % 5}"
    schema, _, net, _ = trained(events)
    values = {"a": "x", "b": "u", "c": "q", "n": 15.0}
    asked = Vectorizer(schema)(decoded([{"unmapped": values | {"word": word}} for word in ("w1", "never")]))
    known, news = np.logaddexp(0, logits(net, asked)).sum(1)
    wrong = Vectorizer(schema)(decoded([{"unmapped": values | {"word": "never", "b": "v"}}]))
    assert news < known + 1
    assert np.logaddexp(0, logits(net, wrong)).sum() > news + 1


def test_names_of_entities_are_not_judged() -> None:
    schema, _, net, _ = trained([{"user": {"name": "abc"[i % 3]}, "unmapped": {"a": "xy"[i % 2]}} for i in range(60)])
    at = [field.name for field in schema.fields].index("user.name")
    assert not net.judged[at] and net.judged[0]


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
