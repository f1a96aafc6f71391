"""From distances and surprises to one p-value an event.

Each part of the record and the sequence score is calibrated on held-out normal data, so that they can be compared, and
the event is as unusual as the strongest of them says, each weighed by how far it is to be trusted. The result is
calibrated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_encoder import Encoded
from encoder.models.sequence_model import SequenceModel
from state.baseline.baseline import Baseline, Density
from state.calibration import FEW, Calibration
from state.rate_profiles import GROUPS, STRANGER, Excess, Habits
from state.rolling_counts import LEVELS
from state.windows import Windows
from streamer.detection.cooccurrence_score import OverlapScorer

DENSITY_TRUST = 2.0
"""How much more density is trusted than surprise: it speaks only where events carry quantities, and there it is the
best, most of all where training held unlabelled attacks. Measured in docs/detection.md."""
HALF = 0.5
"""The share of an event's attributes that are quantities from which on density is trusted wholly; below, in proportion:
four numbers among twenty names are not what makes the event."""
SEQUENCE_DOUBT = 5.0
"""Nats of a sequence's evidence that count for nothing: the order of what a machine does varies more than what it does,
so what one window in a hundred and fifty shows says nothing."""
SHARPNESS = 3.0
"""Of the norm that joins density and surprise: 1 would add them up, and unlabelled attacks in training, for which
density alone is any good, would count by half; infinity would be the stronger of the two."""
NOVELTY_TRUST = 2 / 3
"""Of the distance to the nearest, beside the two countings, which say much of the same."""
MISSING_TRUST = 0.7
OVERLAP_TRUST = 0.7
"""Against the record score: measured in docs/detection.md."""
HISTORY_TRUST = 4 / 3
"""How much more all that history says is trusted than what a record says: every day brings odd records, and few odd
histories. Measured there, too."""
BLEND = 0.01
"""How much the weaker of record and history adds to the stronger: an order among events that it puts level."""
MIN_ENTITIES = 20
"""From so many on a group of them tells what others may do: the habits of three hosts say nothing of a fourth."""
ALIKE = 0.1
"""Nats: held-out events that lie so near to the strongest are one story with it."""
NEIGHBOURS = 3
ORDER, MISSING = "sequence:order", "sequence:missing"
"""Causes: that the newest record came after those before, and that something usual did not come before it."""
SEVERITY_PER_DECADE = 12.5
_SURPRISES = {"odd_value": 1.0, "odd_for_actor": 1.0, "novelty": NOVELTY_TRUST}


@dataclass(frozen=True)
class Parts:
    """Evidence against each of n events, float64 [n] in nats, 0 for nothing. density: it lies apart from events of its
    type; surprise: its values are odd, by themselves or for who acts, or there was never an event like it."""

    density: NDArray[np.float64]
    surprise: NDArray[np.float64]

    def combined(self) -> NDArray[np.float64]:
        """Both, weighed: little more than the stronger."""
        powers = (DENSITY_TRUST * self.density) ** SHARPNESS + self.surprise**SHARPNESS
        norm: NDArray[np.float64] = powers ** (1 / SHARPNESS)
        return norm


@dataclass
class RecordScorer:
    """The record score: what it compares with and how it is calibrated (by name; density by event type).

    quantities: float64 [types of density], the share of an event's attributes that are quantities.
    """

    baseline: Baseline
    density: Density
    quantities: NDArray[np.float64]
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, encoded: Encoded, types: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated scores of n distinct events, float64 [n] by name."""
        return {
            "odd_value": encoded.odd_value.astype(np.float64),
            "odd_for_actor": encoded.odd_for_actor.astype(np.float64),
            "novelty": self.baseline.search(encoded.vectors, NEIGHBOURS)[0].mean(1).astype(np.float64),
            "density": self.density(encoded.vectors, types),
        }

    def fit(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> None:
        """Calibrate on the raw scores of held-out events."""
        for name in _SURPRISES:
            self.calibrations[name] = Calibration.fit(raw[name])
        density = raw["density"]
        for kind in self.density.types.tolist():
            scores = density[(types == kind) & np.isfinite(density)]
            if len(scores):
                self.calibrations[f"density.{kind}"] = Calibration.fit(scores)
        self.calibrations["surprise"] = Calibration.fit(self._surprise(raw))
        self.calibrations["record"] = Calibration.fit(self.parts(raw, types).combined())

    def _surprise(self, raw: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The evidence of the three added up: Fisher's method, but for their dependence, and so calibrated after."""
        parts = [trust * self.calibrations[name].evidence(raw[name]) for name, trust in _SURPRISES.items()]
        total: NDArray[np.float64] = np.sum(parts, axis=0)
        return total

    def parts(self, raw: dict[str, NDArray[np.float64]], types: NDArray[np.int64]) -> Parts:
        """The evidence of each part."""
        density = np.zeros(len(types))
        for kind, quantities in zip(self.density.types.tolist(), self.quantities.tolist(), strict=True):
            rows = types == kind
            if (calibration := self.calibrations.get(f"density.{kind}")) is not None and rows.any():
                density[rows] = calibration.evidence(raw["density"][rows]) * min(quantities / HALF, 1.0)
        return Parts(density, self.calibrations["surprise"].evidence(self._surprise(raw)))

    def evidence(self, parts: Parts) -> NDArray[np.float64]:
        """float64 [n], nats: all parts as one."""
        return self.calibrations["record"].evidence(parts.combined())


def severity(p_value: NDArray[np.float64]) -> NDArray[np.float32]:
    """0 to 100, 12.5 for each power of ten by which normal data is rarer than this: 50 is one in ten thousand events,
    100 one in a hundred million. It means the same in every bundle."""
    return np.clip(-SEVERITY_PER_DECADE * np.log10(p_value), 0, 100).astype(np.float32)


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
            by_event = _by_event(self.evidence(name, raw, kinds), rows)
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


def _by_event(evidence: NDArray[np.float64], rows: NDArray[np.int32]) -> NDArray[np.float64]:
    """The strongest of each event's pairs: float64 [m] and ascending int32 [m] to float64 [events]."""
    _, event = np.unique(rows, return_inverse=True)
    strongest = np.zeros(int(event.max(initial=-1)) + 1)
    np.maximum.at(strongest, event, evidence)
    return strongest


@dataclass
class RateScorer:
    """How much an entity does, fails, reaches and sends, against its own habits.

    Calibrated for each count by kind of entity and by how well the entity is known, on training judged block by block;
    then by kind, and by event, most of which raise nothing.
    """

    habits: Habits
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def fit(self, excess: Excess, kinds: NDArray[np.int8], entities: Sequence[str], rows: NDArray[np.int32]) -> None:
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
        self.calibrations["rate"] = Calibration.fit(_by_event(self.evidence(excess, kinds)[0], rows))

    def _calibrate(
        self, name: str, over: NDArray[np.float64], rows: NDArray[np.bool_], entity: NDArray[np.intp]
    ) -> None:
        if len(np.unique(entity[rows])) >= MIN_ENTITIES:
            self.calibrations[name] = Calibration.fit(over[rows])

    def evidence(self, excess: Excess, kinds: NDArray[np.int8]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
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

    def _strongest(self, excess: Excess, kinds: NDArray[np.int8]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        found = self.by_count(excess, kinds)
        return found.max(1, initial=0.0), found.argmax(1).astype(np.int8)

    def by_count(self, excess: Excess, kinds: NDArray[np.int8]) -> NDArray[np.float64]:
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


@dataclass
class Scorer:
    """Record and history joined: the event is as unusual as the stronger of the two says, calibrated again.

    sequences and rates: None where no event of training named an entity; overlaps: None where none named a user.
    """

    record: RecordScorer
    sequences: SequenceScorer | None
    rates: RateScorer | None
    event: Calibration
    overlaps: OverlapScorer | None

    def p_value(self, record: NDArray[np.float64], history: NDArray[np.float64]) -> NDArray[np.float64]:
        """Evidence of both, float64 [n] in nats, to p-values.

        Beyond the sample they fall no faster than the evidence, and not before it is stronger than the sample can say:
        a story that nobody saw may well have as many events as the strongest of those that were held out.
        """
        evidence = joined(record, history)
        held_out = self.event.scores
        alike = len(held_out) - np.searchsorted(held_out, held_out[-1] - ALIKE)
        # A little less for more evidence, so that the order stays.
        as_rare = (1 + alike) / (len(held_out) + 1) * np.exp(-0.001 * evidence)
        found: NDArray[np.float64] = np.maximum(self.event.p_value(evidence), np.minimum(as_rare, np.exp(-evidence)))
        return found


def beyond_doubt(sequence: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, nats: what of the evidence of an order or an ending counts."""
    beyond: NDArray[np.float64] = np.maximum(sequence - SEQUENCE_DOUBT, 0.0)
    return beyond


def weighed(
    order: NDArray[np.float64],
    missing: NDArray[np.float64],
    rate: NDArray[np.float64],
    overlap: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [4, m], nats: the evidence of an entity's history, each part by its trust; the strongest counts."""
    return HISTORY_TRUST * np.stack([beyond_doubt(order), MISSING_TRUST * missing, rate, OVERLAP_TRUST * overlap])


def joined(record: NDArray[np.float64], history: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [n], nats: the stronger of record and (weighed) history."""
    return np.maximum(record, history) + BLEND * history
