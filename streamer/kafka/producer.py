"""The edge to Kafka where outputs go: a `Publisher` writes what came of a batch together with its input offsets.

Promises: with `exactly_once`, outputs and offsets are one transaction; what Kafka refuses is told apart (try again,
read again, a person must act); nothing is waited for without bound. Does not know what an alert is.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import structlog
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from state.errors import SourcePartition
from streamer.errors import StreamError
from streamer.kafka.client import (
    DRAIN_S,
    HOPELESS,
    TRANSIENT,
    Connections,
    Offsets,
    TransactionAbortedError,
    build,
    client_properties,
    reason_of,
    topic_settings,
)
from streamer.settings import Settings

TRANSACTION_S = 120.0
"""How long a broker that is down is waited for in mid-transaction."""
FLUSH_S = 0.05
"""How long what is written is waited for at once: after a refusal the rest does not come."""
REPORTS_S = 2.0
"""How long messages that are under way are waited for before a transaction is aborted."""
LIMITS_S = 10.0
"""How long what a topic takes at once is taken for known when something is larger."""
WRITE_ONE_S = 15.0
"""How long a single message of a command may take to be written."""
SEND_OFFSETS_S = 10.0
"""How long offsets may take to be sent. The client ignores its own timeout there and can hang for ever once the group's
coordinator has gone away (librdkafka issues 5456 and 5511), so the call is left behind with its producer."""

_FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}
_PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
"""What the rest of a transaction ends with once one of it was refused."""
_WRONG_TIME = {KafkaError.INVALID_TIMESTAMP, KafkaError.INVALID_RECORD}
"""Kafka refuses a record of more than an hour ahead (message.timestamp.after.max.ms), by either name."""

_log = structlog.get_logger("ripcurrent.kafka")


class Written(Protocol):
    """A message of an output topic that has an id: an `Alert`, as far as writing it goes."""

    @property
    def uid(self) -> str: ...
    @property
    def key(self) -> bytes: ...
    @property
    def value(self) -> bytes: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


class Output(NamedTuple):
    """One message to write.

    timestamp: epoch ms, 0: now; origin: what it came from; instead: makes what is written in its place (None: nothing)
    if its topic refuses it for its size; None where it must not be too large.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int
    origin: str
    instead: Callable[[], Output | None] | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes at most in a batch of its own."""
        headers = sum(len(name) + len(value or b"") + 10 for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + headers + 100


class Inputs(Protocol):
    """What a publisher needs of where the events come from: `EventConsumer`, or a replay's own group."""

    def group_metadata(self) -> Any:
        """Member and generation, for the transaction's fence."""
        ...

    def owns(self, partitions: Iterable[SourcePartition]) -> bool:
        """Whether these may still be committed."""
        ...

    def commits(self, offsets: Mapping[SourcePartition, int]) -> list[TopicPartition]:
        """Offsets as the client commits them, with what is noted beside them."""
        ...

    def commit(self, offsets: Mapping[SourcePartition, int]) -> None:
        """Commit without a transaction."""
        ...


class Publisher(Protocol):
    """What writes outputs and commits offsets."""

    connections: Connections

    def open(self) -> None:
        """Be ready to write; raises ConfigurationError."""
        ...

    def hurry(self) -> None:
        """The process is asked to end: wait for Kafka no longer than DRAIN_S."""
        ...

    def serve(self) -> None:
        """Let the client say what it has to say; called now and then, or errors and statistics would pile up in it."""
        ...

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> list[Output]:
        """Write and commit. Returns the outputs that were too large for their topic: what is `instead` of each is
        written. Raises TransactionAbortedError (read again) or StreamError (a person must act)."""
        ...


class _TooLargeError(Exception):
    """Kafka refused these rows of the outputs for their size."""

    def __init__(self, rows: set[int]) -> None:
        super().__init__(rows)
        self.rows = rows


