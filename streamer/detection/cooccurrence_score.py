"""The co-occurrence score: a user has two usual partners (addresses, hosts, services) within an hour, which training
had only far apart.

It judges users only: who meets at a machine or a service is chance. Promises calibrated evidence for each sort of
partner, and for each event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.activity_counts import COUNTED
from encoder.ocsf.entities import KINDS
from state.calibration import FEW, Calibration
from state.cooccurrence import Cooccurrence, near
from state.rolling_counts import PARTNERS
from state.windows import Windows

JUDGED = KINDS.index("user")
CAUSES = np.array([f"first:{sort}" for sort in (*COUNTED, "destination")], object)
"""By sort of partner (`encoder.ocsf.activity_counts`): the first time together with another one of its sort."""
CHANCE = 1.0
"""Nats: surprise below this, a pair at least a third as frequent as expected, is no evidence. Such pairs still
calibrate the others."""
_EVENT = "event"


@dataclass
class CooccurrenceScorer:
    """Judges the pairs of partners of users, calibrated for each sort of partner, then by event."""

    model: Cooccurrence
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def fit(self, surprise: NDArray[np.float64], events: int) -> None:
        """Calibrate on m held-out pairs of event and user. surprise: float64 [m, PARTNERS]; events: the number of
        held-out events."""
        for sort in np.flatnonzero(self.model.events.any(0)).tolist():
            self.calibrations[str(sort)] = Calibration.fit(surprise[:, sort], tail_from=FEW)
        strongest, _ = self.evidence(surprise)
        by_event = np.concatenate([strongest, np.zeros(max(events - len(strongest), 0))])
        self.calibrations[_EVENT] = Calibration.fit(by_event, tail_from=FEW)

    def judge(
        self, entities: Sequence[str], kinds: NDArray[np.int8], windows: Windows
    ) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Evidence against m pairs of event and entity: float64 [m], nats, 0 for kinds that are not judged; int8 [m],
        the sort of partner (its place in `CAUSES`)."""
        evidence, sort = np.zeros(len(kinds)), np.zeros(len(kinds), np.int8)
        rows = np.flatnonzero(kinds == JUDGED)
        if len(rows):
            names = [entities[row] for row in rows.tolist()]
            evidence[rows], sort[rows] = self.evidence(self.model.surprise(names, *near(windows.take(rows))))
        return evidence, sort

    def evidence(self, surprise: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """float64 [m], nats, and int8 [m], as `judge`; 0 for a sort that training did not have."""
        by_sort = np.zeros((len(surprise), PARTNERS))
        for sort in range(PARTNERS):
            if (calibration := self.calibrations.get(str(sort))) is not None:
                rows = surprise[:, sort] >= CHANCE
                by_sort[rows, sort] = calibration.evidence(surprise[rows, sort])
        strongest: NDArray[np.float64] = by_sort.max(1)
        if (by_event := self.calibrations.get(_EVENT)) is not None:
            strongest = by_event.evidence(strongest)
        return strongest, by_sort.argmax(1).astype(np.int8)
