"""Turns scored rows into the alerts to publish: what is one story is told once, explained, updated and closed.

Promises that only what is told is explained, so that a storm costs little; and that the same rows give the same alerts
again until their offsets are committed, as the episodes do. The service, replay and `score` all publish through it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson
import structlog
from numpy.typing import NDArray

from encoder.features.normalization import normalise
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import entities
from encoder.ocsf.events import Message
from state.episodes import CLOSE, Anomaly, Decision, End, Episode, EpisodeStore
from state.errors import SourcePartition
from streamer.alerting import text as wording
from streamer.alerting.close_alert import close_alert
from streamer.alerting.detection_finding import build_alerts
from streamer.alerting.finding_frame import Alert, level
from streamer.alerting.verdicts import Suppression
from streamer.detection.batches import ScoredBatch
from streamer.detection.isolation import is_other_fault
from streamer.explain.attribution import Explainer, Explanation
from streamer.redaction import Redactor

if TYPE_CHECKING:
    from streamer.settings import Settings

_SAYS_WHAT = wording.SUMMARY_PATHS[1:]
"""What two sequences have in common that are the same thing at two entities: outcome and the first telling value."""


_log = structlog.get_logger("ripcurrent.alerts")

_NEVER = 1 << 62
"""An event time after all others."""


class Explaining(Protocol):
    """What is needed of `streamer.explain.attribution.Explainer`."""

    def explain(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Explanation]: ...


class Suppressing(Protocol):
    """What is needed of `SuppressionFeed`."""

    def covering(self, anomaly: Anomaly) -> Suppression | None: ...


class AlertPipeline:
    """Alerts from scored batches.

    Args:
        explainer: says why; asked for the rows that are told, and no others.
        episodes: what is one story; idempotent.
        suppressing: what analysts do not want to hear of again; None: everything is told.
        clock: seconds since the epoch, for the time at which an alert was made.
    """

    def __init__(
        self,
        explainer: Explaining,
        episodes: EpisodeStore,
        *,
        bundle_version: str,
        tenant: str = "default",
        redactor: Redactor | None = None,
        suppressing: Suppressing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.episodes = episodes
        self._explainer = explainer
        self._bundle, self._tenant = bundle_version, tenant
        self._redactor = redactor or Redactor()
        self._suppressing = suppressing
        self._suppressed: Counter[str] = Counter()
        self._clock = clock

    def alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Alert]:
        """What to publish with a batch whose `threshold` is known, also that of its silences. rows: those at or under
        it, ascending.

        Raises:
            StateError: from the store of episodes or windows; call again with the same.
        """
        decisions = self.note(scored, rows)
        if not decisions:
            return []
        assert scored.threshold is not None, "whoever chose the rows knows the threshold"
        made: dict[int, Alert] = {}
        own = [(i, row) for i, decision in enumerate(decisions) if (row := _row(scored, decision)) is not None]
        made |= self._made(scored, own, decisions)
        if (inactive := scored.inactive) is not None:
            silent = [
                (i, row) for i, d in enumerate(decisions) if (row := _silent_row(scored, inactive, d)) is not None
            ]
            assert inactive.noticed_at is not None
            for i, alert in self._made(inactive, silent, decisions).items():
                made[i] = replace(alert, row=int(inactive.noticed_at[alert.row]))
        closed = [decision.episode for decision in decisions if decision.activity == CLOSE]
        return [
            *(made[i] for i in sorted(made)),
            *(self._close(episode, float(scored.threshold[-1])) for episode in closed),
        ]

    def _made(
        self, scored: ScoredBatch, emitted: Sequence[tuple[int, int]], decisions: Sequence[Decision]
    ) -> dict[int, Alert]:
        """Alerts by the place of their decision; emitted: (that place, row). One that cannot be explained or worded
        is published with less: without reasons, else without its event too."""
        if not emitted:
            return {}
        explain = self._explainer.explain
        try:
            return self._make(scored, emitted, decisions, explain)
        except Exception as error:
            if is_other_fault(error):
                raise
        made: dict[int, Alert] = {}
        bare = replace(scored, records=[{} for _ in scored.records])
        for place in emitted:
            for batch, why in ((scored, explain), (scored, _no_reasons)):
                try:
                    made |= self._make(batch, [place], decisions, why)
                    break
                except Exception as error:
                    if is_other_fault(error):
                        raise
                    at = scored.coordinates.label(place[1])
                    _log.error("an alert cannot be made, trying with less", at=at, exc_info=error)
            else:
                made |= self._make(bare, [place], decisions, _no_reasons)
        return made

    def _make(
        self,
        scored: ScoredBatch,
        emitted: Sequence[tuple[int, int]],
        decisions: Sequence[Decision],
        explain: Callable[[ScoredBatch, NDArray[np.intp]], list[Explanation]],
    ) -> dict[int, Alert]:
        at = np.array([row for _, row in emitted], np.intp)
        assert scored.threshold is not None, "whoever chose the rows knows the threshold"
        alerts = build_alerts(
            scored,
            at,
            explain(scored, at),
            threshold=scored.threshold[at],
            bundle_version=self._bundle,
            tenant=self._tenant,
            now_ms=self._now_ms(),
            redactor=self._redactor,
            decisions=[decisions[i] for i, _ in emitted],
        )
        return {i: alert for (i, _), alert in zip(emitted, alerts, strict=True)}

    def note(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Decision]:
        """Decide what is one story, and tell nothing: as `alerts` does before it makes them."""
        if not len(scored):
            return []
        anomalies, silenced = self._all(scored, rows), Counter[str]()
        if self._suppressing is not None:
            covering = [self._suppressing.covering(anomaly) for anomaly in anomalies]
            silenced.update(found.uid for found in covering if found is not None)
            anomalies = [anomaly for anomaly, found in zip(anomalies, covering, strict=True) if found is None]
        decisions = self.episodes.decide(anomalies, _ends(scored))
        self._suppressed += silenced
        return decisions

    def take_suppressed(self) -> Counter[str]:
        """How many events each suppression has silenced since this was last asked, by the uid of its verdict."""
        taken, self._suppressed = self._suppressed, Counter()
        return taken

    def finish(self, source: SourcePartition, offset: int, threshold: float) -> list[Alert]:
        """Close all episodes of a source that is over. offset: the one after its last."""
        self.committed({source: offset})
        decisions = self.episodes.decide([], {source: End(offset, offset, _NEVER)})
        return [self._close(decision.episode, threshold) for decision in decisions]

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        """As `EpisodeStore.identify`."""
        self.episodes.identify(topics)

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        """These offsets are committed, with the alerts that came before them."""
        self.episodes.committed(offsets)

    def anomalies(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Anomaly]:
        """What episodes need to know of these rows."""
        if not len(rows):
            return []
        records = [scored.records[row] for row in rows.tolist()]
        named = _named(records) if scored.kept is None else [scored.kept[row].named for row in rows.tolist()]
        clocks = _clocks(scored)
        at = scored.coordinates
        found = []
        for i, row in enumerate(rows.tolist()):
            entity, cause, severity = str(scored.entity[row]), str(scored.cause[row]), float(scored.severity[row])
            type_uid = records[i].get("type_uid")
            found.append(
                Anomaly(
                    at.sources[at.source[row]],
                    int(at.offset[row]),
                    int(at.index[row]),
                    int(scored.time[row]),
                    entity,
                    cause,
                    severity,
                    level(severity)[0],
                    float(scored.p_value[row]),
                    named[i],
                    type_uid if isinstance(type_uid, int) else 0,
                    _what(records[i], cause),
                    scored.redacted(row, self._redactor).entity(entity),
                    int(clocks[row]),
                )
            )
        return found

    def _all(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Anomaly]:
        """Those of the rows and of the silences that cross their threshold, in stream order."""
        found = [(int(row), 0, anomaly) for row, anomaly in zip(rows, self.anomalies(scored, rows), strict=True)]
        inactive = scored.inactive
        if inactive is None or inactive.noticed_at is None or inactive.threshold is None:
            return [anomaly for _, _, anomaly in found]
        crossing = np.flatnonzero(inactive.p_value <= inactive.threshold)
        clocks, at, numbers = _clocks(scored), scored.coordinates, _numbers(inactive)
        for silent, anomaly in zip(crossing.tolist(), self.anomalies(inactive, crossing), strict=True):
            row, number = int(inactive.noticed_at[silent]), int(numbers[silent])
            noticed_at = int(at.offset[row]), int(at.index[row]), number
            found.append((row, number, replace(anomaly, noticed_at=noticed_at, clock=int(clocks[row]))))
        return [anomaly for _, _, anomaly in sorted(found, key=lambda entry: entry[:2])]

    def _close(self, episode: Episode, threshold: float) -> Alert:
        return close_alert(
            episode, threshold=threshold, bundle_version=self._bundle, tenant=self._tenant, now_ms=self._now_ms()
        )

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _no_reasons(_: ScoredBatch, rows: NDArray[np.intp]) -> list[Explanation]:
    return [Explanation((), (), 0.0, 0.0) for _ in rows]


def _named(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """All entities of each event."""
    events, rejects = decode([Message("", 0, i, -1, orjson.dumps(record)) for i, record in enumerate(records)])
    assert not rejects, "what was decoded once can be decoded again"
    found = entities(events)
    named: list[list[str]] = [[] for _ in records]
    for row, entity in zip(found.row.tolist(), found.entity, strict=True):
        named[row].append(entity)
    return [tuple(names) for names in named]


def _what(record: Mapping[str, Any], cause: str) -> str:
    """The value that was odd, in the form in which training counted it; of a sequence, what its event was."""
    kind, _, path = cause.partition(":")
    if kind != "record":
        noticed_at = ((path, _at(record, path)) for path in _SAYS_WHAT)
        return "|".join([normalise(value, path) for path, value in noticed_at if value not in (None, "", "-")][:2])
    value = _at(record, path)
    return "" if value is None else normalise(value, path)


def _at(record: Mapping[str, Any], path: str) -> Any:
    node: Any = record
    for part in _parts(path):
        if isinstance(node, list):
            node = next(iter(node), None)
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node


@lru_cache(maxsize=4096)
def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.replace("[]", "").split("."))


def _clocks(scored: ScoredBatch) -> NDArray[np.int64]:
    """The latest event time of each event's source up to it, int64 [n] ms."""
    clocks = np.zeros(len(scored), np.int64)
    for source in range(len(scored.coordinates.sources)):
        rows = np.flatnonzero(scored.coordinates.source == source)
        clocks[rows] = np.maximum.accumulate(scored.time[rows])
    return clocks


