"""What each event adds to the counters of its entities: a failure, an amount of data, and whom or what it reached.

Windows hold the last few records; that somebody tried forty doors in an afternoon is seen by counting. Promises the
same numbers for the same event in every process. Does not say what is much: `state.rate_profiles` learns that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.entities import KINDS, Entities
from encoder.ocsf.events import EventBatch

COUNTED = ("user", "address", "host", "service")
"""Kinds of entity that live long enough to have habits; they are each other's partners, too."""
PARTNERS = len(COUNTED) + 1
MAX_AMOUNT = (1 << 44) - 1
NOBODY = -1
_PARTNER_PATHS = ("dst_endpoint.ip", "dst_endpoint.hostname", "dst_endpoint.uid")
_FAILURE = 2
_FAILED_CONNECTIONS = (4001_04, 4001_05)
_DENIED = 2
_BLOCKED = (2, 6)
"""OCSF: `status_id` Failure; activities Fail and Refuse of Network Activity; `action_id` Denied; `disposition_id`
Blocked and Dropped."""
_AMOUNTS = ("traffic.bytes", "traffic.bytes_out")
"""The later one counts where an event has both: what leaves matters."""


@dataclass(frozen=True)
class ActivityCounts:
    """Of m (event, entity) pairs.

    counted: bool [m], whether the entity is of a kind that is counted; failed: bool [m]; amount: int64 [m], bytes, 0
    where the event names none; partners: int16 [m, PARTNERS], whom else the event names or reaches, each as one of 256
    places of a bitmap, NOBODY for none.
    """

    counted: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    amount: NDArray[np.int64]
    partners: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.counted)

    def take(self, pairs: NDArray[np.intp] | slice) -> ActivityCounts:
        return ActivityCounts(self.counted[pairs], self.failed[pairs], self.amount[pairs], self.partners[pairs])

    @classmethod
    def concatenate(cls, parts: Sequence[ActivityCounts]) -> ActivityCounts:
        names = ("counted", "failed", "amount", "partners")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@lru_cache(maxsize=16_384)
def _place(name: str) -> int:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]


def activity_counts(events: EventBatch, entities: Entities) -> ActivityCounts:
    """What each pair of these events adds."""
    n, rows = len(events), entities.row
    places = np.full((n, PARTNERS), NOBODY, np.int16)
    column = np.array([COUNTED.index(kind) if kind in COUNTED else -1 for kind in KINDS])[entities.kind]
    named = np.flatnonzero(column >= 0)
    places[rows[named], column[named]] = [_place(entities.entity[pair]) for pair in named.tolist()]
    for path in reversed(_PARTNER_PATHS):
        if (reached := events.columns.get(path)) is not None:
            places[reached.rows, -1] = [_place(f"address:{value}".lower()) for value in reached.values]
    partners = places[rows]
    partners[named, column[named]] = NOBODY  # nobody is their own partner
    return ActivityCounts(column >= 0, _failed(events)[rows], _amount(events)[rows], partners)


def _failed(events: EventBatch) -> NDArray[np.bool_]:
    failed = np.isin(events.type_uid, _FAILED_CONNECTIONS)
    for path, bad in (("status_id", (_FAILURE,)), ("action_id", (_DENIED,)), ("disposition_id", _BLOCKED)):
        if (column := events.columns.get(path)) is not None:
            failed[column.rows[[value in bad for value in column.values]]] = True
    return failed


def _amount(events: EventBatch) -> NDArray[np.int64]:
    amount = np.zeros(len(events), np.int64)
    for path in _AMOUNTS:
        if (column := events.columns.get(path)) is not None:
            whole = [value if type(value) is int and 0 <= value <= MAX_AMOUNT else 0 for value in column.values]
            amount[column.rows] = whole
    return amount
