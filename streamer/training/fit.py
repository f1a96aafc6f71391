"""Fitting: unlabelled events in, a bundle out.

Two passes over the files: the first learns the schema, the second the rest. The latest of working days and
of weekends are held out, and calibrate: a score judged by the events it was made from would never be unusual.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from encoder.features.learner import SchemaLearner
from encoder.features.schema import FIRST, MISSING, PRODUCT, Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer, fitted_to
from encoder.models.contextual_numbers import ContextualNumbers
from encoder.models.rarity import BLOCKS, ContextRarity
from encoder.models.record_encoder import RecordEncoder
from encoder.models.text_shapes import TextCollector, Texts, TextShapes
from encoder.ocsf.activity_counts import ActivityCounts, activity_counts
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import Entities
from encoder.ocsf.entities import entities as find_entities
from encoder.ocsf.event_time import NO_TIME
from encoder.ocsf.events import EventBatch
from encoder.ocsf.repairs import widespread
from encoder.training.embedding_quality import check_embedding
from encoder.training.replaced_fields import initial_network, train
from encoder.training.trainer import TrainingRun
from state.baseline.baseline import Baseline
from state.baseline.group_distance import GroupDistance
from state.calibration import FEW, Calibration
from streamer.bundles.bundle_files import save
from streamer.detection.bundle import Bundle
from streamer.detection.combine import EventScorer, joined
from streamer.detection.detector import compact
from streamer.detection.drift import profile
from streamer.detection.record_score import RecordScorer
from streamer.detection.sequence_score import SequenceScorer
from streamer.errors import RipcurrentError
from streamer.event_files import Reread, Unread, batches, with_common_times
from streamer.redaction import Redactor
from streamer.training.history import StageProgress, TrainingHistory, fit_history
from streamer.training.vouching import types_with_quantities, vouching

HELD_OUT = 0.15
"""The latest share of the training events, by event time, that calibrates: of those on working days, and of those on
weekends. The latest of a week alone would be its Sunday, and Monday would look like an incident."""
WHOLE_DAY_OF, MOST_HELD_OUT = 5, 1 / 3
"""Working days from which on the latest of them calibrates whole: the latest share of five is a Friday without its
night, and each nightly backup would look like an incident. Not where it has more than this share of their events: most
of these sources are new, or some clocks are old."""
MIN_EVENTS = 20
MAX_EVENTS = 2_000_000
"""Events kept as features; of more, every k-th is used, and the summary says so."""
MAX_CODES = 80_000_000
"""Events times fields that are kept, 4 bytes each and a few copies on the way: of many fields, fewer events."""
DAY_MS = 86_400_000
MIN_SPAN_MS = 60_000
"""The least time that training counts as; events of which none has a time count as a day's."""
PLACE = "@event"
"""In an exemplar, beside the attributes of the normal event: where it stood. No attribute path begins so."""


class FitError(RipcurrentError):
    """Training events that no detector can be made of."""


@dataclass(frozen=True)
class Fitted:
    """A bundle and what was learned on the way to it."""

    bundle: Bundle
    events: int
    used: int
    unread: Unread
    repairs: Counter[str]
    seconds: float
    report: TrainingRun


@dataclass
class _Loaded:
    """What the two passes kept of n events, in order of event time."""

    schema: Schema
    features: FeatureBatch
    texts: Texts
    time: NDArray[np.int64]
    entities: Entities
    activity_counts: ActivityCounts
    records: list[bytes]
    places: list[str]
    events: int
    unread: Unread
    repairs: Counter[str]


