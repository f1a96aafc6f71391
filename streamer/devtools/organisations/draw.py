"""Draws an organisation, and what changes in it without being an incident.

In the test days of every organisation there are deployments, a release, an outage of a sensor, a new network of an
office, replaced workstations and new colleagues; some come in training, too. `Organisation.calendar` lists them.
"""

from __future__ import annotations

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.internet import Internet, Place, Site, Spot
from streamer.devtools.organisations.naming import Naming
from streamer.devtools.organisations.organisation import (
    DAY,
    FIRST_MONDAY,
    HOUR,
    Office,
    Organisation,
    Person,
    Program,
    Role,
    Service,
    Shift,
    address_in,
)
from streamer.devtools.organisations.products import Account, Host

_WEEK = frozenset(range(5))
_ROOTS = {"windows": "C:\\Program Files", "macos": "/Applications", "linux": "/usr/bin"}
_AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/{}.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:{}.0) Gecko/20100101 Firefox/{}.0",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 Version/{}.1 Safari/605.1.15",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/{}.0.0.0 Edg/{}.0",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/{}.0.0.0",
)


class _Planner:
    """Moments in training and test, as ms."""

    def __init__(self, dice: Dice, start: int, train_days: int, days: int) -> None:
        self.dice, self.start, self.train_days, self.days = dice, start, train_days, days
        self.calendar: dict[str, list[tuple[int, str]]] = {}

    def test_day(self) -> int:
        """A test day, of a working week where there is one."""
        test = range(self.train_days, self.days)
        return self.dice.pick([day for day in test if day % 7 < 5] or list(test))

    def midweek(self) -> int:
        test = range(self.train_days, self.days)
        return self.dice.pick([day for day in test if day % 7 in (1, 2, 3)] or list(test))

    def train_day(self) -> int:
        return self.dice.below(max(1, self.train_days))

    def at(self, day: int, earliest: float, latest: float) -> int:
        return self.start + day * DAY + int(self.dice.between(earliest, latest) * HOUR)

    def note(self, kind: str, at: int, what: str) -> int:
        self.calendar.setdefault(kind, []).append((at, what))
        return at


def draw_organisation(seed: int, *, train_days: int, test_days: int, events_per_day: int) -> Organisation:
    """Everything that is the same on each day, or known before the first."""
    dice, naming = Dice("organisation", seed), Naming(seed)
    days = train_days + test_days
    internet = Internet(naming, dice)
    places = [internet.place(dice) for _ in range(14)]
    first = places[0]
    start = FIRST_MONDAY + dice.below(70) * 7 * DAY - first.zone * HOUR
    plan = _Planner(dice, start, train_days, days)
    clouds = [f"{dice.pick(('eu', 'us', 'ap'))}-{dice.pick(('central', 'west', 'north', 'east'))}-{dice.whole(1, 3)}"]
    lan = dice.pick(("10", "172", "192.168", "10", "10"))
    offices = _offices(plan, internet, [first, *dice.some(places[1:], dice.below(3))], lan, naming)
    programs, shells = _programs(plan, naming)
    services = _services(plan, naming, internet, lan)
    roles = _roles(dice, naming)
    people = _people(plan, naming, internet, offices, roles, events_per_day)
    servers: dict[str, list[Host]] = {}
    for purpose, least, most in (("directory", 1, 1), ("files", 1, 3), ("data", 2, 4), ("jobs", 1, 3), ("jump", 1, 2)):
        system = "linux" if purpose in ("data", "jobs") and dice.chance(0.75) else dice.pick(("windows", "linux"))
        role = dice.pick({"directory": ("dc", "ad"), "files": ("fs", "nas", "file"), "data": ("db", "sql", "data"),
                          "jobs": ("batch", "etl", "job"), "jump": ("jump", "bastion", "adm")}[purpose])  # fmt: skip
        for number in range(1, dice.whole(least, most) + 1):
            ip = _inside(lan, 2, dice)
            name = naming.server(role, offices[0].name, number, ip)
            servers.setdefault(purpose, []).append(Host(name, ip, system, 1, clouds[0]))
    bots = [Account(naming.bot(naming.word()), 7000 + n, 3, "") for n in range(dice.whole(4, 9))]
    before = dice.pick(("grp-", "g_", "role-", "", ""))
    groups = [f"{before}{naming.word()}" for _ in range(dice.whole(4, 8))]
    groups.append(dice.pick(("Domain Admins", "Administrators", f"{naming.name}-admins", "wheel", "owners")))
    organisation = Organisation(
        seed=seed, days=days, train_days=train_days, start=start, naming=naming, internet=internet, offices=offices,
        roles=roles, people=people, bots=bots, servers=servers, services=services, programs=programs, shells=shells,
        calendar=plan.calendar, groups=groups, clouds=clouds, places=places, retries=dice.between(0.002, 0.03),
        events_per_day=events_per_day,
    )  # fmt: skip
    _outages(plan, organisation)
    return organisation


