"""Turns a finding into words that a tired analyst reads once: the title, the description, the names of attributes.

Everything that it is given has been redacted, and everything it says is taken from the event or its explanation. It
knows no statistics: "1 in 8,000" is -log p, read backwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

MISSING = frozenset({"", "∅", "MISSING", "<missing>", "(missing)", "missing", "None"})
"""How an absent value is written in findings."""
MAX_SHOWN = 80
"""Characters of a value shown within a sentence."""

CLASSES = {
    1001: "file activity",
    1002: "kernel extension activity",
    1003: "kernel activity",
    1004: "memory activity",
    1005: "module loading",
    1006: "scheduled job activity",
    1007: "process activity",
    1008: "event log",
    1009: "script activity",
    1010: "peripheral activity",
    2001: "security finding",
    2002: "vulnerability finding",
    2003: "compliance finding",
    2004: "detection finding",
    2005: "incident finding",
    3001: "account change",
    3002: "authentication",
    3003: "session authorization",
    3004: "entity management",
    3005: "user access management",
    3006: "group management",
    4001: "network activity",
    4002: "web traffic",
    4003: "name lookup",
    4004: "address assignment",
    4005: "remote desktop activity",
    4006: "file sharing",
    4007: "SSH activity",
    4008: "FTP activity",
    4009: "email activity",
    4013: "time synchronisation",
    4014: "tunnel activity",
    5001: "device inventory",
    5002: "device configuration",
    6001: "web resource activity",
    6002: "application lifecycle",
    6003: "API activity",
    6005: "data store activity",
    6006: "file hosting activity",
    6007: "scan",
    6008: "application error",
    201001: "registry key activity",
    201002: "registry value activity",
    201003: "Windows resource activity",
    201004: "Windows service activity",
}
_ACTIVITIES = {
    1001: ("create", "read", "update", "delete", "rename", "set attributes", "set security", "get attributes"),
    1005: ("load", "unload"),
    1007: ("launch", "terminate", "open", "inject", "set user"),
    3001: ("create", "enable", "password change", "password reset", "disable", "delete"),
    3002: ("logon", "logoff", "authentication ticket", "service ticket", "ticket renewal", "preauthentication"),
    4001: ("open", "close", "reset", "fail", "refuse", "traffic", "listen"),
    4003: ("query", "response", "query and response"),
    6003: ("create", "read", "update", "delete"),
    201001: ("create", "read", "modify", "delete", "rename"),
    201002: ("get", "set", "modify", "delete"),
}
_ENUMS = {
    "status_id": {1: "success", 2: "failure", 0: "unknown", 99: "other"},
    "severity_id": {1: "informational", 2: "low", 3: "medium", 4: "high", 5: "critical", 6: "fatal"},
    "direction_id": {1: "inbound", 2: "outbound", 3: "lateral", 4: "local"},
    "logon_type_id": {
        **dict(enumerate(("system", "unknown", "interactive", "network", "batch", "service"))),
        **dict(enumerate(("unlock", "network cleartext", "new credentials", "remote interactive"), 7)),
        11: "cached interactive",
    },
}
_WHOLE = {
    "activity_id": "activity",
    "actor.process.cmd_line": "command line",
    "actor.process.file.path": "program path",
    "actor.process.name": "acting process",
    "actor.process.parent_process.name": "parent process",
    "actor.session.is_mfa": "use of a second factor",
    "actor.user.name": "user",
    "actor.user.type": "kind of user",
    "api.operation": "operation",
    "api.service.name": "service",
    "class_uid": "kind of event",
    "cloud.region": "cloud region",
    "connection_info.protocol_name": "protocol",
    "device.hostname": "host",
    "dst_endpoint.svc_name": "destination service",
    "file.path": "file path",
    "logon_type_id": "kind of logon",
    "message": "message",
    "metadata.event_code": "event code",
    "process.cmd_line": "command line",
    "process.name": "process",
    "process.parent_process.name": "parent process",
    "query.hostname": "looked-up name",
    "src_endpoint.svc_name": "source service",
    "status_id": "outcome",
    "time": "time",
    "traffic.bytes": "bytes transferred",
    "traffic.bytes_in": "bytes received",
    "traffic.bytes_out": "bytes sent",
    "traffic.packets": "packets transferred",
    "traffic.packets_in": "packets received",
    "traffic.packets_out": "packets sent",
    "type_uid": "kind of event",
    "user.name": "target user",
}
_PARTS = {
    **dict.fromkeys(("unmapped", "traffic", "connection_info", "metadata", "actor", "query", "finding_info"), ""),
    "api": "API",
    "cmd_line": "command line",
    "device": "host",
    "dst_endpoint": "destination",
    "email_addr": "email address",
    "hostname": "host name",
    "http_method": "method",
    "http_request": "request",
    "http_response": "response",
    "ip": "address",
    "pid": "process number",
    "reg_key": "registry key",
    "reg_value": "registry value",
    "src_endpoint": "source",
    "svc_name": "service",
    "uid": "id",
    "url_string": "address",
}
_KINDS = {
    "correlation": "sequence",
    "correlation_uid": "sequence",
    "device": "host",
    "dst_ip": "destination address",
    "hostname": "host",
    "ip": "address",
    "process": "process",
    "src": "source address",
    "src_ip": "source address",
}
_SEQUENCES = {
    "order": "order of events",
    "rate": "rate of events",
    "count": "number of events",
    "silence": "silence",
    "missing": "gap in the events",
}
_QUANTITIES = ("bytes", "packets", "size", "duration", "count", "length", "latency")


def attribute(path: str) -> str:
    """The name of an attribute: `dst_endpoint.port` is "destination port"."""
    plain = path.replace("[]", "")
    if plain in _WHOLE:
        return _WHOLE[plain]
    words = [_PARTS.get(part, part.replace("_", " ")) for part in plain.split(".")[-3:]]
    if words[-1].endswith(" id"):
        words[-1] = words[-1].removesuffix(" id")
    told = [word for i, word in enumerate(words) if word and not (i + 1 < len(words) and words[i + 1].startswith(word))]
    return " ".join(told) or plain or "event"


def event_kind(record: Mapping[str, Any]) -> str:
    """What kind of event it is: "network activity"."""
    uid = record.get("class_uid")
    known = CLASSES.get(uid) if isinstance(uid, int) else None
    name = record.get("class_name")
    return known or (shorten(name.lower(), 40) if isinstance(name, str) and name else "event")


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """One line of at most `limit` characters; the end of a path says more than its middle, so both ends stay."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    tail = limit // 3
    return f"{line[: limit - tail - 1]}…{line[-tail:]}"


