"""Partitions that an open transaction holds back: a reader of committed messages gets nothing beyond its first message.

A transaction whose writer is gone stays open until Kafka aborts it, and one that Kafka lost track of stays for ever.
Neither is an error to any client. It shows as a last stable offset that stands still below the high watermark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from state.errors import SourcePartition
from streamer.errors import ConfigurationError
from streamer.kafka.client import build, client_properties, label, reason_of
from streamer.settings import Settings

HELD_BACK_S = 60.0
"""How long the last stable offset may stand still: as long as a transaction stays open unless its writer says more."""
LOOK_S = 3.0
"""The same where there is only one look at it."""
KAFKA_S = 10.0


@dataclass(frozen=True)
class _Standstill:
    stable: int
    end: int
    since: float


class StandstillWatch:
    """Looks at what a consumer says of its partitions every few seconds. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[SourcePartition, _Standstill] = {}

    def take(self, topics: Mapping[str, Any]) -> None:
        """`topics` of the client's statistics."""
        held: dict[SourcePartition, _Standstill] = {}
        for name, topic in topics.items():
            for number, partition in topic["partitions"].items():
                stable, end = partition["ls_offset"], partition["hi_offset"]
                # Below the stable offset there is something to read: then both may be old news.
                if 0 <= stable < end and partition["next_offset"] >= stable and partition["fetch_state"] == "active":
                    source = name, int(number)
                    before = self._held.get(source)
                    since = before.since if before is not None and before.stable == stable else self._clock()
                    held[source] = _Standstill(stable, end, since)
        self._held = held

    def reason(self, owned: Container[SourcePartition], bootstrap: str) -> str:
        """What is held back of these partitions, or an empty string."""
        for source, found in sorted(self._held.items()):
            held_s = self._clock() - found.since
            if source in owned and held_s > HELD_BACK_S:
                return _describe(source, found.stable, found.end, held_s, bootstrap)
        return ""


def held_back(settings: Settings) -> str:
    """What a transaction holds back in the topics of the settings, seen from outside; an empty string for nothing.

    Raises ConfigurationError: the offsets cannot be read.
    """
    admin = build(AdminClient, client_properties(settings))
    bootstrap = settings.kafka.bootstrap_servers
    try:
        topics = admin.list_topics(timeout=KAFKA_S).topics
        sources = [(name, p) for name in settings.events if name in topics for p in topics[name].partitions]
        first = _stable_below_end(admin, sources)
        if not first:
            return ""
        time.sleep(LOOK_S)
        again = _stable_below_end(admin, list(first))
    except (KafkaException, TimeoutError) as error:
        reason = reason_of(error) if isinstance(error, KafkaException) else "no answer"
        raise ConfigurationError(f"the ends of {', '.join(settings.events)} cannot be read: {reason}") from None
    still = [source for source, (stable, _) in sorted(again.items()) if first[source][0] == stable]
    return _describe(still[0], *again[still[0]], LOOK_S, bootstrap) if still else ""


def _stable_below_end(admin: Any, sources: list[SourcePartition]) -> dict[SourcePartition, tuple[int, int]]:
    """Last stable offset and high watermark of those where they differ."""
    latest: Any = OffsetSpec
    asked = {TopicPartition(*source): latest.latest() for source in sources}

    def read(level: IsolationLevel) -> dict[SourcePartition, int]:
        futures = admin.list_offsets(asked, isolation_level=level, request_timeout=KAFKA_S) if asked else {}
        return {(p.topic, p.partition): future.result(KAFKA_S + 1).offset for p, future in futures.items()}

    stable, end = read(IsolationLevel.READ_COMMITTED), read(IsolationLevel.READ_UNCOMMITTED)
    return {source: (stable[source], end[source]) for source in sources if stable[source] < end[source]}


def _describe(source: SourcePartition, stable: int, end: int, held_s: float, bootstrap: str) -> str:
    topic, partition = source
    where = f"kafka-transactions.sh --bootstrap-server {bootstrap} describe-producers --topic {topic}"
    return (
        f"{label([source])} stands at offset {stable} for {held_s:.0f} s or longer: another program's transaction is "
        f"open there, and {end - stable} messages wait behind it; {where} --partition {partition} names its producer"
    )
