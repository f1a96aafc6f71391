"""A candidate bundle that scores beside the one that serves, and is compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import structlog
from numpy.typing import NDArray

from encoder.ocsf.events import Message
from streamer.bundles.manifest import resolve
from streamer.kafka.client import Offsets
from streamer.service.bundle_rollout import AGAIN_S, BundlePreparation
from streamer.service.metrics import Metrics
from streamer.service.ports import Bundles, OwnedPartitions
from streamer.settings import Settings

if TYPE_CHECKING:
    from streamer.detection.batches import ScoredBatch


_log = structlog.get_logger("ripcurrent.shadow")


class Shadow:
    """A candidate that scores what the serving bundle scores, and is compared with it. Whatever goes wrong with it is
    logged and counted, and it begins again; the stream does not wait for it beyond its own scoring."""

    def __init__(
        self,
        settings: Settings,
        path: Path,
        bundles: Bundles,
        partitions: OwnedPartitions,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._path = path
        self._opening = bundles.opening
        self._partitions = partitions
        self._metrics = metrics
        self._preparation: BundlePreparation | None = None
        self._again_at = 0.0
        self._prepared: set[tuple[str, int]] = set()

    def between_transactions(self) -> None:
        """Begin when it is ready; begin anew when partitions have come."""
        if self._preparation is None:
            if self._partitions.owned() and time.monotonic() >= self._again_at:
                self._preparation = BundlePreparation(
                    self._settings, resolve(self._path), self._opening, self._partitions
                )
        elif self._preparation.done and not self._partitions.owned().keys() <= self._prepared:
            self._guarded(self._join)

    def rejoin(self) -> None:
        """Partitions have come, or are of another topic than before: look at what its windows hold again."""
        self._prepared = set()

    def compare(self, messages: Sequence[Message], scored: ScoredBatch, threshold: NDArray[np.float64]) -> None:
        """Score the batch too, and count how that differs."""
        if self._prepared:
            self._guarded(lambda: self._compare(messages, scored, threshold))

    def prepare(self, offsets: Offsets) -> None:
        """As `WindowStore.prepare`."""
        if self._prepared:
            self._guarded(lambda: self._windows_do("prepare", offsets))

    def committed(self, offsets: Offsets) -> None:
        """As `WindowStore.committed`."""
        if self._prepared:
            self._guarded(lambda: self._windows_do("committed", offsets))

    def close(self) -> None:
        if self._preparation is not None:
            self._preparation.close()

    def _join(self) -> None:
        assert self._preparation is not None
        if self._preparation.error is not None:
            raise self._preparation.error
        self._preparation.catch_up()
        self._prepared = set(self._partitions.owned())
        _log.info("a candidate scores beside", bundle=self._preparation.path.name)

    def _compare(self, messages: Sequence[Message], scored: ScoredBatch, threshold: NDArray[np.float64]) -> None:
        assert self._preparation is not None
        assert self._preparation.opened is not None
        detector = self._preparation.opened.detector
        with self._metrics.time("shadow"):
            if detector.live is not None:  # None has served this bundle, so nothing is recorded for it.
                detector.live.moves = True
            other = detector.judge(detector.prepare(messages))
            detector.live = other.live
        ours, theirs = scored.p_value <= threshold, other.p_value <= threshold
        for name, rows in (("both", ours & theirs), ("gained", theirs & ~ours), ("lost", ours & ~theirs)):
            self._metrics.shadow_alerts.labels(name).inc(int(rows.sum()))
        self._metrics.shadow_events.inc(len(scored))
        decades = np.abs(np.log10(other.p_value) - np.log10(scored.p_value))
        self._metrics.shadow_decades.inc(float(decades.sum()))

    def _windows_do(self, what: str, offsets: Offsets) -> None:
        assert self._preparation is not None
        assert self._preparation.opened is not None
        if self._preparation.opened.windows is not None:
            getattr(self._preparation.opened.windows, what)(offsets)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            _log.warning("the candidate beside begins again", reason=str(error), kind=type(error).__name__)
            self._metrics.shadow_failures.inc()
            self.close()
            self._preparation, self._prepared = None, set()
            self._again_at = time.monotonic() + AGAIN_S
