"""The automatic activity of the simulated company: routines of service accounts, the web site, health checks.

Promises: every run of a routine takes all its steps in order, some more than once, with jitter; each run has its own id
in `metadata.correlation_uid`. Runs are planned before their events are made, so that an incident can change one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from streamer.devtools.simulator import organisation as ocsf
from streamer.devtools.simulator.organisation import PROGRAMS, Event, Host, Running, Service
from streamer.devtools.simulator.workday import HOUR, MINUTE, Journal, Today

ROUTINES: dict[str, tuple[str, ...]] = {
    "orders": ("logon", "export", "validate", "transform", "write", "load", "publish", "logoff"),
    "billing": ("logon", "fetch", "reconcile", "render", "write", "send", "clean", "logoff"),
    "reports": ("logon", "query", "render", "write", "publish", "logoff"),
    "builds": ("checkout", "compile", "test", "package", "write", "store"),
    "backup": ("logon", "snapshot", "copy", "write", "verify", "rotate", "logoff"),
}
"""The steps of each service's routine. Some are taken more than once (`Run.write_down`); none is skipped."""

_REPEATED = {"transform": 0.45, "render": 0.5, "test": 0.12, "copy": 0.3}
_SECONDS = {"transform": 25.0, "compile": 60.0, "test": 90.0, "copy": 45.0, "load": 15.0, "render": 20.0}
_COMMANDS = {
    "validate": ("/validate", "--strict orders.batch"), "transform": ("/transform", "--model v3"),
    "reconcile": ("/reconcile", "--ledger main"), "render": ("/render", "--pdf"), "verify": ("/tar", "-tf latest.tar"),
    "checkout": ("/git", "fetch --depth 1"), "compile": ("/make", "-j4 all"), "test": ("/python3", "-m pytest -q"),
    "package": ("/tar", "-cf build.tar dist"),
}  # fmt: skip
_CALLS = {
    "export": ("orders", "ExportBatch", 2), "publish": ("catalogue", "PublishBatch", 3),
    "fetch": ("invoices", "ListOpen", 2), "send": ("invoices", "SendInvoice", 1),
    "store": ("storage", "PutObject", 1), "snapshot": ("storage", "CreateSnapshot", 1),
}  # fmt: skip


@dataclass
class Run:
    """One run of a service's routine, planned: an incident may change `steps`, and sets `mark` to its id."""

    service: Service
    begins: int
    target: Host
    rng: Random
    steps: list[str] = field(default_factory=list)
    mark: str = ""

    def write_down(self, journal: Journal) -> None:
        journal.mark = self.mark
        now, rng = self.begins, self.rng
        uid = f"run-{rng.getrandbits(48):012x}"
        for step in self.steps:
            chance = _REPEATED.get(step, 0.0)
            again = True
            while again:
                now += 1 + int(rng.lognormvariate(0.0, 0.35) * _SECONDS.get(step, 4.0) * 1000)
                journal.add(self._step(step, now, uid))
                again = rng.random() < chance
        journal.mark = ""

    def _step(self, step: str, now: int, run: str) -> Event:
        service, rng, host = self.service, self.rng, self.service.host
        user, routine = service.user, service.routine
        if step in ("logon", "logoff"):
            session, off = run, step == "logoff"
            return ocsf.logon(now, self.target, user, 5, host.endpoint, session, off=off, run=run)
        if step in _CALLS:
            api, operation, activity = _CALLS[step]
            request = f"{rng.getrandbits(64):016x}"
            return ocsf.api(now, user, api, operation, activity, host.ip, routine, request=request, run=run)
        if step in _COMMANDS:
            program, arguments = PROGRAMS[_COMMANDS[step][0]], _COMMANDS[step][1]
            child, daemon = Running(program, rng.getrandbits(48)), Running(PROGRAMS["/cron"], 500)
            return ocsf.process(now, host, user, daemon, child, f"{program.path} {arguments}", run=run)
        if step in ("write", "clean", "rotate"):
            tool = Running(PROGRAMS["/rsync"], rng.getrandbits(48))
            name, size = f"{routine}-{run[-6:]}.out", int(rng.lognormvariate(0.0, 0.6) * 3e6)
            activity = 1 if step == "write" else 4
            return ocsf.file(now, host, user, tool, activity, f"/srv/{routine}", name, size, run=run)
        median, port = (4e8, 22) if step == "copy" else (8e5, 5432)
        sent, received = int(rng.lognormvariate(0.0, 0.5) * median), int(rng.lognormvariate(0.0, 0.5) * 4e3)
        if step in ("query", "copy"):
            sent, received = received, sent
        source, client, milliseconds = host.endpoint, 32768 + rng.getrandbits(14), 200 + sent // 5000
        return ocsf.flow(
            now, source, client, self.target.endpoint, port, sent, received,
            milliseconds=milliseconds, host=host, run=run,
        )  # fmt: skip


