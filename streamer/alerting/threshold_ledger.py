"""The ledger: a compacted topic that holds every alert threshold of a tenant, what was spent and which episodes may go
on, and the `MovingThreshold` over it; beside them what the live calibration decided and counted, in the same way.

Promises: all of it is written in the transaction of the alerts that it is about, so that after a crash or an abort the
stream is judged by what subscribers were shown, and whoever takes over a partition knows what was spent on it; one
process of the group decides thresholds, the one that reads partition 0 of the first topic, and a process that lost it
cannot commit any. With several processes, one may still use the threshold before for the moment until it has read a new
one: every alert names the threshold that it crossed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import orjson
import structlog
from numpy.typing import NDArray

from state.errors import SourcePartition
from streamer.alerting.threshold import HourCounts, MovingThreshold, Threshold, is_over, is_too_old, threshold_at
from streamer.detection.batches import ScoredBatch
from streamer.detection.live_calibration import DAY_H, HOUR_MS, KEPT, Decision, HourTally, LiveCalibration
from streamer.errors import ConfigurationError
from streamer.kafka.client import Offsets, partition_counts, topic_settings
from streamer.kafka.producer import Output
from streamer.kafka.range_reader import KeyedRecord
from streamer.kafka.topic_follower import TopicFollower
from streamer.settings import Settings

REFRESH_S = 1.0
KEPT_LINES = 1024
"""Thresholds to judge by: more than two weeks of them. An event that is older is held against the first of these."""

_log = structlog.get_logger("ripcurrent.ledger")


class ThresholdLedger:
    """What the service asks for the threshold, and gives what its transactions carry. For one thread.

    Args:
        instance: the name under which this process counts what it spends; the same after a restart.
        events_per_day: the rate that is taken for days not seen yet: that of training.
        withdrawn: what analysts do not let the live calibration learn (`LiveCalibration.withdrawn`).
    """

    def __init__(
        self,
        settings: Settings,
        instance: str,
        events_per_day: float,
        withdrawn: Callable[[], Mapping[tuple[str, str], int]] = dict,
    ) -> None:
        self._settings = settings
        self._instance = instance
        self._records = _Records(settings.tenant)
        self._follower: TopicFollower | None = None
        self._committed = MovingThreshold(settings.alerts_per_day, events_per_day)
        self._budget = self._committed.copy()
        self._withdrawn = withdrawn
        self._live: LiveCalibration | None = None
        self._committed_live: LiveCalibration | None = None
        self._read_at = 0.0
        self._owner = False
        self._partitions: set[SourcePartition] = set()

    @property
    def decider(self) -> SourcePartition:
        """Whoever reads this partition decides thresholds."""
        return self._settings.events[0], 0

    @property
    def threshold(self) -> float:
        """The threshold as committed, of the latest hour."""
        thresholds = self._committed.thresholds
        return (
            thresholds[-1].in_force if thresholds else self._committed.alerts_per_day / self._committed.events_per_day
        )

    def open(self) -> None:
        """Read what is recorded. Raises ConfigurationError: no such topic, or one that forgets."""
        self._follower = TopicFollower(self._settings, self._settings.ledger)
        check_compacted(self._settings)
        self._take(self._follower.catch_up())
        self._budget = self._committed.copy()

    def hurry(self) -> None:
        """The process is asked to end: wait for Kafka no longer than DRAIN_S."""
        if self._follower is not None:
            self._follower.hurry()

    def close(self) -> None:
        """Give the connection back."""
        if self._follower is not None:
            self._follower.close()

    def calibration(self, of_bundle: LiveCalibration, owned: Offsets) -> LiveCalibration:
        """What the next batch is judged by, and counted in. of_bundle: one of the bundle that serves."""
        self._follow(owned)
        if self._live is None or self._live.bundle != of_bundle.bundle:
            fresh = replace(of_bundle, decisions=[], tallies={}, elsewhere={}, moves=False)
            self._committed_live = self._recorded(fresh)
            self._live = self._committed_live.copy()
        self._live.moves, self._live.withdrawn = self._owner, self._withdrawn()
        return self._live

    def judge(self, scored: ScoredBatch, owned: Offsets) -> NDArray[np.float64]:
        """The threshold that each of n events is held against, float64 [n]. Takes what the batch adds to the live
        calibration."""
        self._follow(owned)
        if scored.live is not None:
            self._live = scored.live
        return self._budget.judge(scored.time, scored.p_value, episode_key=scored.episode_key, moves=self._owner)

    def idle(self, owned: Offsets) -> bool:
        """With nothing to judge: whether there is a threshold to be committed, because others have reached a new
        hour."""
        if time.monotonic() - self._read_at >= REFRESH_S:
            self._follow(owned)
            if self._owner and self._budget.elsewhere and self._budget.newest_hour >= 0:
                self._budget.advance(self._budget.newest_hour)
                if self._live is not None:
                    self._live.advance(self._budget.newest_hour)
        return len(self._budget.thresholds) > 0 and self._budget.thresholds[-1:] != self._committed.thresholds[-1:]

    def outputs(self, now_ms: int) -> list[Output]:
        """What the next transaction must carry: thresholds decided, hours counted and episodes alerted on since the
        last."""
        known, tenant = set(self._committed.thresholds), self._settings.tenant
        records: dict[str, dict[str, Any] | None] = {}
        for threshold in self._budget.thresholds:
            if threshold not in known:
                budget = {"alerts_per_day": self._budget.alerts_per_day}
                records[f"{tenant}:line:{threshold.start}"] = (
                    asdict(threshold) | {"in_force": threshold.in_force} | budget
                )
        before, after = self._committed.tallies, self._budget.tallies
        for hour in before.keys() - after.keys():
            records[f"{tenant}:tally:{hour}:{self._instance}"] = None
        for hour, tally in after.items():
            if before.get(hour) != tally:
                records[f"{tenant}:tally:{hour}:{self._instance}"] = asdict(tally)
        episodes = self._budget.episodes
        for digest in self._committed.episodes.keys() - episodes.keys():
            records[f"{tenant}:episode:{digest}:{self._instance}"] = None
        for digest, last in episodes.items():
            if self._committed.episodes.get(digest) != last:
                records[f"{tenant}:episode:{digest}:{self._instance}"] = {"last": last}
        records |= self._live_records() | dict.fromkeys(self._obsolete_elsewhere())
        return [
            Output(self._settings.ledger, key.encode(), orjson.dumps(value) if value else None, [], now_ms, key)
            for key, value in records.items()
        ]

    def committed(self) -> None:
        """The transaction with `outputs` is committed."""
        self._committed = self._budget.copy()
        self._committed_live = self._live.copy() if self._live is not None else None

    def rewind(self) -> None:
        """It was not: what was judged since the last commit will be judged again."""
        self._budget = self._committed.copy()
        self._live = self._committed_live.copy() if self._committed_live is not None else None

    def _live_records(self) -> dict[str, dict[str, Any] | None]:
        """Decisions of the live calibration, and the hours that it counted, since the last transaction."""
        live, committed, tenant = self._live, self._committed_live, self._settings.tenant
        if live is None or committed is None:
            return {}
        known, records = {decision.start for decision in committed.decisions}, dict[str, dict[str, Any] | None]()
        for decision in live.decisions:
            if decision.start not in known:
                records[f"{tenant}:calibration:{decision.start}:{live.bundle}"] = {
                    "by": self._instance,
                    **decision.to_json(),
                }
        for hour in committed.tallies.keys() - live.tallies.keys():
            records[f"{tenant}:evidence:{hour}:{self._instance}"] = None
        for hour, tally in live.tallies.items():
            if committed.tallies.get(hour) is not tally:
                records[f"{tenant}:evidence:{hour}:{self._instance}"] = {"bundle": live.bundle} | tally.to_json()
        return records

    def _recorded(self, live: LiveCalibration) -> LiveCalibration:
        """A live calibration with what is recorded of its bundle beside its own."""
        known = self._records.decisions.get(live.bundle, {}) | {each.start: each for each in live.decisions}
        own, elsewhere = dict[int, HourTally](), dict[int, HourTally]()
        for (hour, instance), body in self._records.evidence.items():
            if body["bundle"] == live.bundle and instance == self._instance and not live.tallies:
                own[hour] = HourTally.from_json(body)
            elif body["bundle"] == live.bundle and instance != self._instance:
                elsewhere[hour] = elsewhere.get(hour, HourTally()) + HourTally.from_json(body)
        decisions = [known[start] for start in sorted(known)[-KEPT:]]
        return replace(live, decisions=decisions, tallies=live.tallies or own, elsewhere=elsewhere)

    def _obsolete_elsewhere(self) -> list[str]:
        """Keys of the records of others that no decision needs any more: episodes that are over and hours that are too
        old. They are theirs to remove, but an instance may be gone for good, as pods with names of their own are. The
        one who decides does it when a threshold moves."""
        newest, known = self._budget.thresholds[-1:], self._committed.thresholds[-1:]
        if not self._owner or newest == known:
            return []
        now, places = newest[0].start, list[tuple[str, str, str]]()
        for (digest, instance), last in self._records.episodes.items():
            if is_over(last, now):
                places.append(("episode", digest, instance))
        for hour, instance in self._records.tallies:
            if is_too_old(hour, now):
                places.append(("tally", str(hour), instance))
        for hour, instance in self._records.evidence:
            if hour < now // HOUR_MS - DAY_H:
                places.append(("evidence", str(hour), instance))
        return [":".join((self._settings.tenant, *place)) for place in places if place[2] != self._instance]

    def _follow(self, owned: Offsets) -> None:
        """Take note of what others have recorded: all of it before the first event of a partition that was another's,
        and before the first decision as the one who decides."""
        assert self._follower is not None, "call open() first"
        owner = self.decider in owned
        if owner != self._owner or not self._partitions.issuperset(owned):
            self._take(self._follower.catch_up())
            if owner != self._owner:
                decides = "this process decides" if owner else "another process decides"
                _log.info(f"{decides} the alert threshold")
        elif time.monotonic() - self._read_at >= REFRESH_S:
            self._take(self._follower.new_records())
        self._owner, self._partitions = owner, set(owned)

    def _take(self, records: Iterable[KeyedRecord]) -> None:
        for record in records:
            self._records.take(record)
        self._read_at = time.monotonic()
        thresholds = {threshold.start: threshold for threshold in self._records.thresholds.values()}
        for budget in (self._committed, self._budget):
            known = thresholds | {threshold.start: threshold for threshold in budget.thresholds}
            budget.thresholds = [known[start] for start in sorted(known)[-KEPT_LINES:]]
            budget.elsewhere = {}
            for (hour, instance), tally in self._records.tallies.items():
                if instance != self._instance:
                    budget.elsewhere[hour] = budget.elsewhere.get(hour, HourCounts()) + tally
            budget.episodes_elsewhere = {}
            for (digest, instance), last in self._records.episodes.items():
                if instance != self._instance:
                    known_last = budget.episodes_elsewhere.get(digest, last)
                    budget.episodes_elsewhere[digest] = max(last, known_last)
        if self._live is not None and self._committed_live is not None and self._records.learned_by - {self._instance}:
            self._committed_live, self._live = self._recorded(self._committed_live), self._recorded(self._live)
        self._records.learned_by.clear()
        own = {hour: tally for (hour, name), tally in self._records.tallies.items() if name == self._instance}
        if self._budget.thresholds and not self._owner:  # The one who decides does it as it moves the threshold.
            self._budget.forget(self._budget.thresholds[-1].start)
        if not self._committed.tallies:
            self._committed.tallies = own
            episodes = self._records.episodes.items()
            self._committed.episodes = {digest: last for (digest, name), last in episodes if name == self._instance}


class RecordedThresholds:
    """The recorded thresholds of a tenant, for replay: `RecordedThresholds.read(settings).at(event_time)`."""

    def __init__(self, thresholds: Mapping[int, Threshold]) -> None:
        self._thresholds = [threshold for _, threshold in sorted(thresholds.items())]

    def __len__(self) -> int:
        return len(self._thresholds)

    @classmethod
    def read(cls, settings: Settings) -> RecordedThresholds:
        """The thresholds of `settings.tenant` in `settings.ledger` that were decided for its `alerts_per_day`; none
        where there is no such topic. Raises ConfigurationError and StreamError where it cannot be read."""
        records, budget = _read(settings), settings.alerts_per_day
        return cls({start: kept for start, kept in records.thresholds.items() if records.budgets[start] == budget})

    def at(self, event_time: NDArray[np.int64]) -> NDArray[np.float64]:
        """int64 [n], ms, to the threshold in force at each, float64 [n]; before the first threshold, the first. Raises
        ValueError where none is recorded."""
        if not self._thresholds:
            raise ValueError("no threshold is recorded")
        return threshold_at(self._thresholds, event_time)


def recorded_decisions(settings: Settings, bundle: str) -> list[Decision] | None:
    """What the live calibration of a bundle (its version) decided, by start; None where it never served. Raises as
    `RecordedThresholds.read`."""
    decisions = _read(settings).decisions.get(bundle)
    return None if decisions is None else [decision for _, decision in sorted(decisions.items())]


def _read(settings: Settings) -> _Records:
    """All records of a tenant."""
    records = _Records(settings.tenant)
    if settings.ledger in partition_counts(settings):
        follower = TopicFollower(settings, settings.ledger)
        try:
            for record in follower.catch_up():
                records.take(record)
        finally:
            follower.close()
    return records


class _Records:
    """The records of a tenant, as far as they have been read."""

    def __init__(self, tenant: str) -> None:
        self.thresholds: dict[int, Threshold] = {}
        self.budgets: dict[int, float] = {}
        self.tallies: dict[tuple[int, str], HourCounts] = {}
        self.episodes: dict[tuple[str, str], int] = {}
        self.decisions: dict[str, dict[int, Decision]] = {}
        self.evidence: dict[tuple[int, str], dict[str, Any]] = {}
        self.learned_by: set[str] = set()
        self._tenant = tenant

    def take(self, record: KeyedRecord) -> None:
        """Take note of the next record."""
        key, value = (record.key or b"").decode(), record.value
        tenant, kind, number, *instance = key.split(":", 3)
        if tenant != self._tenant:
            return
        body = orjson.loads(value) if value else None
        if kind == "line" and body is not None:
            self.budgets[int(number)] = body["alerts_per_day"]
            self.thresholds[int(number)] = Threshold(int(number), body["p_value"], body["correction"], body["share"])
        elif kind == "tally":
            place = int(number), "".join(instance)
            if body is None:
                self.tallies.pop(place, None)
            else:
                self.tallies[place] = HourCounts(**body)
        elif kind == "episode":
            episode = number, "".join(instance)
            if body is None:
                self.episodes.pop(episode, None)
            else:
                self.episodes[episode] = body["last"]
        elif kind == "calibration" and body is not None:
            self.decisions.setdefault("".join(instance), {})[int(number)] = Decision.from_json(body)
            self.learned_by.add(body["by"])
        elif kind == "evidence":
            place = int(number), "".join(instance)
            self.learned_by.add(place[1])
            if body is None:
                self.evidence.pop(place, None)
            else:
                self.evidence[place] = body


def check_compacted(settings: Settings) -> None:
    """Refuse a ledger that Kafka would delete thresholds from, or that has several partitions.

    Raises ConfigurationError, with the command that mends it.
    """
    topic = settings.ledger
    partitions = partition_counts(settings).get(topic, 0)
    if partitions > 1:
        raise ConfigurationError(f"topic {topic!r} (ledger) has {partitions} partitions, and 1 is needed")
    policy = topic_settings(settings, [topic], "cleanup.policy").get(topic, "")
    if "delete" in policy:
        raise ConfigurationError(
            f"topic {topic!r} (ledger) has cleanup.policy={policy}, so Kafka would forget alert thresholds; "
            f"kafka-configs.sh --alter --topic {topic} --add-config cleanup.policy=compact"
        )
