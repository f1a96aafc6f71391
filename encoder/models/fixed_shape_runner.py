"""Runs a network over rows in chunks of one fixed shape: eager on the CPU, as captured CUDA graphs on a GPU.

Promises: the result of a row does not depend on the other rows, because every chunk, of one row or a thousand, is
padded to the same shape and so runs the same kernels; and device memory is allocated with the first chunk and does not
grow. It uses one shape only: with a second one, results would depend on how a batch is cut. A chunk of these networks
costs a GPU microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder.ocsf.events import EncoderError

_LANES = 2
"""Chunks in flight on a GPU: while one is computed, the other is copied."""


@contextmanager
def device_memory(device: torch.device) -> Iterator[None]:
    """Turns an out-of-memory error of the device into an EncoderError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EncoderError(
            f"{device} has no memory left ({str(error).splitlines()[0]}); see what else runs there, or set `device` to "
            "another (RIPCURRENT_DEVICE=cuda:1) or to cpu"
        ) from error


class FixedShapeRunner:
    """`function` applied to n rows.

    function: tensors [size, ...] to one tensor [size, ...], row by row, without reading values back from the device
    (which a CUDA graph cannot); its weights stay where they are. size: rows of a chunk.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, *, size: int) -> None:
        self._function, self._device, self._size = function, device, size
        self._lanes: list[_Lane] = []
        self._turn = threading.Lock()  # A lane holds one input and one output at a time.

    def __call__(self, *arrays: NDArray[Any]) -> Tensor:
        """arrays: [n, ...] each, in every call of the same types and shapes except n. Returns a tensor [n, ...] on the
        CPU.

        Raises EncoderError where the device has no memory left.
        """
        starts = range(0, max(len(arrays[0]), 1), self._size)
        chunks = [[array[start : start + self._size] for array in arrays] for start in starts]
        with device_memory(self._device), torch.inference_mode():
            if self._device.type == "cpu":
                output = self._eager(chunks)
            else:
                with self._turn:
                    output = self._captured(chunks)
        return output[: len(arrays[0])]

    def _eager(self, chunks: Sequence[Sequence[NDArray[Any]]]) -> Tensor:
        return torch.cat([self._function(*(torch.from_numpy(_padded(a, self._size)) for a in c)) for c in chunks])

    def _captured(self, chunks: Sequence[Sequence[NDArray[Any]]]) -> Tensor:
        if not self._lanes:
            padded = [torch.from_numpy(_padded(array, self._size)) for array in chunks[0]]
            self._lanes = [_Lane(self._function, padded, self._device) for _ in range(_LANES)]
        outputs: list[Tensor] = []
        for i, chunk in enumerate(chunks):
            if i >= _LANES:
                outputs.append(self._lanes[i % _LANES].finish())
            self._lanes[i % _LANES].start(chunk)
        outputs.extend(self._lanes[i % _LANES].finish() for i in range(max(len(chunks) - _LANES, 0), len(chunks)))
        return torch.cat(outputs)


def _padded(array: NDArray[Any], size: int) -> NDArray[Any]:
    if len(array) == size:
        return np.ascontiguousarray(array)
    whole = np.zeros((size, *array.shape[1:]), array.dtype)
    whole[: len(array)] = array
    return whole


class _Lane:
    """One chunk on a GPU: pinned staging memory, device buffers, the captured graph and its own stream."""

    def __init__(self, function: Callable[..., Tensor], example: Sequence[Tensor], device: torch.device) -> None:
        self._staging = [tensor.clone().pin_memory() for tensor in example]
        self._inputs = [tensor.to(device) for tensor in example]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):  # Libraries choose kernels and take workspace in the first calls.
            for _ in range(3):
                function(*self._inputs)
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._output = function(*self._inputs)
        self._result = torch.empty_like(self._output, device="cpu").pin_memory()

    def start(self, arrays: Sequence[NDArray[Any]]) -> None:
        for staging, array in zip(self._staging, arrays, strict=True):
            staging[: len(array)].copy_(torch.from_numpy(np.ascontiguousarray(array)))
            staging[len(array) :].zero_()
        with torch.cuda.stream(self._stream):
            for place, staging in zip(self._inputs, self._staging, strict=True):
                place.copy_(staging, non_blocking=True)
            self._graph.replay()
            self._result.copy_(self._output, non_blocking=True)
            self._done.record(self._stream)

    def finish(self) -> Tensor:
        """The output, copied before the next chunk overwrites it."""
        self._done.synchronize()
        return self._result.clone()
