"""The incidents: sixteen kinds, each of a length, pace and actor drawn anew.

They take the steps that people and machines take, through the same products, with names and addresses from the same
draws: what is wrong is who does it, in which order, how often, from where, or what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamer.devtools.organisations.activities import Activities
from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.hand import Hand
from streamer.devtools.organisations.internet import Site
from streamer.devtools.organisations.machines import Machines, Run
from streamer.devtools.organisations.organisation import DAY, HOUR, LOGS, MINUTE, Organisation, Person
from streamer.devtools.organisations.people import People
from streamer.devtools.organisations.products import Account, Host
from streamer.devtools.organisations.tasks import Call, Part, Reach, Touch, Use, fitting, perform, unroll


@dataclass
class Scene:
    """Where an incident happens: the day, its planned runs, and who is part of another incident already."""

    organisation: Organisation
    activities: Activities
    people: People
    machines: Machines
    day: int
    runs: list[Run]
    taken: set[str]
    dice: Dice
    mark: str

    def somebody(self, hours: float = 3.0, *, admins: bool | None = None) -> tuple[Person, float, float]:
        """Somebody at work today for so long at least, where there is one, with begin and end of their work.

        Whoever came within the last five days is left out, and people of another incident where possible.
        """
        organisation = self.organisation
        midnight = organisation.midnight(self.day)
        found: list[tuple[Person, float, float]] = []
        for person in organisation.staff(self.day - 5):
            worked = organisation.hours(person, self.day)
            if worked is None or (admins is not None and person.role.admins != admins):
                continue
            begin, end = max(worked[0], midnight + 10 * MINUTE), min(worked[1], midnight + DAY - 10 * MINUTE)
            if end - begin > 0.5 * HOUR:
                found.append((person, begin, end))
        if not found:
            person = self.dice.pick([person for person in organisation.people if person.joined < 0])
            found.append((person, midnight + 9 * HOUR, midnight + 17 * HOUR))
        free = [each for each in found if each[0].account.name not in self.taken] or found
        person, begins, ends = self.dice.pick([each for each in free if each[2] - each[1] >= hours * HOUR] or free)
        self.taken.add(person.account.name)
        return person, begins, ends

    def moment(self, begins: float, ends: float, needs: float = 0.0) -> float:
        """A time from which `needs` ms are left, if there are so many."""
        return self.dice.between(begins, max(begins + MINUTE, ends - needs))

    def any_time(self) -> float:
        return self.organisation.midnight(self.day) + self.dice.between(1, 22) * HOUR

    def hand(self, person: Person, now: float) -> Hand:
        return self.people.hand(person, self.dice, now)

    def run(self, longest: bool = False) -> Run:
        """A run of the day that no incident has changed yet, with steps that every run has."""
        start = self.organisation.midnight(self.day)
        fitting = [
            run
            for run in self.runs
            if not run.mark
            and start + 0.5 * HOUR < run.begins < start + 22 * HOUR
            and sum(step.required for step in run.steps) >= 3
            and len({step.part for step in run.steps}) >= 4
        ]
        by_routine: dict[str, list[Run]] = {}
        for run in fitting or [run for run in self.runs if not run.mark]:
            by_routine.setdefault(run.routine.bot.name, []).append(run)
        run = self.dice.pick(by_routine[self.dice.pick(sorted(by_routine))])
        run.mark = self.mark
        return run

    def new_site(self) -> Site:
        """A site that nobody has visited, named and addressed as suppliers' are; at times one that others use."""
        internet = self.organisation.internet
        return internet.visited(self.dice) if self.dice.chance(0.25) else internet.site(self.dice)


def half_routine(scene: Scene) -> str:
    """A run of a routine stops half-way."""
    run = scene.run()
    parts = sorted({step.part for step in run.steps})
    last = parts[max(1, int(len(parts) * scene.dice.between(0.25, 0.75)))]
    run.steps = [step for step in run.steps if step.part < last]
    return run.routine.bot.name


def skipped_steps(scene: Scene) -> str:
    """One to three steps that every run has are left out."""
    run = scene.run()
    required = sorted({step.part for step in run.steps if step.required})
    gone = set(scene.dice.some(required[1:-1] or required, scene.dice.whole(1, 3)))
    run.steps = [step for step in run.steps if step.part not in gone]
    return run.routine.bot.name


def wrong_order(scene: Scene) -> str:
    """Required steps change places."""
    run = scene.run()
    places = [n for n, step in enumerate(run.steps) if step.required]
    mixed = list(run.steps)
    for pair in zip(*[iter(scene.dice.shuffled(places))] * 2, strict=False):
        if run.steps[pair[0]].step != run.steps[pair[1]].step:
            mixed[pair[0]], mixed[pair[1]] = mixed[pair[1]], mixed[pair[0]]
            if scene.dice.chance(0.6):
                break
    run.steps = mixed
    return run.routine.bot.name


