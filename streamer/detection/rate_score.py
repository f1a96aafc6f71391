"""The rate score: how much an entity does, fails, reaches and sends, compared with its usual rates.

Promises that a count which does not exceed what is usual is no evidence. It judges levels of counts
(`state.rolling_counts`), not exact numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from state.calibration import Calibration
from state.rate_profiles import GROUPS, STRANGER, RateExcess, RateProfiles
from state.rolling_counts import LEVELS
from streamer.detection.sequence_score import strongest_by_event

MIN_ENTITIES = 20
"""The least entities whose rates calibrate a group: three hosts say nothing about a fourth."""


@dataclass
class RateScorer:
    """Judges the counts of entities against their profiles.

    Calibrated for each count by kind of entity and by how well the entity is known, on training data that is judged
    block by block (`RateProfiles.fit`); then by kind, and by event.
    """

    profiles: RateProfiles
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def fit(
        self, excess: RateExcess, kinds: NDArray[np.int8], entities: Sequence[str], rows: NDArray[np.int32]
    ) -> None:
        """Calibrate on m pairs of event and entity. kinds: int8 [m]; rows: int32 [m], the events."""
        _, entity = np.unique(np.array(entities, object).astype(str), return_inverse=True)
        for kind in np.unique(kinds).tolist():
            of_kind = kinds == kind
            for column in range(len(LEVELS)):
                over, group = excess.over[of_kind, column], excess.group[of_kind, column]
                raised = np.isfinite(over)
                self._calibrate(f"{kind}.{column}", over, raised & (group != STRANGER), entity[of_kind])
                for known in range(GROUPS):
                    self._calibrate(f"{kind}.{column}.{known}", over, raised & (group == known), entity[of_kind])
            strongest = self._strongest(excess.take(of_kind), kinds[of_kind])[0]
            if (spoke := strongest > 0).any():
                self.calibrations[str(kind)] = Calibration.fit(strongest[spoke])
        self.calibrations["rate"] = Calibration.fit(strongest_by_event(self.evidence(excess, kinds)[0], rows))

    def _calibrate(
        self, name: str, over: NDArray[np.float64], rows: NDArray[np.bool_], entity: NDArray[np.intp]
    ) -> None:
        if len(np.unique(entity[rows])) >= MIN_ENTITIES:
            self.calibrations[name] = Calibration.fit(over[rows])

    def evidence(self, excess: RateExcess, kinds: NDArray[np.int8]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """float64 [m], nats, against each pair of event and entity; int8 [m], the strongest count (its place in
        `LEVELS`). 0 for a kind of entity that training did not have."""
        strongest, column = self._strongest(excess, kinds)
        evidence = np.zeros(len(kinds))
        for kind in np.unique(kinds).tolist():
            rows = (kinds == kind) & (strongest > 0)
            if (calibration := self.calibrations.get(str(kind))) is not None and rows.any():
                evidence[rows] = calibration.evidence(strongest[rows])
        if (by_event := self.calibrations.get("rate")) is not None:
            evidence = by_event.evidence(evidence)
        return evidence, column

    def _strongest(self, excess: RateExcess, kinds: NDArray[np.int8]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        evidence = self.by_count(excess, kinds)
        return evidence.max(1, initial=0.0), evidence.argmax(1).astype(np.int8)

    def by_count(self, excess: RateExcess, kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m, 8], nats: the evidence of each count by itself, 0 where it does not exceed what was usual."""
        evidence = np.zeros(excess.over.shape)
        rows, columns = np.nonzero(excess.over > 0)
        place = (kinds[rows].astype(np.int64) * len(LEVELS) + columns) * GROUPS + excess.group[rows, columns]
        for which in np.unique(place).tolist():
            name, group = divmod(which, GROUPS)
            kind, column = divmod(name, len(LEVELS))
            whole = self.calibrations.get(f"{kind}.{column}")
            # Strangers are judged only where training had strangers.
            calibration = self.calibrations.get(f"{kind}.{column}.{group}", None if group == STRANGER else whole)
            if calibration is not None:
                at = place == which
                evidence[rows[at], columns[at]] = calibration.evidence(excess.over[rows[at], columns[at]])
        return evidence
