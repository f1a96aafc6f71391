"""Learns the feature schema from events: which attribute paths are read, as which kind, and with which vocabulary.

Promises one pass over the events and bounded memory. It does not look at labels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.features.normalization import (
    AGE,
    DERIVED,
    FOLDER,
    NETWORK,
    WORD,
    ages,
    derived,
    folder,
    is_address,
    normalise,
    number,
)
from encoder.features.schema import ACTORS, OF_PRODUCT, PRODUCT, UNSEEN_PATHS, Field, Kind, Schema
from encoder.ocsf.events import EncoderError, EventBatch

MIN_PRESENT = 5
MAX_VOCABULARY = 4096
MAX_TRACKED = 50_000
"""Distinct values of one path that are counted; up to twice as many for a short time."""
MAX_TRACKED_IN_ALL = 5_000_000
"""Distinct values of all paths that are counted: about 1 GB, up to 2 GB for a short time."""
MAX_FIELDS = 512
MAX_PATHS = 64 * MAX_FIELDS
MORE_PATHS = "#more_paths"
NUMBER_BINS = 24
NUMBER_GRID = 1024


SHARED = 50
"""Events of a type from which on a product has the type for itself, where several products fill it."""


class _DistinctCount:
    """Estimates the number of distinct texts, to about 3 %, from their 1,024 smallest hashes (k minimum values,
    Bar-Yossef et al. 2002)."""

    def __init__(self) -> None:
        self._least: NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(self, texts: Iterable[str]) -> None:
        hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") for text in texts]
        self._least = np.unique(np.concatenate([self._least, np.array(hashes, np.uint64)]))[:1024]

    @property
    def estimate(self) -> int:
        n = len(self._least)
        return n if n < 1024 else round((n - 1) * 2.0**64 / float(self._least[-1]))


class _PathStatistics:
    """Statistics of one path in bounded memory: beyond a limit of distinct values, the rarest are forgotten and their
    number is estimated."""

    def __init__(self) -> None:
        self.present = 0
        self.values: Counter[str] = Counter()
        self.sketch: _DistinctCount | None = None
        self.numeric = 0
        self.numbers: Counter[float] = Counter()

    def add(self, path: str, values: list[Any], limit: int) -> None:
        self.present += len(values)
        try:
            raw: Counter[Any] = Counter(value if type(value) is str else (type(value), value) for value in values)
        except TypeError:
            raw = Counter(("json", orjson.dumps(value)) for value in values)
        added: list[str] = []
        for key, count in raw.items():
            value = key if type(key) is str else orjson.loads(key[1]) if key[0] == "json" else key[1]
            text = normalise(value, path)
            self.values[text] += count
            if self.sketch is not None:
                added.append(text)
            if type(value) is int or type(value) is float:
                self.numeric += count
                if (x := number(value)) is not None:
                    self.numbers[x] += count
        if self.sketch is not None:
            self.sketch.add(added)
        if len(self.values) > 2 * limit:
            if self.sketch is None:
                self.sketch = _DistinctCount()
                self.sketch.add(self.values)
            self.values = Counter(dict(self.values.most_common(limit)))
        while len(self.numbers) > 2 * limit:
            self._thin_numbers()

    def _thin_numbers(self) -> None:
        """Merge every second of the rarest values into its neighbour: the distribution stays."""
        ordered = sorted(self.numbers.items())
        rare = np.median([count for _, count in ordered])
        kept: Counter[float] = Counter()
        left = 0
        for value, count in ordered:
            if count > rare or left:
                kept[value] = count + left
                left = 0
            else:
                left = count
        if left:
            kept[ordered[-1][0]] = left
        self.numbers = kept

    @property
    def distinct(self) -> int:
        return len(self.values) if self.sketch is None else max(self.sketch.estimate, len(self.values))


class SchemaLearner:
    """Learns a schema from batches of events in one pass."""

    def __init__(self) -> None:
        self._paths: dict[str, _PathStatistics] = {}
        self._ages: dict[str, _PathStatistics] = {}
        self._types: Counter[int] = Counter()
        self._types_of_products: Counter[tuple[int, str]] = Counter()
        self._events = 0
        self._more_paths = False

    def add(self, events: EventBatch) -> None:
        self._events += len(events)
        self._types.update(events.type_uid.tolist())
        if (products := events.columns.get(PRODUCT)) is not None:
            pairs = Counter(zip(events.type_uid[products.rows].tolist(), map(_text, products.values), strict=True))
            for (type_uid, product), count in pairs.items():
                self._types_of_products[type_uid, normalise(product, PRODUCT)] += count
            if len(self._types_of_products) > 2 * MAX_TRACKED:
                self._types_of_products = Counter(dict(self._types_of_products.most_common(MAX_TRACKED)))
        for path, column in events.columns.items():
            if path not in self._paths and len(self._paths) >= MAX_PATHS:
                self._more_paths = True
                continue
            statistics = self._paths.setdefault(path, _PathStatistics())
            limit = min(MAX_TRACKED, MAX_TRACKED_IN_ALL // len(self._paths))
            statistics.add(path, column.values, limit)
            if _is_moment(path):
                read = [age for age in ages(column, events.time) if age is not None]
                self._ages.setdefault(path, _PathStatistics()).add(path + AGE, read, limit)

    def finish(self) -> Schema:
        if not self._events:
            raise EncoderError("no events to learn a schema from: the training files hold none that can be read")
        set_aside: dict[str, str] = {}
        if self._more_paths:
            set_aside[MORE_PATHS] = f"paths that came after the first {MAX_PATHS:,} were not read"
        types = _vocabulary(self._event_types())
        fields = [Field("type_uid", "type_uid", "category", "type_uid", self._events, types)]
        ordered = sorted(self._paths.items(), key=lambda item: (-item[1].present, item[0]))
        seen: dict[str, str] = {}
        for path, statistics in ordered:
            if path == "type_uid":
                continue
            reason = _reason_to_set_aside(path, statistics)
            if reason is None and len(fields) >= MAX_FIELDS:
                reason = f"more than {MAX_FIELDS} fields: this is one of the rarest"
            if reason is None and (twin := seen.setdefault(_fingerprint(statistics), path)) != path:
                reason = f"duplicate of {twin}" if _last(twin) == _last(path) or _is_caption(path, twin) else None
            if path in self._ages and _is_number(path + AGE, self._ages[path]):
                fields.append(_number_field(path + AGE, path, self._ages[path]))
            elif reason is not None:
                set_aside[path] = reason
            else:
                fields.extend(_fields_of(path, statistics))
        fields.append(
            Field(UNSEEN_PATHS, UNSEEN_PATHS, "category", UNSEEN_PATHS, self._events, ("0", "1", "2-3", "4+"))
        )
        actors = tuple(path for path in ACTORS if any(field.path == path for field in fields))
        return Schema(tuple(fields), dict(sorted(set_aside.items())), actors, self._events)

    def _event_types(self) -> Counter[str]:
        """Event types by their events: a `type_uid`, or where several products fill one, `type_uid@product` for each.
        Two products that write the same type mean other things by it: a log of pod metrics, and one of file access."""
        of_type: dict[int, list[tuple[str, int]]] = {}
        for (type_uid, product), count in self._types_of_products.items():
            if count >= SHARED:
                of_type.setdefault(type_uid, []).append((product, count))
        types = Counter({str(type_uid): count for type_uid, count in self._types.items()})
        for type_uid, products in of_type.items():
            if len(products) > 1:
                types |= Counter({f"{type_uid}{OF_PRODUCT}{product}": count for product, count in products})
        return types


def _text(value: Any) -> str:
    return value if type(value) is str else orjson.dumps(value).decode()


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _is_caption(path: str, twin: str) -> bool:
    return {path, twin} in ({stem, f"{stem}_id"} for stem in (path.removesuffix("_id"), path.removesuffix("_name")))


def _fingerprint(statistics: _PathStatistics) -> str:
    """Equal for columns with the same value counts. It does not compare rows, so only attributes of the same name and
    captions are set aside by it."""
    counted = sorted(statistics.values.items())
    return hashlib.sha256(orjson.dumps([statistics.present, counted])).hexdigest()


def _reason_to_set_aside(path: str, statistics: _PathStatistics) -> str | None:
    if path.startswith("#") or path.endswith(DERIVED):
        return "named as derived fields are"
    if path in _IN_TYPE:
        return "said by type_uid"
    if path in _OWN_ID or _UNIQUE.search(path):
        return "identifies the record, not its behaviour"
    if _TIMESTAMP.search(path):
        return "timestamp: never used raw"
    if statistics.present < MIN_PRESENT:
        return f"seen fewer than {MIN_PRESENT} times"
    return None


def _is_moment(path: str) -> bool:
    """Whether the age of this timestamp describes the event, not the pipeline."""
    return _TIMESTAMP.search(path) is not None and not path.startswith(("time", "metadata."))


def _is_number(path: str, statistics: _PathStatistics) -> bool:
    last = _last(path)
    if statistics.numeric < 0.99 * statistics.present or _IDENTIFIER.search(last):
        return False
    return statistics.distinct > 20 and bool(statistics.numbers)


def _group(path: str) -> str:
    """The object that a path describes: one for `process.name`, `process.file.name` and `process.file.path`. Each path
    under `unmapped` and `metadata` is an object of its own."""
    if "." not in path or path.startswith(("unmapped", "metadata")):
        return path
    parent = path.rsplit(".", 1)[0]
    while parent.endswith(".file"):
        parent = parent.removesuffix(".file")
    return parent


def _number_field(name: str, path: str, statistics: _PathStatistics) -> Field:
    ordered = sorted(statistics.numbers.items())
    values, counts = np.array([x for x, _ in ordered]), np.array([count for _, count in ordered])
    places = np.linspace(0, counts.sum() - 1, min(int(counts.sum()), NUMBER_GRID)).round()
    grid, edges = _order_statistics(values, counts, places).tolist(), _number_edges(values, counts)
    return Field(name, path, "number", _group(path), statistics.present, grid=tuple(grid), edges=edges)


def _fields_of(path: str, statistics: _PathStatistics) -> Iterable[Field]:
    group = _group(path)
    if _is_number(path, statistics):
        yield _number_field(path, path, statistics)
        return
    distinct = statistics.distinct
    kind: Kind = "identity" if _IDENTITY.search(path) else "category"
    suffixes = _derivable(path, statistics)
    if distinct > 200 and distinct > 0.5 * statistics.present:
        yield Field(path, path, "presence", group, statistics.present, left_out=distinct)
        suffixes = tuple(suffix for suffix in suffixes if suffix != FOLDER)
    else:
        values = _vocabulary(statistics.values)
        yield Field(path, path, kind, group, statistics.present, values, left_out=distinct - len(values))
    for suffix in suffixes:
        parts: Counter[str] = Counter()
        for value, count in statistics.values.items():
            parts.update(dict.fromkeys(derived(value, suffix), count))
        seen = len(parts)
        if (
            suffix == WORD
        ):  # Words that occur once count as unknown, so that training has unknown words as new text will.
            parts = Counter({word: count for word, count in parts.items() if count > 1})
        values = _vocabulary(parts)
        as_: Kind = "identity" if suffix == NETWORK else "category"
        yield Field(path + suffix, path, as_, group, statistics.present, values, left_out=seen - len(values))


def _vocabulary(counts: Counter[str]) -> tuple[str, ...]:
    return tuple(value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_VOCABULARY])


def _derivable(path: str, statistics: _PathStatistics) -> tuple[str, ...]:
    """Suffixes of the fields derived from an attribute, by its name and the form of its values."""
    if statistics.numeric:
        return ()
    total = statistics.values.total()
    if _ADDRESS.search(path):
        addresses = sum(count for value, count in statistics.values.items() if is_address(value))
        return (NETWORK,) if addresses > 0.5 * total else ()
    if _IDENTITY.search(path):
        return ()
    spaced = sum(count for value, count in statistics.values.items() if len(value.split()) > 2)
    if _TEXT.search(path) or spaced > 0.3 * total:
        return (WORD,)
    slashed = sum(count for value, count in statistics.values.items() if folder(value))
    return (FOLDER,) if slashed > 0.3 * total else ()


def _order_statistics(
    values: NDArray[np.float64], counts: NDArray[np.int64], places: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The values at these places (float64, from 0, interpolated) of the sequence that holds each of the ascending
    values as often as its count says."""
    ends = np.cumsum(counts)
    low = values[np.searchsorted(ends, np.floor(places), "right")]
    high = values[np.searchsorted(ends, np.ceil(places), "right")]
    interpolated: NDArray[np.float64] = low + (high - low) * (places - np.floor(places))
    return interpolated


