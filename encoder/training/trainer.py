"""The training loop of both networks: AdamW, a one-cycle learning rate, clipped gradients, a fixed number of steps.

Promises the same weights for the same losses, also where a killed run resumes from its checkpoint: each step has its
own random generator, so that only weights and moments carry over. It knows neither the task nor the data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LEARNING_RATE = 2e-3
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls as a cosine (Smith and Topin 2018)."""
REPORT_EVERY = 100

MIN_STEPS = 50

StepProgress = Callable[[int, int, float], None]
"""Called with (step, steps, mean loss)."""


@dataclass
class TrainingRun:
    """The course of a run. steps: so far; losses: mean since the last report, at each report."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)


class Checkpoint:
    """An unfinished run as a file: tensors and the report so far, replaced atomically.

    key: identifies task, data and seed; a file with another key is ignored.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key

    @classmethod
    def of(cls, path: Path | None, arrays: Sequence[NDArray[Any]], *what: object) -> Checkpoint | None:
        """The checkpoint of a run on these arrays; None without a path."""
        if path is None:
            return None
        digest = hashlib.sha256(orjson.dumps([*map(str, what), torch.__version__]))
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return cls(path, digest.hexdigest())

    def save(self, tensors: dict[str, Tensor], report: TrainingRun) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".new")
        said = {"key": self._key, "report": orjson.dumps(asdict(report)).decode()}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, said)
        os.replace(temporary, self._path)

    def load(self) -> tuple[dict[str, Tensor], TrainingRun] | None:
        """The last saved state of this run; None where there is none or it cannot be read."""
        try:
            with safe_open(self._path, "pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, TrainingRun(**orjson.loads(said["report"]))
        except (OSError, SafetensorError, KeyError, TypeError, orjson.JSONDecodeError):
            return None


def steps_for(steps: int, events: int) -> int:
    """How many of these steps a training makes: no more than it has events, down to MIN_STEPS."""
    return min(steps, max(MIN_STEPS, events))


def train_network(
    net: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    weight_decay: float,
    checkpoint: Checkpoint | None = None,
    progress: StepProgress | None = None,
) -> TrainingRun:
    """Train `net`, or resume from the checkpoint.

    loss: the loss of a step, by its number from 0; computed in bf16 where a GPU can (`torch.autocast`).
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    device = next(net.parameters()).device.type
    report = TrainingRun()
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        report = saved[1]
        _resume(net, optimizer, schedule, saved[0], report.steps)
    running = 0.0
    while report.steps < steps:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            batch_loss = loss(report.steps)
        optimizer.zero_grad(set_to_none=True)
        batch_loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += float(batch_loss.detach())
        report.steps += 1
        if report.steps % REPORT_EVERY == 0:
            report.losses.append(running / REPORT_EVERY)
            running = 0.0
            if checkpoint is not None:
                checkpoint.save(_state(net, optimizer), report)
            if progress is not None:
                progress(report.steps, steps, report.losses[-1])
    return report


def _state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {
        f"moments.{i}.{name}": tensor
        for i, of in optimizer.state_dict()["state"].items()
        for name, tensor in of.items()
    }
    now = {f"now.{name}": tensor for name, tensor in net.state_dict().items()}
    group = optimizer.param_groups[0]
    cycle = {"cycle.": torch.tensor([group["lr"], group["betas"][0]], dtype=torch.float64)}
    return now | cycle | moments


def _resume(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.OneCycleLR,
    tensors: dict[str, Tensor],
    steps: int,
) -> None:
    """Restore weights, moments and learning rate."""
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "moments": {}, "cycle": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    net.load_state_dict(parts["now"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["moments"].items():
        place, _, what = name.partition(".")
        moments.setdefault(int(place), {})[what] = tensor
    # The schedule is a function of the step; its results, rate and betas, are part of the optimizer.
    rate, beta = (float(x) for x in parts["cycle"][""])
    groups = [
        group | {"lr": rate, "betas": (beta, group["betas"][1])} for group in optimizer.state_dict()["param_groups"]
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    schedule.last_epoch = steps
