"""A day of the people: they arrive, do the tasks of their role and what everybody does, and leave.

Also what goes wrong without being an incident: forgotten passwords, phones that try again, new tools, journeys,
administrators at work on machines, accounts, groups and logs.
"""

from __future__ import annotations

from dataclasses import replace

from streamer.devtools.organisations.activities import Activities
from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.draw import program_path
from streamer.devtools.organisations.hand import Hand
from streamer.devtools.organisations.internet import Spot
from streamer.devtools.organisations.journal import Journal
from streamer.devtools.organisations.organisation import HOMES, HOUR, LOGS, MINUTE, Organisation, Person, Program
from streamer.devtools.organisations.products import Host
from streamer.devtools.organisations.tasks import Task, fitting, perform, unroll

COMMON = {"browse": 5.0, "office": 3.0, "share": 2.0, "sign on": 1.5, "drop": 0.4, "tool": 0.06, "phone": 0.7,
          "group": 0.02, "logs": 0.02}  # fmt: skip
"""What everybody does, and about how often. Whoever leads a team looks after its group, or after the logs of a host."""
_EVENTS = {"browse": 5.0, "office": 4.5, "share": 4.5, "sign on": 1.2, "drop": 2.0, "tool": 3.0, "phone": 1.3,
           "group": 1.0, "logs": 2.0}  # fmt: skip
ADMIN = {"visit": 3.0, "account": 2.0, "group": 1.5, "logs": 1.0, "install": 0.6, "by hand": 0.15, "sweep": 0.2}
_ADMIN_EVENTS = {"visit": 6.0, "account": 1.5, "group": 1.0, "logs": 2.0, "install": 4.0, "by hand": 8.0, "sweep": 20.0}


