"""The simulator keeps its promises: valid OCSF, the same bytes everywhere, incidents that are ordinary, and speed."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import ocsf_json_schema
import orjson
import pytest
from cpu_time import least_cpu_s
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.devtools.simulator.generator import DAY, MONDAY, Day, schedule, simulate, write
from streamer.devtools.simulator.incidents import KINDS, ORDINARY
from streamer.errors import ConfigurationError

HOUR = 3_600_000
SMALL = 3_000


@cache
def eight_days(seed: int = 0) -> tuple[Day, ...]:
    """The demo's week and the day after it, at half its size."""
    return tuple(simulate(seed=seed, events_per_day=9_000, incidents=schedule(8)))


@cache
def records(seed: int, day: int) -> list[dict[str, Any]]:
    return [orjson.loads(event) for event in eight_days(seed)[day].events]


def digest(days: Iterable[Day]) -> str:
    total = hashlib.sha256()
    for day in days:
        for event, label in zip(day.events, day.labels, strict=True):
            total.update(event + repr(label).encode())
    return total.hexdigest()


def test_every_event_is_valid_ocsf_of_one_of_seven_classes() -> None:
    schema = ocsf_json_schema.get_ocsf_schema(version="1.5.0")
    names, classes = ocsf_json_schema.OcsfJsonSchema(schema), ocsf_json_schema.OcsfJsonSchemaEmbedded(schema)
    validators: dict[tuple[int, tuple[str, ...]], Any] = {}
    seen: Counter[int] = Counter()
    for event, label in zip(records(0, 7), eight_days()[7].labels, strict=True):
        class_uid, profiles = event["class_uid"], tuple(event["metadata"].get("profiles", ()))
        seen[class_uid] += 1
        if seen[class_uid] > 150 and not label.label:
            continue
        if (class_uid, profiles) not in validators:
            name = names.lookup_class_name_from_uid(class_uid)
            document = classes.get_class_schema(name, profiles=list(profiles))
            validators[class_uid, profiles] = jsonschema.Draft202012Validator(document)
        errors = [error.message for error in validators[class_uid, profiles].iter_errors(event)]
        assert not errors, (event, errors)
    assert set(seen) == {1001, 1006, 1007, 3002, 4001, 4003, 6003}
    assert min(seen.values()) >= 10


def test_equal_arguments_give_equal_bytes_in_another_process() -> None:
    here = digest(simulate(seed=5, days=2, events_per_day=SMALL, incidents={1: tuple(KINDS)}))
    program = (
        "from test_simulator import *; "
        "print(digest(simulate(seed=5, days=2, events_per_day=SMALL, incidents={1: tuple(KINDS)})))"
    )
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(tests.parent)}
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tests,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert there.stdout.strip() == here
    assert digest(simulate(seed=6, days=2, events_per_day=SMALL, incidents={1: tuple(KINDS)})) != here


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    days=st.integers(1, 3),
    size=st.integers(1, 4_000),
    kinds=st.sets(st.sampled_from(list(KINDS))),
)
def test_whatever_the_arguments_events_are_in_order_with_a_uid_and_a_label_of_their_own(
    seed: int, days: int, size: int, kinds: set[str]
) -> None:
    planned = {days - 1: tuple(sorted(kinds))}
    made = list(simulate(seed=seed, days=days, events_per_day=size, incidents=planned))
    times = [t for day in made for t in day.times]
    assert times == sorted(times)
    uids = set()
    for day in made:
        for moment, event, label in zip(day.times, day.events, day.labels, strict=True):
            record = orjson.loads(event)
            assert (record["time"], record["metadata"]["uid"]) == (moment, label.uid)
            assert label.label == (label.attack != "") == (label.sequence != "")
        uids |= {label.uid for label in day.labels}
        assert all(day.start <= t for t in day.times)
    assert len(uids) == len(times)
    assert {label.attack for day in made for label in day.labels if label.label} == kinds


