"""Windows and timers as one: whoever commits or fills again does so for both.

Promises that what one of them lost is filled for both: each recognises what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from state.errors import SourcePartition, StateLostError
from state.redis.timers import RedisTimers
from state.redis.windows import RedisWindows
from streamer.bundles.bundle_files import load
from streamer.detection.detector import Detector
from streamer.redaction import Redactor
from streamer.settings import Settings, device_of


class EntityState:
    """What the service needs of a `WindowStore`, and the timers beside it."""

    def __init__(self, windows: RedisWindows, timers: RedisTimers) -> None:
        self.age_ms = windows.age_ms
        self._windows, self._timers = windows, timers

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._windows.close()
        self._timers.close()

    def round_trips(self) -> dict[str, float]:
        """As `RedisWindows` says; timers are on the same server."""
        return self._windows.round_trips()

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._windows.prepare(offsets)
        self._timers.prepare(offsets)

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._windows.committed(offsets)
        self._timers.committed(offsets)

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        self._windows.identify(topics)
        self._timers.identify(topics)

    def identified(self) -> Mapping[SourcePartition, int]:
        return self._windows.identified()

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._windows.check_epoch(offsets)
        self._timers.check_epoch(offsets)

    def begin_rebuild(self, lost: StateLostError, others: Iterable[SourcePartition] = ()) -> None:
        self._windows.begin_rebuild(lost, others)
        self._timers.begin_rebuild(lost)

    def finish_rebuild(self, sources: Iterable[SourcePartition], horizon_ms: int = 0) -> None:
        self._windows.finish_rebuild(sources, horizon_ms)


def open_detector(settings: Settings, path: Path) -> tuple[Detector, RedisWindows | EntityState]:
    """The detector of the service: the bundle at `path`, and windows in the settings' Redis; with them timers, where
    some kind of entity comes to an end."""
    bundle = load(path, device_of(settings))
    place: dict[str, Any] = {"tenant": settings.tenant, "timeout_s": settings.redis.timeout_s}
    place |= {"retries": settings.redis.retries, **settings.redis.client_arguments()}
    windows = RedisWindows(settings.redis.url, encoder=bundle.encoder_hash, dim=bundle.dim, **place)
    sequences = bundle.scorer.sequences
    if sequences is None or not sequences.model.timeouts:
        return Detector(bundle, windows, tenant=settings.tenant), windows
    redactor = Redactor(settings.redact)
    timers = RedisTimers(settings.redis.url, space=bundle.encoder_hash, **place)
    detector = Detector(bundle, windows, tenant=settings.tenant, timers=timers, redactor=redactor)
    return detector, EntityState(windows, timers)
