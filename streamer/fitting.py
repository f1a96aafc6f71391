"""Fitting: unlabelled events in, a bundle out.

Two passes over the files: the first learns the schema, the second the rest. The latest part in event time is held out
from everything that is fitted, and calibrates: a score judged by the events it was made from would never be unusual.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from encoder.events import EventBatch, decode
from encoder.rarity import ContextRarity
from encoder.runtime import Encoder
from encoder.schema import Schema, SchemaLearner
from encoder.training import TrainingReport, train
from encoder.vectorize import FeatureBatch, Vectorizer
from state.baseline import Baseline, Density
from streamer.bundle import Bundle, save
from streamer.detector import compact
from streamer.errors import RipcurrentError
from streamer.files import batches
from streamer.redaction import Redactor
from streamer.scoring import RecordScorer

HELD_OUT = 0.15
"""The latest share of the training events, by event time, that calibrates."""
MIN_EVENTS = 20
MAX_EVENTS = 2_000_000
"""Events kept as features (about 400 bytes each); of more, every k-th is used, and the summary says so."""
DAY_MS = 86_400_000

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total or 0, what to show beside it)."""


class FitError(RipcurrentError):
    """Training events that no detector can be made of."""


@dataclass(frozen=True)
class Fitted:
    """A bundle and what was learned on the way to it."""

    bundle: Bundle
    events: int
    used: int
    rejects: int
    repairs: Counter[str]
    seconds: float
    report: TrainingReport


@dataclass
class _Loaded:
    schema: Schema
    features: FeatureBatch
    time: NDArray[np.int64]
    records: list[bytes]
    events: int
    rejects: int
    repairs: Counter[str]


