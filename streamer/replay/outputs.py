"""Where a replay writes: a file of JSON lines, or a topic of its own.

Promises: what was written and how far the replay had come are kept together, so that a replay that was cut off at any
moment goes on without losing or doubling an alert: the file by its length in a file beside it, the topic by offsets of
a group of its own in the same transaction. Never writes to a topic of the live service.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamer.errors import ConfigurationError
from streamer.kafka.client import must_exist
from streamer.kafka.offset_store import OffsetStore
from streamer.kafka.producer import Output
from streamer.replay.replay import Judged, Plan, ReplayProgress
from streamer.settings import Settings

_log = structlog.get_logger("ripcurrent.replay")


class FileSink:
    """Alerts as JSON lines in one file and, where wanted, scores in another."""

    def __init__(self, out: Path, scores: Path | None = None) -> None:
        self._paths = [out] if scores is None else [out, scores]
        self._progress = _Beside(out.with_name(f"{out.name}.progress"))
        self._files: list[Any] = []

    def begin(self, request: str, plan: Callable[[], Plan]) -> ReplayProgress:
        """Go on where the same request was cut off, or begin. Raises ConfigurationError where another one was."""
        found = self._progress.read(request)
        if found is None:
            progress = _fresh(request, plan())
            self._files = [path.open("wb") for path in self._paths]
            self.checkpoint(progress)
            return progress
        progress, sizes = found
        for path, size in zip(self._paths, sizes, strict=True):
            if not path.exists() or path.stat().st_size < size:
                raise ConfigurationError(f"{path} lacks what was written to it; to begin anew: rm {self._progress}")
            self._files.append(path.open("r+b"))
            self._files[-1].truncate(size)
            self._files[-1].seek(size)
        return progress

    def write(self, judged: Judged) -> None:
        """Append lines."""
        self._files[0].writelines(alert.value + b"\n" for alert in judged.alerts)
        if len(self._files) > 1:
            self._files[1].writelines(value + b"\n" for value in judged.scores)

    def checkpoint(self, progress: ReplayProgress) -> None:
        """Lines first, then how long they are: what lies beyond that is cut off when it goes on."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._progress.write(progress, [file.tell() for file in self._files])

    def finish(self) -> None:
        """The replay is done: nothing is left to go on with."""
        for file in self._files:
            file.close()
        self._progress.remove()


class TopicSink:
    """Alerts on a topic that is nobody else's, with the positions as committed offsets of a group of its own."""

    def __init__(self, settings: Settings, topic: str) -> None:
        used = {
            *settings.events,
            settings.alerts,
            settings.dead_letters,
            settings.scores,
            settings.ledger,
            settings.feedback,
        }
        if topic in used:
            raise ConfigurationError(f"topic {topic!r} belongs to the live service; a replay needs one of its own")
        self._topic = topic
        self._progress = _Beside(Path(f"{topic}.progress"))
        must_exist(settings, [topic])
        self._positions = OffsetStore(settings, f"{settings.kafka.group_id}-replay-{topic}", [topic])
        self._outputs: list[Output] = []

    def begin(self, request: str, plan: Callable[[], Plan]) -> ReplayProgress:
        """Go on where the same request was cut off, or begin. Raises ConfigurationError where another one was."""
        self._positions.open()
        found = self._progress.read(request)
        if found is None:
            self._positions.remove()
            progress = _fresh(request, plan())
            self._progress.write(progress, [])
            return progress
        progress, _ = found
        progress.positions |= self._positions.committed(progress.positions)
        return progress

    def write(self, judged: Judged) -> None:
        """Take alerts for the next transaction."""
        now_ms = int(time.time() * 1000)
        self._outputs.extend(
            Output(self._topic, alert.key, alert.value, [*alert.headers], now_ms, alert.uid) for alert in judged.alerts
        )

    def checkpoint(self, progress: ReplayProgress) -> None:
        """Alerts and positions in one transaction; figures after it."""
        refused = self._positions.publish(self._outputs, progress.positions)
        if refused:
            _log.error("alerts are too large for the topic", topic=self._topic, alerts=sorted(refused))
        self._outputs = []
        self._progress.write(progress, [])

    def finish(self) -> None:
        """The replay is done: its group goes, the alerts stay."""
        self._progress.remove()
        self._positions.close()
        self._positions.remove()


class _Beside:
    """The file that says how far a replay has come."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self, request: str) -> tuple[ReplayProgress, list[int]] | None:
        """What was written last, with the sizes of the files; None where nothing was. Raises ConfigurationError."""
        if not self._path.exists():
            return None
        try:
            value = orjson.loads(self._path.read_bytes())
            progress, sizes = ReplayProgress.from_json(value), [int(size) for size in value["sizes"]]
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{self._path} cannot be read ({error}); to begin anew: rm {self._path}") from None
        if progress.request != request:
            raise ConfigurationError(
                f"{self._path} is of another replay that was cut off ({progress.request}); ask for the same to go on, "
                f"or rm {self._path}"
            )
        return progress, sizes

    def write(self, progress: ReplayProgress, sizes: Sequence[int]) -> None:
        """Replace it as one."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        temporary.write_bytes(orjson.dumps(progress.to_json() | {"sizes": [*sizes]}))
        os.replace(temporary, self._path)

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink(missing_ok=True)


def _fresh(request: str, plan: Plan) -> ReplayProgress:
    return ReplayProgress(request, plan, {source: first for source, (first, _) in plan.scored.items()})
