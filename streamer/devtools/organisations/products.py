"""The products that watch an organisation, and the OCSF attributes that each of them fills.

A product is drawn: its OCSF version, how it writes users and hosts, which optional attributes it leaves out, what it
adds of its own, how late it delivers. `Product.finish` turns an event that has every attribute into that product's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.naming import Naming

Event = dict[str, Any]

SOURCES: dict[str, tuple[int, ...]] = {
    "endpoint": (1001, 1006, 1007),
    "server": (1001, 1006, 1007),
    "audit": (1008,),
    "directory": (3001, 3002, 3006),
    "sign-on": (3002,),
    "flows": (4001,),
    "proxy": (4002,),
    "resolver": (4003,),
    "api": (6003,),
}
"""What watches, and the classes of its events."""
_MAY_LACK = ("endpoint", "audit", "proxy", "resolver")
"""An organisation has at least two of these. `server` is on servers and containers what `endpoint` is elsewhere."""
_OPTIONAL = """
status status_detail timezone_offset metadata.logged_time metadata.log_name metadata.product.version
device.os device.ip device.uid device.type device.region
user.uid user.type_id user.domain user.email_addr user.full_name
actor.user.uid actor.user.type_id actor.user.domain actor.user.email_addr actor.user.full_name
actor.session actor.process.uid actor.process.file.hashes actor.process.cmd_line actor.process.created_time
actor.process.file.size process.uid process.file.hashes process.file.size process.created_time process.integrity_id
process.parent_process process.user process.cmd_line exit_code
file.size file.parent_folder file.hashes file.owner file.ext
session is_mfa is_remote logon_type_id auth_protocol_id http_request.user_agent http_request.referrer http_request.uid
http_request.length http_request.version http_response.length http_response.latency http_response.content_type
http_request.url.query_string http_request.url.port http_request.url.scheme
src_endpoint.location src_endpoint.autonomous_system src_endpoint.hostname src_endpoint.port
dst_endpoint.hostname dst_endpoint.location dst_endpoint.autonomous_system
duration start_time end_time connection_info.uid connection_info.boundary_id connection_info.protocol_name
traffic.packets_in traffic.packets_out traffic.packets traffic.bytes
query.class answers api.request api.response api.version cloud resources log_provider
""".split()  # noqa: SIM905
_ALWAYS: dict[str, tuple[str, ...]] = {
    "api": ("resources",), "flows": ("duration",), "sign-on": ("src_endpoint.location",), "resolver": ("answers",),
}  # fmt: skip
"""What a product fills in any case, since there would be little left to judge."""
_HOST_PROFILE = {3001: ("device",), 3002: ("device",), 3006: ("actor", "device"), 4001: ("actor", "device"),
                 4002: ("actor", "device"), 4003: ("actor", "device")}  # fmt: skip


@dataclass(frozen=True)
class Account:
    """An account of a person or a service. kind: `type_id` of OCSF (1 user, 2 admin, 3 system)."""

    name: str
    number: int
    kind: int
    full_name: str


@dataclass(frozen=True)
class Host:
    """A machine or a container. system: windows, macos or linux; kind: `type_id` (1 server, 2 desktop, 3 laptop,
    6 virtual)."""

    name: str
    ip: str
    system: str
    kind: int
    region: str


_SYSTEMS = {"windows": ("Windows", 100), "macos": ("macOS", 300), "linux": ("Linux", 200)}


@dataclass(frozen=True)
class Product:
    """A product: how it names things, and what it leaves out. delay: median seconds from an event to its delivery."""

    source: str
    name: str
    vendor: str
    version: str
    release: str
    user_style: str
    host_style: str
    id_style: str
    omitted: frozenset[str]
    says: bool
    warns: bool
    extras: tuple[tuple[str, tuple[str, ...]], ...]
    delay: float
    naming: Naming = field(repr=False)

    def user(self, account: Account) -> dict[str, Any]:
        naming, name = self.naming, account.name
        styled = {
            "plain": name,
            "domain": f"{naming.directory}\\{name}",
            "mail": f"{name.lower()}@{naming.domain}",
            "upper": name.upper(),
        }[self.user_style]
        uid = {
            "sid": f"S-1-5-21-{1_000_000 + len(naming.name) * 77_777}-{account.number}",
            "number": str(account.number),
            "guid": f"{account.number:08x}-{naming.name.encode().hex()[:4]:0<4}-4000-8000-{account.number * 7919:012x}",
        }[self.id_style]
        written: dict[str, Any] = {"name": styled, "uid": uid, "type_id": account.kind, "domain": naming.directory}
        if account.kind != 3:
            written |= {"email_addr": f"{name.lower()}@{naming.domain}", "full_name": account.full_name}
        return written

    def host_name(self, host: Host) -> str:
        naming = self.naming
        if self.host_style == "full" and host.kind != 6:
            return f"{host.name.lower()}.{naming.internal}"
        return {"upper": host.name.upper(), "lower": host.name.lower()}.get(self.host_style, host.name)

    def device(self, host: Host) -> dict[str, Any]:
        name, system = _SYSTEMS[host.system]
        return {
            "hostname": self.host_name(host), "ip": host.ip, "type_id": host.kind, "region": host.region,
            "os": {"name": name, "type_id": system}, "uid": f"{sum(host.name.encode()) * 2654435761 % 2**40:010x}",
            "type": {1: "Server", 2: "Desktop", 3: "Laptop", 6: "Virtual"}[host.kind],
        }  # fmt: skip

    def endpoint(self, host: Host) -> dict[str, Any]:
        return {"ip": host.ip, "hostname": self.host_name(host)}

    def finish(self, event: Event, class_uid: int, activity: int, time: int, *, failed: str = "", run: str = "",
               message: str = "", dice: Dice) -> Event:  # fmt: skip
        """The event as this product sends it. `event` holds the attributes of the class; failed: why it failed."""
        profiles = [p for p, keys in (("host", _HOST_PROFILE.get(class_uid, ())), ("cloud", ("cloud",)))
                    if any(key in event for key in keys)]  # fmt: skip
        metadata: dict[str, Any] = {
            "uid": "",
            "version": self.version,
            "product": {"name": self.name, "vendor_name": self.vendor, "version": self.release},
            "logged_time": time + int(1000 * dice.around(self.delay, 0.4)),
            "log_name": f"{self.source}-{class_uid}",
        }
        if profiles:
            metadata["profiles"] = profiles
        if run:
            metadata["correlation_uid"] = run
        whole: Event = {
            "metadata": metadata,
            "time": time,
            "class_uid": class_uid,
            "category_uid": class_uid // 1000,
            "activity_id": activity,
            "type_uid": class_uid * 100 + activity,
            "severity_id": 2 if failed and self.warns else 1,
            "status_id": 2 if failed else 1,
            "status": "Failure" if failed else "Success",
            "timezone_offset": 0,
            **event,
        }
        if failed:
            whole["status_detail"] = failed
        if self.says and message:
            whole["message"] = message
        if self.extras:
            whole["unmapped"] = {
                key: dice.skewed(values) if values else int(dice.around(40.0, 1.0)) for key, values in self.extras
            }
        for path in self.omitted:
            _drop(whole, path)
        if "cloud" not in whole and "cloud" in profiles:
            metadata["profiles"] = [profile for profile in profiles if profile != "cloud"]
            if not metadata["profiles"]:
                del metadata["profiles"]
        return whole


def _drop(event: Event, path: str) -> None:
    """Remove an attribute; an object that is empty without it goes, too."""
    *above, last = path.split(".")
    node: Any = event
    for key in above:
        node = node.get(key)
        if not isinstance(node, dict):
            return
    node.pop(last, None)
    if above and not node:
        _drop(event, ".".join(above))


def draw_products(naming: Naming, dice: Dice) -> dict[str, Product]:
    """By source, those that the organisation has. There is always one for servers, accounts, sign-ons, flows, calls."""
    absent = set(dice.some(_MAY_LACK, dice.below(3)))
    if "endpoint" in absent and dice.chance(0.7):
        absent.remove("endpoint")
    made: dict[str, Product] = {}
    vendors = [naming.word().title() for _ in range(3)]
    style, ids = dice.pick(("plain", "domain", "mail")), dice.pick(("sid", "number", "guid"))
    for source in SOURCES:
        if source in absent:
            continue
        if source == "server" and "endpoint" in made and dice.chance(0.5):
            made[source] = made["endpoint"]
            continue
        made[source] = _draw_product(source, naming, dice, vendors, style, ids)
    return made


def _draw_product(source: str, naming: Naming, dice: Dice, vendors: list[str], style: str, ids: str) -> Product:
    thrift = dice.between(0.15, 0.75)
    omitted = {path for path in _OPTIONAL if dice.chance(thrift)} - set(_ALWAYS.get(source, ()))
    word = dice.pick(("Sensor", "Guard", "Audit", "Insight", "Collector", "Trail", "Gateway"))
    extras = tuple(
        (naming.word(), () if dice.chance(0.4) else tuple(naming.word() for _ in range(dice.whole(2, 5))))
        for _ in range(dice.pick((0, 0, 1, 2, 3)))
    )
    return Product(
        source=source,
        name=f"{naming.word().title()} {word}",
        vendor=dice.pick(vendors),
        version=dice.pick(("1.3.0", "1.5.0", "1.7.0")),
        release=f"{dice.whole(1, 12)}.{dice.below(20)}",
        user_style=style if dice.chance(0.6) else dice.pick(("plain", "domain", "mail", "upper")),
        host_style=dice.pick(("as-is", "full", "upper", "lower")),
        id_style=ids if dice.chance(0.7) else dice.pick(("sid", "number", "guid")),
        omitted=frozenset(omitted),
        says=dice.chance(0.45),
        warns=dice.chance(0.5),
        extras=extras,
        delay=dice.around(0.6, 0.8),
        naming=naming,
    )