def _ends(scored: ScoredBatch) -> dict[SourcePartition, End]:
    """What the batch holds of each source."""
    at = scored.coordinates
    ends = {}
    for number, source in enumerate(at.sources):
        rows = np.flatnonzero(at.source == number)
        if len(rows):
            offsets = at.offset[rows]
            ends[source] = End(int(offsets.min()), int(offsets.max()), int(scored.time[rows].max()))
    return ends


def _row(scored: ScoredBatch, decision: Decision) -> int | None:
    """Which row an event stands in that a decision was caused by; none for a CLOSE."""
    at = scored.coordinates
    if decision.activity == CLOSE or decision.number or decision.source not in at.sources:
        return None
    here = (at.source == at.sources.index(decision.source)) & (at.offset == decision.offset)
    rows = np.flatnonzero(here & (at.index == decision.index))
    return int(rows[0]) if len(rows) else None


def _numbers(inactive: ScoredBatch) -> NDArray[np.intp]:
    """The number of each silence among those told at its row, from 1 on, intp [k]."""
    assert inactive.noticed_at is not None
    first = np.searchsorted(inactive.noticed_at, inactive.noticed_at)
    return 1 + np.arange(len(inactive)) - first


def _silent_row(scored: ScoredBatch, inactive: ScoredBatch, decision: Decision) -> int | None:
    """Which of the silences a decision was caused by."""
    at = scored.coordinates
    if decision.activity == CLOSE or not decision.number or inactive.noticed_at is None:
        return None
    if decision.source not in at.sources:
        return None
    here = at.offset[inactive.noticed_at] == decision.offset
    here &= (at.index[inactive.noticed_at] == decision.index) & (_numbers(inactive) == decision.number)
    here &= at.source[inactive.noticed_at] == at.sources.index(decision.source)
    rows = np.flatnonzero(here)
    return int(rows[0]) if len(rows) else None