def fit(
    paths: Sequence[Path] | Reread,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    redact: Collection[str] = (),
    progress: StageProgress | None = None,
) -> Fitted:
    """Fit a bundle to the events of `paths` (NDJSON, .gz, Parquet; or anything that can be read twice) and write it to
    `out`.

    Deterministic for a seed and machine, also where it was killed and is begun again: the training of the networks is
    kept beside `out` until the bundle stands, and gone on with. redact: attributes that exemplars hold masked. Raises
    FitError for fewer than MIN_EVENTS readable events, or for events that are all alike.
    """
    started = time.monotonic()
    tell: StageProgress = progress or (lambda *_: None)
    kept = out.absolute().with_name(f".{out.name}.training")
    loaded = _load(paths, tell)
    n = len(loaded.features)
    held = held_out(loaded.time)
    schema, recoded = fitted_to(loaded.schema, loaded.features, np.flatnonzero(~held))
    loaded = replace(loaded, schema=schema, features=recoded)
    first, in_block = _distinct(loaded.features, np.flatnonzero(~held))
    if len(first) < 2:
        raise FitError(
            f"the {n:,} events do not differ in anything that is learned from, and at least two kinds of event are "
            f"needed; what is left out and why: {_left_out(schema)}"
        )
    features, later = loaded.features.take(first), loaded.features.take(np.flatnonzero(held))
    tell("train", 0, 0, f"{len(features):,} distinct events of {n - len(later):,}")
    part = fit_record(
        loaded.schema,
        features,
        in_block,
        later,
        texts=loaded.texts.take(np.flatnonzero(~held)),
        later_texts=loaded.texts.take(np.flatnonzero(held)),
        seed=seed,
        device=torch.device(device),
        checkpoint=kept / "encoder.safetensors",
        tell=tell,
    )
    encoder, record, by_record, report = part.encoder, part.scorer, part.held_out, part.report
    anonymised = encoder.anonymised(loaded.features)
    history = fit_history(
        TrainingHistory(loaded.entities, loaded.activity_counts, loaded.time, anonymised, n == loaded.events),
        held,
        by_record,
        seed=seed,
        device=encoder.device,
        checkpoint=kept / "sequences.safetensors",
        tell=tell,
    )
    sequences, learned = history.sequences, history.report
    event = Calibration.fit(joined(by_record, history.evidence, history.by_stretch), tail_from=FEW)
    scorer = EventScorer(record, sequences, history.rates, event, history.cooccurrence, history.stretch)
    redactor = Redactor(redact)
    members = first[record.baseline.members].tolist()
    dated = loaded.time[loaded.time != NO_TIME]
    span = max(int(np.ptp(dated)), MIN_SPAN_MS) if len(dated) else DAY_MS
    training = {
        "events": loaded.events,
        "used": n,
        "held_out": len(later),
        "distinct": len(features),
        "rejects": len(loaded.unread),
        "from": int(dated[0]) if len(dated) else None,
        "to": int(dated[-1]) if len(dated) else None,
        "events_per_day": loaded.events / (span / DAY_MS),
        "steps": report.steps,
        "loss": report.losses,
        "embedding": asdict(check_embedding(encoder, features, seed=seed)),
        "sequences": learned and {"loss": learned.losses, "network": learned.network, "counts": learned.counts},
        "seed": seed,
    }
    bundle = save(
        out,
        encoder=encoder,
        scorer=scorer,
        exemplars=exemplars(
            [loaded.records[row] for row in members], [loaded.places[row] for row in members], loaded.schema, redactor
        ),
        anonymised=_steps(sequences, loaded, anonymised, redactor),
        profile=profile(loaded.schema, loaded.features.codes),
        training=training,
        codes=shown_codes(loaded.features.codes[members], loaded.schema, redactor),
    )
    shutil.rmtree(kept, ignore_errors=True)
    seconds = time.monotonic() - started
    return Fitted(bundle, loaded.events, n, loaded.unread, loaded.repairs, seconds, report)


def _decoded(paths: Sequence[Path] | Reread, unread: Unread) -> Iterator[EventBatch]:
    for batch in with_common_times(paths) if callable(paths) else batches(paths, lost=unread.in_file):
        events, rejects = decode(batch)
        for reject in rejects:
            message = batch[reject.message]
            if callable(paths):
                unread.add(f"{message.topic}:{message.partition}:{message.offset}", reject)
            else:
                unread.in_file(message.topic, message.offset, reject)
        yield events


