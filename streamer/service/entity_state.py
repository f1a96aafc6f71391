"""Windows and timers as one: whoever commits or fills again does so for both.

Promises that what one of them lost is filled for both: each recognises what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from state.errors import Source, StateLostError
from state.timers import TimerStore
from state.windows import WindowStore


class Remembering:
    """What the service needs of a `WindowStore`, and the timers beside it."""

    def __init__(self, windows: WindowStore, timers: TimerStore) -> None:
        self.age_ms = windows.age_ms
        self._windows, self._timers = windows, timers

    def prepare(self, offsets: Mapping[Source, int]) -> None:
        self._windows.prepare(offsets)
        self._timers.prepare(offsets)

    def committed(self, offsets: Mapping[Source, int]) -> None:
        self._windows.committed(offsets)
        self._timers.committed(offsets)

    def check_epoch(self, offsets: Mapping[Source, int]) -> None:
        self._windows.check_epoch(offsets)
        self._timers.check_epoch(offsets)

    def begin_rebuild(self, lost: StateLostError, others: Iterable[Source] = ()) -> None:
        self._windows.begin_rebuild(lost, others)
        self._timers.begin_rebuild(lost)

    def finish_rebuild(self, sources: Iterable[Source], horizon_ms: int = 0) -> None:
        self._windows.finish_rebuild(sources, horizon_ms)
