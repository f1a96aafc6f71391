"""The sequence score: what an entity's window says at each event."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.sequence_model import SequenceModel
from state.calibration import FEW, Calibration
from state.windows import Windows

ORDER, MISSING = "sequence:order", "sequence:missing"
"""Causes: that the newest record came after those before, and that something usual did not come before it."""


@dataclass
class SequenceScorer:
    """The sequence score: each entity's window, judged at each event, and that nothing follows it.

    Calibrated by kind of entity, for a host's days are not a transaction's steps: `order` (the newest record after
    those before), `missing` (what usually comes shortly before the newest) and `ending` (nothing after it, for kinds
    of entity whose routines end). All but the last are calibrated again by event: one that is part of four windows has
    four chances to look odd.
    """

    model: SequenceModel
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, windows: Windows, kinds: NDArray[np.int8], *, few: bool = False) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated scores of m windows, float64 [m] by name; kinds: int8 [m]; few: as for the model."""
        scores = self.model(windows.vectors, windows.times, windows.length, kinds, few=few)
        named = {"order": scores.surprise, "missing": scores.missing, "ending": scores.ending}
        return {name: score.astype(np.float64) for name, score in named.items()}

    def fit(
        self,
        raw: dict[str, NDArray[np.float64]],
        kinds: NDArray[np.int8],
        ended: NDArray[np.bool_],
        rows: NDArray[np.int32],
    ) -> None:
        """Calibrate on held-out windows; ended: bool [m], those after which nothing came for long enough; rows: int32
        [m], the event that each ends at."""
        every = np.ones(len(kinds), bool)
        for name, those, tail_from in (("order", every, None), ("missing", every, FEW), ("ending", ended, None)):
            for kind in np.unique(kinds[those]).tolist():
                scores = raw[name][those & (kinds == kind)]
                self.calibrations[f"{name}.{kind}"] = Calibration.fit(scores, tail_from=tail_from)
        for name, tail_from in (("order", None), ("missing", FEW)):
            by_event = strongest_by_event(self.evidence(name, raw, kinds), rows)
            self.calibrations[name] = Calibration.fit(by_event, tail_from=tail_from)

    def evidence(self, name: str, raw: dict[str, NDArray[np.float64]], kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m], nats: against each window by one of `raw`, of which `ending` is against its being the last. A
        kind of entity that was not among the held-out events has none."""
        found = np.zeros(len(kinds))
        for kind in np.unique(kinds).tolist():
            if (calibration := self.calibrations.get(f"{name}.{kind}")) is not None:
                rows = kinds == kind
                found[rows] = calibration.evidence(raw[name][rows])
        if (by_event := self.calibrations.get(name)) is not None:
            found = by_event.evidence(found)
        # Routines end alike to the last nat, so what is a little out of the way would pass for impossible. It is no
        # rarer than network and counts say together; `raw` is the mean of the two.
        return np.minimum(found, 2 * raw[name]) if name == "ending" else found


def strongest_by_event(evidence: NDArray[np.float64], rows: NDArray[np.int32]) -> NDArray[np.float64]:
    """The strongest of each event's pairs: float64 [m] and ascending int32 [m] to float64 [events]."""
    _, event = np.unique(rows, return_inverse=True)
    strongest = np.zeros(int(event.max(initial=-1)) + 1)
    np.maximum.at(strongest, event, evidence)
    return strongest
