"""The alert threshold: the p-value at or under which an event is an alert, moved at hours of event time so that normal
traffic costs the alerts a day that were promised.

Promises: a threshold is decided from the hours before it alone; it stays within CORRECTION of what the promise and the
rate give; at most half the budget is spent in any six hours, but a p-value under a hundredth of the threshold is always
an alert. Pure: it takes event times and p-values, and remembers thresholds and counts.
`streamer.alerting.threshold_ledger` keeps both in Kafka.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.event_time import NO_TIME

HOUR_MS = 3_600_000
DAY_H, WEEK_H = 24, 168
BURST_H = 6
"""The hours in which half the budget may be spent."""
ALWAYS = 0.01
"""Of the threshold: a p-value at or under this share of it is an alert whatever is spent, and takes nothing of what six
hours may spend; the correction counts it."""
CORRECTION = 3.0
"""The factor by which what was spent may move the threshold from what was promised."""
PRIOR_DAYS = 1.0
"""Days of alerts as promised that are added to what was seen, so that the first few alerts move the threshold
little."""
EPISODE_MS = HOUR_MS
"""What goes on about the same thing within this spends nothing: it is told as one alert that is updated."""
MAX_EPISODES = 10_000
"""Episodes remembered. Of more, the half that was alerted on longest ago is forgotten and may spend again."""
MAX_LINE = 0.5
STRAY = 0.01
"""The share of the events that may lie more than a day before all others and not count as the begin of the stream."""
_KEPT_H = WEEK_H + BURST_H
_NEVER = -(1 << 62)
_RECENT = 16
"""Thresholds that nearly every event is held against one of."""


@dataclass(frozen=True)
class Threshold:
    """A threshold in force from an event time (ms) until the next one's. correction: the factor in it that comes from
    what was spent. share: what part of it is in force: less than 1, and at last ALWAYS, as six hours run out of
    budget."""

    start: int
    p_value: float
    correction: float = 1.0
    share: float = 1.0

    @property
    def in_force(self) -> float:
        """The p-value at or under which an event is an alert."""
        return self.p_value * self.share


@dataclass(frozen=True)
class HourCounts:
    """What an hour held: events; expected: alerts that normal traffic was to cost (the sum of the thresholds);
    uncorrected: the same, had no line been corrected; spent: alerts, those under ALWAYS of the threshold and those that
    go on about the same thing left out; latest: the latest event time of such an alert, -1 for none; beyond: alerts
    under ALWAYS of the threshold, without those that go on."""

    events: int = 0
    expected: float = 0.0
    uncorrected: float = 0.0
    spent: int = 0
    latest: int = -1
    beyond: int = 0

    def __add__(self, other: HourCounts) -> HourCounts:
        return HourCounts(
            self.events + other.events,
            self.expected + other.expected,
            self.uncorrected + other.uncorrected,
            self.spent + other.spent,
            max(self.latest, other.latest),
            self.beyond + other.beyond,
        )


def is_over(last: int, now: int) -> bool:
    """Whether an episode that was alerted on last at this event time (ms) can no longer go on: late events count."""
    return last < now - 2 * EPISODE_MS


def is_too_old(hour: int, now: int) -> bool:
    """Whether no decision from this event time (ms) on needs the counts of an hour."""
    return hour < now // HOUR_MS - _KEPT_H


def threshold_at(thresholds: Sequence[Threshold], time: NDArray[np.int64]) -> NDArray[np.float64]:
    """The threshold in force at each event time, float64 [n]. thresholds: at least one, by start; before the first, the
    first."""
    place = np.searchsorted([threshold.start for threshold in thresholds], time, side="right") - 1
    return np.asarray(np.array([threshold.in_force for threshold in thresholds])[np.maximum(place, 0)], np.float64)


@dataclass
class MovingThreshold:
    """The thresholds of one tenant and what was spent.

    Args:
        alerts_per_day: what normal traffic may cost.
        events_per_day: the rate that is taken for days not seen yet: that of training.
        thresholds: the recorded ones, by start; at least the last.
        tallies: of the hours (event time over HOUR_MS) of this process's part of the stream.
        elsewhere: the same, of what others judge.
        episodes: the latest event time (ms) of each episode that was alerted on and may go on, by its digest.
        episodes_elsewhere: the same, of what others judge.
    """

    alerts_per_day: float
    events_per_day: float
    thresholds: list[Threshold] = field(default_factory=list)
    tallies: dict[int, HourCounts] = field(default_factory=dict)
    elsewhere: dict[int, HourCounts] = field(default_factory=dict)
    episodes: dict[str, int] = field(default_factory=dict)
    episodes_elsewhere: dict[str, int] = field(default_factory=dict)

    def copy(self) -> MovingThreshold:
        """One that may go its own way."""
        tallies, elsewhere, episodes = {**self.tallies}, {**self.elsewhere}, {**self.episodes}
        return replace(self, thresholds=[*self.thresholds], tallies=tallies, elsewhere=elsewhere, episodes=episodes)

    def judge(
        self,
        time: NDArray[np.int64],
        p_value: NDArray[np.float64],
        *,
        episode_key: Callable[[int], str] = lambda _: "",
        moves: bool = True,
    ) -> NDArray[np.float64]:
        """The threshold that each of n events is held against, float64 [n]: it is an alert where its p-value is at or
        under.

        time: int64 [n], event ms, NO_TIME counts as the newest hour; episode_key: what an alert on an event would be
        about, by its row ("": it stands alone). Counts the events and what they spend, and moves the threshold where
        they reach a new hour or spend what six hours may. moves: whether this process decides thresholds, or takes
        those that it is given.
        """
        threshold = np.empty(len(time))
        newest = np.maximum(np.maximum.accumulate(time), max(self.newest_hour, 0) * HOUR_MS)
        time = np.where(time == NO_TIME, newest, time)
        hours = time // HOUR_MS
        for hour in np.unique(hours).tolist():
            rows = np.flatnonzero(hours == hour)
            if moves:
                self.advance(hour)
            threshold[rows] = self._judge_hour(hour, time[rows], p_value[rows], rows, episode_key, moves)
        return threshold

    def advance(self, hour: int) -> None:
        """Decide the threshold of an hour, unless it or a later one is decided."""
        if self.thresholds and hour <= self.thresholds[-1].start // HOUR_MS:
            return
        start = hour * HOUR_MS
        if self.elsewhere:  # What others have let through was judged by the threshold before.
            start = max(start, 1 + max(tally.latest for tally in self.elsewhere.values()))
        self.thresholds.append(Threshold(start, *self._decide(hour), self._share(hour)))
        self.forget(start)

    def forget(self, now: int) -> None:
        """Drop what no decision needs from this event time (ms) on."""
        for counted in (self.tallies, self.elsewhere):
            for old in [old for old in counted if is_too_old(old, now)]:
                del counted[old]
        self.episodes = {digest: last for digest, last in self.episodes.items() if not is_over(last, now)}

    def at(self, time: NDArray[np.int64]) -> NDArray[np.float64]:
        """The threshold in force at each event time, float64 [n]; before the first, the first."""
        thresholds = self.thresholds[-_RECENT:] or [Threshold(0, self._promised(self.events_per_day))]
        if len(self.thresholds) > _RECENT and time.min(initial=thresholds[0].start) < thresholds[0].start:
            thresholds = self.thresholds
        return threshold_at(thresholds, time)

    @property
    def newest_hour(self) -> int:
        """The latest hour of which anything was counted; -1 for none."""
        return max((*self.tallies, *self.elsewhere), default=-1)

    def spent(self, hours: Iterable[int]) -> int:
        """Alerts of these hours, those under ALWAYS of the threshold left out."""
        return sum(self._tally(hour).spent for hour in hours)

    def _judge_hour(
        self,
        hour: int,
        time: NDArray[np.int64],
        p_value: NDArray[np.float64],
        rows: NDArray[np.intp],
        episode_key: Callable[[int], str],
        moves: bool,
    ) -> NDArray[np.float64]:
        threshold = self.at(time)
        crossing = np.flatnonzero(p_value <= threshold)
        for row in crossing[np.argsort(time[crossing], kind="stable")].tolist():
            moment = int(time[row])
            now = self._threshold_at(moment)
            if p_value[row] > now.in_force:
                continue
            if self._goes_on(episode_key(int(rows[row])), moment):
                continue
            if p_value[row] <= ALWAYS * now.p_value:
                self._count(hour, HourCounts(beyond=1))
                continue
            self._count(hour, HourCounts(spent=1, latest=moment))
            if moves:
                self._tighten(moment)
        threshold = self.at(time)
        expected = float(threshold.sum())
        correction = self.thresholds[-1].correction if self.thresholds else 1.0
        self._count(hour, HourCounts(len(time), expected, expected / correction))
        return threshold

    def _goes_on(self, about: str, moment: int) -> bool:
        """Whether this was alerted on a short time ago; takes note of it."""
        if not about:
            return False
        digest = blake2b(about.encode("utf-8", "replace"), digest_size=8).hexdigest()
        last = max(self.episodes.get(digest, _NEVER), self.episodes_elsewhere.get(digest, _NEVER))
        self.episodes[digest] = max(moment, last)
        if len(self.episodes) > MAX_EPISODES:
            latest = sorted(self.episodes.items(), key=lambda episode: (episode[1], episode[0]))
            self.episodes = dict(latest[len(latest) // 2 :])
        return abs(moment - last) <= EPISODE_MS

    def _threshold_at(self, moment: int) -> Threshold:
        """The threshold in force at an event time, or the one that is promised where there is none yet."""
        found = next((threshold for threshold in reversed(self.thresholds) if threshold.start <= moment), None)
        return found or (self.thresholds[0] if self.thresholds else Threshold(0, self._promised(self.events_per_day)))

    def _tighten(self, moment: int) -> None:
        """After an alert, if six hours run out of budget. Not from before what was let through already: a threshold is
        never changed once it was used."""
        newest = self.thresholds[-1]
        share = self._share(newest.start // HOUR_MS)
        if share < newest.share:
            latest = max(tally.latest for counted in (self.tallies, self.elsewhere) for tally in counted.values())
            self.thresholds.append(replace(newest, start=max(moment, latest, newest.start) + 1, share=share))

    def _share(self, hour: int) -> float:
        """The part of the threshold that is in force after what six hours that end in this one have spent: all until
        half of what they may spend is gone, then less with each alert, so that the strongest get the rest; ALWAYS once
        it is all gone. Seven hours of the clock cover any six."""
        used = self.spent(range(hour - BURST_H, hour + 1)) / (self.alerts_per_day / 2)
        return float(f"{ALWAYS ** min(max(2 * used - 1, 0.0), 1.0):.6g}")

    def _decide(self, hour: int) -> tuple[float, float]:
        """The threshold, and the correction in it, from the hours before: the promise over the mean rate of a week; the
        rate of a day may not cost more than half again, that of six hours not more than half a day's budget; and that
        times the correction."""
        week = [self._tally(past) for past in range(hour - WEEK_H, hour)]
        known = min(hour - self._oldest_hour(hour), WEEK_H)
        unseen = self.events_per_day * (WEEK_H - known) / DAY_H
        mean = (sum(tally.events for tally in week) + unseen) / (WEEK_H / DAY_H)
        day, burst = (sum(tally.events for tally in week[-hours:]) for hours in (DAY_H, BURST_H))
        threshold = min(self._promised(mean), 1.5 * self._promised(day), 0.5 * self._promised(burst))
        correction = self._correction(week, self.alerts_per_day * known / DAY_H)
        # Sums of floating-point numbers depend on how the stream was cut into batches, so the last digits go.
        return float(f"{min(threshold * correction, MAX_LINE):.6g}"), correction

    def _correction(self, week: list[HourCounts], promised: float) -> float:
        """What was promised, over what uncorrected thresholds would have cost: so many alerts more or fewer came than
        were expected of the thresholds that there were. Those under ALWAYS count here: they close nothing, but are
        read, too."""
        prior = PRIOR_DAYS * self.alerts_per_day
        expected, uncorrected = (sum(getattr(t, name) for t in week) for name in ("expected", "uncorrected"))
        found = (prior + sum(tally.spent + tally.beyond for tally in week)) / (prior + expected)
        wanted = (prior + promised) / (prior + uncorrected) / found
        return float(f"{np.clip(wanted, 1 / CORRECTION, CORRECTION):.6g}")

    def _promised(self, events: float) -> float:
        return min(MAX_LINE, self.alerts_per_day / max(events, 1.0))

    def _oldest_hour(self, now: int) -> int:
        """The first hour that was seen of the stream. Single events far behind all others are late, and tell nothing
        of the hours between: they are passed over."""
        hours = sorted({*self.tallies, *self.elsewhere})
        few = STRAY * sum(self._tally(hour).events for hour in hours)
        before = 0
        for hour, following in zip(hours, [*hours[1:], now], strict=False):
            before += self._tally(hour).events
            if following - hour <= DAY_H or before > few:
                return hour
        return now

    def _tally(self, hour: int) -> HourCounts:
        return self.tallies.get(hour, HourCounts()) + self.elsewhere.get(hour, HourCounts())

    def _count(self, hour: int, tally: HourCounts) -> None:
        self.tallies[hour] = self.tallies.get(hour, HourCounts()) + tally
