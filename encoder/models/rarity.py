"""Conditional rarity: how unusual a value is for events of its type, and for events of its type and actor, by counting.

A value's score is -log of the share of training events whose value was equally or less likely. Each training event is
judged by the other blocks of time (cross-conformal prediction, Vovk 2015): where every value is rare, another rare one
is usual, and where a new program runs for an hour, its thousand events count as one new value. Attributes that describe
one object count once. Promises exact counts (64-bit keys, no shared buckets) and fixed memory for a fixed vocabulary.
It does not count numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder.features.normalization import NETWORK
from encoder.features.schema import MISSING, UNKNOWN, Schema
from encoder.features.vectorizer import FeatureBatch, row_hash

TWINS = 0.98
"""Two attributes are twins for an event type where at least this share of the values of each goes with one value of the
other: a logon names its server by name, by address, and again as the destination."""
_TWIN_ROWS = 4096
"""Distinct events of a type in which twins are searched."""
HIT, SEEN = 0.5, 5.0
"""Added to the two counts: a known value that never occurred in a context of n events scores log(2 n)."""
BLOCKS = 7
"""Parts of the training time with equally many events: days of a week."""
ENOUGH = 100.0
"""A value with so many events is usual, also where others have far more."""
NEW_NAME_SURPRISE = 2.0
"""The largest score (nats) of a name of a user, host or address that training did not have, or had in at most RECENT
blocks: new names come every day."""
RECENT = 2

TENSORS = ("keys", "counts", "groups", "young")


@dataclass(frozen=True)
class Surprise:
    """-log p in nats, float32 [n, discrete fields] each, where p is the share of events whose value is equally or less
    likely: by_type given the event type, by_actor given type and actor. kind: int64 [n], the code of the event type."""

    by_type: Tensor
    by_actor: Tensor
    kind: Tensor


class ContextRarity:
    """Counts by (context, field, value) over training events.

    keys: int64 [m], sorted; counts: float32 [m], for a context its events, for a value those whose value was equally or
    less likely; groups: int64 [event types, discrete fields], the first field of those that describe one thing; young:
    bool [values of all fields, concatenated], names too recent to be unusual. Numbers are not counted.
    """

    def __init__(self, schema: Schema, keys: Tensor, counts: Tensor, groups: Tensor, young: Tensor) -> None:
        self.keys, self.counts, self.groups, self.young = keys, counts, groups, young
        self.columns = _discrete(schema)
        self.names = [schema.fields[i].name for i in self.columns]
        # The hash of a row is a sum over its columns, so the part of (field, value) is computed once, here. The first
        # entry is that of a context alone.
        sizes = [1] + [schema.fields[i].size for i in self.columns]
        self._starts = np.cumsum([0, *sizes[:-1]])
        field = np.repeat(np.arange(-1, len(self.columns), dtype=np.int32), sizes)
        value = (np.arange(sum(sizes)) - np.repeat(self._starts, sizes)).astype(np.int32)
        rows = np.column_stack([np.zeros((len(field), 4), np.int32), field, value])
        self._parts = row_hash(rows) - row_hash(np.zeros((1, 6), np.int32))

    def to(self, device: torch.device) -> ContextRarity:
        for name in TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        return self

    @classmethod
    def fit(cls, schema: Schema, features: FeatureBatch, weights: NDArray[np.float64]) -> ContextRarity:
        """features: n distinct rows; weights: float64 [n, blocks], the number of training events of each row in each
        block of time."""
        groups, young = _groups(schema, features), _recent(schema, features, weights)
        rarity = cls(schema, torch.empty(0, dtype=torch.int64), torch.empty(0), groups, young)
        keys: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.float64]] = []
        for context in _contexts(features):
            of_row = rarity._keys(features, context, [-1])[:, 0]
            whole, _, in_block = counted(of_row, weights)
            keys.append(whole)
            counts.append(in_block.sum(1))
            for column in range(len(rarity.columns)):
                distinct, first, in_block = counted(rarity._keys(features, context, [column])[:, 0], weights)
                known, unknown = no_likelier(np.searchsorted(whole, of_row[first]), in_block, in_block, len(whole))
                keys.extend((distinct, rarity._unknown(whole, column)))
                counts.extend((known, unknown))
        all_keys, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        all_counts = np.bincount(inverse, weights=np.concatenate(counts))
        rarity.keys = torch.from_numpy(all_keys[all_counts > 0])
        rarity.counts = torch.from_numpy(all_counts[all_counts > 0].astype(np.float32))
        return rarity

    def _keys(self, features: FeatureBatch, context: NDArray[np.int32], columns: Sequence[int]) -> NDArray[np.int64]:
        """int64 [n, columns]: the keys of (context, field, value), or of the context alone where the column is -1."""
        places = np.array(columns) + 1
        values = [features.codes[:, self.columns[c]] if c >= 0 else np.zeros(len(features), np.int32) for c in columns]
        contexts = np.column_stack([context, np.zeros((len(features), 2), np.int32)])
        keys = row_hash(contexts)[:, None] + self._parts[self._starts[places] + np.column_stack(values)]
        signed: NDArray[np.int64] = keys.view(np.int64)
        return signed

    def _unknown(self, contexts: NDArray[np.int64], column: int) -> NDArray[np.int64]:
        """int64 [c]: the keys of an unknown value, from the keys of contexts alone."""
        of_unknown = self._parts[self._starts[[column + 1]] + UNKNOWN]
        keys: NDArray[np.int64] = (contexts.view(np.uint64) - self._parts[:1] + of_unknown).view(np.int64)
        return keys

    def _count(self, keys: NDArray[np.int64]) -> Tensor:
        """float32, in the shape of keys. Each distinct key is looked up once."""
        distinct, inverse = np.unique(keys, return_inverse=True)
        wanted = torch.from_numpy(distinct).to(self.keys.device)
        at = torch.searchsorted(self.keys, wanted).clamp_(max=max(len(self.keys) - 1, 0))
        counts = torch.where(self.keys[at] == wanted, self.counts[at], 0.0)
        return counts[torch.from_numpy(inverse.reshape(keys.shape)).to(counts.device)]

    def __call__(self, features: FeatureBatch) -> Surprise:
        """Surprise of every discrete field of n events."""
        codes = torch.from_numpy(features.codes[:, self.columns]).to(self.keys.device)
        new_name = self.young[codes.long() + torch.from_numpy(self._starts[1:]).to(codes.device) - 1]
        surprises = []
        for context in _contexts(features):
            counts = self._count(self._keys(features, context, range(-1, len(self.columns))))
            surprise = -torch.log((counts[:, 1:] + HIT) / (counts[:, :1] + SEEN))
            surprises.append(torch.where(new_name, surprise.clamp(max=NEW_NAME_SURPRISE), surprise))
        return Surprise(surprises[0], surprises[1], codes[:, 0].long())

    def by_group(self, surprise: Tensor, kind: Tensor) -> Tensor:
        """float32 [n, fields] to [n, groups]: the largest of each group, in its first place; kind: int64
        [n], the code of the event type."""
        out = surprise.new_zeros(surprise.shape)
        return out.scatter_reduce(1, self.groups[kind], surprise, "amax", include_self=False)

    def summary(self, surprise: Surprise) -> tuple[Tensor, Tensor]:
        """float32 [n] each: the largest surprise given the type, and the sum given type and actor (where an actor never
        did this, every value of the event is a little unusual)."""
        by_type, by_actor = (self.by_group(s, surprise.kind) for s in (surprise.by_type, surprise.by_actor))
        return by_type.amax(1), by_actor.sum(1)


def counted(
    keys: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.float64]]:
    """The distinct keys, ascending, the first row of each, and its events in each block: float64 [k, blocks]."""
    distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    in_block = [np.bincount(inverse, weights=block, minlength=len(distinct)) for block in weights.T]
    return distinct, first, np.stack(in_block, 1)


def no_likelier(
    context: NDArray[np.intp], in_block: NDArray[np.float64], likely: NDArray[np.float64], contexts: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The number of events of the same context whose value was equally or less likely: for each value (float64 [k]) and
    for an unknown one (float64 [contexts]). The likelihood of an event's value is its count in the other blocks.

    context: intp [k], the context of each value; in_block: float64 [k, blocks], its events; likely: float64
    [k, blocks], the counts that its likelihood goes by.
    """
    total = likely.sum(1)
    value, block = np.nonzero(in_block)
    events = in_block[value, block]
    elsewhere = np.minimum(total[value] - likely[value, block], ENOUGH)
    order = np.lexsort((elsewhere, context[value]))
    width = ENOUGH + 1  # One ascending key of context and count.
    ascending = context[value][order] * width + elsewhere[order]
    so_far = np.concatenate([[0.0], np.cumsum(events[order])])
    start = np.searchsorted(ascending, np.arange(contexts) * width)
    most = context * width + np.minimum(total, ENOUGH)
    known = so_far[np.searchsorted(ascending, most, side="right")] - so_far[start[context]]
    unknown = so_far[np.searchsorted(ascending, np.arange(contexts) * width, side="right")] - so_far[start]
    return known, unknown


