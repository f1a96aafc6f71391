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
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from streamer.errors import ConfigurationError, StreamError
from streamer.kafka import (
    START_S,
    Offsets,
    TransactionAbortedError,
    build,
    client_properties,
    committed_offsets,
    reason_of,
)
from streamer.publishing import Output, TransactionalPublisher
from streamer.replay import Judged, Plan, Progress
from streamer.settings import Settings

ABORTS = 5
"""Times that a transaction is tried again: Kafka says when it is worth it."""


class FileSink:
    """Alerts as JSON lines in one file and, where wanted, scores in another."""

    def __init__(self, out: Path, scores: Path | None = None) -> None:
        self._paths = [out] if scores is None else [out, scores]
        self._progress = _Beside(out.with_name(f"{out.name}.progress"))
        self._files: list[Any] = []

    def begin(self, request: str, plan: Callable[[], Plan]) -> Progress:
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

    def checkpoint(self, progress: Progress) -> None:
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
        used = {*settings.events, settings.alerts, settings.dead_letters, settings.scores}
        if topic in used:
            raise ConfigurationError(f"topic {topic!r} belongs to the live service; a replay needs one of its own")
        self.group = f"{settings.kafka.group_id}-replay-{topic}"
        kafka = settings.kafka.model_copy(update={"group_id": self.group})
        own = {"alerts": topic, "dead_letters": topic, "scores": "", "kafka": kafka}
        self._settings, self._topic = settings.model_copy(update=own), topic
        self._progress = _Beside(Path(f"{topic}.progress"))
        self._admin = build(AdminClient, client_properties(settings))
        self._check_topic()
        self._group = _OwnGroup(self._settings)
        self._publisher = TransactionalPublisher(self._settings, self._group, "writer")
        self._outputs: list[Output] = []

    def begin(self, request: str, plan: Callable[[], Plan]) -> Progress:
        """Go on where the same request was cut off, or begin. Raises ConfigurationError where another one was."""
        self._publisher.open()
        found = self._progress.read(request)
        if found is None:
            self._remove_group()
            progress = _fresh(request, plan())
            self._progress.write(progress, [])
            return progress
        progress, _ = found
        progress.positions |= self._group.committed(progress.positions)
        return progress

    def write(self, judged: Judged) -> None:
        """Take alerts for the next transaction."""
        now_ms = int(time.time() * 1000)
        self._outputs.extend(
            Output(self._topic, alert.key, alert.value, [*alert.headers], now_ms, "") for alert in judged.alerts
        )

    def checkpoint(self, progress: Progress) -> None:
        """Alerts and positions in one transaction; figures after it."""
        for attempt in range(ABORTS):
            try:
                self._publisher.publish(self._outputs, progress.positions)
                break
            except TransactionAbortedError as error:
                if attempt == ABORTS - 1:
                    raise StreamError(f"writing to {self._topic}: {error}; run it again to go on") from error
                time.sleep(0.2 * 2**attempt)
        self._outputs = []
        self._progress.write(progress, [])

    def finish(self) -> None:
        """The replay is done: its group goes, the alerts stay."""
        self._progress.remove()
        self._group.close()
        self._remove_group()

    def _check_topic(self) -> None:
        try:
            known = self._admin.list_topics(timeout=START_S).topics
        except KafkaException as error:
            raise ConfigurationError(
                f"no Kafka answers at {self._settings.kafka.bootstrap_servers} ({reason_of(error)})"
            ) from None
        if self._topic not in known:
            raise ConfigurationError(
                f"no such topic: {self._topic}; create with kafka-topics.sh --create --topic {self._topic}"
            )

    def _remove_group(self) -> None:
        for future in self._admin.delete_consumer_groups([self.group], request_timeout=10).values():
            future.exception(15)  # Mostly: there is no such group.


class _OwnGroup:
    """The group that holds a replay's positions: it has no members, so nothing of it rebalances."""

    def __init__(self, settings: Settings) -> None:
        own = {"group.id": settings.kafka.group_id, "enable.auto.commit": False}
        self._consumer = build(Consumer, client_properties(settings) | own)

    def group_metadata(self) -> Any:
        return self._consumer.consumer_group_metadata()

    def owns(self, partitions: Any) -> bool:
        return True

    def commit(self, offsets: Any) -> None:
        raise NotImplementedError("positions go out in the transaction")

    def committed(self, sources: Offsets) -> Offsets:
        return committed_offsets(self._consumer, [TopicPartition(*source) for source in sources])

    def close(self) -> None:
        self._consumer.close()


class _Beside:
    """The file that says how far a replay has come."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self, request: str) -> tuple[Progress, list[int]] | None:
        """What was written last, with the sizes of the files; None where nothing was. Raises ConfigurationError."""
        if not self._path.exists():
            return None
        try:
            value = orjson.loads(self._path.read_bytes())
            progress, sizes = Progress.from_json(value), [int(size) for size in value["sizes"]]
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{self._path} cannot be read ({error}); to begin anew: rm {self._path}") from None
        if progress.request != request:
            raise ConfigurationError(
                f"{self._path} is of another replay that was cut off ({progress.request}); ask for the same to go on, "
                f"or rm {self._path}"
            )
        return progress, sizes

    def write(self, progress: Progress, sizes: Sequence[int]) -> None:
        """Replace it as one."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        temporary.write_bytes(orjson.dumps(progress.to_json() | {"sizes": [*sizes]}))
        os.replace(temporary, self._path)

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink(missing_ok=True)


def _fresh(request: str, plan: Plan) -> Progress:
    return Progress(request, plan, {source: first for source, (first, _) in plan.scored.items()})
