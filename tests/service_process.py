"""What the tests of the whole path share: `ripcurrent run` as a process, and reading what it wrote."""

from __future__ import annotations

import gzip
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from loop_harness import Topics, until
from test_cli import COMMAND

import encoder.training.masked_fields
import encoder.training.sequence

LINE = 0.02


@contextmanager
def short_training() -> Iterator[None]:
    """What is tested here does not depend on how well the detector detects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.training.masked_fields, "STEPS", 30)
        patch.setattr(encoder.training.sequence, "STEPS", 30)
        yield


def lines(path: Path) -> list[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read().splitlines()


class Service:
    """`ripcurrent run` as a process, with its own database of Redis (0 to 15)."""

    def __init__(self, topics: Topics, bundle: Path, redis_url: str, database: int, **settings: Any) -> None:
        flags = {
            "bundle": bundle,
            "kafka-bootstrap-servers": topics.bootstrap,
            "kafka-group-id": topics.name,
            "kafka-instance-id": "one",
            "kafka-property": "session.timeout.ms=6000",
            "redis-url": redis_url.removesuffix("/0") + f"/{database}",
            "tenant": topics.events,
            "events": topics.events,
            "alerts": f"{topics.name}-alerts",
            "dead-letters": f"{topics.name}-dead",
            "scores": f"{topics.name}-scores",
            "start": "earliest",
            "threshold": LINE,
            "device": "cpu",
            "metrics-port": 0,
            "log-level": "warning",
        }
        given = {key.replace("_", "-"): value for key, value in settings.items()}
        self.topics = topics
        self.command = [*COMMAND, "run", *(f"--{key}={value}" for key, value in (flags | given).items())]

    def run_until(self, n: int, *, kill: bool = False, seconds: float = 90) -> None:
        """Start, wait until n messages are committed, and end with SIGTERM, or with SIGKILL wherever it stands."""
        with self.running(kill=kill) as process:
            until(lambda: process.poll() is not None or self.done() >= n, seconds)
            assert process.poll() is None, f"it ended with {process.returncode}"

    @contextmanager
    def running(self, *, kill: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """Its process, ended with SIGTERM or SIGKILL."""
        with subprocess.Popen(self.command) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            code = process.wait(30)
        assert code == (-signal.SIGKILL if kill else 0)

    def done(self) -> int:
        return sum(max(offset, 0) for offset in self.topics.committed().values())


def scores_of(topics: Topics) -> dict[tuple[int, int], float]:
    """p-value by (offset, index); each event is there once."""
    found = [orjson.loads(message.value()) for message in topics.read("scores")]
    scores = {(score["offset"], score["index"]): score["p_value"] for score in found}
    assert len(scores) == len(found)
    return scores


def alerts_of(topics: Topics) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Key and body of each alert by its id, without the times at which it was made; each is there once."""
    found = {}
    messages = topics.read("alerts")
    for message in messages:
        body = orjson.loads(message.value())
        del body["time"]
        for name in [name for name in body["metadata"] if name.endswith("_time")]:
            del body["metadata"][name]
        found[body["metadata"]["uid"]] = message.key(), body
    assert len(found) == len(messages)
    return found


def undisturbed_run(topics: Topics, bundle: Path, redis_url: str, events: Sequence[bytes], **settings: Any) -> None:
    topics.produce(list(events), 0)
    Service(topics, bundle, redis_url, 1, **settings).run_until(len(events), seconds=600)
