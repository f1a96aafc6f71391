"""What happens without people: routines of service accounts, customers of the services, updates, checks, logs.

Runs of routines are planned before their events are made, so that an incident can change one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from streamer.devtools.organisations.activities import Activities, Routine
from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.hand import Hand
from streamer.devtools.organisations.internet import Spot
from streamer.devtools.organisations.journal import Journal
from streamer.devtools.organisations.organisation import DAY, HOUR, LOGS, MINUTE, Organisation, Service
from streamer.devtools.organisations.products import Account, Host
from streamer.devtools.organisations.tasks import Planned, perform, unroll


@dataclass
class Run:
    """A run of a routine as it is planned; an incident changes `steps` and sets `mark` to its id."""

    routine: Routine
    begins: float
    host: Host
    dice: Dice
    steps: list[Planned]
    mark: str = ""


class Machines:
    """The automatic part of an organisation."""

    def __init__(self, organisation: Organisation, activities: Activities, journal: Journal) -> None:
        self.organisation, self.activities, self.journal = organisation, activities, journal
        dice = Dice("organisation", organisation.seed, "machines")
        naming = organisation.naming
        self.nobody = Account("SYSTEM" if dice.chance(0.5) else "root", 18, 3, "")
        self.system = Account(naming.bot(naming.word()), 6900, 3, "")
        self.agent = dice.pick(("{}-updater/3.1", "{} client 2.{}", "{}/4.{}")).format(naming.word(), dice.below(9))
        self.vendors = [organisation.internet.site(dice) for _ in range(dice.whole(2, 4))]
        self.polls = [dice.pick((15, 30, 60, 120)) for _ in self.vendors]
        self.crowd = [organisation.internet.place(dice) for _ in range(6)]
        self.breaks = dice.between(0.0, 0.01)
        self.nightly = dice.between(0, 5)
        self.scans = dice.chance(0.5)
        self.peak = dice.between(11, 20)
        self.monitor = dice.pick(organisation.servers["jobs"])
        self.customers = 0.12 * organisation.events_per_day * dice.around(1.0, 0.2)

    def plan(self, day: int) -> list[Run]:
        """The runs of the day, with the jitter of each."""
        organisation, runs = self.organisation, []
        for routine in self.activities.routines:
            dice = Dice("organisation", organisation.seed, "routine", routine.bot.name, day)
            if organisation.weekday(day) not in routine.days:
                continue
            hours = routine.hours
            if routine.every:
                hours = tuple(n * routine.every / 60 for n in range(int(1440 / routine.every)))
            for hour in hours:
                stray = min(routine.strays, 0.4 * routine.every * MINUTE) if routine.every else routine.strays
                begins = organisation.midnight(day) + hour * HOUR + dice.random() * stray
                host = routine.host
                if routine.service is not None:
                    host = dice.pick(organisation.instances(routine.service, begins))
                own = Dice("organisation", organisation.seed, "run", routine.bot.name, int(begins))
                runs.append(Run(routine, begins, host, own, unroll(routine.task(begins), own)))
        return runs

    def carry_out(self, run: Run) -> None:
        """Make the events of a run. A few runs break off at a step that fails, and begin again after a while."""
        organisation = self.organisation
        spot = organisation.offices[0].network(run.begins)[0]
        identity = run.dice.hex(20) if run.routine.traced else ""
        agent = f"{organisation.naming.name}-agent/{1 + run.routine.bot.number % 5}"
        hand = Hand(
            organisation, self.journal, run.dice, run.routine.bot, run.host, spot, run.begins, agent=agent, run=identity
        )
        hand.shell = organisation.shells[run.host.system]
        self.journal.mark = run.mark
        if not run.mark and run.dice.chance(self.breaks) and len(run.steps) > 2:
            broken = run.steps[: run.dice.whole(1, len(run.steps) - 1)]
            perform(hand, broken[:-1])
            broken[-1].step.perform(hand, True)
            hand.wait(run.dice.between(20, 300))
        perform(hand, run.steps)
        self.journal.mark = ""

    def day(self, day: int) -> None:
        dice = Dice("organisation", self.organisation.seed, "machines", day)
        self._customers(day, dice)
        self._updates(day, dice)
        self._checks(day, dice)
        self._logs(day, dice)
        if self.scans and self.organisation.weekday(day) in (1, 5):
            self._scan(day, dice)

    def hand(self, account: Account, host: Host, dice: Dice, now: float, spot: Spot | None = None) -> Hand:
        organisation = self.organisation
        source = spot or organisation.offices[0].network(now)[0]
        hand = Hand(organisation, self.journal, dice, account, host, source, now, agent=self.agent)
        hand.shell = organisation.shells[host.system]
        return hand

    def _customers(self, day: int, dice: Dice) -> None:
        """Requests from the internet, each of which may cause others between the services."""
        organisation = self.organisation
        busy = 1.0 if organisation.weekday(day) < 5 else 0.6
        made = 0
        while made < self.customers * busy:
            hour = dice.between(0, 24)
            if not dice.chance(0.55 + 0.45 * cos((hour - self.peak) * pi / 12)):
                continue
            now = organisation.midnight(day) + hour * HOUR
            service = dice.skewed(organisation.services)
            spot = organisation.internet.spot(dice.pick(self.crowd), dice)
            client = Host(spot.ip, spot.ip, "linux", 6, organisation.clouds[0])
            made += self._request(self.hand(self.nobody, client, dice, now), service, dice)
            if dice.chance(0.35):
                other = dice.pick(organisation.services)
                inside = dice.pick(organisation.instances(service, now))
                hand = self.hand(self.system, inside, dice, now + 30 + 1000 * dice.wait(0.05))
                made += self._request(hand, other, dice)

    def _request(self, hand: Hand, service: Service, dice: Dice) -> int:
        instance = dice.pick(self.organisation.instances(service, hand.now))
        sent, received = dice.around(700, 0.5), dice.around(12_000, 1.2)
        failed = dice.chance(0.01)
        hand.connect(instance, service.port, sent, received, failed=failed)
        return 1

    def _updates(self, day: int, dice: Dice) -> None:
        """Machines ask their vendors for news every so often: workstations while they are on, servers all day."""
        organisation = self.organisation
        midnight = organisation.midnight(day)
        on = [(person.host(hours[0]), *hours) for person in organisation.staff(day)
              if (hours := organisation.hours(person, day)) is not None]  # fmt: skip
        on += [(host, midnight, midnight + DAY) for hosts in organisation.servers.values() for host in hosts]
        for place, (host, begins, ends) in enumerate(on):
            vendor, minutes = dice.pick(list(zip(self.vendors, self.polls, strict=True)))
            if ends - begins > 12 * HOUR:
                minutes *= 4
            method, now = ("GET", "POST")[place % 2], begins + dice.random() * minutes * MINUTE
            while now < ends:
                hand = self.hand(self.nobody, host, dice, now)
                path = dice.weighted(("/v1/check", "/", "/static/app.js"), (8, 1, 1))
                hand.request(vendor, path, method, dice.around(600, 0.1), dice.around(900, 0.2))
                now += minutes * MINUTE * dice.between(0.95, 1.05)

    def _checks(self, day: int, dice: Dice) -> None:
        """A monitor looks at every server, twice in an hour."""
        organisation = self.organisation
        for half in range(48):
            now = organisation.midnight(day) + half * 30 * MINUTE + dice.random() * 4000
            for purpose, hosts in organisation.servers.items():
                for host in hosts:
                    port = {"directory": 389, "files": 445, "data": 5432, "jobs": 22, "jump": 22}[purpose]
                    hand = self.hand(self.system, self.monitor, dice, now)
                    now += 50 + 1000 * dice.wait(0.2)
                    hand.connect(host, port, 400 + dice.below(30), 800 + dice.below(200), failed=dice.chance(0.004))

    def _logs(self, day: int, dice: Dice) -> None:
        """Logs are rotated at night, the oldest deleted; the application log of a server is cleared at times."""
        now = self.organisation.midnight(day) + self.nightly * HOUR
        for hosts in self.organisation.servers.values():
            for host in hosts:
                now += 1000 * dice.wait(20)
                hand = self.hand(self.nobody, host, dice, now)
                for log in LOGS[host.system]:
                    hand.keep_logs(5, log, host)
                    if dice.chance(0.15):
                        hand.keep_logs(dice.pick((2, 4, 1)), log, host)

    def _scan(self, day: int, dice: Dice) -> None:
        """A scanner of vulnerabilities knocks at hosts and ports by night."""
        now = self.organisation.midnight(day) + (self.nightly + 0.5) * HOUR
        targets = [host for hosts in self.organisation.servers.values() for host in hosts]
        targets += [person.host(now) for person in dice.some(self.organisation.staff(day), 12)]
        scanner = self.organisation.servers["jump"][-1]
        for host in targets:
            for port in dice.some((22, 80, 135, 443, 445, 3389, 5985, 8080), 4):
                now += 1000 * dice.wait(2)
                self.hand(self.system, scanner, dice, now).connect(host, port, 180, 200, failed=dice.chance(0.6))
