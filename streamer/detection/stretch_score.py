"""The stretch score: how unlike normal stretches what an entity did in its whole window is.

Two statistics of the window, beside the scores of its newest event (`streamer.detection.sequence_score`).
`composition`: the distance of its sequence embedding (`encoder.models.sequence_embedding`) to the nearest of normal
windows of its kind of entity, in an HNSW index: each event may be usual, and each after the other; that they come
together is not. `run`: the mean surprise of its steps: many mildly unusual steps count, though none is odd by itself.

Both are calibrated by lives: how often a normal entity of the kind ever reaches so much, so that an entity does not
become suspicious by living long. Evidence is limited to what the number of entities in training can show: three hosts
say little about a fourth. It knows codes and kinds, not names, and keeps no state: windows say all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from encoder.models.sequence_embedding import sequence_embeddings
from encoder.models.sequence_model import SequenceModel
from encoder.ocsf.entities import KINDS
from state.baseline.baseline import Baseline
from state.calibration import Calibration
from state.windows import Windows
from streamer.detection.sequence_score import strongest_by_event

COMPOSITION, RUN = "composition", "run"
STATISTICS = (COMPOSITION, RUN)
MOST = 8192
"""Distinct normal windows in the index of a kind."""
LIVES = 50
"""A kind with fewer held-out entities is calibrated by parts of them, so many periods of time."""
USUAL_STEPS = 64
"""Steps of usual surprise that are added to a window: of few steps, even a large mean says little."""


@dataclass
class NormalStretches:
    """The normal windows of a kind of entity. index: of their embeddings; codes: int16 [count, W], their codes, by
    place in the index, -1 in unused slots; entities: how many entities they are of; usual: the mean surprise of a step,
    nats."""

    index: Baseline
    codes: NDArray[np.int16]
    entities: int
    usual: float = 0.0


@dataclass
class StretchScorer:
    """Judges windows as a whole. normal: by kind of entity (its place in `KINDS`); calibrations: by statistic, for each
    kind and by event."""

    model: SequenceModel
    normal: dict[int, NormalStretches] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def learn(self, codes: NDArray[np.int16], kinds: NDArray[np.int8], entity: NDArray[np.int64], *, seed: int) -> None:
        """Index m normal windows. codes: int16 [m, W], of `SequenceModel.codes`; kinds: int8 [m]; entity: int64 [m],
        whose they are."""
        for kind in np.unique(kinds).tolist():
            rows = np.flatnonzero(kinds == kind)
            index = Baseline.build(self.embeddings(codes[rows]), seed=seed, most=MOST)
            self.normal[kind] = NormalStretches(index, codes[rows[index.members]], len(np.unique(entity[rows])))

    def fit(
        self,
        codes: NDArray[np.int16],
        surprise: NDArray[np.float64],
        steps: NDArray[np.int64],
        kinds: NDArray[np.int8],
        entity: NDArray[np.int64],
        time: NDArray[np.int64],
        rows: NDArray[np.int32],
    ) -> dict[str, NDArray[np.float64]]:
        """Calibrate on m held-out windows in order of time, and return their raw statistics. codes, surprise, steps,
        kinds: as for `statistics`; entity: int64 [m]; time: int64 [m], event ms; rows: int32 [m], ascending, the event
        of each."""
        for kind, normal in self.normal.items():
            own = kinds == kind
            normal.usual = float(surprise[own].sum() / max(int(steps[own].sum()), 1))
        raw = self.statistics(codes, surprise, steps, kinds)
        for kind in self.normal:
            of_kind = np.flatnonzero(kinds == kind)
            if len(of_kind):
                life = _lives(entity[of_kind], time[of_kind])
                for name in STATISTICS:
                    reached = np.full(life.max() + 1, -np.inf)
                    np.maximum.at(reached, life, raw[name][of_kind])
                    self.calibrations[f"{name}.{kind}"] = Calibration.fit(reached)
        for name in STATISTICS:
            if len(rows):
                by_event = strongest_by_event(self.by_lives(name, raw[name], kinds), rows)
                self.calibrations[name] = Calibration.fit(by_event)
        return raw

    def embeddings(self, codes: NDArray[np.int16]) -> NDArray[np.float16]:
        """float16 [m, DIM] of codes, int16 [m, W]."""
        return sequence_embeddings(codes, self.model.codebook.other + 1)

    def raw(self, windows: Windows, kinds: NDArray[np.int8]) -> dict[str, NDArray[np.float64]]:
        """The uncalibrated statistics of m windows, float64 [m] by name. kinds: int8 [m]."""
        codes = self.model.codes(windows.vectors, windows.length)
        return self.statistics(codes, *self.model.total_surprise(windows.vectors, windows.times, kinds, codes), kinds)

    def statistics(
        self,
        codes: NDArray[np.int16],
        surprise: NDArray[np.float64],
        steps: NDArray[np.int64],
        kinds: NDArray[np.int8],
    ) -> dict[str, NDArray[np.float64]]:
        """As `raw`, of what the model says of the windows (`SequenceModel.codes`, `total_surprise`)."""
        usual = np.array([self.normal[kind].usual if kind in self.normal else 0.0 for kind in range(len(KINDS))])
        excess = (surprise - steps * usual[kinds]) / (steps + USUAL_STEPS)
        return {COMPOSITION: self.nearest(codes, kinds)[0], RUN: excess}

    def nearest(
        self, codes: NDArray[np.int16], kinds: NDArray[np.int8]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of m windows, float64 [m], the distance to the nearest normal one (0 to 2; 0 for a kind without any) and
        int64 [m], its place in the index of the kind (-1)."""
        distance, place = np.zeros(len(kinds)), np.full(len(kinds), -1, np.int64)
        for kind, normal in self.normal.items():
            rows = np.flatnonzero(kinds == kind)
            if len(rows):
                found = normal.index.search(self.embeddings(codes[rows]), 1)
                distance[rows], place[rows] = found[0][:, 0], found[1][:, 0]
        return distance, place

    def evidence(
        self, raw: Mapping[str, NDArray[np.float64]], kinds: NDArray[np.int8], rows: NDArray[np.int32], events: int
    ) -> NDArray[np.float64]:
        """float64 [events], nats: both statistics added up, each of the event's window that is most unusual by it.
        rows: int32 [m], the event of each window."""
        evidence = np.zeros(events)
        judged = np.unique(rows)
        for name in STATISTICS:
            if (by_event := self.calibrations.get(name)) is not None:
                strongest = np.zeros(events)
                np.maximum.at(strongest, rows, self.by_lives(name, raw[name], kinds))
                evidence[judged] += _limited(by_event.evidence(strongest[judged]), len(by_event.scores))
        return evidence

    def by_lives(self, name: str, raw: NDArray[np.float64], kinds: NDArray[np.int8]) -> NDArray[np.float64]:
        """float64 [m], nats: how seldom a normal life reaches so much of a statistic; 0 for a kind that is not
        calibrated. raw: float64 [m]; kinds: int8 [m]."""
        evidence = np.zeros(len(kinds))
        for kind, normal in self.normal.items():
            if (calibration := self.calibrations.get(f"{name}.{kind}")) is not None:
                rows = kinds == kind
                evidence[rows] = _limited(calibration.evidence(raw[rows]), normal.entities)
        return evidence


def _limited(evidence: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """No more than n normal ones can show; a small slope keeps the order of what is beyond."""
    most = np.log(n + 1)
    limited: NDArray[np.float64] = np.minimum(evidence, most) + 1e-3 * np.maximum(evidence - most, 0.0)
    return limited


def _lives(entity: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.intp]:
    """intp [m]: a number for the life that each window is of; where entities are few, for the part of it."""
    names, life = np.unique(entity, return_inverse=True)
    if len(names) < LIVES:
        span = max(int(time.max() - time.min()), 1)
        part = np.minimum((time - time.min()) * LIVES // span, LIVES - 1)
        _, life = np.unique(life * LIVES + part, return_inverse=True)
    return life