def plan_routines(today: Today) -> list[Run]:
    """All runs of the day, with the jitter of each: orders every half hour, billing every hour, reports every four
    hours, a backup of every server by night, builds when engineers work."""
    runs = []
    for service in today.company.services:
        rng = today.rng("routine", service.name)
        targets = [service.database]
        if service.routine == "backup":
            targets = today.company.servers
            times = [1.0 + 2.5 * i / len(targets) for i in range(len(targets))]
        elif service.routine == "builds":
            times = [rng.triangular(7, 19, 13) for _ in range(4 if today.weekday >= 5 else 26)]
        else:
            every = {"orders": 0.5, "billing": 1.0, "reports": 4.0}[service.routine]
            times = [0.05 + every * i for i in range(int(24 / every))]
        for i, hour in enumerate(times):
            begins = today.start + int((hour + rng.uniform(0, 0.04)) * HOUR)
            steps = list(ROUTINES[service.routine])
            runs.append(Run(service, begins, targets[i % len(targets)], Random(rng.getrandbits(64)), steps))
    return runs


def visitors(today: Today) -> None:
    """The public web site by the hour, what the visits cause behind it, and health checks of every server. The second
    web server takes a larger share from day to day."""
    company, rng, add = today.company, today.rng("visitors"), today.journal.add
    webs = [host for host in company.servers if host.name.startswith("web")]
    later = min(0.5 + 0.006 * today.index, 0.75)
    busy = 0.55 if today.weekday >= 5 else 1.0
    for _ in range(int(30 * company.founders * company.pace * busy)):
        now = today.start + int(min(max(rng.gauss(14, 4.6), 0), 23.9) * HOUR) + rng.getrandbits(18)
        web = webs[2 * int(rng.random() * (len(webs) // 2)) + (rng.random() < later)]
        client = f"198.19.{rng.getrandbits(8)}.{rng.getrandbits(8)}"
        if rng.random() < 0.7:
            client = f"198.18.{100 + int(rng.random() ** 3 * 60)}.7"
        sent, received = int(rng.lognormvariate(7.2, 0.8)), int(rng.lognormvariate(9.8, 1.2))
        port, lasted = 1024 + rng.getrandbits(15), int(rng.lognormvariate(5.5, 0.9))
        source, target = {"ip": client}, web.endpoint
        add(ocsf.flow(now, source, port, target, 443, sent, received, milliseconds=lasted, outbound=False))
        if rng.random() < 0.5:
            database = company.by_name["db01"].endpoint
            sent, received = int(rng.lognormvariate(6.5, 0.6)), int(rng.lognormvariate(8.5, 1.0))
            now, port = now + rng.getrandbits(6), 32768 + rng.getrandbits(14)
            add(ocsf.flow(now, web.endpoint, port, database, 5432, sent, received, milliseconds=lasted // 3, host=web))
    monitor = company.by_name["jump01"]
    for check in range(96):
        now = today.start + check * 15 * MINUTE
        for host in company.servers:
            now += 200 + rng.getrandbits(11)
            sizes, port = (420 + rng.getrandbits(4), 900 + rng.getrandbits(7)), 49152 + rng.getrandbits(14)
            answered = rng.random() > 0.002
            target, lasted = host.endpoint, 4 + rng.getrandbits(4)
            event = ocsf.flow(
                now, monitor.endpoint, port, target, host.ports[0], *sizes,
                milliseconds=lasted, host=monitor, answered=answered,
            )  # fmt: skip
            add(event)