def another_roles_work(scene: Scene) -> str:
    """Somebody does tasks of another role."""
    person, begins, ends = scene.somebody()
    hand = scene.hand(person, scene.moment(begins, ends, 2 * HOUR))
    others = [role for role in scene.organisation.roles if role.number != person.role.number]
    tasks = scene.activities.of_role(scene.dice.pick(others), hand.now)
    for _ in range(scene.dice.whole(2, 8)):
        perform(hand, fitting(unroll(scene.dice.pick(tasks), scene.dice), person.role.system))
        hand.wait(scene.dice.around(200, 1.0))
    return person.account.name


def two_places(scene: Scene) -> str:
    """Somebody's account is used from a far place while they are at work, or soon after."""
    person, begins, ends = scene.somebody()
    hand = scene.hand(person, scene.moment(begins, ends))
    internet, here = scene.organisation.internet, hand.spot.place
    away = [place for place in scene.organisation.places if place.country != here.country]
    place = scene.dice.pick(away) if away and scene.dice.chance(0.5) else internet.place(scene.dice)
    hand.spot = internet.spot(place, scene.dice)
    role = person.role
    calls = [task for task in scene.activities.of_role(role, hand.now) if _outward(task.parts)]
    for _ in range(scene.dice.whole(1, 6)):
        scene.people.sign_on(hand, person)
        hand.wait(scene.dice.around(60, 1.0))
        if calls and scene.dice.chance(0.6):
            steps = unroll(scene.dice.pick(calls), scene.dice)
            perform(hand, [step for step in steps if isinstance(step.step, Call)])
    return person.account.name


def _outward(parts: tuple[Part, ...]) -> bool:
    return any(isinstance(step, Call) for part in parts for way in part.ways for step in way)


def _spray(scene: Scene, pause: float, most: int) -> str:
    """Passwords are tried for many people from one address or a few; one may be right."""
    dice, organisation = scene.dice, scene.organisation
    place = dice.pick(organisation.places) if dice.chance(0.5) else organisation.internet.place(dice)
    spots = [organisation.internet.spot(place, dice) for _ in range(dice.pick((1, 1, 2, 4)))]
    staff = organisation.staff(scene.day)
    tried = dice.some(staff, max(8, int(len(staff) * dice.between(0.3, 1.0)))) * dice.pick((1, 1, 2))
    agent, app, success = (
        scene.people.agent(dice.pick(staff), scene.day),
        dice.pick(scene.people.apps),
        dice.chance(0.6),
    )
    now = organisation.midnight(scene.day) + dice.between(1, 22 - min(20.0, pause * most / 3600)) * HOUR
    for n, person in enumerate(tried[:most]):
        hand = Hand(organisation, scene.machines.journal, dice, person.account, person.host(now), dice.pick(spots), now,
                    agent=agent)  # fmt: skip
        hand.wait(pause)
        hand.sign_on(app, failed="wrong password", multi=False)
        now = hand.now
        if success and n == min(len(tried), most) - 1:
            hand.wait(5)
            hand.sign_on(app, multi=False)
    return spots[0].ip


def spray_fast(scene: Scene) -> str:
    """Many passwords within minutes."""
    return _spray(scene, scene.dice.around(2.5, 0.6), 80)


def spray_slow(scene: Scene) -> str:
    """The same over hours."""
    return _spray(scene, scene.dice.between(240, 900), 50)


def exfiltration_large(scene: Scene) -> str:
    """One to three large uploads after much has been read."""
    person, begins, ends = scene.somebody()
    dice, hand = scene.dice, scene.hand(person, scene.moment(begins, ends, HOUR))
    for _ in range(dice.whole(1, 5)):
        scene.people.share(hand, person)
        hand.wait(dice.around(40, 0.8))
    site = dice.pick(scene.people.stores) if dice.chance(0.5) else scene.new_site()
    for _ in range(dice.whole(1, 3)):
        hand.resolve(site.name, site.ip)
        hand.request(
            site, f"/upload/{dice.hex(8)}", dice.pick(("PUT", "POST")), dice.around(2.5e8, 0.9), dice.around(900)
        )
        hand.wait(dice.around(120, 1.0))
    return person.account.name


