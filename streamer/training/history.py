"""Fits the parts that judge entities by what came before: sequences, stretches, rates and places at once.

All of training goes through windows as it would live, so that the held-out events calibrate on the histories that they
had. Promises nothing about single records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from encoder.ocsf.activity_counts import ActivityCounts
from encoder.ocsf.entities import KINDS, Entities
from encoder.training.sequence import SequenceReport, fit_sequences
from state.cooccurrence import CooccurrenceCounts, near
from state.memory.windows import MemoryWindows
from state.rate_profiles import RateProfiles
from state.windows import WindowEntries
from streamer.detection.combine import in_doubt, weighted
from streamer.detection.cooccurrence_score import JUDGED, CooccurrenceScorer
from streamer.detection.rate_score import RateScorer
from streamer.detection.sequence_score import SequenceScorer
from streamer.detection.stretch_score import StretchScorer

StageProgress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total or 0, what to show beside it)."""
MAX_STRETCHES = 1_000_000
"""Windows of training from which those of the index are drawn; of more, every k-th."""
MAX_ENTITIES = 50_000
"""Entities whose windows are held at once while training is replayed, some 7 kB each; the longest unseen go first."""


@dataclass(frozen=True)
class TrainingHistory:
    """n events of training as entities did them, in order of event time.

    entities, activity_counts: of the pairs of event and entity; time: int64 [n], event ms; vectors: float16 [n, d],
    anonymised embeddings; whole: whether these are all events, and not a sample.
    """

    entities: Entities
    activity_counts: ActivityCounts
    time: NDArray[np.int64]
    vectors: NDArray[np.float16]
    whole: bool


@dataclass(frozen=True)
class FittedHistory:
    """The parts that judge entities by what came before (None where the held-out events, or all others, name no
    entity). evidence, by_stretch: float64 [h], nats, theirs against each held-out event."""

    evidence: NDArray[np.float64]
    by_stretch: NDArray[np.float64]
    sequences: SequenceScorer | None = None
    rates: RateScorer | None = None
    cooccurrence: CooccurrenceScorer | None = None
    stretch: StretchScorer | None = None
    report: SequenceReport | None = None


def fit_history(
    history: TrainingHistory,
    held: NDArray[np.bool_],
    by_record: NDArray[np.float64],
    *,
    seed: int,
    device: torch.device,
    checkpoint: Path,
    tell: StageProgress,
) -> FittedHistory:
    """Fit to the history of n events. held: bool [n], which are held out; by_record: float64 [h], nats, the evidence
    against these by themselves; checkpoint: a file from which training resumes after a kill."""
    pairs, vectors, time = history.entities, history.vectors, history.time
    evidence = np.zeros(len(held))
    judged = np.flatnonzero(held[pairs.row])
    if len(judged) in (0, len(pairs)):
        return FittedHistory(evidence[held], evidence[held])
    tell("sequences", 0, 0, "")
    model, report = fit_sequences(
        vectors,
        time,
        pairs,
        withheld=held,
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=lambda step, steps, loss: tell("sequences", step, steps, f"loss {loss:.3f}"),
    )
    sequences = SequenceScorer(model)
    replayed = _replayed(sequences, history, held)
    raw, cooccurrence = replayed.raw, replayed.cooccurrence
    last = dict(zip(pairs.entity, range(len(pairs.entity)), strict=True))
    is_last = np.zeros(len(pairs.entity), bool)
    is_last[list(last.values())] = True
    timeout = np.array([model.timeouts.get(kind, 0) for kind in KINDS], np.int64)[pairs.kind]
    ended = is_last & (timeout > 0) & (time[-1] - time[pairs.row] > timeout)
    kinds = pairs.kind[judged]
    sequences.fit(raw, kinds, ended[judged], pairs.row[judged])
    profiles, excess = RateProfiles.fit(pairs.entity, pairs.kind, replayed.levels, time[pairs.row], kinds=len(KINDS))
    rates = RateScorer(profiles)
    by_user = np.zeros(len(judged))
    if history.whole:  # Of a sample, every count would be too low.
        rates.fit(excess, pairs.kind, pairs.entity, pairs.row)
        if len(replayed.overlap):
            cooccurrence.fit(replayed.overlap, int(held.sum()))
            by_user[kinds == JUDGED], _ = cooccurrence.evidence(replayed.overlap)
    rate, _ = rates.evidence(excess.take(judged), kinds)
    order, missing = (sequences.evidence(name, raw, kinds) for name in ("order", "missing"))
    np.maximum.at(evidence, pairs.row[judged], weighted(order, missing, rate, by_user).max(0))
    tell("stretches", 0, 0, "")
    stretch, learned, entity = StretchScorer(model), replayed.learned, replayed.entity
    stretch.learn(replayed.codes[learned], pairs.kind[learned], entity[learned], seed=seed)
    rows = np.cumsum(held, dtype=np.int32)[pairs.row[judged]] - 1
    moments = time[pairs.row[judged]]
    of_stretch = stretch.fit(replayed.codes[judged], *replayed.total_surprise, kinds, entity[judged], moments, rows)
    doubtful = np.flatnonzero(in_doubt(by_record, evidence[held])[rows])
    of_doubtful = {name: each[doubtful] for name, each in of_stretch.items()}
    by_stretch = stretch.evidence(of_doubtful, kinds[doubtful], rows[doubtful], len(by_record))
    return FittedHistory(evidence[held], by_stretch, sequences, rates, cooccurrence, stretch, report)


