"""Check and measure the scoring path on a GPU: `make gpu`, on a machine with Python 3.12, torch, numpy and no network.

Needs no Kafka, no Redis and no Java: the Detector scores bytes in memory, with windows and timers in this process. What
`make gpu-folder` has put into build/gpu on another machine is all that it takes: wheels, a bundle, events. Writes
build/gpu/result.json, within eight minutes: outcome of the GPU tests, parity with the CPU, events/s by batch size,
device memory, time by stage. Without a CUDA device it runs on the CPU, and `device` says so.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encoder.ocsf.events import Message
    from streamer.detection.batches import ScoredBatch
    from streamer.detection.bundle import Bundle

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu"
NEEDED = ("hnswlib", "orjson", "safetensors", "filelock", "pytest", "_pytest", "pluggy", "iniconfig", "packaging")
NEEDED += ("pygments", "pytest_timeout")
"""Modules beyond torch and numpy: of the scoring path, and of pytest."""
BATCH_SIZES = (512, 1024, 2048, 4096, 8192)
PARITY_EVENTS = 4096
TESTS_S, SPEED_S = 90.0, 45.0
"""At most so long for the GPU tests, and for each batch size."""
LOG_P_BOUND = 1e-3
"""How far log p may lie from the CPU's in fp32: sums are taken in another order, and a vector is rounded to fp16."""


def unpack_missing() -> list[str]:
    """Make modules that this Python lacks importable from the wheels of the folder. Returns the wheels used."""
    site = FOLDER / "site"
    sys.path.append(str(site))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    used = []
    if missing:
        for wheel in sorted(FOLDER.glob("wheels/*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                tops = {name.partition("/")[0].partition(".")[0] for name in archive.namelist()}
                if tops & set(missing):
                    archive.extractall(site)
                    used.append(wheel.name)
        importlib.invalidate_caches()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"gpu_check: {', '.join(missing)} cannot be imported and no wheel in {FOLDER}/wheels has it for Python "
            f"{platform.python_version()}: run `make gpu-folder` on a machine with a network, and bring build/gpu"
        )
    return used


def run_gpu_tests() -> dict[str, Any]:
    """The tests marked `gpu`, in a process of their own."""
    files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER / "site")])}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TESTS_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not done in {TESTS_S:.0f} s"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "output": lines[-40:]}


def messages_of(path: Path) -> list[Message]:
    from encoder.ocsf.events import Message

    with gzip.open(path) as file:
        return [Message("events", 0, offset, -1, line) for offset, line in enumerate(file.read().splitlines())]


def score(bundle: Bundle, messages: Sequence[Message], size: int) -> Iterator[ScoredBatch]:
    """A Detector of its own over the messages, in batches of `size`."""
    from state.memory.timers import MemoryTimers
    from state.memory.windows import MemoryWindows
    from streamer.detection.detector import Detector

    detector = Detector(bundle, MemoryWindows(dim=bundle.dim), timers=MemoryTimers())
    for start in range(0, len(messages), size):
        yield detector.score(messages[start : start + size])


def parity(load: Callable[[str], Bundle], messages: Sequence[Message], device: str) -> dict[str, Any]:
    """How far the device's p-values lie from the CPU's; on the CPU, those of small batches from those of large ones."""
    import numpy as np

    def log_p(where: str, size: int) -> Any:
        return np.log(np.concatenate([batch.p_value for batch in score(load(where), messages, size)]))

    expected = log_p("cpu", 512)
    other = np.abs(log_p(device, 512) - expected) if device != "cpu" else np.abs(log_p("cpu", 64) - expected)
    return {
        "compared": f"{device} with cpu" if device != "cpu" else "cpu in batches of 64 with cpu in batches of 512",
        "events": len(messages),
        "log_p_largest_difference": float(other.max()),
        "log_p_median_difference": float(np.median(other)),
        "events_beyond_1e-5": int((other > 1e-5).sum()),
        "bound": LOG_P_BOUND,
        "passed": bool(other.max() <= LOG_P_BOUND),
    }


def speed(bundle: Bundle, messages: Sequence[Message], size: int, device: str) -> dict[str, Any]:
    """Events/s once two batches have warmed up, time by stage, and the device's memory."""
    import torch

    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    stages: defaultdict[str, float] = defaultdict(float)
    events, seconds, at, until = 0, 0.0, time.perf_counter(), time.perf_counter() + SPEED_S
    for number, batch in enumerate(score(bundle, messages, size)):
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if number >= 2:
            events, seconds = events + len(batch), seconds + now - at
            for stage, taken in batch.seconds.items():
                stages[stage] += taken
        at = now
        if now > until:
            break
    return {
        "batch": size,
        "events": events,
        "events_per_s": round(events / seconds) if seconds else None,
        "us_per_event_by_stage": {name: round(1e6 * taken / events, 1) for name, taken in stages.items()},
        "device_memory_peak_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if on_gpu else None,
        "device_memory_reserved_mb": round(torch.cuda.max_memory_reserved() / 1e6, 1) if on_gpu else None,
    }


def main() -> int:
    began = time.monotonic()
    sys.path.insert(0, str(ROOT))
    used = unpack_missing()
    if not (FOLDER / "bundle").is_dir():
        raise SystemExit(f"gpu_check: no bundle in {FOLDER}: run `make gpu-folder` first, and bring build/gpu along")
    import torch

    from streamer.bundles import bundle_files

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chip = torch.cuda.get_device_name() if device == "cuda" else f"cpu: no CUDA device, {os.cpu_count()} cores"
    print(f"device: {chip}", flush=True)
    result: dict[str, Any] = {
        "device": chip,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "wheels": used,
        "gpu_tests": run_gpu_tests(),
    }
    print(f"GPU tests: {result['gpu_tests']['summary']}", flush=True)
    messages = messages_of(FOLDER / "events.ndjson.gz")
    torch.set_num_threads(1)  # As the command does.
    result["parity"] = parity(
        lambda where: bundle_files.load(FOLDER / "bundle", where), messages[:PARITY_EVENTS], device
    )
    print(f"parity: {result['parity']}", flush=True)
    bundle = bundle_files.load(FOLDER / "bundle", device)
    result["speed"] = []
    for size in BATCH_SIZES:
        result["speed"].append(speed(bundle, messages, size, device))
        print(result["speed"][-1], flush=True)
    result["seconds"] = round(time.monotonic() - began, 1)
    (FOLDER / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{FOLDER / 'result.json'}, after {result['seconds']:.0f} s")
    return 0 if result["gpu_tests"]["passed"] and result["parity"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
