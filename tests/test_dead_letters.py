"""What could not be read can be listed, looked at, and sent back: each letter once, as it came."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from loop_harness import EVENT, EachRow, HashDetector, Topics, create, running
from typer.testing import CliRunner, Result

from streamer.cli.main import app
from streamer.service.loop import Service

BROKEN = b'{"class_uid": 3002, "message": "cut o'


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    """Three letters of four messages: garbage with key and header, a member of a bundle, and a stub."""
    topics = create(kafka, unique("dlq"), partitions=1)
    topics.produce([BROKEN], 0, key=b"k", headers=[("h", b"v")], timestamp=1_700_000_000_123)
    topics.produce(
        [orjson.dumps(EVENT), orjson.dumps({"events": [7, EVENT]}), random.Random(1).randbytes(7_000_000)], 0
    )
    serve(topics, 4)
    return topics


def serve(topics: Topics, n: int) -> None:
    with running(Service(topics.settings(), HashDetector(), EachRow(), threshold=1.0)) as raised:
        topics.wait_until_read(n)
    assert raised == []


def dlq(topics: Topics, *arguments: str) -> Result:
    flags = [f"--kafka-bootstrap-servers={topics.bootstrap}", f"--dead-letters={topics.name}-dead"]
    flags.append(f"--kafka-group-id={topics.name}")
    if arguments[0] == "redrive":
        flags.append(f"--events={topics.events}")
    return CliRunner().invoke(app, ["dlq", *arguments, *flags], env={"COLUMNS": "200"})


def listed(topics: Topics, *arguments: str) -> list[dict[str, Any]]:
    done = dlq(topics, "list", "--json", *arguments)
    assert done.exit_code == 0, done.exception
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def test_list_and_show_say_what_is_there_and_why(topics: Topics) -> None:
    found = {letter["source"]: letter for letter in listed(topics)}
    assert set(found) == {f"{topics.events}:0:{offset}" for offset in (0, 2, 3)}
    first = found[f"{topics.events}:0:0"]
    assert (first["exception"], first["stage"], first["bytes"]) == ("JSONDecodeError", "decode", len(BROKEN))
    assert (first["time"], first["redriven"]) == ("2023-11-14T22:13:20.123+00:00", 0)
    assert [letter["stub"] for letter in found.values()] == [False, False, True]
    assert listed(topics, "--exception", "NotAnObject") == [found[f"{topics.events}:0:2"]]
    table = dlq(topics, "list").stdout
    assert "3 letters" in table
    assert "member 0: a JSON object was expected, not int" in table

    shown = orjson.loads(dlq(topics, "show", first["letter"]).stdout)
    assert (shown["key"], shown["value"], shown["headers"]["h"]) == ("k", BROKEN.decode(), "v")
    assert dlq(topics, "show", "--raw", first["letter"]).stdout_bytes == BROKEN
    for wrong, words in [("0:99", "99 was asked for"), ("first", "write PARTITION:OFFSET")]:
        failed = dlq(topics, "show", wrong)
        assert failed.exit_code == 1
        assert words in str(failed.exception)


def test_redrive_sends_each_letter_back_once_as_it_came_and_counts(topics: Topics) -> None:
    assert "3 letters: to send" in dlq(topics, "redrive", "--dry-run").stdout
    assert len(topics.read("events")) == 4
    done = dlq(topics, "redrive")
    assert f"2 sent to {topics.events}" in done.stdout
    assert "1 left: stubs of messages that were too large" in done.stderr
    assert "nothing to send" in dlq(topics, "redrive").stdout

    back = {message.value(): message for message in topics.read("events")[4:]}
    assert set(back) == {BROKEN, b"7"}
    message = back[BROKEN]
    assert (message.key(), message.timestamp()[1]) == (b"k", 1_700_000_000_123)
    assert message.headers() == [("h", b"v"), ("ripcurrent.redriven", b"1")]

    serve(topics, 6)  # Both fail again: new letters, which say that they were sent back before.
    again = [letter for letter in listed(topics) if letter["redriven"] == 1]
    assert len(again) == 2
    done = dlq(topics, "redrive", "--exception", "JSONDecodeError")
    assert f"1 sent to {topics.events}" in done.stdout
    assert "1 left: not JSONDecodeError" in done.stderr
    assert topics.read("events")[-1].headers() == [("h", b"v"), ("ripcurrent.redriven", b"2")]


@pytest.mark.extended
def test_redrive_of_named_letters_and_to_another_topic(topics: Topics) -> None:
    (letter,) = listed(topics, "--exception", "NotAnObject")
    for _ in range(2):
        done = dlq(topics, "redrive", letter["letter"], "--to", f"{topics.name}-scores")
        assert f"1 sent to {topics.name}-scores" in done.stdout
    assert [m.value() for m in topics.read("scores")].count(b"7") == 2
    assert f"2 sent to {topics.events}" in dlq(topics, "redrive").stdout
    failed = dlq(topics, "redrive", letter["letter"], "--to", "nowhere")
    assert "no such topic" in str(failed.exception)
