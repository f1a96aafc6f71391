"""The feature schema: which attribute paths are read, and as which kind of field; JSON that a person can read and edit.

Promises: every path of training is either a field or set aside with a reason; the same events give the same schema in
any batches (up to MAX_TRACKED distinct values of a path; beyond, the rarest are forgotten batch by batch); its hash
identifies it; memory is bounded for any number of values and paths. It does not use paths that training did not have:
their number in an event is a field of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from encoder.features.normalization import (
    derived,
    normalise,
)
from encoder.ocsf.events import EncoderError

Kind = Literal["category", "identity", "number", "presence"]
MISSING, UNKNOWN, FIRST = 0, 1, 2
"""Codes: the attribute is absent; its value did not occur in training; the first value of the vocabulary."""

PRODUCT = "metadata.product.name"
OF_PRODUCT = "@"
"""Between type_uid and product, in the name of an event type that several products fill."""


@dataclass(frozen=True)
class Field:
    """One column of the features.

    name: the attribute path, with a suffix if the field is derived from it (`encoder.features.normalization`); group:
    the object that it describes (fields of one group describe one thing: a process by name and by path); present:
    training events that had it; values: the vocabulary, most common first, the code of values[i] is i + 2; grid: for a
    number, up to 1024 sorted training values on the signed log scale (the encoding is the mid-rank in the grid); edges:
    for a number, the borders of its bins; left_out: the number of distinct training values (to 3 % where there were
    many) that have no code of their own and count as unknown; later: values that only calibration events had: they
    count as unknown, as new values will.
    """

    name: str
    path: str
    kind: Kind
    group: str
    present: int
    values: tuple[str, ...] = ()
    grid: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    left_out: int = 0
    later: tuple[str, ...] = ()

    @property
    def derives(self) -> str:
        """The suffix of a derived field, "" for the attribute itself."""
        return self.name[len(self.path) :]

    def came_later(self, value: Any) -> bool:
        """Whether the value is one of `later`."""
        return bool(self.later) and not set(self.parts(normalise(value, self.path))).isdisjoint(self.later)

    def parts(self, text: str) -> tuple[str, ...]:
        """The values of a normalised text for this field: itself, or the parts derived from it."""
        return derived(text, self.derives) if self.derives else (text,)

    @property
    def size(self) -> int:
        """The number of codes."""
        if self.kind == "number":
            return FIRST + len(self.edges) + 1
        return FIRST + (1 if self.kind == "presence" else len(self.values))


@dataclass(frozen=True)
class Schema:
    """fields: in order; set_aside: other paths, with the reason; actors: attributes that name the actor; events: of
    training."""

    fields: tuple[Field, ...]
    set_aside: dict[str, str]
    actors: tuple[str, ...]
    events: int

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def known_paths(self) -> set[str]:
        return {field.path for field in self.fields} | set(self.set_aside)

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)

    @classmethod
    def from_json(cls, data: bytes, where: str = "schema.json") -> Schema:
        try:
            raw = orjson.loads(data)
            fields = tuple(_field_from_json(field) for field in raw["fields"])
            schema = cls(fields, dict(raw["set_aside"]), tuple(raw["actors"]), int(raw["events"]))
            _check(schema)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise EncoderError(f"{where} is not a feature schema ({error}); fit the bundle again") from error
        return schema


def _check(schema: Schema) -> None:
    """Check what an edit may have broken. Raises ValueError."""
    names = [field.name for field in schema.fields]
    if len(set(names)) != len(names):
        raise ValueError("two fields have one name")
    if not names or (names[0], names[-1]) != ("type_uid", UNSEEN_PATHS):
        raise ValueError(f"the first field has to be type_uid and the last {UNSEEN_PATHS}")
    if not set(schema.actors) <= set(names):
        raise ValueError(f"the actors {sorted(set(schema.actors) - set(names))} are no fields")
    for field in schema.fields:
        if field.kind not in get_args(Kind):
            raise ValueError(f"{field.name} has the kind {field.kind!r}; there are {', '.join(get_args(Kind))}")
        if any(list(numbers) != sorted(numbers) for numbers in (field.grid, field.edges)):
            raise ValueError(f"grid and edges of {field.name} have to ascend")
        if field.kind == "number" and not field.edges:
            raise ValueError(f"{field.name} is a number without edges")
    if not schema.fields[0].values or not all(
        value.partition(OF_PRODUCT)[0].isdecimal() for value in schema.fields[0].values
    ):
        raise ValueError("the values of type_uid have to be numbers (or number@product), one or more")


def _field_from_json(raw: dict[str, Any]) -> Field:
    """Raises KeyError or TypeError where a key is missing or a value has another type."""
    return Field(
        name=str(raw["name"]),
        path=str(raw["path"]),
        kind=raw["kind"],
        group=str(raw["group"]),
        present=int(raw["present"]),
        values=tuple(str(value) for value in raw["values"]),
        grid=tuple(float(value) for value in raw["grid"]),
        edges=tuple(float(value) for value in raw["edges"]),
        left_out=int(raw.get("left_out", 0)),
        later=tuple(str(value) for value in raw.get("later", ())),
    )


ACTORS = (
    "actor.process.name",
    "actor.process.file.name",
    "actor.app_name",
    "actor.invoked_by",
    "api.service.name",
    "service.name",
    "dst_endpoint.svc_name",
    "actor.user.type",
)
"""Attributes that name the actor; the first that an event has is the context of its other values."""


def write_schema(schema: Schema, path: Path) -> None:
    path.write_bytes(schema.to_json())


UNSEEN_PATHS = "#unseen_paths"
"""The derived field that counts the attribute paths of an event that training did not have."""
