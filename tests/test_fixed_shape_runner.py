"""The promises of the passes: what a row gives does not depend on the rows that it came with, on the CPU and on a GPU,
and a device without memory is an error in words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from encoder.models.fixed_shape_runner import FixedShapeRunner
from encoder.ocsf.events import EncoderError

SIZE = 32
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]


def network(device: str) -> tuple[nn.Module, FixedShapeRunner]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16)).to(device).eval()

    def function(x: Tensor, add: Tensor) -> Tensor:
        out: Tensor = net(x) + add[:, None]
        return out

    return net, FixedShapeRunner(function, torch.device(device), size=SIZE)


def rows(n: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(n)
    return rng.normal(size=(n, 20)).astype(np.float32), rng.integers(0, 5, n).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [0, 1, SIZE - 1, SIZE, SIZE + 1, 5 * SIZE + 7])
def test_rows_give_what_the_network_gives(device: str, n: int) -> None:
    net, passes = network(device)
    x, add = rows(n)
    with torch.no_grad():
        expected = net(torch.from_numpy(x).to(device)).cpu().numpy() + add[:, None]
    for _ in range(2):  # The second time nothing of the first is left in what is used again.
        found = passes(x, add)
        assert found.shape == (n, 16) and found.device.type == "cpu"
        assert np.allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_gives_the_same_to_the_last_bit_in_any_batch(device: str) -> None:
    _, passes = network(device)
    x, add = rows(4 * SIZE)
    whole = passes(x, add).numpy()
    for cut in (1, 3, SIZE, SIZE + 5, 4 * SIZE - 1):
        parts = [passes(x[:cut], add[:cut]), passes(x[cut:], add[cut:])]
        assert np.array_equal(torch.cat(parts).numpy(), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_that_call_at_once_do_not_see_what_is_anothers(device: str) -> None:
    _, passes = network(device)
    asked = [rows(n) for n in range(1, 4 * SIZE)]
    alone = [passes(*arrays).numpy() for arrays in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arrays: passes(*arrays).numpy(), asked * 3))
    for found, expected in zip(together, alone * 3, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.gpu
@GPU
def test_a_gpu_agrees_with_the_cpu() -> None:
    x, add = rows(1000)
    assert np.allclose(network("cuda")[1](x, add).numpy(), network("cpu")[1](x, add).numpy(), atol=1e-4)


def test_a_device_without_memory_is_an_error_in_words() -> None:
    def function(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    with pytest.raises(EncoderError, match="RIPCURRENT_DEVICE"):
        FixedShapeRunner(function, torch.device("cpu"), size=4)(np.zeros((3, 2), np.float32))
