"""What analysts say of alerts: verdicts as Detection Finding updates, and the suppressions that follow from them.

Promises that a suppression holds for one entity, one class of event and one cause, from its verdict until it ends, by
event time, so that a replay suppresses what the service did; never for everything, nor for ever. The topic of verdicts
is the record of who said what, when and why. Reads and writes no Kafka: `streamer.alerting.suppression_feed` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid5

import orjson

from state.episodes import UPDATE, Anomaly
from streamer.alerting.alert_reader import Finding, own
from streamer.alerting.finding_frame import NAMESPACE
from streamer.errors import ConfigurationError
from streamer.redaction import MASK

DAY_MS = 86_400_000
BENIGN_MS = 30 * DAY_MS
"""How long a benign verdict suppresses unless told."""
MAX_MS = 90 * DAY_MS
"""How long any may: what is normal changes, and nobody remembers."""
VERDICTS = {"true-positive": (2, "True Positive"), "benign": (5, "Benign"), "ignore": (3, "Disregard")}
_STATUS = {"true-positive": (2, "In Progress"), "benign": (4, "Resolved"), "ignore": (3, "Suppressed")}
_LEFT_OUT = ("is_alert", "evidences", "observables", "anomaly_analyses", "raw_data")
"""What the alert has said, and its verdict does not say again."""


@dataclass(frozen=True)
class Scope:
    """What is suppressed: exactly this entity (as alerts show it), class of event and cause."""

    entity: str
    class_uid: int
    cause: str

    def __str__(self) -> str:
        return f"{self.entity}, class {self.class_uid}, {self.cause}"


@dataclass(frozen=True)
class Suppression:
    """One verdict that suppresses. uid: of the verdict; since, until: event times (ms), the second not included."""

    uid: str
    scope: Scope
    since: int
    until: int
    verdict: str
    by: str
    why: str
    finding: str


def scope_of(finding: Finding) -> Scope:
    """What a verdict on this alert would be about."""
    unmapped = own(finding)
    related = finding["finding_info"].get("related_events") or [{}]
    type_uid = related[0].get("type_uid")
    kind = type_uid // 100 if isinstance(type_uid, int) else 0
    return Scope(str(unmapped.get("entity") or ""), kind, str(unmapped.get("cause") or ""))


def verdict_on(
    finding: Finding, verdict: str, *, by: str, why: str, now_ms: int, until_ms: int | None = None
) -> tuple[Finding, Suppression | None]:
    """The update that says it, and what it suppresses.

    verdict: one of VERDICTS; until_ms: when the suppression ends, None for the default of a benign verdict.

    Raises:
        ConfigurationError: nobody would be named, it would last too long, or it ends before it begins.
    """
    scope = scope_of(finding)
    uid = str(uuid5(NAMESPACE, orjson.dumps(["verdict", finding["finding_info"]["uid"], verdict, now_ms]).decode()))
    suppression = None
    if verdict != "true-positive":
        until = now_ms + BENIGN_MS if until_ms is None else until_ms
        _check(scope, now_ms, until)
        suppression = Suppression(uid, scope, now_ms, until, verdict, by, why, finding["finding_info"]["uid"])
    verdict_id, name = VERDICTS[verdict]
    status_id, status = _STATUS[verdict]
    update = {key: value for key, value in finding.items() if key not in _LEFT_OUT}
    update |= {
        "activity_id": UPDATE,
        "activity_name": "Update",
        "type_uid": 200400 + UPDATE,
        "type_name": "Detection Finding: Update",
        "time": now_ms,
        "status_id": status_id,
        "status": status,
        "verdict_id": verdict_id,
        "verdict": name,
        "assignee": {"name": by},
        "metadata": finding["metadata"] | {"uid": uid, "processed_time": now_ms, "profiles": ["incident"]},
        "unmapped": own(finding) | {"verdict": _told(scope, suppression, now_ms)},
    }
    return update | ({"comment": why} if why else {}), suppression


def _check(scope: Scope, now_ms: int, until: int) -> None:
    if not scope.entity or MASK in scope.entity or not scope.class_uid or not scope.cause:
        raise ConfigurationError(
            f"a suppression needs an entity, a class and a cause, and this alert is about {scope}: it would hide "
            "more than was looked at. Give the verdict true-positive, or mask fewer attributes (redact)"
        )
    if until <= now_ms:
        raise ConfigurationError("the suppression would end before it begins; name a later time")
    if until - now_ms > MAX_MS:
        raise ConfigurationError(f"a suppression lasts {MAX_MS // DAY_MS} days at most; say it again then if it holds")


def _told(scope: Scope, suppression: Suppression | None, now_ms: int) -> dict[str, Any]:
    """The part of a verdict that a suppression is read from; without `until` it lifts those before it."""
    told: dict[str, Any] = {"entity": scope.entity, "class_uid": scope.class_uid, "cause": scope.cause}
    told["since"] = now_ms
    return told | ({"until": suppression.until} if suppression else {})


class Suppressions:
    """All verdicts so far. A later one on the same scope takes the place of those before it."""

    def __init__(self) -> None:
        self.all: list[Suppression] = []
        self._by_scope: dict[Scope, list[int]] = {}

    def add(self, finding: Finding) -> None:
        """Take a message of the feedback topic; what is no verdict, or reaches too far, is passed over."""
        told, info = own(finding).get("verdict"), finding["finding_info"]
        if not isinstance(told, Mapping):
            return
        scope = Scope(str(told.get("entity")), _int(told.get("class_uid")), str(told.get("cause")))
        since, until = _int(told.get("since")), _int(told.get("until"))
        try:
            _check(scope, since, max(until, since + 1))
        except ConfigurationError:
            return
        for place in self._by_scope.get(scope, []):
            old = self.all[place]
            self.all[place] = replace(old, until=max(min(old.until, since), old.since))
        if until:
            by = str((finding.get("assignee") or {}).get("name", ""))
            names = {number: name for name, (number, _) in VERDICTS.items()}
            verdict = names.get(_int(finding.get("verdict_id")), "")
            why, uid = str(finding.get("comment") or ""), str(finding["metadata"].get("uid"))
            self._by_scope.setdefault(scope, []).append(len(self.all))
            self.all.append(Suppression(uid, scope, since, until, verdict, by, why, str(info.get("uid"))))

    def covering(self, anomaly: Anomaly) -> Suppression | None:
        """The suppression that holds for this event, if any."""
        places = self._by_scope.get(Scope(anomaly.shown, anomaly.type_uid // 100, anomaly.cause), ())
        found = (self.all[place] for place in places)
        return next((s for s in found if s.since <= anomaly.time < s.until), None)


@dataclass(frozen=True)
class Preview:
    """What a suppression would have silenced: how many alerts (Creates), their events, and some titles."""

    alerts: int
    events: int
    titles: tuple[str, ...]


def preview(findings: Iterable[Finding], scope: Scope) -> Preview:
    """What of these findings a suppression of this scope would have silenced."""
    counts: dict[str, int] = {}
    titles: dict[str, None] = {}
    alerts = 0
    for finding in findings:
        if scope_of(finding) == scope and finding.get("activity_id") in (1, UPDATE):
            uid = str(finding["finding_info"].get("uid"))
            counts[uid] = max(counts.get(uid, 0), _int(finding.get("count")))
            alerts += finding["activity_id"] == 1
            titles.setdefault(str(finding["finding_info"].get("title")))
    return Preview(alerts, sum(counts.values()), tuple(titles)[:5])


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0
