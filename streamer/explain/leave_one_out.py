"""Which records of a sequence contributed: leave each record out of the window in turn and compute the statistic of the
alert again.

All windows of all alerts go through the sequence network together. Promises that a weight depends on its window alone.
It does not detect pairs of records that contribute only together: without one of them the score may stay as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from state.windows import Windows
from streamer.detection.sequence_score import SequenceScorer

LATEST = 12
"""The latest records of a window, which get a weight: as many as an alert shows."""


def weights(
    sequences: SequenceScorer, windows: Windows, kinds: NDArray[np.int8], names: Sequence[str]
) -> NDArray[np.float64]:
    """float64 [m, W], 0 to 1: the share of its surprise that each window loses without each of its records.

    kinds: int8 [m]; names: m names of `SequenceScorer.raw`, the statistic that caused each alert. The weight is 0 for a
    record without which the rest is at least as surprising, for an unused slot, and for all records before the LATEST.
    """
    latest = np.arange(windows.times.shape[1]) >= windows.times.shape[1] - LATEST
    which, slots = np.nonzero(windows.mask & latest)
    whole, shorter = np.arange(len(windows)), _without(windows.take(which), slots)
    both = replace(
        windows,
        vectors=np.concatenate([windows.vectors, shorter.vectors]),
        times=np.concatenate([windows.times, shorter.times]),
        length=np.concatenate([windows.length, shorter.length]),
        own=np.full(len(windows) + len(which), windows.times.shape[1] - 1, np.int32),
    )
    of = np.concatenate([whole, which])
    raw = sequences.raw(both, kinds[of], few=True)
    fired = np.array(names, object)[of]
    statistic = np.select([fired == name for name in raw], list(raw.values()))
    statistic[both.length == 0] = 0.0
    before, after = statistic[which], statistic[len(windows) :]
    losses = np.zeros(windows.mask.shape)
    losses[which, slots] = np.clip((before - after) / np.maximum(before, 1e-9), 0.0, 1.0)
    return losses


def cut(windows: Windows, ends: NDArray[np.intp]) -> Windows:
    """Each of m windows as it was when the slot `ends` (intp [m]; -1: no slot) was its newest; older slots stay."""
    width = windows.times.shape[1]
    return _moved(windows, np.arange(width)[None, :] - (width - 1 - ends[:, None]))


def _without(windows: Windows, slots: NDArray[np.intp]) -> Windows:
    """Each of m windows without the member in its slot of `slots` (intp [m])."""
    place = np.arange(windows.times.shape[1])[None, :]
    return _moved(windows, place - (place <= slots[:, None]))


def _moved(windows: Windows, place: NDArray[np.intp]) -> Windows:
    """m windows with their slots taken from `place` (intp [m, W], negative for an unused slot); members stay on the
    right."""
    rows = np.arange(len(windows))[:, None]
    at = np.maximum(place, 0)
    inside = (place >= 0) & windows.mask[rows, at]
    return replace(
        windows,
        vectors=np.where(inside[:, :, None], windows.vectors[rows, at], np.float16(0)),
        times=np.where(inside, windows.times[rows, at], 0),
        length=inside.sum(1).astype(np.int32),
        source=np.where(inside, windows.source[rows, at], -1),
        offset=np.where(inside, windows.offset[rows, at], 0),
        index=np.where(inside, windows.index[rows, at], 0),
        raised=windows.raised[:, :0],
        partners=np.where(inside[:, :, None], windows.partners[rows, at], np.int16(-1)),
    )
