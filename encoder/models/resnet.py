"""Residual networks over tabular features, after He et al. 2016 (arXiv:1512.03385) and Gorishniy et al. 2021
(arXiv:2106.11959). The whole network is in this file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

VALUE = 32
"""Width of the vector of a value that its logit is the product with."""
OWN_STD = 0.3


class TabularBlock(nn.Module):
    """Pre-norm residual block, x + W2 gelu(W1 norm(x)): float32 [n, width] to the same. The last layer starts at zero:
    an untrained block is the identity."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.project = nn.Linear(hidden, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(functional.gelu(self.expand(self.norm(x))))
        return x + out


class TabularResNet(nn.Module):
    """Maps codes and quantiles to an embedding, and to a logit for each field: does its value belong to another event?

    sizes: codes of each field; numbers: the number of quantiles. The embedding is a fixed linear map of the features
    (the identity path: neighbours in it are neighbours in the well-scaled raw features). The logits come from residual
    blocks: that of a field is the product of what the rest of the event says and a vector of its value.

    >>> net = TabularResNet(sizes=[3, 5], numbers=1, width=16, depth=2, embedding=4)
    >>> codes, quantiles = torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 1)
    >>> net.embed(codes, quantiles).shape, net(codes, quantiles).shape
    (torch.Size([7, 4]), torch.Size([7, 2]))
    """

    identity_codes: Tensor
    identity_numbers: Tensor
    identity_bias: Tensor
    judged: Tensor
    offsets: Tensor

    def __init__(self, *, sizes: Sequence[int], numbers: int, width: int, depth: int, embedding: int) -> None:
        super().__init__()
        self.sizes = list(sizes)
        total = sum(self.sizes)
        starts = np.cumsum([0, *self.sizes[:-1]]).astype(np.int64)
        self.register_buffer("offsets", torch.from_numpy(starts), persistent=False)
        self.register_buffer("identity_codes", torch.zeros(total, embedding))
        self.register_buffer("identity_numbers", torch.zeros(numbers, embedding))
        self.register_buffer("identity_bias", torch.zeros(embedding))
        self.register_buffer("judged", torch.ones(len(self.sizes), dtype=torch.bool))
        self.values = nn.Embedding(total, width)
        nn.init.normal_(self.values.weight, std=len(self.sizes) ** -0.5)
        self.numbers = nn.Parameter(torch.randn(numbers, width) * max(numbers, 1) ** -0.5)
        self.blocks = nn.ModuleList(TabularBlock(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = self._head(width)
        self.own = nn.Embedding(total, VALUE + 1)
        nn.init.normal_(self.own.weight, std=OWN_STD)
        nn.init.zeros_(self.own.weight[:, VALUE])

    def _head(self, width: int) -> nn.Linear:
        return nn.Linear(width, len(self.sizes) * (VALUE + 1))

    def embed(self, codes: Tensor, quantiles: Tensor) -> Tensor:
        """int64 [n, fields], float32 [n, numbers] to float32 [n, embedding]."""
        identity = functional.embedding_bag(codes + self.offsets, self.identity_codes, mode="sum")
        return identity + quantiles @ self.identity_numbers + self.identity_bias

    def forward(self, codes: Tensor, quantiles: Tensor) -> Tensor:
        """int64 [n, fields], float32 [n, numbers] to float32 [n, fields]: the logits; -inf for fields that are not
        judged."""
        index = codes + self.offsets
        hidden = functional.embedding_bag(index, self.values.weight, mode="sum") + (2 * quantiles - 1) @ self.numbers
        for block in self.blocks:
            hidden = block(hidden)
        rest = self.head(self.norm(hidden)).view(len(codes), len(self.sizes), VALUE + 1)
        own = self.own(index)
        logits: Tensor = (rest[..., :VALUE] * own[..., :VALUE]).sum(2) + rest[..., VALUE] + own[..., VALUE]
        return logits.masked_fill(~self.judged, float("-inf"))