def value(path: str, text: str, record: Mapping[str, Any]) -> str:
    """A value as people say it: `status_id` 2 is "failure", 43133 bytes are "43,133"."""
    if text in MISSING:
        return "none"
    name = path.rsplit(".", 1)[-1]
    if text.isdecimal() and len(text) < 12:
        number = int(text)
        if name in _ENUMS:
            return _ENUMS[name].get(number, text)
        if path == "class_uid":
            return CLASSES.get(number, text)
        if path == "type_uid" and number // 100 in CLASSES:
            activity = _activity(number // 100, number % 100)
            return CLASSES[number // 100] + (f": {activity}" if activity else "")
        if path == "activity_id":
            return _activity(record.get("class_uid"), number) or text
    if any(word in name for word in _QUANTITIES) and not name.endswith("_id"):
        try:
            return f"{float(text):,.6g}" if abs(float(text)) < 1e6 else f"{float(text):,.0f}"
        except (ValueError, OverflowError):
            pass
    return shorten(text)


def _activity(class_uid: Any, activity: int) -> str:
    known = _ACTIVITIES.get(class_uid, ()) if isinstance(class_uid, int) else ()
    return known[activity - 1] if 0 < activity <= len(known) else ""


def percent(probability: float) -> str:
    """Share in per cent, never rounded to all or nothing."""
    if not 0 <= probability <= 1:
        return "? %"
    if probability > 0.995:
        return "over 99 %" if probability < 1 else "100 %"
    return f"{probability:.0%}".replace("%", " %") if probability >= 0.01 else "under 1 %"


def one_in(nats: float) -> str:
    """-log p as "1 in 8,100", to two digits; "1 in a billion" is as far as any model can be believed."""
    if not nats > 0:
        return "every time"
    if nats > math.log(1e9):
        return "less than 1 in a billion"
    times = math.exp(nats)
    if times < 1.5:
        return "most of the time"
    digits = max(0, int(math.log10(times)) - 1)
    return f"1 in {round(times, -digits):,.0f}"


def usually(path: str, observed: str, expected: tuple[tuple[str, float], ...], record: Mapping[str, Any]) -> str:
    """ "usually 443 (92 %)", "usually 443 (48 %) or 80 (31 %)", or nothing where no value is usual."""
    others = [(text, p) for text, p in expected if text != observed and p >= 0.1][:2]
    if sum(p for _, p in others) < 0.3:
        return ""
    shown = others[:1] if others[0][1] >= 0.6 else others
    return "usually " + " or ".join(f"{value(path, text, record)} ({percent(p)})" for text, p in shown)


def _at(record: Mapping[str, Any], path: str) -> str:
    node: Any = record
    for part in path.split("."):
        if not isinstance(node, Mapping):
            return ""
        node = node.get(part)
    return shorten(node, 60) if isinstance(node, str) and node != "-" else ""


def subject(entity: str, record: Mapping[str, Any], but: str = "") -> str:
    """Who or what it was: " of process winword.exe of user bob on host PC-7", with the word that joins it on,
    or "" where the event tells nothing. but: an attribute path that is told already."""
    kind, _, name = entity.partition(":")
    parts = {
        "process": _first(record, but, "actor.process.name", "process.name"),
        "user": _first(record, but, "actor.user.name", "actor.process.user.name", "user.name"),
        "host": _first(record, but, "device.hostname", "device.name", "src_endpoint.hostname", "device.ip"),
    }
    kind = {"device": "host", "hostname": "host"}.get(kind, kind)
    if name and kind not in parts:
        where = f" on host {parts['host']}" if parts["host"] else ""
        return f" of {_KINDS.get(kind, kind.replace('_', ' '))} {shorten(name, 60)}{where}"
    if name and not parts[kind] and not _names(but, kind):
        parts[kind] = shorten(name, 60)
    joined = ""
    for word, link in (("process", ""), ("user", "of "), ("host", "on ")):
        if parts[word]:
            joined += f"{' ' + link if joined else ''}{word} {parts[word]}"
    if joined:
        return f" of {joined}"
    source, target = _first(record, but, "src_endpoint.ip"), _first(record, but, "dst_endpoint.ip")
    if source or target:
        return f"{source and f' from {source}'}{target and f' to {target}'}"
    return ""


def _names(path: str, kind: str) -> bool:
    """Whether this attribute is itself the name of the process, user or host."""
    return path in {
        "process": ("actor.process.name", "process.name"),
        "user": ("actor.user.name", "user.name"),
        "host": ("device.hostname", "device.name"),
    }.get(kind, ())


def _first(record: Mapping[str, Any], but: str, *paths: str) -> str:
    return "" if but in paths else next((text for path in paths if (text := _at(record, path))), "")


def sequence(what: str) -> str:
    """What was odd about a sequence: the WHAT of the cause `sequence:WHAT`."""
    return _SEQUENCES.get(what, "course of events")


def duration(ms: int) -> str:
    """A length of time in its largest unit: "40 s", "9 min", "3.5 h"."""
    seconds = max(ms, 0) / 1000
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size * 1.5:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{max(ms, 0)} ms"


def moment(ms: int) -> str:
    """Epoch ms as UTC: "2026-07-03 08:56:04 UTC"."""
    try:
        return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"
