"""The evidence of an alert in OCSF 1.8's own objects, and its observables.

Promises output that validates against the published schema for any input: an attribute of the wrong type is converted
where that is unambiguous ("443" for a port), else omitted. It does not copy the whole event: the shapes below hold what
an analyst acts on, and the alert's `raw_data` holds the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from streamer.redaction import MASK

MAX_OBSERVABLES = 32
MAX_ITEMS = 8
UNKNOWN, OTHER = 0, 99
IP, MAC, EMAIL, PORT = 2, 3, 5, 11
_INT64 = 2**63
_MAC = re.compile(r"([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}")
_EMAIL = re.compile(r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~.-]+@[a-zA-Z0-9-]+\.[a-zA-Z0-9.-]+")

OBSERVABLE_TYPES = {
    1: "Hostname",
    2: "IP Address",
    3: "MAC Address",
    4: "User Name",
    5: "Email Address",
    6: "URL String",
    7: "File Name",
    8: "Hash",
    9: "Process Name",
    10: "Resource UID",
    11: "Port",
    13: "Command Line",
    14: "Country",
    15: "Process ID",
    16: "HTTP User-Agent",
    19: "User Credential ID",
    31: "User Object: uid",
    32: "Group Object: name",
    33: "Group Object: uid",
    34: "Account Object: name",
    35: "Account Object: uid",
    38: "Resource Details Object: name",
    39: "Process Entity Object: uid",
    40: "Email Object: subject",
    41: "Email Object: uid",
    42: "Message UID",
    43: "Registry Value Object: name",
    45: "File Path",
    46: "Registry Key Path",
    47: "Device Object: uid",
    48: "Network Endpoint Object: uid",
}


@dataclass(frozen=True)
class Leaf:
    """A scalar attribute. allowed: the values of its enum; observable: the type id of what it names."""

    kind: type[str] | type[int] | type[bool]
    observable: int = 0
    allowed: frozenset[Any] = frozenset()


@dataclass(frozen=True)
class Shape:
    """An object: its attributes, the required ones, and those of which at least one is required. A required enum that
    is absent becomes Unknown (0)."""

    attributes: Mapping[str, Leaf | Shape | list[Shape]]
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()


def _enum(*values: int) -> Leaf:
    return Leaf(int, allowed=frozenset(values))


TEXT, NUMBER, FLAG = Leaf(str), Leaf(int), Leaf(bool)
NAME_OR_UID = ("name", "uid")

ACCOUNT = Shape({"name": Leaf(str, 34), "uid": Leaf(str, 35), "type": TEXT}, one_of=NAME_OR_UID)
GROUP = Shape({"name": Leaf(str, 32), "uid": Leaf(str, 33), "domain": TEXT}, one_of=NAME_OR_UID)
USER = Shape(
    {
        "name": Leaf(str, 4),
        "uid": Leaf(str, 31),
        "email_addr": Leaf(str, 5),
        "credential_uid": Leaf(str, 19),
        "account": ACCOUNT,
        "groups": [GROUP],
        "domain": TEXT,
        "full_name": TEXT,
        "has_mfa": FLAG,
        "type": TEXT,
        "type_id": _enum(0, 1, 2, 3, 4, 99),
    },
    one_of=("name", "uid", "account"),
)
FINGERPRINT = Shape(
    {"value": Leaf(str, 8), "algorithm": TEXT, "algorithm_id": _enum(*range(21), 99)}, ("value", "algorithm_id")
)
FILE = Shape(
    {
        "name": Leaf(str, 7),
        "path": Leaf(str, 45),
        "hashes": [FINGERPRINT],
        "size": NUMBER,
        "type": TEXT,
        "type_id": _enum(*range(9), 99),
        "is_system": FLAG,
        "company_name": TEXT,
        "owner": USER,
    },
    ("name", "type_id"),
)
_PROCESS: dict[str, Leaf | Shape | list[Shape]] = {
    "name": Leaf(str, 9),
    "pid": Leaf(int, 15),
    "uid": Leaf(str, 39),
    "cmd_line": Leaf(str, 13),
    "file": FILE,
    "user": USER,
    "created_time": NUMBER,
    "integrity": TEXT,
    "working_directory": TEXT,
}
PROCESS_IDS = ("pid", "uid")
PARENT = Shape(_PROCESS, one_of=PROCESS_IDS)
PROCESS = Shape({**_PROCESS, "parent_process": PARENT}, one_of=PROCESS_IDS)
SESSION = Shape({"uid": TEXT, "issuer": TEXT, "is_mfa": FLAG, "is_remote": FLAG, "created_time": NUMBER})
ACTOR = Shape(
    {"user": USER, "process": PROCESS, "session": SESSION, "app_name": TEXT, "app_uid": TEXT, "invoked_by": TEXT},
    one_of=("process", "user", "invoked_by", "session", "app_name", "app_uid"),
)
OS = Shape(
    {
        "name": TEXT,
        "version": TEXT,
        "type": TEXT,
        "type_id": _enum(0, 99, 100, 101, 200, 201, 300, 301, 302, 400, 401, 402),
    },
    ("name", "type_id"),
)
LOCATION = Shape(
    {"country": Leaf(str, 14), "city": TEXT, "region": TEXT, "postal_code": TEXT},
    one_of=("country", "city", "region", "postal_code"),
)
_ENDPOINT_TYPE = _enum(*range(16), 99)
DEVICE = Shape(
    {
        "hostname": Leaf(str, 1),
        "name": TEXT,
        "ip": Leaf(str, 2),
        "mac": Leaf(str, 3),
        "uid": Leaf(str, 47),
        "instance_uid": TEXT,
        "domain": TEXT,
        "region": TEXT,
        "os": OS,
        "location": LOCATION,
        "type": TEXT,
        "type_id": _ENDPOINT_TYPE,
    },
    ("type_id",),
    ("ip", "uid", "name", "hostname", "instance_uid"),
)
ENDPOINT = Shape(
    {
        "ip": Leaf(str, 2),
        "hostname": Leaf(str, 1),
        "port": Leaf(int, 11),
        "name": TEXT,
        "mac": Leaf(str, 3),
        "uid": Leaf(str, 48),
        "domain": TEXT,
        "svc_name": TEXT,
        "instance_uid": TEXT,
        "location": LOCATION,
        "type": TEXT,
        "type_id": _ENDPOINT_TYPE,
    },
    one_of=("ip", "uid", "name", "hostname", "svc_name", "instance_uid", "domain"),
)
CONNECTION = Shape(
    {
        "protocol_name": TEXT,
        "protocol_num": NUMBER,
        "direction": TEXT,
        "direction_id": _enum(0, 1, 2, 3, 4, 99),
        "uid": TEXT,
        "boundary": TEXT,
    },
    ("direction_id",),
)
URL = Shape(
    {
        "url_string": Leaf(str, 6),
        "hostname": Leaf(str, 1),
        "path": TEXT,
        "query_string": TEXT,
        "scheme": TEXT,
        "port": Leaf(int, 11),
    },
    one_of=("url_string", "path"),
)
_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
REQUEST = Shape(
    {
        "http_method": Leaf(str, allowed=frozenset(_METHODS)),
        "url": URL,
        "user_agent": Leaf(str, 16),
        "referrer": TEXT,
        "uid": TEXT,
    }
)
API = Shape(
    {
        "operation": TEXT,
        "service": Shape({"name": TEXT, "uid": TEXT, "version": TEXT}, one_of=NAME_OR_UID),
        "version": TEXT,
        "request": Shape({"uid": TEXT}, ("uid",)),
        "response": Shape({"code": NUMBER, "error": TEXT, "error_message": TEXT, "message": TEXT}),
    },
    ("operation",),
)
EVIDENCE = Shape(
    {
        "actor": ACTOR,
        "device": DEVICE,
        "user": USER,
        "process": PROCESS,
        "file": FILE,
        "src_endpoint": ENDPOINT,
        "dst_endpoint": ENDPOINT,
        "connection_info": CONNECTION,
        "api": API,
        "query": Shape({"hostname": Leaf(str, 1), "type": TEXT, "class": TEXT}, ("hostname",)),
        "url": URL,
        "http_request": REQUEST,
        "email": Shape(
            {"from": Leaf(str, 5), "subject": Leaf(str, 40), "uid": Leaf(str, 41), "message_uid": Leaf(str, 42)},
            one_of=("from",),
        ),
        "job": Shape({"name": TEXT, "cmd_line": Leaf(str, 13), "file": FILE, "user": USER}, ("name",)),
        "reg_key": Shape({"path": Leaf(str, 46)}, ("path",)),
        "reg_value": Shape({"path": Leaf(str, 46), "name": Leaf(str, 43), "type": TEXT}, ("name", "path")),
        "resources": [Shape({"name": Leaf(str, 38), "uid": Leaf(str, 10), "type": TEXT}, one_of=NAME_OR_UID)],
    }
)
"""An evidence that holds only `resources` is not valid: the caller adds `data`."""


def _scalar(leaf: Leaf, value: Any) -> Any:
    """The value in the type of the schema; None where it cannot be converted."""
    if leaf.kind is bool:
        return value if isinstance(value, bool) else None
    if leaf.kind is str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = _formed(leaf.observable, str(value))
        return text if text and (not leaf.allowed or text in leaf.allowed) else None
    if isinstance(value, str):
        digits = value.strip()
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
            return None
        value = int(digits)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -_INT64 <= value < _INT64:
        return None
    if leaf.observable == PORT and not 0 <= value <= 65535:
        return None
    return value if not leaf.allowed or value in leaf.allowed else OTHER


def _formed(type_id: int, text: str) -> str | None:
    """The text where it has the format that the schema requires for its type, else None."""
    if type_id == IP:
        try:
            address = ip_address(text.strip().partition("%")[0])
        except ValueError:
            return None
        return str(address)
    if type_id == MAC:
        return text if _MAC.fullmatch(text) else None
    if type_id == EMAIL:
        return text if _EMAIL.fullmatch(text) else None
    return text


def fit(shape: Shape, value: Any) -> dict[str, Any] | None:
    """The part of an object that is valid in this shape; None where nothing is."""
    if not isinstance(value, Mapping):
        return None
    valid: dict[str, Any] = {}
    for name, wanted in shape.attributes.items():
        given = value.get(name)
        if given is None:
            continue
        fitted: Any
        if isinstance(wanted, Leaf):
            fitted = _scalar(wanted, given)
        elif isinstance(wanted, Shape):
            fitted = fit(wanted, given)
        else:
            members = given[:MAX_ITEMS] if isinstance(given, list) else ()
            fitted = [member for item in members if (member := fit(wanted[0], item))] or None
        if fitted is not None:
            valid[name] = fitted
    if shape is FILE and "name" not in valid and "path" in valid:
        valid["name"] = str(valid["path"]).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or valid["path"]
    if "ip" in shape.attributes and "ip" not in valid and "name" not in valid:
        name = _scalar(TEXT, value.get("ip"))  # "AWS Internal": clouds write names where an address belongs
        if name is not None:
            valid["name"] = name
    if not valid:
        return None
    for name in shape.required:
        if name not in valid:
            leaf = shape.attributes[name]
            if not isinstance(leaf, Leaf) or UNKNOWN not in leaf.allowed:
                return None
            valid[name] = UNKNOWN
    if shape.one_of and not any(name in valid for name in shape.one_of):
        return None
    return valid


def evidence(record: Mapping[str, Any]) -> dict[str, Any]:
    """The evidence of an event; it may be empty."""
    valid = fit(EVIDENCE, record) or {}
    module = record.get("module")
    if "file" not in valid and isinstance(module, Mapping) and (file := fit(FILE, module.get("file"))):
        valid["file"] = file
    return valid


def observables(evidence: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
    """The observables of an evidence, each value once, at most MAX_OBSERVABLES. Their names are paths in the alert:
    `prefix` and the path in the evidence."""
    listed: dict[tuple[int, str], dict[str, Any]] = {}
    for path, type_id, value in _named(EVIDENCE, evidence, prefix):
        text = str(value)
        if text == "-" or MASK in text or len(listed) >= MAX_OBSERVABLES:
            continue
        listed.setdefault(
            (type_id, text), {"name": path, "type_id": type_id, "type": OBSERVABLE_TYPES[type_id], "value": text}
        )
    return list(listed.values())


def _named(shape: Shape, evidence: Mapping[str, Any], path: str) -> Iterator[tuple[str, int, Any]]:
    for name, value in evidence.items():
        wanted = shape.attributes.get(name)
        if isinstance(wanted, Leaf):
            if wanted.observable:
                yield f"{path}.{name}", wanted.observable, value
        elif isinstance(wanted, Shape):
            yield from _named(wanted, value, f"{path}.{name}")
        elif wanted:
            for index, item in enumerate(value):
                yield from _named(wanted[0], item, f"{path}.{name}[{index}]")
