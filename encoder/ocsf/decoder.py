"""Messages to columns: the lenient decoder of OCSF JSON and the `EventBatch` that everything after it works on.

Promises: whatever can be read as a JSON object becomes an event, repaired where real feeds are known to be wrong, each
repair counted; whatever cannot is returned as a `Reject` of its own and takes nothing with it. Does not promise that an
event is valid OCSF.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

MAX_DEPTH = 24
"""Objects nested deeper than this are kept as their JSON text: OCSF needs about 8."""
MAX_FIELDS = 4096
"""Attributes read of one event: an event with more is hostile or broken, and must not cost its batch."""
MAX_LIST = 32
"""Elements read of one list."""
MAX_KEY = 256
"""Characters of a key that enter its path."""
MAX_NESTING = 200
"""What is nested deeper than this is emptied, so that a record can be written as JSON again (orjson writes 254 levels
and reads 1024)."""
FUTURE_TOLERANCE_MS = 5 * 60 * 1000
_SURROGATE = re.compile(rb"\\(?:\\|u[dD][89abAB]..\\u[dD][c-fC-F]..|u[dD][89a-fA-F]..)")
"""An escaped backslash, an escaped pair of surrogates, or half a pair."""
_INTEGER = re.compile(r"\s*-?[0-9]{1,10}\s*")
_SAME_MEANING = {("1.0.0-rc.2", 3005): 6003, ("1.0.0-rc.1", 3005): 6003}


class EncoderError(Exception):
    """Base of the errors of this package; the message names the value, the place and the way out."""


class Message(NamedTuple):
    """One Kafka message or one line of a file. `timestamp` in epoch ms, -1 where the source has none."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    value: bytes | None


@dataclass(frozen=True)
class Coordinates:
    """Where n events stand in their streams: (topic, partition, offset, index in the message).

    sources: the distinct (topic, partition) pairs; source: int32 [n], index into them; offset: int64 [n]; index:
    int32 [n].
    """

    sources: tuple[tuple[str, int], ...]
    source: NDArray[np.int32]
    offset: NDArray[np.int64]
    index: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.source)

    def label(self, row: int) -> str:
        """`topic:partition:offset:index`, the form used in ids, alerts and messages to people."""
        topic, partition = self.sources[self.source[row]]
        return f"{topic}:{partition}:{self.offset[row]}:{self.index[row]}"


@dataclass(frozen=True)
class Column:
    """The values of one attribute path over a batch, sparse: rows int32 [k] ascending, values a list of k."""

    rows: NDArray[np.int32]
    values: list[Any]


@dataclass(frozen=True)
class EventBatch:
    """n events as columns.

    time: int64 [n], epoch ms, repaired; class_uid and type_uid: int32 [n], of the current OCSF numbering; columns: by
    attribute path (`actor.user.name`; a list of objects gives `resources[].uid` with a list as value; null is absence);
    records: the n decoded objects, repaired, for alerts: each can be written as JSON, and decoding that gives the same
    columns; repairs: how often each kind of repair was made.
    """

    coordinates: Coordinates
    time: NDArray[np.int64]
    class_uid: NDArray[np.int32]
    type_uid: NDArray[np.int32]
    columns: dict[str, Column]
    records: list[dict[str, Any]]
    repairs: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Reject:
    """What could not be read: the position of its message in the batch, its index in the message (-1: all of it), the
    bytes that go to the dead-letter topic (None: a tombstone) and why."""

    message: int
    index: int
    value: bytes | None
    stage: str
    exception: str
    reason: str


class _Node:
    """A trie of attribute paths, so that a path is built once a batch and not once an event."""

    __slots__ = ("children", "keys", "path", "rows", "values")

    def __init__(self, keys: tuple[str, ...], path: str) -> None:
        self.keys = keys
        self.path = path
        self.children: dict[str, _Node] = {}
        self.rows: list[int] = []
        self.values: list[Any] = []

    def child(self, key: str) -> _Node:
        node = self.children.get(key)
        if node is None:
            name = key[:MAX_KEY]
            path = f"{self.path}.{name}" if self.path else name
            node = self.children[key] = _Node((*self.keys, key), path)
        return node

    def put(self, row: int, value: Any) -> None:
        self.rows.append(row)
        self.values.append(value)


