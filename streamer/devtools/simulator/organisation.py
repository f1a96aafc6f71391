"""The people, hosts, programs and services of the simulated company, and the events that they make.

Promises: the same seed and size give the same company in every process, including people who join later; every event is
valid OCSF 1.5. It does not decide who does what when: `workday`, `routines` and `incidents` do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

Event = dict[str, Any]

EVENTS_PER_PERSON = 270
EVENTS_OF_MACHINES = 2_000
"""What each person adds to a working day, and what the machines do without them (measured; they size the company)."""
SMALLEST = 12
"""People in the smallest company: with fewer there are no colleagues to compare with."""

_FIRST = """
anna ben carla david elena felix grace hugo ines jonas karin leo maria nils olga paul quinn rosa simon
tara ulrich vera walid xenia yusuf zoe amir bea chloe dario
""".split()  # noqa: SIM905 - a line of words reads better than thirty quoted ones
_LAST = """
adler brandt costa dietz evans fischer gruber hansen ivanov jansen keller lindt meyer novak okoye peters
quist richter santos thomas ueda vogel weber xu young ziegler
""".split()  # noqa: SIM905 - a line of words reads better than thirty quoted ones
_WORDS = """
harbour maple signal paper orbit lumen cobalt willow ember delta quartz meadow falcon linen copper river
anchor cedar prism summit atlas beacon canvas drift echo fern grove haven iris juniper
""".split()  # noqa: SIM905 - a line of words reads better than thirty quoted ones
_ROLES = "engineering it sales finance engineering support sales engineering support finance".split()  # noqa: SIM905
"""Everybody's job, in turn: a company of twelve has each of them."""


@dataclass(frozen=True)
class Site:
    """An office: the addresses that its people share on the internet, from the office and from their phones."""

    city: str
    country: str
    egress: str
    carriers: tuple[str, str]
    file_server: str

    @property
    def location(self) -> dict[str, str]:
        return {"city": self.city, "country": self.country}


SITES = (
    Site("Hamburg", "DE", "203.0.113.10", ("192.0.2.33", "192.0.2.34"), "fs01"),
    Site("London", "GB", "203.0.113.20", ("192.0.2.65", "192.0.2.66"), "fs02"),
)


@dataclass(frozen=True)
class Program:
    """An executable; `file` is its OCSF object."""

    name: str
    path: str
    file: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", {"name": self.name, "path": self.path, "type_id": 1})


@dataclass(frozen=True)
class Running:
    """A running program; `number` identifies this run."""

    program: Program
    number: int

    def object(self) -> dict[str, Any]:
        program, number = self.program, self.number
        return {"name": program.name, "file": program.file, "pid": 400 + number % 50021, "uid": f"{number:016x}"}


def _windows(directory: str, *names: str) -> dict[str, Program]:
    return {name.lower().removesuffix(".exe"): Program(name, f"{directory}\\{name}") for name in names}


def _linux(directory: str, *names: str) -> dict[str, Program]:
    return {f"/{name}": Program(name, f"{directory}/{name}") for name in names}


PROGRAMS: dict[str, Program] = {
    **_windows("C:\\Windows", "explorer.exe"),
    **_windows("C:\\Windows\\System32", "svchost.exe", "cmd.exe", "msiexec.exe", "mmc.exe", "mstsc.exe", "notepad.exe"),
    **_windows("C:\\Windows\\System32\\WindowsPowerShell\\v1.0", "powershell.exe"),
    **_windows("C:\\Program Files\\Google\\Chrome\\Application", "chrome.exe"),
    **_windows("C:\\Program Files\\Microsoft Office\\root\\Office16", "OUTLOOK.EXE", "WINWORD.EXE", "EXCEL.EXE"),
    **_windows("C:\\Program Files\\Microsoft VS Code", "Code.exe"),
    **_windows("C:\\Program Files\\Git\\bin", "git.exe"),
    **_windows("C:\\Program Files\\Python312", "python.exe"),
    **_windows("C:\\Program Files\\OpenSSH", "ssh.exe"),
    **_windows("C:\\Program Files\\LedgerOne", "ledger.exe"),
    "system": Program("System", "System"),
    **_linux("/usr/bin", "bash", "ls", "tail", "systemctl", "git", "make", "python3", "rsync", "pg_dump", "tar"),
    **_linux("/usr/sbin", "sshd", "cron"),
    **_linux("/opt/etl/bin", "validate", "transform", "reconcile", "render"),
}


