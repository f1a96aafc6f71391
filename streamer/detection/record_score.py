"""The record score: what one event says by itself.

Four parts, each calibrated to -log p on held-out events: how rare its values are for who acts, and for its type; how
far it lies from the many events of its type, and from the nearest event of training. Their sum is calibrated again
(Fisher's method, with the dependence of the parts calibrated away). No part has a weight. Which training events the
distances go by was decided before (`streamer.training.vouching`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_encoder import Encoded
from state.baseline.baseline import Baseline
from state.baseline.group_distance import GroupDistance
from state.calibration import Calibration

FOR_ACTOR, FOR_TYPE, FAR, NEAR = "rarity_for_actor", "rarity_for_type", "far", "near"
PARTS = (FOR_ACTOR, FOR_TYPE, FAR, NEAR)


@dataclass
class RecordScorer:
    """What the record score compares with, and how it is calibrated.

    quantities: int64 [q], sorted, the event types that carry quantities: the rarest value of an event speaks for the
    other types alone, because among many numbers some name is always rare.
    """

    baseline: Baseline
    groups: GroupDistance
    quantities: NDArray[np.int64]
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, encoded: Encoded, types: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated parts of n distinct events, float64 [n] by name. types: int64 [n]."""
        return {
            FOR_ACTOR: encoded.max_surprise_for_actor.astype(np.float64),
            FOR_TYPE: encoded.max_surprise.astype(np.float64),
            FAR: self.groups(encoded.vectors, types),
            NEAR: self.baseline.search(encoded.vectors, 1)[0][:, 0].astype(np.float64),
        }

    def fit(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> None:
        """Calibrate on the raw parts of held-out events."""
        for name in PARTS:
            speaks = self._speaks(name, types)
            if speaks.any():
                self.calibrations[name] = Calibration.fit(raw[name][speaks])
        self.calibrations["record"] = Calibration.fit(self.parts(raw, types).sum(0))

    def parts(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [4, n], nats: the evidence of each of PARTS, 0 where it does not speak."""
        evidence = np.zeros((len(PARTS), len(types)))
        for place, name in enumerate(PARTS):
            if (calibration := self.calibrations.get(name)) is not None:
                evidence[place] = np.where(self._speaks(name, types), calibration.evidence(raw[name]), 0.0)
        return evidence

    def evidence(self, parts: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 [4, n] to float64 [n], nats: all parts as one."""
        return self.calibrations["record"].evidence(parts.sum(0))

    def _speaks(self, name: str, types: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~np.isin(types, self.quantities) if name == FOR_TYPE else np.ones(len(types), np.bool_)


def by_distance(parts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [n]: whether the distances of an event are odder than its values. parts: float64 [4, n]."""
    values, distances = parts[:2].max(0), parts[2:].max(0)
    larger: NDArray[np.bool_] = distances > values
    return larger
