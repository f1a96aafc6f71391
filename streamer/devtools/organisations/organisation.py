"""An organisation: people, roles, sites, hosts, services, programs, working hours. All of it is drawn by seed.

It says who and what there is, and when people work. What they do is in `tasks`, `people` and `machines`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.internet import Internet, Place, Provider, Site, Spot
from streamer.devtools.organisations.naming import Naming
from streamer.devtools.organisations.products import Account, Host, draw_products

HOUR = 3_600_000
DAY = 24 * HOUR
MINUTE = 60_000
FIRST_MONDAY = 1_736_121_600_000
"""2025-01-06T00:00:00Z; simulated time begins some weeks after it."""
LOGS = {
    "windows": ("Security", "System", "Application"),
    "linux": ("auth.log", "audit.log", "messages"),
    "macos": ("system.log", "install.log", "audit.log"),
}
"""The logs that a host keeps."""
HOMES = {"windows": "C:\\Users\\{}\\{}", "macos": "/Users/{}/{}", "linux": "/home/{}/{}"}
"""A folder of an account."""


@dataclass(frozen=True)
class Office:
    """A site of the organisation. networks: (from ms, egress address, first octets of its network), in order."""

    name: str
    place: Place
    networks: tuple[tuple[int, Spot, str], ...]
    carriers: tuple[Provider, ...]

    def network(self, now: float) -> tuple[Spot, str]:
        return next((spot, lan) for begins, spot, lan in reversed(self.networks) if begins <= now)


@dataclass(frozen=True)
class Program:
    """An executable of windows, macos or linux. versions: (from ms, version), in order; path may hold `{}` for it."""

    name: str
    path: str
    system: str
    versions: tuple[tuple[float, str], ...] = ((0, "1.0"),)

    def version(self, now: float) -> str:
        return next(version for begins, version in reversed(self.versions) if begins <= now)


@dataclass(frozen=True)
class Shift:
    """Working hours of a role, local: begin, length, and how far people stray from it. turns: shifts around the clock
    (1: none). days: weekdays, 0 is Monday."""

    begins: float
    lasts: float
    strays: float
    turns: int
    days: frozenset[int]


@dataclass(frozen=True)
class Role:
    """What a group of people has in common. number: its place; share: part of the people; mobile: how many travel."""

    number: int
    name: str
    share: float
    shift: Shift
    system: str
    mobile: float
    admins: bool
    folder: str


@dataclass(frozen=True)
class Person:
    """A person. joined: the day they started, -1 for before; turn: which shift they begin with; home: their address;
    hosts: (from ms, workstation), in order; roams: how often they work elsewhere; pace: activity against others."""

    index: int
    account: Account
    role: Role
    office: Office
    joined: int
    turn: int
    strays: float
    pace: float
    home: Spot
    roams: float
    remote: float
    hosts: tuple[tuple[int, Host], ...]
    agent: str
    topics: list[str] = field(repr=False, compare=False)

    def host(self, now: float) -> Host:
        return next(host for begins, host in reversed(self.hosts) if begins <= now)


@dataclass(frozen=True)
class Service:
    """An application of the organisation's own. deployed: the ms of its deployments, in order; its containers are
    renamed with each."""

    name: str
    site: Site
    lan: str
    copies: int
    port: int
    paths: tuple[str, ...]
    deployed: tuple[int, ...]
    contained: bool

    def release(self, now: float) -> int:
        return bisect_right(self.deployed, now)


@dataclass
class Organisation:
    """All that is drawn before the first event. start: the first midnight in ms; servers: by what they are for;
    calendar: what changes, by kind, as (from ms, what); retries: how often a step fails and is tried again; shells:
    of each system, what starts other programs; groups: the last is that of administrators."""

    seed: int
    days: int
    train_days: int
    start: int
    naming: Naming
    internet: Internet
    offices: list[Office]
    roles: list[Role]
    people: list[Person]
    bots: list[Account]
    servers: dict[str, list[Host]]
    services: list[Service]
    programs: list[Program]
    shells: dict[str, Program]
    calendar: dict[str, list[tuple[int, str]]]
    groups: list[str]
    clouds: list[str]
    places: list[Place]
    retries: float
    events_per_day: int

    def __post_init__(self) -> None:
        self.products = draw_products(self.naming, Dice("organisation", self.seed, "products"))
        self._pods: dict[tuple[str, int, int], Host] = {}

    def staff(self, day: int) -> list[Person]:
        return [person for person in self.people if person.joined <= day]

    def weekday(self, day: int) -> int:
        return ((self.start + 12 * HOUR) // DAY + day + 3) % 7

    def midnight(self, day: int) -> int:
        """In ms; the day begins by the clock of the first office."""
        return self.start + day * DAY

    def instances(self, service: Service, now: float) -> list[Host]:
        """The hosts that a service runs on at a time."""
        release = service.release(now) if service.contained else 0
        return [self._instance(service, release, n) for n in range(service.copies)]

    def _instance(self, service: Service, release: int, number: int) -> Host:
        key = service.name, release, number
        if key not in self._pods:
            dice = Dice("organisation", self.seed, "instance", *key)
            ip = address_in(service.lan, dice.below(40), dice.whole(2, 250))
            if service.contained:
                host = Host(self.naming.pod(service.name, release, number), ip, "linux", 6, self.clouds[0])
            else:
                host = Host(self.naming.server(service.name, "app", number + 1, ip), ip, "linux", 1, self.clouds[0])
            self._pods[key] = host
        return self._pods[key]

    def hours(self, person: Person, day: int) -> tuple[float, float] | None:
        """When somebody works on a day, in ms; None on a day off."""
        dice = Dice("organisation", self.seed, "hours", person.index, day)
        shift = person.role.shift
        if self.weekday(day) not in shift.days:
            if not dice.chance(0.03):
                return None
            begins, lasts = dice.between(9, 18), dice.between(0.4, 3.0)
        elif dice.chance(0.05):
            return None
        else:
            turn = (person.turn + day // 3) % shift.turns
            begins = shift.begins + turn * 24 / shift.turns + person.strays + 0.4 * dice.normal()
            lasts = max(1.5, shift.lasts + 0.6 * dice.normal())
        begins -= person.office.place.zone - self.offices[0].place.zone
        at = self.midnight(day) + begins * HOUR
        return at, at + lasts * HOUR


def address_in(network: str, third: int, fourth: int) -> str:
    """An address of a network that is given by its first two octets or, where it is small, its first three."""
    return f"{network}.{fourth}" if network.count(".") == 2 else f"{network}.{third}.{fourth}"
