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


def origin(raw: Any, index: int) -> str:
    """What an output came from: the coordinates of the message and the index in it."""
    return f"{raw.topic()}:{raw.partition()}:{raw.offset()}:{index}"


def dead_letter(raw: Any, reject: Reject, topic: str, refused: set[str]) -> Output:
    """The dead letter of one reject.

    Args:
        raw: librdkafka's message that it was read from.
        topic: the dead-letter topic.
        refused: origins that this topic has refused for their size.
    """
    name = origin(raw, reject.index)
    kind, timestamp = raw.timestamp()
    reason = reject.reason if reject.index < 0 else f"member {reject.index}: {reject.reason}"
    errors = {
        "topic": raw.topic(),
        "partition": raw.partition(),
        "offset": raw.offset(),
        "stage": reject.stage,
        "exception.class.name": reject.exception,
        "exception.message": reason[:1000],
    }
    headers = [(f"{PREFIX}{key}", str(value).encode("utf-8", "replace")) for key, value in errors.items()]
    original = [(key, value) for key, value in raw.headers() or [] if not key.startswith(PREFIX)]
    time = 0 if kind == TIMESTAMP_NOT_AVAILABLE else timestamp
    if name not in refused:
        return Output(topic, raw.key(), reject.value, original + headers, time, name)
    whole = raw.value() or b""
    stub = {
        "topic": raw.topic(),
        "partition": raw.partition(),
        "offset": raw.offset(),
        "index": reject.index,
        "timestamp": timestamp,
        "size": len(whole),
        "sha256": hashlib.sha256(whole).hexdigest(),
        "reason": reason[:1000],
    }
    # Key and headers may be what was too large.
    return Output(topic, None, orjson.dumps(stub), [*headers, (STUB_HEADER, b"1")], time, name)
