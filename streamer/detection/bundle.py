"""What a detector needs, in memory; `streamer.bundles` reads and writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.models.record_encoder import RecordEncoder
from state.drift_guard import EntityDrifts
from streamer.detection.combine import EventScorer

ENCODER_FILE = "encoder.safetensors"


@dataclass(frozen=True)
class Bundle:
    """What a detector needs. exemplars: the normal event of each vector of the baseline, compact and redacted, as JSON;
    codes: uint16 [fields, exemplars], their features; anonymised: a normal event, without entities and places, for each
    code of the sequence model; profile: int64, the frequency of each code of each field in training; manifest: the
    contents of `manifest.json`; drifts: how far each entity has drifted, as of the last refresh."""

    encoder: RecordEncoder
    scorer: EventScorer
    exemplars: list[bytes]
    anonymised: list[bytes]
    profile: NDArray[np.int64]
    manifest: dict[str, Any]
    codes: NDArray[np.uint16]
    drifts: EntityDrifts = field(default_factory=EntityDrifts)

    @property
    def version(self) -> str:
        """Name and hash: two bundles of the same version give the same scores."""
        return str(self.manifest["version"])

    @property
    def dim(self) -> int:
        """The length of a record embedding."""
        return self.scorer.record.baseline.dim

    @property
    def encoder_hash(self) -> str:
        """Part of the keys of windows, so that vectors of different encoders never mix."""
        return str(self.manifest["files"][ENCODER_FILE])[:16]

    def threshold(self, alerts_per_day: float, events_per_day: float | None = None) -> float:
        """The p-value at which normal traffic gives so many alerts a day; events_per_day: of training by default."""
        return min(0.5, alerts_per_day / max(events_per_day or float(self.manifest["training"]["events_per_day"]), 1.0))
