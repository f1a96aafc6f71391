"""Days of a drawn organisation: training without incidents, then test days with several, and their labels.

Promises: the same arguments give the same bytes in every process; events stand in the order of their delivery, so some
are late; no event is lost. It is for measuring and tests. It does not claim that real organisations behave so.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamer.devtools.organisations.activities import Activities
from streamer.devtools.organisations.dice import Dice
from streamer.devtools.organisations.draw import draw_organisation
from streamer.devtools.organisations.incidents import KINDS, Scene
from streamer.devtools.organisations.journal import Entry, Journal, Outage
from streamer.devtools.organisations.machines import Machines
from streamer.devtools.organisations.organisation import Organisation
from streamer.devtools.organisations.people import People
from streamer.devtools.simulator.generator import Day, Label, write
from streamer.devtools.simulator.workday import HEAD
from streamer.errors import ConfigurationError

TRAIN_DAYS = 7
TEST_DAYS = 5
EVENTS_PER_DAY = 10_000


@dataclass(frozen=True)
class Simulated:
    """What became of an organisation. train, test: its days, with `times` in ms at which events were delivered;
    entities: by the id of each incident, the account, host or address that it is about."""

    organisation: Organisation
    train: list[Day]
    test: list[Day]
    entities: dict[str, str]


def simulate(
    seed: int, *, train_days: int = TRAIN_DAYS, test_days: int = TEST_DAYS, events_per_day: int = EVENTS_PER_DAY,
    incidents: Sequence[str] | None = None,
) -> Simulated:  # fmt: skip
    """An organisation that makes about `events_per_day` events on a working day, from a Monday on.

    incidents: their kinds, spread over the test days (default: five to nine on each, all kinds equally often). Raises
    `ConfigurationError` for an unknown kind, for less than a day of either part and for less than 1,000 events a day.
    """
    if train_days < 1 or test_days < 1 or events_per_day < 1_000:
        raise ConfigurationError(
            f"{train_days} training days, {test_days} test days and {events_per_day} events a day cannot be simulated: "
            "there must be a day of each and 1,000 events a day"
        )
    if unknown := sorted(set(incidents or ()) - set(KINDS)):
        raise ConfigurationError(f"incident {unknown[0]!r} is not known; there are {', '.join(KINDS)}")
    organisation = draw_organisation(seed, train_days=train_days, test_days=test_days, events_per_day=events_per_day)
    journal = Journal(_outages(organisation))
    activities = Activities(organisation)
    people, machines = People(organisation, activities, journal), Machines(organisation, activities, journal)
    planned = _plan(organisation, incidents)
    entities: dict[str, str] = {}
    for day in range(organisation.days):
        runs, taken = machines.plan(day), set[str]()
        for n, kind in enumerate(planned.get(day, ())):
            mark = f"{kind}-{day}-{n}"
            dice = Dice("organisation", seed, "incident", mark)
            journal.mark = mark
            scene = Scene(organisation, activities, people, machines, day, runs, taken, dice, mark)
            entities[mark] = KINDS[kind](scene)
        journal.mark = ""
        people.welcome(day)
        people.day(day)
        machines.day(day)
        for run in runs:
            machines.carry_out(run)
    days = list(_days(organisation, journal.entries))
    return Simulated(organisation, days[:train_days], days[train_days:], entities)


def write_stream(simulated: Simulated, folder: Path, name: str) -> int:
    """Write NAME.train.ndjson.gz, NAME.test.ndjson.gz and NAME.labels.csv, as `ripcurrent evaluate` and
    `tests/evaluate.py` read them; returns how many events."""
    folder.mkdir(parents=True, exist_ok=True)
    written = write(simulated.train, folder / f"{name}.train.ndjson.gz")
    written += write(simulated.test, folder / f"{name}.test.ndjson.gz")
    with (folder / f"{name}.labels.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*Label._fields, "entity"])
        for day in simulated.test:
            rows.writerows([*label, simulated.entities.get(label.sequence, "")] for label in day.labels)
    return written


def _outages(organisation: Organisation) -> list[Outage]:
    begin, end = organisation.calendar["outage"], organisation.calendar["outage ends"]
    return [Outage(product, at, until) for (at, product), (until, _) in zip(begin, end, strict=True)]


def _plan(organisation: Organisation, incidents: Sequence[str] | None) -> dict[int, list[str]]:
    """The kinds of each test day. Every kind comes before one comes again."""
    dice = Dice("organisation", organisation.seed, "plan")
    test = range(organisation.train_days, organisation.days)
    if incidents is not None:
        chosen: dict[int, list[str]] = {}
        for n, kind in enumerate(incidents):
            chosen.setdefault(test[n % len(test)], []).append(kind)
        return chosen
    deck: list[str] = []
    planned = {}
    for day in test:
        count = dice.whole(5, 9)
        while len(deck) < count:
            deck += dice.shuffled(list(KINDS))
        planned[day], deck = deck[:count], deck[count:]
    return planned


def _days(organisation: Organisation, entries: list[Entry]) -> Iterator[Day]:
    """The entries by the day of their delivery; what comes before the first midnight or after the last belongs to the
    first and the last day."""
    entries.sort(key=lambda entry: entry.arrives)
    row = 0
    for day in range(organisation.days):
        last = day == organisation.days - 1
        end, begun = organisation.midnight(day + 1), row
        times: list[int] = []
        events: list[bytes] = []
        labels: list[Label] = []
        while row < len(entries) and (last or entries[row].arrives < end):
            entry = entries[row]
            uid = f"{((day << 40 | row - begun) * 0x9E3779B97F4A7C15 + organisation.seed) % 2**64:016x}"
            times.append(int(entry.arrives))
            events.append(b"".join((HEAD, uid.encode(), entry.body[len(HEAD) :])))
            kind = entry.mark.split("-", 1)[0]
            labels.append(Label(uid, int(bool(kind)), kind, entry.mark))
            row += 1
        yield Day(day, organisation.midnight(day), times, events, labels)