def test_incidents_happen_on_the_chosen_days_only_and_change_no_day_before() -> None:
    clean = list(simulate(days=3, events_per_day=SMALL))
    hit = list(simulate(days=3, events_per_day=SMALL, incidents={2: ("slow_scan", "slow_scan", "unseen_binary")}))
    assert digest(clean[:2]) == digest(hit[:2])
    assert not any(label.label for day in clean for label in day.labels)
    assert {label.sequence for label in hit[2].labels} == {"", "slow_scan-2-0", "slow_scan-2-1", "unseen_binary-2-2"}


def test_a_day_does_not_depend_on_how_many_follow() -> None:
    assert digest(list(simulate(days=6, events_per_day=SMALL))[:4]) == digest(
        list(simulate(days=9, events_per_day=SMALL))[:4]
    )


def test_the_company_keeps_hours_and_makes_the_number_of_events_asked_for() -> None:
    days = eight_days()
    for day in days:
        if day.index in (5, 6):
            assert 0.1 < len(day) / 9_000 < 0.5
        else:
            assert 0.8 < len(day) / 9_000 < 1.2
    hours = Counter((t - MONDAY) // HOUR for t in days[1].times)
    assert sum(hours[24 + h] for h in (9, 10, 13, 14)) > 5 * sum(hours[24 + h] for h in (1, 2, 3, 23))


def test_every_day_brings_what_is_new_and_what_goes_wrong_without_being_an_incident() -> None:
    known: dict[str, set[str]] = defaultdict(set)
    for index in range(7):
        fresh: Counter[str] = Counter()
        failures = 0
        for event in records(0, index):
            failures += event["class_uid"] == 3002 and event["status_id"] == 2
            for what, value in (
                ("query", event.get("query", {}).get("hostname")),
                ("file", event.get("file", {}).get("path")),
                ("binary", event.get("process", {}).get("file", {}).get("path")),
            ):
                if value and value not in known[what]:
                    known[what].add(value)
                    fresh[what] += 1
        assert failures >= 5
        if index < 5:
            assert fresh["query"] >= 10
            assert fresh["file"] >= 50
            assert fresh["binary"] >= 1
    users = [{e["user"]["name"] for e in records(0, d) if e["class_uid"] == 3002} for d in (0, 1, 2, 3, 4)]
    assert (users[3] | users[4]) - (users[0] | users[1] | users[2]), "nobody joined"


# Each ordinary incident is one: measured on the whole, it does what never happens otherwise.


def split(day: int, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The day's normal events, and those of one kind of incident."""
    labels = eight_days()[day].labels
    events = records(0, day)
    normal = [event for event, label in zip(events, labels, strict=True) if not label.label]
    return normal, [event for event, label in zip(events, labels, strict=True) if label.attack == kind]


def most(counted: Iterable[tuple[Any, Any]]) -> int:
    """The largest number of distinct second members for one first member."""
    distinct = defaultdict(set)
    for key, value in counted:
        distinct[key].add(value)
    return max(map(len, distinct.values()))


def test_the_spray_fails_for_more_people_in_an_hour_than_an_address_ever_does() -> None:
    def failed(events: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
        for e in events:
            if e["class_uid"] == 3002 and e["status_id"] == 2:
                yield (e["src_endpoint"]["ip"], e["time"] // HOUR), e["user"]["name"]

    normal, incident = split(7, "password_spray")
    assert most(failed(incident)) > 1.5 * most(failed(normal))
    assert [e["status_id"] for e in incident] == [2] * (len(incident) - 1) + [1]


def test_the_scan_asks_more_neighbours_in_vain_than_anybody_in_a_day() -> None:
    def asked(events: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
        for e in events:
            if e["class_uid"] == 4001 and e["status_id"] == 2 and e["dst_endpoint"]["port"] == 7680:
                yield e["src_endpoint"]["ip"], e["dst_endpoint"]["ip"]

    normal, incident = split(7, "slow_scan")
    assert most(asked(incident)) > 1.5 * most(asked(normal))


def test_the_drip_uploads_more_often_than_anybody_in_a_day() -> None:
    def uploads(events: list[dict[str, Any]]) -> Counter[str]:
        flows = [e for e in events if e["class_uid"] == 4001 and e["dst_endpoint"]["ip"] == "198.51.100.250"]
        return Counter(e["src_endpoint"]["ip"] for e in flows)

    normal, incident = split(7, "exfiltration_drip")
    assert max(uploads(incident).values()) > 1.5 * max(uploads(normal).values())


def test_nobody_else_is_in_two_countries_within_hours() -> None:
    def shortest(events: list[dict[str, Any]]) -> float:
        last: dict[str, tuple[int, str]] = {}
        least = math.inf
        for e in events:
            if e["class_uid"] == 3002 and e["metadata"]["product"]["vendor_name"] == "Keyring":
                name, country = e["user"]["name"], e["src_endpoint"]["location"]["country"]
                before = last.get(name)
                if before and before[1] != country:
                    least = min(least, (e["time"] - before[0]) / HOUR)
                last[name] = (e["time"], country)
        return least

    week = [event for day in range(7) for event in records(0, day)]
    assert 3 < shortest(week) < math.inf
    assert shortest(split(7, "impossible_travel")[1]) < 1


def test_only_the_intruder_makes_a_job_without_an_installer() -> None:
    def hasty(events: list[dict[str, Any]]) -> int:
        installed: dict[str, int] = {}
        count = 0
        for e in events:
            host = e.get("device", {}).get("hostname")
            if e["class_uid"] == 1007 and e["process"]["name"] == "msiexec.exe":
                installed[host] = e["time"]
            elif e["class_uid"] == 1006:
                count += e["time"] - installed.get(host, 0) > 300_000
        return count

    normal, incident = split(7, "persistence_after_logon")
    assert (hasty(normal), hasty(incident)) == (0, 1)


def steps(events: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What each run of the orders and billing routines did, repetitions folded."""
    runs: dict[str, list[str]] = defaultdict(list)
    for e in events:
        user = e.get("user") or e.get("actor", {}).get("user") or {}
        run = e["metadata"].get("correlation_uid")
        if run and (user.get("name", "").startswith(("svc-orders", "svc-billing")) or e["class_uid"] == 4001):
            name = e.get("process", {}).get("name") or e.get("api", {}).get("operation") or str(e["type_uid"])
            if runs[run][-1:] != [name]:
                runs[run].append(name)
    return {run: done for run, done in runs.items() if len(done) > 2}


def test_spoiled_runs_are_the_only_ones_that_differ() -> None:
    normal = {tuple(done) for day in range(7) for done in steps(records(0, day)).values() if len(done) in (7, 8)}
    assert len(normal) == 2, "orders and billing"
    for kind, change in (("skipped_step", -1), ("wrong_order", 0), ("silent_routine", None)):
        (done,) = steps(split(7, kind)[1]).values()
        assert tuple(done) not in normal
        like = [usual for usual in normal if set(done) <= set(usual)]
        assert len(like) == 1
        if change is None:
            assert tuple(done) == like[0][: len(done)]
        else:
            assert len(done) == len(like[0]) + change


# And each event of an ordinary incident is ordinary: counts of values do not find it, whoever they are conditioned on.

SKIP = {"time", "metadata.uid", "metadata.correlation_uid"}
IDENTIFIERS = ("uid", "pid", "port", "size", "bytes", "bytes_in", "bytes_out", "duration")


def flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif prefix + key not in SKIP and key not in IDENTIFIERS:
            text = re.sub(r"[0-9a-f]{8,}", "h", str(value).lower())
            yield prefix + key, re.sub(r"\d{3,}", "0", text)


def whom(record: dict[str, Any], kind: str) -> str:
    actor = record.get("actor", {})
    return {
        "nobody": "",
        "user": (record.get("user") or actor.get("user") or record.get("src_endpoint", {})).get("name", ""),
        "host": record.get("device", {}).get("hostname") or record.get("src_endpoint", {}).get("ip", ""),
        "process": actor.get("process", {}).get("name", ""),
    }[kind]


def rarity(seed: int, kind: str) -> np.ndarray[Any, Any]:
    """Day 7 under counts of the week before: mean of the three largest -log p(value | event type and user, host or
    process), plus how rare the event type is for it."""
    values: Counter[Any] = Counter()
    groups: Counter[Any] = Counter()
    types: Counter[int] = Counter()
    for day in range(7):
        for record in records(seed, day):
            key = (whom(record, kind), record["type_uid"])
            groups[key] += 1
            types[record["type_uid"]] += 1
            values.update((key, item) for item in flat(record))
    scores = []
    for record in records(seed, 7):
        key = (whom(record, kind), record["type_uid"])
        rare = sorted(-math.log((values[key, item] + 0.5) / (groups[key] + 5)) for item in flat(record))[-3:]
        scores.append(sum(rare) / 3 - math.log((groups[key] + 0.5) / (types[key[1]] + 5)))
    return np.array(scores)


@pytest.mark.parametrize("kind", ["nobody", "user", "host", "process"])
def test_ordinary_incidents_lie_within_the_bulk_of_normal(kind: str) -> None:
    seed = 0
    scores = rarity(seed, kind)
    attacks = np.array([label.attack for label in eight_days(seed)[7].labels])
    normal = np.sort(scores[attacks == ""])
    twenty = normal[-20]
    for attack in ORDINARY:
        place = np.searchsorted(normal, scores[attacks == attack]) / len(normal)
        assert np.median(place) < 0.97, f"half of the events of {attack} are in the rarest 3 %"
        assert scores[attacks == attack].max() < twenty, f"{attack} is among the twenty rarest"
    # The same counts do find what is odd in itself, or the above would say nothing.
    for attack in {"nobody": ("unseen_binary", "admin_from_new_place"), "process": ("rare_process_tree",)}.get(
        kind, ()
    ):
        assert scores[attacks == attack].max() >= twenty, attack


def test_an_event_is_simulated_in_the_time_that_it_is_decoded_in() -> None:
    def simulated() -> list[bytes]:
        return [event for day in simulate(days=3, incidents={2: tuple(KINDS)}) for event in day.events]

    messages = [Message("events", 0, i, -1, event) for i, event in enumerate(simulated())]
    ratio = least_cpu_s(simulated, 1) / least_cpu_s(lambda: decode(messages), 1)
    assert ratio < 1.5


def test_memory_does_not_grow_with_the_days() -> None:
    def peak(days: int) -> int:
        tracemalloc.start()
        for _ in simulate(days=days, events_per_day=500):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(1)
    assert peak(12) < 1.3 * peak(4)


@pytest.mark.parametrize("suffix", ["ndjson", "ndjson.gz"])
def test_files_hold_the_events_and_the_labels_in_the_form_of_the_recordings(tmp_path: Path, suffix: str) -> None:
    days = list(simulate(days=2, events_per_day=SMALL, incidents={1: ("skipped_step",)}))
    for name in ("a", "b"):
        written = write(days, tmp_path / f"{name}.{suffix}", tmp_path / f"{name}.labels.csv")
        assert written == sum(map(len, days))
    data = (tmp_path / f"a.{suffix}").read_bytes()
    assert data == (tmp_path / f"b.{suffix}").read_bytes()
    lines = (gzip.decompress(data) if suffix.endswith("gz") else data).splitlines()
    assert lines == [event for day in days for event in day.events]
    rows = list(csv.DictReader((tmp_path / "a.labels.csv").open()))
    assert list(rows[0]) == ["uid", "label", "attack", "sequence"]
    assert [row["uid"] for row in rows] == [orjson.loads(line)["metadata"]["uid"] for line in lines]
    assert {row["attack"] for row in rows if row["label"] == "1"} == {"skipped_step"}


def test_the_schedule_leaves_a_clean_week_and_weekends_alone() -> None:
    planned = schedule(16)
    assert sorted(planned) == [7, 8, 9, 10, 11, 14, 15]
    assert set(planned[7]) == set(KINDS)
    assert DAY == 24 * HOUR


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"days": 0}, "0 days"),
        ({"events_per_day": 0}, "0 events"),
        ({"incidents": {8: ("slow_scan",)}}, "day 8"),
        ({"incidents": {1: ("slow_skan",)}}, "slow_skan"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        next(simulate(**arguments))
