"""Messages to columns: the lenient decoder of OCSF JSON and the `EventBatch` that everything after it works on.

Promises: whatever can be read as a JSON object becomes an event, repaired where real feeds are known to be wrong, each
repair counted; whatever cannot is returned as a `Reject` of its own and takes nothing with it. Does not promise that an
event is valid OCSF.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.ocsf.event_time import TimeBounds, bounds_by_record, record_time
from encoder.ocsf.events import WHOLE, Column, Coordinates, EventBatch, Message, Reject
from encoder.ocsf.repairs import event_time, json_text, load_json, repair

MAX_DEPTH = 24
"""Objects nested deeper than this are kept as their JSON text: OCSF needs about 8."""
MAX_FIELDS = 4096
"""Attributes read of one event: an event with more is hostile or broken, and must not cost its batch."""
MAX_LIST = 32
"""Elements read of one list."""
MAX_KEY = 256
"""Characters of a key that enter its path."""


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
                    child.put(row, json_text(value))
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
                scalars.append(json_text(item))
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
                yield prefix, json_text(value)
            else:
                stack.extend((f"{prefix}.{k}" if prefix else k, v) for k, v in reversed(value.items()))
        elif type(value) is list:
            yield prefix, json_text(value)
        elif value is not None:
            yield prefix, value


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
        document = load_json(body, repairs)
    except orjson.JSONDecodeError as error:
        lines = body.split(b"\n")
        members: list[tuple[int, dict[str, Any]]] = []
        bad: list[tuple[int, bytes, str]] = []
        for index, line in enumerate(line for line in lines if line.strip()) if len(lines) > 1 else ():
            try:
                member = load_json(line, repairs)
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


def members(message: Message) -> list[tuple[int, bytes]]:
    """The events of one message that can be read and are not skipped: the index of each, and its JSON."""
    found = _members(0, message.value, Counter(), [])
    return [(index, orjson.dumps(record)) for index, record in found if not {index, WHOLE} & message.skipped]


def _time_bounds(message: Message) -> tuple[TimeBounds, str]:
    """The bounds of a message's event times, and the repair of the record's timestamp that they came from."""
    timestamp, suspect = record_time(message.timestamp)
    return message.bounds or bounds_by_record(timestamp), suspect


def event_times(messages: Sequence[Message]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The n events of some messages by their times alone, which is a small part of decoding them: int64 [n], the
    position of each one's message; int64 [n], its time as `decode` gives it."""
    repairs: Counter[str] = Counter()
    found: list[tuple[int, int]] = []
    with _collector_paused():
        for position, message in enumerate(messages):
            bounds, _ = _time_bounds(message)
            for _, record in _members(position, message.value, repairs, []):
                found.append((position, event_time(record, bounds, repairs)))
    columns = np.array(found, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


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
        if WHOLE in message.skipped:
            continue
        bounds, suspect = _time_bounds(message)
        for member, record in _members(position, message.value, repairs, rejects):
            if member in message.skipped:
                continue
            time, class_uid, type_uid = repair(record, bounds, repairs)
            if suspect:
                repairs[suspect] += 1
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
