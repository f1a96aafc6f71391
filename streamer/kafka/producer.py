"""The edge to Kafka where outputs go: a `Publisher` writes what came of a batch together with its input offsets.

Promises: with `exactly_once`, outputs and offsets are one transaction; what Kafka refuses is told apart (try again,
read again, a person must act); nothing is waited for without bound. Does not know what an alert is.
"""

from __future__ import annotations

import threading
import time
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
WRITE_ONE_S = 15.0
"""How long a single message of a command may take to be written."""
SEND_OFFSETS_S = 10.0
"""How long offsets may take to be sent. The client ignores its own timeout there and can hang for ever once the group's
coordinator has gone away (librdkafka issues 5456 and 5511), so the call is left behind with its producer."""

_FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}
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
    """One message to write. origin names what it came from, so that one that is too large can be told; timestamp in
    epoch ms, 0: now."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int
    origin: str


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

    refused: set[str]
    """Origins of outputs that were too large for their topic: what is written in their place must be small."""
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

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        """Write and commit. Raises TransactionAbortedError (read again) or StreamError (a person must act)."""
        ...


class _Writer:
    """What both publishers share: one producer, and what became of the messages given to it."""

    def __init__(self, settings: Settings, source: Inputs, properties: dict[str, Any]) -> None:
        self.refused: set[str] = set()
        self.connections = Connections()
        self._settings = settings
        self._source = source
        self._failed: Any = None
        self._patience_s = TRANSACTION_S
        self._properties = self.connections.properties() | _producer_properties(settings) | properties
        self._producer = build(Producer, self._properties)

    def hurry(self) -> None:
        self._patience_s = DRAIN_S

    def serve(self) -> None:
        self._producer.poll(0)

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
        if error.code() in HOPELESS:
            raise StreamError(f"writing to Kafka: {error.str()}")
        if error.code() in _WRONG_TIME:
            raise StreamError(f"writing to Kafka: {error.str()}; is the clock of this host ahead of the broker's?")
        raise TransactionAbortedError(f"delivery: {error.str()}")


class TransactionalPublisher(_Writer):
    """Exactly once: outputs and offsets in one short transaction.

    1. Take fresh group metadata, then check that the partitions are ours: a rebalance after the check makes the
       metadata stale, and the coordinator refuses it. 2. Begin. 3. Write and flush. 4. Send the offsets. 5. Commit.
    """

    def __init__(self, settings: Settings, source: Inputs, instance: str) -> None:
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

    def _recreate(self, reason: str) -> None:
        """A new producer with the same id aborts what the old one could not, and fences it."""
        _log.warning("producer recreated", reason=reason)
        self._producer = build(Producer, self._properties)
        self.open()

    def _abort(self) -> None:
        try:
            self._call("abort_transaction", self._producer.abort_transaction, 10.0)
            self._flush()  # Reports of purged messages must not be taken for the next transaction's.
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

    def __init__(self, settings: Settings, source: Inputs) -> None:
        super().__init__(settings, source, {"enable.idempotence": True})

    def open(self) -> None:
        """Nothing to prepare."""

    def publish(self, outputs: Sequence[Output], offsets: Offsets) -> None:
        if not self._source.owns(offsets):
            raise TransactionAbortedError("partitions were given up while their batch was scored")
        self._write(outputs)
        self._check_delivery()
        self._source.commit(offsets)


def _producer_properties(settings: Settings) -> dict[str, Any]:
    own = {"linger.ms": 5, "compression.type": "lz4", "message.max.bytes": 1_000_000_000}
    own |= {"batch.size": _batch_bytes(settings), "transaction.timeout.ms": 60_000}
    return own | client_properties(settings)


def _batch_bytes(settings: Settings) -> int:
    """What the strictest of the topics written to takes at once: librdkafka does not split a batch that is refused."""
    written = (
        settings.alerts,
        settings.dead_letters,
        settings.scores,
        settings.ledger if settings.threshold is None else "",
    )
    topics = [topic for topic in written if topic]
    limits = topic_settings(settings, topics, "max.message.bytes").values()
    return max(min([1_000_000, *(int(limit) - 1024 for limit in limits)]), 1024)


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
