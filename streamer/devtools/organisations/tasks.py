"""Tasks: bodies of steps, some of them optional, repeated or one of two, drawn for roles and for service accounts.

`unroll` decides how a body goes this time; what comes of it is a list of steps that an incident may change before
`perform` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.hand import Hand
from streamer.devtools.organisations.organisation import HOMES, Organisation, Program, Service
from streamer.devtools.organisations.products import Host

# What a step may be.


@dataclass(frozen=True)
class Call:
    """An API call about one of some resources."""

    service: str
    operation: str
    activity: int
    topics: tuple[str, ...]

    def perform(self, hand: Hand, failed: bool) -> None:
        resource = f"{hand.dice.skewed(self.topics)}-{int(hand.dice.random() ** 2 * 60)}"
        hand.call(self.service, self.operation, self.activity, resource, failed="AccessDenied" if failed else "")


@dataclass(frozen=True)
class Use:
    """A request to a service of the organisation."""

    service: Service
    path: str
    method: str
    size: float

    def perform(self, hand: Hand, failed: bool) -> None:
        path = self.path.replace("#", str(1000 + int(hand.dice.random() ** 2 * 900)))
        code = hand.dice.pick((500, 503, 429, 404)) if failed else 200
        sent, received = hand.dice.around(900, 0.6), hand.dice.around(self.size, 0.9)
        if self.method in ("POST", "PUT"):
            sent, received = received, sent
        hand.use(self.service, path, self.method, sent, received, code)


@dataclass(frozen=True)
class Reach:
    """A connection to a server."""

    server: Host
    port: int
    sent: float
    received: float

    def perform(self, hand: Hand, failed: bool) -> None:
        sent, received = hand.dice.around(self.sent, 0.7), hand.dice.around(self.received, 0.8)
        hand.connect(self.server, self.port, sent, received, failed=failed)


@dataclass(frozen=True)
class Launch:
    """A program is started where the one who acts works, by the shell unless by `parent`."""

    program: Program
    arguments: str
    parent: Program | None = None

    def perform(self, hand: Hand, failed: bool) -> None:
        arguments = self.arguments.replace("#", str(hand.dice.below(500)))
        hand.launch(self.program, arguments, self.parent)


@dataclass(frozen=True)
class Touch:
    """A file in a folder, on a server or where the one who acts works."""

    program: Program
    folder: str
    topics: tuple[str, ...]
    activity: int
    size: float
    server: Host | None = None

    def perform(self, hand: Hand, failed: bool) -> None:
        name = hand.name_file(self.topics)
        folder = self.folder.replace("~", hand.account.name)
        size = hand.dice.around(self.size, 1.0)
        hand.touch(folder, name, self.activity, self.program, size, self.server, failed="locked" if failed else "")


@dataclass(frozen=True)
class Enter:
    """A logon on a server over the network, or its end."""

    server: Host
    kind: int
    off: bool = False

    def perform(self, hand: Hand, failed: bool) -> None:
        hand.log_on(self.server, self.kind, failed="bad password" if failed else "", off=self.off)


Step: TypeAlias = Call | Use | Reach | Launch | Touch | Enter


@dataclass(frozen=True)
class Part:
    """One or two ways to take a part of a body. chance: that it is taken at all; again: that it is repeated; seconds:
    the mean wait before each step; share: how often the first way is taken."""

    ways: tuple[tuple[Step, ...], ...]
    chance: float
    again: float
    seconds: float
    share: float

    @property
    def required(self) -> bool:
        return self.chance == 1.0 and len(self.ways) == 1

    def expected(self) -> float:
        """The mean number of steps."""
        first, other = len(self.ways[0]), len(self.ways[-1])
        return self.chance * (self.share * first + (1 - self.share) * other) / (1 - self.again)


@dataclass(frozen=True)
class Task:
    """Something that is done again and again. weight: how often, against other tasks."""

    name: str
    parts: tuple[Part, ...]
    weight: float = 1.0

    def expected(self) -> float:
        return sum(part.expected() for part in self.parts)


@dataclass(frozen=True)
class Planned:
    """A step as it will be taken this time. part: its place in the task; required: whether every run has it."""

    step: Step
    part: int
    required: bool
    seconds: float


def unroll(task: Task, dice: Dice) -> list[Planned]:
    """The steps of one run."""
    planned: list[Planned] = []
    for place, part in enumerate(task.parts):
        if not dice.chance(part.chance):
            continue
        while True:
            way = part.ways[0] if dice.chance(part.share) else part.ways[-1]
            planned += (Planned(step, place, part.required, part.seconds) for step in way)
            if not dice.chance(part.again):
                break
    return planned


def fitting(planned: Sequence[Planned], system: str) -> list[Planned]:
    """The steps that can be taken on a host of this system."""

    def fits(step: Step) -> bool:
        if isinstance(step, Launch):
            return step.program.system == system
        return not isinstance(step, Touch) or step.server is not None or step.program.system == system

    return [each for each in planned if fits(each.step)]


def perform(hand: Hand, planned: Sequence[Planned], haste: float = 1.0) -> None:
    """Take the steps. haste: how much shorter the waits are. A step that fails is tried again, after a longer wait."""
    for each in planned:
        hand.wait(each.seconds / haste)
        pause = 2.0
        while hand.dice.chance(hand.organisation.retries):
            if not isinstance(each.step, Launch):
                each.step.perform(hand, True)
            hand.wait(pause)
            pause *= 2.5
        each.step.perform(hand, False)


# How they are drawn.


class Drawing:
    """Draws steps and tasks from what an organisation has. topics: the words that their files and records are named
    with."""

    def __init__(self, organisation: Organisation, dice: Dice, system: str, topics: Sequence[str], folder: str) -> None:
        self.organisation, self.dice, self.system = organisation, dice, system
        self.topics, self.folder = tuple(topics), folder
        naming = organisation.naming
        self.api = dice.pick(("", f"{naming.name}-")) + naming.word()
        self.services = dice.some(organisation.services, 3)
        self.programs = dice.some([p for p in organisation.programs if p.system == system], 4)
        self.stores = dice.some(organisation.servers["data"], 2)
        self.shares = dice.some(organisation.servers["files"], 1)

    def step(self) -> Step:
        dice, naming = self.dice, self.organisation.naming
        kinds = ["call", "use", "reach", "touch", "share"]
        product = "endpoint" if self.system != "linux" else "server"
        if product in self.organisation.products:
            kinds += ["launch", "launch"]
        kind = dice.pick(kinds)
        activity = dice.weighted((2, 3, 1, 4), (6, 2, 1.5, 0.5))
        if kind == "call":
            return Call(self.api, naming.operation(activity, dice.pick(self.topics), dice), activity, self.topics)
        if kind == "use":
            service = dice.pick(self.services)
            method = {2: "GET", 3: "PUT", 1: "POST", 4: "DELETE"}[activity]
            return Use(service, dice.pick(service.paths), method, dice.around(15_000, 1.0))
        if kind == "reach":
            port = dice.pick((5432, 3306, 1433, 6379, 9200, 8443))
            return Reach(dice.pick(self.stores), port, dice.around(3_000), dice.around(50_000))
        if kind == "launch":
            option = dice.pick(("--", "-", "/" if self.system == "windows" else "--"))
            topic = dice.pick(self.topics)
            parent = dice.pick(self.programs) if dice.chance(0.4) else None
            arguments = dice.pick((f"{option}{topic}", f"{option}run {topic}#", topic))
            return Launch(dice.pick(self.programs), arguments, parent)
        program = dice.pick(self.programs)
        if kind == "share":
            return Touch(program, self.folder, self.topics, activity, dice.around(150_000), self.shares[0])
        home = HOMES[self.system].format("~", "Documents")
        return Touch(program, home, self.topics, activity, dice.around(90_000))

    def part(self, seconds: float, *, required: bool = False) -> Part:
        dice = self.dice
        form = "one" if required else dice.weighted(("one", "maybe", "again", "either", "pair"), (5, 2, 2, 1.5, 1))
        pace = dice.around(seconds, 0.6)
        if form == "either":
            ways = tuple(tuple(self.step() for _ in range(dice.whole(1, 2))) for _ in range(2))
            return Part(ways, 1.0, 0.0, pace, dice.between(0.4, 0.9))
        steps = (self.step(),) if form != "pair" else (self.step(), self.step())
        chance = dice.between(0.25, 0.9) if form == "maybe" else 1.0
        again = dice.between(0.2, 0.75) if form in ("again", "pair") else 0.0
        return Part((steps,), chance, again, pace, 1.0)

    def task(self, name: str, parts: int, seconds: float, *, entered: Host | None = None, kind: int = 3) -> Task:
        """A task of so many parts, of which three at least are required; with a logon around them where `entered` is
        given."""
        made = [self.part(seconds) for _ in range(parts)]
        while sum(part.required for part in made) < 3:
            made[self.dice.below(parts)] = self.part(seconds, required=True)
        if entered is not None:
            begin, end = (Part(((Enter(entered, kind, off),),), 1.0, 0.0, 2.0, 1.0) for off in (False, True))
            made = [begin, *made, end]
        return Task(name, tuple(made), self.dice.around(1.0, 0.7))

    def changed(self, task: Task, seconds: float) -> Task:
        """The task after a release: one or two parts more, and at times one less."""
        parts = list(task.parts)
        for _ in range(self.dice.whole(1, 2)):
            parts.insert(self.dice.whole(1, len(parts) - 1), self.part(seconds, required=self.dice.chance(0.6)))
        if self.dice.chance(0.35) and len(parts) > 6:
            del parts[self.dice.whole(1, len(parts) - 2)]
        return Task(task.name, tuple(parts), task.weight)
