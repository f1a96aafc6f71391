"""Which records of a sequence mattered is found by leaving each out, all in one pass through the network."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from state.memory.windows import MemoryWindows
from state.windows import WindowEntries, Windows
from streamer.explain.leave_one_out import LATEST, cut, weights

W = 32


def windows(*members: list[int]) -> Windows:
    """A window each, of records that are numbers, one a minute."""
    store = MemoryWindows(dim=2, width=W)
    for i, values in enumerate(members):
        n = len(values)
        vectors = np.column_stack([values, np.arange(n)]).astype(np.float16)
        at, none = np.arange(n, dtype=np.int64), np.zeros(n, np.int32)
        store.append(WindowEntries([f"user:{i}"] * n, at * 60_000, vectors, (("t", i),), none, at, none))
    return store.latest([f"user:{i}" for i in range(len(members))])


@dataclass
class Adding:
    """Stands for the network: an order is as odd as its greatest number, an ending as its sum."""

    asked: list[int] = field(default_factory=list)

    def raw(self, of: Windows, kinds: NDArray[np.int8], *, few: bool) -> dict[str, NDArray[np.float64]]:
        assert few and len(kinds) == len(of.length)
        self.asked.append(len(of.length))
        numbers = of.vectors[:, :, 0].astype(np.float64)
        assert not numbers[~of.mask].any()
        return {"order": numbers.max(1), "ending": numbers.sum(1)}


def test_a_record_weighs_what_the_statistic_that_fired_loses_without_it() -> None:
    two, model = windows([1, 8, 2], [1, 3, 4]), Adding()
    losses = weights(model, two, np.zeros(2, np.int8), ["order", "ending"])  # type: ignore[arg-type]
    np.testing.assert_allclose(losses[0, -3:], [0, 0.75, 0])
    np.testing.assert_allclose(losses[1, -3:], [1 / 8, 3 / 8, 4 / 8])
    assert not losses[:, :-3].any()
    assert model.asked == [2 + 3 + 3], "one pass for all"


def test_full_windows_lose_their_records_too() -> None:
    full = windows(list(range(1, W + 1)))
    losses = weights(Adding(), full, np.zeros(1, np.int8), ["ending"])  # type: ignore[arg-type]
    share = np.arange(1, W + 1) / (W * (W + 1) / 2)
    np.testing.assert_allclose(losses[0, -LATEST:], share[-LATEST:])
    assert not losses[0, :-LATEST].any(), "what is not told is not weighed"


def test_a_window_is_cut_where_the_event_was() -> None:
    both = cut(windows([5, 6, 7], [1, 2]), np.array([W - 2, -1]))
    assert both.length.tolist() == [2, 0]
    assert both.vectors[0, -2:, 0].tolist() == [5, 6] and not both.vectors[1].any()
    assert both.offset[0, -2:].tolist() == [0, 1] and both.source[0, -2:].tolist() == [0, 0]


def test_what_has_no_records_weighs_nothing() -> None:
    empty = cut(windows([5]), np.array([-1]))
    assert not weights(Adding(), empty, np.zeros(1, np.int8), ["order"]).any()  # type: ignore[arg-type]