def _inside(lan: str, number: int, dice: Dice) -> str:
    return address_in(_network(lan, number), dice.below(40), dice.whole(2, 250))


def _network(lan: str, number: int) -> str:
    """The first octets of a network of the organisation, whose addresses all begin with `lan`."""
    return f"{lan}.{16 + number % 16}" if "." not in lan else f"{lan}.{number * 8}"


def _offices(plan: _Planner, internet: Internet, places: list[Place], lan: str, naming: Naming) -> list[Office]:
    dice = plan.dice
    moving = dice.below(len(places))
    made = []
    for number, place in enumerate(places):
        networks: list[tuple[int, Spot, str]] = [(0, internet.spot(place, dice), _network(lan, 3 + number))]
        if number == moving:
            at = plan.note("network", plan.at(plan.test_day(), 3, 6), place.city)
            networks.append((at, internet.spot(place, dice), _network(lan, 9 + number)))
        carriers = place.providers[:2]
        made.append(Office(naming.word() if dice.chance(0.5) else place.city.lower(), place, tuple(networks), carriers))
    return made


def _programs(plan: _Planner, naming: Naming) -> tuple[list[Program], dict[str, Program]]:
    """Nine of each system, a few of which change with the release; and what starts others."""
    dice, made = plan.dice, []
    release = plan.note("release", plan.at(plan.midweek(), 8, 15), "programs and tasks")
    for system in _ROOTS:
        form = dice.below(3)
        for n in range(9):
            word = naming.word()
            versions: list[tuple[float, str]] = [(0, f"{dice.whole(1, 9)}.{dice.below(10)}")]
            if n < 3:
                versions.append((release, f"{dice.whole(10, 12)}.{dice.below(10)}"))
            made.append(Program(_executable(word, system), program_path(word, system, form), system, tuple(versions)))
    shells = {
        "windows": Program("explorer.exe", "C:\\Windows\\explorer.exe", "windows"),
        "macos": Program("launchd", "/sbin/launchd", "macos"),
        "linux": Program(*dice.pick((("bash", "/usr/bin/bash"), ("sh", "/bin/sh"), ("systemd", "/usr/lib/systemd"))),
                         "linux"),
    }  # fmt: skip
    return made, shells


def _executable(word: str, system: str) -> str:
    return f"{word}.exe" if system == "windows" else word.title() if system == "macos" else word


def program_path(word: str, system: str, form: int) -> str:
    """Where a program of that name lies. form: one of three habits, the last of which has the version in the path."""
    name = _executable(word, system)
    return {
        "windows": (f"C:\\Program Files\\{word.title()}\\{name}", f"C:\\Apps\\{word}\\{name}",
                    f"C:\\ProgramData\\{word}\\{{}}\\{name}"),
        "macos": (f"/Applications/{name}.app/Contents/MacOS/{name}", f"/usr/local/bin/{name}",
                  f"/opt/{word}/{{}}/{name}"),
        "linux": (f"/usr/bin/{name}", f"/opt/{word}/bin/{name}", f"/srv/{word}/{{}}/{name}"),
    }[system][form]  # fmt: skip


def _services(plan: _Planner, naming: Naming, internet: Internet, lan: str) -> list[Service]:
    dice, made = plan.dice, []
    for n in range(dice.whole(3, 6)):
        contained = n == 0 or dice.chance(0.6)
        name = naming.word()
        moments: list[int] = []
        if contained:
            days = [day for day in range(plan.days) if dice.chance(0.35 if day % 7 < 5 else 0.05)]
            if n == 0:
                days.append(plan.test_day())
            moments = sorted({plan.at(day, 8, 18) for day in days})
            for moment in moments:
                plan.note("deployment", moment, name)
        topics = naming.topics(name)
        shape = dice.pick(("/api/{}/#", "/{}/#", "/v1/{}", "/{}/view", "/rest/{}/#/items"))
        host = dice.pick((f"{name}.{naming.domain}", f"{name}.{naming.internal}", f"apps.{naming.domain}"))
        site = Site(host, _inside(lan, 1, dice))
        paths = tuple(shape.format(topic) for topic in topics)
        made.append(
            Service(name, site, _network(lan, 12 + n), dice.whole(2, 4), dice.pick((443, 8080, 8443, 9000)), paths,
                    tuple(moments), contained)
        )  # fmt: skip
    return made


