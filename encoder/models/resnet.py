"""Residual networks over tabular features, after He et al. 2016 (arXiv:1512.03385) and Gorishniy et al. 2021
(arXiv:2106.11959). The whole network is in this file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


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
    """Maps codes and quantiles to an embedding, and the embedding back to every field.

    sizes: codes of each field, without its mask token; numbers: the number of quantiles. The embedding
    is the sum of a fixed linear map of the features (the identity path: neighbours in it are neighbours in the
    well-scaled raw features) and of what the residual blocks add.

    >>> net = TabularResNet(sizes=[3, 5], numbers=1, width=16, depth=2, embedding=4)
    >>> net(torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 1)).shape
    torch.Size([7, 4])
    """

    identity_codes: Tensor
    identity_numbers: Tensor
    identity_bias: Tensor
    offsets: Tensor

    def __init__(self, *, sizes: Sequence[int], numbers: int, width: int, depth: int, embedding: int) -> None:
        super().__init__()
        self.sizes = list(sizes)
        total = sum(self.sizes) + len(self.sizes)
        starts = np.concatenate([[0], np.cumsum(np.array(self.sizes, np.int64) + 1)[:-1]])
        self.register_buffer("offsets", torch.from_numpy(starts.astype(np.int64)), persistent=False)
        self.register_buffer("identity_codes", torch.zeros(total, embedding))
        self.register_buffer("identity_numbers", torch.zeros(numbers, embedding))
        self.register_buffer("identity_bias", torch.zeros(embedding))
        self.values = nn.Embedding(total, width)
        nn.init.normal_(self.values.weight, std=len(self.sizes) ** -0.5)
        self.numbers = nn.Parameter(torch.randn(numbers, width) * max(numbers, 1) ** -0.5)
        self.blocks = nn.ModuleList(TabularBlock(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.residual = nn.Linear(width, embedding)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        self.heads = nn.Linear(embedding, sum(self.sizes))

    @property
    def mask_tokens(self) -> Tensor:
        """int64 [fields]: the code that stands for a hidden field."""
        return torch.tensor(self.sizes, device=self.offsets.device)

    def parts(self, codes: Tensor, quantiles: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [n, fields], float32 [n, numbers] to identity and residual part, float32 [n, embedding] each."""
        index = codes + self.offsets
        identity = functional.embedding_bag(index, self.identity_codes, mode="sum")
        identity = identity + quantiles @ self.identity_numbers + self.identity_bias
        hidden = functional.embedding_bag(index, self.values.weight, mode="sum") + quantiles @ self.numbers
        for block in self.blocks:
            hidden = block(hidden)
        return identity, self.residual(self.norm(hidden))

    def forward(self, codes: Tensor, quantiles: Tensor) -> Tensor:
        """int64 [n, fields], float32 [n, numbers] to float32 [n, embedding]."""
        identity, residual = self.parts(codes, quantiles)
        return identity + residual

    def log_probabilities(self, embedding: Tensor) -> list[Tensor]:
        """float32 [n, embedding] to log p of every code, a float32 [n, size] a field."""
        return [functional.log_softmax(part, dim=1) for part in self.heads(embedding).split(self.sizes, dim=1)]