def with_threshold(
    scored: ScoredBatch, judge: Callable[[ScoredBatch], NDArray[np.float64]]
) -> tuple[ScoredBatch, NDArray[np.intp]]:
    """The batch and its silences with the threshold that each event is held against; and the rows that cross it."""
    threshold = judge(scored)
    inactive = scored.inactive
    if inactive is not None:
        inactive = replace(inactive, threshold=judge(inactive))
    return replace(scored, threshold=threshold, inactive=inactive), np.flatnonzero(scored.p_value <= threshold)


def open_episodes(settings: Settings) -> EpisodeStore:
    """The episodes of the service, in the settings' Redis; they outlive a bundle."""
    from state.redis.episodes import RedisEpisodes

    return RedisEpisodes(
        settings.redis.url,
        tenant=settings.tenant,
        timeout_s=settings.redis.timeout_s,
        retries=settings.redis.retries,
        **settings.redis.client_arguments(),
    )


def open_findings(
    settings: Settings, explainer: Explainer, episodes: EpisodeStore, suppressing: Suppressing | None = None
) -> AlertPipeline:
    """The findings of the service, explained by this explainer."""
    return AlertPipeline(
        explainer,
        episodes,
        bundle_version=explainer.bundle.version,
        tenant=settings.tenant,
        redactor=Redactor(settings.redact),
        suppressing=suppressing,
    )
