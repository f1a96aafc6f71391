"""Whoever acts, with what they do as events: an account on a host, from an address, at a time.

Every method tells the product that would see the act, if the organisation has one, and moves the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.internet import Site, Spot
from streamer.devtools.organisations.journal import Journal
from streamer.devtools.organisations.organisation import DAY, Organisation, Program, Service
from streamer.devtools.organisations.products import Account, Event, Host, Product

_METHODS = {"GET": 3, "POST": 6, "PUT": 7, "DELETE": 2, "HEAD": 4}
_TYPES = ("application/json", "text/html", "application/octet-stream")


class Hand:
    """`now` is the clock in ms. spot: the address that the internet sees; agent: the user agent; run: the id of the run
    of a routine, "" for none."""

    def __init__(
        self, organisation: Organisation, journal: Journal, dice: Dice, account: Account, host: Host, spot: Spot,
        now: float, *, agent: str = "", run: str = "",
    ) -> None:  # fmt: skip
        self.organisation, self.journal, self.dice = organisation, journal, dice
        self.account, self.host, self.spot = account, host, spot
        self.now, self.agent, self.run = now, agent, run
        self.session = dice.hex(16)
        self.shell: Program | None = None
        self._processes: dict[str, tuple[int, str]] = {}

    def wait(self, seconds: float) -> None:
        self.now += 40 + 1000 * self.dice.wait(seconds)

    def tell(
        self, source: str, class_uid: int, activity: int, event: Event, *, failed: str = "", text: str = ""
    ) -> None:
        product = self._product(source)
        if product is not None:
            finished = product.finish(
                event, class_uid, activity, int(self.now), failed=failed, run=self.run, message=text, dice=self.dice
            )
            self.journal.add(product, self.now, finished, self.dice)

    def _product(self, source: str) -> Product | None:
        return self.organisation.products.get(source)

    def _endpoint(self, source: str, host: Host, port: int) -> dict[str, Any]:
        product = self._product(source)
        named = product.endpoint(host) if product is not None else {}
        return {**named, "port": port} if port else named

    def _port(self) -> int:
        return 32768 + self.dice.below(28000)

    def _process(self, program: Program) -> dict[str, Any]:
        version = program.version(self.now)
        if program.name not in self._processes:
            self._processes[program.name] = 600 + self.dice.below(60000), self.dice.hex(16)
        pid, uid = self._processes[program.name]
        digest = f"{hash_of(program.name + version):016x}" * 4
        path = program.path.format(version)
        size = hash_of(program.path + version) % 9_000_000 + 20_000
        file = {"name": program.name, "path": path, "type_id": 1, "size": size,
                "hashes": [{"algorithm_id": 3, "value": digest}]}  # fmt: skip
        return {"name": program.name, "pid": pid, "uid": uid, "file": file, "cmd_line": path}

    def _actor(self, product: Product, program: Program) -> dict[str, Any]:
        return {
            "process": self._process(program),
            "user": product.user(self.account),
            "session": {"uid": self.session},
        }

    # On a host.

    def launch(self, program: Program, arguments: str, parent: Program | None = None, host: Host | None = None) -> None:
        """A program starts another on a host (their own, if not said), and may end soon."""
        where = host or self.host
        source = "server" if where.kind in (1, 6) else "endpoint"
        product = self._product(source)
        if product is None:
            return
        starter = parent or self.shell or program
        self._processes.pop(program.name, None)
        made = self._process(program)
        made["cmd_line"] = f"{made['file']['path']} {arguments}".strip()
        made |= {
            "created_time": int(self.now), "integrity_id": 3 if self.account.kind != 1 else 2,
            "user": product.user(self.account),
        }  # fmt: skip
        event = {"device": product.device(where), "actor": self._actor(product, starter), "process": made}
        text = f"{self.account.name} started {program.name} on {where.name}"
        self.tell(source, 1007, 1, event, text=text)
        if self.dice.chance(0.25):
            self.wait(8)
            code = 0 if self.dice.chance(0.97) else 1
            self.tell(source, 1007, 2, {**event, "exit_code": code}, text=f"{program.name} ended with {code}")

    def name_file(self, topics: Sequence[str]) -> str:
        return self.organisation.naming.file(topics, self.dice, f"{int(self.now // DAY) % 10_000:04}")

    def touch(self, folder: str, name: str, activity: int, program: Program, size: float, host: Host | None = None,
              *, failed: str = "", renamed: str = "") -> None:  # fmt: skip
        """A file is made (1), read (2), changed (3), deleted (4) or renamed (5)."""
        where = host or self.host
        source = "server" if where.kind in (1, 6) else "endpoint"
        product = self._product(source)
        if product is None:
            return
        slash = "\\" if "\\" in folder else "/"

        def file(called: str) -> dict[str, Any]:
            return {"name": called, "path": f"{folder}{slash}{called}", "type_id": 1, "size": int(size),
                    "parent_folder": folder, "ext": called.rsplit(".", 1)[-1]}  # fmt: skip

        event = {"device": product.device(where), "actor": self._actor(product, program), "file": file(name)}
        if renamed:
            event["file_result"] = file(renamed)
        verb = {1: "made", 2: "read", 3: "changed", 4: "deleted", 5: "renamed"}[activity]
        self.tell(source, 1001, activity, event, failed=failed, text=f"{self.account.name} {verb} {name}")

    def keep_logs(self, activity: int, log: str, host: Host) -> None:
        """A log is cleared (1), deleted (2), exported (3), archived (4) or rotated (5). Where no product sees
        logs, that is seen of its file."""
        product = self._product("audit")
        if product is None:
            folder = "C:\\Windows\\Logs" if host.system == "windows" else "/var/log"
            file_activity = {1: 3, 2: 4, 3: 2, 4: 5, 5: 5}[activity]
            shell = self.organisation.shells[host.system]
            renamed = f"{log}.1" if file_activity == 5 else ""
            self.touch(folder, log, file_activity, shell, self.dice.around(2e6), host, renamed=renamed)
            return
        event = {"device": product.device(host), "actor": {"user": product.user(self.account)}, "log_name": log,
                 "log_provider": f"{host.system}-{log.split('/')[0].lower()}"}  # fmt: skip
        verb = {1: "cleared", 2: "deleted", 3: "exported", 4: "archived", 5: "rotated"}[activity]
        self.tell("audit", 1008, activity, event, text=f"log {log} {verb} by {self.account.name}")

    def schedule(self, program: Program, job: str, host: Host) -> None:
        """A scheduled job is made."""
        source = "server" if host.kind in (1, 6) else "endpoint"
        product = self._product(source)
        if product is None:
            return
        file = self._process(program)["file"]
        event = {"device": product.device(host), "actor": {"user": product.user(self.account)},
                 "job": {"name": job, "cmd_line": f"{file['path']} --{job}", "file": file}}  # fmt: skip
        self.tell(source, 1006, 1, event, text=f"job {job} was scheduled by {self.account.name}")

    # Who they are.

    def log_on(self, host: Host, kind: int, *, failed: str = "", off: bool = False, source: Host | None = None) -> None:
        """On a host. kind: `logon_type_id`, 2 at the keyboard, 3 over the network, 5 a service, 10 a remote desktop."""
        product = self._product("directory")
        if product is None:
            return
        event = {
            "user": product.user(self.account), "device": product.device(host), "dst_endpoint": product.endpoint(host),
            "logon_type_id": kind, "is_remote": kind in (3, 10),
            "auth_protocol_id": 2 if host.system == "windows" else 99,
            "auth_protocol": "Kerberos" if host.system == "windows" else "SSH",
            "src_endpoint": self._endpoint("directory", source or self.host, 0), "session": {"uid": self.session},
        }  # fmt: skip
        if failed:
            del event["session"]
        verb = "logged off" if off else "failed to log on to" if failed else "logged on to"
        text = f"{self.account.name} {verb} {host.name}"
        self.tell("directory", 3002, 2 if off else 1, event, failed=failed, text=text)

    def sign_on(self, app: str, *, failed: str = "", multi: bool = True) -> None:
        """To an application, from the internet."""
        product = self._product("sign-on")
        if product is None:
            return
        event: Event = {
            "user": product.user(self.account), "service": {"name": app}, "is_mfa": multi and not failed,
            "src_endpoint": self.spot.endpoint(), "http_request": {"user_agent": self.agent},
            "is_remote": True, "auth_protocol_id": 5, "session": {"uid": self.session},
        }  # fmt: skip
        if failed:
            del event["session"]
        verb = "denied" if failed else "granted"
        self.tell("sign-on", 3002, 1, event, failed=failed, text=f"access to {app} {verb} for {self.account.name}")

    def change_account(self, activity: int, other: Account) -> None:
        """1 create, 2 enable, 4 reset password, 5 disable, 6 delete, 7 attach a policy, 12 unlock."""
        product = self._product("directory")
        if product is None:
            return
        event = {"user": product.user(other), "actor": {"user": product.user(self.account)},
                 "src_endpoint": self._endpoint("directory", self.host, 0)}  # fmt: skip
        self.tell("directory", 3001, activity, event, text=f"account {other.name} changed by {self.account.name}")

    def change_group(self, activity: int, group: str, other: Account) -> None:
        """3 adds a user, 4 removes one."""
        product = self._product("directory")
        if product is None:
            return
        event = {"group": {"name": group, "uid": f"g-{hash_of(group) % 9000 + 1000}"}, "user": product.user(other),
                 "actor": {"user": product.user(self.account)},
                 "src_endpoint": self._endpoint("directory", self.host, 0)}  # fmt: skip
        self.tell("directory", 3006, activity, event, text=f"{other.name} in {group} by {self.account.name}")

    # On the network.

    def connect(self, target: Host | Site, port: int, sent: float, received: float, *, failed: bool = False,
                seconds: float = 0.0) -> None:  # fmt: skip
        """A connection to a host or to the internet; the clock stands at its end. sent, received: bytes."""
        inside = isinstance(target, Host)
        packets = int(sent // 900) + 3, int(received // 1300) + 2
        lasts = int(1000 * (seconds or self.dice.around(0.3, 1.0) + (sent + received) / 6e6))
        peer = self._endpoint("flows", target, port) if isinstance(target, Host) else {
            "ip": target.ip, "hostname": target.name, "port": port}  # fmt: skip
        event = {
            "src_endpoint": self._endpoint("flows", self.host, self._port()), "dst_endpoint": peer,
            "connection_info": {"direction_id": 2, "protocol_num": 6, "protocol_name": "tcp",
                                "boundary_id": 2 if inside else 3, "uid": self.dice.hex(12)},
            "traffic": {"bytes_out": int(sent), "bytes_in": 0 if failed else int(received),
                        "bytes": int(sent) + (0 if failed else int(received)), "packets_out": packets[0],
                        "packets_in": 0 if failed else packets[1], "packets": packets[0] + packets[1] * (not failed)},
            "duration": lasts, "start_time": int(self.now) - lasts, "end_time": int(self.now),
        }  # fmt: skip
        where = target.name
        text = f"{self.host.name} to {where} port {port}"
        self.tell("flows", 4001, 4 if failed else 2, event, failed="timeout" if failed else "", text=text)

    def resolve(self, name: str, address: str) -> None:
        """A name is looked up; no address: there is no such name."""
        server = self.organisation.servers["directory"][0]
        event: Event = {
            "src_endpoint": self._endpoint("resolver", self.host, self._port()),
            "dst_endpoint": self._endpoint("resolver", server, 53),
            "query": {"hostname": name, "type": "A", "class": "IN"},
            "rcode_id": 0 if address else 3,
        }
        if address:
            event["answers"] = [{"rdata": address, "type": "A", "ttl": 30 * self.dice.whole(1, 20)}]
        self.tell("resolver", 4003, 2, event, failed="" if address else "NXDOMAIN", text=f"{name} is {address or '-'}")

    def request(self, site: Site, path: str, method: str, sent: float, received: float, *, code: int = 200,
                query: str = "", agent: str = "") -> None:  # fmt: skip
        """A web request to a site, the organisation's own or another."""
        product = self._product("proxy")
        if product is None:
            self.connect(site, 443, sent, received)
            return
        latency = int(self.dice.around(60, 0.7))
        url: dict[str, Any] = {"hostname": site.name, "path": path, "scheme": "https", "port": 443}
        if query:
            url["query_string"] = query
        event = {
            "src_endpoint": self._endpoint("proxy", self.host, self._port()),
            "dst_endpoint": {"ip": site.ip, "hostname": site.name, "port": 443},
            "http_request": {"http_method": method, "url": url, "user_agent": agent or self.agent, "length": int(sent),
                             "uid": self.dice.hex(12), "version": "1.1"},
            "http_response": {"code": code, "length": int(received), "latency": latency,
                              "content_type": _TYPES[hash_of(path) % 3]},
            "duration": latency, "actor": {"user": product.user(self.account)},
            "traffic": {"bytes_out": int(sent), "bytes_in": int(received), "bytes": int(sent + received)},
        }  # fmt: skip
        failed = f"HTTP {code}" if code >= 400 else ""
        self.tell("proxy", 4002, _METHODS[method], event, failed=failed, text=f"{method} {site.name}{path} {code}")

    def call(self, service: str, operation: str, activity: int, resource: str, *, failed: str = "") -> None:
        """An API call. activity: 1 create, 2 read, 3 update, 4 delete."""
        product = self._product("api")
        if product is None:
            return
        event = {
            "actor": {"user": product.user(self.account), "session": {"uid": self.session}},
            "api": {"operation": operation, "service": {"name": service}, "version": "v2",
                    "request": {"uid": self.dice.hex(16)}, "response": {"code": 403 if failed else 200}},
            "src_endpoint": self.spot.endpoint(), "http_request": {"user_agent": self.agent},
            "resources": [{"name": resource, "type": service}],
            "cloud": {"provider": product.vendor, "region": self.organisation.clouds[0]},
        }  # fmt: skip
        text = f"{self.account.name} {operation} {resource}"
        self.tell("api", 6003, activity, event, failed=failed, text=text)

    def use(self, service: Service, path: str, method: str, sent: float, received: float, code: int = 200) -> None:
        """A request to one of the organisation's own services."""
        if self.dice.chance(0.2):
            self.resolve(service.site.name, service.site.ip)
        self.request(service.site, path, method, sent, received, code=code)


def hash_of(text: str) -> int:
    """A number for a text, the same in every process."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value
