"""The edge to Kafka where events come from: `EventConsumer` reads micro-batches in a thread of its own, and has each
prepared in another while the one before is worked on.

Promises: the consumer is polled always, also while a batch is scored or the store is down (backpressure is pause); no
rebalance goes through while a batch is in hand, or else what that batch gave is never committed; at most QUEUED_BATCHES
wait, prepared or not. Does not know what an event is.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from encoder.ocsf.event_time import FUTURE_TOLERANCE_MS, NO_TIME, TimeBounds
from encoder.ocsf.events import Message
from state.errors import SourcePartition
from streamer.errors import StreamError
from streamer.kafka.client import (
    HOPELESS,
    TRANSIENT,
    Connections,
    Offsets,
    TransactionAbortedError,
    build,
    client_properties,
    committed_partitions,
    consumer_properties,
    label,
    patiently,
    reason_of,
    topic_partitions,
    watermarks,
)
from streamer.kafka.held_back import StandstillWatch
from streamer.kafka.topic_identity import CommitNote, Topic, describe, is_added, is_recreated, notes_of_group
from streamer.settings import Settings

CHUNK = 128
"""Messages asked of librdkafka at once: bounds what a burst of huge messages can add beyond BATCH_BYTES."""
BATCH_BYTES = 64 << 20
QUEUED_BATCHES = 2
STALL_S = 1.0
"""How long a full queue is waited for before partitions are paused. Pausing throws away what is prefetched, so it is
for a scorer that hangs and not for one that is merely busy."""
REVOKE_S = 20.0
"""How long a rebalance waits for the batch in hand. Beyond it the partitions go, and the batch is thrown away."""
GONE_S = 10.0
"""How long a topic may be gone before that is an error: what deletes it may be about to create it again."""
_GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}

_log = structlog.get_logger("ripcurrent.kafka")


@dataclass(frozen=True)
class Batch:
    """Messages in the order in which they are scored; `raw` are librdkafka's own, with key, headers and timestamp;
    prepared: what `prepare` makes of them, sooner or later."""

    raw: list[Any]
    messages: list[Message]
    prepared: Future[Any]

    @property
    def offsets(self) -> Offsets:
        """What to commit once the batch is done: last + 1 of each partition."""
        return {(message.topic, message.partition): message.offset + 1 for message in self.messages}


class EventConsumer:
    """The consumer in a thread of its own, which polls from `open` to `close` whatever the rest is doing.

    `guard` is held by whoever works on a batch or its outputs; a rebalance waits for it. release is called, with the
    guard held and in the consumer's thread, before partitions are given up (lost: they are gone already). prepare makes
    of the messages of a batch what is taken with it, ahead and in a thread of its own; it may be thrown away. The
    consumer is called in its own thread only: the client serializes calls, and one from outside waits as long as polls
    follow each other.
    """

    def __init__(
        self,
        settings: Settings,
        release: Callable[[set[SourcePartition], bool], None],
        prepare: Callable[[Sequence[Message]], Any],
    ) -> None:
        self.guard = threading.RLock()
        self.lag: Offsets = {}
        self.polled_at = time.monotonic()
        self.assigned = threading.Event()
        self.connections = Connections()
        self._settings = settings
        self._release = release
        self._prepare = prepare
        self._ahead = ThreadPoolExecutor(1, "prepare")
        self._changed = threading.Condition()
        self._queue: deque[Batch] = deque()
        self._gathered: list[Any] = []  # messages of the batch that is filling, for the consumer's thread alone
        self._owned: Offsets = {}  # next offset that is not committed, of the partitions that are ours
        self._unrecorded: Offsets = {}  # starting offsets that the group has no commit for yet
        self._resumed: Offsets | None = None  # the same, of those assigned since they were asked for
        self._positions: Offsets = {}
        self._notes: dict[SourcePartition, CommitNote] = {}  # what is committed with the offsets
        self._topics: dict[SourcePartition, int] = {}  # numbers of the topics as they were last read
        self._rewinding = False
        self._doomed = False
        self._metadata: Any = None
        self._requests: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._gone: tuple[float, str] | None = None  # since when a topic is gone, and what the client says of it
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._standstills = StandstillWatch()
        own = self.connections.properties(lambda statistics: self._standstills.take(statistics["topics"]))
        self._consumer = build(Consumer, own | consumer_properties(settings))
        self._admin = build(AdminClient, client_properties(settings))
        self._thread = threading.Thread(target=self._run, name="kafka-consumer", daemon=True)

    def open(self, topics: Mapping[SourcePartition, int] | None = None) -> None:
        """Join the group and begin to read. topics: numbers of the topics of partitions as they were last read, where
        that is known: Kafka deletes the commits of a topic that is deleted."""
        self._topics = dict(topics or {})
        callbacks = {"on_assign": self._assign, "on_revoke": self._revoke, "on_lost": self._lose}
        callbacks_in_guard = {name: self._telling(callback) for name, callback in callbacks.items()}
        self._consumer.subscribe(list(self._settings.events), **callbacks_in_guard)
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Leave the group. The guard must not be held."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._ahead.shutdown(cancel_futures=True)

    def wait(self, timeout_s: float) -> None:
        """Until there is a batch, prepared, or the time is over. Raises what ended the consumer's thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready() or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error

    def take(self) -> Batch | None:
        """The next batch if there is one, prepared; call it with the guard held."""
        with self._changed:
            if not self._is_ready():
                return None
            batch = self._queue.popleft()
            self._changed.notify_all()
            return batch

    def take_resumed(self) -> Offsets | None:
        """Committed offsets of partitions that were assigned since the last call, those without a commit left out; None
        if nothing was assigned."""
        with self._changed:
            resumed, self._resumed = self._resumed, None
            return resumed

    def owned(self) -> Offsets:
        """The partitions that are ours, each with its next offset that is not committed."""
        with self._changed:
            return dict(self._owned)

    def unrecorded(self) -> Offsets:
        """Starting offsets of partitions without a commit: to be committed too, or `latest` would skip what arrives
        before the first batch is done."""
        with self._changed:
            return dict(self._unrecorded)

    def topics(self) -> dict[SourcePartition, int]:
        """The partitions that are ours, each with the number of its topic; those of which none is known left out."""
        with self._changed:
            return {source: self._topics[source] for source in self._owned if self._topics.get(source)}

    def held_back(self) -> str:
        """What an open transaction of another program keeps from us, or an empty string."""
        return self._standstills.reason(self.owned(), self._settings.kafka.bootstrap_servers)

    def owns(self, partitions: Iterable[SourcePartition]) -> bool:
        """Whether all of these are still ours, and were without a break since their messages were read."""
        with self._changed:
            return not self._doomed and all(partition in self._owned for partition in partitions)

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Take note of what is committed."""
        with self._changed:
            for partition, offset in offsets.items():
                self._unrecorded.pop(partition, None)
                if partition in self._owned:
                    self._owned[partition] = offset

    def check_topics(self, sources: Iterable[SourcePartition]) -> None:
        """Ask Kafka, before these are committed, whether their topics are still those that were read.

        A topic that was deleted and created again under its reader goes on at the old offset, and no client says so.

        Raises:
            StreamError: one is another, and `on_missing_offsets` is stop.
            TransactionAbortedError: one is another and is read from its beginning, or there is none now.
        """
        if other := self._begin_recreated({topic for topic, _ in sources}):
            raise TransactionAbortedError(f"{label(other)}: the topic was deleted and created again")

    def rewind(self) -> None:
        """Go back to what is committed; what was read beyond it is thrown away."""
        with self._changed:
            for batch in self._queue:
                batch.prepared.cancel()
            self._queue.clear()
            self._rewinding = True
            self._doomed = False

    def group_metadata(self) -> Any:
        """Member and generation, for the transaction's fence: as of the latest poll, so never newer than the batch."""
        if threading.current_thread() is self._thread:
            return self._consumer.consumer_group_metadata()
        return self._metadata

    def commits(self, offsets: Mapping[SourcePartition, int]) -> list[TopicPartition]:
        """Offsets with what is noted beside them, as the client commits them."""
        with self._changed:
            return [
                TopicPartition(*source, offset, metadata=str(self._notes.get(source, CommitNote())))
                for source, offset in offsets.items()
            ]

    def commit(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Commit through the consumer (`at_least_once`)."""

        def commit() -> None:
            self._consumer.commit(offsets=self.commits(offsets), asynchronous=False)

        try:
            if threading.current_thread() is self._thread:
                commit()
            else:
                done: Future[Any] = Future()
                self._requests.append((commit, done))
                done.result(REVOKE_S)
        except TimeoutError as error:
            raise TransactionAbortedError("commit of offsets: the consumer did not answer") from error
        except KafkaException as error:
            raise TransactionAbortedError(f"commit of offsets: {reason_of(error)}") from error

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self._fail(error)
        finally:
            try:
                self._consumer.close()
            except BaseException as error:
                self._fail(error)

    def _telling(self, callback: Callable[[Any, list[TopicPartition]], None]) -> Callable[[Any, Any], None]:
        """The callback, with what it raises told to whoever waits: the client may make of it what nobody can catch."""

        def call(consumer: Any, partitions: list[TopicPartition]) -> None:
            try:
                callback(consumer, partitions)
            except BaseException as error:
                self._fail(error)

        return call

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _read(self) -> None:
        full_since: float | None = None
        lag_at = 0.0
        while not self._closing.is_set():
            now = self.polled_at = time.monotonic()
            if now - lag_at > 2:
                lag_at = now
                self._measure_lag()
                self._look_for_gone()
            self._metadata = self._consumer.consumer_group_metadata()
            self._serve()
            if self._rewinding:
                self._seek_back()
            with self._changed:
                room = len(self._queue) < QUEUED_BATCHES
            if room:
                if full_since is not None and now - full_since > STALL_S:
                    self._consumer.resume(topic_partitions(self._owned))
                full_since = None
                self._gather(self._settings.linger_ms / 1000)
            elif now - (full_since := full_since or now) > STALL_S:
                # Again each time: a rebalance may have brought partitions that are not paused yet.
                self._consumer.pause(topic_partitions(self._owned))
                self._gather(0.2)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._queue) < QUEUED_BATCHES, 0.1)

    def _serve(self) -> None:
        """Do what other threads ask of the consumer."""
        while self._requests:
            call, done = self._requests.popleft()
            try:
                done.set_result(call())
            except KafkaException as error:
                done.set_exception(error)

    def _gather(self, seconds: float) -> None:
        """Read until a batch is full or the time is over, and queue it."""
        self._gathered = []
        size = 0
        deadline = time.monotonic() + seconds
        while len(self._gathered) < self._settings.batch_size and size < BATCH_BYTES and not self._closing.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for message in self._consumer.consume(min(CHUNK, self._settings.batch_size - len(self._gathered)), left):
                error = message.error()
                if error is not None:
                    self._on_error(error, message)
                    continue
                self._gathered.append(message)
                size += len(message)
        with self._changed:
            if not self._rewinding:
                self._enqueue(self._gathered)
        self._gathered = []

    def _enqueue(self, raw: Iterable[Any]) -> None:
        """Queue what is ours of these messages, and have it prepared; call it with `_changed` held. A rebalance inside
        consume() may have taken partitions that were read just before it."""
        ours = [m for m in raw if (m.topic(), m.partition()) in self._owned]
        if ours:
            messages = [message_of(m) for m in ours]
            batch = Batch(ours, messages, self._ahead.submit(self._prepare, messages))
            self._positions.update(batch.offsets)
            self._queue.append(batch)
            batch.prepared.add_done_callback(self._wake)

    def _is_ready(self) -> bool:
        return bool(self._queue) and self._queue[0].prepared.done()

    def _wake(self, _: Future[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _seek_back(self) -> None:
        """To what is committed. By assigning anew: seek() does nothing for a partition that is not being fetched."""
        with self._changed:
            owned = dict(self._owned)
        if owned:
            self._consumer.incremental_unassign(topic_partitions(owned))
            self._consumer.incremental_assign(topic_partitions(owned))
        with self._changed:
            self._positions.update(owned)
            self._rewinding = False

    def _assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        sources = [(p.topic, p.partition) for p in partitions]
        names = {topic for topic, _ in sources}
        topics = patiently(f"topic {', '.join(sorted(names))}", lambda: describe(self._admin, names))
        committed, notes = self._read_commits(consumer, partitions, topics)
        starts = self._starts(consumer, [source for source in sources if source not in committed], topics, notes)
        with self._changed:
            self._take_notes(notes, topics)
        unrecorded = self._record_starts(starts)
        consumer.incremental_assign(topic_partitions(committed | starts))
        # The client remembers a pause beyond the loss of a partition.
        consumer.resume(topic_partitions(committed | starts))
        with self._changed:
            self._owned |= committed | starts
            self._positions |= committed | starts
            self._unrecorded |= unrecorded
            self._resumed = (self._resumed or {}) | committed
        self.assigned.set()
        _log.info("partitions assigned", partitions=label(committed | starts), owned=len(self._owned))

    def _read_commits(
        self, consumer: Any, partitions: list[TopicPartition], topics: Mapping[str, Topic]
    ) -> tuple[Offsets, dict[SourcePartition, CommitNote]]:
        """Committed offsets of those that have one of the topic as it is now, and what is noted beside them; notes also
        of those whose topic is another than it was. Raises StreamError for these where `on_missing_offsets` is stop."""
        committed: Offsets = {}
        notes: dict[SourcePartition, CommitNote] = {}
        other: list[SourcePartition] = []
        for found in committed_partitions(consumer, partitions):
            source = found.topic, found.partition
            topic = topics[found.topic]
            note = CommitNote.parse(found.metadata) if found.offset >= 0 else None
            if is_recreated(found.topic, topic, note, self._topics):
                other.append(source)
                notes[source] = CommitNote(topic.id)
            elif note is not None:
                committed[source] = found.offset
                notes[source] = CommitNote(topic.id, note.partitions)
        self._report_recreated(other, topics)
        return committed, notes

    def _starts(
        self,
        consumer: Any,
        sources: list[SourcePartition],
        topics: Mapping[str, Topic],
        notes: dict[SourcePartition, CommitNote],
    ) -> Offsets:
        """Where partitions without a commit begin; adds what is to be noted beside it. `start` is for a topic that the
        group reads for the first time. What was added to it later, or is another topic now, is read from its
        beginning."""
        starts: Offsets = {}
        asked = {source[0] for source in sources if source not in notes}
        of_group = notes_of_group(self._admin, self._settings.kafka.group_id, asked) if asked else {}
        for source in sources:
            low, high = watermarks(consumer, source)
            name, partition = source
            if source in notes:
                starts[source] = low
                continue
            added = is_added(partition, of_group[name])
            starts[source] = low if added or self._settings.start == "earliest" else high
            first = min((note.partitions for note in of_group[name]), default=topics[name].partitions)
            notes[source] = CommitNote(topics[name].id, first)
            if added:
                _log.info("partition added, read from its beginning", partition=label([source]), offset=low)
            else:
                start = self._settings.start
                _log.info("first start", topic=name, partition=partition, start=start, offset=starts[source])
        return starts

    def _record_starts(self, starts: Offsets) -> Offsets:
        """Commit where partitions begin before anything of them is read: with `latest` a process that was killed before
        its first commit would else leave out what came since. Gives those that could not be committed now."""
        if not starts:
            return {}
        try:
            self._consumer.commit(offsets=self.commits(starts), asynchronous=False)
        except KafkaException as error:
            _log.warning("first offsets are committed later", partitions=label(starts), reason=reason_of(error))
            return starts
        return {}

    def _begin_recreated(self, names: set[str]) -> list[SourcePartition]:
        """Go back to the beginning of those of our partitions whose topic is another now, and give them. Raises as
        `check_topics`."""
        try:
            self._admin.poll(0)
            topics = describe(self._admin, names)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise TransactionAbortedError(f"topic {', '.join(sorted(names))}: {reason_of(error)}") from error
            return []  # Without an answer nothing is committed either.
        with self._changed:
            other = [
                source
                for source in self._owned
                if source[0] in topics and is_recreated(source[0], topics[source[0]], self._notes[source], {})
            ]
        self._report_recreated(other, topics)
        if other:
            with self._changed:
                starts = dict.fromkeys(other, 0)  # If retention has deleted it already, that is seen as it is read.
                self._owned |= starts
                self._unrecorded |= starts
                self._resumed = self._resumed or {}
                self._take_notes({source: CommitNote(topics[source[0]].id) for source in other}, topics)
            self.rewind()
        return other

    def _take_notes(self, notes: Mapping[SourcePartition, CommitNote], topics: Mapping[str, Topic]) -> None:
        """Call it with `_changed` held."""
        self._notes |= notes
        self._topics |= {source: topics[source[0]].number for source in notes}

    def _report_recreated(self, sources: Sequence[SourcePartition], topics: Mapping[str, Topic]) -> None:
        """Raise StreamError where `on_missing_offsets` is stop."""
        for name in sorted({source[0] for source in sources}):
            what = f"topic {name!r} was deleted and created again (its id is {topics[name].id} now)"
            if self._settings.on_missing_offsets == "stop":
                raise StreamError(
                    f"{what}, and what is committed is of the topic before. To read the new one from its beginning: "
                    "--on-missing-offsets continue"
                )
            partitions = label(source for source in sources if source[0] == name)
            _log.error("offsets no longer exist, going on at the beginning", gap=what, partitions=partitions)

    def _revoke(self, _: Any, partitions: list[TopicPartition]) -> None:
        self._give_up({(p.topic, p.partition) for p in partitions}, lost=False)

    def _lose(self, _: Any, partitions: list[TopicPartition]) -> None:
        self._give_up({(p.topic, p.partition) for p in partitions}, lost=True)

    def _give_up(self, gone: set[SourcePartition], *, lost: bool) -> None:
        if lost:
            self.assigned.clear()
        if not gone:
            return
        # Without the guard the batch in hand is doomed, even if its partitions come back before it is done.
        deadline = time.monotonic() + (0.0 if lost else REVOKE_S)
        while not (held := self.guard.acquire(timeout=0.05)) and time.monotonic() < deadline:
            self._serve()  # Whoever holds the guard may be waiting for the consumer.
        try:
            if held:
                self._release(gone, lost)
            # They may come back while this batch is filling, and then what was read of them is read again.
            self._gathered = [m for m in self._gathered if (m.topic(), m.partition()) not in gone]
            with self._changed:
                self._doomed = self._doomed or not held
                for partition in gone:
                    for offsets in (self._owned, self._unrecorded, self._resumed, self._positions, self.lag):
                        if offsets is not None:
                            offsets.pop(partition, None)
                waiting, self._queue = self._queue, deque()
                for batch in waiting:
                    if gone.isdisjoint(batch.offsets):
                        self._queue.append(batch)
                    else:
                        batch.prepared.cancel()
                        self._enqueue(batch.raw)
        finally:
            if held:
                self.guard.release()
        _log.info("partitions lost" if lost else "partitions revoked", partitions=label(gone), owned=len(self._owned))

    def _on_error(self, error: Any, message: Any) -> None:
        code = error.code()
        if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            self._missing(message.topic(), message.partition())
        elif error.fatal():
            raise StreamError(f"the consumer cannot go on: {error.str()}")
        elif code in _GONE:
            reason = f"reading {message.topic() or ', '.join(self._settings.events)}: {error.str()}"
            _log.warning("a topic is gone", reason=reason)
            self._gone = self._gone or (time.monotonic(), reason)
        elif code in HOPELESS:
            raise StreamError(f"reading {message.topic() or ', '.join(self._settings.events)}: {error.str()}")
        else:
            _log.warning("consumer", reason=error.str(), retriable=error.retriable() or code in TRANSIENT)

    def _missing(self, topic: str, partition: int) -> None:
        if self._has_begun_recreated({topic}):
            return
        wanted = self._positions.get((topic, partition), -1)
        low, high = watermarks(self._consumer, (topic, partition))
        gap = f"{topic}:{partition} has offsets {low} to {high - 1}, and {wanted} is needed"
        lost = f"; {low - wanted} messages are lost" if 0 <= wanted < low else "; the topic was truncated or made anew"
        if self._settings.on_missing_offsets == "stop":
            raise StreamError(f"{gap}{lost}. To go on at offset {low}: --on-missing-offsets continue")
        _log.error("offsets no longer exist, going on at the earliest", gap=gap + lost)
        # A partition that failed does not answer to seek().
        self._consumer.incremental_unassign([TopicPartition(topic, partition)])
        self._consumer.incremental_assign([TopicPartition(topic, partition, low)])
        with self._changed:
            self._positions[topic, partition] = low

    def _look_for_gone(self) -> None:
        """Raise StreamError where a topic stays gone; go on with one that is back, by the rules of `check_topics`."""
        if self._gone is None:
            return
        since, reason = self._gone
        names = set(self._settings.events)
        try:
            describe(self._admin, names)
            self._consumer.list_topics(timeout=5)  # Else the group would notice at its next refresh, in five minutes.
            self._gone = None
        except KafkaException as error:
            if error.args[0].code() in _GONE and time.monotonic() - since > GONE_S:
                raise StreamError(reason) from error
            return
        self._has_begun_recreated(names)

    def _has_begun_recreated(self, names: set[str]) -> bool:
        """As `_begin_recreated`, for the consumer's thread, which does not have the guard."""
        try:
            other = self._begin_recreated(names)
        except TransactionAbortedError:  # Gone again: that will be said.
            return False
        if other:
            with self._changed:
                self._doomed = True  # What is scored of the topic before must not be committed to this one.
        return bool(other)

    def _measure_lag(self) -> None:
        lag = {}
        for key, position in list(self._positions.items()):
            with contextlib.suppress(KafkaException):
                _, high = self._consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
                if high >= 0:
                    lag[key] = max(high - position, 0)
        self.lag = lag


def message_of(raw: Any) -> Message:
    """librdkafka's message as the detector takes it."""
    kind, timestamp = raw.timestamp()
    at = raw.topic(), raw.partition(), raw.offset()
    message = Message(*at, -1 if kind == TIMESTAMP_NOT_AVAILABLE else timestamp, raw.value())
    if message.recorded_at != NO_TIME:
        return message
    # Nothing but the clock of this machine can bound the event times then.
    return message._replace(bounds=TimeBounds(0, int(time.time() * 1000) + FUTURE_TOLERANCE_MS, NO_TIME))
