"""The quarantine: what is new and may become normal, held until it came on enough days from enough sides.

Promises: nothing that was at or under the alert line on one of the days it is shown gets through, nothing that was not
seen on MIN_DAYS days, and no entity brings more than CAP new vectors a refresh; an entity that has been moving away
from what was first learned, a little each day, is named and brings nothing. How far each has come is carried from one
refresh to the next (`EntityDrifts`). So one machine cannot teach the baseline quickly, and not slowly unnoticed. It
does not know whether what many entities do on many days is good.
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
"""New vectors that an entity may bring into one refresh, unless others bring them too."""
SIDES = 3
"""So many entities that do the same make it nobody's own."""
FIRST_DAYS = 5
"""An entity is compared with what it did first."""
MARGIN = 1.5
"""Standard errors by which that may have been more than it seemed."""
ALLOWANCE, ALARM, MOST = 0.5, 8.0, 3.0
"""Of the cumulated sum (Page 1954), in standard errors of a day's mean: what a day may differ, the sum that alarms, and
the most that a single day adds, so that one odd day is no slow drift."""
MOST_SUM = 2 * ALARM
"""Where the sum ends: who goes back to what they did first is trusted again within about two weeks."""
ENOUGH = 5
"""Events of an entity on a day that make a mean."""
MAX_ENTITIES = 1_000_000
"""56 bytes each in a bundle; of more, those that were seen last are kept."""


@dataclass(frozen=True)
class Released:
    """rows: the first event of each vector that is let in; refused: how many vectors are not, by the reason; drifting:
    the entities that were moving away, each with the day (ms) on which the alarm rose; watch: for the next refresh."""

    rows: NDArray[np.intp]
    refused: dict[str, int]
    drifting: dict[str, int]
    drifts: EntityDrifts


@dataclass(frozen=True)
class EntityDrift:
    """How far an entity has come. days, total, count: of the first days on which it did ENOUGH, how many there were and
    the sum of their evidence (nats) over so many events; last: the latest day taken in; away: the cumulated sum of how
    much farther it was than then; since: the day on which that rose over ALARM, -1 where it is not over it."""

    days: int = 0
    total: float = 0.0
    count: int = 0
    last: int = -1
    away: float = 0.0
    since: int = -1

    def after(self, day: int, total: float, count: int) -> EntityDrift:
        """With another day; itself where that day is taken in already."""
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
    """The walks of all entities, which are kept as hashes. keys: uint64 [e]; walks: float64 [e, 6], their fields."""

    def __init__(self, keys: NDArray[np.uint64] | None = None, walks: NDArray[np.float64] | None = None) -> None:
        self._walks: dict[int, EntityDrift] = {}
        if keys is not None and walks is not None:
            for key, (days, total, count, last, away, since) in zip(keys.tolist(), walks.tolist(), strict=True):
                self._walks[key] = EntityDrift(int(days), total, int(count), int(last), away, int(since))

    def of(self, entity: str) -> EntityDrift:
        return self._walks.get(_key(entity), EntityDrift())

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        """As it is made of."""
        latest = sorted(self._walks.items(), key=lambda each: (-each[1].last, each[0]))[:MAX_ENTITIES]
        walks = np.array([astuple(walk) for _, walk in latest], np.float64).reshape(-1, 6)
        return np.array([key for key, _ in latest], np.uint64), walks

    def after(self, means: Mapping[str, Mapping[int, Sequence[float]]]) -> tuple[EntityDrifts, dict[str, int]]:
        """With more days (entity -> day -> sum of its evidence and number of events), and the entities that were over
        ALARM on any of them, each with the day (ms) on which that began."""
        drifts, found = EntityDrifts(), {}
        drifts._walks = {**self._walks}
        for who, days in means.items():
            walk = self.of(who)
            since = walk.since
            for day, (total, count) in sorted(days.items()):
                walk = walk.after(day, total, int(count))
                since = walk.since if since < 0 else since
            drifts._walks[_key(who)] = walk
            if since >= 0:
                found[who] = since * DAY_MS
        return drifts, found


def _key(entity: str) -> int:
    return int.from_bytes(blake2b(entity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class DriftGuard:
    """Fill it with `hold`, in order of event time, then `release`. watch: as the refresh before left it."""

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
        """n events. time: int64 [n], ms; vectors: float16 [n, d]; alert: bool [n], at or under the line; known: bool
        [n], in the baseline already; novelty: float64 [n], nats of evidence (1 on average) of how far each lies from
        what was first learned, whatever was let in since."""
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
        """Entities that have been moving away, with the day (ms) of the alarm."""
        return self.drifts.after(self._means)[1]

    def release(self) -> Released:
        """What may become normal."""
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
