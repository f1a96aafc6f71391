"""The service: the loop from the events topic to the alerts topic.

Promises: each message is committed once, together with what it gave (`exactly_once`), whatever dies in between; what
cannot be read goes to the dead-letter topic and stops nothing; a store that is away is waited for while Kafka is
polled, and one that lost windows is filled again before anything more is scored. Does not know how the detector is
made, nor what an alert looks like.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TypeVar

import numpy as np
import orjson
import structlog
from numpy.typing import NDArray

from encoder.ocsf.events import Message, Reject
from state.episodes import CLOSE, CREATE
from state.errors import SourcePartition, StateLostError, StoreFullError, StoreUnavailableError
from streamer.alerting.pipeline import with_threshold
from streamer.alerting.threshold_ledger import ThresholdLedger
from streamer.detection.batches import ScoredBatch
from streamer.detection.isolation import STAGES, EventIsolation, Prepared, without
from streamer.detection.score_records import score_lines
from streamer.errors import StreamError
from streamer.kafka.client import Offsets, TransactionAbortedError, claim_instance
from streamer.kafka.consumer import Batch, EventConsumer
from streamer.kafka.dead_letter_writer import alert_letter, dead_letter
from streamer.kafka.producer import Output, PlainPublisher, Publisher, TransactionalPublisher, Written
from streamer.service.bundle_rollout import BundleRollout
from streamer.service.metrics import Metrics, serve
from streamer.service.ports import Alerting, BatchScorer, Bundles, EmittedAlert, EntityStore
from streamer.service.repair_watch import RepairWatch
from streamer.service.shadow import Shadow
from streamer.service.window_rebuild import Rebuild
from streamer.settings import Settings

ALIVE_S = 60.0
"""How long the consumer may not poll before /healthz says so: longer than a rebalance waits for a batch."""
STUCK_S = 300.0
"""How long the loop may do one thing before /healthz says so: longer than it waits for Kafka in mid-transaction."""
DRAIN_S = 20.0
SLOW_S = 0.1
"""A server that takes longer to answer is named by /readyz: a batch waits for several answers."""
WATCH_S = 5.0
"""How often the windows are looked at when there is nothing to score: what an idle stream loses must not stay lost."""

T = TypeVar("T")
_log = structlog.get_logger("ripcurrent.service")


@dataclass
class _Group:
    """Batches that are scored and will be committed together."""

    since: float = 0.0
    batches: int = 0
    events: int = 0
    incomplete: int = 0
    lowered: Counter[str] = field(default_factory=Counter)
    anomalies: int = 0
    updates: dict[str, int] = field(default_factory=dict)  # activity by the alert's uid
    suppressed: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    outputs: list[Output] = field(default_factory=list)
    offsets: Offsets = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    alert_times: dict[str, tuple[int, int]] = field(default_factory=dict)  # by uid: event time, Kafka timestamp, ms
    appended: list[int] = field(default_factory=list)  # Kafka timestamp of the oldest message of each batch, ms

    def add(self, other: _Group) -> None:
        """Put the batches of another behind these."""
        self.since = self.since if self.batches else other.since
        for each in fields(self):
            if each.name in ("offsets", "updates", "alert_times"):
                getattr(self, each.name).update(getattr(other, each.name))
            elif each.name != "since":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class _StoppingError(Exception):
    """The service is asked to end while it waits."""


class Service:
    """Consume, score, explain, publish, commit; over and over, until `stop`.

    Args:
        detector: scores messages and explains rows.
        alerting: makes the alerts of a batch.
        threshold: p-value at or under which an event is an alert, fixed or from the ledger of the budget.
        instance: the name of this process in the group; by default the one that it can claim.
        windows: is told what is committed; None where the detector remembers nothing outside this process.
        bundles: where a bundle that is promoted while this runs comes from, and the shadow; None: there are none.
        workers_problem: what is wrong with workers beside this one, or an empty string; /readyz says so.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        settings: Settings,
        detector: BatchScorer,
        alerting: Alerting,
        *,
        threshold: float | ThresholdLedger,
        windows: EntityStore | None = None,
        instance: str = "",
        bundles: Bundles | None = None,
        workers_problem: Callable[[], str] = str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics = Metrics()
        self.metrics.promised.set(settings.alerts_per_day)
        self._settings = settings
        self._detector = detector
        self._isolation = EventIsolation()
        self._alerting = alerting
        self._threshold = threshold
        self._ledger = threshold if isinstance(threshold, ThresholdLedger) else None
        self._windows = windows
        self._workers_problem = workers_problem
        self._clock = clock
        self._stop = threading.Event()
        self._group = _Group()
        self._waiting_for = ""
        self._opened = False
        self._moved_at = time.monotonic()
        self._aborts = 0
        self._rebuild: Rebuild | None = None
        self._repairs = RepairWatch()
        self._watched_at = 0.0
        self._source = EventConsumer(settings, self._release, self._prepare)
        source, shadow = self._source, settings.shadow
        self._rollout = BundleRollout(settings, bundles, source, self.metrics) if bundles is not None else None
        self._shadow = Shadow(settings, shadow, bundles, source, self.metrics) if bundles and shadow else None
        self._publisher: Publisher = (
            TransactionalPublisher(settings, self._source, instance or claim_instance(settings))
            if settings.delivery == "exactly_once"
            else PlainPublisher(settings, self._source)
        )

    @property
    def detector(self) -> BatchScorer:
        """The one that serves now."""
        return self._detector

    def stop(self) -> None:
        """Ask `run` to commit what is scored and return; may be called from a signal handler or another thread."""
        self._stop.set()
        self._publisher.hurry()
        if self._ledger is not None:
            self._ledger.hurry()

    def run(self) -> None:
        """The loop.

        Raises:
            ConfigurationError: a port that is taken, a producer that cannot be opened.
            StreamError: what needs a person; everything up to the last commit is done, and nothing after it.
        """
        with self._opened_edges():
            while not self._stop.is_set():
                self._moved_at = time.monotonic()
                with self.metrics.time("wait"):
                    self._source.wait(self._patience())
                with self._source.guard:  # No rebalance goes through while a batch is in hand.
                    self._publisher.serve()
                    try:
                        if self._rebuild is not None:
                            self._fill_windows(self._rebuild)
                        else:
                            self._work()
                    except TransactionAbortedError as reason:
                        self._begin_again(reason)
                    except StateLostError as lost:
                        self._begin_rebuild(lost)
                    except _StoppingError:
                        break
                self.metrics.set_lag(self._source.lag)
                self.metrics.set_round_trips(self._publisher.connections.round_trip_s, self._store_round_trips())

    def _work(self) -> None:
        """The next batch, if there is one, from its events to the group that its outputs go into; and the commit of
        that group, if it is due."""
        self._take_over_if_ready()
        batch = self._source.take()
        self._check_windows()  # After it was taken: no message comes before the check of its partition.
        if batch is not None:
            scored = self._score(batch)
            scored, rows = with_threshold(scored, self._thresholds_for)
            alerts = self._alerts(scored, rows)
            if self._shadow is not None and scored.threshold is not None:
                self._shadow.compare(without(batch.messages, scored.rejects), scored, scored.threshold)
            self._add(batch, scored, alerts)
        if self._due():
            self._commit()

    @contextmanager
    def _opened_edges(self) -> Iterator[None]:
        address, port = self._settings.metrics_address, self._settings.metrics_port
        server = None
        if port:
            server = serve(self.metrics, address, port, alive=self.not_alive, ready=self.not_ready, slow=self.slow)
        try:
            self._publisher.open()
            if self._ledger is not None:  # After the publisher, which ends the transaction that a killed one left open.
                self._ledger.open()
            self._show_threshold()
            windows = self._windows
            self._source.open(self._waiting("identified", windows.identified) if windows is not None else {})
            self._opened = True
            _log.info("running", topics=list(self._settings.events), delivery=self._settings.delivery)
            yield
            with self._source.guard:
                try:
                    self._commit()
                except (TransactionAbortedError, StateLostError, _StoppingError) as reason:
                    _log.warning("the last group is left to the next start", reason=str(reason))
            _log.info("drained")
        finally:
            self._stop.set()
            for opened in (self._rebuild, self._rollout, self._shadow):
                if opened is not None:
                    opened.close()
            self._source.close(DRAIN_S)
            if self._ledger is not None:
                self._ledger.close()
            if server is not None:
                server.shutdown()
                server.server_close()

    def _take_over_if_ready(self) -> None:
        """Let a promoted bundle take over if one is ready, and the shadow join: both between two transactions."""
        preparation = self._rollout.ready() if self._rollout is not None else None
        if preparation is not None:
            self._commit()
            self._waiting("another bundle", preparation.catch_up)
            assert preparation.opened is not None
            opened, replaced = preparation.opened, self._windows
            self._detector, self._alerting, self._windows = opened.detector, opened.alerting, opened.windows
            self._show_bundle(opened.version)
            assert self._rollout is not None
            self._rollout.done(preparation)
            if replaced is not None:
                replaced.close()
        if self._shadow is not None and not self._group.batches:
            self._shadow.between_transactions()

    def _show_bundle(self, version: str) -> None:
        self.metrics.bundle.clear()
        self.metrics.bundle.labels(version).set(1)

    def _patience(self) -> float:
        """Seconds to wait for the next batch before the group that is open must be committed."""
        if not self._group.batches:
            return 0.2
        latency = self._settings.transaction_latency_ms / 1000
        return min(max(self._group.since + latency - time.monotonic(), 0.0), 0.2)

    def _due(self) -> bool:
        if not self._group.batches:
            moved = self._ledger is not None and self._ledger.idle(self._source.owned())
            return moved or bool(self._source.unrecorded())
        age_ms = (time.monotonic() - self._group.since) * 1000
        full = self._group.batches >= self._settings.batches_per_transaction
        return full or age_ms >= self._settings.transaction_latency_ms

    def _check_windows(self) -> None:
        """Compare what the windows hold with what is committed of partitions that are new here, and now and then with
        what they were told: raises StateLostError where they hold less."""
        windows, resumed = self._windows, self._source.take_resumed()
        if resumed is not None:
            self._identify_topics()
        if windows is None:
            return
        if resumed is not None:
            self._waiting("check_epoch", lambda: windows.check_epoch(resumed))
            if self._rebuild is None:  # Also of partitions without a commit: what is read of others waits for them.
                self._waiting("prepare", lambda: windows.prepare(self._source.owned()))
        elif not self._source.assigned.is_set() or time.monotonic() - self._watched_at < WATCH_S:
            return
        else:
            # While they are filled again, how far they have come is not how far the commit is.
            offsets_known = {} if self._rebuild is not None else self._source.owned()
            self._waiting("prepare", lambda: windows.prepare(offsets_known))
        self._watched_at = time.monotonic()

    def _identify_topics(self) -> None:
        """Say which topics the partitions are of. What is remembered of a topic that was deleted and created again is
        of other events with the same coordinates."""
        topics, windows = self._source.topics(), self._windows
        self._waiting("identify", lambda: self._alerting.identify(topics))
        if windows is not None:
            self._waiting("identify", lambda: windows.identify(topics))
        if self._shadow is not None:
            self._shadow.rejoin()

    def _begin_rebuild(self, lost: StateLostError) -> None:
        """Windows were lost: forget what is scored and not committed, fill the windows up to the commit, then go on
        from there. Nothing of it was published, so nothing is doubled."""
        assert self._windows is not None
        if self._rebuild is not None:  # It was not done yet, or is lost again: the new one takes up what it leaves.
            self._rebuild.close()
            if not lost.wiped:
                lost = StateLostError(str(lost), wiped=False, resume=self._rebuild.resume | lost.resume)
        _log.error("windows were lost, filling them again from Kafka", reason=str(lost))
        self.metrics.losses.inc()
        self._forget()
        self._source.rewind()
        self._watched_at = time.monotonic()
        targets, now_ms = self._source.owned(), int(self._clock() * 1000)
        remember = partial(self._isolation.remember, self._detector)
        self._rebuild = Rebuild(self._settings, self._windows, remember, lost, targets, now_ms=now_ms)

    def _fill_windows(self, rebuild: Rebuild) -> None:
        """The next step of a rebuild. What is read meanwhile waits, and its partitions are paused."""
        done = self._waiting("rebuild", lambda: rebuild.step(self._source.owned()))
        self.metrics.rebuild_left.set(rebuild.left)
        if done:
            rebuild.close()
            self._rebuild = None
        else:
            self._check_windows()

    def _prepare(self, messages: Sequence[Message]) -> tuple[BatchScorer, Prepared]:
        """What is done ahead, in a thread of its own, and by whom: another may serve once it is taken."""
        detector = self._detector
        return detector, self._isolation.prepare(detector, messages)

    def _score(self, batch: Batch) -> ScoredBatch:
        detector, prepared = batch.prepared.result()
        if detector is not self._detector:
            _, prepared = self._prepare(batch.messages)
        if self._ledger is not None and self._detector.live is not None:
            self._detector.live = self._ledger.calibration(self._detector.live, self._source.owned())
        scored = self._waiting("score", lambda: self._isolation.judge(self._detector, prepared))
        for stage, seconds in scored.seconds.items():
            self.metrics.stage.labels(stage).observe(seconds)
        self.metrics.batches.inc()
        return scored

    def _thresholds_for(self, scored: ScoredBatch) -> NDArray[np.float64]:
        if isinstance(self._threshold, ThresholdLedger):
            return self._threshold.judge(scored, self._source.owned())
        return np.full(len(scored), self._threshold)

    def _alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> Sequence[EmittedAlert]:
        with self.metrics.time("explain"):
            alerts = self._waiting("alerts", lambda: self._alerting.alerts(scored, rows))
        inactive = scored.inactive
        silent = (
            0 if inactive is None or inactive.threshold is None else int((inactive.p_value <= inactive.threshold).sum())
        )
        self._group.anomalies += len(rows) + silent
        self._group.suppressed.update(self._alerting.take_suppressed())
        return alerts

    def _add(self, batch: Batch, scored: ScoredBatch, alerts: Sequence[EmittedAlert]) -> None:
        """Put a scored batch into the group: its outputs, its offsets, and what to count once they are committed."""
        # Whole or not at all: if one output cannot be made, what is there is committed as its partitions are given up.
        self._group.add(self._outputs_of(batch, scored, alerts))
        self.metrics.repaired(scored.repairs)
        for kind, share in self._repairs.observe(len(scored), scored.repairs).items():
            _log.warning("a repair touches many events, look at their senders", repair=kind, share=f"{share:.0%}")
        self.metrics.set_repair_shares(self._repairs.shares)

    def _outputs_of(self, batch: Batch, scored: ScoredBatch, alerts: Sequence[EmittedAlert]) -> _Group:
        group, settings = _Group(), self._settings
        now_ms = int(self._clock() * 1000)
        where = {(m.topic, m.partition, m.offset): i for i, m in enumerate(batch.messages)} if alerts else {}
        for alert in alerts:
            output = _output(settings.alerts, alert, now_ms)
            source = _source_of(scored, alert)
            letter = partial(alert_letter, output, source, settings.dead_letters)
            group.outputs.append(output._replace(instead=letter))
            if alert.row >= 0 and alert.activity == CREATE:
                message = batch.messages[where[source[:3]]]
                group.alert_times[alert.uid] = int(scored.time[alert.row]), message.recorded_at
            else:
                group.updates[alert.uid] = alert.activity
        for reject in scored.rejects:
            group.outputs.append(dead_letter(batch.raw[reject.message], reject, settings.dead_letters))
            group.rejects.append(reject)
        if settings.scores:
            group.outputs.extend(_scores(scored, settings.scores, now_ms))
        group.since = time.monotonic()
        group.offsets = batch.offsets
        group.batches = 1
        group.events = len(scored)
        group.incomplete = 0 if scored.complete is None else int((~scored.complete).sum())
        if scored.lowered is not None:
            group.lowered.update("news" if each.fields else "part" for each in scored.lowered if each is not None)
        group.messages = len(batch.messages)
        group.appended = [min(message.recorded_at for message in batch.messages)]
        return group

    def _commit(self) -> None:
        """Publish the group with its offsets. The order is the promise: windows are told of offsets before Kafka holds
        them, and may forget what a redelivery needs only after."""
        offsets = self._source.unrecorded() | self._group.offsets
        ledger, windows = self._ledger, self._windows
        recorded = ledger.outputs(int(self._clock() * 1000)) if ledger is not None else []
        if ledger is not None and recorded and not offsets:
            owned = self._source.owned()  # Without the decider's partition a threshold cannot be committed.
            offsets = {ledger.decider: owned[ledger.decider]} if ledger.decider in owned else {}
        if not offsets:
            return
        self._source.check_topics(offsets)
        if windows is not None:
            self._waiting("prepare", lambda: windows.prepare(offsets))
        if self._shadow is not None:
            self._shadow.prepare(offsets)
        with self.metrics.time("publish"):
            refused = self._publisher.publish([*self._group.outputs, *recorded], offsets)
        if ledger is not None:
            ledger.committed()
        self._source.committed(offsets)
        if self._shadow is not None:
            self._shadow.committed(offsets)
        done, self._group, self._aborts = self._group, _Group(), 0
        self._count(done, [output.origin for output in refused if output.topic == self._settings.alerts])
        self._alerting.committed(offsets)
        if windows is not None:
            try:
                windows.committed(offsets)
            except (StoreUnavailableError, StoreFullError) as error:  # Only tidying up: the next commit covers it.
                _log.warning("windows were not told of a commit", reason=str(error))

    def _count(self, done: _Group, refused_alerts: Sequence[str]) -> None:
        for uid in refused_alerts:
            done.alert_times.pop(uid, None)
            done.updates.pop(uid, None)
            self.metrics.rejects.labels("AlertTooLarge").inc()
        self.metrics.transactions.labels("committed").inc()
        self.metrics.messages.inc(done.messages)
        self.metrics.events.inc(done.events)
        self.metrics.incomplete.inc(done.incomplete)
        for why, events in done.lowered.items():
            self.metrics.lowered.labels(why).inc(events)
        self.metrics.anomalies.inc(done.anomalies)
        self.metrics.alerts.inc(len(done.alert_times))
        for suppression, events in done.suppressed.items():
            self.metrics.suppressed.labels(suppression[:8]).inc(events)
        for activity in done.updates.values():
            self.metrics.updates.labels("close" if activity == CLOSE else "update").inc()
        for reject in done.rejects:
            self.metrics.rejects.labels(reject.exception).inc()
            if reject.stage in STAGES:
                self.metrics.crashes.labels(reject.stage).inc()
        now = self._clock() * 1000
        for histogram, times in (
            (self.metrics.latency, [appended for _, appended in done.alert_times.values()]),
            (self.metrics.batch_latency, done.appended),
        ):
            for appended in times:
                if appended >= 0:
                    histogram.observe(max(now - appended, 0) / 1000)
        self.metrics.spend([event_time for event_time, _ in done.alert_times.values()])
        self._show_threshold()

    def _show_threshold(self) -> None:
        self.metrics.threshold.set(
            self._threshold.threshold if isinstance(self._threshold, ThresholdLedger) else self._threshold
        )

    def _begin_again(self, reason: Exception) -> None:
        """After an abort: forget the group and read it again from what is committed, later each time it fails."""
        self._forget()
        self._source.rewind()
        self._aborts += 1
        self.metrics.transactions.labels("aborted").inc()
        _log.warning("read again from the last commit", reason=str(reason), times=self._aborts)
        self._stop.wait(min(0.05 * 2 ** min(self._aborts, 7), 5.0) if self._aborts > 1 else 0)

    def _forget(self) -> None:
        """What is scored and not committed."""
        self._group = _Group()
        if self._ledger is not None:
            self._ledger.rewind()

    def _release(self, gone: set[SourcePartition], lost: bool) -> None:
        """A rebalance takes partitions: finish what is scored of them, or throw it away if they are lost already."""
        if lost:
            if gone & set(self._group.offsets):
                self._begin_again(TransactionAbortedError("partitions were lost"))
            return
        try:
            self._commit()
        except (TransactionAbortedError, StateLostError, _StoppingError) as reason:
            self._begin_again(reason)

    def _waiting(self, doing: str, call: Callable[[], T]) -> T:
        """Call until the store answers: calls are idempotent, and the consumer's thread polls Kafka meanwhile."""
        deadline = time.monotonic() + self._settings.redis.patience_s
        pause = 0.1
        while True:
            self._moved_at = time.monotonic()
            try:
                result = call()
                self._waiting_for = ""
                return result
            except (StoreUnavailableError, StoreFullError) as error:
                if time.monotonic() > deadline:
                    patience = self._settings.redis.patience_s
                    raise StreamError(f"{doing}: {error}; waited {patience:.0f} s (redis.patience_s)") from error
                self._waiting_for = f"{doing}: {error}"
                self.metrics.waits.inc()
                _log.warning("waiting for redis", doing=doing, reason=str(error))
            if self._stop.wait(pause):
                raise _StoppingError
            pause = min(pause * 2, 2.0)

    def not_alive(self) -> str:
        """Why /healthz fails, or an empty string."""
        if not self._opened:
            return ""
        now = time.monotonic()
        unpolled, unmoved = now - self._source.polled_at, now - self._moved_at
        if unpolled > ALIVE_S:
            return f"Kafka was not polled for {unpolled:.0f} s"
        return f"the loop is at the same thing for {unmoved:.0f} s" if unmoved > STUCK_S else ""

    def not_ready(self) -> str:
        """Why /readyz fails, or an empty string."""
        if not self._source.assigned.is_set():
            return "no partitions are assigned"
        if not self._source.connections.connected:
            return "no broker is connected"
        if self._rebuild is not None:
            return self._waiting_for or f"windows are filled again, {self._rebuild.left} messages are left"
        return self._waiting_for or self._workers_problem() or self._source.held_back()

    def slow(self) -> str:
        """Which servers take longer than SLOW_S to answer, or an empty string. It does not make /readyz fail: events
        are scored, only later."""
        brokers = {f"Kafka at {name}": taken for name, taken in self._publisher.connections.round_trip_s.items()}
        taken_by = brokers | dict(self._store_round_trips())
        return "; ".join(
            f"{server} is slow, it takes {taken * 1000:.0f} ms to answer"
            for server, taken in taken_by.items()
            if taken > SLOW_S
        )

    def _store_round_trips(self) -> Mapping[str, float]:
        return self._windows.round_trips() if self._windows is not None else {}


def _output(topic: str, alert: Written, now_ms: int) -> Output:
    return Output(topic, alert.key, alert.value, [*alert.headers], now_ms, alert.uid)


def _source_of(scored: ScoredBatch, alert: EmittedAlert) -> tuple[str, int, int, int]:
    """Coordinates of the event that an alert is about; where that is not in the batch, those that the alert names."""
    if alert.row >= 0:
        topic, partition = scored.coordinates.sources[scored.coordinates.source[alert.row]]
        return topic, partition, int(scored.coordinates.offset[alert.row]), int(scored.coordinates.index[alert.row])
    source = orjson.loads(alert.value)["unmapped"]["source"]
    return source["topic"], source["partition"], source["offset"], source["index"]


def _scores(scored: ScoredBatch, topic: str, now_ms: int) -> Iterator[Output]:
    """One message an event, whose key is its coordinates."""
    for label, value in score_lines(scored):
        yield Output(topic, label.encode(), value, [], now_ms, label)
