"""The promises of the vectorizer: any event has features, which are codes in range and finite fractions, the same in
every process, batch and state of the caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bytes_held import bytes_held
from hypothesis import given
from hypothesis import strategies as st
from test_decoder import events as any_event
from test_schema import decoded, feed, learn

from encoder.features import vectorizer as vectorize_module
from encoder.features.normalization import AGE, FOLDER, NETWORK, WORD
from encoder.features.schema import FIRST, MISSING, UNKNOWN, UNSEEN_PATHS, Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer, fitted_to, row_hash
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message

DATA = os.environ.get("RIPCURRENT_EVAL_DATA")
SCHEMA = learn(feed())
VECTORIZER = Vectorizer(SCHEMA)


def features(events: Sequence[dict[str, Any]], vectorizer: Vectorizer | None = None) -> FeatureBatch:
    return (vectorizer or Vectorizer(SCHEMA))(decoded(events))


def code(name: str, event: dict[str, Any], schema: Schema = SCHEMA) -> int:
    position = [field.name for field in schema.fields].index(name)
    return int(features([event], Vectorizer(schema)).codes[0, position])


def value(name: str, event: dict[str, Any], schema: Schema = SCHEMA) -> str:
    """The value of the vocabulary that an event's code stands for."""
    field = next(field for field in schema.fields if field.name == name)
    return field.values[code(name, event, schema) - FIRST]


def same(a: FeatureBatch, b: FeatureBatch) -> bool:
    discrete = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("codes", "quantiles", "actor"))
    return discrete and np.array_equal(a.numbers, b.numbers, equal_nan=True)


def check(batch: FeatureBatch, schema: Schema, n: int) -> None:
    assert batch.codes.shape == (n, len(schema.fields)) and batch.codes.dtype == np.int32
    assert batch.quantiles.dtype == np.float32 and batch.actor.dtype == np.int64
    assert batch.numbers.dtype == np.float32 and batch.numbers.shape == batch.quantiles.shape
    assert not np.any(np.isinf(batch.numbers)) and np.all(np.isnan(batch.numbers) <= (batch.quantiles == 0.5))
    assert np.all(np.isfinite(batch.quantiles)) and np.all((batch.quantiles >= 0) & (batch.quantiles <= 1))
    assert np.all(batch.codes >= 0) and np.all(batch.codes < [field.size for field in schema.fields])
    assert np.all(batch.codes[:, 0] != MISSING) and np.all(batch.codes[:, -1] >= FIRST)


@given(st.lists(any_event, max_size=8))
def test_any_event_has_features_by_any_schema(given: list[dict[str, Any]]) -> None:
    check(features(given, VECTORIZER), SCHEMA, len(given))
    if given:
        schema = learn(given * 5)
        check(features(given, Vectorizer(schema)), schema, len(given))


@given(st.lists(any_event | st.sampled_from(feed()), min_size=1, max_size=10), st.integers(0, 10))
def test_features_do_not_depend_on_the_batch_or_on_what_came_before(given: list[dict[str, Any]], cut: int) -> None:
    fresh = features(given)
    assert same(fresh, features(given, VECTORIZER))
    assert same(fresh, FeatureBatch.concatenate([features(given[:cut]), features(given[cut:])]))
    assert same(fresh, FeatureBatch.concatenate([features([event], VECTORIZER) for event in given]))


def test_features_do_not_depend_on_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [*feed(), {"process": {"name": "x" * 5_000}}, {"process": {"name": ["y" * 5_000, 1]}}]
    fresh = features(events)
    monkeypatch.setattr(vectorize_module, "CACHE_BYTES", 1000)
    small = Vectorizer(SCHEMA)
    for batch in (1, 17, 202):
        parts = [features(events[start : start + batch], small) for start in range(0, len(events), batch)]
        assert same(FeatureBatch.concatenate(parts), fresh)


def test_long_values_are_not_remembered() -> None:
    vectorizer = Vectorizer(SCHEMA)
    before = bytes_held(vectorizer)
    features([{"process": {"name": f"{i}{'x' * (i % 2 * 5_000)}"}} for i in range(50)], vectorizer)
    assert bytes_held(vectorizer) - before < 50 * 1024


