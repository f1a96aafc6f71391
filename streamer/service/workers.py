"""Several workers on one machine: processes of one consumer group, started and watched by one that does nothing else.

Promises: a worker that is killed, or that ends with an error nobody expected, is started again while the others go on;
one that ends with an error that a person must mend ends them all, with that error; a worker that dies again and again
is named in the log and by /readyz of the others; being asked to end drains each of them; none outlives the one that
watches. Which worker has which partitions is Kafka's to say.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import structlog

from encoder.ocsf.events import EncoderError
from state.errors import StoreRefusedError
from streamer.errors import RipcurrentError
from streamer.settings import Settings

Serve = Callable[[Settings, threading.Event, Callable[[], str]], None]
"""The service with these settings, until the event is set. The last says what is wrong with other workers, or an empty
string. By reference: a function of a module."""

DRAIN_S = 40.0
"""How long workers may take to drain; then they are killed, which loses nothing."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
STEADY_S = 60.0
"""A worker that lived this long did not die of how it was started."""
AGAIN_AND_AGAIN = 3
"""Deaths in a row, none after STEADY_S, from which on a worker is named as one that does not come up."""
NEEDS_A_PERSON = os.EX_CONFIG
"""Exit code of a worker that must not be started again. Python's own for an error that nobody caught is 1."""

_log = structlog.get_logger("ripcurrent.workers")


def settings_of(settings: Settings, number: int) -> dict[str, Any]:
    """The settings of one worker, plain enough to be handed to it: a port and an instance id of its own."""
    own = settings.model_dump()
    if settings.metrics_port:
        own["metrics_port"] = settings.metrics_port + number
    if settings.kafka.instance_id:
        own["kafka"]["instance_id"] = f"{settings.kafka.instance_id}-{number}"
    return own


class Workers:
    """N workers.

    Args:
        serve: what each of them does.
    """

    def __init__(self, settings: Settings, count: int, serve: Serve) -> None:
        self._settings = settings
        self._serve = serve
        self._stopping = False
        self._running: dict[int, SpawnProcess] = {}
        self._started: dict[int, float] = {}
        self._context = multiprocessing.get_context("spawn")
        self._deaths = self._context.Array("i", count, lock=False)  # In a row, by worker; read by all of them.
        self._due = dict.fromkeys(range(count), 0.0)

    def stop(self, *_: Any) -> None:
        """Ask all to drain and end; may be called from a signal handler."""
        self._stopping = True
        for process in self._running.values():
            process.terminate()

    def run(self) -> int:
        """Until `stop`, or until one ends with an error; returns the exit code of the whole."""
        code = 0
        while self._running or not self._stopping:
            for number in [n for n, due in self._due.items() if due <= time.monotonic() and not self._stopping]:
                self._start(number)
            wait([process.sentinel for process in self._running.values()], 0.2)
            for number, process in list(self._running.items()):
                if not process.is_alive():
                    code = max(code, self._ended(number, process))
                elif self._deaths[number] and time.monotonic() - self._started[number] > STEADY_S:
                    _log.info("worker is steady", worker=number, deaths=self._deaths[number])
                    self._deaths[number] = 0
            if self._stopping:
                break
        self.stop()
        deadline = time.monotonic() + DRAIN_S
        for number, process in self._running.items():
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.is_alive():
                _log.error("worker did not drain in time, killed", worker=number)
                process.kill()
                process.join()
        return code

    def _start(self, number: int) -> None:
        del self._due[number]
        arguments = (settings_of(self._settings, number), self._serve, self._deaths)
        process = self._context.Process(target=work, args=arguments, name=f"worker-{number}")
        self._started[number] = time.monotonic()
        try:
            process.start()
        except OSError as error:  # No memory or no process left for it.
            self._start_again(number, f"cannot be started: {error}")
            return
        self._running[number] = process
        _log.info("worker started", worker=number, pid=process.pid)

    def _ended(self, number: int, process: SpawnProcess) -> int:
        """Start it again after a pause, or end them all. Returns the exit code that this gives the whole."""
        del self._running[number]
        if self._stopping:
            return 0
        if process.exitcode == NEEDS_A_PERSON:
            _log.error("worker ended with an error, all end", worker=number)
            self._stopping = True
            return 1
        self._start_again(number, f"exit code {process.exitcode}")
        return 0

    def _start_again(self, number: int, reason: str) -> None:
        if time.monotonic() - self._started[number] > STEADY_S:
            self._deaths[number] = 0
        pause = min(FIRST_PAUSE_S * 2 ** min(self._deaths[number], 10), LONGEST_PAUSE_S)
        self._deaths[number] += 1
        self._due[number] = time.monotonic() + pause
        known = {"worker": number, "reason": reason, "deaths": self._deaths[number], "after_s": pause}
        if self._deaths[number] < AGAIN_AND_AGAIN:
            _log.error("worker died, started again", **known)
        else:
            _log.error("worker dies again and again: its partitions move each time, look at its error", **known)


def problem_of(deaths: Sequence[int]) -> str:
    """Which workers die again and again, or an empty string. deaths: in a row, by worker."""
    return "; ".join(
        f"worker {number} died {count} times in a row"
        for number, count in enumerate(deaths)
        if count >= AGAIN_AND_AGAIN
    )


def work(values: dict[str, Any], serve: Serve, deaths: Sequence[int]) -> None:
    """One worker, in its own process."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_follow, args=(stop,), name="watch-parent", daemon=True).start()
    try:
        serve(Settings(**values), stop, partial(problem_of, deaths))
    except (RipcurrentError, EncoderError, StoreRefusedError) as error:
        print(f"ripcurrent: {error}", file=sys.stderr)
        sys.exit(NEEDS_A_PERSON)


def _follow(stop: threading.Event) -> None:
    """End with the process that started this one, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        stop.set()
