"""An ordinary working day at the simulated company: the actions of people.

Promises: a day depends on seed, size and its number only, so any day can be made without earlier ones; rare but normal
actions (typing errors, new files and names, rare tools, late evenings, new people) happen every day. It does not know
incidents; they use the same actions.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import orjson

from streamer.devtools.simulator import organisation as ocsf
from streamer.devtools.simulator.organisation import PROGRAMS, Event, Host, Organisation, Person, Program, Running, Site

HOUR = 3_600_000
DAY = 24 * HOUR
MINUTE = 60_000
HEAD = b'{"metadata":{"uid":"'
"""The beginning of every event; its uid follows, which is known once the day is sorted."""
STORAGE = ("files.cloudbox.example", "198.51.100.250")
SYSTEM = {"name": "SYSTEM", "uid": "S-1-5-18", "type_id": 3}
DESKTOP_AGENT = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) Chrome/{}.0"
PHONE_AGENT = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_2 like Mac OS X) Mail/18.2"


class Journal:
    """The events of a day in the order they were made: times in epoch ms, bodies (what follows `HEAD`), marks (the
    incident that made them, "" for none)."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.bodies: list[bytes] = []
        self.marks: list[str] = []
        self.mark = ""

    def add(self, event: Event) -> None:
        self.times.append(event["time"])
        self.bodies.append(orjson.dumps(event)[len(HEAD) :])
        self.marks.append(self.mark)


class Today:
    """One day of the company. `start`: its midnight in epoch ms; `weekday`: 0 on Mondays; `taken`: the names of people
    that an incident has to do with already; `called_in`: of those who work today in any case."""

    def __init__(self, company: Organisation, index: int, start: int, weekday: int) -> None:
        self.company, self.index, self.start, self.weekday = company, index, start, weekday
        self.journal = Journal()
        self.taken: set[str] = set()
        self.called_in: set[str] = set()
        self.chrome = 131 + index // 9

    def rng(self, *what: object) -> Random:
        """The random numbers of one part of the day; text seeds are hashed the same way in every process."""
        return Random("/".join(map(str, ("ripcurrent", self.company.seed, self.index, *what))))

    def hours(self, person: Person) -> tuple[int, int] | None:
        """When somebody works today, in epoch ms; None on a day off."""
        rng = self.rng("hours", person.index)
        weekend = self.weekday >= 5
        if rng.random() > (0.07 if weekend else 0.94) and person.name not in self.called_in:
            return None
        begins = person.starts + rng.gauss(1.5 if weekend else 0.0, 0.3)
        lasts = max(rng.gauss(3.0 if weekend else 8.6, 0.7), 1.0)
        return self.start + int(begins * HOUR), self.start + int((begins + lasts) * HOUR)