def fit(
    paths: Sequence[Path], out: Path, *, seed: int = 0, device: str = "cpu", progress: Progress | None = None
) -> Fitted:
    """Fit a bundle to the events of `paths` (NDJSON, .gz, Parquet) and write it to `out`.

    Deterministic for a seed and machine. Raises FitError for fewer than MIN_EVENTS readable events.
    """
    started = time.monotonic()
    tell: Progress = progress or (lambda *_: None)
    loaded = _load(paths, tell)
    order = np.argsort(loaded.time, kind="stable")
    held = order[-max(MIN_EVENTS // 2, round(HELD_OUT * len(order))) :]
    fitted = order[: len(order) - len(held)]
    first, weights = _distinct(loaded.features.take(fitted))
    members = fitted[first]
    features = loaded.features.take(members)
    later = loaded.features.take(held)
    tell("train", 0, 0, f"{len(features):,} distinct events of {len(fitted):,}")
    rarity = ContextRarity.fit(loaded.schema, features, weights)
    where = torch.device(device)
    net, report = train(
        loaded.schema,
        features,
        weights,
        later.take(later.distinct()[0]),
        seed=seed,
        device=where,
        progress=lambda step, steps, loss: tell("train", step, steps, f"loss {loss:.3f}"),
    )
    encoder = Encoder(loaded.schema, net, rarity, where)
    tell("baseline", 0, 0, "")
    scorer = _fit_scorer(encoder, features, weights, later, seed)
    exemplars = [loaded.records[members[place]] for place in scorer.baseline.members.tolist()]
    span = max(int(np.ptp(loaded.time)), 60_000)
    training = {
        "events": loaded.events,
        "used": len(order),
        "held_out": len(held),
        "distinct": len(features),
        "rejects": loaded.rejects,
        "from": int(loaded.time.min()),
        "to": int(loaded.time.max()),
        "events_per_day": loaded.events / (span / DAY_MS),
        "steps": report.steps,
        "loss": report.losses,
        "validation_loss": report.validation,
        "seed": seed,
    }
    exemplars = _exemplars(exemplars, loaded.schema)
    bundle = save(out, encoder=encoder, scorer=scorer, exemplars=exemplars, training=training)
    seconds = time.monotonic() - started
    return Fitted(bundle, loaded.events, len(order), loaded.rejects, loaded.repairs, seconds, report)


def _decoded(paths: Sequence[Path]) -> Iterator[tuple[EventBatch, int]]:
    for batch in batches(paths):
        events, rejects = decode(batch)
        yield events, len(rejects)


def _load(paths: Sequence[Path], tell: Progress) -> _Loaded:
    """Both passes: the schema, then features, times and the raw events (for exemplars) of at most MAX_EVENTS."""
    learner = SchemaLearner()
    total = rejected = 0
    repairs: Counter[str] = Counter()
    for events, rejects in _decoded(paths):
        learner.add(events)
        total += len(events)
        rejected += rejects
        repairs.update(events.repairs)
        tell("read", total, 0, f"{total:,} events")
    if total < MIN_EVENTS:
        files = ", ".join(str(path) for path in paths)
        raise FitError(
            f"{files}: {total} events could be read and {rejected} could not; at least {MIN_EVENTS} are needed, and a "
            "day or more of normal traffic is what makes a detector"
        )
    schema = learner.finish()
    vectorize = Vectorizer(schema)
    stride = -(-total // MAX_EVENTS)
    parts: list[FeatureBatch] = []
    times: list[NDArray[np.int64]] = []
    records: list[bytes] = []
    seen = 0
    for events, _ in _decoded(paths):
        kept = np.arange(-seen % stride, len(events), stride)
        parts.append(vectorize(events).take(kept))
        times.append(events.time[kept])
        records.extend(orjson.dumps(events.records[i]) for i in kept.tolist())
        seen += len(events)
        tell("vectorize", seen, total, "")
    features = FeatureBatch(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.quantiles for part in parts]),
        np.concatenate([part.actor for part in parts]),
    )
    return _Loaded(schema, features, np.concatenate(times), records, total, rejected, repairs)


def _distinct(features: FeatureBatch) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The first of each kind of row, and how many rows it stands for."""
    first, like = features.distinct()
    return first, np.bincount(like, minlength=len(first)).astype(np.float64)


def _fit_scorer(
    encoder: Encoder, features: FeatureBatch, weights: NDArray[np.float64], later: FeatureBatch, seed: int
) -> RecordScorer:
    vectors = encoder.encode(features).vectors
    types = features.codes[:, 0].astype(np.int64)
    numbers = [i for i, field in enumerate(encoder.schema.fields) if field.kind == "number"]
    measured = (features.codes[:, numbers] > 0).any(1)
    density = Density.fit(vectors[measured], weights[measured], types[measured], seed=seed)
    scorer = RecordScorer(Baseline.build(vectors, seed=seed), density)
    first, like = later.distinct()
    distinct = later.take(first)
    kinds = distinct.codes[:, 0].astype(np.int64)
    raw = scorer.raw(encoder.encode(distinct), kinds)
    scorer.fit({name: score[like] for name, score in raw.items()}, kinds[like])
    return scorer


def _exemplars(records: list[bytes], schema: Schema) -> list[bytes]:
    """Compact redacted copies of normal events, for explanations."""
    redactor = Redactor()
    return [orjson.dumps(redactor.record(compact(orjson.loads(record), schema)).record) for record in records]


def summary(fitted: Fitted) -> list[tuple[str, Any]]:
    """What a person wants to know of a fit, as (what, value)."""
    schema, manifest = fitted.bundle.encoder.schema, fitted.bundle.manifest
    kinds = Counter(field.kind for field in schema.fields)
    fields = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    rows: list[tuple[str, Any]] = [
        ("events", f"{fitted.events:,} read, {fitted.used:,} used, {fitted.rejects:,} could not be read"),
        (
            "distinct",
            f"{manifest['training']['distinct']:,} kinds of event to fit, the latest "
            f"{manifest['training']['held_out']:,} events held out to calibrate",
        ),
        ("schema", f"{len(schema.fields)} fields ({fields}), {len(schema.set_aside)} paths set aside"),
        (
            "baseline",
            f"{len(fitted.bundle.scorer.baseline):,} vectors, {len(fitted.bundle.scorer.density.types)} event "
            "types with quantities",
        ),
        ("rate", f"{manifest['training']['events_per_day']:,.0f} events a day"),
        ("bundle", fitted.bundle.version),
        ("took", f"{fitted.seconds:.0f} s"),
    ]
    if fitted.repairs:
        rows.insert(1, ("repairs", ", ".join(f"{n:,} {kind}" for kind, n in fitted.repairs.most_common())))
    return rows