def test_features_are_the_same_in_every_process() -> None:
    program = (
        "from test_vectorizer import features, feed; import hashlib; f = features(feed());"
        "arrays = f.codes, f.quantiles, f.actor, f.numbers;"
        "print(hashlib.sha256(b''.join(x.tobytes() for x in arrays)).hexdigest(), f.distinct()[1].sum())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outputs) == 1


def test_a_schema_from_its_file_gives_the_same_features() -> None:
    again = Vectorizer(Schema.from_json(SCHEMA.to_json()))
    assert same(features(feed(), again), features(feed()))


# Codes


def test_missing_null_unknown_and_known_are_told_apart() -> None:
    assert code("process.name", {}) == code("process.name", {"process": {"name": None}}) == MISSING
    assert code("process.name", {"process": {"name": "never seen"}}) == UNKNOWN
    assert value("process.name", {"process": {"name": "APPA.exe"}}) == "appa.exe"


def test_a_value_of_another_type_is_another_value() -> None:
    assert value("unmapped.flag", {"unmapped": {"flag": True}}) == "true"
    assert code("unmapped.flag", {"unmapped": {"flag": 1}}) == UNKNOWN
    assert code("unmapped.flag", {"unmapped": {"flag": "true"}}) != UNKNOWN  # some senders write it so
    together = features([{"unmapped": {"flag": flag}} for flag in (True, 1, 1.0, "true")])
    position = [field.name for field in SCHEMA.fields].index("unmapped.flag")
    assert (together.codes[:, position] == UNKNOWN).tolist() == [False, True, True, False]


def test_a_new_name_in_a_known_folder() -> None:
    event = {"process": {"file": {"path": "c:\\windows\\x\\evil.exe"}}}
    assert code("process.file.path", event) == UNKNOWN
    assert value("process.file.path" + FOLDER, event) == "c:/windows/x"


def test_text_counts_as_its_rarest_word() -> None:
    lines = [*["copy a to b"] * 9, *["copy c to b"] * 5, *["move c to b"] * 2, "wipe c"]
    schema = learn([{"process": {"cmd_line": line}} for line in lines])
    word = "process.cmd_line" + WORD

    def rarest(line: str) -> str:
        return value(word, {"process": {"cmd_line": line}}, schema)

    assert [rarest(line) for line in ("copy b", "b to c", "to move copy")] == ["copy", "c", "move"]
    assert code(word, {"process": {"cmd_line": "move x"}}, schema) == UNKNOWN
    assert code(word, {"process": {"cmd_line": "wipe c"}}, schema) == UNKNOWN  # seen but once: as rare as any new one


def test_a_new_address_in_a_known_network() -> None:
    event = {"device": {"ip": "10.0.99.99"}}
    assert code("device.ip", event) == UNKNOWN
    assert value("device.ip" + NETWORK, event) == "10.0.0.0/16"
    assert code("device.ip" + NETWORK, {"device": {"ip": "10.1.0.1"}}) == UNKNOWN


def test_ages_have_their_rank_among_those_of_training() -> None:
    events = [{"time": 1_750_000_000_000, "file": {"created_time": 1_750_000_000_000 - 1000 * i}} for i in range(101)]
    schema = learn(events)
    made = features(
        [{"file": {"created_time": t}} for t in (1_749_999_950_000, "2020-01-01T00:00:00Z", "?")], Vectorizer(schema)
    )
    place = [field.name for field in schema.fields if field.kind == "number"].index("file.created_time" + AGE)
    assert made.quantiles[:, place].tolist() == [0.5, 1.0, 0.5]
    assert made.numbers[0, place] == pytest.approx(np.log1p(50)) and np.isnan(made.numbers[2, place])
    position = [field.name for field in schema.fields].index("file.created_time" + AGE)
    assert made.codes[2, position] == UNKNOWN and made.codes[0, position] >= FIRST


def test_types_never_seen_are_unknown() -> None:
    assert value("type_uid", {"activity_id": 2, "type_uid": 100702}) == "100702"
    for class_uid in (0, 1, 99_999_999):
        assert code("type_uid", {"class_uid": class_uid, "type_uid": None}) == UNKNOWN


def test_zero_and_other_are_values_like_any() -> None:
    schema = learn([{"severity_id": i % 3 * 33 + i % 3 // 2 * 33} for i in range(30)])
    assert {value("severity_id", {"severity_id": i}, schema) for i in (0, 33, 99)} == {"0", "33", "99"}
    assert code("severity_id", {}, schema) == MISSING and code("severity_id", {"severity_id": 5}, schema) == UNKNOWN


@pytest.mark.parametrize(("paths", "steps"), [(0, "0"), (1, "1"), (3, "2-3"), (4, "4+"), (50, "4+")])
def test_paths_that_training_had_not_are_counted(paths: int, steps: str) -> None:
    assert value(UNSEEN_PATHS, {f"new{i}": i for i in range(paths)}) == steps


def test_numbers_have_their_rank_among_training_values() -> None:
    values = [-1e9, 0, 499, 999, 1e9, 10**30, True, "500", "text", [1]]
    found = features([{"unmapped": {"bytes_in": v}} for v in values])
    names = [field.name for field in SCHEMA.fields]
    place = [field.name for field in SCHEMA.fields if field.kind == "number"].index("unmapped.bytes_in")
    rank = found.quantiles[:, place].tolist()
    assert rank[0] == 0 and rank[4] == rank[5] == 1
    assert rank[1] < 0.01 and rank[2] == pytest.approx(0.5, abs=0.02) and rank[3] > 0.98
    assert rank[6] == rank[8] == rank[9] == 0.5 and rank[7] == pytest.approx(0.5, abs=0.02)
    number = found.numbers[:, place].tolist()
    assert number[0] == pytest.approx(-np.log1p(1e9)) and number[5] == pytest.approx(np.log(1e30))
    assert number[1] == 0 and number[2] == pytest.approx(np.log(500)) and number[7] == pytest.approx(np.log(501))
    assert np.isnan([number[i] for i in (6, 8, 9)]).all()
    codes = found.codes[:, names.index("unmapped.bytes_in")].tolist()
    assert codes[0] == FIRST and codes[4] == SCHEMA.fields[names.index("unmapped.bytes_in")].size - 1
    assert codes[6] == codes[8] == codes[9] == UNKNOWN


def test_who_acts_is_the_first_that_an_event_names() -> None:
    by_process, nobody, other = features(
        [{"actor": {"process": {"name": "explorer.exe"}}}, {}, {"actor": {"process": {"name": "new"}}}]
    ).actor.tolist()
    assert nobody == 0 and by_process not in (0, other)


def test_what_none_of_the_fitted_events_had_counts_as_unknown() -> None:
    """As the news of tomorrow will, also in who acts; words, of which a code tells but the rarest, stay."""

    def event(tool: str, text: str) -> dict[str, Any]:
        return {"actor": {"process": {"name": tool}}, "unmapped": {"tool": tool}, "message": f"ran {text} to its end"}

    events = [event(tool, text) for tool, text in zip("abacab" * 5, "xyxyxz" * 5, strict=True)]
    events += [event("new", "w")] * 5
    schema = learn(events)
    before = features(events, Vectorizer(schema))
    narrowed, after = fitted_to(schema, before, np.arange(30))
    assert same(after, features(events, Vectorizer(narrowed)))
    fields = {field.name: field for field in narrowed.fields}
    tool = fields["unmapped.tool"]
    assert set(tool.values) == {"a", "b", "c"} and tool.later == ("new",)
    assert tool.came_later("New") and not tool.came_later("a") and not tool.came_later("never")
    assert code("unmapped.tool", event("new", "x"), narrowed) == UNKNOWN
    assert code("unmapped.tool", event("b", "x"), narrowed) >= FIRST
    assert after.actor[30] == features([event("never", "x")], Vectorizer(narrowed)).actor[0]
    words = f"message{WORD}"
    assert fields[words] == next(field for field in schema.fields if field.name == words)
    assert Schema.from_json(narrowed.to_json()) == narrowed and narrowed.hash != schema.hash


def test_equal_rows_are_found_and_stand_for_each_other() -> None:
    events = [*feed()[:50], *feed()[:50], {}, {}]
    batch = features(events)
    first, like = batch.distinct()
    assert len(first) == 51 and same(batch.take(first[like]), batch)


def test_row_hashes_are_fixed_for_ever() -> None:
    """They are keys of what a bundle holds."""
    rows = np.array([[0, 1], [1, 0], [-1, 7]], np.int32)
    assert row_hash(rows).tolist() == [10779193844106824015, 15284367022781557966, 16370784898697504513]
    assert len(np.unique(row_hash(np.indices((100, 100)).reshape(2, -1).T.astype(np.int32)))) == 10_000


@pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")
def test_the_example_events_of_the_schema_project_have_features() -> None:
    lines = (Path(DATA or "") / "ocsf-examples.ndjson").read_bytes().splitlines()
    batch, _ = decode([Message("t", 0, i, -1, line) for i, line in enumerate(lines)])
    schema = learn([json.loads(line) for line in lines])
    check(Vectorizer(schema)(batch), schema, 93)
    check(VECTORIZER(batch), SCHEMA, 93)


def test_a_type_that_several_products_fill_is_a_type_for_each() -> None:
    def event(product: str, **more: Any) -> dict[str, Any]:
        return {"class_uid": 1008, "activity_id": 99, "time": 1, "metadata": {"product": {"name": product}}} | more

    events = [event(product, log_name=product) for product in ("Metrics", "Sensor 7") for _ in range(60)]
    events += [event("Rare", log_name="rare")] * 3 + [{"class_uid": 3002, "activity_id": 1, "time": 1}] * 5
    schema, batch = Schema.from_json(learn(events).to_json()), decoded(events)
    assert set(schema.fields[0].values) == {"100899", "100899@metrics", "100899@sensor 0", "300201"}
    types = [schema.fields[0].values[code - FIRST] for code in Vectorizer(schema)(batch).codes[:, 0].tolist()]
    assert types == ["100899@metrics"] * 60 + ["100899@sensor 0"] * 60 + ["100899"] * 3 + ["300201"] * 5
