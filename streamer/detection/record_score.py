"""The record score: what one event says by itself.

Six parts, each calibrated to -log p on held-out events: how rare its values are for who acts, and for its type; how
unusual its numbers are given what they are of; how far it lies from the many events of its type, and from the nearest
event of training; how surely some of its fields were replaced. Their sum is calibrated again (Fisher's method, with the
dependence of the parts calibrated away). No part has a weight. Each product is calibrated on its own events where there
are enough: what is far for a metric is near for a log of processes. Which training events numbers and distances go by,
and the network learns from, was decided before
(`streamer.training.vouching`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_encoder import Encoded
from state.baseline.baseline import Baseline
from state.baseline.group_distance import GroupDistance
from state.calibration import Calibration

FOR_ACTOR, FOR_TYPE, NUMBERS, FAR, NEAR, REPLACED = (
    "rarity_for_actor",
    "rarity_for_type",
    "numbers_in_context",
    "far",
    "near",
    "replaced",
)
PARTS = (FOR_ACTOR, FOR_TYPE, NUMBERS, FAR, NEAR, REPLACED)
RECORD = "record"
OWN_CALIBRATION = 500
"""Held-out events from which on a product is calibrated on its own; all others are on all events together."""


@dataclass
class RecordScorer:
    """What the record score compares with, and how it is calibrated.

    quantities: int64 [q], sorted, the event types that carry quantities. The network speaks for these alone, because
    counting says all that it knows of names; the rarest value of an event speaks for the other types alone, because
    among many numbers some name is always rare. products: int64 [event types], a number for
    the product of each type by its code; types beyond it, and 0, belong to none. calibrations: by part, of all events;
    and by `part.product`.
    """

    baseline: Baseline
    groups: GroupDistance
    quantities: NDArray[np.int64]
    products: NDArray[np.int64]
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, encoded: Encoded, types: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated parts of n distinct events, float64 [n] by name. types: int64 [n]."""
        return {
            FOR_ACTOR: encoded.max_surprise_for_actor.astype(np.float64),
            FOR_TYPE: encoded.max_surprise.astype(np.float64),
            NUMBERS: encoded.number_surprise.astype(np.float64),
            FAR: self.groups(encoded.vectors, types),
            NEAR: self.baseline.search(encoded.vectors, 1)[0][:, 0].astype(np.float64),
            REPLACED: encoded.replaced.astype(np.float64),
        }

    def fit(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> None:
        """Calibrate on the raw parts of held-out events."""
        for name in PARTS:
            self._calibrate(name, raw[name], types, self._speaks(name, raw[name], types))
        self._calibrate(RECORD, self.parts(raw, types).sum(0), types, np.ones(len(types), np.bool_))

    def _calibrate(
        self, name: str, scores: NDArray[np.float64], types: NDArray[np.int64], speaks: NDArray[np.bool_]
    ) -> None:
        if speaks.any():
            self.calibrations[name] = Calibration.fit(scores[speaks])
        product = self._product(types)
        for each in np.unique(product[speaks & (product > 0)]).tolist():
            rows = speaks & (product == each)
            if rows.sum() >= OWN_CALIBRATION:
                self.calibrations[f"{name}.{each}"] = Calibration.fit(scores[rows])

    def parts(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [6, n], nats: the evidence of each of PARTS, 0 where it does not speak."""
        return np.stack(
            [
                np.where(self._speaks(name, raw[name], types), self._calibrated(name, raw[name], types), 0.0)
                for name in PARTS
            ]
        )

    def evidence(self, parts: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [6, n] to float64 [n], nats: all parts as one. types: int64 [n]."""
        return self._calibrated(RECORD, parts.sum(0), types)

    def _calibrated(self, name: str, scores: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [n], nats: by the calibration of the product where it has one, 0 where there is none at all."""
        whole = self.calibrations.get(name)
        evidence = np.zeros(len(scores)) if whole is None else whole.evidence(scores)
        product = self._product(types)
        for each in np.unique(product).tolist():
            if (own := self.calibrations.get(f"{name}.{each}")) is not None:
                rows = product == each
                evidence[rows] = own.evidence(scores[rows])
        return evidence

    def _product(self, types: NDArray[np.int64]) -> NDArray[np.int64]:
        known = types < len(self.products)
        return np.where(known, self.products[np.where(known, types, 0)], 0)

    def _speaks(self, name: str, raw: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.bool_]:
        if name == FOR_TYPE:
            return ~self.measured(types)
        return self.measured(types) if name == REPLACED else ~np.isnan(raw)

    def measured(self, types: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n]: which events are of a type that carries quantities; the network judges these alone."""
        return np.isin(types, self.quantities)


def strongest(parts: NDArray[np.float64], named: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [n]: whether one of some parts is odder than all others. parts: float64 [6, n]; named: bool [6]."""
    larger: NDArray[np.bool_] = parts[named].max(0) > parts[~named].max(0)
    return larger