@dataclass(frozen=True)
class _Replayed:
    """What windows showed when all pairs went through them, as live.

    raw: the scores of the pairs of held-out events, by name; levels: uint8 [pairs, 8], what all raised; cooccurrence:
    learned from the pairs of other events; overlap: float64 [k, PARTNERS], how surprising partners are of the held-out
    ones that are judged by it; learned: intp, pairs of other events, whose windows are taken for normal; codes: int16
    [pairs, W], of the windows of the held-out and the learned ones; total_surprise: of those of the
    held-out ones, as `SequenceModel.total_surprise`; entity: int64 [pairs].
    """

    raw: dict[str, NDArray[np.float64]]
    levels: NDArray[np.uint8]
    cooccurrence: CooccurrenceScorer
    overlap: NDArray[np.float64]
    codes: NDArray[np.int16]
    total_surprise: tuple[NDArray[np.float64], NDArray[np.int64]]
    entity: NDArray[np.int64]
    learned: NDArray[np.intp]


def _replayed(scorer: SequenceScorer, history: TrainingHistory, held: NDArray[np.bool_]) -> _Replayed:
    pairs, vectors = history.entities, history.vectors
    judged = np.flatnonzero(held[pairs.row])
    counts = CooccurrenceCounts()
    at_once: list[tuple[list[str], NDArray[np.int16], NDArray[np.int16]]] = []
    windows = MemoryWindows(dim=vectors.shape[1], max_entities=MAX_ENTITIES)
    model = scorer.model
    found: list[dict[str, NDArray[np.float64]]] = []
    surprises: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
    levels: list[NDArray[np.uint8]] = []
    others = np.flatnonzero(~held[pairs.row])
    learned = others[:: -(-len(others) // MAX_STRETCHES) or 1]
    codes = np.full((len(pairs.row), windows.width), -1, np.int16)
    coded = np.zeros(len(pairs.row), np.bool_)
    coded[learned] = coded[judged] = True
    step = 8192
    for start in range(0, len(pairs.row), step):
        rows, kinds = pairs.row[start : start + step], pairs.kind[start : start + step]
        entries = WindowEntries(
            pairs.entity[start : start + step],
            np.maximum(history.time[rows], 0),
            vectors[rows],
            (("training", 0),),
            np.zeros(len(rows), np.int32),
            rows.astype(np.int64),
            np.zeros(len(rows), np.int32),
            history.activity_counts.take(slice(start, start + step)),
        )
        seen = windows.append(entries)
        windows.committed({("training", 0): int(rows[-1])})
        levels.append(seen.levels)
        here = judged[slice(*np.searchsorted(judged, (start, start + step)))] - start
        chosen = np.flatnonzero(coded[start : start + step])
        codes[start + chosen] = model.codes(seen.vectors[chosen], seen.length[chosen])
        if len(here):
            own = seen.take(here)
            found.append(scorer.raw(own, kinds[here]))
            surprises.append(model.total_surprise(own.vectors, own.times, kinds[here], codes[start + here]))
        for later in (False, True):
            users = np.flatnonzero((kinds == JUDGED) & (held[rows] == later))
            names = [pairs.entity[start + i] for i in users.tolist()]
            if later:
                at_once.append((names, *near(seen.take(users))))
            else:
                counts.add(names, *near(seen.take(users)))
    cooccurrence = counts.finish()
    surprise = np.concatenate([cooccurrence.surprise(*part) for part in at_once])
    raw = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    _, entity = np.unique(np.array(pairs.entity, object).astype(str), return_inverse=True)
    total = np.concatenate([each for each, _ in surprises]), np.concatenate([steps for _, steps in surprises])
    places = CooccurrenceScorer(cooccurrence)
    return _Replayed(raw, np.concatenate(levels), places, surprise, codes, total, entity.astype(np.int64), learned)
