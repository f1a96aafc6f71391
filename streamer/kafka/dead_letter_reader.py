"""The dead-letter topic as a person works with it: what is in it and why, one letter whole, and sending them back.

Promises of sending back: key, value, headers and timestamp are those that came, without the errors; each letter is sent
once, however often it is asked for and whatever dies in between, unless it is named; one that fails again is told by a
header that counts. Removes nothing: retention does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

from streamer.errors import ConfigurationError
from streamer.kafka.client import Offsets, must_exist
from streamer.kafka.dead_letter_writer import ALERT_STAGE, PREFIX, STUB_HEADER
from streamer.kafka.offset_ranges import Range, freeze
from streamer.kafka.offset_store import OffsetStore
from streamer.kafka.producer import Output
from streamer.kafka.range_reader import RangeReader
from streamer.settings import Settings

REDRIVEN_HEADER = "ripcurrent.redriven"
"""How many times this message was sent back already."""
TOGETHER = 500
"""Letters sent back in one transaction."""


@dataclass(frozen=True)
class DeadLetter:
    """One dead letter. source: the coordinates (topic, partition, offset) that it came from, ("", -1, -1) where it does
    not say; stub: its value is not what came but a note of where that is; redriven: how often it was sent back.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    source: tuple[str, int, int]
    stage: str
    exception: str
    reason: str
    stub: bool
    redriven: int

    @property
    def place(self) -> str:
        """`partition:offset` in the dead-letter topic."""
        return f"{self.partition}:{self.offset}"

    @property
    def origin(self) -> str:
        """`topic:partition:offset` of what it was."""
        return ":".join(map(str, self.source)) if self.source[0] else "unknown"


@dataclass
class Redriven:
    """What became of letters: how many were sent to each topic, and what was left, by why."""

    sent: Counter[str]
    left: Counter[str]


def letter_of(raw: Any) -> DeadLetter:
    """librdkafka's message as a letter; one without errors in its headers (written by something else) has none."""
    headers = list(raw.headers() or [])
    text = {key: (value or b"").decode("utf-8", "replace") for key, value in headers}
    kind, timestamp = raw.timestamp()
    return DeadLetter(
        raw.topic(),
        raw.partition(),
        raw.offset(),
        -1 if kind == TIMESTAMP_NOT_AVAILABLE else timestamp,
        raw.key(),
        raw.value(),
        headers,
        (text.get(f"{PREFIX}topic", ""), _number(text, f"{PREFIX}partition"), _number(text, f"{PREFIX}offset")),
        text.get(f"{PREFIX}stage", ""),
        text.get(f"{PREFIX}exception.class.name", ""),
        text.get(f"{PREFIX}exception.message", ""),
        STUB_HEADER in text,
        max(_number(text, REDRIVEN_HEADER), 0),
    )


def _number(text: dict[str, str], key: str) -> int:
    value = text.get(key, "")
    return int(value) if value.isdecimal() else -1


def letters(settings: Settings, wanted: Range) -> Iterator[list[DeadLetter]]:
    """The letters of a range of the dead-letter topic, oldest first."""
    with RangeReader(settings, wanted, letter_of) as reader:
        yield from reader.batches(TOGETHER)


def range_of(settings: Settings, since: Sequence[str], until: Sequence[str], now_ms: int) -> Range:
    """A range of the dead-letter topic, as `streamer.kafka.offset_ranges` reads it."""
    return freeze(settings.model_copy(update={"events": (settings.dead_letters,)}), since, until, now_ms)


def place(text: str) -> tuple[int, int]:
    """`partition:offset`, as `list` shows it. Raises ConfigurationError."""
    partition, _, offset = text.partition(":")
    if not (partition.isdecimal() and offset.isdecimal()):
        raise ConfigurationError(f"{text!r} is no letter; write PARTITION:OFFSET as `ripcurrent dlq list` shows it")
    return int(partition), int(offset)


def named(settings: Settings, places: Iterable[tuple[int, int]]) -> list[DeadLetter]:
    """The letters at these places. Raises ConfigurationError for one that is not there."""
    found: list[DeadLetter] = []
    for partition, offset in places:
        at = [f"{partition}={offset}"], [f"{partition}={offset + 1}"]
        batch = [letter for part in letters(settings, range_of(settings, *at, now_ms=0)) for letter in part]
        if not batch:
            raise ConfigurationError(f"no letter at {partition}:{offset} of {settings.dead_letters}")
        found.extend(batch)
    return found


def positions(settings: Settings) -> OffsetStore:
    """What was sent back so far: a group `GROUP-redrive`."""
    return OffsetStore(settings, f"{settings.kafka.group_id}-redrive", [settings.events[0], settings.dead_letters])


def unsent(settings: Settings, sent: OffsetStore, now_ms: int) -> Range:
    """From where the last redrive ended to what is there now."""
    wanted = range_of(settings, [], [], now_ms)
    done = sent.committed(wanted)
    return {source: (min(max(start, done.get(source, start)), end), end) for source, (start, end) in wanted.items()}


def redrive(
    settings: Settings,
    batches: Iterable[list[DeadLetter]],
    sent: OffsetStore,
    *,
    to: str | None = None,
    exception: str | None = None,
    remember: bool = True,
) -> Redriven:
    """Send letters back to the topics that they came from, or all to one.

    Args:
        exception: only letters of this kind; the others count as dealt with.
        remember: these are not sent again by the next redrive of all.

    Raises:
        ConfigurationError: a topic that no longer exists.
        StreamError: Kafka refuses or does not answer; what is not sent is sent by the next one.
    """
    result = Redriven(Counter(), Counter())
    known: set[str] = set()
    for batch in batches:
        outputs: list[Output] = []
        offsets: Offsets = {}
        for letter in batch:
            offsets[letter.topic, letter.partition] = letter.offset + 1
            target, why = _target(letter, to, exception)
            if not target:
                result.left[why] += 1
                continue
            if target not in known:
                must_exist(settings, [target])
                known.add(target)
            outputs.append(_output(letter, target))
        refused = sent.publish(outputs, offsets if remember else {})
        result.left["too large for the topic"] += len(refused)
        result.sent.update(output.topic for output in outputs if output.origin not in refused)
    return result


def _target(letter: DeadLetter, to: str | None, exception: str | None) -> tuple[str, str]:
    """Where a letter goes; else an empty string and why it goes nowhere."""
    if exception is not None and letter.exception != exception:
        return "", f"not {exception}"
    if letter.stub:
        return "", "stubs of messages that were too large (the original stands at its source)"
    if letter.stage == ALERT_STAGE:
        return "", "alerts that were too large for their topic"
    target = to or letter.source[0]
    return (target, "") if target else ("", "without a source topic in the headers")


def _output(letter: DeadLetter, target: str) -> Output:
    own = [(key, value) for key, value in letter.headers if not key.startswith(PREFIX) and key != REDRIVEN_HEADER]
    count: tuple[str, bytes | None] = (REDRIVEN_HEADER, str(letter.redriven + 1).encode())
    return Output(target, letter.key, letter.value, [*own, count], max(letter.timestamp, 0), letter.place)
