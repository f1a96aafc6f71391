"""Replay: score a frozen range of topics again, and see the alerts that it gives, without touching anything live.

Promises: the same range and bundle give the same alert ids and scores, and those of the live service where the warm-up
covers what its windows held; cut off at any moment, it goes on where it was when it is started again. Its windows live
in this process and not in Redis: a replay costs the live server neither memory nor time, has nothing to remove when it
is killed, and runs where no Redis is. What they cannot know is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.event_time import FUTURE_TOLERANCE_MS, NO_TIME
from encoder.ocsf.events import Coordinates, Message
from state.errors import SourcePartition
from state.memory.episodes import MemoryEpisodes
from state.memory.timers import MemoryTimers
from state.memory.windows import MemoryWindows
from streamer.alerting.pipeline import AlertPipeline, Suppressing, with_threshold
from streamer.alerting.suppression_feed import open_feedback
from streamer.alerting.threshold_ledger import RecordedThresholds, recorded_decisions
from streamer.bundles.bundle_files import load
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector
from streamer.detection.isolation import EventIsolation
from streamer.detection.live_calibration import Decision
from streamer.detection.score_records import score_lines
from streamer.explain.attribution import Explainer
from streamer.kafka.client import Offsets
from streamer.kafka.consumer import message_of
from streamer.kafka.offset_ranges import Range, first_offsets, freeze, offsets_since
from streamer.kafka.producer import Written
from streamer.kafka.range_reader import RangeReader
from streamer.redaction import Redactor
from streamer.settings import Settings, device_of

MAX_ENTITIES = 1_000_000
"""Entities remembered, about 5 kB each; of more, those that were silent longest go, and their next scores say so."""
CHECKPOINT_S = 2.0

ThresholdAt = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""event times (epoch ms, int64 [n]) -> the p-value at or under which an event of that time is an alert, float64 [n]."""
Show = Callable[[str, int, int, str], None]
"""Called with (stage, messages done, of how many, what to show beside it)."""


@dataclass(frozen=True)
class Plan:
    """What is read, frozen. scored: the range that is replayed; start: where the warm-up of each partition begins;
    horizon_ms: event time from which on nothing is missing, 0 where the warm-up begins with the topic itself."""

    scored: Range
    start: Offsets
    horizon_ms: int

    @property
    def read(self) -> Range:
        """Warm-up and range together."""
        return {source: (self.start[source], end) for source, (_, end) in self.scored.items()}


@dataclass
class Counts:
    """What a replay has seen so far. incomplete: events whose history the warm-up did not cover."""

    messages: int = 0
    events: int = 0
    alerts: int = 0
    rejects: int = 0
    incomplete: int = 0


