"""Ranges of topics: what a person writes (offsets, times, "6h") made into offsets that no longer move.

Promises: the end is fixed before the first message is read, so a range is the same however the topic grows; a time
beyond the last message is an empty range and never a live tail; offsets that do not exist are named, not guessed. Reads
no message but the first of a partition: `streamer.kafka.range_reader` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from confluent_kafka import Consumer, KafkaException, TopicPartition

from encoder.ocsf.event_time import YEAR_2000_MS
from state.errors import SourcePartition
from streamer.errors import ConfigurationError, StreamError
from streamer.kafka.client import KafkaUnavailableError, Offsets, build, client_properties, label, unavailable
from streamer.settings import Settings

Range = dict[SourcePartition, tuple[int, int]]
"""By (topic, partition): the first offset, and the one after the last."""

KAFKA_S = 15.0
FIRST_MS = 100_000_000_000
"""A number from here on is epoch ms (of 1973 and later), a smaller one an offset."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s|m|min|h|d|w)")
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_PARTITION = re.compile(r"(?:(?P<topic>[^=:\s]+):)?(?P<partition>\d+)=(?P<bound>.+)")


@dataclass(frozen=True)
class Bound:
    """One end of a range, as meant. value: an offset, or epoch ms."""

    kind: Literal["earliest", "latest", "offset", "time"]
    value: int = 0


@dataclass(frozen=True)
class Bounds:
    """One end for many partitions: `every` for those that `single` does not name (None: they are not read)."""

    every: Bound | None
    single: dict[SourcePartition, Bound]