def _number_edges(values: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Bin borders: below and above the training range, quantiles between, and a bin of its own for each value that more
    than 2 % of the events have. values: ascending, each once."""
    middles = (values[1:] + values[:-1]) / 2
    if len(values) <= NUMBER_BINS:
        inner = set(middles.tolist())
    else:
        places = np.linspace(0, 1, NUMBER_BINS + 1)[1:-1] * (counts.sum() - 1)
        inner = set(_order_statistics(values, counts, places).tolist())
        for i in np.flatnonzero(counts > 0.02 * counts.sum()):
            inner.update(middles[max(i - 1, 0) : i + 1].tolist())
    return tuple(sorted({float(values[0]) - 1e-6, *inner, float(values[-1]) + 1e-6}))


_IDENTIFIER = re.compile(
    r"(^|_)(id|ids|uid|uids|port|pid|ppid|tid|euid|auid|egid|gid|num|flags|permissions|code|sequence|masks?|offset|line|version|ip|mac)$"
)
_TIMESTAMP = re.compile(r"(^|\.)(time|timestamp|[a-z_]*_time|[a-z_]+_dt|timezone_offset)$")
_UNIQUE = re.compile(r"(^|\.)(pid|tid|ppid|sequence|transaction_id|transaction_uid|raw_data|uid_alt|event_uid)$")
_IN_TYPE = {"class_uid", "class_name", "category_uid", "category_name", "activity_id", "activity_name", "type_name"}
_OWN_ID = {"metadata.uid", "metadata.correlation_uid", "metadata.original_time", "metadata.sequence"}
_IDENTITY = re.compile(
    r"(^|\.)((user|account)\.(name|uid|email_addr|full_name|credential_uid|domain)|(device|src_endpoint)\.(hostname|name|uid)"
    r"|ip|intermediate_ips|mac|session\.(uid|issuer)|owner\.name|hostname)$"
)
"""Attributes that name entities and places. An unknown name is a fact about the entity, not an anomaly of the record.
"""
_ADDRESS = re.compile(r"(^|[._])ips?$")
_TEXT = re.compile(r"(^|[._])(cmd_line|message|url_string|user_agent|subject|desc|comment|script_content)$")
"""Attributes that consist of words, also where training had only one or two of them."""
