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

from encoder.entities import KINDS
from encoder.runtime import Encoded
from encoder.sequence import SequenceModel
from state.baseline import Baseline, Density
from state.calibration import FEW, Calibration
from state.habits import GROUPS, STRANGER, Excess, Habits
from state.tally import LEVELS
from state.windows import Windows
from streamer.at_once import OverlapScorer

DENSITY_TRUST = 2.0
"""How much more density is trusted than surprise: it speaks only where events carry quantities, and there it is the
best, most of all where training held unlabelled attacks. Measured in docs/detection.md."""
HALF = 0.5
"""The share of an event's attributes that are quantities from which on density is trusted wholly; below, in proportion:
four numbers among twenty names are not what makes the event."""
SEQUENCE_DOUBT = 5.0
"""Nats of a sequence's evidence that count for nothing: the order of what a machine does varies more than what it does,
so what one window in a hundred and fifty shows says nothing."""
PIECES = ("correlation", "process", "session")
"""Kinds of entity that are one piece of work, in which small oddities add up. Those of a user or host do not: one odd
program and the mail read meanwhile are two things."""
SEVERAL = 4
"""Different records from which on a piece of work is more than each of them."""
LEAST_SCALE = 0.5
"""Of the tail of what adds up, in standard deviations: that of training, where routines go all alike, can be as thin as
a hair, and then the first that is a little different would be impossible."""
PART_OF = 4.0
"""At most this (nats) does one event add to its piece of work: several that are odd, and not one that is very odd."""
SHARPNESS = 3.0
"""Of the norm that joins density and surprise: 1 would add them up, and unlabelled attacks in training, for which
density alone is any good, would count by half; infinity would be the stronger of the two."""
NOVELTY_TRUST = 2 / 3
"""Of the distance to the nearest, beside the two countings, which say much of the same."""
MISSING_TRUST = 0.7
OVERLAP_TRUST = 0.7
"""Against the record score: measured in docs/detection.md."""
BLEND = 0.01
"""How much the weaker of record and history adds to the stronger: an order among events that it puts level."""
MIN_ENTITIES = 20
"""From so many on a group of them tells what others may do: the habits of three hosts say nothing of a fourth."""
NEIGHBOURS = 3
ORDER, TOGETHER, MISSING = "sequence:order", "sequence:together", "sequence:missing"
"""Causes: that the newest record came after those before, that they are all a little odd, and that something usual did
not come before it."""
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
    those before), `together` (how odd its records are one by one, added up), `missing` (what usually comes shortly
    before the newest) and `ending` (nothing after it, for kinds of entity whose routines end). All but the last are
    calibrated again by event: one that is part of four windows has four chances to look odd.
    """

    model: SequenceModel
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def raw(self, windows: Windows, kinds: NDArray[np.int8], *, few: bool = False) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated scores of m windows, float64 [m] by name; kinds: int8 [m]; few: as for the model."""
        scores = self.model(windows.vectors[:, :, :-1], windows.times, windows.length, kinds, few=few)
        named = {"order": scores.surprise, "missing": scores.missing, "ending": scores.ending}
        found = {name: score.astype(np.float64) for name, score in named.items()}
        return found | {"together": _together(windows.vectors, windows.mask)}

    def fit(
        self,
        raw: dict[str, NDArray[np.float64]],
        kinds: NDArray[np.int8],
        ended: NDArray[np.bool_],
        rows: NDArray[np.int32],
    ) -> None:
        """Calibrate on held-out windows; ended: bool [m], those after which nothing came for long enough; rows: int32
        [m], the event that each ends at."""
        every, piece = np.ones(len(kinds), bool), np.isin(kinds, [KINDS.index(kind) for kind in PIECES])
        for name, rows_of, tail in (
            ("order", every, {}),
            ("together", piece & (raw["together"] > 0), {"least_scale": LEAST_SCALE}),
            ("missing", every, {"tail_from": FEW}),
            ("ending", ended, {}),
        ):
            for kind in np.unique(kinds[rows_of]).tolist():
                self.calibrations[f"{name}.{kind}"] = Calibration.fit(raw[name][rows_of & (kinds == kind)], **tail)
        for name, tail_from in (("order", None), ("together", None), ("missing", FEW)):
            if (known := np.isfinite(raw[name])).any():
                by_event = _by_event(self.evidence(name, raw, kinds)[known], rows[known])
                self.calibrations[name] = Calibration.fit(by_event, tail_from=tail_from)

    def evidence(self, name: str, raw: dict[str, NDArray[np.float64]], kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m], nats: against each window by one of `raw`, of which `ending` is against its being the last. A
        kind of entity that was not among the held-out events has none, nor have oddities that do not add up."""
        found = np.zeros(len(kinds))
        speaks = raw[name] > 0 if name == "together" else np.ones(len(kinds), bool)
        for kind in np.unique(kinds).tolist():
            if (calibration := self.calibrations.get(f"{name}.{kind}")) is not None:
                rows = (kinds == kind) & speaks
                found[rows] = calibration.evidence(raw[name][rows])
        if (by_event := self.calibrations.get(name)) is not None:
            found = by_event.evidence(found)
        return found


def remembered(vectors: NDArray[np.float16], record: NDArray[np.float64]) -> NDArray[np.float16]:
    """What a window keeps of each of n events, float16 [n, d + 1]: its behaviour, [n, d], and the evidence against its
    record, [n], in nats; negative: not known."""
    return np.column_stack([vectors, record.astype(np.float16)])


def _together(vectors: NDArray[np.float16], used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """float64 [m]: by how many standard deviations the evidence against the records of each window exceeds what that of
    normal ones adds up to: 1 each, and varying by 1. The same done again is not odd again: of like records the first
    counts. NaN where there are not SEVERAL or it is not known of all of them. vectors: float16 [m, W, d + 1], as
    remembered; used: bool [m, W]."""
    record = vectors[:, :, -1].astype(np.float64)
    behaviour = np.ascontiguousarray(vectors[:, :, :-1]).view(np.int16).astype(np.int64)
    like = behaviour @ np.random.default_rng(0).integers(-(2**62), 2**62, behaviour.shape[2])  # wraps around: a hash
    order = np.argsort(like, axis=1, kind="stable")
    ordered = np.take_along_axis(like, order, axis=1)
    again = np.zeros_like(used)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    counted = used & ~again
    n = counted.sum(1)
    total = np.where(counted, np.minimum(record, PART_OF), 0.0).sum(1)
    excess = (total - n) / np.sqrt(np.maximum(n, 1))
    return np.where((n < SEVERAL) | (used & (record < 0)).any(1), np.nan, excess)


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
        """Evidence of both, float64 [n] in nats, to p-values."""
        return self.event.p_value(joined(record, history))


def beyond_doubt(sequence: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, nats: what of the evidence of an order or an ending counts."""
    beyond: NDArray[np.float64] = np.maximum(sequence - SEQUENCE_DOUBT, 0.0)
    return beyond


def weighed(
    order: NDArray[np.float64],
    together: NDArray[np.float64],
    missing: NDArray[np.float64],
    rate: NDArray[np.float64],
    overlap: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [5, m], nats: the evidence of an entity's history, each part by its trust; the strongest counts."""
    return np.stack([beyond_doubt(order), together, MISSING_TRUST * missing, rate, OVERLAP_TRUST * overlap])


def joined(record: NDArray[np.float64], history: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [n], nats: the stronger of record and (weighed) history."""
    return np.maximum(record, history) + BLEND * history