class _Delivery:
    """What became of the messages of one attempt."""

    def __init__(self) -> None:
        self.failed: Any = None
        self.too_large: set[int] = set()
        self._purged: Any = None
        self._purged_at = math.inf

    @property
    def is_over(self) -> bool:
        """Whether something failed: what was purged may have been told of before the refusal that it follows from."""
        return self.failed is not None or time.monotonic() - self._purged_at > REPORTS_S

    def take(self, error: Any, row: int) -> None:
        """Take note of a report."""
        if error is None:
            return
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self.too_large.add(row)
        elif error.code() in _PURGED:
            self._purged, self._purged_at = error, min(self._purged_at, time.monotonic())
        else:
            self.failed = self.failed or error

    def check(self) -> None:
        """Raise what the reports come to: _TooLargeError, TransactionAbortedError (read again) or StreamError."""
        if self.too_large and self.failed is None:
            raise _TooLargeError(self.too_large)
        error = self.failed or self._purged
        if error is None:
            return
        if error.code() in HOPELESS:
            raise StreamError(f"writing to Kafka: {error.str()}")
        if error.code() in _WRONG_TIME:
            raise StreamError(f"writing to Kafka: {error.str()}; is the clock of this host ahead of the broker's?")
        raise TransactionAbortedError(f"delivery: {error.str()}")


