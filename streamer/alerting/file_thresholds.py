"""The thresholds for the events of a file.

Promises the thresholds of the stream for files of more than a day. It reads no ledger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.windows import DAY_MS
from streamer.alerting.threshold import MovingThreshold
from streamer.detection.bundle import Bundle
from streamer.detection.score_files import ScoredFile


def daily_threshold(alerts_per_day: float, events: int) -> float:
    """The p-value that spends the budget on a file, which counts as one day."""
    return min(0.5, alerts_per_day / max(events, 1))


def thresholds_of(scored: ScoredFile, alerts_per_day: float, bundle: Bundle) -> NDArray[np.float64]:
    """float64 [n], the threshold of each event: hour by hour, as for the stream, where the file spans more than a day,
    else one for the whole file."""
    if not len(scored) or int(np.ptp(scored.time)) <= DAY_MS:
        return np.full(len(scored), daily_threshold(alerts_per_day, len(scored)))
    budget = MovingThreshold(alerts_per_day, float(bundle.manifest["training"]["events_per_day"]))

    def episode_key(row: int) -> str:
        return f"{scored.cause[row]} {scored.entity[row]}" if scored.entity[row] else ""

    return budget.judge(scored.time, scored.p_value, episode_key=episode_key)
