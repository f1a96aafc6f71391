"""What the faults of real feeds do to alerts, for docs/windows.md. Not a test, and no gate.

    python tests/measure_feeds.py EVENTS LABELS BUNDLE FOLDER [VARIANT...]

Makes from a file of events of about a day, in the order of their time, what a source would deliver of it on a bad day,
scores each with the bundle, and prints a row for each: alerts on normal events, incidents found, normal events whose
p-value changed tenfold, and the causes of these. LABELS is a CSV with the columns uid, label and sequence. Variants are
written to FOLDER, and scored anew by each call.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from streamer.alerting.file_thresholds import daily_threshold
from streamer.bundles.bundle_files import load
from streamer.detection.score_files import ScoredFile, score_files

HOUR_MS, MINUTE_MS = 3_600_000, 60_000
BUDGETS = (20, 100)
TENFOLD = 10.0


@dataclass(frozen=True)
class Events:
    """n lines with time, int64 [n], ms; device and product: str [n], "" for none."""

    lines: list[bytes]
    time: NDArray[np.int64]
    device: NDArray[np.str_]
    product: NDArray[np.str_]

    def within(self, start_h: float, end_h: float) -> NDArray[np.bool_]:
        """Which events happened in these hours since the first."""
        since = self.time - self.time[0]
        return (since >= start_h * HOUR_MS) & (since < end_h * HOUR_MS)


def read(path: Path) -> Events:
    lines = path.read_bytes().splitlines(keepends=True)
    records = [orjson.loads(line) for line in lines]
    device = [str((r.get("device") or r.get("src_endpoint") or {}).get("hostname", "")) for r in records]
    product = [str(r["metadata"].get("product", {}).get("name", "")) for r in records]
    return Events(lines, np.array([r["time"] for r in records], np.int64), np.array(device), np.array(product))


def undisturbed(events: Events) -> list[bytes]:
    return events.lines


def of_product(events: Events) -> NDArray[np.bool_]:
    """The sensor that the most devices have but for the busiest: endpoints, not flows."""
    names, counts = np.unique(events.product, return_counts=True)
    return np.asarray(events.product == names[np.argsort(-counts)[min(1, len(names) - 1)]])


def of_devices(events: Events, share: int = 3) -> NDArray[np.bool_]:
    """Every third device by name."""
    names = np.unique(events.device[events.device != ""])
    return np.isin(events.device, names[::share])


def missing(which: Callable[[Events], NDArray[np.bool_]]) -> Callable[[Events], list[bytes]]:
    """Nothing of these from the tenth hour to the thirteenth."""

    def make(events: Events) -> list[bytes]:
        lost = which(events) & events.within(10, 13)
        return [line for line, gone in zip(events.lines, lost.tolist(), strict=True) if not gone]

    return make


def backlog(which: Callable[[Events], NDArray[np.bool_]]) -> Callable[[Events], list[bytes]]:
    """What is missing above, all of it after the thirteenth hour."""

    def make(events: Events) -> list[bytes]:
        held = which(events) & events.within(10, 13)
        delivered = np.where(held, events.time[0] + 13 * HOUR_MS, events.time)
        return [events.lines[i] for i in np.argsort(delivered, kind="stable").tolist()]

    return make


def twice(events: Events) -> list[bytes]:
    """One event in twenty again, 1 to 50 events later."""
    random = np.random.default_rng(1)
    n = len(events.lines)
    again = np.flatnonzero(random.random(n) < 0.05)
    place = np.append(np.arange(n), again + random.integers(1, 51, len(again)) + 0.5)
    row = np.append(np.arange(n), again)
    return [events.lines[i] for i in row[np.argsort(place, kind="stable")].tolist()]


def stretch_twice(events: Events) -> list[bytes]:
    """Ten minutes of every second hour again, when they are over: a source goes on from its last checkpoint."""
    lines: list[bytes] = []
    for hour in range(24):
        head, tail = events.within(hour, hour + 1 / 2), events.within(hour + 1 / 2, hour + 1)
        repeated = events.within(hour + 1 / 3, hour + 1 / 2) if hour % 2 else np.zeros(len(head), bool)
        for part in (head, repeated, tail):
            lines.extend(events.lines[i] for i in np.flatnonzero(part).tolist())
    return lines


def clocks(minutes: int) -> Callable[[Events], list[bytes]]:
    """The events of every third device by a clock that is fast (slow: < 0), delivered as before."""

    def make(events: Events) -> list[bytes]:
        wrong = of_devices(events).tolist()
        lines = []
        for line, moves in zip(events.lines, wrong, strict=True):
            if moves:
                record = orjson.loads(line)
                record["time"] += minutes * MINUTE_MS
                line = orjson.dumps(record) + b"\n"
            lines.append(line)
        return lines

    return make


VARIANTS: dict[str, Callable[[Events], list[bytes]]] = {
    "undisturbed": undisturbed,
    "outage-product": missing(of_product),
    "outage-devices": missing(of_devices),
    "backlog-product": backlog(of_product),
    "backlog-devices": backlog(of_devices),
    "twice": twice,
    "stretch-twice": stretch_twice,
    "clocks-fast": clocks(1),
    "clocks-slow": clocks(-1),
}


@dataclass(frozen=True)
class Truth:
    """By uid: whether the event is an attack's, and of which incident."""

    attack: dict[str, bool]
    incident: dict[str, str]


def truth_of(path: Path) -> Truth:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Truth(
        {row["uid"]: row["label"] == "1" for row in rows},
        {row["uid"]: row["sequence"] for row in rows if row["sequence"]},
    )


def cells(scored: ScoredFile, before: ScoredFile, truth: Truth) -> list[str]:
    attack = np.array([truth.attack[uid] for uid in scored.uids])
    found = []
    for budget in BUDGETS:
        # The line of the undisturbed day: what is delivered twice must not buy alerts.
        alert = scored.p_value <= daily_threshold(budget, len(before))
        incidents = {truth.incident[scored.uids[i]] for i in np.flatnonzero(alert & attack).tolist()}
        found.append(f"{int((alert & ~attack).sum())}; {len(incidents)}")
    was = dict(zip(before.uids, before.p_value.tolist(), strict=True))
    ratio = scored.p_value / np.array([was[uid] for uid in scored.uids])
    changed = []
    for rows in (~attack & (ratio <= 1 / TENFOLD), ~attack & (ratio >= TENFOLD)):
        causes = Counter(
            str(cause).split(":")[0] + ":" + str(cause).split(":")[1]
            if str(cause).startswith(("sequence", "rate"))
            else str(cause).split(":")[0]
            for cause in scored.cause[rows]
        )
        changed.append(f"{int(rows.sum())} ({', '.join(f'{name} {n}' for name, n in causes.most_common(5))})")
    return [f"{len(scored):,}", *found, *changed]


def main(events_path: Path, labels: Path, bundle_path: Path, folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    events, truth, bundle = read(events_path), truth_of(labels), load(bundle_path)
    heads = [f"at {budget}: alerts on normal events; incidents" for budget in BUDGETS]
    print("| variant | events | " + " | ".join([*heads, "p a tenth or less", "p ten times or more"]) + " |")
    print("|---" * 6 + "|")
    before: ScoredFile | None = None
    for name in dict.fromkeys(["undisturbed", *(names or VARIANTS)]):
        path = folder / f"{name}.ndjson"
        path.write_bytes(b"".join(VARIANTS[name](events)))
        scored = score_files([path], bundle)
        before = before or scored
        print(f"| {name} | " + " | ".join(cells(scored, before, truth)) + " |", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), sys.argv[5:])
