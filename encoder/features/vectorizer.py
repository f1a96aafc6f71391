"""Turns events into features, in training and serving: integer codes of all fields, and numbers with their quantiles.

Promises: it raises for no decoded event, never emits infinity, emits NaN only for a number that is missing, and gives
the same features in every process and for any batches. It does not know what the codes are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from sys import getsizeof
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.features.normalization import AGE, FOLDER, ages, normalise, number
from encoder.features.schema import FIRST, MISSING, OF_PRODUCT, PRODUCT, UNKNOWN, UNSEEN_PATHS, Field, Schema
from encoder.ocsf.events import Column, EventBatch

CACHE_BYTES = 64 << 20
"""What the values that a vectorizer remembers take at most, over all paths."""
_CACHED_LENGTH = 1024
"""Longer values are not cached."""
_SLOT_BYTES = 100
"""What a dict takes for an entry, beside key and value: 24 to 90."""
_UNSEEN_STEPS = np.array([1, 2, 4])


@dataclass(frozen=True)
class FeatureBatch:
    """n events as features.

    codes: int32 [n, fields], 0 MISSING, 1 UNKNOWN, then the field's vocabulary or bins; quantiles: float32
    [n, numbers], the number's mid-rank among training values in [0, 1], 0.5 where it is missing; actor: int64 [n], who
    acts (0: nobody named); numbers: float32 [n, numbers], the number itself on the signed log scale
    (`encoder.features.normalization.number`), NaN where it is missing.
    """

    codes: NDArray[np.int32]
    quantiles: NDArray[np.float32]
    actor: NDArray[np.int64]
    numbers: NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: Sequence[FeatureBatch]) -> FeatureBatch:
        """The events of one or more parts, in order."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in dataclass_fields(cls)))

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: NDArray[np.intp]) -> FeatureBatch:
        return FeatureBatch(self.codes[rows], self.quantiles[rows], self.actor[rows], self.numbers[rows])

    def distinct(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The first row of each distinct event, intp [k], and for every event the index of its distinct row, intp [n].
        Logs repeat themselves, so later steps compute distinct rows only."""
        columns = np.concatenate([self.codes, self.quantiles.view(np.int32), self.numbers.view(np.int32)], axis=1)
        keys = row_hash(columns)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        return first, inverse.ravel()


def row_hash(rows: NDArray[np.int32]) -> NDArray[np.uint64]:
    """uint64 [n], a hash of each row: a random odd multiplier for each column, mixed (multiply-shift, Dietzfelbinger et
    al. 1997). The seed is fixed, so hashes are equal in every process. rows: int32 [n, c]."""
    drawn = np.random.default_rng(0x0C5F).integers(1, 2**63, rows.shape[1], np.uint64)
    multipliers: NDArray[np.uint64] = drawn | np.uint64(1)
    keys = np.zeros(len(rows), np.uint64)
    for column in range(rows.shape[1]):
        keys += _mix(rows[:, column].astype(np.uint32).astype(np.uint64) * multipliers[column] + multipliers[column])
    return keys


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Caches:
    """What the columns of a vectorizer remember: CACHE_BYTES at most. Where it would be more, the column that holds
    most forgets all, which is that of the most varied values: those come again least."""

    def __init__(self) -> None:
        self._columns: list[_CategoryColumn] = []
        self._bytes = 0

    def join(self, column: _CategoryColumn) -> None:
        self._columns.append(column)

    def grow(self, column: _CategoryColumn, size: int) -> None:
        column.cached_bytes += size
        self._bytes += size
        if self._bytes > CACHE_BYTES:
            max(self._columns, key=lambda each: each.cached_bytes).forget()
            self._bytes = sum(each.cached_bytes for each in self._columns)


class _CategoryColumn:
    """Maps the values of one path to codes of its fields; each distinct raw value is computed once."""

    def __init__(self, path: str, fields: list[tuple[int, Field]], caches: _Caches) -> None:
        self.cached_bytes = 0
        self._caches = caches
        caches.join(self)
        self._path = path
        self._fields = [
            (position, field, {value: FIRST + i for i, value in enumerate(field.values)}) for position, field in fields
        ]
        self._cache: dict[Any, tuple[int, ...]] = {}

    def _codes_of(self, value: Any) -> tuple[int, ...]:
        text = normalise(value, self._path)
        codes = []
        for _, field, vocabulary in self._fields:
            if field.kind == "presence":
                codes.append(FIRST)
            else:
                known = [vocabulary.get(part, UNKNOWN) for part in field.parts(text)]
                codes.append(
                    UNKNOWN if UNKNOWN in known else max(known)
                )  # the rarest: vocabularies are sorted by frequency
        return tuple(codes)

    def _remember(self, key: Any, value: Any) -> tuple[int, ...]:
        codes = self._codes_of(value)
        text = key if key.__class__ is str else key[1] if key[0] == "json" else ""
        if len(text) <= _CACHED_LENGTH:
            self._cache[key] = codes
            size = getsizeof(key) + getsizeof(codes) + _SLOT_BYTES
            self._caches.grow(self, size if key.__class__ is str else size + getsizeof(key[1]))
        return codes

    def forget(self) -> None:
        self._cache.clear()
        self.cached_bytes = 0

    def put(self, column: Column, codes: NDArray[np.int32]) -> None:
        # The type is part of the key: True, 1 and 1.0 are equal as keys but not as values of an event.
        keys = [v if v.__class__ is str else (v.__class__, v) for v in column.values]
        cache = self._cache
        try:
            rows = [cache.get(key) for key in keys]
        except TypeError:
            keys = [v if v.__class__ is str else ("json", orjson.dumps(v)) for v in column.values]
            rows = [cache.get(key) for key in keys]
        if None in rows:
            for i, known in enumerate(rows):
                if known is None:
                    rows[i] = cache.get(keys[i]) or self._remember(keys[i], column.values[i])
        codes[column.rows[:, None], [position for position, _, _ in self._fields]] = np.array(rows, np.int32)


_Number = tuple[int, int, NDArray[np.float64], NDArray[np.float64]]
"""Position among the fields, position among the quantiles, grid, edges."""


class Vectorizer:
    """Turns event batches into feature batches by a schema."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._known = schema.known_paths
        by_path: dict[str, list[tuple[int, Field]]] = {}
        self._numbers: dict[str, _Number] = {}
        self._ages: dict[str, _Number] = {}
        for position, field in enumerate(schema.fields):
            if field.kind == "number":
                place = len(self._numbers) + len(self._ages)
                entry = (position, place, np.array(field.grid), np.array(field.edges))
                (self._ages if field.derives == AGE else self._numbers)[field.path] = entry
            elif field.name not in ("type_uid", UNSEEN_PATHS):
                by_path.setdefault(field.path, []).append((position, field))
        caches = _Caches()
        self._columns = {path: _CategoryColumn(path, fields, caches) for path, fields in by_path.items()}
        types = schema.fields[0].values
        self._types = np.array(sorted(int(value) for value in types if OF_PRODUCT not in value), np.int64)
        self._type_codes = np.array(
            [FIRST + types.index(str(value)) for value in self._types.tolist()], np.int32
        )  # a type's code by its rank among the sorted types
        positions = {field.name: i for i, field in enumerate(schema.fields)}
        self._product = positions.get(PRODUCT, 0)
        self._by_product = _types_by_product(schema, self._product) if self._product else None
        self._actors = [positions[path] for path in schema.actors]

    @property
    def numbers(self) -> int:
        """The number of fields that are numbers."""
        return len(self._numbers) + len(self._ages)

    def __call__(self, events: EventBatch) -> FeatureBatch:
        n = len(events)
        codes = np.full((n, len(self.schema.fields)), MISSING, np.int32)
        quantiles = np.full((n, self.numbers), 0.5, np.float32)
        numbers = np.full((n, self.numbers), np.nan, np.float32)
        unseen = np.zeros(n, np.int64)
        for path, column in events.columns.items():
            if path in self._columns:
                self._columns[path].put(column, codes)
            elif path in self._numbers:
                self._put_numbers(self._numbers[path], column, codes, quantiles, numbers)
            elif path in self._ages:
                since = Column(column.rows, ages(column, events.time))
                self._put_numbers(self._ages[path], since, codes, quantiles, numbers)
            elif path not in self._known:
                unseen[column.rows] += 1
        codes[:, 0] = self._code_types(events.type_uid)
        if self._by_product is not None:
            codes[:, 0] = self._by_product[codes[:, 0], codes[:, self._product]]
        codes[:, -1] = FIRST + np.searchsorted(_UNSEEN_STEPS, unseen, side="right")
        return FeatureBatch(codes, quantiles, self.actors(codes), numbers)

    def _code_types(self, type_uid: NDArray[np.int32]) -> NDArray[np.int32]:
        at = np.minimum(np.searchsorted(self._types, type_uid), len(self._types) - 1)
        return np.where(self._types[at] == type_uid, self._type_codes[at], UNKNOWN).astype(np.int32)

    def actors(self, codes: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [n]: the actor of events with these codes; 0 for none."""
        actor = np.zeros(len(codes), np.int64)
        for rank, position in reversed(list(enumerate(self._actors))):
            present = codes[:, position] != MISSING
            actor = np.where(present, (rank + 1) * 2**32 + codes[:, position].astype(np.int64), actor)
        return actor

    @staticmethod
    def _put_numbers(
        number_: _Number,
        column: Column,
        codes: NDArray[np.int32],
        quantiles: NDArray[np.float32],
        numbers: NDArray[np.float32],
    ) -> None:
        position, place, grid, edges = number_
        if set(map(type, column.values)) <= {int, float}:
            try:
                raw = np.array(column.values, np.float64)
            except OverflowError:
                raw = np.array([np.nan])
        else:
            raw = np.array([np.nan])
        if len(raw) == len(column.values) and np.all(np.abs(raw) < 1e300):
            x = np.sign(raw) * np.log1p(np.abs(raw))
            readable = np.ones(len(x), bool)
        else:
            maybe = [number(value) for value in column.values]
            readable = np.array([value is not None for value in maybe])
            x = np.array([0.0 if value is None else value for value in maybe])
        rows = column.rows
        codes[rows, position] = np.where(readable, FIRST + np.searchsorted(edges, x), UNKNOWN)
        rank = (np.searchsorted(grid, x, "left") + np.searchsorted(grid, x, "right")) / (2 * max(len(grid), 1))
        quantiles[rows, place] = np.where(readable, rank, 0.5)
        numbers[rows, place] = np.where(readable, x, np.nan)


def _types_by_product(schema: Schema, position: int) -> NDArray[np.int32] | None:
    """int32 [types, products]: the code of a type that several products fill, by its own code and the product's; None
    where no type is filled by several. position: of the product's field."""
    types, products = schema.fields[0], schema.fields[position]
    codes = {value: FIRST + place for place, value in enumerate(types.values)}
    known = {value: FIRST + place for place, value in enumerate(products.values)}
    table = np.tile(np.arange(types.size, dtype=np.int32)[:, None], products.size)
    for value, code in codes.items():
        type_uid, _, product = value.partition(OF_PRODUCT)
        if product in known and type_uid in codes:
            table[codes[type_uid], known[product]] = code
    return table if (table != table[:, :1]).any() else None


def fitted_to(schema: Schema, features: FeatureBatch, rows: NDArray[np.intp]) -> tuple[Schema, FeatureBatch]:
    """The schema with the vocabulary of these rows (intp) only, and all features by that schema.

    Other values move to `Field.later` and count as unknown, so that values that only calibration events have look like
    new values. Words and networks stay as they are, because their code is that of the rarest of several parts.
    """
    codes = features.codes.copy()
    fields = list(schema.fields)
    for position, field in enumerate(schema.fields[1:-1], 1):
        if field.kind not in ("category", "identity") or field.derives not in ("", FOLDER):
            continue
        had = np.bincount(features.codes[rows, position], minlength=field.size)[FIRST:] > 0
        if had.all():
            continue
        values = np.array(field.values, object)
        fields[position] = replace(field, values=tuple(values[had]), later=tuple(values[~had]))
        recoded = np.concatenate([[MISSING, UNKNOWN], np.where(had, FIRST - 1 + np.cumsum(had), UNKNOWN)])
        codes[:, position] = recoded[codes[:, position]]
    narrowed = replace(schema, fields=tuple(fields))
    return narrowed, replace(features, codes=codes, actor=Vectorizer(narrowed).actors(codes))
