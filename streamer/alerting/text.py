"""The words of an alert: names of attributes, values with units, titles and parts of sentences.

Its input has been redacted, and it states only what the event or its explanation holds. It does no statistics: it only
writes -log p as "1 in 8,000".
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from encoder.models.text_shapes import TextFinding

MISSING = frozenset({"", "∅", "MISSING", "<missing>", "(missing)", "missing", "None"})
"""Texts that stand for an absent value."""
MAX_SHOWN = 80
"""Characters of a value shown within a sentence."""
MAX_NAMED = 3
"""Peers that a sentence names."""

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
_ATTRIBUTE_NAMES = {
    "activity_id": "activity",
    "actor.process.cmd_line": "command line of the acting process",
    "actor.process.file.path": "program path",
    "actor.process.file.name": "acting process",
    "actor.process.name": "acting process",
    "actor.process.user.name": "user",
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
    "device.os.name": "operating system",
    "device.type_id": "kind of host",
    "file.path": "file path",
    "job.name": "job",
    "logon_type_id": "kind of logon",
    "message": "message",
    "metadata.event_code": "event code",
    "module.file.name": "module",
    "process.cmd_line": "command line",
    "process.file.name": "process",
    "process.file.path": "path of the process",
    "process.name": "process",
    "process.parent_process.file.name": "parent process",
    "process.parent_process.name": "parent process",
    "process.user.name": "user of the process",
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
_PART_NAMES = {
    **dict.fromkeys(("unmapped", "traffic", "connection_info", "metadata", "actor", "query"), ""),
    **dict.fromkeys(("finding_info", "location"), ""),
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
    "resources": "resource",
    "src_endpoint": "source",
    "svc_name": "service",
    "uid": "id",
    "url_string": "address",
}
_ABBREVIATIONS = {
    "cmd": "command",
    "diff": "different",
    "dst": "destination",
    "err": "error",
    "max": "greatest",
    "min": "least",
    "msg": "message",
    "num": "number of",
    "orig": "original",
    "proc": "process",
    "src": "source",
    "srv": "service",
    "svc": "service",
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
    "missing": "lack of an earlier step",
}


def attribute(path: str) -> str:
    """The name of an attribute: `dst_endpoint.port` is "destination port"."""
    plain = path.replace("[]", "")
    if plain in _ATTRIBUTE_NAMES:
        return _ATTRIBUTE_NAMES[plain]
    words = [_PART_NAMES[part] if part in _PART_NAMES else _spelled(part) for part in plain.split(".")[-3:]]
    if words[-1].endswith(" id"):
        words[-1] = words[-1].removesuffix(" id")
    kept = [word for i, word in enumerate(words) if word and not (i + 1 < len(words) and words[i + 1].startswith(word))]
    return " ".join(kept) or plain or "event"


def _spelled(part: str) -> str:
    """`dst_host_srv_count` is "destination host service count"."""
    return " ".join(_ABBREVIATIONS.get(word, word) for word in part.split("_"))


def event_kind(record: Mapping[str, Any]) -> str:
    """What kind of event it is: "network activity"."""
    uid = record.get("class_uid")
    known = CLASSES.get(uid) if isinstance(uid, int) else None
    name = record.get("class_name")
    return known or (shorten(name.lower(), 40) if isinstance(name, str) and name else "event")


def action(record: Mapping[str, Any], skip_path: str = "", skip_names: Collection[str] = ()) -> str:
    """What happened in an event, in a word or two: "launch of cmd.exe", "API call CreateUser", "failed logon"; else the
    kind of event. skip_path, skip_names: an attribute path and names that the sentence states elsewhere."""
    uid, activity_id = record.get("class_uid"), record.get("activity_id")
    activity = _activity(uid, activity_id) if isinstance(activity_id, int) else ""
    name = ""
    if uid == 1007:
        name = _first(record, "", "process.name", "process.file.name")
    elif uid == 6003:
        activity, name = "API call", _first(record, "", "api.operation")
    elif uid == 3002 and activity:
        return f"failed {activity}" if record.get("status_id") == 2 and skip_path != "status_id" else activity
    if not activity or not name or name in skip_names:
        return event_kind(record)
    return f"{activity}{' of' if uid == 1007 else ''} {name}"


SUMMARY_PATHS = (
    "type_uid",
    "status_id",
    "metadata.event_code",
    "api.operation",
    "process.cmd_line",
    "process.file.name",
    "process.name",
    "file.path",
    "job.name",
    "query.hostname",
    "module.file.name",
    "reg_key.path",
    "dst_endpoint.hostname",
    "dst_endpoint.ip",
    "dst_endpoint.svc_name",
    "dst_endpoint.port",
    "service.name",
    "device.hostname",
)
"""Attributes that summarise an event: its type, its outcome, then names, the most specific first."""
_PLACE_PATHS = ("dst_endpoint.svc_name", "service.name", "device.hostname")
"""Places: part of a summary only where there is no more specific name."""


_OBJECTS = {
    1001: ("file", ""),
    1005: ("module", ""),
    1007: ("process", ""),
    1008: ("log event", ""),
    3001: ("account", ""),
    3002: ("", "to"),
    4001: ("connection", "to"),
    4003: ("name lookup", "of"),
    6003: ("API call", ""),
    201001: ("registry key", ""),
    201002: ("registry value", ""),
}
"""By event class: what is acted on, and the preposition before whom or what it reached."""
_CONNECTION_RESULTS = {"close": "closed", "reset": "reset", "fail": "failed", "refuse": "refused", "listen": "awaited"}
"""By activity: the state of a connection; an opened one is not qualified."""
_NO_CONNECTION = ("failed", "refused")
_WITHOUT_ACTIVITY = (1008, 4003, 6003)
"""Classes whose summary needs no activity beside the noun and the name."""


def summary(flat: Mapping[str, Any]) -> str:
    """A flat event (path -> value) in a few words: "failed logon to PC-7", "process launch /bin/ls -l"."""
    kind = str(flat.get("type_uid", ""))
    class_uid = int(kind) // 100 if kind.isdecimal() and len(kind) < 12 else 0
    activity = _activity(class_uid, int(kind) % 100) if class_uid else ""
    noun, joined = _OBJECTS.get(class_uid, (CLASSES.get(class_uid, ""), ""))
    failed = flat.get("status_id") in (2, "2")
    how = _CONNECTION_RESULTS.get(activity, "") if class_uid == 4001 else ""
    if class_uid in (*_WITHOUT_ACTIVITY, 4001):
        activity = ""
    elif noun and not activity and class_uid in _OBJECTS:
        activity = "activity"
    words = [*(["failed"] if failed and how not in _NO_CONNECTION else []), how, noun, activity]
    names: list[str] = []
    for path in SUMMARY_PATHS[2:]:
        name = str(flat.get(path) or "")
        again = path == "dst_endpoint.ip" and bool(names)  # the same place by its address
        again = again or (class_uid == 4003 and path.startswith("dst_endpoint."))  # who was asked, not for what
        where = again or (path in _PLACE_PATHS and (names or class_uid in (1001, 1005, 1007)))
        if name not in ("", "-") and not where and not any(name.lower() in other.lower() for other in names):
            names.append(f"port {name}" if path == "dst_endpoint.port" else name)
    if not any(words):
        words = ["event"]
    elif names and joined:
        words.append(joined)
    whom = ", ".join(shorten(name, 50) for name in names[:2]).replace(", port ", " port ")
    return " ".join(filter(None, [*words, whom]))


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """The text in at most `limit` characters on one line; the middle is cut: the end of a path says more."""
    single = " ".join(text.split())
    if len(single) <= limit:
        return single
    tail = limit // 3
    return f"{single[: limit - tail - 1]}…{single[-tail:]}"


def value(path: str, text: str, record: Mapping[str, Any]) -> str:
    """A value for readers: `status_id` 2 is "failure", 43133000 bytes are "43.1 MB", a range "3 to 12" gets units."""
    if text in MISSING:
        return "none"
    if text in _YES_NO:
        return _YES_NO[text]
    name = path.rsplit(".", 1)[-1]
    if path == "type_uid":
        text = text.partition("@")[0]  # the product, where several fill the type
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
    if (_RANGE.fullmatch(text) and " " in text) or (_NUMBER.fullmatch(text) and not _names_something(name)):
        return _NUMBER.sub(lambda found: _quantity(name, float(found[0])), text)
    if text[:1] == "[" and text[-1:] == "]":
        text = ", ".join(part.strip(" \"'") for part in text[1:-1].split(",")) or "none"
    return shorten(text)


_NUMBER = re.compile(r"-?\d{1,15}(\.\d+)?(e[+-]?\d+)?")
_RANGE = re.compile(rf"(over )?{_NUMBER.pattern}( to {_NUMBER.pattern})?")
_YES_NO = {"true": "yes", "false": "no", "ephemeral": "any high port"}


def _names_something(name: str) -> bool:
    """Whether a number in this attribute is an identifier, which must not be rounded."""
    return name.endswith(
        ("id", "port", "code", "version", "num", "uid", "mask", "line", "flags", "name", "permissions")
    )


def _quantity(name: str, x: float) -> str:
    """A number with its unit; three digits for large sizes and fractions."""
    if any(word in name for word in ("bytes", "size")) and abs(x) >= 1000:
        for unit in ("kB", "MB", "GB", "TB"):
            x /= 1000
            if abs(x) < 999.5 or unit == "TB":
                return f"{x:.3g} {unit}"
    if name == "duration" and (x >= 1 or x == 0):
        return duration(round(x)) if x else "0"
    return f"{x:,.0f}" if x.is_integer() else f"{x:,.3g}"


def compared(path: str, text: str, expected: tuple[tuple[str, float], ...]) -> str:
    """ "high" or "low" where a number lies beyond all expected values, else ""."""
    if not expected or not _NUMBER.fullmatch(text) or _names_something(path.rsplit(".", 1)[-1]):
        return ""
    if not all(_RANGE.fullmatch(other) for other, _ in expected):
        return ""
    x = float(text)
    limits = [[float(match[0]) for match in _NUMBER.finditer(other)] for other, _ in expected]
    if all(x > max(limit) for limit in limits):
        return "" if any(other.startswith("over") for other, _ in expected) else "high"
    return "low" if all(x < min(limit) for limit in limits) else ""


def _activity(class_uid: Any, activity: int) -> str:
    known = _ACTIVITIES.get(class_uid, ()) if isinstance(class_uid, int) else ()
    return known[activity - 1] if 0 < activity <= len(known) else ""


def percent(probability: float) -> str:
    """A share in per cent; neither 0 % nor 100 % by rounding."""
    if not 0 <= probability <= 1:
        return "? %"
    if probability > 0.995:
        return "over 99 %" if probability < 1 else "100 %"
    return f"{probability:.0%}".replace("%", " %") if probability >= 0.01 else "under 1 %"


def one_in(nats: float) -> str:
    """-log p as "1 in 8,100", to two digits, at most "1 in a billion": no model is right beyond that."""
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
    """ "usually 443 (92 %)", "usually 443 (48 %) or 80 (31 %)", or "" where no value is usual."""
    here = value(path, observed, record)
    alternatives = [(value(path, text, record), p) for text, p in expected]
    alternatives = [(text if text != "…" else "another", p) for text, p in alternatives if text != here and p >= 0.1][
        :2
    ]
    if sum(p for _, p in alternatives) < 0.3:
        return ""
    shown = alternatives[:1] if alternatives[0][1] >= 0.6 else alternatives
    return "usually " + " or ".join(f"{text} ({percent(p)})" for text, p in shown)


class TextPart(NamedTuple):
    """A part of a text in words: "parameter id", "1' OR 1=1", "usually 1 to 6 digits" ("" where nothing is usual)."""

    name: str
    shown: str
    usual: str


def text_part(finding: TextFinding) -> TextPart:
    """Which part of a text is unusual, what it is, and what usually stands there."""
    kind, called = finding.kind, shorten(finding.label, 40)
    shown = shorten(finding.part) or "nothing"
    if kind == "&":
        return TextPart("set of parameters", shorten(finding.part.replace("&", ", ")) or "none", "")
    if kind == "#":
        return TextPart("length", "more than is taken apart", "")
    if kind == "?":
        name = f"parameter {called}".rstrip()
    elif kind == "/":
        name = f"part of the path after {called}" if called else "beginning of the path"
    elif kind == " ":
        name = f"argument of {called}" if called[:1] in ("-", "/") else f"word after {called}" if called else "word"
    else:
        name = "first word"
    if finding.usual is None:
        return TextPart(name, shown, "not seen in training" if kind == "?" else "")
    pattern, share, least, most = finding.usual
    return TextPart(name, shown, f"usually {_looks(pattern, least, most)}" if share >= USUAL else "")


USUAL = 0.3
"""The share of a pattern from which on it is usual."""
_CLASSES = {"0": "digits", "a": "small letters", "A": "capital letters", "aA": "letters", "é": "letters"}


def _looks(pattern: str, least: int, most: int) -> str:
    """A pattern of classes of characters, and lengths: "1 to 6 digits", "10 characters of the form a@a.a"."""
    if not pattern:
        return "nothing"
    length = str(least) if least == most else f"{least} to {most}"
    classes = "".join(sorted(set(pattern), key="0aAé".find))
    if classes in _CLASSES:
        looks = _CLASSES[classes].removesuffix("s") if most == 1 else _CLASSES[classes]
        return f"{length} {looks}"
    if set(pattern) <= set("0aAé"):
        return f"{length} letters and digits"
    return f"{length} characters of the form {pattern}"


def _short_text(record: Mapping[str, Any], path: str) -> str:
    node: Any = record
    for part in path.split("."):
        if not isinstance(node, Mapping):
            return ""
        node = node.get(part)
    return shorten(node, 60) if isinstance(node, str) and node != "-" else ""


_OF_ONE_USER = ("correlation", "session")
"""Kinds of entity that belong to one user."""
_PROCESS = ("actor.process.name", "actor.process.file.name", "process.name", "process.file.name")


def subject(entity: str, record: Mapping[str, Any], skip_path: str = "", skip_names: Collection[str] = ()) -> str:
    """Who or what it was, with a preposition: " of process winword.exe of user bob on host PC-7"; "" where the event
    names nobody. skip_path, skip_names: an attribute path and names that the sentence states elsewhere."""
    kind, _, name = entity.partition(":")
    parts = {
        "process": _first(record, skip_path if skip_path.startswith("actor.") else "", *_PROCESS),
        "user": _first(record, skip_path, "actor.user.name", "actor.process.user.name", "user.name"),
        "host": _first(record, skip_path, "device.hostname", "device.name", "src_endpoint.hostname", "device.ip"),
    }
    parts = {word: "" if text in skip_names else text for word, text in parts.items()}
    kind = {"device": "host", "hostname": "host"}.get(kind, kind)
    if name and kind not in parts:
        where = f" on host {parts['host']}" if parts["host"] else ""
        if kind in _OF_ONE_USER and parts["user"]:
            where = f" of user {parts['user']}{where}"
        return f" of {_KINDS.get(kind, kind.replace('_', ' '))} {shorten(name, 60)}{where}"
    if name and not parts[kind] and not _names(skip_path, kind) and name not in skip_names:
        parts[kind] = shorten(name, 60)
    joined = ""
    for word, link in (("process", ""), ("user", "of "), ("host", "on ")):
        if parts[word]:
            joined += f"{' ' + link if joined else ''}{word} {parts[word]}"
    if joined:
        return f" of {joined}"
    source, target = _first(record, skip_path, "src_endpoint.ip"), _first(record, skip_path, "dst_endpoint.ip")
    if source or target:
        return f"{source and f' from {source}'}{target and f' to {target}'}"
    return ""


def _names(path: str, kind: str) -> bool:
    """Whether this attribute is the name of the process, user or host itself."""
    return path in {
        "process": _PROCESS,
        "user": ("actor.user.name", "user.name"),
        "host": ("device.hostname", "device.name"),
    }.get(kind, ())


def _first(record: Mapping[str, Any], skip_path: str, *paths: str) -> str:
    return "" if skip_path in paths else next((text for path in paths if (text := _short_text(record, path))), "")


def sequence(what: str) -> str:
    """What was unusual about a sequence: the text for WHAT of the cause `sequence:WHAT`."""
    return _SEQUENCES.get(what, "course of events")


_COUNTS = {
    "events": ("many events", "events", ""),
    "failures": ("many failures", "failures", ""),
    "partners": ("many contacts", "different users, hosts, addresses and services", "different ones"),
    "bytes": ("much data", "sent", "sent"),
}
"""By count: the noun of a title, what is counted, and the same as a further count beside the first."""
_SPANS = {"hour": "within two hours", "day": "within a day"}


def rate(name: str, *, short: bool = False) -> tuple[str, str]:
    """The noun and the unit of a count such as `failures.hour`: ("many failures", "failures within two hours"). short:
    the unit as a further count beside the first."""
    of, _, span = name.partition(".")
    noun, counted, beside = _COUNTS.get(of, ("much activity", "acts", "acts"))
    return noun, f"{beside if short else counted} {_SPANS.get(span, '')}".strip()


def amount(of: str, x: float) -> str:
    """A count: "23", of bytes "41.2 MB"."""
    return _quantity(of, float(round(x))) if of == "bytes" else f"{round(x):,}"


def cause(text: str) -> str:
    """What was unusual: `record:dst_endpoint.port` is "destination port", `rate:bytes.day` "sent within a day"."""
    kind, _, what = text.partition(":")
    if kind == "first":
        return f"{what} within an hour of others"
    if kind == "rate":
        return rate(what)[1]
    return sequence(what) if kind == "sequence" else attribute(what)


_PREPOSITIONS = {"address": "from", "host": "on", "service": "at", "destination": "to"}
"""The preposition before a partner of each sort."""


def cooccurrence_title(what: str, sort: str, value: str) -> str:
    """The title for a usual partner that came unusually soon after another one of its sort. what: what was done, by
    whom."""
    where = f"{sort} {value}" if value else f"a usual {sort}"
    title = f"{what} {_PREPOSITIONS.get(sort, 'at')} {where} within an hour of another {sort}"
    return f"{title[0].upper()}{title[1:]}: each is usual, but never so close together"


def number_of_peers(kind: str, n: int, among: int) -> str:
    """How many peers did so: "3 of 211 other users", "none of 9,811 other addresses"."""
    name = _KINDS.get(kind, kind.replace("_", " "))
    plural = "" if among == 1 else "es" if name.endswith("s") else "s"
    return f"{f'{n:,}' if n else 'none'} of {among:,} other {name}{plural}"


def stretch(
    *, entity: str, events: int, distance: float, usual_distance: float, differing: Sequence[Mapping[str, Any]]
) -> str:
    """How what an entity did differs from the nearest normal stretch: "The last 32 events of user bob are like no
    normal stretch: file delete 20 times (once in the nearest normal one)". Arguments: those of `unmapped.stretch`."""
    who = subject(entity, {}) or " of this entity"
    places = ["in the nearest normal one", *["there"] * len(differing)]
    steps = ", ".join(
        f"{shorten(step['summary'])} {_times(step['here'])} ({_times(step['nearest_normal'])} {place})"
        for step, place in zip(differing, places, strict=False)
    )
    return f"The last {events} events{who} are like no normal stretch{f': {steps}' if steps else ''}."


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")


