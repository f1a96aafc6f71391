"""The edge to Kafka: `Source` reads micro-batches, a `Publisher` writes what came of them together with input offsets.

Promises: the consumer is polled always, also while a batch is scored or the store is down (backpressure is pause); no
rebalance goes through while a batch is in hand, or else what that batch gave is never committed; with `exactly_once`,
outputs and offsets are one transaction. Does not know what an event or an alert is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import structlog
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]

from encoder.events import Message
from streamer.errors import ConfigurationError, StreamError
from streamer.settings import Settings

SourcePartition = tuple[str, int]
Offsets = dict[SourcePartition, int]
"""Next offset to be read, by (topic, partition)."""

START_S = 8.0
"""How long an unreachable broker is waited for at start: wrong settings must show within 15 seconds."""
CHUNK = 128
"""Messages asked of librdkafka at once: bounds what a burst of huge messages can add beyond BATCH_BYTES."""
BATCH_BYTES = 64 << 20
QUEUED_BATCHES = 2
STALL_S = 1.0
"""How long a full queue is waited for before partitions are paused. Pausing throws away what is prefetched, so it is
for a scorer that hangs and not for one that is merely busy."""
REVOKE_S = 20.0
"""How long a rebalance waits for the batch in hand. Beyond it the partitions go, and the batch is thrown away."""
TRANSACTION_S = 120.0
"""How long a broker that is down is waited for in mid-transaction."""
DRAIN_S = 12.0
"""The same once the process is asked to end."""
SEND_OFFSETS_S = 10.0
"""How long offsets may take to be sent. The client ignores its own timeout there and can hang for ever once the group's
coordinator has gone away (librdkafka issues 5456 and 5511), so the call is left behind with its producer."""

_FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}
_HOPELESS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
}
_TRANSIENT = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE}

_log = structlog.get_logger("ripcurrent.kafka")


class TransactionAbortedError(Exception):
    """Outputs and offsets were not written; read again from what is committed."""


class Output(NamedTuple):
    """One message to write. origin names what it came from, so that one that is too large can be told; timestamp in
    epoch ms, 0: now."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int
    origin: str


@dataclass(frozen=True)
class Batch:
    """Messages in the order in which they are scored; `raw` are librdkafka's own, with key, headers and timestamp."""

    raw: list[Any]
    messages: list[Message]

    @property
    def offsets(self) -> Offsets:
        """What to commit once the batch is done: last + 1 of each partition."""
        return {(message.topic, message.partition): message.offset + 1 for message in self.messages}

    def without(self, gone: set[SourcePartition]) -> Batch:
        """The batch without some partitions."""
        keep = [i for i, m in enumerate(self.messages) if (m.topic, m.partition) not in gone]
        return Batch([self.raw[i] for i in keep], [self.messages[i] for i in keep])


