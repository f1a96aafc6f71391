"""Rate profiles: the highest level of each count that each entity reached in training, and how far an event exceeds it.

A server talks to everybody all day; a workstation that does is unusual. An entity that training did not have (a
stranger) is compared with what its kind seldom exceeds. Promises to store entities as hashes only. It does not weigh
the excess: `streamer.detection.rate_score` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.rolling_counts import LEVELS

MAX_ENTITIES = 1_000_000
"""16 bytes each; of more entities, those with the lowest levels are treated as strangers."""
SELDOM = 0.999
"""The share of the entities of a kind that never exceed the level that strangers are compared with. A new entity may be
like any other, also like the few most active ones: a new workstation is not unusual because most addresses are
visitors. Measured in docs/detection.md."""
BLOCKS = 7
"""Parts of the training time. Each is judged by the others, because nothing exceeds its own maximum."""
BANDS = (1, 13, 31)
"""Borders of own levels: counts of none, up to three, up to thirty, more. Doubling three is less unusual than doubling
thirty."""
STRANGER = len(BANDS) + 1
GROUPS = STRANGER + 1


@dataclass(frozen=True)
class RateExcess:
    """The excess of m events over 8 counts. over: float64 [m, 8], levels above the profile, NaN where the event did not
    raise the count; group: int8 [m, 8], how the entity is known (0 to 3: the band of its own level, or STRANGER)."""

    over: NDArray[np.float64]
    group: NDArray[np.int8]

    def take(self, rows: NDArray[Any]) -> RateExcess:
        return RateExcess(self.over[rows], self.group[rows])


@lru_cache(maxsize=16_384)
def _key(entity: str) -> int:
    return int.from_bytes(blake2b(entity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hashed(entities: Sequence[str]) -> NDArray[np.uint64]:
    """uint64 [m]: the hashes of entities, as bundles store them."""
    return np.array([_key(name) for name in entities], np.uint64)


class RateProfiles:
    """The profiles of e entities. keys: uint64 [e], ascending hashes; most: uint8 [e, 8], the highest level of each
    count; usual: uint8 [kinds, 8], the levels that strangers of each kind are compared with; kinds: int8 [e]."""

    def __init__(
        self, keys: NDArray[np.uint64], most: NDArray[np.uint8], usual: NDArray[np.uint8], kinds: NDArray[np.int8]
    ) -> None:
        self.keys, self.most, self.usual, self.kinds = keys, most, usual, kinds

    @classmethod
    def fit(
        cls,
        entities: Sequence[str],
        kind: NDArray[np.int8],
        levels: NDArray[np.uint8],
        time: NDArray[np.int64],
        *,
        kinds: int,
    ) -> tuple[RateProfiles, RateExcess]:
        """Learn from m pairs of training event and entity, and judge each block of time by the others.

        kind: int8 [m]; levels: uint8 [m, 8] as `Windows.levels`; time: int64 [m], event ms; kinds: the number of kinds.
        """
        names, entity = np.unique(np.array(entities, object).astype(str), return_inverse=True)
        span = max(int(np.ptp(time)) + 1, 1) if len(time) else 1
        block = (time - time.min(initial=time[0] if len(time) else 0)) * BLOCKS // span
        reached = np.zeros((len(names), BLOCKS, len(LEVELS)), np.uint8)
        np.maximum.at(reached, (entity, block), levels)
        there = np.zeros((len(names), BLOCKS), np.bool_)
        there[entity, block] = True
        most = reached.max(1, initial=0)
        of_kind = np.zeros(len(names), np.int8)
        of_kind[entity] = kind
        usual = np.zeros((kinds, len(LEVELS)), np.uint8)
        for k in np.unique(of_kind).tolist():
            usual[k] = np.quantile(most[of_kind == k], SELDOM, axis=0, method="lower")
        best = reached.argmax(
            1
        )  # the block with the maximum; judged without itself, its entity has the second highest level
        without = np.array(reached)
        np.put_along_axis(without, best[:, None], 0, axis=1)
        second = without.max(1, initial=0)
        own = np.where(best[entity] == block[:, None], second[entity], most[entity])
        known = there.sum(1)[entity] > 1
        excess = _excess(levels, own, known, usual[kind])
        keys = hashed(names.tolist())
        kept = np.argsort(-most.astype(np.int64).sum(1), kind="stable")[:MAX_ENTITIES]
        kept = kept[np.argsort(keys[kept], kind="stable")]
        return cls(keys[kept], most[kept], usual, of_kind[kept]), excess

    def own(self, entities: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """uint8 [m, 8], the highest levels of these entities in training; bool [m], whether training had them."""
        if not len(self.keys):
            return np.zeros((len(entities), len(LEVELS)), np.uint8), np.zeros(len(entities), np.bool_)
        wanted = hashed(entities)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return self.most[at], self.keys[at] == wanted

    def peers(self, entity: str, kind: int) -> NDArray[np.uint8]:
        """uint8 [o, 8]: the highest levels of the other entities of this kind in training."""
        most: NDArray[np.uint8] = self.most[(self.kinds == kind) & (self.keys != np.uint64(_key(entity)))]
        return most

    def excess(self, entities: Sequence[str], kind: NDArray[np.int8], levels: NDArray[np.uint8]) -> RateExcess:
        """How far m events exceed the profiles of their entities; arrays as in `fit`."""
        own, known = self.own(entities)
        return _excess(levels, own, known, self.usual[kind])


def _excess(
    levels: NDArray[np.uint8], own: NDArray[np.uint8], known: NDArray[np.bool_], usual: NDArray[np.uint8]
) -> RateExcess:
    group = np.where(known[:, None], np.searchsorted(BANDS, own, side="right"), STRANGER).astype(np.int8)
    measure = np.where(known[:, None], own, usual).astype(np.float64)
    return RateExcess(np.where(levels > 0, levels - measure, np.nan), group)
