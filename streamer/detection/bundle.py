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
    """What a detector needs. exemplars: for each vector of the baseline, the normal event that it stands for, compact
    and redacted; codes: uint16 [fields, exemplars], their features;
    behaviours: for each outcome that sequences are made of, a normal event without who and where;
    profile: how often each code of each field came in training; manifest: what `manifest.json` says; watch: how far
    entities have come from what they did first, as of the last refresh."""

    encoder: RecordEncoder
    scorer: EventScorer
    exemplars: list[bytes]
    anonymised: list[bytes]
    profile: NDArray[np.int64]
    manifest: dict[str, Any]
    codes: NDArray[np.uint16]
    watch: EntityDrifts = field(default_factory=EntityDrifts)

    @property
    def version(self) -> str:
        """Name and hash: two bundles with the same version score alike."""
        return str(self.manifest["version"])

    @property
    def dim(self) -> int:
        """The length of a record embedding."""
        return self.scorer.record.baseline.dim

    @property
    def encoder_hash(self) -> str:
        """Windows of vectors made by another encoder are never mixed with this one's."""
        return str(self.manifest["files"][ENCODER_FILE])[:16]

    def threshold(self, alerts_per_day: float, events_per_day: float | None = None) -> float:
        """The p-value at which normal traffic gives that many alerts a day, at the rate of training unless told."""
        return min(0.5, alerts_per_day / max(events_per_day or float(self.manifest["training"]["events_per_day"]), 1.0))
