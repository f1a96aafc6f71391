"""The demo counts what it shows, runs on real servers, and leaves nothing behind however it ends.

`fit` and the detector are stood in for (this file, run as a program), so that these tests are about the demo alone; the
stream, the service's loop and the alerts are real.
"""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.alerting.detection_finding import build_alerts
from streamer.alerting.finding_frame import Alert
from streamer.detection.batches import ScoredBatch
from streamer.devtools.demo import COMMAND, Scorecard, Seen, demo
from streamer.devtools.simulator.generator import Label
from streamer.errors import ConfigurationError, StreamError
from streamer.explain.attribution import Explanation
from streamer.service.loop import Service
from streamer.settings import load

STAND_IN = (sys.executable, str(Path(__file__)))


class ByName:
    """Alerts on what is not signed as it should be: one binary by its name, and a little of what is normal."""

    def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages

    def judge(self, prepared: Sequence[Message]) -> ScoredBatch:
        batch, rejects = decode(prepared)
        odd = [record.get("process", {}).get("name") == "svch0st.exe" for record in batch.records]
        chance = [offset % 3001 == 7 for offset in batch.coordinates.offset]
        p_value = np.where(np.array(odd) | np.array(chance), 1e-6, 0.5)
        text = np.array(["user:somebody"] * len(batch), object)
        severity = np.full(len(batch), 80, np.float32)
        return ScoredBatch(batch.coordinates, batch.time, p_value, severity, text, text, batch.records, rejects)


class EachRowInWords:
    """An alert for each row, as the real ones look."""

    def alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Alert]:
        why = [Explanation((), (), 1.0, 0.1) for _ in rows]
        now_ms = int(time.time() * 1000)
        return build_alerts(scored, rows, why, threshold=1e-3, bundle_version="b", tenant="t", now_ms=now_ms)

    def take_suppressed(self) -> dict[str, int]:
        return {}

    def identify(self, topics: Mapping[tuple[str, int], int]) -> None:
        """Nothing is remembered."""

    def committed(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Nothing is remembered."""


def stand_in() -> None:
    """`fit` that learns nothing, `run` with the detector above."""
    if sys.argv[1] == "fit":
        assert sys.argv[2:] == ["week.ndjson.gz", "--out", "bundle"], sys.argv
        assert Path("week.ndjson.gz").stat().st_size > 100_000
        sys.exit(3 if os.environ.get("STAND_IN") == "fit fails" else 0)
    if os.environ.get("STAND_IN") == "run fails":
        sys.exit("the bundle is not to its liking")

    service = Service(load(), ByName(), EachRowInWords(), threshold=1e-3)
    signal.signal(signal.SIGTERM, lambda *_: service.stop())
    service.run()


@pytest.fixture
def servers(kafka: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIPCURRENT_TEST_KAFKA", kafka)
    monkeypatch.setenv("RIPCURRENT_TEST_REDIS", redis_url)


def card() -> Scorecard:
    labels = [Label("a", 0, "", ""), Label("b", 1, "slow_scan", "s-1"), Label("c", 1, "slow_scan", "s-1")]
    labels += [Label("d", 1, "wrong_order", "w-1")]
    return Scorecard(labels, [1, 2, 3, 4], first=10, appended={10: 1_000, 12: 1_000})


def test_an_alert_counts_for_the_event_it_is_about_and_for_nothing_else() -> None:
    counted = card()
    create, update = {"activity_id": 1}, {"activity_id": 2}
    assert counted.add(Seen(create, 12, 1_040)) == "slow_scan"
    assert counted.add(Seen(create, 10, 1_060)) == ""
    assert counted.add(Seen(update, 10, 1_060)) == ""
    assert counted.add(Seen(create, 9, 1_000)) is None
    assert counted.add(Seen(create, 14, 1_000)) is None
    assert counted.add(Seen({"activity_id": 3}, 12, 9_000)) is None
    assert counted.false_alarms == 1, "an update of a false alarm is not another one"
    assert counted.incidents() == [("s-1", "slow_scan", [1, 2], [2]), ("w-1", "wrong_order", [3], [])]
    assert counted.latency() == (60.0, pytest.approx(60.0))
    assert all(math.isnan(value) for value in card().latency())


@pytest.mark.extended
@pytest.mark.usefixtures("servers")
def test_the_demo_shows_what_was_found_and_missed_on_real_servers() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    assert demo(console, events_per_day=3_000, seconds=3, command=STAND_IN) == 0
    said = out.getvalue()
    found = [line for line in said.splitlines() if line.startswith("found ")]
    missed = [line for line in said.splitlines() if line.startswith("missed ")]
    assert [line.split()[1] for line in found] == ["unseen_binary:"]
    assert len(missed) == 11
    assert sum("(incident: unseen_binary)" in line for line in said.splitlines()) == 1
    assert "incidents found  1 of 12 (0 of 8 made of ordinary events alone, 1 of 4 with an odd one)" in said
    assert "false alarms     1 in the day" in said
    throughput = next(line for line in said.splitlines() if line.startswith("throughput"))
    assert int(throughput.split()[1].replace(",", "")) > 100
    latency = next(line for line in said.splitlines() if line.startswith("latency"))
    assert 1 <= int(latency.split()[2].replace(",", "")) < 5_000


@pytest.mark.extended
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(
    ("fails", "error", "says"),
    [("fit fails", ConfigurationError, "code 3"), ("run fails", StreamError, "not to its liking")],
)
def test_what_fails_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, fails: str, error: type[Exception], says: str
) -> None:
    monkeypatch.setenv("STAND_IN", fails)
    with pytest.raises(error, match=says):
        demo(Console(file=io.StringIO()), events_per_day=500, seconds=1, command=STAND_IN)


@pytest.mark.extended
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_file(tmp_path: Path, how: signal.Signals) -> None:
    program = f"import sys; from streamer.devtools.demo import demo; sys.exit(demo(seconds=600, command={STAND_IN!r}))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            lines.append(line)
            if "ripcurrent run" in line:
                break
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        time.sleep(0.5)
        running.send_signal(how)
        lines += running.stdout.readlines()
        assert running.wait(40) == 130, lines
    assert "stopped" in lines[-1]
    for child in children:
        assert not Path(f"/proc/{child}").exists()
    assert not [left for left in tmp_path.iterdir() if left.name.startswith("ripcurrent-demo")]


def test_the_demo_runs_the_command_that_users_run() -> None:
    said = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ripcurrent ")


if __name__ == "__main__":
    stand_in()
