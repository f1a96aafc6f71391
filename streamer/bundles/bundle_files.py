"""Bundles: a directory with everything that a detector needs, versioned as one.

`manifest.json` names every file with its sha256; schema and exemplars are JSON, arrays are safetensors, the index is
hnswlib's. Nothing is pickled. Promises that a bundle is written beside its place and renamed, so that it is complete or
not there, and that every hash is checked on load.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from encoder.models.record_encoder import RecordEncoder
from encoder.models.record_network import EMBEDDING
from encoder.models.sequence_embedding import DIM
from encoder.models.sequence_model import SequenceModel
from encoder.models.text_shapes import TextShapes
from encoder.ocsf.entities import KINDS
from state.baseline.baseline import Baseline
from state.baseline.group_distance import GroupDistance
from state.calibration import Calibration
from state.cooccurrence import Cooccurrence
from state.drift_guard import EntityDrifts
from state.rate_profiles import RateProfiles
from streamer.bundles.manifest import FORMAT, MANIFEST, SCHEMA, BundleError, digest_of, resolve, verify
from streamer.detection.bundle import ENCODER_FILE, Bundle
from streamer.detection.combine import EventScorer
from streamer.detection.cooccurrence_score import CooccurrenceScorer
from streamer.detection.rate_score import RateScorer
from streamer.detection.record_score import RecordScorer
from streamer.detection.sequence_score import SequenceScorer
from streamer.detection.stretch_score import NormalStretches, StretchScorer

_INDEX, _SCORES, _EXEMPLARS = "baseline.hnsw", "scores.safetensors", "exemplars.ndjson"
_SEQUENCES, _BEHAVIOURS = "sequences.safetensors", "behaviours.ndjson"
_TEXTS = "texts."
_PROFILE_ARRAYS = ("keys", "most", "usual", "kinds")


def save(
    path: Path,
    *,
    encoder: RecordEncoder,
    scorer: EventScorer,
    exemplars: list[bytes],
    anonymised: list[bytes],
    profile: NDArray[np.int64],
    training: dict[str, Any],
    codes: NDArray[np.uint16],
    drifts: EntityDrifts | None = None,
) -> Bundle:
    """Write a bundle. An old one at `path` is replaced only when the new one is complete."""
    path, drifts = path.absolute(), drifts or EntityDrifts()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error}") from error
    try:
        (temporary / SCHEMA).write_bytes(encoder.schema.to_json())
        save_tensors(encoder.state(), temporary / ENCODER_FILE)
        index = scorer.record.baseline.save(temporary / _INDEX)
        stretches = {}
        if scorer.stretch is not None:
            for kind, normal in sorted(scorer.stretch.normal.items()):
                saved = normal.index.save(temporary / _stretches(kind))
                stretches[str(kind)] = saved | {"entities": normal.entities, "usual": normal.usual}
        config = None
        if scorer.sequences is not None:
            tensors, config = scorer.sequences.model.state()
            save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / _SEQUENCES)
        keys, walks = drifts.arrays()
        arrays = _scorer_arrays(scorer) | {"profile": profile, "watch.keys": keys, "watch.walks": walks}
        arrays["exemplars.codes"] = np.ascontiguousarray(codes)
        save_arrays(arrays, temporary / _SCORES)
        (temporary / _EXEMPLARS).write_bytes(b"".join(line + b"\n" for line in exemplars))
        (temporary / _BEHAVIOURS).write_bytes(b"".join(line + b"\n" for line in anonymised))
        files = {file.name: digest_of(file) for file in sorted(temporary.iterdir())}
        name = hashlib.sha256(orjson.dumps(files)).hexdigest()[:12]
        manifest = {
            "format": FORMAT,
            "version": f"{path.name}-{name}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "schema_hash": encoder.schema.hash,
            "files": files,
            "baseline": index,
            "sequences": config,
            "stretches": stretches,
            "training": training,
        }
        (temporary / MANIFEST).write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        temporary.chmod(0o755)
        _swap(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle(encoder, scorer, exemplars, anonymised, profile, manifest, codes, drifts)


def _swap(new: Path, path: Path) -> None:
    """Move `new` to `path`. A directory cannot be renamed over one that is not empty."""
    if not path.exists():
        os.rename(new, path)
        return
    if not (path / MANIFEST).exists():
        raise BundleError(f"{path} exists and is not a bundle; choose another --out or remove it")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _scorer_arrays(scorer: EventScorer) -> dict[str, NDArray[Any]]:
    record = scorer.record
    arrays: dict[str, NDArray[Any]] = {
        "baseline.members": record.baseline.members,
        "baseline.learned": record.baseline.learned,
        "far.vectors": record.groups.vectors,
        "far.starts": record.groups.starts,
        "far.types": record.groups.types,
        "quantities": record.quantities,
        "products": record.products,
    }
    arrays |= {f"{_TEXTS}{name}": array for name, array in record.texts.arrays().items()}
    groups = {"record": record.calibrations, "event": {"event": scorer.event}}
    if scorer.sequences is not None:
        groups["sequence"] = scorer.sequences.calibrations
    if scorer.rates is not None:
        profiles = scorer.rates.profiles
        arrays |= {f"habits.{name}": getattr(profiles, name) for name in _PROFILE_ARRAYS}
        groups["rate"] = scorer.rates.calibrations
    if scorer.cooccurrence is not None:
        cooccurrence = scorer.cooccurrence.model
        arrays |= {f"overlaps.{name}": getattr(cooccurrence, name) for name in ("keys", "events", "pairs", "counts")}
        groups["overlap"] = scorer.cooccurrence.calibrations
    if scorer.stretch is not None:
        for kind, normal in scorer.stretch.normal.items():
            arrays |= {f"stretches.{kind}.members": normal.index.members, f"stretches.{kind}.codes": normal.codes}
        groups["stretch"] = scorer.stretch.calibrations
    for group, calibrations in groups.items():
        for name, calibration in calibrations.items():
            arrays[f"scores.{group}/{name}"] = calibration.scores
            arrays[f"tail.{group}/{name}"] = np.array([calibration.start, calibration.scale])
    return arrays


def _calibrations(arrays: dict[str, NDArray[Any]], group: str) -> dict[str, Calibration]:
    prefix = f"scores.{group}/"
    names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    return {
        name: Calibration(arrays[prefix + name], *(float(x) for x in arrays[f"tail.{group}/{name}"])) for name in names
    }


def _stretches(kind: int | str) -> str:
    """The file of the index of a kind of entity."""
    return f"stretches-{KINDS[int(kind)]}.hnsw"


def _normal_stretches(
    path: Path, described: dict[str, Any], arrays: dict[str, NDArray[Any]]
) -> dict[int, NormalStretches]:
    normal = {}
    for kind, saved in described.items():
        members = arrays[f"stretches.{kind}.members"]
        index = Baseline.load(path / _stretches(kind), saved, members, dim=DIM)
        codes = arrays[f"stretches.{kind}.codes"]
        normal[int(kind)] = NormalStretches(index, codes, int(saved["entities"]), float(saved["usual"]))
    return normal


def load(path: Path, device: str = "cpu") -> Bundle:
    """Load a bundle. Raises BundleError if it is missing, incomplete or changed, or weights do not fit the schema."""
    path = resolve(path)
    manifest, schema = verify(path)
    try:
        encoder = RecordEncoder.from_state(schema, load_tensors(path / ENCODER_FILE), torch.device(device))
        arrays = load_arrays(path / _SCORES)
        baseline = Baseline.load(
            path / _INDEX, manifest["baseline"], arrays["baseline.members"], dim=EMBEDDING, device=device
        )
        baseline.learned = arrays["baseline.learned"]
        groups = GroupDistance(*(arrays[f"far.{name}"] for name in ("vectors", "starts", "types")))
        of_texts = {name.removeprefix(_TEXTS): array for name, array in arrays.items() if name.startswith(_TEXTS)}
        record = RecordScorer(
            baseline,
            groups,
            arrays["quantities"],
            arrays["products"],
            _calibrations(arrays, "record"),
            TextShapes.from_arrays(of_texts),
        )
        sequences = None
        if manifest["sequences"] is not None:
            model = SequenceModel.from_state(
                load_tensors(path / _SEQUENCES), manifest["sequences"], torch.device(device)
            )
            sequences = SequenceScorer(model, _calibrations(arrays, "sequence"))
        rates = None
        if "habits.keys" in arrays:
            profiles = RateProfiles(*(arrays[f"habits.{name}"] for name in _PROFILE_ARRAYS))
            rates = RateScorer(profiles, _calibrations(arrays, "rate"))
        cooccurrence = None
        if "overlaps.keys" in arrays:
            learned = Cooccurrence(*(arrays[f"overlaps.{name}"] for name in ("keys", "events", "pairs", "counts")))
            cooccurrence = CooccurrenceScorer(learned, _calibrations(arrays, "overlap"))
        stretch = None
        if sequences is not None:
            normal = _normal_stretches(path, manifest["stretches"], arrays)
            stretch = StretchScorer(sequences.model, normal, _calibrations(arrays, "stretch"))
        event = _calibrations(arrays, "event")["event"]
        scorer = EventScorer(record, sequences, rates, event, cooccurrence, stretch)
        profile, codes = arrays["profile"], arrays["exemplars.codes"]
        drifts = EntityDrifts(arrays.get("watch.keys"), arrays.get("watch.walks"))
    except (SafetensorError, KeyError) as error:
        raise BundleError(f"bundle {path} does not hold what its manifest says ({error}); fit it again") from error
    exemplars = (path / _EXEMPLARS).read_bytes().splitlines()
    anonymised = (path / _BEHAVIOURS).read_bytes().splitlines()
    return Bundle(encoder, scorer, exemplars, anonymised, profile, manifest, codes, drifts)
