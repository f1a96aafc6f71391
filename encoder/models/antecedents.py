"""Antecedents: records that usually come shortly before another one, so that a missing one is evidence.

N-grams of codes (`encoder.models.codebook`) see only the last records. Where an entity does several things at once,
related records are not adjacent: a job is created after an installer ran, whatever else the host did meanwhile.
Promises that the result depends on the window alone, and is empty where the window does not reach back far enough. It
does not detect records that are unusual by being there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.activity_counts import COUNTED
from encoder.ocsf.entities import KINDS

SPAN_MS = 300_000
"""How long before a record its antecedents may lie. Measured in docs/detection.md."""
LEAST = 10
"""The least number of records of a code in training from which its antecedents are known."""
USUAL = 0.5
"""The least share of these records that an antecedent comes before."""
KEPT = 8
"""Antecedents kept for each code: those that are missing least often."""
_NEVER = -2

LASTING = np.isin(np.array(KINDS), COUNTED)
"""Kinds of entity that do several things at once. Processes and transactions are left to n-grams: what one long-lived
program does only after something else, another does all day."""


def recent(times: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [m, W]: the members within SPAN_MS before the newest, without the newest. times: int64 [m, W], event ms,
    right-aligned; used: bool [m, W]."""
    near: NDArray[np.bool_] = used & (times[:, -1:] - times <= SPAN_MS)
    near[:, -1] = False
    return near


def known(times: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [m]: whether all records of the last SPAN_MS are known: the window is full or reaches back further."""
    oldest = np.where(used, times, times[:, -1:]).min(1)
    whole: NDArray[np.bool_] = used.all(1) | (times[:, -1] - oldest > SPAN_MS)
    return whole


class Antecedents:
    """The usual antecedents of each pair of kind of entity and code.

    keys: int64 [k], ascending, kind * vocabulary + code; before: int32 [k, KEPT], codes (-2: no more); nats: float32
    [k, KEPT], -log of the share of cases in which each was missing; vocabulary: the number of codes.
    """

    def __init__(
        self, keys: NDArray[np.int64], before: NDArray[np.int32], nats: NDArray[np.float32], vocabulary: int
    ) -> None:
        self.keys, self.before, self.nats, self.vocabulary = keys, before, nats, vocabulary

    @classmethod
    def fit(
        cls, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]], vocabulary: int
    ) -> Antecedents:
        """parts: kind and code, int64 [m] each, and the codes before, int64 [m, W], -1 for none; vocabulary: the number
        of codes, the last of which is OTHER and has no antecedents."""
        size = len(KINDS) * vocabulary
        times, pairs = np.zeros(size, np.int64), np.zeros(size * vocabulary, np.int64)
        for kind, code, before in parts:
            key = kind * vocabulary + code
            times += np.bincount(key, minlength=size)
            ordered = np.sort(before, axis=1)
            once = ordered >= 0
            once[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
            pairs += np.bincount((key[:, None] * vocabulary + ordered)[once], minlength=size * vocabulary)
        of_pair = pairs.reshape(size, vocabulary)
        other = vocabulary - 1
        usual = (of_pair >= USUAL * times[:, None]) & (times[:, None] >= LEAST)
        usual[other::vocabulary] = False
        usual[:, other] = False
        keys = np.flatnonzero(usual.any(1))
        missing = np.where(usual[keys], times[keys, None] - of_pair[keys], np.iinfo(np.int64).max)
        best = np.argsort(missing, axis=1, kind="stable")[:, :KEPT]
        there = np.take_along_axis(usual[keys], best, axis=1)
        least = np.where(there, np.take_along_axis(missing, best, axis=1), 0)
        nats = -np.log((least + 0.5) / (times[keys, None] + 1.0))
        return cls(
            keys,
            np.where(there, best, _NEVER).astype(np.int32),
            np.where(there, nats, 0).astype(np.float32),
            vocabulary,
        )

    def has_usual(self, kind: NDArray[np.int64], code: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [m]: whether these have usual antecedents; kind, code: int64 [m]."""
        return np.isin(kind * self.vocabulary + code, self.keys)

    def missing(
        self, kind: NDArray[np.int64], code: NDArray[np.int64], before: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The missing antecedent that is most seldom missing: float32 [m], -log of the share of cases in which it is
        missing, and int64 [m], its code; 0 and -1 where none is missing. before: int64 [m, W], -1 for none.
        `has_usual` must hold for all."""
        at = np.searchsorted(self.keys, kind * self.vocabulary + code)
        wanted = self.before[at]
        came = np.stack([(before == wanted[:, place, None]).any(1) for place in range(wanted.shape[1])], axis=1)
        seldom = np.where(came, np.float32(0), self.nats[at])
        most = seldom.argmax(1)[:, None]
        nats = np.take_along_axis(seldom, most, axis=1)[:, 0]
        which = np.take_along_axis(wanted, most, axis=1)[:, 0].astype(np.int64)
        return nats, np.where(nats > 0, which, -1)
