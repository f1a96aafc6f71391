"""The promises of the feature schema: every path is a field or set aside with a reason, the cut into batches and the
order of paths do not matter, memory is bounded, and the file can be read, edited and trusted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from bytes_held import bytes_held
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_decoder import events as any_event

from encoder.features import learner as learner_module
from encoder.features.learner import MAX_VOCABULARY, MORE_PATHS, SchemaLearner, _DistinctCount, _order_statistics
from encoder.features.normalization import AGE, FOLDER, NETWORK, WORD
from encoder.features.schema import UNSEEN_PATHS, Field, Schema
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import EncoderError, EventBatch, Message
from streamer.cli.schema_table import schema_table

EVENT: dict[str, Any] = {"class_uid": 1007, "activity_id": 1, "type_uid": 100701, "time": 1_750_000_000_000}


def decoded(events: Sequence[dict[str, Any]]) -> EventBatch:
    lines = [json.dumps({**EVENT, **event}).encode() for event in events]
    return decode([Message("t", 0, i, -1, line) for i, line in enumerate(lines)])[0]


def learn(events: Sequence[dict[str, Any]], batch: int = 10_000) -> Schema:
    learner = SchemaLearner()
    for start in range(0, len(events), batch):
        learner.add(decoded(events[start : start + batch]))
    return learner.finish()


def feed() -> list[dict[str, Any]]:
    """200 events with an attribute of every kind."""
    return [
        {
            "activity_id": i % 3,
            "process": {
                "name": f"app{chr(97 + i % 5)}.exe",
                "pid": i,
                "file": {"path": f"C:\\Windows\\{'x' * (i % 4)}\\app.exe"},
                "cmd_line": "run " + "".join(chr(97 + (i * k) % 26) for k in range(1, 9)),
            },
            "actor": {"user": {"name": f"user{chr(97 + i % 7)}"}, "process": {"name": "explorer.exe"}},
            "unmapped": {"bytes_in": (i * 7919) % 1000, "ratio": i / 7, "flag": i % 2 == 0, "port": 50_000 + i},
            "device": {"ip": f"10.0.0.{i}"},
            "rare": i if i < 2 else None,
        }
        for i in range(200)
    ]


def by_name(schema: Schema) -> dict[str, Field]:
    return {field.name: field for field in schema.fields}


def test_every_path_is_a_field_or_set_aside_with_a_reason() -> None:
    schema = learn(feed())
    assert set(decoded(feed()).columns) <= schema.known_paths
    assert all(schema.set_aside.values())
    assert not {field.name for field in schema.fields} & set(schema.set_aside)


def test_kinds_follow_what_ocsf_says_and_the_data_show() -> None:
    fields = by_name(learn(feed()))
    assert fields["unmapped.bytes_in"].kind == fields["unmapped.ratio"].kind == "number"
    assert fields["actor.user.name"].kind == fields["device.ip"].kind == "identity"
    assert fields["process.name"].kind == fields["unmapped.flag"].kind == "category"
    assert fields["unmapped.port"].values == ("ephemeral",)  # an identifier though its values are integers
    folders = {"c:/windows/", "c:/windows/x", "c:/windows/xx", "c:/windows/xxx"}
    assert {f.rstrip("/") for f in fields["process.file.path" + FOLDER].values} == {f.rstrip("/") for f in folders}
    assert fields["process.file.path"].group == fields["process.name"].group == "process"


def test_text_gives_words_and_an_address_its_network() -> None:
    fields = by_name(learn(feed()))
    assert fields["process.cmd_line" + WORD].values[0] == "run"
    assert "process.cmd_line" + FOLDER not in fields
    network = fields["device.ip" + NETWORK]
    assert (network.kind, network.values) == ("identity", ("10.0.0.0/16",))


def test_text_that_is_new_each_time_keeps_its_words() -> None:
    lines = [
        f"copy {'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}{'uvwxyz'[i // 100 % 6]} home" for i in range(600)
    ]
    fields = by_name(learn([{"process": {"cmd_line": line}} for line in lines]))
    assert fields["process.cmd_line"].kind == "presence"
    assert fields["process.cmd_line" + WORD].values == ("copy", "home")


def test_a_timestamp_is_how_long_ago_it_was() -> None:
    events = [
        {"time": EVENT["time"] + 1000 * i, "file": {"created_time": EVENT["time"] - 60_000 * i}} for i in range(99)
    ]
    schema = learn(events)
    age = by_name(schema)["file.created_time" + AGE]
    assert age.kind == "number" and age.grid[0] == 0.0 and age.grid[-1] == pytest.approx(np.log1p(98 * 61))
    assert "file.created_time" not in schema.set_aside and schema.set_aside["time"].startswith("timestamp")
    constant = learn([{"file": {"created_time": EVENT["time"]}}] * 99)
    assert constant.set_aside["file.created_time"].startswith("timestamp")


def test_what_is_set_aside() -> None:
    schema = learn([{**event, "#odd": 1, "a#folder": 2, "b#age": 3} for event in feed()])
    assert schema.set_aside["process.pid"] == "identifies the record, not its behaviour"
    assert schema.set_aside["time"] == "timestamp: never used raw"
    assert schema.set_aside["rare"] == "seen fewer than 5 times"
    assert schema.set_aside["class_uid"] == "said by type_uid"
    assert (
        schema.set_aside["#odd"]
        == schema.set_aside["a#folder"]
        == schema.set_aside["b#age"]
        == "named as derived fields are"
    )


def test_a_caption_of_an_id_is_a_duplicate() -> None:
    schema = learn([{"severity_id": i % 2, "severity": "low" if i % 2 else "high"} for i in range(100)])
    told = {"severity_id", "severity"}
    assert len(told & set(by_name(schema))) >= 1


def test_the_first_field_is_the_type_and_the_last_the_unseen_paths() -> None:
    names = [field.name for field in learn(feed()).fields]
    assert (names[0], names[-1]) == ("type_uid", UNSEEN_PATHS)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("batch", [1, 7, 64, 199])
def test_several_batches_teach_what_one_does(batch: int) -> None:
    assert learn(feed(), batch).to_json() == learn(feed()).to_json()


@given(st.lists(any_event, min_size=1, max_size=12), st.integers(1, 12))
def test_any_events_can_be_learned_in_any_batches(given: list[dict[str, Any]], batch: int) -> None:
    given = given * 5
    assert learn(given, batch) == learn(given)


@given(st.lists(any_event, min_size=1, max_size=8))
def test_a_schema_written_and_read_is_the_same_schema(given: list[dict[str, Any]]) -> None:
    schema = learn(given * 5)
    again = Schema.from_json(schema.to_json())
    assert again == schema and again.hash == schema.hash


def test_the_hash_is_the_same_in_another_process() -> None:
    program = "from test_schema import feed, learn; print(learn(feed()).hash)"
    for seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == learn(feed()).hash


def test_no_events_is_an_error_in_words() -> None:
    with pytest.raises(EncoderError, match="no events"):
        SchemaLearner().finish()


def edited(**changes: Any) -> bytes:
    return orjson.dumps(orjson.loads(learn(feed()).to_json()) | changes)


FIELDS = orjson.loads(learn(feed()).to_json())["fields"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"garbage", "not a feature schema"),
        (b"[]", "not a feature schema"),
        (b"{}", "fields"),
        (edited(fields=FIELDS[1:]), "type_uid"),
        (edited(fields=[*FIELDS, FIELDS[1]]), "one name"),
        (edited(actors=["nobody"]), "nobody"),
        (edited(fields=[FIELDS[0], FIELDS[1] | {"kind": "colour"}, FIELDS[-1]], actors=[]), "colour"),
        (edited(fields=[FIELDS[0], FIELDS[1] | {"edges": [2, 1]}, FIELDS[-1]], actors=[]), "ascend"),
        (edited(fields=[FIELDS[0], FIELDS[1] | {"grid": [None]}, FIELDS[-1]], actors=[]), "not a feature schema"),
        (edited(fields=[FIELDS[0] | {"values": ["logon"]}, FIELDS[-1]], actors=[]), "numbers"),
    ],
)
def test_a_schema_that_an_edit_broke_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        Schema.from_json(data, "schema.json")


def test_a_field_can_be_taken_out_by_hand() -> None:
    schema = Schema.from_json(edited(fields=[FIELDS[0], FIELDS[-1]], actors=[]))
    assert len(schema.fields) == 2


# Many values


def test_many_values_are_bounded_and_what_was_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "MAX_TRACKED", 2_000)
    n = 15_000  # 10,000 names that come once, and 10 that make up the rest
    events = [
        {"user": {"name": f"user-{_letters(i)}" if i % 3 else f"often{chr(97 + i % 10)}"}, "unmapped": {"x": i * 7.0}}
        for i in range(n)
    ]
    learner, held = SchemaLearner(), []
    for start in range(0, n, 1_000):
        learner.add(decoded(events[start : start + 1_000]))
        held.append(bytes_held(learner))
    assert max(held) < 1.5 * max(held[: len(held) // 3])
    fields = by_name(learner.finish())
    assert fields["user.name"].kind == "presence"
    assert fields["user.name"].left_out == pytest.approx(10_010, rel=0.1)
    found = np.expm1(np.quantile(fields["unmapped.x"].grid, [0.1, 0.5, 0.9])) / (7 * n)
    assert len(fields["unmapped.x"].grid) <= 1024 and found == pytest.approx([0.1, 0.5, 0.9], abs=0.02)


def test_common_values_outlive_the_many_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "MAX_TRACKED", 4_500)
    often = [f"often-{_letters(i)}" for i in range(50)]
    events = [{"user": {"name": f"u-{_letters(i)}" if i % 3 == 0 else often[i % 50]}} for i in range(30_000)]
    field = by_name(learn(events, 1_000))["user.name"]
    assert field.kind == "identity" and len(field.values) == MAX_VOCABULARY
    assert set(field.values[:50]) == set(often)
    assert field.left_out + len(field.values) == pytest.approx(10_050, rel=0.1)


def test_all_paths_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "MAX_TRACKED_IN_ALL", 5_000)
    learner, held = SchemaLearner(), []
    for start in range(0, 1_000, 100):
        rows = range(start, start + 100)
        learner.add(decoded([{"unmapped": {f"k{k}": _letters(i * 41 + k) for k in range(40)}} for i in rows]))
        held.append(bytes_held(learner))
    assert max(held) < 1.5 * max(held[:4])


def test_paths_beyond_the_bound_are_said_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "MAX_PATHS", 50)
    schema = learn([{"unmapped": {f"k{i}": i}} for i in range(100)])
    assert "first 50" in schema.set_aside[MORE_PATHS]
    assert len(schema.known_paths) <= 60


@pytest.mark.parametrize("n", [0, 1, 1_000, 1_100, 20_000])
def test_distinct_values_are_counted_to_a_tenth(n: int) -> None:
    count = _DistinctCount()
    for start in range(0, n, 4_000):
        count.add(str(i) for i in range(start, min(start + 4_000, n)))
        count.add(str(i) for i in range(start, min(start + 100, n)))
    assert count.estimate == pytest.approx(n, rel=0.12)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=60))
def test_counted_values_have_the_quantiles_of_the_values(given: list[int]) -> None:
    values, counts = np.unique(np.array(given, np.float64), return_counts=True)
    q = np.linspace(0, 1, 11)
    assert _order_statistics(values, counts, q * (len(given) - 1)) == pytest.approx(np.quantile(given, q))


def _letters(i: int) -> str:
    """i in letters, which are not templated away as digits are."""
    return "".join(chr(97 + int(digit)) for digit in str(i))


# Values


def test_a_column_of_immense_numbers_is_no_number() -> None:
    fields = by_name(learn([{"unmapped": {"x": 1e301 + i * 1e299}} for i in range(100)]))
    assert fields["unmapped.x"].kind != "number"


# The table


def test_the_table_names_every_field_and_why_a_path_is_set_aside() -> None:
    schema = learn(feed())
    odd = replace(schema.fields[1], name="[x]", kind="category", values=("a",), left_out=7)
    schema = replace(schema, fields=(*schema.fields[:-1], odd, schema.fields[-1]))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(schema_table(schema))
    text = console.export_text()
    for field in schema.fields:
        assert field.name in text
    for path, reason in schema.set_aside.items():
        assert path in text and reason in text
    assert "the 7 rarest count as unknown" in text and schema.hash[:12] in text
    assert "a; never another in training" in text