def _roles(dice: Dice, naming: Naming) -> list[Role]:
    usual = Shift(dice.between(6.5, 9.5), dice.between(7.0, 9.0), 0.0, 1, _WEEK)
    weekend = dice.pick((_WEEK, _WEEK, _WEEK, frozenset((6, 0, 1, 2, 3))))
    systems = dice.pick((("windows",), ("windows", "macos"), ("windows", "linux"), ("windows", "macos", "linux")))
    number = dice.whole(4, 6)
    turning = dice.whole(1, number - 1) if dice.chance(0.7) else -1
    made = []
    for n in range(number):
        shift = Shift(usual.begins + 0.7 * dice.normal(), usual.lasts, dice.between(0.3, 1.3), 1, weekend)
        if n == turning:
            shift = Shift(6.0, 8.2, 0.2, dice.whole(2, 3), frozenset(range(7)))
        word = naming.word()
        made.append(
            Role(n, word, dice.around(1.0, 0.5) * (0.5 if n == 0 else 1.0), shift, dice.pick(systems),
                 dice.pick((0.0, 0.02, 0.05, 0.3)), n == 0, _folder(word, dice))
        )  # fmt: skip
    return made


def _folder(word: str, dice: Dice) -> str:
    forms = ("D:\\shares\\{}", "E:\\Data\\{}", "/srv/share/{}", "/mnt/files/{}", "/export/{}/docs")
    return dice.pick(forms).format(word)


def _people(
    plan: _Planner, naming: Naming, internet: Internet, offices: list[Office], roles: list[Role], events_per_day: int
) -> list[Person]:
    dice = plan.dice
    founders = max(12, round(events_per_day * 0.65 / dice.between(130, 260)))
    joined = [-1] * founders + [plan.test_day() for _ in range(dice.whole(1, 3))]
    joined += [plan.train_day() for _ in range(dice.below(3))]
    replaced = {dice.below(founders): plan.test_day() for _ in range(dice.whole(1, 3))}
    replaced |= {dice.below(founders): plan.train_day() for _ in range(dice.below(3))}
    firsts, lasts = ([naming.word() for _ in range(n)] for n in (24, 31))
    shares = [role.share for role in roles]
    made = []
    for index, day in enumerate(joined):
        first, last = firsts[index % 24], lasts[(index * 5 + index // 24) % 31]
        role = roles[index] if index < len(roles) else dice.weighted(roles, shares)
        office = offices[0] if dice.chance(0.6) else dice.pick(offices)
        kind = 2 if role.admins and dice.chance(0.5) else 1
        account = Account(naming.account(first, last, index), 1100 + index, kind, f"{first.title()} {last.title()}")
        hosts = _desks(plan, naming, office, role, account, index, replaced.get(index))
        if day >= 0:
            plan.note("colleague", plan.at(day, 7, 9), account.name)
        agent = dice.pick([agent for agent in _AGENTS if ("Windows" in agent) == (role.system == "windows")])
        made.append(
            Person(
                index=index, account=account, role=role, office=office, joined=day, turn=dice.below(3),
                strays=role.shift.strays * dice.normal() * 0.6, pace=dice.around(1.0, 0.3),
                home=internet.spot(office.place, dice), roams=role.mobile if dice.chance(0.7) else 0.0,
                remote=dice.pick((0.0, 0.0, 0.2, 0.4, 0.9)), hosts=hosts, agent=agent,
                topics=[*dice.some(naming.topics(role.name), 4), naming.word()],
            )
        )  # fmt: skip
    return made


def _desks(
    plan: _Planner, naming: Naming, office: Office, role: Role, account: Account, index: int, replaced: int | None
) -> tuple[tuple[int, Host], ...]:
    """The workstations of a person: a new one where it is replaced, a new address where the office's network is new."""
    dice = plan.dice
    kind = dice.pick((2, 3, 3))
    changes = [(begins, "network") for begins, _, _ in office.networks]
    if replaced is not None:
        at = plan.note("workstation", plan.at(replaced, 5, 7), account.name)
        changes.append((at, "workstation"))
    made: list[tuple[int, Host]] = []
    name = naming.desk(account.name, office.name, index, dice)
    for begins, what in sorted(changes):
        if what == "workstation":
            name = naming.desk(account.name, office.name, index + 500, dice) + (
                "-2" if naming.desks == "account" else ""
            )
        lan = office.network(begins)[1]
        ip = address_in(lan, index // 200, 10 + index % 200)
        made.append((begins, Host(name, ip, role.system, kind, office.name)))
    return tuple(made)


def _outages(plan: _Planner, organisation: Organisation) -> None:
    """A sensor is cut off for a while on a test day; at times one is in training."""
    dice = plan.dice
    watching = ("endpoint", "server", "flows", "proxy", "api")
    names = [organisation.products[source].name for source in watching if source in organisation.products]
    days = [plan.test_day()] + [plan.train_day()] * dice.chance(0.4)
    for day in days:
        at = plan.at(day, 9, 15)
        plan.note("outage", at, dice.pick(names))
        plan.note("outage ends", at + int(dice.between(0.3, 2.5) * HOUR), "")