@dataclass(frozen=True)
class Host:
    """A machine; `device` and `endpoint` are its OCSF objects, `ports` what others usually connect to on it."""

    name: str
    ip: str
    windows: bool
    ports: tuple[int, ...]
    device: dict[str, Any] = field(init=False, repr=False, compare=False)
    endpoint: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        system = {"name": "Windows", "type_id": 100} if self.windows else {"name": "Linux", "type_id": 200}
        kind = 2 if self.windows and 7680 in self.ports else 1
        object.__setattr__(self, "device", {"hostname": self.name, "ip": self.ip, "type_id": kind, "os": system})
        object.__setattr__(self, "endpoint", {"hostname": self.name, "ip": self.ip})


@dataclass(frozen=True)
class Person:
    """A person with a job, a workstation and a routine. `joined`: the day they started, 0 for founders;
    `starts`: usual start of work in hours UTC; `pace`: their activity relative to others; `travels`: works at the
    other site every other two days; `user` is their OCSF object."""

    index: int
    name: str
    role: str
    site: int
    host: Host
    joined: int
    starts: float
    pace: float
    travels: bool
    home_ip: str
    user: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        user = {"name": self.name, "uid": f"S-1-5-21-77-{1100 + self.index}", "type_id": 1}
        object.__setattr__(self, "user", user)

    def site_on(self, day: int) -> Site:
        away = self.travels and (day // 2 + self.index) % 2 == 1
        return SITES[self.site ^ away]


@dataclass(frozen=True)
class Service:
    """A service account, the host it runs on and the kind of its routine (see `simulate.ROUTINES`)."""

    name: str
    routine: str
    host: Host
    database: Host
    user: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "user", {"name": self.name, "uid": f"svc:{self.name}", "type_id": 3})


def _servers(copies: int) -> list[Host]:
    fixed = [
        ("dc01", True, (88, 389, 53)),
        ("fs01", True, (445,)),
        ("fs02", True, (445,)),
        ("mail01", False, (993, 587)),
        ("ci01", False, (22, 8080)),
        ("backup01", False, (22,)),
        ("jump01", True, (3389,)),
    ]
    for n in range(1, copies + 1):
        fixed += [(f"web{2 * n - 1:02}", False, (443, 22)), (f"web{2 * n:02}", False, (443, 22))]
        fixed += [(f"app{n:02}", False, (8443, 22)), (f"db{n:02}", False, (5432,))]
    return [Host(n, f"10.1.{i // 200}.{10 + i % 200}", w, ports) for i, (n, w, ports) in enumerate(fixed)]


