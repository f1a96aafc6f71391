"""A causal temporal convolution network over the record embeddings and time gaps of a window."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 32
"""Members of a window that the network reads; a power of two."""
FEATURES = 32


class CausalBlock(nn.Module):
    """Pre-norm residual block over a slot and the one `dilation` before it: float32 [..., FEATURES] twice to once. The
    last layer starts at zero, so that an untrained block is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.now = nn.Linear(width, width)
        self.before = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, now: Tensor, before: Tensor) -> Tensor:
        hidden = functional.gelu(self.now(self.norm(now)) + self.before(self.norm(before)))
        out: Tensor = now + self.project(hidden)
        return out


class SequenceNet(nn.Module):
    """Predicts the code after each slot of a window.

    Input: vectors float32 [m, W, dim], gaps float32 [m, W, 2] (`gap_features`), used bool [m, W], kind int64 [m].
    Unused slots stand on the left: the entity had no earlier records. vocabulary: codes that are predicted.
    """

    def __init__(self, *, dim: int, vocabulary: int, kinds: int) -> None:
        super().__init__()
        self.records = nn.Linear(dim, FEATURES)
        self.gaps = nn.Linear(2, FEATURES, bias=False)
        self.kinds = nn.Embedding(kinds, FEATURES)
        self.nothing = nn.Parameter(torch.randn(FEATURES) * 0.1)
        self.blocks = nn.ModuleList(CausalBlock(FEATURES) for _ in range(WIDTH.bit_length() - 1))
        self.norm = nn.LayerNorm(FEATURES)
        self.next = nn.Linear(FEATURES, vocabulary)
        self.broken = nn.Linear(FEATURES, 1)  # for training only: detects broken windows

    def _slots(self, vectors: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        members = self.records(vectors) + self.gaps(gaps)
        slots: Tensor = torch.where(used[..., None], members, self.nothing) + self.kinds(kind)[:, None]
        return slots

    def all_slots(self, vectors: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        """float32 [m, W, FEATURES]: the state after each slot."""
        x = self._slots(vectors, gaps, used, kind)
        for level, block in enumerate(self.blocks):
            dilation = 1 << level
            x = block(x, functional.pad(x, (0, 0, dilation, 0))[:, :-dilation])
        return self.norm(x)  # type: ignore[no-any-return]

    def last_slots(self, vectors: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        """float32 [m, 2, FEATURES]: the last two of `all_slots`, for a third of the work: each level halves what the
        next one needs."""
        x = self._slots(vectors, gaps, used, kind)
        m = len(x)
        x = self.blocks[0](x, functional.pad(x, (0, 0, 1, 0))[:, :-1])
        x = x.view(m, WIDTH // 2, 2, FEATURES)
        for block in self.blocks[1:]:
            halves = x.view(m, -1, 2, 2, FEATURES)
            x = block(halves[:, :, 1], halves[:, :, 0])
        return self.norm(x[:, 0])  # type: ignore[no-any-return]


def gap_features(times: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Times to the gaps before each slot: float32 [m, W, 2], on a log scale (1 ms to a week: 0 to 1) and whether there
    was a member before. times: int64 [m, W], event ms."""
    gaps = np.zeros((*times.shape, 2), np.float32)
    both = used[:, 1:] & used[:, :-1]
    between = np.maximum(times[:, 1:] - times[:, :-1], 0)
    gaps[:, 1:, 0] = np.where(both, np.log1p(between) / math.log1p(AGE_MS), 0.0)
    gaps[:, 1:, 1] = both
    return gaps


def used_slots(length: NDArray[np.int32], width: int) -> NDArray[np.bool_]:
    """bool [m, W]: members stand on the right."""
    used: NDArray[np.bool_] = np.arange(width) >= width - length[:, None]
    return used


AGE_MS = 7 * 86_400_000