class _Writer(ABC):
    """What both publishers share: one producer, and what became of the messages given to it."""

    atomic: bool
    """Whether nothing is written where one output is refused; else all others are."""

    def __init__(self, settings: Settings, source: Inputs, properties: dict[str, Any]) -> None:
        self.connections = Connections()
        self._settings = settings
        self._source = source
        self._patience_s = TRANSACTION_S
        self._limits: dict[str, int] = {}
        self._ask_limits()
        own = _producer_properties(settings) | {"batch.size": self._batch_bytes()}
        self._properties = self.connections.properties() | own | properties
        self._producer = build(Producer, self._properties)

    def hurry(self) -> None:
        self._patience_s = DRAIN_S

    def serve(self) -> None:
        self._producer.poll(0)

    def _out_of_patience(self, began: float) -> bool:
        return time.monotonic() - began > self._patience_s

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> list[Output]:
        """As `Publisher` says. What is known to be too large is replaced before it is sent; what only Kafka knows to be
        is replaced once it is refused, and the rest is sent again at once: nothing is worth waiting for."""
        refused: list[Output] = []
        too_large = {id(output) for output in outputs if self._is_too_large(output)}
        left = self._replaced(outputs, too_large, refused)
        while True:
            try:
                self._attempt(left, offsets)
                return refused
            except _TooLargeError as error:
                too_large = {id(left[row]) for row in error.rows}
            if not self.atomic:
                left = [output for output in left if id(output) in too_large]
            smaller = self._smaller_batches({output.topic for output in left if id(output) in too_large})
            if smaller:
                too_large = {id(output) for output in left if self._is_too_large(output)}
            if smaller or self.atomic:
                # The client may purge what follows an abort for a refusal; a new producer aborts it cleanly.
                self._recreate("a topic refused an output for its size")
            left = self._replaced(left, too_large, refused)

    @abstractmethod
    def _attempt(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        """Write and commit. Raises _TooLargeError, and what `publish` raises."""

    def _replaced(self, outputs: Sequence[Output], too_large: set[int], refused: list[Output]) -> list[Output]:
        """With what is written in place of those with these ids, which are added to `refused`."""
        written: list[Output] = []
        largest: dict[str, Output] = {}
        before = len(refused)
        for output in outputs:
            wanted: Output | None = output
            if id(output) in too_large:
                refused.append(output)
                largest[output.topic] = max(output, largest.get(output.topic, output), key=lambda found: found.size)
                wanted = _instead(output)
                while wanted is not None and self._is_too_large(wanted):
                    wanted = _instead(wanted)
            if wanted is not None:
                written.append(wanted)
        for topic, output in largest.items():
            number = sum(found.topic == topic for found in refused[before:])
            limit = self._limits.get(topic, "unknown")
            about = {"topic": topic, "outputs": number, "largest": output.size, "max_message_bytes": limit}
            _log.warning("too large for the topic, something small is written instead", **about)
        return written

    def _is_too_large(self, output: Output) -> bool:
        """Whether its topic is known to refuse it, compressed as it is sent."""
        if output.size <= self._limits.get(output.topic, output.size):
            return False
        if time.monotonic() - self._asked_at > LIMITS_S:
            self._ask_limits()
        import pyarrow  # Only what is large needs it.

        content = [output.key or b"", output.value or b"", *(value or b"" for _, value in output.headers)]
        compressed = len(pyarrow.compress(b"".join(content), codec="lz4", asbytes=True))
        return compressed > self._limits.get(output.topic, compressed)

    def _ask_limits(self) -> None:
        """What each topic takes at once, of those that this client may describe."""
        settings = self._settings
        written = [settings.alerts, settings.dead_letters, settings.scores]
        written += [settings.ledger] if settings.threshold is None else []
        found = topic_settings(settings, filter(None, written), "max.message.bytes")
        self._limits |= {topic: int(limit) for topic, limit in found.items()}
        self._asked_at = time.monotonic()

    def _batch_bytes(self) -> int:
        """What the strictest topic takes at once: librdkafka does not split a batch that is refused."""
        return max(min([1_000_000, *(limit - 1024 for limit in self._limits.values())]), 1024)

    def _smaller_batches(self, topics: set[str]) -> bool:
        """After a refusal: whether a topic takes less than it did, so that maybe the batch was too large and not its
        messages. The next producer makes smaller ones: of one message each where nobody says what a topic takes."""
        self._ask_limits()
        size = self._batch_bytes() if topics <= self._limits.keys() else 1
        if size >= self._properties["batch.size"]:
            return False
        self._properties["batch.size"] = size
        return True

    def _recreate(self, reason: str) -> None:
        """A new producer with the same id aborts what the old one could not, and fences it."""
        _log.warning("producer recreated", reason=reason)
        self._producer = build(Producer, self._properties)
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Be ready to write; raises ConfigurationError."""

    def _write(self, outputs: Sequence[Output]) -> None:
        """Write and wait until each message is acknowledged or refused. Raises _TooLargeError."""
        began = time.monotonic()
        delivery = _Delivery()  # Reports of an attempt before go to its own, also those of a producer that is gone.
        for row, output in enumerate(outputs):
            while True:
                try:
                    self._producer.produce(
                        output.topic,
                        output.value,
                        output.key,
                        headers=output.headers,
                        timestamp=output.timestamp,
                        on_delivery=lambda error, _, row=row: delivery.take(error, row),
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
                except KafkaException as error:
                    if error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE:
                        delivery.take(error.args[0], row)
                        break
                    self._producer.poll(0)  # A refusal that has not been told yet explains it.
                    if delivery.too_large:
                        raise _TooLargeError(delivery.too_large) from error
                    raise
        # After a refusal the rest of a transaction is held back until it is aborted.
        while self._flush() and not delivery.is_over and not (self.atomic and delivery.too_large):
            if self._out_of_patience(began):
                raise StreamError(f"Kafka took no output for {self._patience_s:.0f} s; nothing is lost, start again")
        delivery.check()

    def _flush(self) -> int:
        try:
            return int(self._producer.flush(FLUSH_S))
        except SystemError:  # The client's way of saying that the producer is fenced: the next call says it properly.
            return 0


class TransactionalPublisher(_Writer):
    """Exactly once: outputs and offsets in one short transaction.

    1. Take fresh group metadata, then check that the partitions are ours: a rebalance after the check makes the
       metadata stale, and the coordinator refuses it. 2. Begin. 3. Write and flush. 4. Send the offsets. 5. Commit.
    """

    atomic = True

    def __init__(self, settings: Settings, source: Inputs, instance: str) -> None:
        self.transactional_id = f"{settings.kafka.group_id}-{instance}"
        super().__init__(settings, source, {"transactional.id": self.transactional_id})

    def open(self) -> None:
        self._call("init_transactions", self._producer.init_transactions, 10.0)

    def _attempt(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        metadata = self._source.group_metadata()
        if not self._source.owns(offsets):
            raise TransactionAbortedError("partitions were given up while their batch was scored")
        try:
            self._call("begin_transaction", self._producer.begin_transaction)
            self._write(outputs)
            self._call("send_offsets_to_transaction", self._send_offsets, offsets, metadata)
            self._call("commit_transaction", self._producer.commit_transaction, 10.0)
        except (TransactionAbortedError, KafkaException) as error:
            self._abort()
            if isinstance(error, KafkaException):
                raise TransactionAbortedError(reason_of(error)) from error
            raise

    def _send_offsets(self, offsets: Offsets, metadata: Any) -> None:
        producer, done = self._producer, Future[None]()

        def send() -> None:
            try:
                producer.send_offsets_to_transaction(self._source.commits(offsets), metadata, 10.0)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=send, name="send-offsets", daemon=True).start()
        try:
            done.result(SEND_OFFSETS_S)
        except TimeoutError:
            self._recreate("offsets were not taken in time")
            raise TransactionAbortedError("send_offsets_to_transaction: no answer, with a new producer") from None

    def _abort(self) -> None:
        try:
            self._call("abort_transaction", self._producer.abort_transaction, 10.0)
            self._flush()  # Reports of what was purged are waiting.
        except KafkaException as error:
            if error.args[0].code() == KafkaError._STATE:  # It had not begun, or is aborted already.
                return
            self._recreate(reason_of(error))

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
                if error.code() in HOPELESS or (error.fatal() and doing != "abort_transaction"):
                    raise StreamError(f"{doing}: {error.str()}") from failure
                if error.txn_requires_abort():
                    raise TransactionAbortedError(f"{doing}: {error.str()}") from failure
                if not (error.retriable() or error.code() in TRANSIENT):
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

    atomic = False

    def __init__(self, settings: Settings, source: Inputs) -> None:
        super().__init__(settings, source, {"enable.idempotence": True})

    def open(self) -> None:
        """Nothing to prepare."""

    def _attempt(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        if not self._source.owns(offsets):
            raise TransactionAbortedError("partitions were given up while their batch was scored")
        self._write(outputs)
        self._source.commit(offsets)


def _producer_properties(settings: Settings) -> dict[str, Any]:
    own = {"linger.ms": 5, "compression.type": "lz4", "message.max.bytes": 1_000_000_000}
    own |= {"transaction.timeout.ms": 60_000}
    return own | client_properties(settings)


def _instead(output: Output) -> Output | None:
    """What is written in place of one that is too large. Raises StreamError where nothing can be."""
    if output.instead is None:
        wanted = max(2 * output.size, 4096)
        raise StreamError(
            f"topic {output.topic} takes no message of {output.size} bytes, and {output.origin} needs it; "
            f"kafka-configs.sh --alter --topic {output.topic} --add-config max.message.bytes={wanted}"
        )
    return output.instead()


def write_one(
    settings: Settings, topic: str, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]], what: str
) -> None:
    """Write one message and wait until Kafka has it. what: what it is, for a person. Raises StreamError."""
    failed: list[Any] = []
    producer = build(Producer, {"enable.idempotence": True} | client_properties(settings))
    report = lambda error, _: failed.append(error) if error else None  # noqa: E731
    producer.produce(topic, value, key, headers=[*headers], on_delivery=report)
    if producer.flush(WRITE_ONE_S) or failed:
        raise StreamError(f"{what} was not written: {failed[0].str() if failed else 'Kafka does not answer'}")