def _load(paths: Sequence[Path] | Reread, tell: StageProgress) -> _Loaded:
    """Both passes: the schema, then features, times and the raw events (for exemplars) of at most MAX_EVENTS."""
    learner = SchemaLearner()
    total = 0
    unread = Unread()
    repairs: Counter[str] = Counter()
    for events in _decoded(paths, unread):
        learner.add(events)
        total += len(events)
        repairs.update(events.repairs)
        tell("read", total, 0, f"{total:,} events")
    if total < MIN_EVENTS:
        where = "the range" if callable(paths) else ", ".join(str(path) for path in paths)
        raise FitError(
            f"{where}: {total} events could be read; at least {MIN_EVENTS} are needed, and a day or more of normal "
            f"traffic is what makes a detector{'; ' if unread else ''}{unread}"
        )
    schema = learner.finish()
    vectorize, texts = Vectorizer(schema), TextCollector(schema)
    stride = -(-total // min(MAX_EVENTS, MAX_CODES // len(schema.fields)))
    parts: list[FeatureBatch] = []
    times: list[NDArray[np.int64]] = []
    pairs: list[tuple[Entities, ActivityCounts]] = []
    records: list[bytes] = []
    places: list[str] = []
    seen = 0
    for events in _decoded(paths, Unread()):
        kept = np.arange(-seen % stride, len(events), stride)
        pairs.append(_kept(events, kept, len(records)))
        parts.append(vectorize(events).take(kept))
        texts.add(events, kept)
        times.append(events.time[kept])
        records.extend(orjson.dumps(events.records[i]) for i in kept.tolist())
        places.extend(events.coordinates.label(i) for i in kept.tolist())
        seen += len(events)
        tell("vectorize", seen, total, "")
    features = FeatureBatch.concatenate(parts)
    moments = np.concatenate(times)
    order = np.argsort(moments, kind="stable")
    return _Loaded(
        schema,
        features.take(order),
        texts.finish(order),
        moments[order],
        *_reordered(pairs, order),
        [records[i] for i in order.tolist()],
        [places[i] for i in order.tolist()],
        total,
        unread,
        repairs,
    )


def _kept(events: EventBatch, kept: NDArray[np.intp], offset: int) -> tuple[Entities, ActivityCounts]:
    """The pairs of the kept events, numbered from `offset`."""
    entities = find_entities(events)
    place = np.full(len(events), -1, np.int64)
    place[kept] = np.arange(offset, offset + len(kept))
    rows = place[entities.row]
    pairs = np.flatnonzero(rows >= 0)
    names = [entities.entity[i] for i in pairs.tolist()]
    found = Entities(rows[pairs].astype(np.int32), entities.kind[pairs], names, [])
    return found, activity_counts(events, entities).take(pairs)


def _reordered(
    parts: list[tuple[Entities, ActivityCounts]], order: NDArray[np.intp]
) -> tuple[Entities, ActivityCounts]:
    """All pairs, their events numbered by the new order."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    row = rank[np.concatenate([entities.row for entities, _ in parts])]
    by_row = np.argsort(row, kind="stable")
    names = [name for entities, _ in parts for name in entities.entity]
    kind = np.concatenate([entities.kind for entities, _ in parts])
    found = Entities(row[by_row].astype(np.int32), kind[by_row], [names[i] for i in by_row.tolist()], [])
    return found, ActivityCounts.concatenate([part for _, part in parts]).take(by_row)


def held_out(time: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: which events calibrate. time: int64 [n], event ms, ascending."""
    held = np.zeros(len(time), np.bool_)
    weekend = (time // DAY_MS + 3) % 7 >= 5  # the epoch began on a Thursday
    for rows in (np.flatnonzero(weekend), np.flatnonzero(~weekend)):
        held[rows[len(rows) - round(HELD_OUT * len(rows)) :]] = True
    working = np.flatnonzero(~weekend)
    if len(np.unique(time[working] // DAY_MS)) >= WHOLE_DAY_OF:
        latest = working[time[working] > time[working[-1]] - DAY_MS]
        held[latest] |= len(latest) <= MOST_HELD_OUT * len(working)
    held[-MIN_EVENTS // 2 :] = True
    return held


def _left_out(schema: Schema) -> str:
    """Some of the paths that are set aside, with the reasons, for a message."""
    some = [f"{path} ({reason})" for path, reason in list(schema.set_aside.items())[:3]]
    return ", ".join(some) + (", ..." if len(schema.set_aside) > len(some) else "") if some else "nothing"


def _distinct(features: FeatureBatch, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Of these rows, in order of time, the first of each kind, and how many of each block it stands for: float64
    [kinds, BLOCKS]."""
    first, like = features.take(rows).distinct()
    block = np.arange(len(rows)) * BLOCKS // len(rows)
    counts = np.bincount(like * BLOCKS + block, minlength=len(first) * BLOCKS)
    return rows[first], counts.reshape(-1, BLOCKS).astype(np.float64)


@dataclass(frozen=True)
class FittedRecord:
    """The record part of a bundle. held_out: float64 [h], nats, its evidence against each held-out event; report: how
    the training of the network went."""

    encoder: RecordEncoder
    scorer: RecordScorer
    held_out: NDArray[np.float64]
    report: TrainingRun


def fit_record(
    schema: Schema,
    features: FeatureBatch,
    in_block: NDArray[np.float64],
    later: FeatureBatch,
    *,
    texts: Texts | None = None,
    later_texts: Texts | None = None,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    tell: StageProgress = lambda *_: None,
) -> FittedRecord:
    """Fit the record part to n distinct rows. in_block: float64 [n, blocks], how many events of each block of time each
    row stands for; later: the h held-out events, which calibrate; texts, later_texts: of all events that the rows stand
    for, in order of time, and of the held-out events (None: texts are not judged)."""
    weights, types = in_block.sum(1), features.codes[:, 0].astype(np.int64)
    rarity = ContextRarity.fit(schema, features, in_block)
    net = initial_network(schema, features, weights, seed=seed)
    identity = RecordEncoder(schema, net, rarity, device).vectors(features)
    vouch = np.flatnonzero(vouching(schema, features, in_block, identity, seed=seed))
    trusted = features.take(vouch)
    net, report = train(
        net,
        schema,
        trusted,
        weights[vouch],
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=lambda step, steps, loss: tell("train", step, steps, f"loss {loss:.3f}"),
    )
    numbers = ContextualNumbers.fit(schema, trusted, in_block[vouch], seed=seed)
    encoder = RecordEncoder(schema, net, rarity, device, numbers)
    tell("baseline", 0, 0, "")
    vectors = encoder.vectors(trusted)
    quantities = types_with_quantities(schema, features, weights)
    baseline = Baseline.build(vectors, seed=seed)
    baseline.members = vouch[baseline.members]
    groups = GroupDistance.fit(vectors, weights[vouch], types[vouch], seed=seed)
    scorer = RecordScorer(baseline, groups, quantities, products_of_types(schema, features, weights))
    if texts is not None:
        tell("texts", 0, 0, "")
        scorer.texts = TextShapes.fit(texts)
    first, like = later.distinct()
    distinct = later.take(first)
    kinds = distinct.codes[:, 0].astype(np.int64)
    raw = scorer.raw(encoder.encode(distinct, scorer.measured(kinds)), kinds)
    raw, kinds = {name: score[like] for name, score in raw.items()}, kinds[like]
    text = scorer.texts.of_texts(later_texts) if later_texts is not None else None
    scorer.fit(raw, kinds, text)
    parts = scorer.parts(raw, kinds)
    if text is not None:
        parts = scorer.with_text(parts, text, kinds)
    return FittedRecord(encoder, scorer, scorer.evidence(parts, kinds), report)


def products_of_types(schema: Schema, features: FeatureBatch, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 [event types]: the code of the product that most events of each type are of, 0 where there is none or all
    events are of one. features: n distinct rows; weights: float64 [n], events each stands for."""
    products = np.zeros(schema.fields[0].size, np.int64)
    position = next((i for i, field in enumerate(schema.fields) if field.name == PRODUCT), 0)
    if position:
        size = schema.fields[position].size
        pairs = features.codes[:, 0].astype(np.int64) * size + features.codes[:, position]
        events = np.bincount(pairs, weights, minlength=len(products) * size).reshape(-1, size)
        most = events.argmax(1)
        products[:] = np.where((events.max(1) > 0) & (most >= FIRST), most, 0)
    return products


def _steps(
    sequences: SequenceScorer | None, loaded: _Loaded, vectors: NDArray[np.float16], redactor: Redactor
) -> list[bytes]:
    """For each outcome of the sequences a normal event that is one, without who and where."""
    if sequences is None:
        return []
    codes, rows = np.unique(sequences.model.codebook(vectors), return_index=True)
    known = codes < sequences.model.codebook.other
    first = dict(zip(codes[known].tolist(), rows[known].tolist(), strict=True))
    named = {field.path for field in loaded.schema.fields if field.kind == "identity"}
    events = exemplars([loaded.records[row] for row in first.values()], None, loaded.schema, redactor)
    stages = {
        code: orjson.dumps({path: value for path, value in orjson.loads(event).items() if path not in named})
        for code, event in zip(first, events, strict=True)
    }
    return [stages.get(code, b"{}") for code in range(sequences.model.codebook.other)]


def exemplars(records: list[bytes], places: list[str] | None, schema: Schema, redactor: Redactor) -> list[bytes]:
    """Compact redacted copies of normal events, for explanations; with places (`topic:partition:offset:index`), each
    says under PLACE where it stood."""
    copies = [redactor.record(copy).record for copy in compact(records, schema)]
    if places is not None:
        copies = [{PLACE: place} | copy for place, copy in zip(places, copies, strict=True)]
    return [orjson.dumps(copy) for copy in copies]


def shown_codes(codes: NDArray[np.int32], schema: Schema, redactor: Redactor) -> NDArray[np.uint16]:
    """uint16 [fields, n], the features of examples, from int32 [n, fields]; those of attributes that examples hold
    masked whole are missing here, too."""
    shown = np.ascontiguousarray(codes.T.astype(np.uint16))
    shown[[redactor.lists(field.path) for field in schema.fields]] = MISSING
    return shown


def summary(fitted: Fitted) -> list[tuple[str, Any]]:
    """What a person wants to know of a fit, as (what, value)."""
    schema, manifest = fitted.bundle.encoder.schema, fitted.bundle.manifest
    record = fitted.bundle.scorer.record
    kinds = Counter(field.kind for field in schema.fields)
    fields = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    rows: list[tuple[str, Any]] = [
        ("events", f"{fitted.events:,} read, {fitted.used:,} used, {len(fitted.unread):,} could not be read"),
        (
            "distinct",
            f"{manifest['training']['distinct']:,} kinds of event to fit, "
            f"{manifest['training']['held_out']:,} events held out to calibrate",
        ),
        ("schema", f"{len(schema.fields)} fields ({fields}), {len(schema.set_aside)} paths set aside"),
        ("baseline", f"{len(record.baseline):,} vectors, {len(record.quantities)} event types with quantities"),
        ("rate", f"{manifest['training']['events_per_day']:,.0f} events a day"),
        ("bundle", fitted.bundle.version),
        ("took", f"{fitted.seconds:.0f} s"),
    ]
    if fitted.repairs:
        rows.insert(1, ("repairs", ", ".join(f"{n:,} {kind}" for kind, n in fitted.repairs.most_common())))
    if found := widespread(fitted.repairs, fitted.events):
        shares = ", ".join(f"{kind} in {share:.0%} of the events" for kind, share in found.items())
        rows.insert(2, ("warning", f"{shares}: look at what the senders write before you rely on this bundle"))
    return rows
