"""The thresholds that the events of a file are held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.windows import DAY_MS
from streamer.alerting.threshold import MovingThreshold
from streamer.detection.bundle import Bundle
from streamer.detection.score_files import ScoredFile


def daily_threshold(alerts_per_day: float, events: int) -> float:
    """The p-value line that spends the budget on a file, which counts as one day."""
    return min(0.5, alerts_per_day / max(events, 1))


def thresholds_of(scored: ScoredFile, alerts_per_day: float, bundle: Bundle) -> NDArray[np.float64]:
    """The line that each event is held against, float64 [n]: what spans more than a day is judged as the stream would
    be, hour by hour; what does not counts as one day, whose one line needs no hours to be learned from."""
    if not len(scored) or int(np.ptp(scored.time)) <= DAY_MS:
        return np.full(len(scored), daily_threshold(alerts_per_day, len(scored)))
    budget = MovingThreshold(alerts_per_day, float(bundle.manifest["training"]["events_per_day"]))

    def episode_key(row: int) -> str:
        return f"{scored.cause[row]} {scored.entity[row]}" if scored.entity[row] else ""

    return budget.judge(scored.time, scored.p_value, episode_key=episode_key)
