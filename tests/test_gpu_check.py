"""What `make gpu` takes for granted: scoring needs torch, numpy and a few small modules. The check runs on a CPU."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_check
import pytest
from service_process import lines

from encoder.ocsf.events import Message
from streamer.bundles.bundle_files import load

ROOT = Path(__file__).parents[1]
ABSENT = ("confluent_kafka", "pyarrow", "pydantic", "redis", "rich", "scipy", "sklearn", "structlog", "typer")
"""Modules that a machine with a GPU need not have."""

WITHOUT = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from pathlib import Path
import gpu_check
from encoder.ocsf.events import Message
from streamer.bundles.bundle_files import load
values = Path(sys.argv[2]).read_bytes().splitlines()[:300]
messages = [Message("events", 0, offset, -1, value) for offset, value in enumerate(values)]
print(sum(len(batch) for batch in gpu_check.score(load(Path(sys.argv[1])), messages, 128)))
"""


def test_scoring_needs_no_kafka_no_redis_and_nothing_of_fitting(folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(folder / "bundle"), str(folder / "test.ndjson")]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "300"


def test_parity_and_speed_are_measured_on_a_cpu_too(folder: Path) -> None:
    messages = [Message("events", 0, n, -1, line) for n, line in enumerate(lines(folder / "test.ndjson")[:400])]
    agreed = gpu_check.parity(lambda device: load(folder / "bundle", device), messages, "cpu")
    assert agreed["passed"] and agreed["events"] == 400
    assert agreed["events_beyond_1e-5"] == 0
    found = gpu_check.speed(load(folder / "bundle"), messages, 100, "cpu")
    assert (found["events"], found["device_memory_peak_mb"]) == (200, None)
    assert found["events_per_s"] > 0
    assert set(found["us_per_event_by_stage"]) >= {"decode", "vectorize", "encode", "compare", "windows", "sequences"}


def test_what_is_missing_comes_from_the_wheels_or_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_check, "NEEDED", ("orjson", "carried_along"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="carried_along cannot be imported"):
        gpu_check.unpack_missing()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along/__init__.py", "")
    with zipfile.ZipFile(tmp_path / "wheels" / "other-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("other.py", "")
    assert gpu_check.unpack_missing() == ["carried_along-1-py3-none-any.whl"]
