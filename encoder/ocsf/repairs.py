"""What real feeds get wrong, put right: times, class ids, damaged text. Each repair is counted by its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from encoder.ocsf.event_time import TimeBounds, parse_iso, read_time

MAX_NESTING = 200
"""What is nested deeper than this is emptied, so that a record can be written as JSON again (orjson writes 254 levels
and reads 1024)."""
WIDESPREAD = 0.1
"""The share of events from which on a repair is worth a warning."""
_SURROGATE = re.compile(rb"\\(?:\\|u[dD][89abAB]..\\u[dD][c-fC-F]..|u[dD][89a-fA-F]..)")
"""An escaped backslash, an escaped pair of surrogates, or half a pair."""
_INTEGER = re.compile(r"\s*-?[0-9]{1,10}\s*")
_SAME_MEANING = {("1.0.0-rc.2", 3005): 6003, ("1.0.0-rc.1", 3005): 6003}


def json_text(value: Any) -> str:
    """The start of a value's JSON."""
    return orjson.dumps(value)[:256].decode("utf-8", "replace")


def _integer(value: Any) -> int | None:
    if type(value) is int:
        return value if abs(value) < 2**31 else None
    if type(value) is float and value.is_integer():
        return _integer(int(value))
    if type(value) is str and _INTEGER.fullmatch(value):
        return _integer(int(value))
    return None


def event_time(record: dict[str, Any], bounds: TimeBounds, repairs: Counter[str]) -> int:
    """The time of an event, ms, within the bounds; their stand-in where it lies outside or is absent."""
    value = record.get("time")
    time: int | None = None
    if value is None:
        dt = record.get("time_dt")
        time = parse_iso(dt) if type(dt) is str else None
        time = time if time is not None and time > 0 else None
        repairs["time_missing" if time is None else "time_from_dt"] += 1
    elif type(value) is int and 100_000_000_000 <= value < 100_000_000_000_000:
        time = value
    else:
        time, repair = read_time(value)
        if repair:
            repairs[repair] += 1
    if time is None:
        return bounds.stand_in
    if bounds.earliest <= time <= bounds.latest:
        return time
    repairs["time_past" if time < bounds.earliest else "time_future"] += 1
    return bounds.stand_in


def repair(record: dict[str, Any], bounds: TimeBounds, repairs: Counter[str]) -> tuple[int, int, int]:
    """Put right what senders are known to get wrong, in place; returns event time, class_uid, type_uid."""
    metadata = record.get("metadata")
    if type(metadata) is not dict:
        repairs["metadata_missing"] += 1
        text = metadata if type(metadata) is str else json_text(metadata)
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
            parsed = load_json(unmapped.encode(), repairs)
        except orjson.JSONDecodeError:
            parsed = None
        record["unmapped"] = parsed if type(parsed) is dict else {"text": unmapped}
    return event_time(record, bounds, repairs), class_uid, type_uid


def load_json(value: bytes, repairs: Counter[str]) -> Any:
    """JSON that can be written again. Raises orjson.JSONDecodeError."""
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError:
        document = _load_mended(value, repairs)
    if value.count(b"{") + value.count(b"[") > MAX_NESTING:
        _flatten_abyss(document, repairs)
    return document


def _load_mended(value: bytes, repairs: Counter[str]) -> Any:
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


def widespread(repairs: Mapping[str, int], events: int) -> dict[str, float]:
    """The repairs that touched more than WIDESPREAD of so many events, with their shares: then the sender is wrong, or
    the repair is."""
    return {kind: n / events for kind, n in sorted(repairs.items()) if events and n > WIDESPREAD * events}
