"""Normalises the values of attributes for the features: text, parts derived from it (folder, rarest word, network), and
numbers.

Promises pure functions of value and path, equal in every process, that raise for no JSON value. It knows no schema.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.event_time import NO_TIME, read_time
from encoder.ocsf.events import Column

FOLDER = "#folder"
"""Suffix of the field derived from a path-like attribute: the folder, without the name."""
WORD = "#word"
"""Suffix of the field derived from text (command lines, messages, URLs): its rarest word."""
NETWORK = "#network"
"""Suffix of the field derived from an address: its /16 (IPv6: /32), the prefix that a site or provider has."""
AGE = "#age"
"""Suffix of the field derived from a timestamp: how long before the event it lies, in seconds."""
DERIVED = (FOLDER, WORD, NETWORK, AGE)

_GUID = re.compile(r"\{?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{18,}\}?")
_HEX = re.compile(r"\b(0x)?(?=[0-9a-f]*\d)([0-9a-f]{8,}|(?=\d*[a-f])[0-9a-f]{6,7})\b")
_POD = re.compile(r"(?<=#-)[bcdfghjklmnpqrstvwxz2456789]{5}(?![\w-])")
"""The random end of a name that Kubernetes gives to a pod, after the hash of its deployment; each redeploy has another.
The characters are those of its `util/rand`."""
_DIGITS = re.compile(r"\d+")
_PROFILE = re.compile(r"(\\users\\|/home/|/users/|documents and settings\\)[^\\/]+")
_EXACT = re.compile(r"(^|[._])(code|id|ip|ips|mac|port|version|cidr)$")
"""Attributes whose digits are the value (codes and addresses), not counts or dates within text."""
_SEPARATOR = re.compile(r"[\\/]+")
EPHEMERAL_PORTS = 32768
"""The first port that systems use for outgoing connections (Linux; 49152 in RFC 6335)."""
USER_PORTS = 1024
"""From this port on, a client's port carries no information: address translation may assign any."""
MAX_TEXT = 200


def normalise(value: Any, path: str) -> str:
    """The form of a value in a vocabulary. Text: lower case, with placeholders for ids, hexadecimal and other numbers,
    for what a redeploy changes in the names of pods (none of these in codes and addresses), and for owners of home
    folders; integers: unchanged, except that ephemeral ports are one value; lists: as sets."""
    kind = type(value)
    if kind is str:
        text = _PROFILE.sub(r"\1*", value[: 4 * MAX_TEXT].lower())
        if _EXACT.search(path):
            return text[:MAX_TEXT]
        return _DIGITS.sub("0", _POD.sub("#", _HEX.sub("#", _GUID.sub("{}", text))))[:MAX_TEXT]
    if kind is bool:
        return "true" if value else "false"
    if kind is int or kind is float:
        if kind is float and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if path.endswith("port") and value >= (USER_PORTS if path == "src_endpoint.port" else EPHEMERAL_PORTS):
            return "ephemeral"
        return str(value)
    if kind is list:
        return "[" + ",".join(sorted({normalise(item, path) for item in value}))[: MAX_TEXT - 2] + "]"
    return _DIGITS.sub("0", str(value).lower())[:MAX_TEXT]


def folder(text: str) -> str:
    """A normalised path without its last part."""
    parts = _SEPARATOR.split(text)
    return "/".join(parts[:-1]) if len(parts) > 1 else ""


def number(value: Any) -> float | None:
    """A quantity on a signed log scale, log1p(|x|) with the sign of x; None where the value is not a finite number."""
    if type(value) is str:
        try:
            value = float(value)
        except ValueError:
            return None
    elif type(value) is not int and type(value) is not float:
        return None
    if not -1e300 < value < 1e300:
        return None
    return float(np.sign(value) * np.log1p(abs(float(value))))


def ages(column: Column, time: NDArray[np.int64]) -> list[float | None]:
    """Seconds from each timestamp of a column to its event, negative where it lies after; None where either cannot
    be read. time: int64 [n], event ms of the batch."""
    read = (read_time(value)[0] for value in column.values)
    return [
        None if at is None or now == NO_TIME else (now - at) / 1000
        for at, now in zip(read, time[column.rows].tolist(), strict=True)
    ]


_NOT_A_WORD = re.compile(r"[\s\\/\"'`=,;:()\[\]{}<>|&?!@]+")


def derived(text: str, suffix: str) -> tuple[str, ...]:
    """The parts of a normalised text for this suffix: one part, for text its words, for addresses their networks."""
    if suffix == WORD:
        return tuple(dict.fromkeys(word for word in _NOT_A_WORD.split(text) if word)) or ("",)
    if suffix == FOLDER:
        return (folder(text),)
    return tuple(sorted({_network(member) for member in text.strip("[]").split(",")}))


def is_address(text: str) -> bool:
    """Whether a normalised text is an address, or a list that begins with one."""
    return _network(text.strip("[]").split(",")[0]) != ""


@lru_cache(16_384)
def _network(text: str) -> str:
    """The network of an address; "" for anything else."""
    try:
        address: IPv4Address | IPv6Address = ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    prefix = 16 if isinstance(address, IPv4Address) else 32
    kept = int(address) >> (address.max_prefixlen - prefix) << (address.max_prefixlen - prefix)
    return f"{type(address)(kept)}/{prefix}"
