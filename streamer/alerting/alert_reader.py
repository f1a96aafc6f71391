"""The alert topic as its subscribers see it: a range of it, or live; and what belongs to one finding put together.

Promises: only what is committed is read, no group is joined and nothing is committed, so nobody notices a reader; what
is no Detection Finding of ours is passed over. Does not write: `streamer.alerting.verdicts` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from confluent_kafka import Consumer

from streamer.errors import ConfigurationError
from streamer.kafka.client import build, consumer_properties, topic_partitions
from streamer.kafka.offset_ranges import freeze
from streamer.kafka.range_reader import RangeReader
from streamer.settings import Settings

Finding = dict[str, Any]
BATCH = 500


class AlertMessage(NamedTuple):
    """A message of the alert topic, as `RangeReader` wants it."""

    topic: str
    partition: int
    timestamp: int
    value: bytes | None


@dataclass(frozen=True)
class AlertEpisode:
    """All that is known of one finding, in the order in which it came: the alert and its updates, and verdicts."""

    uid: str
    findings: tuple[Finding, ...]

    @property
    def told(self) -> Finding:
        """What explains it best: the Create or Update about the most unusual event, the latest of equals; where there
        is none, the first there is."""
        explains = [finding for finding in self.findings[::-1] if finding.get("evidences")]
        return min(explains, key=lambda finding: own(finding).get("p_value", 1.0), default=self.findings[0])

    def named(self, uid: str) -> Finding:
        """The alert that this uid, or the beginning of one, names, if it explains; else what explains the story."""
        own_uid = (finding for finding in self.findings if str(finding["metadata"].get("uid")).startswith(uid.lower()))
        return next((finding for finding in own_uid if finding.get("evidences")), self.told)

    @property
    def last(self) -> Finding:
        """The latest that the detector said: what holds now."""
        own = [finding for finding in self.findings if "verdict_id" not in finding]
        return (own or self.findings)[-1]

    @property
    def verdict(self) -> str:
        """What an analyst said last; empty where nobody has."""
        return next((str(finding.get("verdict")) for finding in self.findings[::-1] if "verdict_id" in finding), "")


def parse(value: bytes | None) -> Finding | None:
    """A finding of ours, or None for anything else."""
    try:
        found = orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return None
    ours = isinstance(found, dict) and found.get("class_uid") == 2004 and isinstance(found.get("finding_info"), dict)
    return found if ours and isinstance(found.get("metadata"), dict) else None


def between(
    settings: Settings, since: Sequence[str], until: Sequence[str], wanted: Callable[[bytes], bool] = lambda _: True
) -> Iterator[Finding]:
    """The findings of a range of the alert topic, in order of their timestamps. wanted: looks at a value before it is
    parsed. Raises ConfigurationError and StreamError."""
    return filter(None, (parse(value) for value in values(settings, since, until) if wanted(value)))


def values(settings: Settings, since: Sequence[str], until: Sequence[str]) -> Iterator[bytes]:
    """All that lies in a range of the alert topic, ours or not."""
    topic = settings.model_copy(update={"events": (settings.alerts,)})
    frozen = freeze(topic, since, until, int(time.time() * 1000))
    with RangeReader(topic, frozen, _letter) as reader:
        for batch in reader.batches(BATCH):
            for letter in batch:
                if letter.value is not None:
                    yield letter.value


def live(settings: Settings, since: Sequence[str]) -> Iterator[Finding | None]:
    """The findings from a place on and as they come, for ever; None now and then while nothing comes."""
    topic = settings.model_copy(update={"events": (settings.alerts,)})
    starts = {source: start for source, (start, _) in freeze(topic, since, [], int(time.time() * 1000)).items()}
    consumer = build(Consumer, consumer_properties(topic) | {"group.id": f"{settings.kafka.group_id}-tail"})
    try:
        consumer.assign(topic_partitions(starts))
        while True:
            messages = consumer.consume(100, 0.2)
            found = (parse(message.value()) for message in messages if message.error() is None)
            yield from filter(None, found)
            if not messages:
                yield None
    finally:
        consumer.close()


def in_file(path: Path) -> Iterator[Finding]:
    """The findings of a file of JSON lines. Raises ConfigurationError."""
    try:
        with path.open("rb") as lines:
            yield from filter(None, map(parse, lines))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


def group_episodes(findings: Iterable[Finding]) -> dict[str, AlertEpisode]:
    """By `finding_info.uid`, in the order in which they began; what came twice counts once."""
    found: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        uid, own = finding["finding_info"].get("uid"), finding["metadata"].get("uid")
        if isinstance(uid, str):
            found.setdefault(uid, {}).setdefault(str(own), finding)
    return {uid: AlertEpisode(uid, tuple(parts.values())) for uid, parts in found.items()}


def find_episode(findings: Iterable[Finding], uid: str) -> AlertEpisode:
    """The one story that this uid, or the beginning of one, names: of an alert (`metadata.uid`) or of the finding.

    Raises:
        ConfigurationError: none, or several.
    """
    wanted = uid.lower()
    named = [
        found
        for found in group_episodes(findings).values()
        if found.uid.startswith(wanted)
        or any(str(finding["metadata"].get("uid")).startswith(wanted) for finding in found.findings)
    ]
    if not named:
        raise ConfigurationError(f"no alert {uid!r} there; `ripcurrent tail --last 1d --no-follow` lists them")
    if len(named) > 1:
        raise ConfigurationError(f"{len(named)} findings begin with {uid!r}; write more of it")
    return named[0]


def own(finding: Finding) -> dict[str, Any]:
    """What OCSF has no place for: `unmapped`, empty where it is not ours."""
    unmapped = finding.get("unmapped")
    return unmapped if isinstance(unmapped, dict) else {}


def _letter(raw: Any) -> AlertMessage:
    return AlertMessage(raw.topic(), raw.partition(), raw.timestamp()[1], raw.value())
