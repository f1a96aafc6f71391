"""A service for `streamer.service.workers` whose worker 1 dies as often as it is told to. Quick to import: each
start of a worker is a new process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from streamer.errors import ConfigurationError
from streamer.settings import Settings

DIES_OF = "FRAGILE_WORKER_DIES_OF"
"""The variable that names a file: a line for each time that the worker dies, "crash" or "person"."""


def fragile(settings: Settings, stop: threading.Event, workers_problem: Callable[[], str]) -> None:
    """The service with these settings, in a worker's process."""
    dies_of = Path(os.environ[DIES_OF])
    if settings.kafka.instance_id.endswith("-1") and (left := dies_of.read_text().splitlines()):
        dies_of.write_text("\n".join(left[1:]))
        raise {"crash": KeyError("no such thing"), "person": ConfigurationError("no such setting")}[left[0]]
    from loop_harness import LINE, EachRow, HashDetector

    from streamer.service.loop import Service

    service = Service(settings, HashDetector(), EachRow(), threshold=LINE, workers_problem=workers_problem)
    threading.Thread(target=lambda: (stop.wait(), service.stop()), daemon=True).start()
    service.run()
