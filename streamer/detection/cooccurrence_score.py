"""The evidence that somebody is at two places at once that they know both, but never within an hour of each other.

Judged of users: a machine or a service is visited by many, and who comes together there is chance.
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
"""Of each sort of partner, as `encoder.ocsf.activity_counts` has them: for the first time with another of its sort."""
CHANCE = 1.0
"""Nats: what is less odd than that, about a third of what was to be expected, is chance. It calibrates all the same:
the tail of what is odd begins in what is not."""
_EVENT = "event"


@dataclass
class CooccurrenceScorer:
    """Calibrated for each sort of partner, then by event, of which most say nothing."""

    model: Cooccurrence
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def fit(self, surprise: NDArray[np.float64], events: int) -> None:
        """Calibrate on the pairs that are judged of so many held-out events. surprise: float64 [m, PARTNERS]."""
        for sort in np.flatnonzero(self.model.events.any(0)).tolist():
            self.calibrations[str(sort)] = Calibration.fit(surprise[:, sort], tail_from=FEW)
        strongest, _ = self.evidence(surprise)
        by_event = np.concatenate([strongest, np.zeros(max(events - len(strongest), 0))])
        self.calibrations[_EVENT] = Calibration.fit(by_event, tail_from=FEW)

    def judge(
        self, entities: Sequence[str], kinds: NDArray[np.int8], windows: Windows
    ) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """Of m pairs: float64 [m], nats, 0 for kinds that are not judged; int8 [m], the sort of partner (its place in
        `CAUSES`)."""
        evidence, sort = np.zeros(len(kinds)), np.zeros(len(kinds), np.int8)
        rows = np.flatnonzero(kinds == JUDGED)
        if len(rows):
            names = [entities[row] for row in rows.tolist()]
            evidence[rows], sort[rows] = self.evidence(self.model.surprise(names, *near(windows.take(rows))))
        return evidence, sort

    def evidence(self, surprise: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """float64 [m], nats, and int8 [m], as `judge`; a sort that training had not says nothing."""
        found = np.zeros((len(surprise), PARTNERS))
        for sort in range(PARTNERS):
            if (calibration := self.calibrations.get(str(sort))) is not None:
                odd = surprise[:, sort] >= CHANCE
                found[odd, sort] = calibration.evidence(surprise[odd, sort])
        strongest: NDArray[np.float64] = found.max(1)
        if (by_event := self.calibrations.get(_EVENT)) is not None:
            strongest = by_event.evidence(strongest)
        return strongest, found.argmax(1).astype(np.int8)
