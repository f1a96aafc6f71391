"""The alert that closes an episode after a time without further events.

It is made from the episode alone. It holds no evidence, because no event of the batch belongs to it; it names its first
and last event by their coordinates.
"""

from __future__ import annotations

from typing import Any

from state.episode_rules import TIMEOUT_MS
from state.episodes import CLOSE, Episode
from streamer.alerting import text as wording
from streamer.alerting.detection_finding import P_FLOOR, episode_fields
from streamer.alerting.finding_frame import Alert, Frame, confidence, finding_uid


def close_alert(episode: Episode, *, threshold: float, bundle_version: str, tenant: str, now_ms: int) -> Alert:
    """The Close of an episode; its id follows from its last event. threshold: as in `build_alerts`."""
    finding = finding_uid(episode.first, episode.entity, episode.cause)
    frame = Frame(CLOSE, episode.last, (episode.entity, episode.cause), finding, bundle_version, tenant, now_ms)
    value = frame.value(
        severity=episode.severity,
        confidence=confidence(max(episode.p_value, P_FLOOR), threshold),
        first_seen=episode.first_seen,
        last_seen=episode.last_seen,
        count=episode.count,
    )
    title = _title(episode)
    ends = list(dict.fromkeys((episode.first, episode.last)))
    related: list[dict[str, Any]] = [{"uid": at, "desc": f"the event at {at}"} for at in ends]
    value |= {
        "message": f"{title} (last {wording.moment(episode.last_seen)})",
        "finding_info": {
            "uid": finding,
            "title": title,
            "desc": f"Nothing more for {wording.duration(TIMEOUT_MS)}. From {wording.moment(episode.first_seen)} to "
            f"{wording.moment(episode.last_seen)}, first {episode.first}, last {episode.last}.",
            **frame.analytic,
            "created_time": now_ms,
            "first_seen_time": episode.first_seen,
            "last_seen_time": episode.last_seen,
            "related_events": related,
            "related_events_count": episode.count,
        },
        "unmapped": {
            "source": _coordinates(episode.last),
            "bundle": bundle_version,
            "entity": episode.shown,
            "cause": episode.cause,
            "line": threshold,
            "severity_score": round(episode.severity, 1),
            "episode": episode_fields(episode),
        },
    }
    return frame.alert(value, episode.shown)


def _coordinates(label: str) -> dict[str, Any]:
    topic, partition, offset, index = label.rsplit(":", 3)
    return {"topic": topic, "partition": int(partition), "offset": int(offset), "index": int(index)}


def _title(episode: Episode) -> str:
    where = wording.subject(episode.shown, {}) + wording.further_entities(" and", episode.entities - 1)
    title = f"Over: unusual {wording.cause(episode.cause)}{where}; "
    if episode.count == 1:
        return f"{title}1 event"
    return f"{title}{episode.count:,} events in {wording.duration(episode.last_seen - episode.first_seen)}"
