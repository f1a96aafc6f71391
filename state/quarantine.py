"""The quarantine: what is new and may become normal, held until it came on enough days from enough sides.

Promises: nothing that was ever at or under the alert line gets through, nothing that was not seen on MIN_DAYS days,
and no entity brings more than CAP new vectors a refresh; an entity that has been moving away from what was first
learned, a little each day, is named and brings nothing. So one machine cannot teach the baseline quickly, and not
slowly unnoticed. It does not know whether what many entities do on many days is good.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

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
ENOUGH = 5
"""Events of an entity on a day that make a mean."""


@dataclass(frozen=True)
class Released:
    """rows: the first event of each vector that is let in; refused: how many vectors are not, by the reason; drifting:
    the entities that were moving away, each with the day (ms) on which the alarm rose."""

    rows: NDArray[np.intp]
    refused: dict[str, int]
    drifting: dict[str, int]


@dataclass
class Quarantine:
    """Fill it with `hold`, in order of event time, then `release`."""

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
        found = {}
        for who, days in self._means.items():
            means = [(day, total / count, count) for day, (total, count) in sorted(days.items()) if count >= ENOUGH]
            if len(means) <= FIRST_DAYS:
                continue
            first = sum(count for _, _, count in means[:FIRST_DAYS])
            usual = max(1.0, sum(mean * count for _, mean, count in means[:FIRST_DAYS]) / first)
            usual *= 1 + MARGIN / first**0.5
            total = 0.0
            for day, mean, count in means[FIRST_DAYS:]:
                away = (mean - usual) / usual * count**0.5
                total = max(0.0, total + min(away, MOST) - ALLOWANCE)
                if total > ALARM:
                    found[who] = day * DAY_MS
                    break
        return found

    def release(self) -> Released:
        """What may become normal."""
        drifting = self.drifting()
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
        return Released(np.array(rows, np.intp), dict(refused), drifting)
