"""The drift guard: holds new vectors until they occurred on enough days, and keeps drifting entities from teaching the
baseline.

Promises: a vector with an event at or under the alert threshold is never released, nor one seen on fewer than MIN_DAYS
days, and no entity adds more than CAP new vectors in a refresh; an entity that drifts away from what was first learned,
a little each day, is named and adds none. Drift carries over from one refresh to the next (`EntityDrifts`). It does not
know whether what many entities do on many days is benign.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DAY_MS = 86_400_000
MIN_DAYS = 3
CAP = 20
"""New vectors that an entity may add in one refresh, not counting those of SIDES or more entities."""
SIDES = 3
"""A vector of this many entities does not count against CAP."""
FIRST_DAYS = 5
"""The first days of an entity, with which its later days are compared."""
MARGIN = 1.5
"""Standard errors added to the mean of the first days."""
ALLOWANCE, ALARM, MOST = 0.5, 8.0, 3.0
"""Parameters of the cumulative sum (Page 1954), in standard errors of a day's mean: the allowed difference of a day,
the sum that raises the alarm, and the most that a single day adds, so that one unusual day is not drift."""
MOST_SUM = 2 * ALARM
"""The largest sum: an entity that returns to its first behaviour is trusted again within about two weeks."""
ENOUGH = 5
"""The least events of an entity on a day for a mean."""
MAX_ENTITIES = 1_000_000
"""56 bytes each in a bundle; of more entities, those seen latest are kept."""


@dataclass(frozen=True)
class Released:
    """The result of a refresh. rows: intp, the first event of each released vector; refused: the number of refused
    vectors by reason; drifting: drifting entities with the day (ms) of the alarm; drifts: for the next refresh."""

    rows: NDArray[np.intp]
    refused: dict[str, int]
    drifting: dict[str, int]
    drifts: EntityDrifts


@dataclass(frozen=True)
class EntityDrift:
    """The drift of an entity. days, total, count: the number of its first days with ENOUGH events, the sum of their
    evidence (nats), and their events; last: the latest day included; away: the cumulative sum of later differences;
    since: the day on which that exceeded ALARM, -1 where it does not."""

    days: int = 0
    total: float = 0.0
    count: int = 0
    last: int = -1
    away: float = 0.0
    since: int = -1

    def after(self, day: int, total: float, count: int) -> EntityDrift:
        """With another day added; unchanged where the day is already included."""
        if day <= self.last or count < ENOUGH:
            return self
        if self.days < FIRST_DAYS:
            first, of = self.total + total, self.count + count
            return replace(self, days=self.days + 1, total=first, count=of, last=day)
        usual = max(1.0, self.total / self.count) * (1 + MARGIN / self.count**0.5)
        step = min((total / count - usual) / usual * count**0.5, MOST) - ALLOWANCE
        away = min(max(0.0, self.away + step), MOST_SUM)
        since = day if away > ALARM and self.since < 0 else self.since if away > ALARM else -1
        return replace(self, last=day, away=away, since=since)


class EntityDrifts:
    """The drifts of all entities, stored by hash. keys: uint64 [e]; drifts: float64 [e, 6], the fields of
    `EntityDrift`."""

    def __init__(self, keys: NDArray[np.uint64] | None = None, drifts: NDArray[np.float64] | None = None) -> None:
        self._drifts: dict[int, EntityDrift] = {}
        if keys is not None and drifts is not None:
            for key, (days, total, count, last, away, since) in zip(keys.tolist(), drifts.tolist(), strict=True):
                self._drifts[key] = EntityDrift(int(days), total, int(count), int(last), away, int(since))

    def of(self, entity: str) -> EntityDrift:
        return self._drifts.get(_key(entity), EntityDrift())

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        """keys and drifts, from which the same object can be made."""
        latest = sorted(self._drifts.items(), key=lambda each: (-each[1].last, each[0]))[:MAX_ENTITIES]
        drifts = np.array([astuple(drift) for _, drift in latest], np.float64).reshape(-1, 6)
        return np.array([key for key, _ in latest], np.uint64), drifts

    def after(self, means: Mapping[str, Mapping[int, Sequence[float]]]) -> tuple[EntityDrifts, dict[str, int]]:
        """With more days (entity -> day -> sum of evidence and number of events); and the entities over ALARM on any of
        them, with the day (ms) on which that began."""
        drifts, drifting = EntityDrifts(), {}
        drifts._drifts = {**self._drifts}
        for who, days in means.items():
            drift = self.of(who)
            since = drift.since
            for day, (total, count) in sorted(days.items()):
                drift = drift.after(day, total, int(count))
                since = drift.since if since < 0 else since
            drifts._drifts[_key(who)] = drift
            if since >= 0:
                drifting[who] = since * DAY_MS
        return drifts, drifting


def _key(entity: str) -> int:
    return int.from_bytes(blake2b(entity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class DriftGuard:
    """Call `hold` in order of event time, then `release`. drifts: of the previous refresh."""

    drifts: EntityDrifts = field(default_factory=EntityDrifts)
    _first: dict[bytes, int] = field(default_factory=dict)
    _days: dict[bytes, set[int]] = field(default_factory=lambda: defaultdict(set))
    _sides: dict[bytes, set[str]] = field(default_factory=lambda: defaultdict(set))
    _banned: set[bytes] = field(default_factory=set)
    _means: dict[str, dict[int, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    _held: int = 0

    def hold(
        self,
        time: NDArray[np.int64],
        vectors: NDArray[np.float16],
        entity: Sequence[str],
        alert: NDArray[np.bool_],
        known: NDArray[np.bool_],
        novelty: NDArray[np.float64],
    ) -> None:
        """Add n events. time: int64 [n], ms; vectors: float16 [n, d]; alert: bool [n], at or under the threshold;
        known: bool [n], in the baseline already; novelty: float64 [n], nats (1 on average), the evidence of the
        distance from what was first learned, without later additions."""
        for row in range(len(time)):
            day, who = int(time[row]) // DAY_MS, entity[row]
            if who:
                mean = self._means[who].setdefault(day, [0.0, 0.0])
                mean[0] += float(novelty[row])
                mean[1] += 1
            if known[row]:
                continue
            key = vectors[row].tobytes()
            if alert[row]:
                self._banned.add(key)
                continue
            self._first.setdefault(key, self._held + row)
            self._days[key].add(day)
            self._sides[key].add(who)
        self._held += len(time)

    def drifting(self) -> dict[str, int]:
        """Drifting entities with the day (ms) of the alarm."""
        return self.drifts.after(self._means)[1]

    def release(self) -> Released:
        """The vectors that may join the baseline."""
        drifts, drifting = self.drifts.after(self._means)
        brought: dict[str, int] = defaultdict(int)
        refused: dict[str, int] = defaultdict(int)
        rows = []
        for key, row in sorted(self._first.items(), key=lambda each: each[1]):
            sides = {who for who in self._sides[key] if who not in drifting}
            if key in self._banned:
                refused["alerted on"] += 1
            elif not sides:
                refused["of an entity that drifts"] += 1
            elif len(self._days[key]) < MIN_DAYS:
                refused["not on enough days"] += 1
            elif len(sides) < SIDES and all(brought[who] >= CAP for who in sides):
                refused["too much of one entity"] += 1
            else:
                rows.append(row)
                if len(sides) < SIDES:
                    for who in sides:
                        brought[who] += 1
        return Released(np.array(rows, np.intp), dict(refused), drifting, drifts)
