"""Predecessors: what hardly ever comes without something else shortly before it, and that it did.

Runs of outcomes (`encoder.models.codebook`) see what came last. Where an entity does several things at once, what
belongs together is not what stands together: a job is created after an installer ran, whatever else the host did
meanwhile.
Promises that the answer depends on the window alone and says nothing of a history that does not reach back far enough.
Says nothing either of what is unusual by being there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.activity_counts import COUNTED
from encoder.ocsf.entities import KINDS

SPAN_MS = 300_000
"""What came within so long before an outcome came with it. Measured in docs/detection.md."""
LEAST = 10
"""Times that training had an outcome, from which on it is known what comes before it."""
USUAL = 0.5
"""The share of those times from which on something usually comes before it."""
KEPT = 8
"""Usual predecessors of one outcome: those that were missing least."""
_NEVER = -2

LASTING = np.isin(np.array(KINDS), COUNTED)
"""Kinds of entity that do several things at once. Of a process or transaction, `outcomes` counts what came last: what
one long-lived program hardly ever does without something before, another does all day."""


def recent(times: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [m, W]: the members that came within SPAN_MS before the newest, without it. times: int64 [m, W], event ms,
    right-aligned; used: bool [m, W]."""
    near: NDArray[np.bool_] = used & (times[:, -1:] - times <= SPAN_MS)
    near[:, -1] = False
    return near


def known(times: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [m]: whether it is known what came before: the window is full or reaches back beyond SPAN_MS."""
    oldest = np.where(used, times, times[:, -1:]).min(1)
    whole: NDArray[np.bool_] = used.all(1) | (times[:, -1] - oldest > SPAN_MS)
    return whole


class Antecedents:
    """Of (kind of entity, outcome), what usually comes before.

    keys: int64 [k], ascending, kind * outcomes + outcome; before: int32 [k, KEPT], outcomes (-2: no more); nats:
    float32 [k, KEPT], -log of how often each was missing.
    """

    def __init__(
        self, keys: NDArray[np.int64], before: NDArray[np.int32], nats: NDArray[np.float32], outcomes: int
    ) -> None:
        self.keys, self.before, self.nats, self.outcomes = keys, before, nats, outcomes

    @classmethod
    def fit(
        cls, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]], outcomes: int
    ) -> Antecedents:
        """parts: kind and outcome, int64 [m], and what came before, int64 [m, W], -1 for nothing; outcomes: how many
        there are, the last of which is "like nothing known" and stands for nothing in particular."""
        size = len(KINDS) * outcomes
        times, pairs = np.zeros(size, np.int64), np.zeros(size * outcomes, np.int64)
        for kind, outcome, before in parts:
            key = kind * outcomes + outcome
            times += np.bincount(key, minlength=size)
            ordered = np.sort(before, axis=1)
            once = ordered >= 0
            once[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
            pairs += np.bincount((key[:, None] * outcomes + ordered)[once], minlength=size * outcomes)
        of_pair = pairs.reshape(size, outcomes)
        other = outcomes - 1
        usual = (of_pair >= USUAL * times[:, None]) & (times[:, None] >= LEAST)
        usual[other::outcomes] = False
        usual[:, other] = False
        keys = np.flatnonzero(usual.any(1))
        missing = np.where(usual[keys], times[keys, None] - of_pair[keys], np.iinfo(np.int64).max)
        best = np.argsort(missing, axis=1, kind="stable")[:, :KEPT]
        there = np.take_along_axis(usual[keys], best, axis=1)
        least = np.where(there, np.take_along_axis(missing, best, axis=1), 0)
        nats = -np.log((least + 0.5) / (times[keys, None] + 1.0))
        return cls(
            keys, np.where(there, best, _NEVER).astype(np.int32), np.where(there, nats, 0).astype(np.float32), outcomes
        )

    def asked(self, kind: NDArray[np.int64], outcome: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [m]: whether anything usually comes before these; kind and outcome: int64 [m]."""
        return np.isin(kind * self.outcomes + outcome, self.keys)

    def missing(
        self, kind: NDArray[np.int64], outcome: NDArray[np.int64], before: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Of the usual predecessors that did not come, the one that is most seldom missing: float32 [m], nats, how
        seldom, and int64 [m], which; 0 and -1 where all came. before: int64 [m, W], -1 for nothing. All must be
        `asked`."""
        at = np.searchsorted(self.keys, kind * self.outcomes + outcome)
        wanted = self.before[at]
        came = np.stack([(before == wanted[:, place, None]).any(1) for place in range(wanted.shape[1])], axis=1)
        seldom = np.where(came, np.float32(0), self.nats[at])
        most = seldom.argmax(1)[:, None]
        nats = np.take_along_axis(seldom, most, axis=1)[:, 0]
        which = np.take_along_axis(wanted, most, axis=1)[:, 0].astype(np.int64)
        return nats, np.where(nats > 0, which, -1)
