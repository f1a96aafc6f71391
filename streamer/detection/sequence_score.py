"""The sequence score: the evidence of an entity's window at each event.

Judges the order of the newest record, steps that are missing before it, and that no record follows it. It judges the
window alone, not the record by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.sequence_model import SequenceModel
from state.calibration import FEW, Calibration
from state.windows import Windows

ORDER, MISSING = "sequence:order", "sequence:missing"
"""Causes: the newest record is unusual after the earlier ones; a record that usually comes before it is missing."""


@dataclass
class SequenceScorer:
    """Judges the window of each entity at each event.

    Three scores, calibrated by kind of entity, because the days of a host differ from the steps of a transaction:
    `order` (the newest record after the earlier ones), `missing` (a usual earlier record is not there) and `ending` (no
    record follows, for kinds of entity whose routines end). The first two are calibrated again by event, because an
    event in four windows has four chances to look unusual.
    """

    model: SequenceModel
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, windows: Windows, kinds: NDArray[np.int8], *, few: bool = False) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated scores of m windows, float64 [m] by name; kinds: int8 [m]; few: as for the model. The
        newest record of a window is judged. `order` and `missing` of an event that is not the newest are 0: neither
        what came first nor the times of events can be relied on where these differ."""
        scores = self.model(windows.vectors, windows.times, windows.length, kinds, few=few)
        named = {"order": scores.surprise, "missing": scores.missing, "ending": scores.ending}
        raw = {name: score.astype(np.float64) for name, score in named.items()}
        for name in ("order", "missing"):
            raw[name][~windows.newest] = 0.0
        return raw

    def fit(
        self,
        raw: dict[str, NDArray[np.float64]],
        kinds: NDArray[np.int8],
        ended: NDArray[np.bool_],
        rows: NDArray[np.int32],
    ) -> None:
        """Calibrate on m held-out windows. kinds: int8 [m]; ended: bool [m], whether no record followed for the timeout
        of the kind; rows: int32 [m], the last event of each."""
        every = np.ones(len(kinds), bool)
        for name, those, tail_from in (("order", every, None), ("missing", every, FEW), ("ending", ended, None)):
            for kind in np.unique(kinds[those]).tolist():
                scores = raw[name][those & (kinds == kind)]
                self.calibrations[f"{name}.{kind}"] = Calibration.fit(scores, tail_from=tail_from)
        for name, tail_from in (("order", None), ("missing", FEW)):
            by_event = strongest_by_event(self.evidence(name, raw, kinds), rows)
            self.calibrations[name] = Calibration.fit(by_event, tail_from=tail_from)

    def evidence(self, name: str, raw: dict[str, NDArray[np.float64]], kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m], nats: the evidence against each window by one of the scores of `raw`; of `ending`, against no
        further record. 0 for a kind of entity without held-out events."""
        evidence = np.zeros(len(kinds))
        for kind in np.unique(kinds).tolist():
            if (calibration := self.calibrations.get(f"{name}.{kind}")) is not None:
                rows = kinds == kind
                evidence[rows] = calibration.evidence(raw[name][rows])
        if (by_event := self.calibrations.get(name)) is not None:
            evidence = by_event.evidence(evidence)
        # Routines end almost identically, so calibration takes small deviations for impossible. Limit the evidence to
        # what network and counts say together; `raw` is the mean of the two.
        return np.minimum(evidence, 2 * raw[name]) if name == "ending" else evidence


def strongest_by_event(evidence: NDArray[np.float64], rows: NDArray[np.int32]) -> NDArray[np.float64]:
    """The strongest evidence of the pairs of each event: float64 [m] and ascending rows, int32 [m], to float64
    [events]."""
    _, event = np.unique(rows, return_inverse=True)
    strongest = np.zeros(int(event.max(initial=-1)) + 1)
    np.maximum.at(strongest, event, evidence)
    return strongest
