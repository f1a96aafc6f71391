"""Another bundle while the service runs: one that was promoted takes over, and a candidate scores beside.

Promises: a bundle is opened and its windows are filled in a thread of its own, while the stream goes on with the one
that serves; it takes over between two transactions, at the offsets that are committed, so that no event is lost or
judged twice; one that cannot be opened changes nothing. A bundle of the same encoder finds the windows that there are,
one of another fills windows of its own from Kafka first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from state.errors import StateError, StateLostError
from streamer.bundles.manifest import BundleError, resolve
from streamer.detection.isolation import EventIsolation
from streamer.errors import RipcurrentError
from streamer.service.metrics import Metrics
from streamer.service.ports import Bundles, Opened, OwnedPartitions
from streamer.service.window_rebuild import Rebuild
from streamer.settings import Settings

if TYPE_CHECKING:
    pass

WATCH_S = 1.0
"""How often the pointer of the store is looked at."""
AGAIN_S = 5.0
"""After a store error, and after a shadow that went wrong."""

_log = structlog.get_logger("ripcurrent.succession")


class BundlePreparation:
    """Opens the bundle at `path` and fills its windows, in a thread.

    Args:
        opening: as in `Bundles`.
        partitions: those of this process.
    """

    def __init__(
        self, settings: Settings, path: Path, opening: Callable[[Path], Opened], partitions: OwnedPartitions
    ) -> None:
        self.path = path
        self.opened: Opened | None = None
        self.error: Exception | None = None
        self._settings = settings
        self._opening = opening
        self._partitions = partitions
        self._isolation = EventIsolation()
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="succession", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it is opened and its windows had all events up to a commit not long ago; or failed."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Give up, and let the connections of its windows go: now, or when the thread that uses them ends."""
        with self._ending:
            self._stop.set()
            if self._ended:
                self._let_go()

    def _let_go(self) -> None:
        if self.opened is not None and self.opened.windows is not None:
            self.opened.windows.close()

    def catch_up(self) -> None:
        """Fill the windows up to the commit as it is now: few events, if it was done. Between two transactions, this
        makes them as if this bundle had always served. Raises StateError."""
        windows = self.opened.windows if self.opened is not None else None
        while windows is not None and self.opened is not None and not self._stop.is_set():
            try:
                windows.identify(self._partitions.topics())
                windows.check_epoch(self._partitions.owned())
                return
            except StateLostError as lost:
                now_ms = int(time.time() * 1000)
                remember = partial(self._isolation.remember, self.opened.detector)
                rebuild = Rebuild(self._settings, windows, remember, lost, self._partitions.owned(), now_ms=now_ms)
                try:
                    while not rebuild.step(self._partitions.owned()) and not self._stop.is_set():
                        pass
                finally:
                    rebuild.close()

    def _run(self) -> None:
        try:
            self.opened = self._opening(self.path)
            while not self._stop.is_set():
                try:
                    self.catch_up()
                    return
                except StateError as error:
                    _log.warning("filling the windows of another bundle again", reason=str(error))
                    self._stop.wait(AGAIN_S)
        except Exception as error:
            self.error = error
        finally:
            with self._ending:
                self._ended = True
                if self._stop.is_set():
                    self._let_go()


class BundleRollout:
    """Watches the store and says when a promoted bundle is ready to take over. partitions: as in
    `BundlePreparation`."""

    def __init__(self, settings: Settings, bundles: Bundles, partitions: OwnedPartitions, metrics: Metrics) -> None:
        self._settings = settings
        self._opening = bundles.opening
        self._partitions = partitions
        self._metrics = metrics
        self._serving = bundles.serving
        self._preparation: BundlePreparation | None = None
        self._watched_at = 0.0
        self._refused: Path | None = None

    def ready(self) -> BundlePreparation | None:
        """What can take over now: `catch_up` with it between two transactions, then say `done`."""
        if time.monotonic() - self._watched_at >= WATCH_S:
            self._watched_at = time.monotonic()
            self._watch()
        preparation = self._preparation
        if preparation is None or not preparation.done:
            return None
        if preparation.error is not None:
            self._metrics.bundles_refused.inc()
            self._refused, self._preparation = preparation.path, None
            preparation.close()
            known = isinstance(preparation.error, (RipcurrentError, StateError))
            _log.error(
                "the promoted bundle cannot serve, the one before goes on",
                bundle=preparation.path.name,
                reason=str(preparation.error),
                exc_info=None if known else preparation.error,
            )
            return None
        return preparation

    def done(self, preparation: BundlePreparation) -> None:
        """It has taken over."""
        self._serving, self._preparation = preparation.path, None
        self._metrics.swaps.inc()
        _log.info("another bundle serves", bundle=preparation.path.name)

    def close(self) -> None:
        if self._preparation is not None:
            self._preparation.close()

    def _watch(self) -> None:
        try:
            wanted = resolve(self._settings.bundle)
        except BundleError:
            return
        under_way = self._preparation.path if self._preparation is not None else self._serving
        if wanted in (under_way, self._refused):
            return
        self.close()
        self._preparation, self._refused = None, None
        if wanted != self._serving:
            _log.info("opening the promoted bundle", bundle=wanted.name)
            self._preparation = BundlePreparation(self._settings, wanted, self._opening, self._partitions)