class Source:
    """The consumer in a thread of its own, which polls from `open` to `close` whatever the rest is doing.

    `guard` is held by whoever works on a batch or its outputs; a rebalance waits for it. release is called, with the
    guard held and in the consumer's thread, before partitions are given up (lost: they are gone already). The consumer
    is called in its own thread only: the client serializes calls, and one from outside waits as long as polls follow
    each other.
    """

    def __init__(self, settings: Settings, release: Callable[[set[SourcePartition], bool], None]) -> None:
        self.guard = threading.RLock()
        self.lag: Offsets = {}
        self.polled_at = time.monotonic()
        self.assigned = threading.Event()
        self._settings = settings
        self._release = release
        self._changed = threading.Condition()
        self._queue: deque[Batch] = deque()
        self._owned: Offsets = {}  # next offset that is not committed, of the partitions that are ours
        self._unrecorded: Offsets = {}  # starting offsets that the group has no commit for yet
        self._resumed: Offsets = {}  # partitions with commits that were assigned and not yet asked for
        self._positions: Offsets = {}
        self._rewinding = False
        self._doomed = False
        self._metadata: Any = None
        self._requests: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._consumer = _build(Consumer, _consumer_properties(settings))
        self._thread = threading.Thread(target=self._run, name="kafka-consumer", daemon=True)

    def open(self) -> None:
        """Join the group and begin to read."""
        self._consumer.subscribe(
            list(self._settings.events), on_assign=self._assign, on_revoke=self._revoke, on_lost=self._lose
        )
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Leave the group. The guard must not be held."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Until there is a batch, or the time is over. Raises what ended the consumer's thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error

    def take(self) -> Batch | None:
        """The next batch if there is one; call it with the guard held."""
        with self._changed:
            if not self._queue:
                return None
            batch = self._queue.popleft()
            self._changed.notify_all()
            return batch

    def take_resumed(self) -> Offsets:
        """Committed offsets of partitions that were assigned since the last call."""
        with self._changed:
            resumed, self._resumed = self._resumed, {}
            return resumed

    def unrecorded(self) -> Offsets:
        """Starting offsets of partitions without a commit: to be committed too, or `latest` would skip what arrives
        before the first batch is done."""
        with self._changed:
            return dict(self._unrecorded)

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

    def rewind(self) -> None:
        """Go back to what is committed; what was read beyond it is thrown away."""
        with self._changed:
            self._queue.clear()
            self._rewinding = True
            self._doomed = False

    def group_metadata(self) -> Any:
        """Member and generation, for the transaction's fence: as of the latest poll, so never newer than the batch."""
        if threading.current_thread() is self._thread:
            return self._consumer.consumer_group_metadata()
        return self._metadata

    def commit(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Commit through the consumer (`at_least_once`)."""

        def commit() -> None:
            self._consumer.commit(offsets=_partitions(offsets), asynchronous=False)

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
            raise TransactionAbortedError(f"commit of offsets: {_text(error)}") from error

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
            self._metadata = self._consumer.consumer_group_metadata()
            self._serve()
            if self._rewinding:
                self._seek_back()
            with self._changed:
                room = len(self._queue) < QUEUED_BATCHES
            if room:
                if full_since is not None and now - full_since > STALL_S:
                    self._consumer.resume(_partitions(self._owned))
                full_since = None
                self._gather(self._settings.linger_ms / 1000)
            elif now - (full_since := full_since or now) > STALL_S:
                # Again each time: a rebalance may have brought partitions that are not paused yet.
                self._consumer.pause(_partitions(self._owned))
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
        raw: list[Any] = []
        size = 0
        deadline = time.monotonic() + seconds
        while len(raw) < self._settings.batch_size and size < BATCH_BYTES and not self._closing.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for message in self._consumer.consume(min(CHUNK, self._settings.batch_size - len(raw)), left):
                error = message.error()
                if error is not None:
                    self._on_error(error, message)
                    continue
                raw.append(message)
                size += len(message)
        if raw:
            self._enqueue(Batch(raw, [_message(m) for m in raw]))

    def _enqueue(self, batch: Batch) -> None:
        with self._changed:
            if self._rewinding:
                return
            # A rebalance inside consume() may have taken partitions that were read just before it.
            batch = batch.without({p for p in batch.offsets if p not in self._owned})
            self._positions.update(batch.offsets)
            if batch.messages:
                self._queue.append(batch)
                self._changed.notify_all()

    def _seek_back(self) -> None:
        """To what is committed. By assigning anew: seek() does nothing for a partition that is not being fetched."""
        with self._changed:
            owned = dict(self._owned)
        if owned:
            self._consumer.incremental_unassign(_partitions(owned))
            self._consumer.incremental_assign(_partitions(owned))
        with self._changed:
            self._positions.update(owned)
            self._rewinding = False

    def _assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        committed = _committed(consumer, partitions)
        starts: Offsets = {}
        for key in [(p.topic, p.partition) for p in partitions]:
            if key not in committed:
                low, high = consumer.get_watermark_offsets(TopicPartition(*key), timeout=10)
                starts[key] = low if self._settings.start == "earliest" else high
                _log.info("first start", topic=key[0], partition=key[1], start=self._settings.start, offset=starts[key])
        consumer.incremental_assign(_partitions(committed | starts))
        # The client remembers a pause beyond the loss of a partition.
        consumer.resume(_partitions(committed | starts))
        with self._changed:
            self._owned |= committed | starts
            self._positions |= committed | starts
            self._unrecorded |= starts
            self._resumed |= committed
        self.assigned.set()
        _log.info("partitions assigned", partitions=_label(committed | starts), owned=len(self._owned))

    def _revoke(self, _: Any, partitions: list[TopicPartition]) -> None:
        self._give_up({(p.topic, p.partition) for p in partitions}, lost=False)

    def _lose(self, _: Any, partitions: list[TopicPartition]) -> None:
        self._give_up({(p.topic, p.partition) for p in partitions}, lost=True)

    def _give_up(self, gone: set[SourcePartition], *, lost: bool) -> None:
        if not gone:
            return
        # Without the guard the batch in hand is doomed, even if its partitions come back before it is done.
        deadline = time.monotonic() + (0.0 if lost else REVOKE_S)
        while not (held := self.guard.acquire(timeout=0.05)) and time.monotonic() < deadline:
            self._serve()  # Whoever holds the guard may be waiting for the consumer.
        try:
            if held:
                self._release(gone, lost)
            with self._changed:
                self._doomed = self._doomed or not held
                for partition in gone:
                    for offsets in (self._owned, self._unrecorded, self._resumed, self._positions, self.lag):
                        offsets.pop(partition, None)
                kept = [batch.without(gone) for batch in self._queue]
                self._queue = deque(batch for batch in kept if batch.messages)
        finally:
            if held:
                self.guard.release()
        _log.info("partitions lost" if lost else "partitions revoked", partitions=_label(gone), owned=len(self._owned))

    def _on_error(self, error: Any, message: Any) -> None:
        code = error.code()
        if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            self._missing(message.topic(), message.partition())
        elif error.fatal():
            raise StreamError(f"the consumer cannot go on: {error.str()}")
        elif code in _HOPELESS:
            raise StreamError(f"reading {message.topic() or ', '.join(self._settings.events)}: {error.str()}")
        else:
            _log.warning("consumer", reason=error.str(), retriable=error.retriable() or code in _TRANSIENT)

    def _missing(self, topic: str, partition: int) -> None:
        wanted = self._positions.get((topic, partition), -1)
        low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
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

    def _measure_lag(self) -> None:
        lag = {}
        for key, position in list(self._positions.items()):
            with contextlib.suppress(KafkaException):
                _, high = self._consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
                if high >= 0:
                    lag[key] = max(high - position, 0)
        self.lag = lag


class Publisher(Protocol):
    """What writes outputs and commits offsets."""

    refused: set[str]
    """Origins of outputs that were too large for their topic: what is written in their place must be small."""

    def open(self) -> None:
        """Be ready to write; raises ConfigurationError."""
        ...

    def hurry(self) -> None:
        """The process is asked to end: wait for Kafka no longer than DRAIN_S."""
        ...

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        """Write and commit. Raises TransactionAbortedError (read again) or StreamError (a person must act)."""
        ...


class _Writer:
    """What both publishers share: one producer, and what became of the messages given to it."""

    def __init__(self, settings: Settings, source: Source, properties: dict[str, Any]) -> None:
        self.refused: set[str] = set()
        self._settings = settings
        self._source = source
        self._failed: Any = None
        self._patience_s = TRANSACTION_S
        self._properties = _producer_properties(settings) | properties
        self._producer = _build(Producer, self._properties)

    def hurry(self) -> None:
        self._patience_s = DRAIN_S

    def _out_of_patience(self, began: float) -> bool:
        return time.monotonic() - began > self._patience_s

    def _write(self, outputs: Sequence[Output]) -> None:
        """Write and wait until each message is acknowledged or refused."""
        began = time.monotonic()
        self._failed = None
        for output in outputs:
            while True:
                try:
                    self._producer.produce(
                        output.topic,
                        output.value,
                        output.key,
                        headers=output.headers,
                        timestamp=output.timestamp,
                        on_delivery=lambda error, _, origin=output.origin: self._delivered(error, origin),
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                        raise
                    self._delivered(error.args[0], output.origin)
                    break
        # After a refusal the rest of a transaction is held back until it is aborted.
        while self._flush() and self._failed is None:
            if self._out_of_patience(began):
                raise StreamError(f"Kafka took no output for {self._patience_s:.0f} s; nothing is lost, start again")

    def _flush(self) -> int:
        try:
            return int(self._producer.flush(0.5))
        except SystemError:  # The client's way of saying that the producer is fenced: the next call says it properly.
            return 0

    def _delivered(self, error: Any, origin: str) -> None:
        if error is not None:
            self._failed = self._failed or error
            if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                self.refused.add(origin)

    def _check_delivery(self) -> None:
        error = self._failed
        if error is None:
            return
        if error.code() in _HOPELESS:
            raise StreamError(f"writing to Kafka: {error.str()}")
        raise TransactionAbortedError(f"delivery: {error.str()}")


class TransactionalPublisher(_Writer):
    """Exactly once: outputs and offsets in one short transaction.

    1. Take fresh group metadata, then check that the partitions are ours: a rebalance after the check makes the
       metadata stale, and the coordinator refuses it. 2. Begin. 3. Write and flush. 4. Send the offsets. 5. Commit.
    """

    def __init__(self, settings: Settings, source: Source, instance: str) -> None:
        self.transactional_id = f"{settings.kafka.group_id}-{instance}"
        super().__init__(settings, source, {"transactional.id": self.transactional_id})

    def open(self) -> None:
        self._call("init_transactions", self._producer.init_transactions, 10.0)

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        metadata = self._source.group_metadata()
        if not self._source.owns(offsets):
            raise TransactionAbortedError("partitions were given up while their batch was scored")
        try:
            self._call("begin_transaction", self._producer.begin_transaction)
            self._write(outputs)
            self._check_delivery()
            self._call("send_offsets_to_transaction", self._send_offsets, offsets, metadata)
            self._call("commit_transaction", self._producer.commit_transaction, 10.0)
        except (TransactionAbortedError, KafkaException) as error:
            self._abort()
            if isinstance(error, KafkaException):
                raise TransactionAbortedError(_text(error)) from error
            raise

    def _send_offsets(self, offsets: Offsets, metadata: Any) -> None:
        producer, done = self._producer, Future[None]()

        def send() -> None:
            try:
                producer.send_offsets_to_transaction(_partitions(offsets), metadata, 10.0)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=send, name="send-offsets", daemon=True).start()
        try:
            done.result(SEND_OFFSETS_S)
        except TimeoutError:
            self._recreate("offsets were not taken in time")
            raise TransactionAbortedError("send_offsets_to_transaction: no answer, with a new producer") from None

    def _recreate(self, reason: str) -> None:
        """A new producer with the same id aborts what the old one could not, and fences it."""
        _log.warning("producer recreated", reason=reason)
        self._producer = _build(Producer, self._properties)
        self.open()

    def _abort(self) -> None:
        try:
            self._call("abort_transaction", self._producer.abort_transaction, 10.0)
            self._flush()  # Reports of purged messages must not be taken for the next transaction's.
        except KafkaException as error:
            if error.args[0].code() == KafkaError._STATE:  # It had not begun, or is aborted already.
                return
            self._recreate(_text(error))

    def _call(self, doing: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Call, with errors told apart: retriable (again), abortable (TransactionAbortedError), fatal (StreamError)."""
        began = time.monotonic()
        while True:
            try:
                function(*arguments)
                return
            except KafkaException as failure:
                error = failure.args[0]
                if error.code() in _FENCED:
                    raise StreamError(
                        f"{doing}: fenced. Another process uses the transactional id {self.transactional_id!r}, or "
                        "took over while this one stood still; give each process its own kafka.instance_id"
                    ) from failure
                if error.code() in _HOPELESS or (error.fatal() and doing != "abort_transaction"):
                    raise StreamError(f"{doing}: {error.str()}") from failure
                if error.txn_requires_abort():
                    raise TransactionAbortedError(f"{doing}: {error.str()}") from failure
                if not (error.retriable() or error.code() in _TRANSIENT):
                    raise
                if self._out_of_patience(began):
                    raise StreamError(
                        f"{doing}: Kafka did not answer for {self._patience_s:.0f} s ({error.str()}); nothing is lost, "
                        "start again when it does"
                    ) from failure
                _log.warning("retrying", doing=doing, reason=error.str())
                time.sleep(0.2)


class PlainPublisher(_Writer):
    """At least once: write, wait for acknowledgement, then commit. A crash between the two doubles alerts."""

    def __init__(self, settings: Settings, source: Source) -> None:
        super().__init__(settings, source, {"enable.idempotence": True})

    def open(self) -> None:
        """Nothing to prepare."""

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        if not self._source.owns(offsets):
            raise TransactionAbortedError("partitions were given up while their batch was scored")
        self._write(outputs)
        self._check_delivery()
        self._source.commit(offsets)


def check_topics(settings: Settings) -> None:
    """Refuse to start where a broker does not answer or a topic does not exist.

    Raises:
        ConfigurationError: with the address, or the topics and how to make them.
    """
    where = settings.kafka.bootstrap_servers
    try:
        topics = _build(AdminClient, _client(settings)).list_topics(timeout=START_S).topics
    except KafkaException as error:
        raise ConfigurationError(
            f"no Kafka answers at {where} within {START_S:.0f} s ({_text(error)}); kafka.bootstrap_servers names it"
        ) from None
    written = [settings.alerts, settings.dead_letters] + ([settings.scores] if settings.scores else [])
    both = set(settings.events) & set(written)
    if both:
        raise ConfigurationError(f"topic {both.pop()!r} is both read and written")
    missing = [topic for topic in (*settings.events, *written) if topic not in topics or topics[topic].error]
    if missing:
        raise ConfigurationError(
            f"no such topic at {where}: {', '.join(missing)}; create with kafka-topics.sh --create --topic {missing[0]}"
        )


def claim_instance(settings: Settings) -> str:
    """A name for this process that is the same after a restart and no other's: the setting, or host name and the first
    slot on this host that no living process has locked."""
    if settings.kafka.instance_id:
        return settings.kafka.instance_id
    group = blake2b(settings.kafka.group_id.encode(), digest_size=6).hexdigest()
    for slot in range(1024):
        path = os.path.join(tempfile.gettempdir(), f"ripcurrent-{os.getuid()}-{group}-{slot}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            continue
        return f"{socket.gethostname()}-{slot}"  # The lock is held until the process ends, however it ends.
    raise ConfigurationError("1024 processes of this group run on this host; set kafka.instance_id")


def _message(raw: Any) -> Message:
    kind, timestamp = raw.timestamp()
    return Message(
        raw.topic(), raw.partition(), raw.offset(), -1 if kind == TIMESTAMP_NOT_AVAILABLE else timestamp, raw.value()
    )


def _partitions(offsets: Mapping[SourcePartition, int]) -> list[TopicPartition]:
    return [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]


def _label(partitions: Iterable[SourcePartition]) -> str:
    return ", ".join(f"{topic}:{partition}" for topic, partition in sorted(partitions))


def _text(error: KafkaException) -> str:
    return str(error.args[0].str())


def _committed(consumer: Any, partitions: list[TopicPartition]) -> Offsets:
    """Committed offsets of those that have one. A transaction of a killed process may still be open on them: wait."""
    deadline = time.monotonic() + 75
    while True:
        try:
            found = consumer.committed(partitions, timeout=10)
            failed = next((p.error for p in found if p.error is not None), None)
            if failed is None:
                return {(p.topic, p.partition): p.offset for p in found if p.offset >= 0}
            reason = failed.str()
        except KafkaException as error:
            reason = _text(error)
        if time.monotonic() > deadline:
            raise StreamError(f"committed offsets cannot be read: {reason}")
        time.sleep(0.2)


def _client(settings: Settings) -> dict[str, Any]:
    def report(error: Any) -> None:
        _log.warning("client", reason=error.str())

    return {"client.id": "ripcurrent", "error_cb": report, "log_level": 2} | settings.kafka.connection()


def _build(kind: Any, properties: dict[str, Any]) -> Any:
    try:
        return kind(properties)
    except KafkaException as error:
        raise ConfigurationError(f"kafka settings: {_text(error).strip()}") from None


def _consumer_properties(settings: Settings) -> dict[str, Any]:
    classic = {"partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 10_000}
    classic |= {"heartbeat.interval.ms": 2_000}
    own: dict[str, Any] = {
        "group.id": settings.kafka.group_id,
        "group.protocol": settings.kafka.group_protocol,
        "enable.auto.commit": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "queued.max.messages.kbytes": 65_536,
        "fetch.error.backoff.ms": 100,
    } | (classic if settings.kafka.group_protocol == "classic" else {})
    return own | _client(settings)


def _producer_properties(settings: Settings) -> dict[str, Any]:
    own = {"linger.ms": 5, "compression.type": "lz4", "message.max.bytes": 1_000_000_000}
    own |= {"batch.size": _batch_bytes(settings), "transaction.timeout.ms": 60_000}
    return own | _client(settings)


def _batch_bytes(settings: Settings) -> int:
    """What the strictest of the topics written to takes at once: librdkafka does not split a batch that is refused."""
    topics = [topic for topic in (settings.alerts, settings.dead_letters, settings.scores) if topic]
    limits = [1_000_000]
    with contextlib.suppress(KafkaException):  # Not everybody may describe topics.
        wanted = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
        for found in _build(AdminClient, _client(settings)).describe_configs(wanted, request_timeout=5).values():
            with contextlib.suppress(KafkaException, KeyError, TimeoutError):
                limits.append(int(found.result(6)["max.message.bytes"].value) - 1024)
    return max(min(limits), 1024)
