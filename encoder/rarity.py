"""Conditional rarity: how unusual a value is for events of this type, and for this type from this actor, by counting.

Counting pairs is what a learned surprise has to beat on values seen a handful of times, so it is part of the encoder.
Promises exact counts (64-bit keys, no buckets shared) and a fixed memory for a fixed vocabulary. Method: -log of the
smoothed conditional frequency; what several attributes say of one object, or in other words of the same, is taken once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder.schema import UNKNOWN, Schema
from encoder.values import NETWORK
from encoder.vectorize import FeatureBatch, row_hash

TWINS = 0.98
"""Attributes are twins for an event type where so large a share of the values of each belongs to one value of the
other: a logon names its server by name, by address, and both again as the destination."""
_TWIN_ROWS = 4096
"""Distinct events of a type that are looked at for twins."""
_HIT, _SEEN = 0.5, 5.0
"""Added to the count of a value and of its context: an unseen value in a context seen often costs log(2 n)."""
NEW_NAME_SURPRISE = 2.0
"""At most this (nats) for a name of a user, host or address that training had not: new names come every day."""


@dataclass(frozen=True)
class Surprise:
    """-log p in nats, float32 [n, discrete fields] each: given the event type, and given the type and who acts; kind:
    int64 [n], the code of the event type."""

    by_type: Tensor
    by_actor: Tensor
    kind: Tensor


class ContextRarity:
    """Counts of (context, field, value) over training events.

    keys: int64 [m], sorted; counts: float32 [m]; groups: int64 [event types, discrete fields], which fields say one
    thing in several ways. Numbers are not counted: their bins are no values.
    """

    def __init__(self, schema: Schema, keys: Tensor, counts: Tensor, groups: Tensor) -> None:
        self.keys, self.counts, self.groups = keys, counts, groups
        self.columns = _discrete(schema)
        self.names = [schema.fields[i].name for i in self.columns]
        self._identity = torch.tensor([schema.fields[i].kind == "identity" for i in self.columns])
        # The hash of a row is a sum over its columns, so the part of (field, value) is worked out here, once. The first
        # place stands for a context alone.
        sizes = [1] + [schema.fields[i].size for i in self.columns]
        self._starts = np.cumsum([0, *sizes[:-1]])
        field = np.repeat(np.arange(-1, len(self.columns), dtype=np.int32), sizes)
        value = (np.arange(sum(sizes)) - np.repeat(self._starts, sizes)).astype(np.int32)
        rows = np.column_stack([np.zeros((len(field), 4), np.int32), field, value])
        self._parts = row_hash(rows) - row_hash(np.zeros((1, 6), np.int32))

    def to(self, device: torch.device) -> ContextRarity:
        for name in ("keys", "counts", "groups", "_identity"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @classmethod
    def fit(cls, schema: Schema, features: FeatureBatch, weights: NDArray[np.float64]) -> ContextRarity:
        """features: distinct rows; weights: float64 [n], how many training events each stands for."""
        rarity = cls(schema, torch.empty(0, dtype=torch.int64), torch.empty(0), _groups(schema, features))
        keys: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.float64]] = []
        for context in _contexts(features):
            whole = rarity._keys(features, context, [-1])[:, 0]
            for column in range(-1, len(rarity.columns)):
                k = rarity._keys(features, context, [column])[:, 0]
                distinct, first, inverse = np.unique(k, return_index=True, return_inverse=True)
                count = np.bincount(inverse, weights=weights, minlength=len(distinct)).astype(np.float64)
                if column >= 0:
                    # Good-Turing: a value never seen is as likely as all those together that were seen once.
                    once, times = np.unique(whole[first[count == 1]], return_counts=True)
                    keys.append(rarity._unknown(once, column))
                    counts.append(times.astype(np.float64))
                keys.append(distinct)
                counts.append(count)
        all_keys, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        rarity.keys = torch.from_numpy(all_keys)
        rarity.counts = torch.from_numpy(np.bincount(inverse, weights=np.concatenate(counts)).astype(np.float32))
        return rarity

    def _keys(self, features: FeatureBatch, context: NDArray[np.int32], columns: Sequence[int]) -> NDArray[np.int64]:
        """int64 [n, columns]: of (context, field, value), or of the context alone where the column is -1."""
        asked = np.array(columns) + 1
        values = [features.codes[:, self.columns[c]] if c >= 0 else np.zeros(len(features), np.int32) for c in columns]
        whole = np.column_stack([context, np.zeros((len(features), 2), np.int32)])
        keys = row_hash(whole)[:, None] + self._parts[self._starts[asked] + np.column_stack(values)]
        found: NDArray[np.int64] = keys.view(np.int64)
        return found

    def _unknown(self, contexts: NDArray[np.int64], column: int) -> NDArray[np.int64]:
        """int64 [c]: of the keys of contexts alone, those of a value never seen."""
        of_unknown = self._parts[self._starts[[column + 1]] + UNKNOWN]
        found: NDArray[np.int64] = (contexts.view(np.uint64) - self._parts[:1] + of_unknown).view(np.int64)
        return found

    def _count(self, keys: NDArray[np.int64]) -> Tensor:
        """float32, of the shape of keys. Most keys of a batch are the same few, and those are looked up once."""
        distinct, inverse = np.unique(keys, return_inverse=True)
        wanted = torch.from_numpy(distinct).to(self.keys.device)
        at = torch.searchsorted(self.keys, wanted).clamp_(max=max(len(self.keys) - 1, 0))
        found = torch.where(self.keys[at] == wanted, self.counts[at], 0.0)
        return found[torch.from_numpy(inverse.reshape(keys.shape)).to(found.device)]

    def __call__(self, features: FeatureBatch) -> Surprise:
        """Surprise of every discrete field of n events."""
        codes = torch.from_numpy(features.codes[:, self.columns]).to(self.keys.device)
        new_name = self._identity & (codes == UNKNOWN)
        found = []
        for context in _contexts(features):
            counts = self._count(self._keys(features, context, range(-1, len(self.columns))))
            surprise = -torch.log((counts[:, 1:] + _HIT) / (counts[:, :1] + _SEEN))
            found.append(torch.where(new_name, surprise.clamp(max=NEW_NAME_SURPRISE), surprise))
        return Surprise(found[0], found[1], codes[:, 0].long())

    def by_group(self, surprise: Tensor, kind: Tensor) -> Tensor:
        """float32 [n, fields] to [n, groups]: the largest of each group, in its first place; kind: int64
        [n], the code of the event type."""
        out = surprise.new_zeros(surprise.shape)
        return out.scatter_reduce(1, self.groups[kind], surprise, "amax", include_self=False)

    def summary(self, surprise: Surprise) -> tuple[Tensor, Tensor]:
        """float32 [n] each: the oddest value of the event for its type, and all of it given who acts (an actor that
        never did this makes every value of the event a little odd)."""
        by_type, by_actor = (self.by_group(s, surprise.kind) for s in (surprise.by_type, surprise.by_actor))
        return by_type.amax(1), by_actor.sum(1)


def _discrete(schema: Schema) -> list[int]:
    """Not the network of an address: that it was seen with others must not make an address odder that nobody had."""
    return [i for i, field in enumerate(schema.fields) if field.kind != "number" and field.derives != NETWORK]


def _groups(schema: Schema, features: FeatureBatch) -> Tensor:
    """int64 [event types, discrete fields]: the first field of each field's group. Of each type, twins are one group
    though the schema has them in several."""
    columns = _discrete(schema)
    names = [schema.fields[i].group for i in columns]
    groups = np.tile([names.index(name) for name in names], (schema.fields[0].size, 1))
    for kind in np.unique(features.codes[:, 0]).tolist():
        codes = features.codes[features.codes[:, 0] == kind][:_TWIN_ROWS][:, columns]
        distinct = [len(np.unique(column)) for column in codes.T]
        varied = [c for c, n in enumerate(distinct) if 1 < n <= len(codes) / 2]
        for place, b in enumerate(varied):
            for a in varied[:place]:
                most = max(distinct[a], distinct[b])
                if min(distinct[a], distinct[b]) < TWINS * most:
                    continue
                together = codes[:, a].astype(np.int64) << 32 | codes[:, b]
                if TWINS * len(np.unique(together)) <= most:
                    groups[kind, b] = groups[kind, a]
                    break
    return torch.from_numpy(groups)


def _contexts(features: FeatureBatch) -> list[NDArray[np.int32]]:
    """The two contexts, each int32 [n, 4]: the event type alone, and the event type with who acts."""
    kind = features.codes[:, 0]
    nothing = np.zeros_like(kind)
    actor = features.actor.view(np.int32).reshape(-1, 2)
    return [
        np.column_stack([nothing, kind, nothing, nothing]),
        np.column_stack([nothing + 1, kind, actor[:, 0], actor[:, 1]]),
    ]