class People:
    """What people can do. Tastes (favourite tasks, applications) are of the person and stay."""

    def __init__(self, organisation: Organisation, activities: Activities, journal: Journal) -> None:
        self.organisation, self.activities, self.journal = organisation, activities, journal
        naming, dice = organisation.naming, Dice("organisation", organisation.seed, "people")
        self.apps = [naming.word() for _ in range(dice.whole(3, 7))]
        self.stores = [organisation.internet.site(dice) for _ in range(2)]
        self.weights = {name: weight * dice.around(1.0, 0.4) for name, weight in COMMON.items()}
        self.admin_weights = {name: weight * dice.around(1.0, 0.5) for name, weight in ADMIN.items()}
        self.noon = dice.between(11.0, 13.5)
        self.tools = {
            system: [self.new_tool(system, dice) for _ in range(12)] for system in ("windows", "macos", "linux")
        }
        self.rate = self._rate()

    def _rate(self) -> float:
        """Tasks in an hour of work that make the wanted number of events, by what each task makes on average."""
        organisation = self.organisation
        total = 0.0
        for person in organisation.people:
            if person.joined < 0:
                _, weights, events = self._menu(person, 0)
                hours = person.role.shift.lasts
                total += hours * sum(w * e for w, e in zip(weights, events, strict=True)) / sum(weights)
        return 0.62 * organisation.events_per_day / max(total, 1.0)

    def _menu(self, person: Person, now: float) -> tuple[list[Task | str], list[float], list[float]]:
        """What somebody may do, with its weight and the events that it makes."""
        dice = Dice("organisation", self.organisation.seed, "taste", person.index)
        chosen: list[Task | str] = []
        weights: list[float] = []
        events: list[float] = []
        for task in self.activities.of_role(person.role, now):
            chosen.append(task)
            weights.append(4 * task.weight * dice.around(1.0, 0.5))
            events.append(task.expected())
        menus = [(self.weights, _EVENTS)] + [(self.admin_weights, _ADMIN_EVENTS)] * person.role.admins
        for menu, sizes in menus:
            for name, weight in menu.items():
                chosen.append(name)
                weights.append(weight * dice.around(1.0, 0.4))
                events.append(sizes[name])
        return chosen, weights, events

    # Where and who they are.

    def hand(self, person: Person, dice: Dice, now: float) -> Hand:
        """Somebody at work at a time, at their place of that day."""
        organisation = self.organisation
        day = int((now - organisation.start) // (24 * HOUR))
        host, spot = person.host(now), person.office.network(now)[0]
        away = self.trip(person, day)
        if away is not None or Dice("organisation", organisation.seed, "remote", person.index, day).chance(
            person.remote
        ):
            spot = away or person.home
            host = replace(host, ip=f"{host.ip.rsplit('.', 1)[0]}.{11 + (person.index * 7 + day) % 230}")
        hand = Hand(organisation, self.journal, dice, person.account, host, spot, now, agent=self.agent(person, day))
        hand.shell = organisation.shells[person.role.system]
        return hand

    def agent(self, person: Person, day: int) -> str:
        version = 118 + (day + 3 * (person.index % 4)) // 9
        return person.agent.format(version, version)

    def trip(self, person: Person, day: int) -> Spot | None:
        """The address that somebody travels with on a day. A journey lasts two days, and its place is seldom new."""
        organisation = self.organisation
        dice = Dice("organisation", organisation.seed, "trip", person.index, (day + person.index) // 2)
        if not dice.chance(person.roams):
            return None
        place = organisation.internet.place(dice) if dice.chance(0.1) else dice.pick(organisation.places)
        return organisation.internet.spot(place, dice)

    # A day.

    def day(self, day: int) -> None:
        organisation = self.organisation
        for person in organisation.staff(day):
            dice = Dice("organisation", organisation.seed, "person", person.index, day)
            for _ in range(dice.below(3)):
                now = organisation.midnight(day) + (dice.between(6, 22) - self._ahead(person)) * HOUR
                self.phone(self.hand(person, dice, now), person)
            hours = organisation.hours(person, day)
            if hours is None:
                continue
            hand = self.hand(person, dice, hours[0])
            self.arrive(hand, person)
            self.work(hand, person, hours[1])
            self.leave(hand)
            if dice.chance(0.08):
                late = self.hand(person, dice, hand.now + dice.between(1, 4) * HOUR)
                self.work(late, person, late.now + dice.between(0.2, 1.5) * HOUR)

    def _ahead(self, person: Person) -> int:
        return person.office.place.zone - self.organisation.offices[0].place.zone

    def arrive(self, hand: Hand, person: Person) -> None:
        if hand.dice.chance(0.06):
            hand.log_on(hand.host, 2, failed="bad password")
            hand.wait(8)
        hand.log_on(hand.host, 2)
        for program in self._own(person)[: 1 + hand.dice.below(3)]:
            hand.wait(10)
            hand.launch(program, "")
        self.sign_on(hand, person)

    def leave(self, hand: Hand) -> None:
        hand.wait(60)
        if hand.dice.chance(0.7):
            hand.log_on(hand.host, 2, off=True)

    def work(self, hand: Hand, person: Person, until: float) -> None:
        """Tasks one after another at random times, fewer around noon."""
        dice = hand.dice
        chosen, weights, _ = self._menu(person, hand.now)
        span = until - hand.now
        count = int(self.rate * person.pace * span / HOUR + dice.random())
        for time in sorted(hand.now + dice.random() * span for _ in range(count)):
            local = ((time - self.organisation.start) / HOUR + self._ahead(person)) % 24
            if abs(local - self.noon) < 0.5 and dice.chance(0.65):
                continue
            hand.now = max(hand.now, time)
            self.do(hand, person, dice.weighted(chosen, weights))

    def do(self, hand: Hand, person: Person, task: Task | str) -> None:
        if isinstance(task, Task):
            perform(hand, unroll(task, hand.dice))
            return
        {
            "browse": self.browse, "office": self.office, "share": self.share, "sign on": self.sign_on,
            "drop": self.drop, "tool": self.tool, "phone": self.phone, "visit": self.visit, "account": self.account,
            "group": self.group, "logs": self.logs, "install": self.install, "by hand": self.by_hand,
            "sweep": self.sweep,
        }[task](hand, person)  # fmt: skip

    def _own(self, person: Person) -> list[Program]:
        programs = [program for program in self.organisation.programs if program.system == person.role.system]
        return programs[person.role.number % 3 :]

    # What everybody does.

    def browse(self, hand: Hand, person: Person) -> None:
        dice = hand.dice
        for _ in range(dice.whole(1, 3)):
            site = self.organisation.internet.visited(dice)
            hand.wait(10)
            hand.resolve(site.name, "" if dice.chance(0.02) else site.ip)
            for _ in range(dice.whole(1, 2)):
                code = 200 if dice.chance(0.95) else dice.pick((301, 304, 403, 404))
                path = dice.pick(("/", "/index.html", f"/{dice.hex(6)}", "/search", "/static/app.js"))
                hand.request(site, path, "GET", dice.around(700, 0.5), dice.around(30_000, 1.5), code=code)
                hand.wait(15)

    def office(self, hand: Hand, person: Person) -> None:
        """A document of one's own: opened, changed a few times."""
        dice = hand.dice
        program = dice.skewed(self._own(person))
        home = HOMES[person.role.system].format(person.account.name, "Documents")
        name = hand.name_file(person.topics)
        hand.launch(program, name)
        size = dice.around(70_000, 1.0)
        for activity in (2, *(3 for _ in range(dice.whole(0, 3)))):
            hand.wait(50)
            hand.touch(home, name, activity, program, size)
        if dice.chance(0.07):
            hand.touch(home, name, 4, program, size)

    def share(self, hand: Hand, person: Person) -> None:
        """Files of the role on a file server."""
        dice, role = hand.dice, person.role
        servers = self.organisation.servers["files"]
        server = servers[role.number % len(servers)]
        hand.log_on(server, 3, failed="bad password" if dice.chance(0.03) else "")
        hand.connect(server, 445, dice.around(5_000), dice.around(120_000, 1.3))
        program = dice.skewed(self._own(person))
        topics = self.organisation.naming.topics(role.name)
        for _ in range(dice.whole(1, 4)):
            hand.wait(15)
            name = hand.name_file(topics)
            activity = dice.weighted((2, 3, 1, 4, 5), (60, 20, 12, 4, 4))
            renamed = hand.name_file(topics) if activity == 5 else ""
            hand.touch(role.folder, name, activity, program, dice.around(120_000), server, renamed=renamed)

    def sign_on(self, hand: Hand, person: Person) -> None:
        dice = hand.dice
        app = self.apps[(person.role.number + dice.below(3)) % len(self.apps)]
        while dice.chance(0.05):
            hand.sign_on(app, failed="wrong password")
            hand.wait(6)
        hand.sign_on(app, multi=dice.chance(0.9))

    def phone(self, hand: Hand, person: Person) -> None:
        """A phone asks for mail through its carrier; one with an old password asks again and again."""
        dice, spot, agent = hand.dice, hand.spot, hand.agent
        place = person.office.place
        if dice.chance(0.07):  # the carrier's address is that of another town
            place = replace(place, city=self.organisation.places[person.index % 5].city)
        provider = dice.pick(person.office.carriers)
        hand.spot = Spot(f"{provider.prefix}.7.{1 + int(dice.random() ** 2 * 12)}", place, provider)
        hand.agent = f"Mail/18.{person.index % 3} iPhone"
        for _ in range(dice.whole(3, 14) if dice.chance(0.03) else 0):
            hand.sign_on(self.apps[0], failed="wrong password", multi=False)
            hand.wait(40)
        hand.sign_on(self.apps[0], multi=False)
        hand.spot, hand.agent = spot, agent

    def drop(self, hand: Hand, person: Person) -> None:
        """A file goes to a store on the internet, seldom a large one."""
        dice = hand.dice
        store = self.stores[person.index % 2]
        hand.resolve(store.name, store.ip)
        size = dice.around(1_500_000, 1.3) * (30 if dice.chance(0.03) else 1)
        hand.request(store, f"/upload/{dice.hex(8)}", dice.pick(("PUT", "POST")), size, dice.around(900))

    def new_tool(self, system: str, dice: Dice) -> Program:
        """A program that nobody had before, named and placed as others are."""
        word = self.organisation.naming.word()
        path = program_path(word, system, dice.below(3))
        version = ((0.0, f"{dice.whole(1, 9)}.{dice.below(10)}"),)
        return Program(path.replace("\\", "/").rsplit("/", 1)[-1], path, system, version)

    def tool(self, hand: Hand, person: Person) -> None:
        """A seldom used tool, or one that is new."""
        dice, system = hand.dice, person.role.system
        tool = dice.pick(self.tools[system]) if dice.chance(0.6) else self.new_tool(system, dice)
        folder = HOMES[system].format(person.account.name, "Downloads")
        hand.touch(folder, tool.name, 1, dice.skewed(self._own(person)), dice.around(3e6))
        hand.wait(30)
        hand.launch(tool, dice.pick(("", "--help", "-v")))

    # What administrators do.

    def machines(self) -> list[Host]:
        """All servers."""
        return [host for hosts in self.organisation.servers.values() for host in hosts]

    def any_host(self, hand: Hand) -> Host:
        """A server or, less often, a workstation."""
        if hand.dice.chance(0.65):
            return hand.dice.pick(self.machines())
        return self.anybody(hand).host(hand.now)

    def anybody(self, hand: Hand) -> Person:
        """Whoever is there by then."""
        return hand.dice.pick(self.organisation.staff(int((hand.now - self.organisation.start) // (24 * HOUR))))

    def visit(self, hand: Hand, person: Person, host: Host | None = None, count: int = 0) -> None:
        """A logon to a machine from afar, and a few programs there."""
        dice = hand.dice
        host = host or self.any_host(hand)
        windows = host.system == "windows"
        hand.connect(host, 3389 if windows else 22, dice.around(40_000), dice.around(200_000))
        hand.log_on(host, 10 if windows else 3)
        for _ in range(count or dice.whole(1, 4)):
            hand.wait(25)
            program = dice.skewed([p for p in self.organisation.programs if p.system == host.system])
            hand.launch(
                program, dice.pick(("--status", "-l", "--verbose")), self.organisation.shells[host.system], host
            )
        hand.wait(60)
        hand.log_on(host, 10 if windows else 3, off=True)

    def account(self, hand: Hand, person: Person) -> None:
        other = self.anybody(hand).account
        hand.change_account(hand.dice.weighted((4, 12, 2, 5, 7, 1), (8, 5, 1, 1, 3, 0.5)), other)

    def group(self, hand: Hand, person: Person) -> None:
        dice = hand.dice
        group = dice.skewed(self.organisation.groups, 0.8)
        hand.change_group(dice.weighted((3, 4), (3, 1)), group, self.anybody(hand).account)

    def logs(self, hand: Hand, person: Person) -> None:
        """Logs are exported, archived, at times cleared."""
        host = self.any_host(hand)
        for _ in range(hand.dice.whole(1, 3)):
            hand.keep_logs(hand.dice.weighted((3, 4, 1, 2), (5, 4, 2, 1)), hand.dice.pick(LOGS[host.system]), host)
            hand.wait(20)

    def install(self, hand: Hand, person: Person) -> None:
        """Software comes to a workstation or server, with a job that keeps it up to date."""
        dice = hand.dice
        host = self.any_host(hand)
        shell = self.organisation.shells[host.system]
        tool = dice.pick(self.tools[host.system]) if dice.chance(0.7) else self.new_tool(host.system, dice)
        folder = tool.path.replace("\\", "/").rsplit("/", 1)[0]
        hand.touch(folder.replace("/", "\\") if host.system == "windows" else folder, tool.name, 1, shell, 3e6, host)
        hand.launch(tool, "--install", shell, host)
        hand.schedule(tool, "update", host)

    def by_hand(self, hand: Hand, person: Person) -> None:
        """A service account is used by hand, from a jump server, to run its task again."""
        routine = hand.dice.pick(self.activities.routines)
        jump = self.organisation.servers["jump"][0]
        bot = Hand(self.organisation, self.journal, hand.dice, routine.bot, jump, hand.spot, hand.now, agent=hand.agent)
        bot.log_on(jump, 10)
        perform(bot, fitting(unroll(routine.task(hand.now), hand.dice), jump.system), 0.5)
        hand.now = bot.now

    def sweep(self, hand: Hand, person: Person) -> None:
        """Old files of a role are tidied away, many in one go."""
        dice = hand.dice
        role = dice.pick(self.organisation.roles)
        servers = self.organisation.servers["files"]
        server, topics = servers[role.number % len(servers)], self.organisation.naming.topics(role.name)
        hand.log_on(server, 3)
        for _ in range(dice.whole(8, 40)):
            hand.wait(1.5)
            name = hand.name_file(topics)
            program = dice.skewed(self._own(person))
            renamed = hand.name_file(topics) if dice.chance(0.35) else ""
            hand.touch(role.folder, name, 5 if renamed else 4, program, dice.around(120_000), server, renamed=renamed)

    def welcome(self, day: int) -> None:
        """New colleagues get an account, a group and, in the morning, some wrong passwords."""
        organisation = self.organisation
        admins = [person for person in organisation.staff(day) if person.role.admins and person.joined < day]
        for person in organisation.people:
            if person.joined == day and admins:
                dice = Dice("organisation", organisation.seed, "welcome", person.index)
                admin = dice.pick(admins)
                hours = organisation.hours(admin, day)
                hand = self.hand(admin, dice, (hours or (organisation.midnight(day) + 8 * HOUR,))[0] + 5 * MINUTE)
                hand.change_account(1, person.account)
                hand.wait(60)
                hand.change_group(3, dice.pick(organisation.groups[:-1]), person.account)