class Shift:
    """Somebody at work: `now` is their clock in epoch ms, which every act moves on."""

    def __init__(self, today: Today, person: Person, rng: Random, now: int) -> None:
        self.today, self.person, self.rng, self.now = today, person, rng, now
        self.company = today.company
        self.site: Site = person.site_on(today.index)
        remote = not person.travels and today.rng("remote", person.index).random() < 0.3
        self.address = person.home_ip if remote else self.site.egress
        self.location = self.site.location
        self.host = person.host
        self.programs: dict[str, Running] = {}
        self.add = today.journal.add

    def wait(self, seconds: float) -> int:
        self.now += 1 + int(self.rng.expovariate(1.0) * seconds * 1000)
        return self.now

    def number(self) -> int:
        return self.rng.getrandbits(48)

    def session(self) -> str:
        return f"{self.rng.getrandbits(64):016x}"

    def port(self) -> int:
        return 49152 + self.rng.getrandbits(14)

    def size(self, median: float, spread: float = 1.0) -> int:
        return int(self.rng.lognormvariate(0.0, spread) * median)

    def running(self, name: str, command: str = "") -> Running:
        """The program, launched from the desktop if it does not run yet."""
        if name not in self.programs:
            self.programs[name] = started = Running(PROGRAMS[name], self.number())
            if name != "explorer":
                self.launch(self.running("explorer"), started, command or started.program.path)
        return self.programs[name]

    def launch(self, parent: Running, child: Running, command: str) -> None:
        self.add(ocsf.process(self.wait(2), self.host, self.person.user, parent, child, command))

    # Beginning and end of the day.

    def arrive(self) -> None:
        if self.rng.random() < 0.05:
            self.log_on(self.host, 2, success=False)
        self.log_on(self.host, 2)
        self.running("outlook")
        self.sso()

    def leave(self) -> None:
        desktop = self.running("explorer")
        for name, program in self.programs.items():
            if name != "explorer":
                path = program.program.path
                event = ocsf.process(self.wait(1), self.host, self.person.user, desktop, program, path, launch=False)
                self.add(event)
        self.log_on(self.host, 2, off=True)

    def log_on(self, host: Host, kind: int, *, success: bool = True, off: bool = False) -> None:
        source = self.host.endpoint
        user, session = self.person.user, self.session()
        self.add(ocsf.logon(self.wait(4), host, user, kind, source, session, success=success, off=off))

    # Actions. Each is a few related events.

    def connect(self, target: dict[str, Any], port: int, sent: int, received: int, *, answered: bool = True) -> None:
        lasted = self.size(900, 1.2) if answered else 21_000
        event = ocsf.flow(
            self.wait(1), self.host.endpoint, self.port(), target, port, sent, received,
            milliseconds=lasted, host=self.host, answered=answered,
        )  # fmt: skip
        self.add(event)

    def look_up(self, name: str, address: str) -> None:
        self.add(ocsf.dns(self.wait(1), self.host, self.port(), self.company.by_name["dc01"], name, address))

    def browse(self) -> None:
        self.running("chrome")
        rng, company = self.rng, self.company
        for _ in range(1 + int(rng.random() * 3)):
            chance = rng.random()
            if chance < 0.5:
                name = company.domains[(self.person.index * 37 + int(rng.random() ** 2 * 15)) % len(company.domains)]
            elif chance < 0.92:
                name = rng.choices(company.domains, cum_weights=company.popularity)[0]
            else:
                name = f"{rng.getrandbits(28):07x}.edge{rng.getrandbits(3)}.cdn.example"
            exists = rng.random() > 0.03
            address = company.address_of.get(name, f"198.19.{rng.getrandbits(8)}.{rng.getrandbits(8)}")
            self.look_up(name, address if exists else "")
            for _ in range((1 + (rng.random() < 0.4)) * exists):
                self.connect({"ip": address}, 443, self.size(2_500), self.size(40_000, 1.6))
            self.wait(25)

    def mail(self) -> None:
        outlook = self.running("outlook")
        server = self.company.by_name["mail01"].endpoint
        self.connect(server, 993, self.size(1_500), self.size(20_000, 1.5))
        if self.rng.random() < 0.25:
            folder = f"C:\\Users\\{self.person.name}\\Downloads"
            name = f"{self.rng.choice(('invoice', 'minutes', 'offer', 'scan'))}-{self.rng.getrandbits(16)}.pdf"
            size = self.size(200_000)
            self.add(ocsf.file(self.wait(15), self.host, self.person.user, outlook, 1, folder, name, size))
        if self.rng.random() < 0.3:
            self.connect(server, 587, self.size(30_000, 1.5), self.size(900))

    def document(self) -> None:
        word = self.rng.random() < (0.35 if self.person.role in ("finance", "sales") else 0.7)
        name, kind = ("winword", "docx") if word else ("excel", "xlsx")
        folder = f"C:\\Users\\{self.person.name}\\Documents"
        document = f"{self.rng.choice(('plan', 'notes', 'budget', 'draft'))}-{int(self.rng.random() ** 3 * 60)}.{kind}"
        program = self.running(name, f"{PROGRAMS[name].path} {document}")
        size = self.size(80_000)
        self.add(ocsf.file(self.wait(3), self.host, self.person.user, program, 2, folder, document, size))
        for _ in range(1 + int(self.rng.random() * 3)):
            self.add(ocsf.file(self.wait(120), self.host, self.person.user, program, 3, folder, document, size))
        if self.rng.random() < 0.08:
            self.add(ocsf.file(self.wait(20), self.host, self.person.user, program, 4, folder, document, size))

    def share(self) -> None:
        server = self.company.by_name[self.site.file_server]
        self.connect(server.endpoint, 445, self.size(6_000), self.size(90_000, 1.4))
        if self.rng.random() < 0.03:
            self.log_on(server, 3, success=False)
        self.log_on(server, 3)
        for _ in range(1 + int(self.rng.random() * 4)):
            chance = self.rng.random()
            self.touch_share(server, 2 if chance < 0.68 else 3 if chance < 0.85 else 1 if chance < 0.95 else 4)

    def touch_share(self, server: Host, activity: int) -> None:
        folder = f"D:\\shares\\{self.person.role}"
        name = f"{self.rng.choice(('case', 'contract', 'sheet', 'photo'))}-{int(self.rng.random() ** 2 * 900)}.dat"
        kernel = Running(PROGRAMS["system"], int(server.ip.rsplit(".", 1)[1]))
        size = self.size(150_000)
        self.add(ocsf.file(self.wait(12), server, self.person.user, kernel, activity, folder, name, size))

    def sign_in(self, app: str, address: str, site: Site, agent: str, *, success: bool = True) -> None:
        user, session = self.person.user, self.session()
        event = ocsf.portal(self.wait(5), user, app, address, site.location, agent, session, success=success)
        self.add(event)

    def sso(self) -> None:
        app = self.rng.choice(("wiki", "mail", "crm", "hr", "console"))
        agent = DESKTOP_AGENT.format(self.today.chrome)
        if self.rng.random() < 0.05:
            self.sign_in(app, self.address, self.site, agent, success=False)
        self.sign_in(app, self.address, self.site, agent)

    def phone(self) -> None:
        carrier = self.site.carriers[self.rng.random() < 0.5]
        while self.rng.random() < 0.16:
            self.sign_in("mail", carrier, self.site, PHONE_AGENT, success=False)
        if self.rng.random() < 0.93:
            self.sign_in("mail", carrier, self.site, PHONE_AGENT)

    def database(self) -> None:
        self.running("ledger")
        for _ in range(1 + int(self.rng.random() * 3)):
            self.connect(self.company.by_name["db01"].endpoint, 5432, self.size(3_000), self.size(60_000, 1.5))
            self.wait(60)

    def upload(self) -> None:
        chrome = self.running("chrome")
        folder = f"C:\\Users\\{self.person.name}\\Documents"
        size = self.size(2_500_000, 1.3)
        if self.rng.random() < 0.6:
            name = f"export-{int(self.rng.random() ** 2 * 400)}.zip"
            self.add(ocsf.file(self.wait(10), self.host, self.person.user, chrome, 2, folder, name, size))
        if self.rng.random() < 0.5:
            self.look_up(*STORAGE)
        self.send_to_storage(size)

    def send_to_storage(self, size: int) -> None:
        self.connect({"ip": STORAGE[1]}, 443, size + 2_000, self.size(5_000, 0.5))

    def call(self, service: str, operation: str, activity: int, resource: str, *, success: bool = True) -> None:
        event = ocsf.api(
            self.wait(6), self.person.user, service, operation, activity, self.address, resource,
            request=self.session(), location=self.location, success=success,
        )  # fmt: skip
        self.add(event)

    def cloud(self) -> None:
        service, noun = self.rng.choice((("compute", "Instance"), ("storage", "Bucket"), ("queue", "Topic")))
        self.call(service, f"List{noun}s", 2, "all")
        resource = f"{noun.lower()}-{int(self.rng.random() ** 2 * 40)}"
        for _ in range(1 + int(self.rng.random() * 4)):
            self.call(service, f"Describe{noun}", 2, resource, success=self.rng.random() > 0.02)
        if self.rng.random() < 0.25:
            self.call(service, f"Update{noun}", 3, resource)
        if self.rng.random() < 0.06:
            self.call(service, f"Create{noun}", 1, f"{noun.lower()}-{self.rng.getrandbits(20)}")

    def administer(self) -> None:
        self.call("identity", "ListUsers", 2, "all")
        operation, activity = self.rng.choice((("CreateAccessKey", 1), ("AttachPolicy", 3), ("CreateUser", 1)))
        self.call("identity", operation, activity, self.rng.choice(self.company.staff(self.today.index)).name)

    def record(self) -> None:
        """A case of the helpdesk or the sales system is read, and often changed."""
        service = "helpdesk" if self.person.role == "support" else "crm"
        case = f"case-{self.rng.getrandbits(12)}"
        self.call(service, "SearchCases", 2, "all")
        self.call(service, "GetCase", 2, case)
        if self.rng.random() < 0.6:
            self.call(service, "UpdateCase", 3, case)

    def develop(self) -> None:
        code = self.running("code")
        project = f"C:\\src\\{('shop', 'ledger', 'gateway', 'app')[self.person.index % 4]}"
        for _ in range(1 + int(self.rng.random() * 3)):
            name = f"module_{int(self.rng.random() ** 2 * 120)}.py"
            size = self.size(9_000)
            self.add(ocsf.file(self.wait(90), self.host, self.person.user, code, 3, project, name, size))
        self.launch(code, Running(PROGRAMS["python"], self.number()), f"python.exe -m pytest {project}")
        if self.rng.random() < 0.5:
            self.launch(code, Running(PROGRAMS["git"], self.number()), "git.exe push origin main")
            self.connect(self.company.by_name["ci01"].endpoint, 8080, self.size(30_000, 1.2), self.size(2_000))

    def ssh(self) -> None:
        servers = [host for host in self.company.servers if 22 in host.ports]
        server = self.rng.choice(servers)
        self.launch(self.running("powershell"), Running(PROGRAMS["ssh"], self.number()), f"ssh.exe {server.name}")
        self.connect(server.endpoint, 22, self.size(9_000), self.size(30_000))
        self.log_on(server, 3)
        daemon, shell = Running(PROGRAMS["/sshd"], 900), Running(PROGRAMS["/bash"], self.number())
        user = self.person.user
        self.add(ocsf.process(self.wait(1), server, user, daemon, shell, "-bash"))
        for _ in range(1 + int(self.rng.random() * 4)):
            command = self.rng.choice(("ls -la /srv", "tail -n 200 /var/log/app.log", "systemctl status app"))
            child = Running(PROGRAMS[f"/{command.split()[0]}"], self.number())
            self.add(ocsf.process(self.wait(20), server, user, shell, child, command))
        self.log_on(server, 3, off=True)

    def enter(self, host: Host) -> None:
        """To a colleague's workstation over remote desktop."""
        self.launch(self.running("explorer"), Running(PROGRAMS["mstsc"], self.number()), f"mstsc.exe /v:{host.name}")
        self.connect(host.endpoint, 3389, self.size(60_000), self.size(900_000))
        self.log_on(host, 10)

    def remote_help(self) -> None:
        host = self.rng.choice(self.company.staff(self.today.index)).host
        self.enter(host)
        chance = self.rng.random()
        if chance < 0.45:
            self.install(host, Running(PROGRAMS["explorer"], self.number()), self.person.user)
        else:
            tool, command = ("mmc", "mmc.exe compmgmt.msc") if chance < 0.75 else ("powershell", "powershell.exe")
            desktop, started = Running(PROGRAMS["explorer"], self.number()), Running(PROGRAMS[tool], self.number())
            self.add(ocsf.process(self.wait(30), host, self.person.user, desktop, started, command))
        self.wait(120)
        self.log_on(host, 10, off=True)

    def install(self, host: Host, parent: Running, user: dict[str, Any]) -> None:
        """Software arrives: installer, files, then the job that keeps it up to date."""
        product = self.rng.choice(("LedgerOne", "Viewer", "Browser"))
        setup = Running(PROGRAMS["msiexec"], self.number())
        self.add(ocsf.process(self.wait(20), host, user, parent, setup, f"msiexec.exe /qn /i {product}.msi"))
        for part in range(1 + int(self.rng.random() * 3)):
            size = self.size(400_000)
            folder = f"C:\\Program Files\\{product}"
            self.add(ocsf.file(self.wait(4), host, user, setup, 1, folder, f"part{part}.dll", size))
        self.schedule(host, user, product)

    def schedule(self, host: Host, user: dict[str, Any], product: str) -> None:
        scheduler = Running(PROGRAMS["svchost"], int(host.ip.rsplit(".", 1)[1]) + 700)
        self.add(ocsf.job(self.wait(5), host, user, scheduler, f"{product} update", PROGRAMS["msiexec"]))

    def update(self) -> None:
        """The workstation fetches updates from its neighbours, many of which do not have them, and may install one."""
        for _ in range(1 + int(self.rng.random() * 4)):
            self.ask_neighbour(self.rng.choice(self.company.staff(self.today.index)).host, self.rng.random() < 0.55)
        if self.rng.random() < 0.12:
            self.install(self.host, Running(PROGRAMS["svchost"], self.person.index), SYSTEM)

    def ask_neighbour(self, host: Host, has_it: bool) -> None:
        sent, received = (self.size(4_000), self.size(700_000, 1.3)) if has_it else (180, 0)
        self.connect(host.endpoint, 7680, sent, received, answered=has_it)

    def odd_job(self) -> None:
        """A rare action: a tool that nobody else has, or one that was just downloaded."""
        name = f"setup-{self.rng.getrandbits(16):04x}.exe"
        fresh = Program(name, f"C:\\Users\\{self.person.name}\\Downloads\\{name}")
        tool = self.rng.choice(self.company.odd_tools) if self.rng.random() < 0.7 else fresh
        self.launch(self.running("explorer"), Running(tool, self.number()), tool.path)

    def work(self, until: int) -> None:
        """A part of the day, one action after another, fewer around noon."""
        role = ROLES[self.person.role]
        actions, weights = list(role), list(role.values())
        span = until - self.now
        expected = span / HOUR * ACTS_PER_HOUR * self.person.pace * self.company.pace
        begun = sorted(self.now + self.rng.random() * span for _ in range(round(expected)))
        for time in begun:
            noon = 11.4 < (time - self.today.start) / HOUR < 12.4
            if not (noon and self.rng.random() < 0.65):
                self.now = max(self.now, int(time))
                self.rng.choices(actions, weights)[0](self)