@dataclass
class ReplayProgress:
    """How far a replay has come: all that is needed to go on. request: what was asked for, of which bundle."""

    request: str
    plan: Plan
    positions: Offsets
    counts: Counts = field(default_factory=Counts)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        partitions = [
            [*source, self.plan.start[source], start, end, self.positions[source]]
            for source, (start, end) in self.plan.scored.items()
        ]
        return {
            "request": self.request,
            "horizon_ms": self.plan.horizon_ms,
            "partitions": partitions,
            "counts": asdict(self.counts),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ReplayProgress:
        """The inverse of `to_json`."""
        rows = [((topic, partition), *offsets) for topic, partition, *offsets in value["partitions"]]
        plan = Plan({s: (a, b) for s, _, a, b, _ in rows}, {s: w for s, w, *_ in rows}, value["horizon_ms"])
        return cls(value["request"], plan, {s: at for s, _, _, _, at in rows}, Counts(**value["counts"]))


@dataclass(frozen=True)
class Judged:
    """What came of a batch: of its events from the positions on."""

    alerts: Sequence[Written]
    scores: Sequence[bytes]
    events: int
    rejects: int
    incomplete: int


class Judge(Protocol):
    """What decides on a batch: `ReplayDetector`, or two of them compared."""

    def remember(self, batch: Sequence[Message]) -> None:
        """Take note of a batch of the warm-up."""
        ...

    def judge(self, batch: Sequence[Message], positions: Offsets) -> Judged:
        """Decide on a batch; what lies before the positions is warm-up still."""
        ...


class Sink(Protocol):
    """Where alerts go."""

    def write(self, judged: Judged) -> None:
        """Take what came of a batch."""
        ...

    def checkpoint(self, progress: ReplayProgress) -> None:
        """Make what was written last, together with the progress: after a crash, both are there or neither."""
        ...


class ReplayDetector:
    """The service's detector and alerts, with windows of their own in this process.

    Args:
        thresholds: the threshold at an event time: fixed, or as it was recorded.
        decisions: of the live calibration, as they were recorded; None: it decides here, as in a file.
    """

    def __init__(
        self,
        bundle: Bundle,
        tenant: str,
        thresholds: ThresholdAt,
        redact: Sequence[str] = (),
        suppressing: Suppressing | None = None,
        decisions: Sequence[Decision] | None = (),
    ) -> None:
        self.version = bundle.version
        self._windows = MemoryWindows(dim=bundle.dim, max_entities=MAX_ENTITIES)
        self._timers = MemoryTimers()
        self.redactor = redactor = Redactor(redact)
        self._detector = Detector(bundle, self._windows, tenant=tenant, timers=self._timers, redactor=redactor)
        self._detector.live.moves = decisions is None
        self._detector.live.decisions.extend(decisions or ())
        self._isolation = EventIsolation()
        self._findings = AlertPipeline(
            Explainer(bundle, self._windows),
            MemoryEpisodes(),
            bundle_version=bundle.version,
            tenant=tenant,
            redactor=redactor,
            suppressing=suppressing,
        )
        self._thresholds = thresholds

    @classmethod
    def open(cls, settings: Settings, path: Path) -> ReplayDetector:
        """With the bundle at `path`, at the thresholds that the service recorded; where it recorded none, at the one
        that the budget gives at the rate of training. Raises BundleError."""
        bundle = load(path, device_of(settings))
        if settings.threshold is not None:
            return cls(
                bundle, settings.tenant, fixed_threshold(settings.threshold), settings.redact, open_feedback(settings)
            )
        recorded = RecordedThresholds.read(settings)
        thresholds = recorded.at if len(recorded) else fixed_threshold(bundle.threshold(settings.alerts_per_day))
        decisions = recorded_decisions(settings, bundle.version)
        return cls(bundle, settings.tenant, thresholds, settings.redact, open_feedback(settings), decisions)

    def begin(self, horizon_ms: int) -> None:
        """Windows that reach back behind this event time are not complete."""
        self._windows.finish_rebuild((), horizon_ms)

    def fill(self, batch: Sequence[Message]) -> None:
        """Append to the windows without scoring."""
        self._isolation.remember(self._detector, batch)
        self.forget(batch)

    def remember(self, batch: Sequence[Message]) -> None:
        """Append to the windows, and note what is part of a story already."""
        self._findings.note(*self._lined(batch))
        self.forget(batch)

    def _lined(self, batch: Sequence[Message]) -> tuple[ScoredBatch, NDArray[np.intp]]:
        """Scored, with the threshold that each event is held against; and the rows that cross it."""
        scored = self._isolation.score(self._detector, batch)
        self._detector.take(scored)
        return with_threshold(scored, lambda batch: self._thresholds(batch.time))

    def score(self, batch: Sequence[Message], positions: Offsets) -> tuple[ScoredBatch, NDArray[np.intp]]:
        """Score a batch, with thresholds; also the rows from the positions on that cross them. `forget` it when it is
        done."""
        scored, rows = self._lined(batch)
        return scored, rows[wanted_rows(scored.coordinates, positions)[rows]]

    def judge(self, batch: Sequence[Message], positions: Offsets) -> Judged:
        """Alerts and scores of a batch."""
        scored, rows = self._lined(batch)
        wanted = wanted_rows(scored.coordinates, positions)
        alerts = [alert for alert in self._findings.alerts(scored, rows) if alert.row < 0 or wanted[alert.row]]
        values = [value for (_, value), kept in zip(score_lines(scored), wanted.tolist(), strict=True) if kept]
        self.forget(batch)
        return judged(batch, scored, positions, alerts, values)

    def forget(self, batch: Sequence[Message]) -> None:
        """What only another delivery of a batch would need: nothing is delivered twice here."""
        done = {_source(message): message.offset + 1 for message in batch}
        self._windows.committed(done)
        self._timers.committed(done)
        self._findings.committed(done)


def judged(
    batch: Sequence[Message],
    scored: ScoredBatch,
    positions: Offsets,
    alerts: Sequence[Written],
    scores: Sequence[bytes] = (),
) -> Judged:
    """What came of a batch, with its figures."""
    wanted = wanted_rows(scored.coordinates, positions)
    rejects = sum(batch[r.message].offset >= positions[_source(batch[r.message])] for r in scored.rejects)
    incomplete = 0 if scored.complete is None else int((wanted & ~scored.complete).sum())
    return Judged(alerts, scores, int(wanted.sum()), rejects, incomplete)


def fixed_threshold(threshold: float) -> ThresholdAt:
    """The same threshold at every time."""
    return lambda times: np.full(len(times), threshold)


def plan(settings: Settings, since: Sequence[str], until: Sequence[str], warmup_ms: int, now_ms: int) -> Plan:
    """Freeze a range, and find where its warm-up begins: `warmup_ms` before its first record, in every partition."""
    scored = freeze(settings, since, until, now_ms)
    start = {source: first for source, (first, _) in scored.items()}
    heads = _heads(settings, scored)
    if not heads:
        return Plan(scored, start, 0)
    first_ms = max(min(heads.values()) - warmup_ms, 0)
    low = first_offsets(settings, scored)
    if warmup_ms:
        start = offsets_since(settings, first_ms, start)
    # Of a partition whose records before are gone, or are not read, nothing is known before its first.
    bare = {s: (at, scored[s][1]) for s, at in start.items() if at > 0 and (at == low[s] or not warmup_ms)}
    since_ms = max([first_ms, *(now_ms if at == NO_TIME else at for at in _heads(settings, bare).values())])
    return Plan(scored, start, since_ms + FUTURE_TOLERANCE_MS if any(start.values()) else 0)


def _heads(settings: Settings, wanted: Range) -> dict[SourcePartition, int]:
    with RangeReader(settings, wanted, message_of) as reader:
        return reader.heads()


def replay(settings: Settings, progress: ReplayProgress, judge: Judge, sink: Sink, show: Show) -> None:
    """Read the plan of `progress` from its warm-up on, and write what comes of all that is not done yet.

    Raises:
        StreamError: messages of the range no longer exist, or Kafka does not answer; run it again to go on.
    """
    if all(progress.positions[source] >= end for source, (_, end) in progress.plan.scored.items()):
        return
    done_before, counts = dict(progress.positions), progress.counts
    warm = _Meter("warm up", sum(done_before[s] - start for s, start in progress.plan.start.items()), show)
    fresh = _Meter("replay", sum(end - start for start, end in progress.plan.scored.values()), show, counts.messages)
    checkpoint_at = time.monotonic() + CHECKPOINT_S
    with RangeReader(settings, progress.plan.read, message_of) as reader:
        for batch in reader.batches(settings.batch_size):
            new = [message for message in batch if message.offset >= done_before[_source(message)]]
            if len(new) < len(batch):
                warm.add(len(batch) - len(new))
            if not new:
                judge.remember(batch)
                continue
            judged = judge.judge(batch, done_before)
            sink.write(judged)
            progress.positions |= {_source(message): message.offset + 1 for message in new}
            counts.messages += len(new)
            counts.events += judged.events
            counts.alerts += len(judged.alerts)
            counts.rejects += judged.rejects
            counts.incomplete += judged.incomplete
            fresh.add(len(new))
            if time.monotonic() > checkpoint_at:
                sink.checkpoint(progress)
                checkpoint_at = time.monotonic() + CHECKPOINT_S
    progress.positions |= {source: end for source, (_, end) in progress.plan.scored.items()}
    sink.checkpoint(progress)


class _Meter:
    """A bar with its rate."""

    def __init__(self, stage: str, total: int, show: Show, done: int = 0) -> None:
        self._stage, self._total, self._show = stage, total, show
        self._done = self._before = done
        self._began = time.monotonic()

    def add(self, messages: int) -> None:
        self._done += messages
        rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-3)
        self._show(self._stage, self._done, self._total, f"{rate:,.0f} messages/s")


def _source(message: Message) -> SourcePartition:
    return message.topic, message.partition


def wanted_rows(at: Coordinates, positions: Offsets) -> NDArray[np.bool_]:
    """bool [n]: which events lie at the positions or after."""
    least = np.array([positions[source] for source in at.sources], np.int64)
    return at.offset >= least[at.source] if len(at) else np.zeros(0, np.bool_)
