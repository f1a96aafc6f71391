"""Multi-stage residual networks over tabular features, after He et al. 2016 (arXiv:1512.03385), with their published
depths and widths, and a measurement of gradients with and without shortcuts.

Blocks are in the pre-activation form (He et al. 2016b, arXiv:1603.05027), which leaves the shortcut untouched, with
layer normalisation, so that an event's logits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from encoder.models.resnet import TabularResNet

STAGES = (64, 128, 256, 512)


class _Block(nn.Module):
    """x + f(x), with x projected where f changes the width; f: normalise, ReLU, linear, for each layer. A normalisation
    after it makes a bias redundant, so that there is one only without norm."""

    def __init__(self, widths: Sequence[int], *, norm: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for width in widths[:-1])
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=not norm) for a, b in pairwise(widths))
        same = widths[0] == widths[-1]
        self.shortcut: nn.Module = nn.Identity() if same else nn.Linear(widths[0], widths[-1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out = layer(functional.relu(norm(out)))
        shortcut: Tensor = self.shortcut(x)
        return shortcut + out


class BasicBlock(_Block):
    """Two layers: float32 [n, before] to [n, width].

    >>> sum(layer.weight.numel() for layer in BasicBlock(256, 256).layers)
    131072
    """

    expansion = 1

    def __init__(self, before: int, width: int, *, norm: bool = True) -> None:
        super().__init__((before, width, width), norm=norm)


class BottleneckBlock(_Block):
    """Three layers, narrow in the middle: float32 [n, before] to [n, 4 width].

    >>> sum(layer.weight.numel() for layer in BottleneckBlock(256, 64).layers)
    36864
    """

    expansion = 4

    def __init__(self, before: int, width: int, *, norm: bool = True) -> None:
        super().__init__((before, width, width, self.expansion * width), norm=norm)


@dataclass(frozen=True)
class Preset:
    """The block of a preset, and the number of blocks in the stages of width 64, 128, 256 and 512."""

    block: type[BasicBlock] | type[BottleneckBlock]
    depths: tuple[int, int, int, int]


PRESETS = {
    "resnet18": Preset(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Preset(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Preset(BottleneckBlock, (3, 4, 6, 3)),
    "resnet101": Preset(BottleneckBlock, (3, 4, 23, 3)),
    "resnet152": Preset(BottleneckBlock, (3, 8, 36, 3)),
}


class StagedResNet(TabularResNet):
    """`TabularResNet` with the blocks of a preset in place of its own, to be trained and used like it. Raises KeyError
    for an unknown preset.

    Its layers are the input map, those of the blocks and the output map, 18 to 152 together; shortcuts do not count.

    >>> net = StagedResNet("resnet18", sizes=[3, 5], numbers=1, embedding=4)
    >>> net(torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 1)).shape
    torch.Size([7, 2])
    """

    def __init__(self, preset: str, *, sizes: Sequence[int], numbers: int, embedding: int) -> None:
        block, depths = PRESETS[preset].block, PRESETS[preset].depths
        super().__init__(sizes=sizes, numbers=numbers, width=STAGES[0], depth=0, embedding=embedding)
        width = STAGES[0]
        for stage, depth in zip(STAGES, depths, strict=True):
            for _ in range(depth):
                self.blocks.append(block(width, stage))
                width = stage * block.expansion
        self.norm = nn.LayerNorm(width)
        self.head = self._head(width)


def gradient_magnitudes(*, residual: bool, layers: int = 20, width: int = 128, seed: int = 0) -> NDArray[np.float64]:
    """Mean absolute gradient of each layer's weights, float64 [layers] from first to last, in a stack of linear layers
    and ReLU at its default initialisation, without normalisation: plain, or with a shortcut around every two layers.

    The loss is the squared error against random targets. layers: even.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [BasicBlock(width, width, norm=False) for _ in range(layers // 2)]
    x, target = torch.randn(2, 256, width, generator=generator)
    for block in blocks:
        x = block(x) if residual else block(x) - x
    functional.mse_loss(x, target).backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for block in blocks for name, weight in block.named_parameters() if "weight" in name]
    return np.array([float(gradient.abs().mean()) for gradient in gradients if gradient is not None])
