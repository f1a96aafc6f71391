"""Takes events that crash the detector out of their batch, so that the others are scored as always.

Promises: a batch that fails is split until each event that fails alone is found; the others get the scores and ids of a
stream without it. Where so many fail that the fault is not theirs, it raises instead. It does not hide other
faults: errors of stores, of memory and of the operating system pass through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import structlog

from encoder.ocsf.decoder import members
from encoder.ocsf.events import WHOLE, Message, Reject
from state.errors import StateError
from streamer.detection.batches import ScoredBatch
from streamer.errors import RipcurrentError, StreamError

LATEST = 1000
"""Messages over which crashing events are counted, or those of one batch if that is larger."""
MOST, SHARE = 10, 0.01
"""Crashing events among the latest messages beyond which the stream stops: more than MOST and more than SHARE of them.
Each costs about three batches of work, and a fault that hits one event in a hundred is one of the program, of the
bundle or of the device: dead letters would then replace detection without anybody noticing."""

_OTHER_FAULTS = (StateError, RipcurrentError, MemoryError, OSError)

STAGES = ("prepare", "judge")
"""Those of the rejects that are made here."""

T = TypeVar("T")
_log = structlog.get_logger("ripcurrent.isolation")


class Scorer(Protocol):
    """What is needed of a `Detector`."""

    def prepare(self, messages: Sequence[Message]) -> Any: ...

    def judge(self, prepared: Any) -> ScoredBatch: ...

    def remember(self, messages: Sequence[Message]) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """A prepared batch: its messages without the events that crashed, what `prepare` made of them, and those events."""

    messages: list[Message]
    value: Any
    rejects: list[Reject]


class EventIsolation:
    """Calls a detector and takes out the events that crash it. One for each stream: it counts them over batches. Two
    threads may use it, one to prepare and one to judge.

    Each method raises StreamError where too many events crash, or a batch whose events fail together and not alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = 0
        self._crashed: dict[tuple[str, int, int, int], int] = {}

    def prepare(self, detector: Scorer, messages: Sequence[Message]) -> Prepared:
        """As `Detector.prepare`."""
        with self._lock:
            self._read += len(messages)
        value, kept, rejects = self._attempt("prepare", messages, detector.prepare)
        return Prepared(kept, value, rejects)

    def judge(self, detector: Scorer, prepared: Prepared) -> ScoredBatch:
        """As `Detector.judge`; its rejects also hold the events that crashed in either stage."""
        given: list[Any] = [prepared.value]

        def judge(messages: Sequence[Message]) -> ScoredBatch:
            return detector.judge(given.pop() if given else detector.prepare(messages))

        scored, _, rejects = self._attempt("judge", prepared.messages, judge)
        if not prepared.rejects and not rejects:
            return scored
        return replace(scored, rejects=[*scored.rejects, *prepared.rejects, *rejects])

    def score(self, detector: Scorer, messages: Sequence[Message]) -> ScoredBatch:
        """As `Detector.score`."""
        return self.judge(detector, self.prepare(detector, messages))

    def remember(self, detector: Scorer, messages: Sequence[Message]) -> None:
        """As `Detector.remember`. Events that crash are passed over: they are dead letters already."""
        with self._lock:
            self._read += len(messages)
        self._attempt("remember", messages, detector.remember)

    def _attempt(
        self, stage: str, messages: Sequence[Message], call: Callable[[Sequence[Message]], T]
    ) -> tuple[T, list[Message], list[Reject]]:
        """The result of `call`, the messages that it is of, and the events that were taken out for it.

        `call` is repeated on parts of the messages, in stream order, and at last on all that is left: as after a
        redelivery, this changes nothing of what is remembered."""
        kept = list(messages)
        error = self._error(call, kept)
        if not isinstance(error, Exception):
            return error[0], kept, []
        rejects: list[Reject] = []
        self._search(stage, call, kept, 0, len(kept), error, rejects)
        kept = without(kept, rejects)
        last = self._error(call, kept)
        if isinstance(last, Exception):
            raise StreamError(
                f"{stage} fails on {len(kept)} messages together and on none of them alone: {_named(last)}"
            ) from last
        return last[0], kept, rejects

    def _search(
        self,
        stage: str,
        call: Callable[[Sequence[Message]], Any],
        messages: Sequence[Message],
        start: int,
        stop: int,
        error: Exception,
        rejects: list[Reject],
    ) -> None:
        """Messages [start, stop) fail: find the events that do, by halves."""
        if stop - start == 1:
            found = self._search_members(stage, call, start, messages[start], error)
            for reject in found:
                self._count(stage, messages[start], reject, len(messages), error)
            rejects.extend(found)
            return
        middle = (start + stop) // 2
        for first, end in ((start, middle), (middle, stop)):
            failed = self._error(call, messages[first:end])
            if isinstance(failed, Exception):
                self._search(stage, call, messages, first, end, failed, rejects)

    def _search_members(
        self, stage: str, call: Callable[[Sequence[Message]], Any], place: int, message: Message, error: Exception
    ) -> list[Reject]:
        """The events of one message that fail: all of it where it has but one, or where no member fails alone."""
        try:
            own = members(message)
        except Exception:  # The decoder itself fails on it.
            own = []
        found: list[Reject] = []
        if len(own) > 1 or message.skipped:
            indexes = frozenset(index for index, _ in own)
            for index, value in own:
                alone = message._replace(skipped=message.skipped | (indexes - {index}))
                failed = self._error(call, [alone])
                if isinstance(failed, Exception):
                    found.append(Reject(place, index, value, stage, type(failed).__name__, str(failed)))
        return found or [Reject(place, WHOLE, message.value, stage, type(error).__name__, str(error))]

    @staticmethod
    def _error(call: Callable[[Sequence[Message]], T], messages: Sequence[Message]) -> tuple[T] | Exception:
        """What the call returns, in a tuple, or what it raises if that may be the fault of an event."""
        try:
            return (call(messages),)
        except Exception as error:
            if is_other_fault(error):
                raise
            return error

    def _count(self, stage: str, message: Message, reject: Reject, batch: int, error: Exception) -> None:
        """Note a crashing event; raises StreamError if there were too many. One that is delivered again counts once."""
        where = message.topic, message.partition, message.offset, reject.index
        label = ":".join(map(str, where[: 3 if reject.index == WHOLE else 4]))
        _log.error("event crashed, to the dead letters", stage=stage, at=label, exc_info=error)
        with self._lock:
            latest = max(LATEST, batch)
            self._crashed[where] = self._read
            self._crashed = {at: read for at, read in self._crashed.items() if read > self._read - latest}
            if len(self._crashed) > max(MOST, SHARE * latest):
                raise StreamError(
                    f"{stage} failed on {len(self._crashed)} of the latest {min(latest, self._read):,} messages, so "
                    f"the fault is not in the events; nothing of this batch is committed. The last is {label}: "
                    f"{_named(error)}"
                ) from error


def without(messages: Sequence[Message], rejects: Iterable[Reject]) -> list[Message]:
    """The messages, of which these events are passed over."""
    kept = list(messages)
    for reject in rejects:
        kept[reject.message] = kept[reject.message]._replace(skipped=kept[reject.message].skipped | {reject.index})
    return kept


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def is_other_fault(error: Exception) -> bool:
    """Whether an error is of a store, of memory (host or device; torch has a RuntimeError for that), of the operating
    system, or one that says itself what to do: not the fault of an event."""
    text = str(error)
    return isinstance(error, _OTHER_FAULTS) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))
    )
