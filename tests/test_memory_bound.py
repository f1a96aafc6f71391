"""What docs/performance.md promises of memory: nothing grows without a bound, whatever the stream holds."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import orjson

from encoder.features.schema import Field, Schema
from encoder.features.vectorizer import CACHE_BYTES, Vectorizer
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import entities
from encoder.ocsf.events import Message
from streamer.redaction import Redactor

PATHS = 200


def schema(paths: int) -> Schema:
    """With as many attributes, each a category of which training knew one value."""
    names = [f"unmapped.path_{i}" for i in range(paths)]
    own = [Field(name, name, "category", name, 10, ("known",)) for name in names]
    first = Field("type_uid", "type_uid", "category", "type_uid", 10, ("300201",))
    last = Field("unseen_paths", "unseen_paths", "category", "unseen_paths", 10, ("0",))
    return Schema((first, *own, last), {}, (), 10)


def event(i: int, size: int) -> dict[str, Any]:
    """Each attribute with a value that no other event has."""
    return {"unmapped": {f"path_{path}": f"{i}-{path}-{'x' * size}" for path in range(PATHS)}}


def test_values_that_never_come_again_in_200_paths_are_not_kept_without_a_bound() -> None:
    vectorizer = Vectorizer(schema(PATHS))
    tracemalloc.start()
    try:
        most = 0
        for batch in range(16):
            size = 900 if batch % 2 else 8
            messages = [Message("t", 0, i, 0, orjson.dumps(event(batch * 50 + i, size))) for i in range(50)]
            vectorizer(decode(messages)[0])
            del messages
            gc.collect()
            most = max(most, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert 0.5 * CACHE_BYTES < most < 1.1 * CACHE_BYTES, "what is remembered is as much as is counted"


def test_long_names_times_and_keys_are_not_kept() -> None:
    """Each of 400 events has a user, a time and a key of 100 kB that no other has: 120 MB in all."""
    tracemalloc.start()
    try:
        for i in range(400):
            text = f"{i}-" + "x" * 100_000
            value = {"class_uid": 3002, "time": text, "actor": {"user": {"name": text}}, "unmapped": {text: "secret"}}
            events, _ = decode([Message("t", 0, i, 0, orjson.dumps(value))])
            found = entities(events)
            Redactor().record(events.records[0])
            assert len(found.entity) == 1
        del events, found, value, text
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 10e6
    finally:
        tracemalloc.stop()
