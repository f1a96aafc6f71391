"""Which training events vouch for others: decided before anything is learned from them.

Unlabelled attacks are in every history. An event type with quantities loses the OUTSIDERS share of its events that are
oddest by two measures together: how rare their values are, judged by the other half of time, and how far they lie from
the many. These are in no reference, in no index and in no batch of training. They still count as values that came.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import Schema
from encoder.features.vectorizer import FeatureBatch
from encoder.models.rarity import ContextRarity
from state.baseline.group_distance import GroupDistance

OUTSIDERS = 0.1
"""The share of the events of a type with quantities that vouches for nobody."""
SAMPLES = 4
"""References by which outsiders are found: by a single one, chance decides who is left in (docs/decisions/0006)."""
MIN_TYPE = 200
"""Events with a number from which on a type counts as one with quantities."""


def types_with_quantities(schema: Schema, features: FeatureBatch, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 [q], sorted: the codes of the event types of which at least MIN_TYPE events carry a number. features: n
    distinct rows; weights: float64 [n], events each stands for."""
    numbers = [i for i, field in enumerate(schema.fields) if field.kind == "number"]
    measured = (features.codes[:, numbers] > 0).any(1)
    events = np.bincount(features.codes[:, 0], weights * measured)
    return np.flatnonzero(events >= MIN_TYPE).astype(np.int64)


def vouching(
    schema: Schema,
    features: FeatureBatch,
    in_block: NDArray[np.float64],
    vectors: NDArray[np.float16],
    *,
    seed: int,
) -> NDArray[np.bool_]:
    """bool [n]: which of n distinct rows vouch.

    in_block: float64 [n, blocks], how many events of each block of time each row stands for; vectors: float16 [n, d].
    """
    keep = np.ones(len(features), np.bool_)
    types, weights = features.codes[:, 0].astype(np.int64), in_block.sum(1)
    quantities = types_with_quantities(schema, features, weights)
    if not len(quantities):
        return keep
    rarity = _rarity_by_the_other_half(schema, features, in_block)
    for kind in quantities.tolist():
        rows = np.flatnonzero(types == kind)
        mass = weights[rows]
        samples = [
            GroupDistance.fit(vectors[rows], mass, types[rows], seed=each) for each in range(seed, seed + SAMPLES)
        ]
        far = np.mean([groups(vectors[rows], types[rows]) for groups in samples], 0)
        odd = _evidence_among(rarity[rows], mass) + _evidence_among(far, mass)
        order = rows[np.argsort(odd, kind="stable")]
        keep[order[np.cumsum(weights[order]) > (1 - OUTSIDERS) * mass.sum()]] = False
    return keep


def _rarity_by_the_other_half(
    schema: Schema, features: FeatureBatch, in_block: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [n], nats: how rare the values of each row are for who acts, by the counts of the half of the blocks that
    it does not belong to: an event must not vouch for itself."""
    home = in_block.argmax(1) % 2
    surprise = np.zeros(len(features))
    for half in (0, 1):
        own, other = np.flatnonzero(home == half), np.flatnonzero(home != half)
        if len(own) and len(other):
            judge = ContextRarity.fit(schema, features.take(other), in_block[other])
            surprise[own] = judge.summary(judge(features.take(own)))[1].cpu().numpy()
    return surprise


def _evidence_among(score: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of the share of the weight with a score at least this, float64 [n]."""
    _, place = np.unique(score, return_inverse=True)
    mass = np.bincount(place, weights)
    shares: NDArray[np.float64] = (np.cumsum(mass[::-1])[::-1] / mass.sum())[place]
    return -np.log(shares)