def exfiltration_small(scene: Scene) -> str:
    """Many uploads of usual size over hours."""
    person, begins, ends = scene.somebody(5.0)
    dice = scene.dice
    hand = scene.hand(person, begins + dice.between(0.02, 0.3) * (ends - begins))
    pieces = dice.whole(15, 70)
    pause = min(dice.around(300, 0.5), (ends - hand.now) / 1000 / pieces)
    site = scene.people.stores[person.index % 2] if dice.chance(0.6) else scene.new_site()
    for _ in range(pieces):
        if dice.chance(0.4):
            hand.resolve(site.name, site.ip)
        hand.request(
            site, f"/upload/{dice.hex(8)}", dice.pick(("PUT", "POST")), dice.around(1_500_000, 0.8), dice.around(900)
        )
        hand.now += 1000 * pause * dice.between(0.4, 1.6)
    return person.account.name


def beaconing(scene: Scene) -> str:
    """A workstation or server asks a site for orders, again and again."""
    dice, organisation = scene.dice, scene.organisation
    person, begins, ends = scene.somebody(4.0)
    hand = scene.hand(person, begins + dice.between(0.0, 0.3) * (ends - begins))
    if dice.chance(0.25):
        hand = scene.machines.hand(scene.machines.nobody, dice.pick(scene.people.machines()), dice, scene.any_time())
        ends = organisation.midnight(scene.day) + DAY - 10 * MINUTE
    elif dice.chance(0.5):
        hand.agent = scene.machines.agent
    site, pause, jitter = scene.new_site(), dice.around(240, 0.8), dice.between(0.02, 0.4)
    for n in range(dice.whole(12, 120)):
        if hand.now > ends:
            break
        if n % 10 == 0:
            hand.resolve(site.name, site.ip)
        hand.request(site, dice.pick(("/v1/check", "/", "/static/app.js")), dice.pick(("GET", "POST")),
                     dice.around(600, 0.2), dice.around(700, 0.4))  # fmt: skip
        hand.now += 1000 * pause * dice.between(1 - jitter, 1 + jitter)
    return hand.host.name


def unseen_program(scene: Scene) -> str:
    """A program that nobody had is started and talks to the internet."""
    person, begins, ends = scene.somebody()
    dice, hand = scene.dice, scene.hand(person, scene.moment(begins, ends, HOUR))
    tool = scene.people.new_tool(person.role.system, dice)
    shell = scene.organisation.shells[person.role.system]
    parent = (
        shell if dice.chance(0.4) else dice.pick([p for p in scene.organisation.programs if p.system == shell.system])
    )
    site = scene.new_site()
    for _ in range(dice.whole(1, 4)):
        hand.launch(tool, dice.pick(("", "-v", "--status", "-l")), parent)
        hand.wait(dice.around(20, 0.8))
        hand.resolve(site.name, site.ip)
        hand.request(
            site, f"/{dice.hex(6)}", dice.pick(("GET", "POST")), dice.around(900, 0.8), dice.around(30_000, 1.2)
        )
        hand.wait(dice.around(300, 1.0))
    if dice.chance(0.4):
        hand.schedule(tool, "update", hand.host)
    return person.account.name


def lateral_movement(scene: Scene) -> str:
    """Somebody who does not do so goes from machine to machine."""
    person, begins, ends = scene.somebody(admins=False)
    dice = scene.dice
    now = scene.any_time() if dice.chance(0.3) else scene.moment(begins, ends, 2 * HOUR)
    hand = scene.hand(person, now)
    staff = [other for other in scene.organisation.staff(scene.day) if other is not person]
    targets: list[Host] = dice.some(scene.people.machines(), dice.whole(1, 4))
    targets += [other.host(now) for other in dice.some(staff, dice.whole(1, 5))]
    pause = dice.around(300, 1.0)
    for host in dice.shuffled(targets):
        if dice.chance(0.25):
            hand.log_on(host, 3, failed="bad password")
            hand.wait(10)
        scene.people.visit(hand, person, host, dice.whole(1, 3))
        hand.wait(pause)
    return person.account.name


def bot_by_hand(scene: Scene) -> str:
    """A service account is used from a workstation, to look around where its routine never goes."""
    person, begins, ends = scene.somebody()
    dice, routine = scene.dice, scene.dice.pick(scene.activities.routines)
    own = scene.hand(person, scene.moment(begins, ends, HOUR))
    hand = Hand(own.organisation, own.journal, dice, routine.bot, own.host, own.spot, own.now, agent=own.agent)
    hand.shell = own.shell
    hand.log_on(dice.pick((own.host, dice.pick(scene.people.machines()))), dice.pick((2, 3, 10)), source=own.host)
    foreign = [task for role in scene.organisation.roles for task in scene.activities.of_role(role, hand.now)]
    for _ in range(dice.whole(1, 5)):
        task = routine.task(hand.now) if dice.chance(0.3) else dice.pick(foreign)
        perform(hand, fitting(unroll(task, dice), own.host.system)[: dice.whole(3, 12)])
        hand.wait(dice.around(90, 1.0))
    return routine.bot.name


