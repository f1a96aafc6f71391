"""Generates days of a simulated company as OCSF events, with labelled incidents on chosen days.

For the demo, tests and measurements. Promises: the same arguments give the same bytes in every process; every event is
valid OCSF 1.5 of one of seven classes; events are in time order; at most two days are in memory. It does not claim that
real companies behave so.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple, cast

from streamer.devtools.simulator.incidents import KINDS, Scene
from streamer.devtools.simulator.organisation import Organisation
from streamer.devtools.simulator.routines import plan_routines, visitors
from streamer.devtools.simulator.workday import DAY, HEAD, Journal, Today, people
from streamer.errors import ConfigurationError

MONDAY = 1_767_571_200_000
"""2026-01-05T00:00:00Z, the default begin of simulated time."""
EVENTS_PER_DAY = 18_000
"""The small company of the demo."""


class Label(NamedTuple):
    """The label of an event, a row of a `.labels.csv`: 1 with kind and id of the incident, or 0 with "" for both."""

    uid: str
    label: int
    attack: str
    sequence: str


@dataclass(frozen=True)
class Day:
    """The n events of a simulated day in time order.

    index: from 0; start: its midnight UTC in epoch ms; times: n epoch ms, ascending; events: n JSON objects; labels: n,
    in the same order. Events of a night shift after midnight belong to the next day.
    """

    index: int
    start: int
    times: list[int]
    events: list[bytes]
    labels: list[Label]

    def __len__(self) -> int:
        return len(self.events)


def simulate(
    *,
    seed: int = 0,
    days: int = 8,
    events_per_day: int = EVENTS_PER_DAY,
    start: int = MONDAY,
    incidents: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[Day]:
    """The days of a company that makes about `events_per_day` events on a working day (a weekend day
    a fifth of that; the smallest company makes 2,600).

    incidents: the kinds (see `KINDS`) on each day by its index, repeated for several of one kind; days that are not
    named are clean. Raises `ConfigurationError` for an unknown kind or day and for numbers that make no company.
    """
    planned = incidents or {}
    _check(days, events_per_day, planned)
    company = Organisation(seed=seed, events_per_day=events_per_day, days=days)
    carried = Journal()
    for index in range(days):
        midnight = start + index * DAY
        today = Today(company, index, midnight, datetime.fromtimestamp(midnight / 1000, UTC).weekday())
        _live(today, planned.get(index, ()))
        carried = _extend(carried, today.journal)
        day, carried = _cut(carried, today, seed, last=index == days - 1)
        yield day


def schedule(days: int, *, clean: int = 7, kinds: Sequence[str] = tuple(KINDS)) -> dict[int, tuple[str, ...]]:
    """A clean week to fit on, then every kind once on each working day from day `clean` on (day 0 is a Monday)."""
    return {day: tuple(kinds) for day in range(clean, days) if day % 7 < 5}


def write(days: Iterable[Day], events: Path, labels: Path | None = None) -> int:
    """Write days to an NDJSON file (.gz: compressed) and their labels to a CSV; returns how many events."""
    written = 0
    with ExitStack() as stack:
        # A file name or time in the gzip header would make files of equal days differ.
        raw = stack.enter_context(events.open("wb"))
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if events.suffix == ".gz" else None
        out = cast(IO[bytes], stack.enter_context(packed) if packed is not None else raw)
        rows = None
        if labels is not None:
            rows = csv.writer(stack.enter_context(labels.open("w", newline="")), lineterminator="\n")
            rows.writerow(Label._fields)
        for day in days:
            out.write(b"\n".join(day.events) + b"\n" * bool(day.events))
            if rows is not None:
                rows.writerows(day.labels)
            written += len(day)
    return written


def _check(days: int, events_per_day: int, incidents: Mapping[int, Sequence[str]]) -> None:
    if days < 1 or events_per_day < 1:
        raise ConfigurationError(f"{days} days of {events_per_day} events cannot be simulated: both must be at least 1")
    for day, kinds in incidents.items():
        if not 0 <= day < days:
            raise ConfigurationError(f"incidents on day {day}: the simulated days are 0 to {days - 1}")
        for kind in kinds:
            if kind not in KINDS:
                raise ConfigurationError(f"incident {kind!r} is not known; there are {', '.join(KINDS)}")


def _live(today: Today, kinds: Sequence[str]) -> None:
    """Fill the day's journal. Incidents come first because they may change how the day's routines run."""
    runs = plan_routines(today)
    for n, kind in enumerate(kinds):
        mark = f"{kind}-{today.index}-{n}"
        today.journal.mark = mark
        KINDS[kind].carry_out(Scene(today, runs, today.rng("incident", kind, n), mark))
    today.journal.mark = ""
    people(today)
    visitors(today)
    for run in runs:
        run.write_down(today.journal)


def _extend(carried: Journal, made: Journal) -> Journal:
    carried.times += made.times
    carried.bodies += made.bodies
    carried.marks += made.marks
    return carried


def _cut(journal: Journal, today: Today, seed: int, *, last: bool) -> tuple[Day, Journal]:
    """The events before midnight as a day in time order, and what is carried over (nothing on the last day)."""
    order = sorted(range(len(journal.times)), key=journal.times.__getitem__)
    end = today.start + DAY
    rest = Journal()
    times: list[int] = []
    events: list[bytes] = []
    labels: list[Label] = []
    for row in order:
        time, mark = journal.times[row], journal.marks[row]
        if time >= end and not last:
            rest.times.append(time)
            rest.bodies.append(journal.bodies[row])
            rest.marks.append(mark)
            continue
        uid = _uid(seed, today.index, len(events))
        times.append(time)
        events.append(b"".join((HEAD, uid.encode(), journal.bodies[row])))
        labels.append(Label(uid, 1, mark.split("-", 1)[0], mark) if mark else Label(uid, 0, "", ""))
    return Day(today.index, today.start, times, events, labels), rest


def _uid(seed: int, day: int, row: int) -> str:
    """Distinct for distinct (day, row) of one seed, as the multiplier is odd; says nothing to a person or a model."""
    return f"{((day << 40 | row) * 0x9E3779B97F4A7C15 + seed) % 2**64:016x}"
