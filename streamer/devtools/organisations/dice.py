"""Random draws by name: the same seed and name give the same numbers in every process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 32


class Dice:
    """A numpy Generator seeded by the parts of a name, with the few draws that the organisations need."""

    def __init__(self, *name: object) -> None:
        digest = blake2b("/".join(map(str, name)).encode(), digest_size=16).digest()
        self._rng = np.random.default_rng(int.from_bytes(digest, "big"))
        self._block: list[float] = []

    def random(self) -> float:
        """Uniform on [0, 1)."""
        if not self._block:
            self._block = self._rng.random(_BLOCK).tolist()
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def whole(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def normal(self) -> float:
        return math.sqrt(-2.0 * math.log(1.0 - self.random())) * math.cos(2.0 * math.pi * self.random())

    def around(self, median: float, spread: float = 1.0) -> float:
        """Log-normal."""
        return median * math.exp(spread * self.normal())

    def wait(self, mean: float) -> float:
        """Exponential."""
        return -math.log(1.0 - self.random()) * mean

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def skewed(self, items: Sequence[T], power: float = 2.0) -> T:
        """The first are the most frequent."""
        return items[int(self.random() ** power * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        left = self.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        mixed = list(items)
        for i in range(len(mixed) - 1, 0, -1):
            k = self.below(i + 1)
            mixed[i], mixed[k] = mixed[k], mixed[i]
        return mixed

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` distinct places of `items` at most, in random order."""
        return self.shuffled(items)[:count]

    def hex(self, digits: int) -> str:
        return "".join("0123456789abcdef"[int(self.random() * 16)] for _ in range(digits))