def privilege_change(scene: Scene) -> str:
    """Somebody gives rights to themselves or another, who then uses them."""
    person, begins, ends = scene.somebody(admins=False if scene.dice.chance(0.7) else None)
    dice, organisation = scene.dice, scene.organisation
    now = scene.any_time() if dice.chance(0.3) else scene.moment(begins, ends, HOUR)
    hand = scene.hand(person, now)
    other = person.account if dice.chance(0.6) else dice.pick(organisation.people).account
    if dice.chance(0.3):
        made = organisation.naming.account(
            organisation.naming.word(), organisation.naming.word(), len(organisation.people)
        )
        other = Account(made, 1900 + dice.below(90), 1, made.title())
        hand.change_account(1, other)
        hand.wait(20)
    if dice.chance(0.5):
        hand.change_account(7, other)
        hand.wait(20)
    hand.change_group(3, organisation.groups[-1] if dice.chance(0.7) else dice.pick(organisation.groups), other)
    for _ in range(dice.whole(0, 2)):
        hand.wait(dice.around(200, 1.0))
        scene.people.visit(hand, person, dice.pick(scene.people.machines()))
    return person.account.name


def log_deletion(scene: Scene) -> str:
    """Logs are cleared or deleted by somebody who has no reason to."""
    dice = scene.dice
    person, begins, ends = scene.somebody()
    now = scene.any_time() if dice.chance(0.4) else scene.moment(begins, ends, HOUR)
    hand = scene.hand(person, now)
    hosts = dice.some([*scene.people.machines(), hand.host], dice.whole(1, 3))
    for host in hosts:
        hand.log_on(host, 10 if host.system == "windows" else 3)
        for log in dice.some(LOGS[host.system], dice.whole(1, 3)):
            hand.wait(dice.around(8, 0.7))
            hand.keep_logs(dice.pick((1, 1, 2)), log, host)
    return person.account.name


def mass_file_change(scene: Scene) -> str:
    """Files of a share are changed, renamed or deleted by the dozen."""
    dice = scene.dice
    person, begins, ends = scene.somebody()
    now = scene.any_time() if dice.chance(0.4) else scene.moment(begins, ends, HOUR)
    hand = scene.hand(person, now)
    role = person.role if dice.chance(0.6) else dice.pick(scene.organisation.roles)
    servers, naming = scene.organisation.servers["files"], scene.organisation.naming
    server, topics = servers[role.number % len(servers)], naming.topics(role.name)
    program = dice.pick([p for p in scene.organisation.programs if p.system == person.role.system])
    hand.log_on(server, 3)
    kind, pause = dice.pick(("change", "rename", "delete")), dice.around(1.5, 0.9)
    for _ in range(dice.whole(30, 200)):
        hand.wait(pause)
        name, size = hand.name_file(topics), dice.around(120_000)
        if kind != "delete":
            hand.touch(role.folder, name, 3, program, size, server)
        if kind != "change":
            renamed = hand.name_file(topics) if kind == "rename" else ""
            hand.touch(role.folder, name, 5 if renamed else 4, program, size, server, renamed=renamed)
    return person.account.name


def slow_misuse(scene: Scene) -> str:
    """Somebody reads through records of their own role that they have no business with, for hours."""
    person, begins, ends = scene.somebody(5.0)
    dice = scene.dice
    hand = scene.hand(person, begins + dice.between(0.02, 0.2) * (ends - begins))
    reads = [
        step
        for task in scene.activities.of_role(person.role, hand.now)
        for part in task.parts
        for way in part.ways
        for step in way
        if (isinstance(step, (Call, Touch)) and step.activity == 2) or isinstance(step, Reach)
        or (isinstance(step, Use) and step.method == "GET")
    ]  # fmt: skip
    count = dice.whole(40, 150)
    pause = (ends - hand.now) / 1000 / count * dice.between(0.6, 1.0)
    chosen = dice.some(reads, 2)
    for _ in range(count):
        hand.now += 1000 * pause * dice.between(0.3, 1.7)
        if chosen:
            dice.pick(chosen).perform(hand, False)
        else:
            scene.people.share(hand, person)
    return person.account.name


KINDS: dict[str, Callable[[Scene], str]] = {
    kind.__name__: kind
    for kind in (
        half_routine, skipped_steps, wrong_order, another_roles_work, two_places, spray_fast, spray_slow,
        exfiltration_large, exfiltration_small, beaconing, unseen_program, lateral_movement, bot_by_hand,
        privilege_change, log_deletion, mass_file_change, slow_misuse,
    )
}  # fmt: skip
"""Each makes its events (or changes a planned run) and returns whom it is about: an account, a host or an address."""
