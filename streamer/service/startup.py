"""Builds the service from its settings and runs it. What can be wrong with them is checked before anything is read."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

from state.errors import StateError
from streamer.errors import ConfigurationError
from streamer.service.logs import configure_logging
from streamer.settings import Settings, hide, shown

GIVE_BACK_S = 60.0
"""How often memory that is free goes back to the system. It takes milliseconds."""


def serve(settings: Settings, stop: threading.Event, workers_problem: Callable[[], str] = str) -> None:
    """The service, until `stop` is set. workers_problem: as in `Service`. Raises ConfigurationError before anything is
    read, StreamError after."""
    configure_logging(settings)
    _check_bundle(settings)
    check_redis(settings)
    from streamer.bundles.manifest import read_manifest, resolve, verify
    from streamer.kafka.client import check_topics

    check_topics(settings)
    serving = resolve(settings.bundle)
    verify(serving)
    # Only now what takes seconds to import and load.
    from streamer.alerting.pipeline import open_episodes, open_findings
    from streamer.alerting.suppression_feed import open_feedback
    from streamer.alerting.threshold_ledger import ThresholdLedger
    from streamer.detection.detector import Detector
    from streamer.explain.attribution import Explainer
    from streamer.kafka.client import claim_instance
    from streamer.service.entity_state import open_detector
    from streamer.service.loop import Service
    from streamer.service.metric_collectors import BaselineCollector, DeviceCollector, DriftCollector
    from streamer.service.ports import Bundles, Opened

    episodes, feedback = open_episodes(settings), open_feedback(settings)

    def opening(path: Path) -> Opened:
        detector, windows = open_detector(settings, path)
        findings = open_findings(settings, Explainer(detector.bundle, detector.windows), episodes, feedback)
        return Opened(detector.bundle.version, detector, findings, windows)

    first = opening(serving)
    instance = claim_instance(settings)
    rate = float(read_manifest(serving)["training"]["events_per_day"])
    threshold: float | ThresholdLedger
    if settings.threshold is not None:
        threshold = settings.threshold
    else:
        threshold = ThresholdLedger(settings, instance, rate, feedback.withdrawn if feedback else dict)
    service = Service(
        settings,
        first.detector,
        first.alerting,
        threshold=threshold,
        windows=first.windows,
        instance=instance,
        bundles=Bundles(serving, opening),
        workers_problem=workers_problem,
    )
    service.metrics.bundle.labels(first.version).set(1)

    def serves() -> Detector:
        """Another one may the next moment."""
        return cast(Detector, service.detector)

    service.metrics.registry.register(DriftCollector(lambda: serves().drift))
    service.metrics.registry.register(DeviceCollector(lambda: serves().bundle.encoder.device))
    service.metrics.registry.register(BaselineCollector(lambda: serves().bundle.scorer.record.baseline))

    def follow() -> None:
        # glibc keeps what was freed between what is held: 45 to 80 MB of 850 came back each time, in 3 to 7 ms.
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
        while not stop.wait(GIVE_BACK_S):
            give_back(0)
        service.stop()

    threading.Thread(target=follow, name="stop", daemon=True).start()
    service.run()


def _check_bundle(settings: Settings) -> None:
    from streamer.bundles.manifest import resolve

    if not (resolve(settings.bundle) / "manifest.json").is_file():
        raise ConfigurationError(
            f"no bundle at {settings.bundle}; `ripcurrent fit FILES... --out {settings.bundle}` makes one"
        )


def check_redis(settings: Settings) -> None:
    """Raises ConfigurationError where Redis does not answer."""
    from state.redis.client import ping

    url, wait = shown(settings)["redis.url"], min(settings.redis.timeout_s, 5.0)
    arguments = settings.redis.client_arguments() | {"socket_timeout": wait, "socket_connect_timeout": wait}
    try:
        ping(settings.redis.url, **arguments)
    except StateError as error:
        raise ConfigurationError(f"no Redis at {url} (redis.url): {hide(str(error), settings)}") from None
