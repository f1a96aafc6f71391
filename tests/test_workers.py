"""`ripcurrent run --workers N`: workers that come, go and are killed under load lose nothing and double nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fragile_worker import DIES_OF, fragile
from loop_harness import Topics, create, until
from service_process import Service, alerts_of, lines

from streamer.devtools.servers import free_port
from streamer.service import workers

pytestmark = pytest.mark.extended


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("workers"), partitions=6)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The pids of the workers; the process that multiprocessing tracks its resources with is none."""
    try:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []


def feed(topics: Topics, events: list[bytes], seconds: float) -> threading.Thread:
    """Produce the events over some seconds, in a thread."""

    def produce() -> None:
        steps = 20
        for step in range(steps):
            topics.produce(events[step * len(events) // steps : (step + 1) * len(events) // steps])
            time.sleep(seconds / steps)

    thread = threading.Thread(target=produce)
    thread.start()
    return thread


def assert_each_once(topics: Topics, n: int) -> None:
    labels = Counter(message.key() for message in topics.read("scores"))
    assert (len(labels), set(labels.values())) == (n, {1})
    alerts = [body for _, body in alerts_of(topics).values()]
    stories = Counter(body["finding_info"]["uid"] for body in alerts if body["activity_id"] == 1)
    assert set(stories.values()) == {1}
    assert {body["finding_info"]["uid"] for body in alerts} == stories.keys()


def test_workers_that_are_killed_and_added_under_load_lose_and_double_nothing(
    topics: Topics, folder: Path, redis_url: str
) -> None:
    events = lines(folder / "test.ndjson")
    service = Service(topics, folder / "bundle", redis_url, 8, batch_size=32)
    other = Service(topics, folder / "bundle", redis_url, 8, batch_size=32, kafka_instance_id="other")
    with subprocess.Popen([*service.command, "--workers=2"]) as watcher:
        until(lambda: len(children(watcher)) == 2)
        feeding = feed(topics, events, 8)
        until(lambda: service.done() > 100)
        first, second = children(watcher)
        os.kill(first, signal.SIGKILL)
        with subprocess.Popen(other.command) as added:
            until(lambda: len(set(children(watcher)) - {first, second}) == 1)
            feeding.join()
            until(lambda: watcher.poll() is not None or service.done() >= len(events))
            added.terminate()
            assert added.wait(30) == 0
        watcher.terminate()
        assert watcher.wait(45) == 0
    assert service.done() == len(events)
    assert_each_once(topics, len(events))


def test_a_worker_that_ends_with_an_error_ends_all_with_it(topics: Topics, folder: Path, redis_url: str) -> None:
    service = Service(topics, folder / "bundle", redis_url, 8, events="nowhere")
    done = subprocess.run([*service.command, "--workers=2"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ripcurrent: no such topic" in done.stderr
    assert "Traceback" not in done.stderr


class Watched:
    """Two workers of the `fragile` service, watched from a thread."""

    def __init__(self, topics: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_of: str) -> None:
        (tmp_path / "dies").write_text(dies_of)
        monkeypatch.setenv(DIES_OF, str(tmp_path / "dies"))
        self.port = free_port()
        self.workers = workers.Workers(topics.settings(metrics_port=self.port), 2, fragile)
        self.code: int | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        self.code = self.workers.run()

    def ready(self, number: int) -> str:
        """What /readyz of a worker says."""
        try:
            with urllib.request.urlopen(f"http://localhost:{self.port + number}/readyz", timeout=5) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return "nothing answers"

    def end(self) -> int | None:
        self.workers.stop()
        self.thread.join(60)
        return self.code


def test_a_worker_that_dies_again_and_again_is_named_while_the_others_go_on(
    topics: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(workers, "STEADY_S", 3600.0)  # However long a start takes here, it is no steady life.
    watched = Watched(topics, tmp_path, monkeypatch, "crash\n" * 3)
    try:
        topics.produce_events(600)
        until(lambda: watched.ready(0) == "worker 1 died 3 times in a row\n")
        topics.wait_until_read(600)
        until(lambda: watched.ready(1) == "worker 1 died 3 times in a row\n")  # It is up, and not steady yet.
        monkeypatch.setattr(workers, "STEADY_S", 0.0)
        until(lambda: watched.ready(0) == watched.ready(1) == "ok\n")
        topics.produce_events(600)
        topics.wait_until_read(1200)
    finally:
        assert watched.end() == 0
    labels = Counter(message.key() for message in topics.read("scores"))
    assert (len(labels), set(labels.values())) == (1200, {1})


def test_a_worker_that_comes_up_with_wrong_settings_after_a_crash_ends_all(
    topics: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = Watched(topics, tmp_path, monkeypatch, "crash\nperson")
    try:
        until(lambda: watched.code is not None)
    finally:
        assert watched.end() == 1
    assert "ripcurrent: no such setting\n" in capfd.readouterr().err


@pytest.mark.slow
def test_no_worker_outlives_the_process_that_watches(topics: Topics, folder: Path, redis_url: str) -> None:
    service = Service(topics, folder / "bundle", redis_url, 8)
    with subprocess.Popen([*service.command, "--workers=2"]) as watcher:
        until(lambda: len(children(watcher)) == 2)
        workers = children(watcher)
        topics.produce(lines(folder / "test.ndjson")[:60])
        until(lambda: service.done() >= 60)
        watcher.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