def peers_sentence(
    what: str, kind: str, n: int, among: int, names: Sequence[str], *, itself: bool, at_least: bool
) -> str:
    """Which peers did so in training: "3 of 65 other users are known from training with port 22 (anna, ben and 1 more);
    so is this one". names: of some of the n peers; itself: the entity did so, too; at_least: n is a lower bound."""
    who = f"{'at least ' if at_least else ''}{number_of_peers(kind, n, among)}"
    known = f"{who[0].upper()}{who[1:]} {'are' if n > 1 else 'is'} known from training with {what}"
    if not n:
        return f"{known}; this one is." if itself else f"{known}."
    *before, last = ["", *(shorten(name, 40) for name in names[:MAX_NAMED])]
    if before and n > MAX_NAMED:
        before, last = [*before, last], f"{n - MAX_NAMED:,} more"
    shown = f"{', '.join(before[1:])} and {last}" if before[1:] else last
    return f"{known}{f' ({shown})' if shown else ''}; {'so is this one' if itself else 'this one is not'}."


def further_entities(joined: str, n: int) -> str:
    """`joined` with the number of further entities: "; the same at 12 others"; "" for none."""
    return f"{joined} at {n:,} other{'s' if n > 1 else ''}" if n else ""


def lowered(fields: Sequence[str], parts: Sequence[str], share: float, since: int) -> str:
    """What of the evidence counts less, as a sentence."""
    if fields:
        names = dict.fromkeys(attribute(field.partition("#")[0]) for field in fields)
        return (
            f"New values of {' and '.join(list(names)[:MAX_NAMED])} count for little since {moment(since)}: "
            f"{percent(share)} of such events have one."
        )
    what = " and ".join(_PARTS.get(part, part) for part in parts)
    return f"{what} counts for less since {moment(since)}: it is unusual in {percent(share)} of such events."


_PARTS = {
    "rarity_for_actor": "The rarity of values for who acts",
    "rarity_for_type": "The rarity of values",
    "far": "The distance from most normal events",
    "near": "The distance from the nearest normal event",
    "replaced": "What the network says",
    "numbers_in_context": "How unusual numbers are for what they are of",
    "text": "How unusual the parts of texts are",
}


def duration(ms: int) -> str:
    """A length of time in the largest unit that fits: "4.1 s", "40 s", "9 min", "3.5 h"."""
    seconds = max(ms, 0) / 1000
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size * 1.5:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    if seconds >= 1:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{max(ms, 0)} ms"


def moment(ms: int) -> str:
    """Epoch ms as UTC: "2026-07-03 08:56:04 UTC"."""
    try:
        return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"
