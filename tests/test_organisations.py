"""The drawn organisations keep their promises: valid OCSF, the same bytes everywhere, benign changes, incidents that no
single value gives away."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import ocsf_json_schema
import orjson
import pytest
from cpu_time import least_cpu_s
from evaluate import streams_of
from measure_organisations import Truth, found_at
from test_simulator import digest

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.devtools.organisations.activities import Activities
from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.draw import draw_organisation
from streamer.devtools.organisations.generator import Simulated, simulate, write_stream
from streamer.devtools.organisations.incidents import KINDS, Scene
from streamer.devtools.organisations.journal import Journal
from streamer.devtools.organisations.machines import Machines, Run
from streamer.devtools.organisations.organisation import Organisation
from streamer.devtools.organisations.people import People
from streamer.devtools.organisations.products import SOURCES
from streamer.devtools.simulator.generator import Day
from streamer.errors import ConfigurationError
from streamer.offline.evaluation import read_events, read_labels

SEEDS = (0, 1, 2, 3)


@cache
def made(seed: int) -> Simulated:
    """A small organisation with every kind of incident."""
    return simulate(seed, train_days=3, test_days=3, events_per_day=2_000, incidents=tuple(KINDS))


@cache
def records(seed: int, part: str) -> list[dict[str, Any]]:
    return [orjson.loads(event) for day in getattr(made(seed), part) for event in day.events]


def normal(seed: int, part: str = "test") -> list[dict[str, Any]]:
    labels = (label for day in getattr(made(seed), part) for label in day.labels)
    return [record for record, label in zip(records(seed, part), labels, strict=True) if not label.label]


def drawn(seed: int) -> Organisation:
    return draw_organisation(seed, train_days=7, test_days=5, events_per_day=10_000)


@cache
def embedded(version: str) -> Any:
    return ocsf_json_schema.OcsfJsonSchemaEmbedded(ocsf_json_schema.get_ocsf_schema(version=version))


@cache
def validator(version: str, class_uid: int, profiles: tuple[str, ...]) -> Any:
    classes = ocsf_json_schema.get_ocsf_schema(version=version)["classes"]
    (name,) = (name for name, one in classes.items() if one["uid"] == class_uid)
    document = embedded(version).get_class_schema(name, profiles=list(profiles))
    return jsonschema.Draft202012Validator(document)


@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.extended) for seed in (0, 1, 2))])
def test_events_are_valid_ocsf_of_the_version_that_their_product_has(seed: int) -> None:
    seen: Counter[int] = Counter()
    labels = [label for day in made(seed).test for label in day.labels]
    for event, label in zip(records(seed, "test"), labels, strict=True):
        class_uid, metadata = event["class_uid"], event["metadata"]
        seen[class_uid] += 1
        if seen[class_uid] > 40 and not (label.label and seen[class_uid] % 7 == 0):
            continue
        schema = validator(metadata["version"], class_uid, tuple(metadata.get("profiles", ())))
        errors = [error.message for error in schema.iter_errors(event)]
        assert not errors, (event, errors)
    watched = {class_uid for source in made(seed).organisation.products for class_uid in SOURCES[source]}
    assert set(seen) >= watched - {1006, 3006}  # jobs and groups are rare
    assert set(seen) <= watched


@pytest.mark.parametrize("seed", SEEDS)
def test_the_decoder_repairs_nothing(seed: int) -> None:
    messages = [Message("e", 0, i, -1, event) for i, event in enumerate(e for d in made(seed).test for e in d.events)]
    events, rejects = decode(messages)
    assert not rejects
    assert not events.repairs
    assert len(events) == len(messages)


def test_equal_arguments_give_equal_bytes_in_another_process() -> None:
    arguments = "3, train_days=1, test_days=1, events_per_day=1_000"
    program = (
        "from test_simulator import digest; from streamer.devtools.organisations.generator import simulate; "
        f"made = simulate({arguments}); print(digest(made.train + made.test))"
    )
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(tests.parent)}
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, cwd=tests, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    here = simulate(3, train_days=1, test_days=1, events_per_day=1_000)
    assert there.stdout.strip() == digest(here.train + here.test)
    other = simulate(4, train_days=1, test_days=1, events_per_day=1_000)
    assert digest(other.train + other.test) != digest(here.train + here.test)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_has_no_incidents_and_every_incident_of_the_test_days_has_events_and_an_entity(seed: int) -> None:
    simulated = made(seed)
    labels = [label for day in simulated.train + simulated.test for label in day.labels]
    assert [label.uid for label in labels] == [
        record["metadata"]["uid"] for part in ("train", "test") for record in records(seed, part)
    ]
    assert len({label.uid for label in labels}) == len(labels)
    assert not any(label.label for day in simulated.train for label in day.labels)
    marked = {label.sequence: label.attack for label in labels if label.label}
    assert sorted(marked.values()) == sorted(KINDS)
    assert set(marked) == set(simulated.entities)
    assert all(simulated.entities.values())
    assert all((label.attack, label.sequence) == ("", "") for label in labels if not label.label)
    assert sum(label.label for label in labels) < 0.2 * len(records(seed, "test"))


def test_an_ordinary_stream_has_several_incidents_on_each_test_day_and_about_the_events_asked_for() -> None:
    simulated = simulate(5, train_days=1, test_days=3, events_per_day=3_000)
    for day in simulated.test:
        assert 5 <= len({label.sequence for label in day.labels if label.label}) <= 10
        assert 0.6 < len(day) / 3_000 < 1.7


# Each organisation is another.


def test_each_organisation_has_schemes_hours_sizes_and_products_of_its_own() -> None:
    organisations = [drawn(seed) for seed in range(12)]
    for scheme in ("accounts", "desks", "servers", "bots", "pods", "files", "calls", "domain", "directory"):
        assert len({getattr(organisation.naming, scheme) for organisation in organisations}) >= 3, scheme
    for measure in (
        lambda o: len(o.people),
        lambda o: len(o.bots),
        lambda o: len(o.roles),
        lambda o: len(o.offices),
        lambda o: o.offices[0].place.zone,
        lambda o: round(o.roles[0].shift.begins, 1),
        lambda o: frozenset(o.products),
        lambda o: o.start,
    ):
        assert len({measure(organisation) for organisation in organisations}) >= 3
    assert {role.shift.turns for organisation in organisations for role in organisation.roles} == {1, 2, 3}
    assert {role.mobile > 0 for organisation in organisations for role in organisation.roles} == {True, False}
    words = [{person.account.full_name for person in organisation.people} for organisation in organisations]
    assert not set.intersection(*words[:2])


def test_products_fill_different_attributes_of_one_class() -> None:
    filled: dict[int, set[frozenset[str]]] = defaultdict(set)
    for seed in SEEDS:
        paths: dict[int, set[str]] = defaultdict(set)
        for record in normal(seed, "train"):
            paths[record["class_uid"]] |= {path for path, _ in flat(record)}
        for class_uid, found in paths.items():
            filled[class_uid].add(frozenset(found))
    for class_uid in (1001, 1007, 3002, 4001, 6003):
        assert len(filled[class_uid]) == len(SEEDS), class_uid


def test_tasks_and_routines_have_optional_repeated_and_branching_parts_of_different_lengths() -> None:
    lengths, forms = set(), Counter[str]()
    for seed in range(6):
        activities = Activities(drawn(seed))
        tasks = [routine.versions[0][1] for routine in activities.routines]
        tasks += [task for versions in activities.tasks.values() for task in versions[0][1]]
        lengths |= {len(task.parts) for task in tasks}
        for task in tasks:
            for part in task.parts:
                forms["optional"] += part.chance < 1
                forms["repeated"] += part.again > 0
                forms["branching"] += len(part.ways) > 1
                forms["required"] += part.required
    assert len(lengths) >= 8
    assert min(forms[form] for form in ("optional", "repeated", "branching", "required")) > 50


# What changes without being an incident.


@pytest.mark.parametrize("seed", SEEDS)
def test_the_test_days_hold_every_kind_of_change(seed: int) -> None:
    organisation = made(seed).organisation
    begins = organisation.midnight(organisation.train_days)
    for kind in ("deployment", "release", "outage", "network", "workstation", "colleague"):
        assert any(at >= begins for at, _ in organisation.calendar[kind]), kind


@pytest.mark.parametrize("seed", SEEDS)
def test_a_deployment_renames_containers(seed: int) -> None:
    organisation = made(seed).organisation
    contained = [service for service in organisation.services if service.contained]
    renamed = 0
    for service in contained:
        for at in service.deployed:
            before = {host.name for host in organisation.instances(service, at - 1)}
            after = {host.name for host in organisation.instances(service, at + 1)}
            renamed += 1
            assert not before & after
            assert len(before) == len(after) == service.copies
    assert renamed


@pytest.mark.parametrize("seed", SEEDS)
def test_an_outage_delivers_old_events_late_and_all_at_once(seed: int) -> None:
    simulated = made(seed)
    begins, product = next(iter(simulated.organisation.calendar["outage"]))
    ends = simulated.organisation.calendar["outage ends"][0][0]
    late = [
        arrived
        for day in simulated.test
        for arrived, event in zip(day.times, map(orjson.loads, day.events), strict=True)
        if event["metadata"]["product"]["name"] == product and begins <= event["time"] < ends
    ]
    assert min(late) >= ends
    assert max(late) - ends < 0.1 * (ends - begins) + 1_000


@pytest.mark.parametrize("seed", SEEDS)
def test_new_colleagues_and_workstations_appear_as_normal_events(seed: int) -> None:
    organisation = made(seed).organisation
    known = b"".join(e for day in made(seed).train for e in day.events).lower()
    begins = organisation.midnight(organisation.train_days)
    new = [name for at, name in organisation.calendar["colleague"] if at >= begins]
    seen = orjson.dumps(normal(seed)).lower()
    assert any(name.lower().encode() in seen for name in new)
    hosts = [person.hosts[0][1].name for person in organisation.people if person.account.name in new]
    assert any(name.lower().encode() not in known for name in hosts)


def test_a_release_changes_tasks_and_the_versions_of_programs() -> None:
    for seed in SEEDS:
        organisation = drawn(seed)
        activities = Activities(organisation)
        release = organisation.calendar["release"][-1][0]
        day = (release - organisation.start) // 86_400_000
        assert day >= organisation.train_days
        assert organisation.weekday(day) in (1, 2, 3)
        assert any(len(versions) == 2 for versions in activities.tasks.values())
        changed = [routine for routine in activities.routines if routine.task(release - 1) != routine.task(release)]
        assert 1 <= len(changed) <= 2
        assert any(program.version(release - 1) != program.version(release) for program in organisation.programs)


# The incidents.


def spoiled(seed: int, kind: str) -> tuple[Run, list[Any]]:
    """A run that an incident changed, and its steps as they were planned."""
    organisation = drawn(seed)
    journal = Journal([])
    activities = Activities(organisation)
    people, machines = People(organisation, activities, journal), Machines(organisation, activities, journal)
    day = organisation.train_days
    runs = machines.plan(day)
    before = {id(run): list(run.steps) for run in runs}
    scene = Scene(organisation, activities, people, machines, day, runs, set(), Dice(seed, kind), "x")
    KINDS[kind](scene)
    (run,) = (run for run in runs if run.mark)
    return run, before[id(run)]


@pytest.mark.parametrize("seed", range(6))
def test_spoiled_runs_lack_required_steps_or_have_them_in_another_order(seed: int) -> None:
    run, planned = spoiled(seed, "half_routine")
    assert run.steps == planned[: len(run.steps)]
    assert {step.part for step in planned if step.required} - {step.part for step in run.steps}
    run, planned = spoiled(seed, "skipped_steps")
    assert {step.part for step in planned if step.required} - {step.part for step in run.steps}
    run, planned = spoiled(seed, "wrong_order")
    assert run.steps != planned
    assert Counter(run.steps) == Counter(planned)


def test_incidents_differ_in_length_pace_and_actor() -> None:
    lengths: dict[str, set[int]] = defaultdict(set)
    spans: dict[str, set[int]] = defaultdict(set)
    actors: dict[str, set[str]] = defaultdict(set)
    for seed in SEEDS:
        events: dict[str, list[int]] = defaultdict(list)
        for record, label in zip(records(seed, "test"), (x for d in made(seed).test for x in d.labels), strict=True):
            if label.label:
                events[label.attack].append(record["time"])
        for kind, times in events.items():
            lengths[kind].add(len(times))
            spans[kind].add((max(times) - min(times)) // 60_000)
        for mark, entity in made(seed).entities.items():
            actors[mark.split("-", 1)[0]].add(entity)
    for kind in KINDS:
        assert len(lengths[kind]) >= 2, kind
        assert len(actors[kind]) == len(SEEDS), kind
    assert sum(len(found) >= 3 for found in spans.values()) >= 12


QUANTITIES = {"size", "bytes", "bytes_in", "bytes_out", "packets", "packets_in", "packets_out", "duration", "length",
              "latency", "pid", "ttl", "number"}  # fmt: skip
OF_ONE_EVENT = {"time", "metadata.uid", "metadata.correlation_uid", "metadata.logged_time", "start_time", "end_time"}


def flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for item in value:
                yield from flat(item, f"{prefix}{key}[].") if isinstance(item, dict) else ((prefix + key, item),)
        else:
            yield prefix + key, value


@lru_cache(1 << 17)
def forms(text: str) -> tuple[str, str]:
    """A value without its digits, and its format: letters and digits as runs."""
    value = re.sub(r"\d+", "0", re.sub(r"[0-9a-f]{6,}", "h", text.lower()))
    return value, re.sub("[a-z]+", "a", value)


def tokens(record: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """What an event has by itself: attributes, their values, the formats of these; each by class."""
    class_uid = record["class_uid"]
    for path, value in flat(record):
        if path in OF_ONE_EVENT:
            continue
        yield class_uid, path, None
        if path.startswith("unmapped."):
            continue
        if isinstance(value, str):
            for form in forms(value):
                yield class_uid, path, form
        elif path.rsplit(".", 1)[-1] not in QUANTITIES and not (path.endswith(".port") and value >= 32_768):
            yield class_uid, path, value


@pytest.mark.extended
def test_no_attribute_value_or_format_gives_incidents_away_across_seeds() -> None:
    """What incidents of three organisations or more hold, normal events hold, too: in a quarter as many at least."""
    seeds = range(8)
    of_incidents: dict[Any, set[int]] = defaultdict(set)
    of_normal: dict[Any, set[int]] = defaultdict(set)
    for seed in seeds:
        simulated = simulate(seed, train_days=3, test_days=3, events_per_day=2_500, incidents=tuple(KINDS))
        for day in simulated.train + simulated.test:
            for event, label in zip(day.events, day.labels, strict=True):
                for token in tokens(orjson.loads(event)):
                    (of_incidents if label.label else of_normal)[token].add(seed)
    telling = [
        (token, len(held), len(of_normal[token]))
        for token, held in of_incidents.items()
        if len(held) >= 3 and 4 * len(of_normal[token]) < len(held)
    ]
    assert not telling
    # The same look does find what only incidents have, or it would say nothing.
    assert {(1007, "process.name"), (3002, "src_endpoint.ip")} <= {token[:2] for token in of_incidents}


# Files, speed, errors.


def test_files_are_read_by_the_evaluation(tmp_path: Path) -> None:
    written = write_stream(made(0), tmp_path, "organisation-0")
    (stream,) = streams_of(tmp_path)
    test = [uid for uid, _ in read_events([stream.test])]
    assert written == len(test) + len(list(read_events([stream.train])))
    labels = read_labels(stream.labels, test)
    assert labels.label.sum() == sum(label.label for day in made(0).test for label in day.labels)
    assert set(labels.sequence) - {""} == set(made(0).entities)
    with stream.labels.open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["entity"] == made(0).entities.get(row["sequence"], "")


def test_the_command_writes_a_stream_a_seed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamer.devtools.organisations", str(tmp_path), "--seeds", "0,1"]
    command += ["--train-days", "1", "--test-days", "1", "--events-per-day", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["organisation-0", "organisation-1"]
    assert [stream.name for stream in streams_of(tmp_path)] == ["organisation-0", "organisation-1"]


def test_a_hundred_thousand_events_take_less_than_a_minute() -> None:
    count = 0

    def run() -> list[Day]:
        nonlocal count
        simulated = simulate(7, train_days=1, test_days=1, events_per_day=4_000)
        count = sum(map(len, simulated.train + simulated.test))
        return simulated.train

    assert least_cpu_s(run, 1) / count * 100_000 < 60


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"train_days": 0}, "0 training days"),
        ({"test_days": 0}, "0 test days"),
        ({"events_per_day": 10}, "10 events"),
        ({"incidents": ("half_rutine",)}, "half_rutine"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        simulate(0, **arguments)


def test_an_incident_is_found_above_all_normal_events_but_so_many() -> None:
    label = np.array([0, 1, 0, 1, 1, 0], np.int8)
    incident = np.array(["", "a", "", "a", "b", ""])
    score = np.array([5.0, 4.0, 3.0, 1.0, 3.0, 2.0])
    truth = Truth(label, incident, {"a": "kind", "b": "kind"})
    assert [found_at(truth, score, false_alarms) for false_alarms in (0, 1, 2)] == [set(), {"a"}, {"a", "b"}]
