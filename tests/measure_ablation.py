"""What each part of the record score adds, on streams with labels: for docs/detection.md. Not a test.

python tests/measure_ablation.py EVAL_FOLDER SEED NAME...
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from encoder.training import masked_fields as training
from encoder.training.trainer import TrainingRun
from state.baseline import density
from streamer.detection import record_score as scoring
from streamer.event_files import batches
from streamer.offline.evaluation import metrics, read_events, read_labels
from streamer.training import fit as fitting

Patches = list[tuple[Any, str, Any]]
NO_DENSITY: Patches = [(scoring, "DENSITY_TRUST", 0.0)]
UNTRAINED: Patches = [(training, "descend", lambda *_, **__: TrainingRun())]
VARIANTS: dict[str, Patches] = {
    "all of it": [],
    "identity path alone, no residual part": UNTRAINED,
    "residual part that may replace the identity path": [(training, "RESIDUAL_PENALTY", 0.0)],
    "the loneliest kept in reference and baseline": [(density, "TRIM", 0.0)],
    "the loneliest kept in the baseline": [(density.Density, "lonely", lambda _, v, *__: np.zeros(len(v), bool))],
    "without density": NO_DENSITY,
    "without the distance to the nearest": [(scoring, "_SURPRISES", {"odd_value": 1.0, "odd_for_actor": 1.0})],
    "without either: counting alone": [(scoring, "_SURPRISES", {"odd_value": 1.0, "odd_for_actor": 1.0}), *NO_DENSITY],
    "distance to the nearest three in the embedding alone": [(scoring, "_SURPRISES", {"novelty": 1.0}), *NO_DENSITY],
    "the same on the identity path": [(scoring, "_SURPRISES", {"novelty": 1.0}), *NO_DENSITY, *UNTRAINED],
    "density in the embedding alone": [
        (scoring.RecordScorer, "_surprise", lambda _, raw: np.zeros(len(raw["novelty"])))
    ],
}


@contextmanager
def records_alone(patches: Patches) -> Iterator[None]:
    """No sequences and no rates: these are other lines of the table."""

    def no_history(_: Any, loaded: Any, __: Any, held: Any, *___: Any) -> tuple[None, None, None, Any, None]:
        return None, None, None, np.zeros(int(held.sum())), None

    replaced = [patch.object(fitting, "_fit_history", no_history), *(patch.object(*each) for each in patches)]
    for each in replaced:
        each.start()
    try:
        yield
    finally:
        for each in replaced:
            each.stop()


def measure(folder: Path, name: str, seed: int, say: Callable[[str], None]) -> None:
    test = [folder / f"{name}.test.ndjson.gz"]
    labels = read_labels(folder / f"{name}.labels.csv", [uid for uid, _ in read_events(test)])
    for variant, patches in VARIANTS.items():
        with records_alone(patches), tempfile.TemporaryDirectory() as out:
            bundle = fitting.fit([folder / f"{name}.train.ndjson.gz"], Path(out) / "bundle", seed=seed).bundle
            record, parts = bundle.scorer.record, []
            for batch in batches(test):
                features = bundle.encoder.vectorize(fitting.decode(batch)[0])
                first, like = features.distinct()
                distinct = features.take(first)
                kinds = distinct.codes[:, 0].astype(np.int64)
                combined = record.parts(record.raw(bundle.encoder.encode(distinct), kinds), kinds).combined()
                parts.append(combined[like])
        found = metrics(labels.label, np.concatenate(parts))
        say(f"| {variant} | {name} | " + " / ".join(f"{value or 0:.3f}" for value in found.values()) + " |")


if __name__ == "__main__":
    for stream in sys.argv[3:]:
        measure(Path(sys.argv[1]), stream, int(sys.argv[2]), lambda line: print(line, flush=True))
