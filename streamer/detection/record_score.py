"""The record score: what one event says by itself.

Seven parts, each calibrated to -log p on held-out events: how rare its values are for who acts, and for its type; how
unusual its numbers are given what they are of; how far it lies from the many events of its type, and from the nearest
event of training; how surely some of its fields were replaced; and how unusual the parts of its texts are, as far as
that says more than its values. Their sum is calibrated again (Fisher's method, with the dependence of the parts
calibrated away). No part has a weight. Each product is calibrated on its own events where there are enough: what is far
for a metric is near for a log of processes. Which training events numbers and distances go by, and the network learns
from, was decided before (`streamer.training.vouching`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_encoder import Encoded
from encoder.models.text_shapes import TextShapes
from state.baseline.baseline import Baseline
from state.baseline.group_distance import GroupDistance
from state.calibration import Calibration

FOR_ACTOR, FOR_TYPE, NUMBERS = "rarity_for_actor", "rarity_for_type", "numbers_in_context"
FAR, NEAR, REPLACED, TEXT = "far", "near", "replaced", "text"
PARTS = (FOR_ACTOR, FOR_TYPE, NUMBERS, FAR, NEAR, REPLACED, TEXT)
_VALUES = [PARTS.index(name) for name in (FOR_ACTOR, FOR_TYPE)]
RECORD = "record"
OWN_CALIBRATION = 500
"""Held-out events from which on a product, or all types with or without quantities, are calibrated on their own."""


@dataclass
class RecordScorer:
    """What the record score compares with, and how it is calibrated.

    quantities: int64 [q], sorted, the event types that carry quantities. The network speaks for these alone, because
    counting says all that it knows of names; the rarest value of an event speaks for the other types alone, because
    among many numbers some name is always rare. products: int64 [event types], a number for
    the product of each type by its code; types beyond it, and 0, belong to none. calibrations: by part, of all events;
    and by `part.scope` (`_scopes`).
    """

    baseline: Baseline
    groups: GroupDistance
    quantities: NDArray[np.int64]
    products: NDArray[np.int64]
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    texts: TextShapes = field(default_factory=TextShapes)

    def raw(self, encoded: Encoded, types: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated parts of n distinct events, float64 [n] by name, without texts. types: int64 [n]."""
        return {
            FOR_ACTOR: encoded.max_surprise_for_actor.astype(np.float64),
            FOR_TYPE: encoded.max_surprise.astype(np.float64),
            NUMBERS: encoded.number_surprise.astype(np.float64),
            FAR: self.groups(encoded.vectors, types),
            NEAR: self.baseline.search(encoded.vectors, 1)[0][:, 0].astype(np.float64),
            REPLACED: encoded.replaced.astype(np.float64),
        }

    def fit(
        self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64], text: NDArray[np.float64] | None = None
    ) -> None:
        """Calibrate on the raw parts of held-out events. text: float64 [n], the surprise of their texts (None: it is
        not known, and no texts are judged)."""
        every = np.ones(len(types), np.bool_)
        for name, score in raw.items():
            self._calibrate(name, score, types, self._speaks(name, score, types))
        parts = self.parts(raw, types)
        if text is not None:
            self._calibrate(TEXT, text, types, every)
            parts = self.with_text(parts, text, types)
        self._calibrate(RECORD, parts.sum(0), types, every)

    def _calibrate(
        self, name: str, scores: NDArray[np.float64], types: NDArray[np.int64], speaks: NDArray[np.bool_]
    ) -> None:
        if speaks.any():
            self.calibrations[name] = Calibration.fit(scores[speaks])
        for scope in self._scopes(types):
            for each in np.unique(scope[speaks & (scope >= 0)]).tolist():
                rows = speaks & (scope == each)
                if rows.sum() >= OWN_CALIBRATION:
                    self.calibrations[f"{name}.{each}"] = Calibration.fit(scores[rows])

    def parts(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [7, n], nats: the evidence of each of PARTS, 0 where it does not speak. That of texts follows by
        `with_text`: equal features may come with many texts."""
        evidence = np.zeros((len(PARTS), len(types)))
        for name, score in raw.items():
            evidence[PARTS.index(name)] = self.part(name, score, types)
        return evidence

    def part(self, name: str, raw: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [n], nats: the evidence of one of PARTS but that of texts, 0 where it does not speak."""
        return np.where(self._speaks(name, raw, types), self._calibrated(name, raw, types), 0.0)

    def with_text(
        self, parts: NDArray[np.float64], surprise: NDArray[np.float64], types: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The parts of n events with that of their texts. surprise: float64 [n], nats, of the texts; types: int64 [n].

        A rare value and an unusual part of it are one piece of news: the text counts for what it says beyond the
        values. Its surprise is -log p of one part already, and calibration can only make less of the largest of many.
        """
        whole = parts.copy()
        evidence = np.minimum(self._calibrated(TEXT, surprise, types), surprise)
        whole[PARTS.index(TEXT)] = np.maximum(evidence - parts[_VALUES].sum(0), 0.0)
        return whole

    def evidence(self, parts: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [7, n] to float64 [n], nats: all parts as one. types: int64 [n]."""
        return self._calibrated(RECORD, parts.sum(0), types)

    def _calibrated(self, name: str, scores: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [n], nats: by the narrowest calibration that there is, 0 where there is none."""
        whole = self.calibrations.get(name)
        evidence = np.zeros(len(scores)) if whole is None else whole.evidence(scores)
        for scope in self._scopes(types):
            for each in np.unique(scope).tolist():
                if (own := self.calibrations.get(f"{name}.{each}")) is not None:
                    rows = scope == each
                    evidence[rows] = own.evidence(scores[rows])
        return evidence

    def _scopes(self, types: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What each of n events is compared with, int64 [n] each, the narrower last: events of types that carry
        quantities (1) or do not (0), because other parts speak of these; and of these the events of its product (-1:
        it has none)."""
        measured = self.measured(types).astype(np.int64)
        known = types < len(self.products)
        product = np.where(known, self.products[np.where(known, types, 0)], 0)
        return measured, np.where(product > 0, measured + 2 * product, -1)

    def _speaks(self, name: str, raw: NDArray[np.float64], types: NDArray[np.int64]) -> NDArray[np.bool_]:
        if name == FOR_TYPE:
            return ~self.measured(types)
        return self.measured(types) if name == REPLACED else ~np.isnan(raw)

    def measured(self, types: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n]: which events are of a type that carries quantities; the network judges these alone."""
        return np.isin(types, self.quantities)


def strongest(parts: NDArray[np.float64], named: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [n]: whether one of some parts is odder than all others. parts: float64 [p, n]; named: bool [p]."""
    larger: NDArray[np.bool_] = parts[named].max(0) > parts[~named].max(0)
    return larger


def by_text(parts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [n]: whether the texts are odder than the values and the event as a whole. parts: float64 [7, n]."""
    beyond = parts[PARTS.index(TEXT)]
    others = parts[[PARTS.index(name) for name in (NUMBERS, FAR, NEAR, REPLACED)]].max(0)
    largest: NDArray[np.bool_] = (beyond > 0) & (beyond + parts[_VALUES].sum(0) >= others)
    return largest