class _Flattener:
    def __init__(self, repairs: Counter[str]) -> None:
        self.root = _Node((), "")
        self.repairs = repairs
        self.left = 0

    def add(self, row: int, record: dict[str, Any]) -> None:
        self.left = MAX_FIELDS
        self._object(self.root, row, record, 0)
        if self.left < 0:
            self.repairs["too_many_fields"] += 1

    def _object(self, node: _Node, row: int, record: dict[str, Any], depth: int) -> None:
        children = node.children
        left = self.left
        self.left = left - len(record)
        for key, value in record.items() if self.left >= 0 else islice(record.items(), max(left, 0)):
            child = children.get(key) or node.child(key)
            kind = type(value)
            if kind is str or kind is int:
                child.rows.append(row)
                child.values.append(value)
            elif kind is dict:
                if depth == MAX_DEPTH:
                    self.repairs["too_deep"] += 1
                    child.put(row, _text(value))
                else:
                    self._object(child, row, value, depth + 1)
            elif kind is list:
                self._list(child, row, value)
            elif value is not None:
                child.rows.append(row)
                child.values.append(value)

    def _list(self, node: _Node, row: int, items: list[Any]) -> None:
        """A list of scalars is a value; of objects, one list a path of theirs (lists within are kept as text)."""
        if len(items) > MAX_LIST:
            self.repairs["list_cut"] += 1
            items = items[:MAX_LIST]
        scalars = []
        inner: dict[str, list[Any]] = {}
        for item in items:
            if type(item) is dict:
                for path, value in _leaves(item):
                    inner.setdefault(path, []).append(value)
            elif type(item) is list:
                scalars.append(_text(item))
            elif item is not None:
                scalars.append(item)
        if scalars or not inner:
            node.put(row, scalars)
        left = self.left
        self.left = left - len(inner)
        for path, values in inner.items() if self.left >= 0 else islice(inner.items(), max(left, 0)):
            node.child("[]").child(path).put(row, values)

    def columns(self) -> dict[str, Column]:
        """By path, sorted. Keys with dots may spell one path in two ways: its values are one column, and of two values
        of one event that of the first spelling (in the order of the keys) stands."""
        spelled: dict[str, list[_Node]] = {}
        stack = [self.root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.rows:
                spelled.setdefault(node.path.replace(".[].", "[]."), []).append(node)
        return {path: _column(nodes) for path, nodes in sorted(spelled.items())}


def _column(nodes: list[_Node]) -> Column:
    if len(nodes) == 1:
        return Column(np.array(nodes[0].rows, np.int32), nodes[0].values)
    by_row: dict[int, Any] = {}
    for node in sorted(nodes, key=lambda node: node.keys, reverse=True):
        by_row.update(zip(node.rows, node.values, strict=True))
    rows = sorted(by_row)
    return Column(np.array(rows, np.int32), [by_row[row] for row in rows])


def _leaves(record: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    stack: list[tuple[str, Any]] = [("", record)]
    while stack:
        prefix, value = stack.pop()
        if type(value) is dict:
            if prefix.count(".") > MAX_DEPTH:
                yield prefix, _text(value)
            else:
                stack.extend((f"{prefix}.{k}" if prefix else k, v) for k, v in reversed(value.items()))
        elif type(value) is list:
            yield prefix, _text(value)
        elif value is not None:
            yield prefix, value


def _text(value: Any) -> str:
    """The start of a value's JSON."""
    return orjson.dumps(value)[:256].decode("utf-8", "replace")


@lru_cache(maxsize=16_384)
def _parse_iso(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _number_to_ms(value: float) -> tuple[int | None, str]:
    """Epoch seconds, ms, us or ns told apart by magnitude: ms since 1973 have at least twelve digits."""
    if not 0 < value < 1e20:
        return None, "time_unreadable"
    if value < 1e11:
        return round(value * 1000), "time_seconds"
    if value < 1e14:
        return int(value), ""
    return (int(value // 1000), "time_microseconds") if value < 1e17 else (int(value // 1_000_000), "time_nanoseconds")


def read_time(value: Any) -> tuple[int | None, str]:
    """A timestamp as senders write it in epoch ms, None where it cannot be read, and the name of the repair."""
    if type(value) is int or type(value) is float:
        return _number_to_ms(value)
    if type(value) is str:
        iso = _parse_iso(value) if not value.replace(".", "", 1).isdigit() else None
        try:
            time = _number_to_ms(float(value))[0] if iso is None else iso
        except ValueError:
            time = None
        # Some senders write the first day of the year 1 where they have no time.
        return (time, "time_text") if time is not None and time > 0 else (None, "time_unreadable")
    return None, "time_unreadable"


def _integer(value: Any) -> int | None:
    if type(value) is int:
        return value if abs(value) < 2**31 else None
    if type(value) is float and value.is_integer():
        return _integer(int(value))
    if type(value) is str and _INTEGER.fullmatch(value):
        return _integer(int(value))
    return None


def _event_time(record: dict[str, Any], timestamp: int, repairs: Counter[str]) -> int:
    value = record.get("time")
    time: int | None = None
    if value is None:
        dt = record.get("time_dt")
        time = _parse_iso(dt) if type(dt) is str else None
        time = time if time is not None and time > 0 else None
        repairs["time_missing" if time is None else "time_from_dt"] += 1
    elif type(value) is int and 100_000_000_000 <= value < 100_000_000_000_000:
        time = value
    else:
        time, repair = read_time(value)
        if repair:
            repairs[repair] += 1
    if time is None:
        return max(timestamp, 0)
    if timestamp >= 0 and time > timestamp + FUTURE_TOLERANCE_MS:
        repairs["time_future"] += 1
        return timestamp
    return time


def _repair(record: dict[str, Any], timestamp: int, repairs: Counter[str]) -> tuple[int, int, int]:
    """Put right what senders are known to get wrong, in place; returns event time, class_uid, type_uid."""
    metadata = record.get("metadata")
    if type(metadata) is not dict:
        repairs["metadata_missing"] += 1
        text = metadata if type(metadata) is str else _text(metadata)
        record["metadata"] = metadata = {} if metadata is None else {"labels": [text[:256]]}
    given_type, given_activity = _integer(record.get("type_uid")), _integer(record.get("activity_id"))
    class_uid = _integer(record.get("class_uid"))
    if class_uid is None:
        repairs["class_missing"] += 1
        class_uid = max(given_type, 0) // 100 if given_type is not None else 0
        given_type = None if given_type is None else class_uid * 100 + given_type % 100
    version = metadata.get("version")
    renumbered = _SAME_MEANING.get((version, class_uid)) if type(version) is str else None
    if given_activity is None:
        given_activity = max(given_type, 0) % 100 if given_type is not None else 0
    if renumbered is not None:
        repairs["class_renumbered"] += 1
        class_uid, given_type = renumbered, None
        record["category_uid"] = renumbered // 1000
    if not 0 <= given_activity < 100:
        repairs["activity_out_of_range"] += 1
        given_activity = 99
    class_uid = min(max(class_uid, 0), (2**31 - 100) // 100)
    type_uid = class_uid * 100 + given_activity
    if given_type is not None and given_type != type_uid:
        repairs["type_uid_mismatch"] += 1
    record["type_uid"], record["class_uid"], record["activity_id"] = type_uid, class_uid, given_activity
    unmapped = record.get("unmapped")
    if type(unmapped) is str:
        repairs["unmapped_text"] += 1
        try:
            parsed = _loads(unmapped.encode(), repairs)
        except orjson.JSONDecodeError:
            parsed = None
        record["unmapped"] = parsed if type(parsed) is dict else {"text": unmapped}
    return _event_time(record, timestamp, repairs), class_uid, type_uid


def _loads(value: bytes, repairs: Counter[str]) -> Any:
    """JSON that can be written again. Raises orjson.JSONDecodeError."""
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError:
        document = _loads_mended(value, repairs)
    if value.count(b"{") + value.count(b"[") > MAX_NESTING:
        _flatten_abyss(document, repairs)
    return document


def _loads_mended(value: bytes, repairs: Counter[str]) -> Any:
    """JSON with bytes that are no UTF-8, or with halves of surrogate pairs (text cut by its sender), made readable."""
    text = value.decode("utf-8", "replace").encode()
    mended = _SURROGATE.sub(lambda m: m[0] if len(m[0]) in (2, 12) else b"\\ufffd", text)
    document = orjson.loads(mended)
    if text != value:
        repairs["invalid_utf8"] += 1
    if mended != text:
        repairs["half_surrogate"] += 1
    return document


def _flatten_abyss(document: Any, repairs: Counter[str]) -> None:
    """Empty what is nested too deep to be written again, in place."""
    level = [document] if type(document) in (dict, list) else []
    for _ in range(MAX_NESTING):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
    for container in level:
        container.clear()
    repairs.update({"emptied_abyss": 1} if level else ())


def _members(
    position: int, value: bytes | None, repairs: Counter[str], rejects: list[Reject]
) -> list[tuple[int, dict[str, Any]]]:
    """The events of one message with their indexes: one object, a bundle of them, or NDJSON."""

    def reject(index: int, part: bytes | None, exception: str, reason: str) -> None:
        rejects.append(Reject(position, index, part, "decode", exception, reason))

    if not value:
        reject(-1, value, "EmptyMessage", "the message has no value" if value is None else "the message is empty")
        return []
    body = value[5:] if value[0] == 0 and len(value) > 5 else value
    if body.startswith(b"\xef\xbb\xbf"):
        body = body[3:]
    try:
        document = _loads(body, repairs)
    except orjson.JSONDecodeError as error:
        lines = body.split(b"\n")
        members: list[tuple[int, dict[str, Any]]] = []
        bad: list[tuple[int, bytes, str]] = []
        for index, line in enumerate(line for line in lines if line.strip()) if len(lines) > 1 else ():
            try:
                member = _loads(line, repairs)
            except orjson.JSONDecodeError as line_error:
                bad.append((index, line, str(line_error)))
                continue
            if type(member) is dict:
                members.append((index, member))
            else:
                bad.append((index, line, f"a JSON object was expected, not {type(member).__name__}"))
        if not members:
            reject(-1, value, "JSONDecodeError", str(error))
            return []
        for index, line, reason in bad:
            reject(index, line, "JSONDecodeError", reason)
        return members
    if type(document) is not dict:
        reject(-1, value, "NotAnObject", f"a JSON object was expected, not {type(document).__name__}")
        return []
    events = document.get("events")
    if type(events) is not list or "class_uid" in document:
        return [(0, document)]
    members = []
    for index, member in enumerate(events):
        if type(member) is dict:
            members.append((index, member))
        else:
            reason = f"a JSON object was expected, not {type(member).__name__}"
            reject(index, orjson.dumps(member), "NotAnObject", reason)
    if not events:
        reject(-1, value, "EmptyBundle", "the bundle has no events")
    return members


def decode(messages: Sequence[Message]) -> tuple[EventBatch, list[Reject]]:
    """Decode messages to one columnar batch, in the order given, with the list of what could not be read. Never raises
    on bad data."""
    with _collector_paused():
        return _decode(messages)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cycle collector: it would walk the new objects again and again, and decoding makes no cycles. It is
    half of the time of decoding 1,000 events."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _decode(messages: Sequence[Message]) -> tuple[EventBatch, list[Reject]]:
    repairs: Counter[str] = Counter()
    flattener = _Flattener(repairs)
    rejects: list[Reject] = []
    records: list[dict[str, Any]] = []
    times: list[int] = []
    classes: list[int] = []
    types: list[int] = []
    source_ids: dict[tuple[str, int], int] = {}
    source: list[int] = []
    offset: list[int] = []
    index: list[int] = []
    for position, message in enumerate(messages):
        source_id = source_ids.setdefault((message.topic, message.partition), len(source_ids))
        for member, record in _members(position, message.value, repairs, rejects):
            time, class_uid, type_uid = _repair(record, message.timestamp, repairs)
            flattener.add(len(records), record)
            records.append(record)
            times.append(time)
            classes.append(class_uid)
            types.append(type_uid)
            source.append(source_id)
            offset.append(message.offset)
            index.append(member)
    coordinates = Coordinates(
        tuple(source_ids), np.array(source, np.int32), np.array(offset, np.int64), np.array(index, np.int32)
    )
    batch = EventBatch(
        coordinates,
        np.array(times, np.int64),
        np.array(classes, np.int32),
        np.array(types, np.int32),
        flattener.columns(),
        records,
        repairs,
    )
    return batch, rejects
