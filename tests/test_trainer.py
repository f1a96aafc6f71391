"""The promises of the descent: a run that was killed goes on to the weights of one that was not, and
what belongs to another run is not gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encoder.training.trainer import REPORT_EVERY, Checkpoint, TrainingRun, train_network

STEPS = 6 * REPORT_EVERY
DATA = np.arange(10.0)


class KilledError(Exception):
    pass


def run(path: Path | None, *, killed_at: int = -1, seed: int = 0) -> tuple[dict[str, Tensor], TrainingRun, list[int]]:
    """Fit a line to noise; returns weights, report and the steps that were made."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    made: list[int] = []

    def loss(step: int) -> Tensor:
        if step == killed_at:
            raise KilledError
        made.append(step)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed * STEPS + step))
        return (net(x)[:, 0] - x.sum(1)).square().mean()

    kept = Checkpoint.of(path, [DATA], seed)
    report = train_network(net, loss, steps=STEPS, weight_decay=1e-2, checkpoint=kept)
    return net.state_dict(), report, made


@pytest.mark.parametrize("killed_at", [REPORT_EVERY + 1, 3 * REPORT_EVERY, STEPS - 1])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path, killed_at: int) -> None:
    weights, report, _ = run(None)
    path = tmp_path / "kept" / "net.safetensors"
    with pytest.raises(KilledError):
        run(path, killed_at=killed_at)
    again, report_again, made = run(path)
    assert made == list(range(killed_at // REPORT_EVERY * REPORT_EVERY, STEPS))
    assert report_again == report
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_what_was_trained_on_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    run(path)
    assert run(path, seed=1)[2][0] == 0


def test_a_checkpoint_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    run(path)
    path.write_bytes(path.read_bytes()[:-7])
    assert run(path)[2][0] == 0
