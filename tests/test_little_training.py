"""What little training events can teach: a bundle that scores, or one line that says what is lacking."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from streamer.bundles.bundle_files import load
from streamer.detection.detector import compact
from streamer.detection.score_files import score_files
from streamer.training.fit import MIN_EVENTS, FitError, fit

START = 1_767_571_200_000
Event = dict[str, Any]


def event(i: int, **more: Any) -> Event:
    return {"class_uid": 3002, "activity_id": 1, "time": START + 1000 * i, "metadata": {"version": "1.5.0"}, **more}


def letters(generator: random.Random, n: int) -> str:
    return generator.choice("abcdefghijklmnopqrstuvwxyz"[:n])


def logons(n: int, **more: Any) -> list[Event]:
    """Events of a few users and hosts, who come again."""
    generator = random.Random(0)
    return [
        event(
            i,
            user={"name": letters(generator, 5)},
            device={"hostname": letters(generator, 3)},
            status_id=generator.choice([1, 1, 2]),
            message=f"said {letters(generator, 9)} to {letters(generator, 9)}",
            duration=generator.random(),
            **more,
        )
        for i in range(n)
    ]


def without_time(events: list[Event]) -> list[Event]:
    return [{key: value for key, value in each.items() if key != "time"} for each in events]


def without_entity(events: list[Event]) -> list[Event]:
    return [{key: value for key, value in each.items() if key not in ("user", "device")} for each in events]


def wide(n: int = 400, attributes: int = 800) -> list[Event]:
    generator = random.Random(0)
    kinds: list[Callable[[], Any]] = [lambda: generator.randrange(9), generator.random, lambda: letters(generator, 26)]
    return [
        event(i, user={"name": letters(generator, 20)}, unmapped={f"a{j}": kinds[j % 3]() for j in range(attributes)})
        for i in range(n)
    ]


def mixed(n: int = 900) -> list[Event]:
    """Many types of event, and attributes that are now a number, now a text, a list or an object."""
    generator = random.Random(0)
    values: list[Callable[[], Any]] = [
        lambda: generator.randrange(10**6), generator.random, lambda: None, lambda: True, lambda: [1, 2, "x"],
        lambda: {"a": {"b": letters(generator, 5)}}, lambda: [{"k": letters(generator, 4)}, {"k": "z"}], lambda: "",
        lambda: f"10.0.0.{generator.randrange(200)}", lambda: -1, lambda: 10.0 ** generator.randrange(300),
        lambda: f"text {letters(generator, 26)} of words",
    ]  # fmt: skip
    return [
        event(
            i,
            class_uid=generator.choice([1001, 1007, 3001, 3002, 4001, 4003, 6003, 99]),
            activity_id=generator.randrange(30),
            user={"name": generator.choice(["a", "b", 5, None, ["x"]])},
            **{f"x{j}": generator.choice(values)() for j in range(40) if generator.random() < 0.5},
        )
        for i in range(n)
    ]


def write(events: list[Event], path: Path) -> Path:
    path.write_bytes(b"".join(orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE) for each in events))
    return path


def assert_scores(events: list[Event], folder: Path) -> None:
    """A bundle fitted on the events can be loaded, and scores them and events like none of them."""
    known = write(events, folder / "known.ndjson")
    other = write([{"class_uid": 6003, "time": START, "actor": {"user": {"name": "nobody"}}}, {}], folder / "other")
    fit([known], folder / "bundle")
    scored = score_files([known, other], load(folder / "bundle"))
    assert len(scored) == len(events) + 2
    assert np.all((scored.p_value > 0) & (scored.p_value <= 1))


@pytest.mark.parametrize(
    "events",
    [
        logons(MIN_EVENTS),
        without_time(logons(100)),
        without_entity(logons(100)),
        [event(i, user={"name": letters(random.Random(i), 2)}) for i in range(MIN_EVENTS)],
        [event(0, message=f"said {letters(random.Random(i), 9)}", user={"name": "a"}) for i in range(50)],
        [event(i, user={"name": "ab"[i % 2]}, activity_id=1 if i < 90 else i) for i in range(100)],
    ],
    ids=["the least", "no time", "no entity", "two kinds", "one moment", "all that is held out is new"],
)
def test_few_events_are_enough_where_they_differ(events: list[Event], tmp_path: Path) -> None:
    assert_scores(events, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("events", [wide(), mixed()], ids=["800 attributes", "mixed types"])
def test_many_attributes_and_types_of_few_events(events: list[Event], tmp_path: Path) -> None:
    assert_scores(events, tmp_path)


@pytest.mark.parametrize(
    "events",
    [[event(0)] * 40, [event(i) for i in range(40)], [{}] * 300, [event(i, raw_data=f"{i}") for i in range(300)]],
    ids=["one event again and again", "one kind", "nothing", "nothing that is read"],
)
def test_events_that_are_all_alike_are_refused_in_one_line(events: list[Event], tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"do not differ in anything .* at least two kinds .* left out") as caught:
        fit([write(events, tmp_path / "events.ndjson")], tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*bundle*"))


def test_examples_are_the_same_alone_and_together(folder: Path) -> None:
    schema = load(folder / "bundle").encoder.schema
    lines = [*(folder / "test.ndjson").read_bytes().splitlines()[:300], b'{"events":[{"class_uid":1},{"class_uid":2}]}']
    assert compact(lines, schema) == [compact([line], schema)[0] for line in lines]
