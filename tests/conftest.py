"""Real servers for the tests that need them: one Kafka and one Valkey for each process that runs tests, started when
first asked for. What takes long to make (a fitted bundle) is made once and shared by all processes of a test run."""

from __future__ import annotations

import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from streamer.devtools import servers

if TYPE_CHECKING:
    from loop_harness import Topics

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the command does, before torch is imported

# A job in the background of a script is born with SIGINT ignored, and so would be each process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Bootstrap servers of a real Kafka; tests of a process share it, so name topics with `unique`."""
    with servers.kafka() as bootstrap:
        yield bootstrap


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a real Valkey; tests of a process share it, so use a tenant or a key prefix of your own (`unique`)."""
    with servers.valkey() as url:
        yield url


@pytest.fixture
def unique() -> Callable[[str], str]:
    """Names that no other test has: unique("events") -> "events-3f2a9c"."""
    return lambda name: f"{name}-{uuid.uuid4().hex[:10]}"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """made_once(name, make): a folder that `make` filled, in whichever process of the test run asked first. All
    processes share it, so tests only read it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # The folder of the process is inside that of the test run.
        root = root.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = root / f"shared-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                staging = Path(tempfile.mkdtemp(dir=root, prefix=f"making-{name}-"))
                make(staging)
                staging.rename(folder)
        return folder

    return made


def _simulated_day(folder: Path) -> None:
    from service_process import short_training

    from streamer.devtools.simulator.generator import schedule, simulate, write
    from streamer.training.fit import fit

    days = list(simulate(seed=3, days=2, events_per_day=2600, incidents=schedule(2, clean=1)))
    write(days[:1], folder / "train.ndjson")
    write(days[1:], folder / "test.ndjson")
    with short_training():
        fit([folder / "train.ndjson"], folder / "bundle")


@pytest.fixture(scope="session")
def folder(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """train.ndjson, a simulated day; test.ndjson, the next, with incidents; and bundle, fitted on the first in a short
    training."""
    return made_once("simulated-day", _simulated_day)


@pytest.fixture(scope="session")
def undisturbed(kafka: str, folder: Path, redis_url: str) -> Topics:
    """An undisturbed run over test.ndjson."""
    from loop_harness import create
    from service_process import lines, undisturbed_run

    topics = create(kafka, f"undisturbed-{os.getpid()}", partitions=1)
    undisturbed_run(topics, folder / "bundle", redis_url, lines(folder / "test.ndjson"))
    return topics
