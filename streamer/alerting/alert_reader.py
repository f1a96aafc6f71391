"""Reads the alert topic as subscribers see it, a range or live, and groups findings into episodes.

Promises: it reads committed messages only, joins no group and commits no offsets; messages that are not Ripcurrent's
findings are skipped. It does not write: `streamer.alerting.suppression_feed` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from streamer.errors import ConfigurationError
from streamer.kafka.offset_ranges import freeze
from streamer.kafka.partition_reader import PartitionReader
from streamer.kafka.range_reader import RangeReader, record_of
from streamer.settings import Settings

Finding = dict[str, Any]
BATCH = 500


@dataclass(frozen=True)
class AlertEpisode:
    """All messages of one finding, in their order: the alert, its updates and its close, and verdicts."""

    uid: str
    findings: tuple[Finding, ...]

    @property
    def most_unusual(self) -> Finding:
        """The Create or Update about the most unusual event, of equal ones the latest; without one, the first
        message."""
        explains = [finding for finding in self.findings[::-1] if finding.get("evidences")]
        return min(explains, key=lambda finding: own(finding).get("p_value", 1.0), default=self.findings[0])

    def named(self, uid: str) -> Finding:
        """The alert with this uid (or a uid that begins so) if it has evidence, else `most_unusual`."""
        matches = (finding for finding in self.findings if str(finding["metadata"].get("uid")).startswith(uid.lower()))
        return next((finding for finding in matches if finding.get("evidences")), self.most_unusual)

    @property
    def last(self) -> Finding:
        """The latest message of the detector, not of an analyst: the present state."""
        detected = [finding for finding in self.findings if "verdict_id" not in finding]
        return (detected or self.findings)[-1]

    @property
    def verdict(self) -> str:
        """The latest verdict of an analyst; "" without one."""
        return next((str(finding.get("verdict")) for finding in self.findings[::-1] if "verdict_id" in finding), "")


def parse(value: bytes | None) -> Finding | None:
    """The finding in a message; None for anything that is not a Detection Finding."""
    try:
        finding = orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return None
    ours = (
        isinstance(finding, dict) and finding.get("class_uid") == 2004 and isinstance(finding.get("finding_info"), dict)
    )
    return finding if ours and isinstance(finding.get("metadata"), dict) else None


def between(
    settings: Settings, since: Sequence[str], until: Sequence[str], wanted: Callable[[bytes], bool] = lambda _: True
) -> Iterator[Finding]:
    """The findings of a range of the alert topic, in the order of their timestamps. wanted: tests a value before it is
    parsed. Raises ConfigurationError and StreamError."""
    return filter(None, (parse(value) for value in values(settings, since, until) if wanted(value)))


def values(settings: Settings, since: Sequence[str], until: Sequence[str]) -> Iterator[bytes]:
    """The values of all messages in a range of the alert topic."""
    topic = settings.model_copy(update={"events": (settings.alerts,)})
    frozen = freeze(topic, since, until, int(time.time() * 1000))
    with RangeReader(topic, frozen, record_of) as reader:
        for batch in reader.batches(BATCH):
            for record in batch:
                if record.value is not None:
                    yield record.value


def live(settings: Settings, since: Sequence[str]) -> Iterator[Finding | None]:
    """The findings from a position on, without end; None from time to time while there are none."""
    topic = settings.model_copy(update={"events": (settings.alerts,)})
    starts = {source: start for source, (start, _) in freeze(topic, since, [], int(time.time() * 1000)).items()}
    reader = PartitionReader(topic, f"{settings.kafka.group_id}-tail")
    try:
        reader.assign(starts)
        while True:
            messages = reader.read(100, 0.2)
            yield from filter(None, (parse(message.value()) for message in messages))
            if not messages:
                yield None
    finally:
        reader.close()


def in_file(path: Path) -> Iterator[Finding]:
    """The findings of a file of JSON lines. Raises ConfigurationError."""
    try:
        with path.open("rb") as lines:
            yield from filter(None, map(parse, lines))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


def group_episodes(findings: Iterable[Finding]) -> dict[str, AlertEpisode]:
    """The episodes by `finding_info.uid`, in the order of their first messages; duplicates count once."""
    by_uid: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        uid, alert_uid = finding["finding_info"].get("uid"), finding["metadata"].get("uid")
        if isinstance(uid, str):
            by_uid.setdefault(uid, {}).setdefault(str(alert_uid), finding)
    return {uid: AlertEpisode(uid, tuple(parts.values())) for uid, parts in by_uid.items()}


def find_episode(findings: Iterable[Finding], uid: str) -> AlertEpisode:
    """The one episode that has this uid or a uid that begins so: of an alert (`metadata.uid`) or of the finding.

    Raises:
        ConfigurationError: none, or several.
    """
    wanted = uid.lower()
    named = [
        episode
        for episode in group_episodes(findings).values()
        if episode.uid.startswith(wanted)
        or any(str(finding["metadata"].get("uid")).startswith(wanted) for finding in episode.findings)
    ]
    if not named:
        raise ConfigurationError(f"no alert {uid!r} there; `ripcurrent tail --last 1d --no-follow` lists them")
    if len(named) > 1:
        raise ConfigurationError(f"{len(named)} findings begin with {uid!r}; write more of it")
    return named[0]


def own(finding: Finding) -> dict[str, Any]:
    """The `unmapped` object, which holds what OCSF has no attribute for; empty where it is missing."""
    unmapped = finding.get("unmapped")
    return unmapped if isinstance(unmapped, dict) else {}


def integer(value: Any) -> int:
    """An integer attribute of a finding; 0 where it is missing or of another type."""
    return value if isinstance(value, int) else 0
