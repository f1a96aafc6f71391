"""Timers in Valkey or Redis, shared by all processes of a tenant: one call a batch; the rules are those of
`state.timers`.

Promises that restarts, redeliveries and partitions that move change nothing of what is told, and that timers which were
lost are noticed before anything more is. Names and last events of the entities that are waited for are kept there, and
no longer than they are. All keys have one hash tag.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from state.errors import SourcePartition, StateLostError
from state.redis import formats
from state.redis.client import RedisServer
from state.timers import MAX_EVENTS, MAX_OPEN, Activity, ClockAdvance, Inactivity, Span
from state.windows import DAY_MS, source_id

_FUNCTIONS = files("state.redis").joinpath("timers.lua").read_text()
TTL_MS = 14 * DAY_MS
"""As long as windows are kept."""
IDLE_MS = 60_000
"""A partition that brought nothing for so long is not waited for."""
_TIMER = struct.Struct("<6s6s6s6s3sdB")
_STEP = struct.Struct("<BH6s3s6s6sdB")
_NOTICED = struct.Struct("<6s3sHI")


class RedisTimers:
    """Timers of one tenant, for one thread.

    Args:
        space: what windows they belong to: those of another encoder, or format, have timers of
            their own.
        idle_ms: wall-clock time after which a partition that brings nothing is not waited for by the others.
        timeout_s, retries, connection: as in `RedisServer`.
    """

    keeps_events = True

    def __init__(
        self,
        url: str,
        *,
        space: str,
        tenant: str = "default",
        idle_ms: int = IDLE_MS,
        max_open: int = MAX_OPEN,
        max_events: int = MAX_EVENTS,
        timeout_s: float = 5.0,
        retries: int = 3,
        **connection: Any,
    ) -> None:
        for name, value in (("tenant", tenant), ("space", space)):
            if not value or set(value) & set("{}:"):
                raise ValueError(
                    f"{name} {value!r} would not make a key: it must be non-empty, without '{{', '}}' and ':'"
                )
        self._key = f"{{{tenant}}}:timers:{space}" + formats.suffix("timers", formats.TIMERS)
        self._idle_ms, self._max_open, self._max_events = idle_ms, max_open, max_events
        self._server = RedisServer(url, _FUNCTIONS, timeout_s=timeout_s, retries=retries, depth=1, **connection)
        self._progress: dict[SourcePartition, int] = {}
        self._committed: dict[SourcePartition, int] = {}
        self._topics: dict[SourcePartition, int] = {}

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._server.close()

    def advance(
        self, steps: Sequence[Activity | ClockAdvance], spans: Mapping[SourcePartition, Span]
    ) -> list[Inactivity]:
        if not spans:
            return []
        sources = list(spans)
        places = {source: number for number, source in enumerate(sources, 1)}
        arguments: list[Any] = [TTL_MS, self._idle_ms, self._max_open, self._max_events, len(sources)]
        for source, span in spans.items():
            marks = self._mark(source, span.last + 1)
            arguments.append(marks + _six(span.first) + _six(span.last))
        for step in steps:
            arguments += _step(step, places[step.source])
        keys = [f"{self._key}:open", f"{self._key}:sources", *(f"{self._key}:due-{source_id(s):012x}" for s in sources)]
        behind, answers = self._server.retried(lambda: self._server.call("advance", keys, arguments))
        self._check(behind)
        self._remember({source: span.last + 1 for source, span in spans.items()})
        return [
            inactivity
            for source, text in zip(sources, answers, strict=True)
            for inactivity in _inactivities(source, text)
        ]

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._tell(offsets, arrived=False)

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        for source, offset in offsets.items():
            self._committed[source] = max(offset, self._committed.get(source, 0))

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        arguments = [TTL_MS, *(_id(source) + _six(topic) for source, topic in topics.items())]
        self._server.retried(lambda: self._server.call("identify", f"{self._key}:sources", arguments))
        for source, topic in topics.items():
            if self._topics.get(source, topic) != topic:
                self._progress.pop(source, None)
                self._committed.pop(source, None)
        self._topics |= topics

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Also says that these are read from here now, so that the other partitions wait for them."""
        self._remember(offsets)
        self.committed(offsets)
        self._tell(offsets, arrived=True)

    def begin_rebuild(self, lost: StateLostError) -> None:
        if lost.wiped:
            self._progress.clear()
        self._progress.update({source: offset or 0 for source, offset in lost.resume.items()})

    def _tell(self, offsets: Mapping[SourcePartition, int], *, arrived: bool) -> None:
        if not offsets:
            return
        arguments = [TTL_MS, int(arrived), *(self._mark(source, offset) for source, offset in offsets.items())]
        self._check(self._server.retried(lambda: self._server.call("mark", f"{self._key}:sources", arguments)))
        self._remember(offsets)

    def _mark(self, source: SourcePartition, progress: int) -> bytes:
        """Id, the progress that is known there, progress now, committed."""
        least, done = self._progress.get(source, 0), self._committed.get(source, 0)
        return _id(source) + _six(least) + _six(max(progress, least)) + _six(done)

    def _remember(self, progress: Mapping[SourcePartition, int]) -> None:
        for source, offset in progress.items():
            self._progress[source] = max(offset, self._progress.get(source, 0))

    def _check(self, behind: Iterable[bytes]) -> None:
        """Raise `StateLostError` where the store has less than it was told."""
        names = {_id(source): source for source in self._progress}
        resume: dict[SourcePartition, int | None] = {names[found[:6]]: _number(found[6:]) or None for found in behind}
        if resume:
            raise StateLostError(
                f"{self._server.place} has lost the timers of {len(resume)} partitions: append their events again, "
                "from the offsets given",
                wiped=False,
                resume=resume,
            )


def _six(number: int) -> bytes:
    return number.to_bytes(6, "little")


def _number(text: bytes) -> int:
    return int.from_bytes(text, "little")


def _id(source: SourcePartition) -> bytes:
    return _six(source_id(source))


def _step(step: Activity | ClockAdvance, place: int) -> tuple[bytes, bytes, bytes]:
    offset, index = _six(step.offset), step.index.to_bytes(3, "little")
    if isinstance(step, ClockAdvance):
        return _STEP.pack(0, place, offset, index, _six(step.clock), _six(0), 0.0, 0), b"", b""
    kind, time, timeout = 1 if step.newest else 2, _six(step.time), _six(step.timeout)
    packed = _STEP.pack(kind, place, offset, index, time, timeout, step.p_value, step.complete)
    return packed, step.entity.encode("utf-8", "surrogatepass"), step.event


def _inactivities(source: SourcePartition, text: bytes) -> list[Inactivity]:
    found, at = [], 0
    while at < len(text):
        offset, index, entity_size, timer_size = _NOTICED.unpack_from(text, at)
        at += _NOTICED.size
        entity = text[at : at + entity_size].decode("utf-8", "surrogatepass")
        _, time, _, own, place, p_value, complete = _TIMER.unpack_from(text, at + entity_size)
        event = text[at + entity_size + _TIMER.size : at + entity_size + timer_size]
        # What it was given matters no more.
        activity = Activity(
            entity, source, _number(own), _number(place), _number(time), 0, p_value, bool(complete), event
        )
        found.append(Inactivity(activity, _number(offset), _number(index)))
        at += entity_size + timer_size
    return found