ACTS_PER_HOUR = 8.2
_EVERYBODY: dict[Callable[[Shift], None], float] = {
    Shift.browse: 24, Shift.mail: 16, Shift.document: 12, Shift.share: 7, Shift.sso: 5, Shift.phone: 5,
    Shift.update: 5, Shift.odd_job: 0.5,
}  # fmt: skip
ROLES: dict[str, dict[Callable[[Shift], None], float]] = {
    "engineering": {**_EVERYBODY, Shift.develop: 22, Shift.ssh: 6, Shift.cloud: 10},
    "finance": {**_EVERYBODY, Shift.database: 18, Shift.upload: 6},
    "sales": {**_EVERYBODY, Shift.record: 16, Shift.upload: 6},
    "support": {**_EVERYBODY, Shift.record: 30, Shift.remote_help: 2},
    "it": {**_EVERYBODY, Shift.remote_help: 14, Shift.ssh: 8, Shift.cloud: 8, Shift.administer: 2},
}


def people(today: Today) -> None:
    """The day of all people: work, phones also on days off, and sometimes a late evening."""
    for person in today.company.staff(today.index):
        rng = today.rng("person", person.index)
        for _ in range(int(rng.random() * 3.4)):
            Shift(today, person, rng, today.start + int(rng.triangular(6, 22, 12) * HOUR)).phone()
        hours = today.hours(person)
        if hours is None:
            continue
        shift = Shift(today, person, rng, hours[0])
        shift.arrive()
        shift.work(hours[1])
        shift.leave()
        if rng.random() < 0.06:
            late = Shift(today, person, rng, max(shift.now + HOUR, today.start + int(rng.uniform(18.5, 21.5) * HOUR)))
            late.arrive()
            late.work(late.now + int(rng.uniform(0.3, 1.6) * HOUR))
            late.leave()
