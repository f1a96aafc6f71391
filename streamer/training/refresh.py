"""Refreshing a bundle: what has been normal for long enough joins the baseline of a new version of it.

Encoder, sequences, calibration and the reference of drift stay, so that windows stay and p-values keep their meaning;
the baseline is rebuilt beside the one that serves, and `ripcurrent bundle promote` swaps it in. What may join is
decided by `state.drift_guard`, with distances to the vectors that the first fit learned, not to those that joined
since, and with how far each entity had come by the refresh before: many small ones see what one large would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import entities as find_entities
from encoder.ocsf.events import EventBatch, Message
from state.baseline.baseline import Baseline
from state.drift_guard import DriftGuard, Released
from streamer.alerting.file_thresholds import thresholds_of
from streamer.bundles.bundle_files import load, save
from streamer.detection.bundle import Bundle
from streamer.detection.record_score import NEAR
from streamer.detection.score_files import score_files
from streamer.errors import RipcurrentError
from streamer.event_files import Unread, batches
from streamer.redaction import Redactor
from streamer.training.fit import exemplars, shown_codes


class RefreshError(RipcurrentError):
    """Nothing that a baseline could take in."""


@dataclass(frozen=True)
class Refreshed:
    """The new bundle, what the quarantine decided, and what could not be read."""

    bundle: Bundle
    released: Released
    unread: Unread


def refresh(
    paths: Sequence[Path],
    path: Path,
    out: Path,
    *,
    alerts_per_day: float,
    device: str = "cpu",
    redact: Collection[str] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> Refreshed:
    """Write to `out` the bundle at `path` with what `paths` have shown to be normal. redact: as for `fit`. Raises
    RefreshError for no events, BundleError for the bundle."""
    bundle = load(path, device)
    scored = score_files(paths, bundle, progress)
    if not len(scored):
        raise RefreshError(f"{', '.join(map(str, paths))}: no event could be read; {scored.unread}")
    lines = thresholds_of(scored, alerts_per_day, bundle)
    released, records, places, joining, features = _quarantined(paths, bundle, scored.p_value <= lines)
    record = bundle.scorer.record
    both = np.concatenate([record.baseline.vectors(), joining])
    baseline = Baseline.build(both, seed=int(bundle.manifest["training"]["seed"]))
    baseline.learned = np.concatenate([record.baseline.learned, np.zeros(len(joining), bool)])[baseline.members]
    schema = bundle.encoder.schema
    redactor = Redactor(redact)
    all_exemplars = [*bundle.exemplars, *exemplars(records, places, schema, redactor)]
    codes = np.concatenate([bundle.codes, shown_codes(features, schema, redactor)], axis=1)[:, baseline.members]
    written = save(
        out,
        encoder=bundle.encoder,
        scorer=replace(bundle.scorer, record=replace(record, baseline=baseline)),
        exemplars=[all_exemplars[place] for place in baseline.members.tolist()],
        anonymised=bundle.anonymised,
        profile=bundle.profile,
        codes=codes,
        drifts=released.drifts,
        training=bundle.manifest["training"]
        | {
            "refreshed": {
                "of": bundle.version,
                "joined": len(records),
                "refused": released.refused,
                "drifting": released.drifting,
            }
        },
    )
    return Refreshed(written, released, scored.unread)


def _read(
    bundle: Bundle, batch: Sequence[Message]
) -> tuple[EventBatch, NDArray[np.float16], NDArray[np.int32], list[str]]:
    """A batch's events, their vectors (float16 [n, d]) and features (int32 [n, fields]), and who each is about."""
    events, _ = decode(batch)
    features = bundle.encoder.vectorize(events)
    first, like = features.distinct()
    vectors = bundle.encoder.vectors(features.take(first))[like]
    return events, vectors, features.codes, list(find_entities(events).primary)


def _quarantined(
    paths: Sequence[Path], bundle: Bundle, alert: NDArray[np.bool_]
) -> tuple[Released, list[bytes], list[str], NDArray[np.float16], NDArray[np.int32]]:
    """Everything through the quarantine: what it lets out, the events first seen with it, where they stand, their
    vectors and their features."""
    record = bundle.scorer.record
    first_fit = Baseline.build(record.baseline.vectors()[record.baseline.learned], seed=0)
    present = {vector.tobytes() for vector in record.baseline.vectors()}
    quarantine = DriftGuard(bundle.drifts)
    done = 0
    for batch in batches(paths):
        events, vectors, _, entity = _read(bundle, batch)
        distance = first_fit.search(vectors, 1)[0][:, 0].astype(np.float64)
        novelty = record.calibrations[NEAR].evidence(distance)
        known = np.array([vector.tobytes() in present for vector in vectors], bool)
        quarantine.hold(events.time, vectors, entity, alert[done : done + len(events)], known, novelty)
        done += len(events)
    released = quarantine.release()
    records: list[bytes] = []
    places: list[str] = []
    joining = [np.empty((0, bundle.dim), np.float16)]
    features = [np.empty((0, len(bundle.encoder.schema.fields)), np.int32)]
    done = 0
    for batch in batches(paths):
        events, vectors, codes, _ = _read(bundle, batch)
        rows = released.rows[(released.rows >= done) & (released.rows < done + len(events))] - done
        records += [orjson.dumps(events.records[row]) for row in rows.tolist()]
        places += [events.coordinates.label(row) for row in rows.tolist()]
        joining.append(vectors[rows])
        features.append(codes[rows])
        done += len(events)
    return released, records, places, np.concatenate(joining), np.concatenate(features)
