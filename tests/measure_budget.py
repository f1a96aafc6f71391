"""Whether scores can be trusted, for docs/detection.md. Not a test.

python tests/measure_budget.py weeks FOLDER [SEED]   eleven simulated weeks: the first is clean and fitted on, the
                                                     budget runs over the p-values of the ten others; kept in FOLDER
python tests/measure_budget.py held-out FILE...      a bundle of the first two thirds of each file, and how often the
                                                     p-values of the last third are as small as they say
"""

from __future__ import annotations

import csv
import gzip
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from streamer.alerting.file_thresholds import thresholds_of
from streamer.alerting.threshold import EPISODE_MS
from streamer.bundles.bundle_files import load
from streamer.detection.score_files import ScoredFile, score_files
from streamer.devtools.simulator.generator import schedule, simulate, write
from streamer.event_files import Unread
from streamer.training.fit import DAY_MS, fit

WEEKS = 11
EVENTS_PER_DAY = 8_000
LEVELS = (0.1, 0.01, 0.001)
BUDGETS = (20, 100)


def weeks(folder: Path, seed: int) -> None:
    train, test, labels, bundle = (folder / name for name in ("0.ndjson.gz", "1.ndjson.gz", "1.csv", "bundle"))
    if not labels.exists():
        folder.mkdir(parents=True, exist_ok=True)
        planned = schedule(7 * WEEKS)
        made = simulate(seed=seed, days=7 * WEEKS, events_per_day=EVENTS_PER_DAY, incidents=planned)
        write((next(made) for _ in range(7)), train)
        write(made, test, labels)
    if not bundle.exists():
        fit([train], bundle)
    opened = load(bundle)
    scored = scored_once(test, folder / "scores.npz", bundle)
    with labels.open(newline="") as rows:
        marks = {row["uid"]: row["sequence"] for row in csv.DictReader(rows)}
    incident = np.array([marks[uid] for uid in scored.uids])
    day = scored.time // DAY_MS
    day -= day.min()
    normal = incident == ""
    print(f"{len(scored):,} events, {normal.sum():,} normal, {len(np.unique(incident)) - 1} incidents")
    for name, rows in [("all", normal), *((f"week {n + 1}", normal & (day // 7 == n)) for n in range(WEEKS - 1))]:
        print(f"{name}: {_told(scored.p_value[rows])}")
    for budget in BUDGETS:
        fixed = np.full(len(scored), budget / float(opened.manifest["training"]["events_per_day"]))
        for name, threshold in (("stays", fixed), ("moves", thresholds_of(scored, budget, opened))):
            alert = scored.p_value <= threshold
            false = first_of_episode(scored, alert) & normal
            days = np.bincount(day[false], minlength=7 * (WEEKS - 1))
            by_week = days.reshape(-1, 7).mean(1)
            found = len(set(incident[alert]) - {""})
            print(
                f"{budget} a day, a line that {name}: false alarms a day {days.mean():.1f}, by week "
                f"{', '.join(f'{mean:.1f}' for mean in by_week)}; most on a day {days.max()}; incidents found {found}"
            )


def held_out(path: Path) -> None:
    with gzip.open(path) as thresholds:
        events = sorted(thresholds, key=lambda threshold: int(orjson.loads(threshold)["time"]))
    cut = 2 * len(events) // 3
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder) / "0.ndjson", Path(folder) / "1.ndjson"
        for part, some in zip(parts, (events[:cut], events[cut:]), strict=True):
            part.write_bytes(b"".join(some))
        scored = score_files([parts[1]], fit([parts[0]], Path(folder) / "bundle").bundle)
    print(f"{path.name}: fitted on {cut:,}, then {len(scored):,}: {_told(scored.p_value)}", flush=True)


def scored_once(events: Path, kept: Path, bundle: Path) -> ScoredFile:
    if not kept.exists():
        progress = lambda done: print(f"\r{done:,}", end="", file=sys.stderr)  # noqa: E731
        fresh = score_files([events], load(bundle), progress)
        columns = {name: getattr(fresh, name).astype(str) for name in ("entity", "cause")}
        np.savez(kept, uids=fresh.uids, time=fresh.time, p_value=fresh.p_value, severity=fresh.severity, **columns)
    found = np.load(kept)
    text = {name: found[name].astype(object) for name in ("entity", "cause")}
    return ScoredFile(
        found["uids"].tolist(), found["time"], found["p_value"], found["severity"], unread=Unread(), **text
    )


def first_of_episode(scored: ScoredFile, alert: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Alerts but for those that go on about what was told less than an hour before: these update an alert."""
    first, last = np.zeros(len(alert), bool), {}
    for row in np.flatnonzero(alert).tolist():
        about, moment = (scored.cause[row], scored.entity[row]), int(scored.time[row])
        first[row] = about not in last or moment - last[about] > EPISODE_MS
        last[about] = moment
    return first


def _told(p_value: NDArray[np.float64]) -> str:
    shares = (f"{(p_value <= level).mean() / level:.2f} ({(p_value <= level).sum()})" for level in LEVELS)
    return f"p-values under {', '.join(map(str, LEVELS))} times as many as they should be: {', '.join(shares)}"


def main(what: str, *rest: str) -> None:
    if what == "weeks":
        weeks(Path(rest[0]), int(rest[1]) if len(rest) > 1 else 5)
    else:
        for each in rest:
            held_out(Path(each))


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    main(*arguments)
