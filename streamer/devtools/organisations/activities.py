"""What an organisation does again and again: the tasks of its roles and the routines of its service accounts.

Both have a version for after the release of the test days.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.organisation import HOUR, Organisation, Role, Service
from streamer.devtools.organisations.products import Account, Host
from streamer.devtools.organisations.tasks import Drawing, Task

ROUTINES = 0.2
"""The share of all events on a working day that routines make, about."""
_INTERVALS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 90.0, 120.0, 240.0)
"""Minutes between runs."""


@dataclass(frozen=True)
class Routine:
    """What a service account does by itself. versions: (from ms, task), in order; every: minutes between runs, 0 where
    it runs at `hours` of the day; strays: ms by which a run may be late; traced: its events carry the id of the run;
    service: whose containers it runs in, if not on `host`."""

    bot: Account
    host: Host
    service: Service | None
    versions: tuple[tuple[float, Task], ...]
    every: float
    hours: tuple[float, ...]
    days: frozenset[int]
    strays: float
    traced: bool

    def task(self, now: float) -> Task:
        return next(task for begins, task in reversed(self.versions) if begins <= now)


class Activities:
    """tasks: of each role by its number, as (from ms, tasks) in order; routines: of all service accounts."""

    def __init__(self, organisation: Organisation) -> None:
        dice = Dice("organisation", organisation.seed, "activities")
        release = organisation.calendar["release"][-1][0]
        self.tasks: dict[int, list[tuple[float, list[Task]]]] = {}
        changing = dice.pick(organisation.roles).number
        for role in organisation.roles:
            drawing = Drawing(organisation, dice, role.system, organisation.naming.topics(role.name), role.folder)
            tasks = [
                drawing.task(f"{role.name} {n}", dice.whole(3, 9), dice.around(12, 0.6))
                for n in range(dice.whole(3, 6))
            ]
            self.tasks[role.number] = [(0, tasks)]
            if role.number == changing:
                self.tasks[role.number].append((release, [drawing.changed(tasks[0], 12), *tasks[1:]]))
        share = ROUTINES * organisation.events_per_day / len(organisation.bots)
        released = set(dice.some(range(len(organisation.bots)), dice.whole(1, 2)))
        self.routines = [
            self._routine(organisation, dice, bot, share, release if n in released else 0)
            for n, bot in enumerate(organisation.bots)
        ]

    def of_role(self, role: Role, now: float) -> list[Task]:
        return next(tasks for begins, tasks in reversed(self.tasks[role.number]) if begins <= now)

    def _routine(self, organisation: Organisation, dice: Dice, bot: Account, share: float, release: int) -> Routine:
        host = dice.pick(organisation.servers["jobs"])
        contained = [service for service in organisation.services if service.contained]
        service = dice.pick(contained) if dice.chance(0.35) else None
        system = "linux" if service is not None else host.system
        word = organisation.naming.word()
        folder = f"D:\\jobs\\{word}" if system == "windows" else dice.pick(("/srv/{}", "/var/lib/{}")).format(word)
        drawing = Drawing(organisation, dice, system, organisation.naming.topics(word), folder)
        entered = dice.pick(organisation.servers["data"]) if dice.chance(0.7) else None
        task = drawing.task(word, dice.whole(4, 14), dice.around(4, 0.8), entered=entered, kind=dice.pick((3, 5)))
        versions: list[tuple[float, Task]] = [(0, task)]
        if release:
            versions.append((release, drawing.changed(task, 4)))
        runs = max(1.0, dice.around(share, 0.5) / task.expected())
        hours: tuple[float, ...] = ()
        if runs < 6:
            hours = tuple(sorted(dice.between(0, 24) for _ in range(round(runs))))
        days = frozenset(range(7)) if dice.chance(0.7) else frozenset(range(5))
        every = 0.0 if hours else min(_INTERVALS, key=lambda minutes: abs(math.log(minutes * runs / 1440)))
        return Routine(
            bot, host, service, tuple(versions), every, hours, days, dice.between(0.0, 0.25) * HOUR,
            dice.chance(0.6),
        )  # fmt: skip