def parse_duration(text: str) -> int:
    """Milliseconds of `90s`, `15m`, `6h`, `7d` or `2w`. Raises ConfigurationError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigurationError(f"{text!r} is no duration; write it like 90s, 15m, 6h, 7d or 2w")
    return round(float(found[1]) * _UNIT_MS[found[2]])


def parse_bound(text: str, now_ms: int) -> Bound:
    """earliest, latest, an offset, epoch ms, an ISO date or time (UTC unless it says), or a duration before now: `6h`,
    `6h ago`, `last 6h`. Raises ConfigurationError."""
    word = text.strip()
    if word == "earliest":
        return Bound("earliest")
    if word == "latest":
        return Bound("latest")
    if word.isdecimal():
        number = int(word)
        return Bound("time" if number >= FIRST_MS else "offset", number)
    ago = _DURATION.fullmatch(word.removeprefix("last ").removesuffix(" ago"))
    if ago is not None:
        return Bound("time", now_ms - parse_duration(ago[0]))
    try:
        moment = datetime.fromisoformat(word)
    except ValueError:
        raise ConfigurationError(
            f"{text!r} is no place in a topic; write earliest, latest, an offset (5000), epoch milliseconds, an ISO "
            "time (2026-11-23T10:00Z), a duration before now (6h), or one of these for one partition (2=5000)"
        ) from None
    return Bound("time", round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000))


def parse_bounds(texts: Sequence[str], topics: Sequence[str], now_ms: int) -> Bounds:
    """One end of a range: at most one bound for all partitions, and `PARTITION=BOUND` or `TOPIC:PARTITION=BOUND` for
    single ones. Raises ConfigurationError."""
    every: Bound | None = None
    single: dict[SourcePartition, Bound] = {}
    for text in texts:
        found = _PARTITION.fullmatch(text.strip())
        if found is None:
            if every is not None:
                raise ConfigurationError(f"two bounds for all partitions, the second is {text!r}; for one: 2={text}")
            every = parse_bound(text, now_ms)
            continue
        topic = found["topic"] or (topics[0] if len(topics) == 1 else "")
        if topic not in topics:
            raise ConfigurationError(f"{text!r}: which topic? write TOPIC:PARTITION=BOUND with {' or '.join(topics)}")
        single[topic, int(found["partition"])] = parse_bound(found["bound"], now_ms)
    return Bounds(every, single)


def freeze(settings: Settings, since: Sequence[str], until: Sequence[str], now_ms: int) -> Range:
    """The offsets that two ends come to now, of the topics `settings.events`.

    Where only single partitions are named, only those are read; nothing said means everything up to now. Raises
    ConfigurationError for what cannot be meant, StreamError where Kafka does not answer.
    """
    topics = settings.events
    starts, ends = parse_bounds(since, topics, now_ms), parse_bounds(until, topics, now_ms)
    only_single = (starts.single or ends.single) and starts.every is None and ends.every is None
    with _asking(settings, f"the ends of {', '.join(topics)}") as consumer:
        known = _partitions(consumer, topics)
        named = {*starts.single, *ends.single}
        if named - set(known):
            raise ConfigurationError(f"no such partition: {label(named - set(known))}")
        wanted = [source for source in known if not only_single or source in named]
        edges = bounds_of(consumer, wanted)
        first = _resolve(consumer, starts, edges, Bound("earliest"))
        last = _resolve(consumer, ends, edges, Bound("latest"))
    return {source: (first[source], max(first[source], last[source])) for source in wanted}


def first_offsets(settings: Settings, sources: Iterable[SourcePartition]) -> Offsets:
    """The first offset that each partition still has. Raises StreamError."""
    with _asking(settings, "first offsets") as consumer:
        return {source: low for source, (low, _) in bounds_of(consumer, sources).items()}


def offsets_since(settings: Settings, time_ms: int, ends: Offsets) -> Offsets:
    """The first offset of each partition with a timestamp of at least `time_ms` (epoch ms), or its end where no message
    before the end has one. Raises StreamError."""
    with _asking(settings, "offsets of times") as consumer:
        return _offsets_at(consumer, dict.fromkeys(ends, time_ms), ends)


def offsets_for_times(consumer: Any, times: dict[SourcePartition, int]) -> Offsets:
    """The first offset with a timestamp of at least this (epoch ms); -1 where there is none. Raises KafkaException."""
    asked = [TopicPartition(*source, time) for source, time in times.items()]
    found = consumer.offsets_for_times(asked, timeout=KAFKA_S) if asked else []
    for one in found:
        if one.error is not None:
            raise KafkaException(one.error)
    return {(p.topic, p.partition): p.offset for p in found}


def bounds_of(consumer: Any, sources: Iterable[SourcePartition]) -> Range:
    """The first offset that each partition still has, and the one after its last. Raises KafkaException."""
    return {source: consumer.get_watermark_offsets(TopicPartition(*source), timeout=KAFKA_S) for source in sources}


def _offsets_at(consumer: Any, times: dict[SourcePartition, int], ends: Offsets) -> Offsets:
    """With the end in place of -1, which as an offset would mean to wait for what is yet to come."""
    at = offsets_for_times(consumer, times)
    return {source: ends[source] if at[source] < 0 else min(at[source], ends[source]) for source in times}


def _check_dated(consumer: Any, sources: set[SourcePartition], edges: dict[SourcePartition, tuple[int, int]]) -> None:
    """Of partitions that have nothing since a time: refuse those in which no timestamp is a date in milliseconds."""
    found = _offsets_at(consumer, dict.fromkeys(sources, YEAR_2000_MS), {s: edges[s][1] for s in sources})
    undated = {source for source in sources if found[source] == edges[source][1]}
    if undated:
        raise ConfigurationError(
            f"{label(undated)}: no record has a timestamp that is a date in milliseconds, so no time can be found; "
            "name offsets, and correct the producer"
        )


@contextmanager
def _asking(settings: Settings, reading: str) -> Iterator[Any]:
    """A consumer that asks and never joins a group nor commits. Raises StreamError where Kafka does not answer."""
    own = {"group.id": f"{settings.kafka.group_id}-range", "enable.auto.commit": False}
    consumer = build(Consumer, own | {"isolation.level": "read_committed"} | client_properties(settings))
    try:
        with unavailable():
            yield consumer
    except KafkaUnavailableError as error:
        raise StreamError(f"reading {reading} at {settings.kafka.bootstrap_servers}: {error}") from error
    finally:
        consumer.close()


def _partitions(consumer: Any, topics: Iterable[str]) -> list[SourcePartition]:
    found: list[SourcePartition] = []
    for topic in topics:
        known = consumer.list_topics(topic, KAFKA_S).topics.get(topic)
        if known is None or known.error is not None or not known.partitions:
            raise ConfigurationError(f"no such topic: {topic}")
        found.extend((topic, partition) for partition in sorted(known.partitions))
    return found


def _resolve(
    consumer: Any, bounds: Bounds, edges: dict[SourcePartition, tuple[int, int]], default: Bound
) -> dict[SourcePartition, int]:
    """The offset that a bound comes to, of each partition."""
    chosen = {source: bounds.single.get(source, bounds.every or default) for source in edges}
    times = {source: bound.value for source, bound in chosen.items() if bound.kind == "time"}
    at = _offsets_at(consumer, times, {source: high for source, (_, high) in edges.items()})
    _check_dated(consumer, {source for source in times if edges[source][0] < at[source] == edges[source][1]}, edges)
    for source, bound in chosen.items():
        low, high = edges[source]
        if bound.kind == "offset":
            if not low <= bound.value <= high:
                raise ConfigurationError(
                    f"{label([source])} holds offsets {low} to {high - 1}, and {bound.value} was asked for"
                )
            at[source] = bound.value
        elif bound.kind != "time":
            at[source] = low if bound.kind == "earliest" else high
    return at
