"""The promises of the networks: the published depths, widths and sizes, an embedding that is not trained, and
gradients that reach the first layer."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from encoder.models import presets, resnet
from encoder.models.presets import PRESETS, BasicBlock, BottleneckBlock, StagedResNet, gradient_magnitudes
from encoder.models.resnet import TabularBlock, TabularResNet

SIZES, NUMBERS, EMBEDDING = [3, 5, 9], 2, 8


def flat() -> TabularResNet:
    return TabularResNet(sizes=SIZES, numbers=NUMBERS, width=32, depth=3, embedding=EMBEDDING)


def staged() -> TabularResNet:
    return StagedResNet("resnet18", sizes=SIZES, numbers=NUMBERS, embedding=EMBEDDING)


def rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, size, (n,), generator=generator) for size in SIZES], 1)
    return codes, torch.rand(n, NUMBERS, generator=generator)


def weights(block: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in block.layers)  # type: ignore[union-attr, arg-type]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """On one thread: more of them wait for each other on a busy machine."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Depths, widths, sizes


@pytest.mark.parametrize(
    ("name", "block", "depths", "layers"),
    [
        ("resnet18", BasicBlock, [2, 2, 2, 2], 18),
        ("resnet34", BasicBlock, [3, 4, 6, 3], 34),
        ("resnet50", BottleneckBlock, [3, 4, 6, 3], 50),
        ("resnet101", BottleneckBlock, [3, 4, 23, 3], 101),
        ("resnet152", BottleneckBlock, [3, 8, 36, 3], 152),
    ],
)
def test_presets_have_the_published_depths_and_widths(
    name: str, block: type[BasicBlock | BottleneckBlock], depths: list[int], layers: int
) -> None:
    net = StagedResNet(name, sizes=SIZES, numbers=NUMBERS, embedding=EMBEDDING)
    assert all(type(b) is block for b in net.blocks)
    inner = [b.layers[0].out_features for b in net.blocks]
    assert inner == [width for width, depth in zip([64, 128, 256, 512], depths, strict=True) for _ in range(depth)]
    outer = [b.layers[-1].out_features for b in net.blocks]
    assert outer == [block.expansion * width for width in inner]
    assert 2 + sum(len(b.layers) for b in net.blocks) == layers  # the map in, the blocks, the map out
    projected = [i for i, b in enumerate(net.blocks) if isinstance(b.shortcut, nn.Linear)]
    changes = [i for i, (a, b) in enumerate(zip([64, *outer], outer, strict=False)) if a != b]
    assert projected == changes


def test_the_names_are_the_five() -> None:
    assert list(PRESETS) == ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    with pytest.raises(KeyError):
        StagedResNet("resnet19", sizes=SIZES, numbers=NUMBERS, embedding=EMBEDDING)


def test_weights_of_a_block_at_width_256() -> None:
    basic, bottleneck = BasicBlock(256, 256), BottleneckBlock(256, 64)
    assert weights(basic) == 131_072
    assert [tuple(layer.weight.shape) for layer in bottleneck.layers] == [(64, 256), (64, 64), (256, 64)]
    assert weights(bottleneck) == 36_864
    assert not any(layer.bias is not None for block in (basic, bottleneck) for layer in block.layers)


@pytest.mark.parametrize("module", [presets, resnet])
def test_examples(module: object) -> None:
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0  # type: ignore[arg-type]


# Identity


def test_a_block_is_the_identity_where_it_adds_nothing() -> None:
    x = torch.randn(5, 32)
    assert torch.equal(TabularBlock(32, 64)(x), x)
    for block in (BasicBlock(32, 32), BottleneckBlock(32, 8)):
        nn.init.zeros_(block.layers[-1].weight)  # type: ignore[arg-type]
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("build", [flat, staged])
def test_the_embedding_is_a_fixed_linear_map(build: Callable[[], TabularResNet]) -> None:
    net = build()
    net.identity_codes.normal_()
    net.identity_numbers.normal_()
    net.identity_bias.normal_()
    codes, quantiles = rows(20)
    one_hot = torch.zeros(20, len(net.identity_codes)).scatter(1, codes + net.offsets, 1.0)
    expected = one_hot @ net.identity_codes + quantiles @ net.identity_numbers + net.identity_bias
    assert torch.allclose(net.embed(codes, quantiles), expected, atol=1e-5)
    assert "identity_codes" not in dict(net.named_parameters())  # fitted, never trained


# Shapes and batches


@pytest.mark.parametrize("build", [flat, staged])
def test_every_field_gets_a_logit_and_those_that_are_not_judged_none(build: Callable[[], TabularResNet]) -> None:
    net = build()
    codes, quantiles = rows(20)
    assert net(codes, quantiles).shape == (20, len(SIZES)) and torch.all(torch.isfinite(net(codes, quantiles)))
    net.judged[1] = False
    assert torch.all(torch.isinf(net(codes, quantiles)[:, 1])) and torch.all(
        torch.isfinite(net(codes, quantiles)[:, 0])
    )


@pytest.mark.parametrize("build", [flat, staged])
def test_an_event_has_the_same_logits_in_any_batch(build: Callable[[], TabularResNet]) -> None:
    net = build().eval()
    codes, quantiles = rows(65)
    with torch.no_grad():
        together = net(codes, quantiles)
        for cut in (2, 64):
            apart = torch.cat([net(c, q) for c, q in zip(codes.split(cut), quantiles.split(cut), strict=True)])
            assert torch.allclose(apart, together, atol=1e-5)


@pytest.mark.parametrize("build", [flat, staged])
def test_no_numbers_and_no_events_are_fine(build: Callable[[], TabularResNet]) -> None:
    codes, quantiles = rows(0)
    assert build()(codes, quantiles).shape == (0, len(SIZES))
    net = TabularResNet(sizes=SIZES, numbers=0, width=16, depth=1, embedding=4)
    assert net.embed(rows(3)[0], torch.zeros(3, 0)).shape == (3, 4)
    assert net(rows(3)[0], torch.zeros(3, 0)).shape == (3, len(SIZES))


@pytest.mark.parametrize("build", [flat, staged])
def test_every_weight_learns(build: Callable[[], TabularResNet]) -> None:
    net = build()
    for block in net.blocks:
        if isinstance(block, TabularBlock):
            nn.init.normal_(block.project.weight, std=0.1)
    codes, quantiles = rows(50)
    net(codes, quantiles).square().sum().backward()
    assert all(p.grad is not None and torch.any(p.grad != 0) for p in net.parameters())


# Gradients


@pytest.mark.parametrize("seed", range(5))
def test_gradients_reach_the_first_layer_of_a_residual_stack_alone(seed: int) -> None:
    """DESIGN.md: width 128, default initialisation, no normalisation, 20 layers."""
    plain = gradient_magnitudes(residual=False, layers=20, width=128, seed=seed)
    residual = gradient_magnitudes(residual=True, layers=20, width=128, seed=seed)
    assert plain.shape == residual.shape == (20,)
    assert plain[-1] / plain[0] > 1e5
    assert residual.max() / residual.min() < 10


def test_the_stack_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert np.array_equal(gradient_magnitudes(residual=True, seed=3), gradient_magnitudes(residual=True, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_both_stacks_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    from streamer.cli.plots import plot_gradients

    plain, residual = plot_gradients(tmp_path / "gradients.png")
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")
    assert plain[0] < 1e-5 * plain[-1] and len(residual) == 20
