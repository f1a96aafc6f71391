"""The rate score: how much an entity does, fails, reaches and sends, against its own habits."""

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
"""From so many on a group of them tells what others may do: the habits of three hosts say nothing of a fourth."""


@dataclass
class RateScorer:
    """How much an entity does, fails, reaches and sends, against its own habits.

    Calibrated for each count by kind of entity and by how well the entity is known, on training judged block by block;
    then by kind, and by event, most of which raise nothing.
    """

    profiles: RateProfiles
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def fit(
        self, excess: RateExcess, kinds: NDArray[np.int8], entities: Sequence[str], rows: NDArray[np.int32]
    ) -> None:
        """Calibrate on m pairs of events and entities; kinds: int8 [m]; rows: int32 [m], the events."""
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
        """float64 [m], nats, against each event of an entity; int8 [m], the count that says so (its place in
        `tally.LEVELS`). A kind of entity that training had not has none."""
        strongest, column = self._strongest(excess, kinds)
        found = np.zeros(len(kinds))
        for kind in np.unique(kinds).tolist():
            rows = (kinds == kind) & (strongest > 0)
            if (calibration := self.calibrations.get(str(kind))) is not None and rows.any():
                found[rows] = calibration.evidence(strongest[rows])
        if (by_event := self.calibrations.get("rate")) is not None:
            found = by_event.evidence(found)
        return found, column

    def _strongest(self, excess: RateExcess, kinds: NDArray[np.int8]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        found = self.by_count(excess, kinds)
        return found.max(1, initial=0.0), found.argmax(1).astype(np.int8)

    def by_count(self, excess: RateExcess, kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m, 8], nats: what each count says by itself, 0 where it was not raised beyond what was known."""
        found = np.zeros(excess.over.shape)
        rows, columns = np.nonzero(excess.over > 0)
        place = (kinds[rows].astype(np.int64) * len(LEVELS) + columns) * GROUPS + excess.group[rows, columns]
        for which in np.unique(place).tolist():
            name, group = divmod(which, GROUPS)
            kind, column = divmod(name, len(LEVELS))
            whole = self.calibrations.get(f"{kind}.{column}")
            # Of strangers, nothing is said that training had no strangers to learn from.
            calibration = self.calibrations.get(f"{kind}.{column}.{group}", None if group == STRANGER else whole)
            if calibration is not None:
                at = place == which
                found[rows[at], columns[at]] = calibration.evidence(excess.over[rows[at], columns[at]])
        return found
