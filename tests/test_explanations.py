"""Explanations are right: of the simulator's incidents it is known what was odd, and the alert that an analyst reads
first mostly names it among its first three."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from encoder.ocsf.events import Message
from state.memory.timers import MemoryTimers
from state.memory.windows import MemoryWindows
from streamer.alerting.file_thresholds import daily_threshold
from streamer.detection.detector import Detector
from streamer.devtools.simulator.generator import Day, Label, schedule, simulate, write
from streamer.explain.attribution import Explainer, Explanation
from streamer.training.fit import fit

CAUSES: dict[str, tuple[str, ...]] = {
    "admin_from_new_place": ("src_endpoint.ip", "src_endpoint.location."),
    "exfiltration_drip": ("rate:bytes", "rate:events"),
    "impossible_travel": ("src_endpoint.ip", "src_endpoint.location.", "first:address"),
    "night_deletion": ("file.", "rate:events", "sequence:"),
    "password_spray": ("rate:failures", "rate:partners"),
    "persistence_after_logon": ("job.", "sequence:"),
    "rare_process_tree": ("actor.process.", "process."),
    "silent_routine": ("sequence:",),
    "skipped_step": ("sequence:",),
    "slow_scan": ("rate:failures", "rate:partners"),
    "unseen_binary": ("process.",),
    "wrong_order": ("sequence:",),
}
"""What is odd about each kind of incident, as an alert may name it."""


def named(cause: str, why: Explanation) -> list[str]:
    """What an alert names first, at most three: its sequence, its two places, its counts or its fields."""
    if cause.startswith(("sequence:", "first:")):
        return [cause]
    if why.rates:
        return [f"rate:{rate.count}.{rate.span}" for rate in why.rates[:3]]
    return [field.path for field in why.fields[:3]]


def first_alerts(detector: Detector, days: list[Day], before: int) -> Iterator[tuple[Label, str, Explanation]]:
    """Of each incident that is found at 20 alerts a day, the event that told it first, or the silence after it. before:
    events of the days that were fitted on."""
    detected: set[str] = set()
    labels = [label for day in days for label in day.labels]
    offset = before
    for day in days:
        line = daily_threshold(20, len(day.events))
        for start in range(0, len(day.events), 256):
            lines = day.events[start : start + 256]
            # Of no time of its own: Kafka's would be taken for the latest that an event can be of.
            batch = detector.score([Message("events", 0, offset + i, -1, line) for i, line in enumerate(lines)])
            offset += len(lines)
            for scored in filter(None, (batch, batch.inactive)):
                for row in np.flatnonzero(scored.p_value <= line).tolist():
                    label = labels[int(scored.coordinates.offset[row]) - before]
                    if label.attack and label.sequence not in detected:
                        detected.add(label.sequence)
                        yield (
                            label,
                            str(scored.cause[row]),
                            Explainer(detector.bundle, detector.windows).explain(scored, np.array([row]))[0],
                        )
            detector.windows.committed({("events", 0): offset})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_was_odd_about_an_incident_is_named_first(tmp_path: Path) -> None:
    days = list(simulate(seed=3, days=21, incidents=schedule(21)))
    write(days[:7], tmp_path / "week.ndjson")
    bundle = fit([tmp_path / "week.ndjson"], tmp_path / "bundle").bundle
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim), timers=MemoryTimers())
    alerts = list(first_alerts(detector, days[7:], sum(len(day.events) for day in days[:7])))
    wrong = [
        (label.sequence, cause)
        for label, cause, why in alerts
        if not any(name.startswith(CAUSES[label.attack]) for name in named(cause, why))
    ]
    print(f"{len(alerts) - len(wrong)} of {len(alerts)} incidents; not: {wrong}")
    assert len(alerts) > 30
    assert len(wrong) <= 0.1 * len(alerts)
