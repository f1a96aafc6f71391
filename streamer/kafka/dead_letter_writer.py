"""Dead letters: what could not be read, as it came, with where it came from and why in Kafka Connect's headers.

Promises that key, value, headers and timestamp are those of the message; a member of a bundle keeps all but its value,
which is the member's own. What the dead-letter topic refuses for its size becomes a stub that says where to find it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

from encoder.ocsf.events import Reject
from streamer.kafka.producer import Output

PREFIX = "__connect.errors."
STUB_HEADER = "ripcurrent.stub"
ALERT_STAGE = "publish"
"""Stage of a letter that is an alert and no event."""


def origin(raw: Any, index: int) -> str:
    """What an output came from: the coordinates of the message and the index in it."""
    return f"{raw.topic()}:{raw.partition()}:{raw.offset()}:{index}"


def dead_letter(raw: Any, reject: Reject, topic: str) -> Output:
    """The dead letter of one reject, and a stub in place of one that is too large.

    Args:
        raw: librdkafka's message that it was read from.
        topic: the dead-letter topic.
    """
    kind, timestamp = raw.timestamp()
    reason = reject.reason if reject.index < 0 else f"member {reject.index}: {reject.reason}"
    errors = _errors((raw.topic(), raw.partition(), raw.offset()), reject.stage, reject.exception, reason)
    original = [(key, value) for key, value in raw.headers() or [] if not key.startswith(PREFIX)]
    time = 0 if kind == TIMESTAMP_NOT_AVAILABLE else timestamp
    name = origin(raw, reject.index)

    def stub() -> Output:
        place = {"topic": raw.topic(), "partition": raw.partition(), "offset": raw.offset(), "index": reject.index}
        # Key and headers may be what was too large.
        return _stub(topic, place | {"timestamp": timestamp}, raw.value() or b"", reason, errors, time, name)

    return Output(topic, raw.key(), reject.value, original + errors, time, name, stub)


def alert_letter(alert: Output, source: tuple[str, int, int, int], topic: str) -> Output:
    """The dead letter of an alert that the alert topic refuses for its size, and a stub in place of one that is too
    large here, too.

    Args:
        source: coordinates of the event that it is about: topic, partition, offset, index.
        topic: the dead-letter topic.
    """
    value = alert.value or b""
    reason = f"alert {alert.origin} of {len(value)} bytes is too large for topic {alert.topic}"
    errors = _errors(source[:3], ALERT_STAGE, "AlertTooLarge", reason)

    def stub() -> Output:
        place = dict(zip(("topic", "partition", "offset", "index"), source, strict=True)) | {"alert": alert.origin}
        return _stub(topic, place, value, reason, errors, alert.timestamp, alert.origin)

    return Output(topic, alert.key, value, alert.headers + errors, alert.timestamp, alert.origin, stub)


def _errors(source: tuple[str, int, int], stage: str, exception: str, reason: str) -> list[tuple[str, bytes | None]]:
    topic, partition, offset = source
    errors = {"topic": topic, "partition": partition, "offset": offset, "stage": stage}
    errors |= {"exception.class.name": exception, "exception.message": reason[:1000]}
    return [(f"{PREFIX}{key}", str(value).encode("utf-8", "replace")) for key, value in errors.items()]


def _stub(
    topic: str,
    place: dict[str, Any],
    whole: bytes,
    reason: str,
    errors: list[tuple[str, bytes | None]],
    time: int,
    name: str,
) -> Output:
    stub = place | {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest(), "reason": reason[:1000]}
    return Output(topic, None, orjson.dumps(stub), [*errors, (STUB_HEADER, b"1")], time, name)