def _discrete(schema: Schema) -> list[int]:
    """The counted fields. Networks are not: a known network must not make an unknown address more unusual."""
    return [i for i, field in enumerate(schema.fields) if field.kind != "number" and field.derives != NETWORK]


def _recent(schema: Schema, features: FeatureBatch, weights: NDArray[np.float64]) -> Tensor:
    """bool [values of all discrete fields]: UNKNOWN and values of at most RECENT blocks, in fields of names."""
    flags = []
    for position in _discrete(schema):
        field = schema.fields[position]
        young = np.zeros(field.size, np.bool_)
        if field.kind == "identity":
            codes = features.codes[:, position]
            blocks = sum((np.bincount(codes, block, field.size) > 0).astype(int) for block in weights.T)
            young = np.asarray(blocks <= min(RECENT, weights.shape[1] - 1))
            young[MISSING] = False
        flags.append(young)
    return torch.from_numpy(np.concatenate(flags))


def _groups(schema: Schema, features: FeatureBatch) -> Tensor:
    """int64 [event types, discrete fields]: the first field of each field's group. Twins of a type are in one group,
    also where the schema has them in several."""
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
    """The two contexts, int32 [n, 4] each: the event type alone, and the event type with the actor."""
    kind = features.codes[:, 0]
    nothing = np.zeros_like(kind)
    actor = features.actor.view(np.int32).reshape(-1, 2)
    return [
        np.column_stack([nothing, kind, nothing, nothing]),
        np.column_stack([nothing + 1, kind, actor[:, 0], actor[:, 1]]),
    ]
