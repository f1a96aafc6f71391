"""Comparing two bundles on the same range: which alerts another bundle would give, and which it would not.

Alerts are matched on coordinates, entity and cause. Ranks are those among the alerts that both give, most unusual
first, so that one alert gained at the top does not move all others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from encoder.ocsf.events import Message
from streamer.detection.batches import ScoredBatch
from streamer.kafka.client import Offsets
from streamer.redaction import Redactor
from streamer.replay.replay import Judged, ReplayDetector, judged, wanted_rows

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Candidate:
    """An alert of one of the bundles, as a line of JSON."""

    value: bytes
    uid: str = ""
    key: bytes = b""
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass(frozen=True)
class Change:
    """One alert under both bundles. what: gained, lost, re-ranked or kept; at: coordinates; p-values and ranks (1: the
    most unusual) are None where a bundle does not give it, and ranks only where both do."""

    what: str
    at: str
    entity: str
    cause: str
    p_before: float | None
    p_after: float | None
    rank_before: int | None = None
    rank_after: int | None = None


class Comparing:
    """Two detectors on the same batches."""

    def __init__(self, before: ReplayDetector, after: ReplayDetector) -> None:
        self._sides = {BEFORE: before, AFTER: after}

    def begin(self, horizon_ms: int) -> None:
        """As of `ReplayDetector`."""
        for detector in self._sides.values():
            detector.begin(horizon_ms)

    def remember(self, batch: Sequence[Message]) -> None:
        """Append to the windows of both."""
        for detector in self._sides.values():
            detector.fill(batch)

    def judge(self, batch: Sequence[Message], positions: Offsets) -> Judged:
        """What each would alert on."""
        thresholds = []
        for side, detector in self._sides.items():
            scored, rows = detector.score(batch, positions)
            thresholds += [_candidate(side, scored, row, detector.redactor) for row in rows.tolist()]
            inactive = scored.inactive
            if inactive is not None and inactive.noticed_at is not None and inactive.threshold is not None:
                crossing = wanted_rows(scored.coordinates, positions)[inactive.noticed_at]
                crossing &= inactive.p_value <= inactive.threshold
                thresholds += [
                    _candidate(side, inactive, row, detector.redactor) for row in np.flatnonzero(crossing).tolist()
                ]
            detector.forget(batch)
        return judged(batch, scored, positions, thresholds)


def _candidate(side: str, scored: ScoredBatch, row: int, redactor: Redactor) -> Candidate:
    entity = scored.redacted(row, redactor).entity(str(scored.entity[row]))
    found = {"side": side, "at": scored.coordinates.label(row), "p_value": float(scored.p_value[row])}
    return Candidate(orjson.dumps(found | {"entity": entity, "cause": str(scored.cause[row])}))


def compare(candidates: Iterable[dict[str, Any]]) -> list[Change]:
    """What changes, gained first, then lost, re-ranked (furthest first) and kept; each by how unusual it is."""
    p_values: dict[str, dict[tuple[str, str, str], float]] = {BEFORE: {}, AFTER: {}}
    for found in candidates:
        p_values[found["side"]][found["at"], found["entity"], found["cause"]] = found["p_value"]
    before, after = p_values[BEFORE], p_values[AFTER]
    both = before.keys() & after.keys()
    ranks = {side: _ranks({key: p_values[side][key] for key in both}) for side in p_values}
    changes = []
    for key in before.keys() | after.keys():
        if key not in both:
            changes.append(Change("lost" if key in before else "gained", *key, before.get(key), after.get(key)))
            continue
        old, new = ranks[BEFORE][key], ranks[AFTER][key]
        changes.append(Change("kept" if old == new else "re-ranked", *key, before[key], after[key], old, new))
    order = ["gained", "lost", "re-ranked", "kept"]
    return sorted(changes, key=lambda c: (order.index(c.what), -_moved(c), c.p_after or c.p_before, c.at, c.cause))


def compare_file(candidates: Path, out: Path) -> list[Change]:
    """Compare the lines of a file and write one line a change."""
    with candidates.open("rb") as thresholds:
        changes = compare(orjson.loads(threshold) for threshold in thresholds)
    temporary = out.with_name(f".{out.name}.new")
    temporary.write_bytes(b"".join(orjson.dumps(change, option=orjson.OPT_APPEND_NEWLINE) for change in changes))
    os.replace(temporary, out)
    return changes


def totals(changes: Sequence[Change]) -> str:
    """How many of each, in one line."""
    counts = Counter(change.what for change in changes)
    return ", ".join(f"{counts[what]:,} {what}" for what in ("gained", "lost", "re-ranked", "kept"))


def _ranks(p_values: dict[tuple[str, str, str], float]) -> dict[tuple[str, str, str], int]:
    return {key: rank + 1 for rank, key in enumerate(sorted(p_values, key=lambda key: (p_values[key], key)))}


def _moved(change: Change) -> int:
    return abs((change.rank_before or 0) - (change.rank_after or 0))
