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
from loop_harness import PATIENCE_S, Topics, until
from test_cli import COMMAND

import encoder.training.replaced_fields
import encoder.training.sequence

LINE = 0.02


@contextmanager
def short_training(steps: int = 30) -> Iterator[None]:
    """Both networks are trained for so many steps only. With 30, little depends on how well the detector detects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.training.replaced_fields, "STEPS", steps)
        patch.setattr(encoder.training.sequence, "STEPS", steps)
        yield


def lines(path: Path) -> list[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read().splitlines()


class Service:
    """`ripcurrent run` as a process, with its own database of Redis (0 to 15). A setting that is None has its default,
    such as threshold=None: the one that follows the budget; a tuple is a flag given several times."""

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
            "ledger": f"{topics.name}-ledger",
            "start": "earliest",
            "threshold": LINE,
            "device": "cpu",
            "metrics-port": 0,
            "log-level": "warning",
        }
        flags |= {key.replace("_", "-"): value for key, value in settings.items()}
        given = [
            f"--{key}={one}"
            for key, value in flags.items()
            for one in (value if isinstance(value, tuple) else (value,))
            if one is not None
        ]
        self.topics = topics
        self.command = [*COMMAND, "run", *given]

    def run_until(self, n: int, *, kill: bool = False, seconds: float = PATIENCE_S) -> None:
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
            code = process.wait(PATIENCE_S)
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
