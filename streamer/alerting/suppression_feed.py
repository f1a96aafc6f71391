"""The feedback topic: verdicts written to it, and the suppressions in force read from it and followed.

Promises: the service starts with all verdicts there are and takes up a new one within about a second; a topic that
cannot be read at start stops it, and one that cannot be read later changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import orjson

from state.episodes import Anomaly
from streamer.alerting.alert_reader import Finding, between, parse
from streamer.alerting.verdicts import Suppression, Suppressions
from streamer.errors import ConfigurationError
from streamer.kafka.client import must_exist
from streamer.kafka.producer import write_one
from streamer.kafka.range_reader import KeyedRecord
from streamer.kafka.topic_follower import TopicFollower
from streamer.settings import Settings

REFRESH_S = 1.0


class SuppressionFeed:
    """The suppressions of the feedback topic, followed as the topic grows. For one thread.

    Raises:
        ConfigurationError: the topic does not exist.
        StreamError: it cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._suppressions = Suppressions()
        self._follower = TopicFollower(settings, settings.feedback)
        self._read_at = time.monotonic()
        self._take(self._follower.catch_up())

    def close(self) -> None:
        """Give the connection back."""
        self._follower.close()

    def covering(self, anomaly: Anomaly) -> Suppression | None:
        """The suppression in force for this event, if any."""
        self._follow()
        return self._suppressions.covering(anomaly)

    def withdrawn(self) -> Mapping[tuple[str, str], int]:
        """`Suppressions.withdrawn`."""
        self._follow()
        return self._suppressions.withdrawn

    def _follow(self) -> None:
        if time.monotonic() - self._read_at > REFRESH_S:
            self._read_at = time.monotonic()
            self._take(self._follower.new_records())

    def _take(self, records: Iterable[KeyedRecord]) -> None:
        for record in records:
            if (finding := parse(record.value)) is not None:
                self._suppressions.add(finding)


def open_feedback(settings: Settings) -> SuppressionFeed | None:
    """The suppressions of the settings' feedback topic; None where there is none."""
    return SuppressionFeed(settings) if settings.feedback else None


def read_suppressions(settings: Settings) -> list[Suppression]:
    """All there ever were, in the order of their verdicts."""
    suppressions = Suppressions()
    for finding in between(_topic(settings), [], []):
        suppressions.add(finding)
    return suppressions.all


def publish(settings: Settings, update: Finding) -> None:
    """Write a verdict to the feedback topic. Raises StreamError where Kafka does not take it."""
    must_exist(settings, [_topic(settings).alerts])
    key, headers = update["finding_info"]["uid"].encode(), [("content-type", b"application/json")]
    write_one(settings, settings.feedback, key, orjson.dumps(update), headers, what="the verdict")


def _topic(settings: Settings) -> Settings:
    if not settings.feedback:
        raise ConfigurationError("no topic for verdicts: set `feedback`, the same for the service and for this command")
    return settings.model_copy(update={"alerts": settings.feedback})