class Organisation:
    """A company that makes about `events_per_day` events on a working day; people join over time.

    people: all, in the order of joining, `founders` of them from the beginning; servers; services;
    domains: the sites on the internet that its people visit, most popular first, with their cumulative `popularity`;
    odd_tools: programs that somebody needs rarely.
    """

    def __init__(self, *, seed: int, events_per_day: int, days: int) -> None:
        by_people = max(events_per_day - EVENTS_OF_MACHINES, 500)
        at_start = max(SMALLEST, round(by_people / EVENTS_PER_PERSON))
        self.seed = seed
        self.founders = at_start
        self.pace = by_people / (at_start * EVENTS_PER_PERSON)
        copies = max(1, at_start // 40)
        self.servers = _servers(copies)
        self.by_name = {host.name: host for host in self.servers}
        joined = [0] * at_start
        joined += [day for day in range(3, days) if day % 7 == 3 for _ in range(max(1, at_start // 60))]
        self.people = [self._person(index, day) for index, day in enumerate(joined)]
        self.services = [service for n in range(1, copies + 1) for service in self._services(n)]
        rng = Random(f"ripcurrent/{seed}/domains")
        self.domains = list({f"{rng.choice(_WORDS)}-{rng.choice(_WORDS)}.example": None for _ in range(400)})
        self.popularity = list(accumulate(1 / (rank + 1) for rank in range(len(self.domains))))
        self.address_of = {name: f"198.51.{100 + i // 250}.{1 + i % 250}" for i, name in enumerate(self.domains)}
        self.odd_tools = [
            Program(f"{word}.exe", f"C:\\Program Files\\{word.title()} Tools\\{word}.exe") for word in _WORDS
        ]

    def _person(self, index: int, joined: int) -> Person:
        rng = Random(f"ripcurrent/{self.seed}/person/{index}")
        first, last = _FIRST[index % len(_FIRST)], _LAST[(index * 7 + index // len(_FIRST)) % len(_LAST)]
        serial = index // (len(_FIRST) * len(_LAST))
        role, site = _ROLES[index % len(_ROLES)], int(rng.random() < 0.45)
        host = Host(f"WS-{1000 + index}", f"10.{20 + site}.{index // 240}.{10 + index % 240}", True, (7680,))
        return Person(
            index=index,
            name=f"{first}.{last}{serial or ''}",
            role=role,
            site=site,
            host=host,
            joined=joined,
            starts=min(max(rng.gauss(8.0 if role != "support" else 7.2, 0.7), 6.0), 10.5),
            pace=rng.lognormvariate(0.0, 0.25),
            travels=role == "sales" and index % 3 == 2,
            home_ip=f"198.18.{index // 250}.{1 + index % 250}",
        )

    def _services(self, n: int) -> list[Service]:
        app, ci, backup, db = (self.by_name[h] for h in (f"app{n:02}", "ci01", "backup01", f"db{n:02}"))
        suffix = "" if n == 1 else f"-{n}"
        kinds = (("orders", app), ("billing", app), ("reports", app), ("builds", ci), ("backup", backup))
        return [Service(f"svc-{kind}{suffix}", kind, host, db) for kind, host in kinds]

    def staff(self, day: int, *roles: str) -> list[Person]:
        """The people who work there on that day, of these roles or of all."""
        return [p for p in self.people if p.joined <= day and (not roles or p.role in roles)]


# The events. Each begins with `metadata.uid`, which the simulator fills in once the day is in order.


def _metadata(vendor: str, product: str, *profiles: str) -> dict[str, Any]:
    entry = {"uid": "", "version": "1.5.0", "product": {"name": product, "vendor_name": vendor}}
    return {**entry, "profiles": list(profiles)} if profiles else entry


ENDPOINT = _metadata("Northwatch", "Endpoint Sensor", "host")
FLOWS = _metadata("Northwatch", "Flow Sensor", "host")
RESOLVER = _metadata("Northwatch", "Resolver")
DIRECTORY = _metadata("Northwatch", "Directory", "host")
PORTAL = _metadata("Keyring", "Single Sign-On")
CLOUD = _metadata("Cumulus", "Audit Trail", "cloud")
REGION = {"provider": "Cumulus", "region": "eu-central-1"}


def _event(metadata: dict[str, Any], class_uid: int, activity: int, time: int, run: str) -> Event:
    return {
        "metadata": {**metadata, "correlation_uid": run} if run else metadata,
        "time": time,
        "category_uid": class_uid // 1000,
        "class_uid": class_uid,
        "activity_id": activity,
        "type_uid": class_uid * 100 + activity,
        "severity_id": 1,
    }


def process(
    time: int, host: Host, user: dict[str, Any], parent: Running, child: Running, command: str, *,
    launch: bool = True, run: str = "",
) -> Event:  # fmt: skip
    """1007. The parent acts on the child: launches it or ends it."""
    event = _event(ENDPOINT, 1007, 1 if launch else 2, time, run)
    event["device"] = host.device
    event["actor"] = {"process": parent.object(), "user": user}
    event["process"] = {**child.object(), "cmd_line": command}
    return event


def file(
    time: int, host: Host, user: dict[str, Any], actor: Running, activity: int, directory: str, name: str, size: int, *,
    run: str = "",
) -> Event:  # fmt: skip
    """1001. `activity`: 1 create, 2 read, 3 update, 4 delete; `size` in bytes."""
    event = _event(ENDPOINT, 1001, activity, time, run)
    event["device"] = host.device
    event["actor"] = {"process": actor.object(), "user": user}
    path = f"{directory}\\{name}" if host.windows else f"{directory}/{name}"
    event["file"] = {"name": name, "path": path, "type_id": 1, "size": size}
    return event


def flow(
    time: int, source: dict[str, Any], port: int, target: dict[str, Any], target_port: int, sent: int, received: int, *,
    milliseconds: int, host: Host | None = None, outbound: bool = True, answered: bool = True, run: str = "",
) -> Event:  # fmt: skip
    """4001, a finished connection; `sent` and `received` in bytes as the source sees them."""
    event = _event(FLOWS, 4001, 2 if answered else 4, time, run)
    event["status_id"] = 1 if answered else 2
    event["duration"] = milliseconds
    event["src_endpoint"] = {**source, "port": port}
    event["dst_endpoint"] = {**target, "port": target_port}
    event["connection_info"] = {"direction_id": 2 if outbound else 1, "protocol_name": "tcp", "protocol_num": 6}
    event["traffic"] = {"bytes_out": sent, "bytes_in": received, "bytes": sent + received}
    if host is not None:
        event["device"] = host.device
    return event


def dns(time: int, host: Host, port: int, server: Host, name: str, address: str) -> Event:
    """4003, a response; no address means that the name does not exist."""
    event = _event(RESOLVER, 4003, 2, time, "")
    event["src_endpoint"] = {**host.endpoint, "port": port}
    event["dst_endpoint"] = {**server.endpoint, "port": 53}
    event["query"] = {"hostname": name, "type": "A", "class": "IN"}
    event["rcode_id"] = 0 if address else 3
    if address:
        event["answers"] = [{"rdata": address, "type": "A"}]
    return event


def logon(
    time: int, host: Host, user: dict[str, Any], kind: int, source: dict[str, Any], session: str, *,
    success: bool = True, off: bool = False, run: str = "",
) -> Event:  # fmt: skip
    """3002 on a host. `kind`: logon_type_id, 2 interactive, 3 network, 5 service, 10 remote interactive."""
    event = _event(DIRECTORY, 3002, 2 if off else 1, time, run)
    event["status_id"] = 1 if success else 2
    event["user"] = user
    event["logon_type_id"] = kind
    event["auth_protocol_id"] = 2 if host.windows else 99
    if not host.windows:
        event["auth_protocol"] = "SSH key"
    event["is_remote"] = kind in (3, 10)
    event["device"] = host.device
    event["src_endpoint"] = source
    event["dst_endpoint"] = host.endpoint
    if success:
        event["session"] = {"uid": session}
    return event


def portal(
    time: int, user: dict[str, Any], app: str, address: str, location: dict[str, str], agent: str, session: str, *,
    success: bool = True,
) -> Event:  # fmt: skip
    """3002 at the single sign-on, from the internet."""
    event = _event(PORTAL, 3002, 1, time, "")
    event["status_id"] = 1 if success else 2
    event["user"] = user
    event["service"] = {"name": app}
    event["is_mfa"] = success
    event["src_endpoint"] = {"ip": address, "location": location}
    event["http_request"] = {"user_agent": agent}
    if success:
        event["session"] = {"uid": session}
    return event


def api(
    time: int, user: dict[str, Any], service: str, operation: str, activity: int, address: str, resource: str, *,
    request: str, location: dict[str, str] | None = None, success: bool = True, run: str = "",
) -> Event:  # fmt: skip
    """6003. `activity`: 1 create, 2 read, 3 update, 4 delete."""
    event = _event(CLOUD, 6003, activity, time, run)
    event["status_id"] = 1 if success else 2
    event["actor"] = {"user": user}
    event["api"] = {"operation": operation, "service": {"name": service}, "request": {"uid": request}}
    event["cloud"] = REGION
    event["src_endpoint"] = {"ip": address, "location": location} if location else {"ip": address}
    event["resources"] = [{"name": resource, "type": service}]
    return event


def job(time: int, host: Host, user: dict[str, Any], scheduler: Running, name: str, command: Program) -> Event:
    """1006, a scheduled job is created."""
    event = _event(ENDPOINT, 1006, 1, time, "")
    event["device"] = host.device
    event["actor"] = {"process": scheduler.object(), "user": user}
    event["job"] = {"name": name, "cmd_line": f"{command.path} /scheduled", "file": command.file}
    return event
