"""Verdicts of analysts on alerts, as updates of Detection Findings, and the suppressions that follow from them.

Promises that a suppression covers one entity, one class of event and one cause, from its verdict until its end in event
time, so that a replay suppresses what the service did; no suppression is unlimited in scope or time. The topic of
verdicts records who decided what, when and why. It does not use Kafka: `streamer.alerting.suppression_feed` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid5

import orjson

from state.episodes import UPDATE, Anomaly
from streamer.alerting.alert_reader import Finding, integer, own
from streamer.alerting.finding_frame import NAMESPACE
from streamer.errors import ConfigurationError
from streamer.redaction import MASK

DAY_MS = 86_400_000
BENIGN_MS = 30 * DAY_MS
"""How long a benign verdict suppresses by default."""
MAX_MS = 90 * DAY_MS
"""The longest suppression: what is normal changes, and forgotten suppressions hide alerts."""
MAX_LEARNED = 32
"""Attributes of one verdict of which nothing may be learned."""
VERDICTS = {"true-positive": (2, "True Positive"), "benign": (5, "Benign"), "ignore": (3, "Disregard")}
_STATUS = {"true-positive": (2, "In Progress"), "benign": (4, "Resolved"), "ignore": (3, "Suppressed")}
_NOT_REPEATED = ("is_alert", "evidences", "observables", "anomaly_analyses", "raw_data")
"""Attributes of the alert that its verdict does not repeat."""


@dataclass(frozen=True)
class Scope:
    """What a suppression covers: exactly one entity (as alerts show it), class of event and cause."""

    entity: str
    class_uid: int
    cause: str

    def __str__(self) -> str:
        return f"{self.entity}, class {self.class_uid}, {self.cause}"


@dataclass(frozen=True)
class Suppression:
    """One suppressing verdict. uid: of the verdict; since, until: event times (ms), until not included."""

    uid: str
    scope: Scope
    since: int
    until: int
    verdict: str
    by: str
    why: str
    finding: str


def scope_of(finding: Finding) -> Scope:
    """The scope of a verdict on this alert."""
    unmapped = own(finding)
    related = finding["finding_info"].get("related_events") or [{}]
    type_uid = related[0].get("type_uid")
    kind = type_uid // 100 if isinstance(type_uid, int) else 0
    return Scope(str(unmapped.get("entity") or ""), kind, str(unmapped.get("cause") or ""))


def verdict_on(
    finding: Finding, verdict: str, *, by: str, why: str, now_ms: int, until_ms: int | None = None
) -> tuple[Finding, Suppression | None]:
    """The update that states the verdict, and the suppression that follows (None for a true positive).

    verdict: one of VERDICTS; until_ms: when the suppression ends, None for the default of a benign verdict.

    Raises:
        ConfigurationError: the scope is not complete, the suppression is too long, or it ends before it begins.
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
    update = {key: value for key, value in finding.items() if key not in _NOT_REPEATED}
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
        "unmapped": own(finding) | {"verdict": _verdict_fields(scope, suppression, now_ms) | _learned(finding)},
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


def _verdict_fields(scope: Scope, suppression: Suppression | None, now_ms: int) -> dict[str, Any]:
    """The part of a verdict from which suppressions are read; without `until` it lifts earlier ones."""
    fields: dict[str, Any] = {"entity": scope.entity, "class_uid": scope.class_uid, "cause": scope.cause}
    fields["since"] = now_ms
    return fields | ({"until": suppression.until} if suppression else {})


def _learned(finding: Finding) -> dict[str, Any]:
    """What the live calibration may learn, or has, of the events that an alert is about."""
    fields, related = own(finding), finding["finding_info"].get("related_events") or [{}]
    lowered = fields.get("lowered") or {}
    attributes = {*fields.get("new_values", ()), *(name.partition("#")[0] for name in lowered.get("fields", ()))}
    if lowered.get("parts"):
        attributes.add("")
    return {"type_uid": related[0].get("type_uid"), "learned": sorted(attributes)} if attributes else {}


class Suppressions:
    """All suppressions so far. A later verdict on the same scope replaces earlier ones.

    withdrawn: (event type, attribute) -> event time (ms) until which the live calibration learns nothing of it, because
    of a true positive ("" for its parts).
    """

    def __init__(self) -> None:
        self.withdrawn: dict[tuple[str, str], int] = {}
        self.all: list[Suppression] = []
        self._by_scope: dict[Scope, list[int]] = {}

    def add(self, finding: Finding) -> None:
        """Add a message of the feedback topic; one that is not a valid verdict is ignored."""
        fields, info = own(finding).get("verdict"), finding["finding_info"]
        if not isinstance(fields, Mapping):
            return
        scope = Scope(str(fields.get("entity")), integer(fields.get("class_uid")), str(fields.get("cause")))
        since, until = integer(fields.get("since")), integer(fields.get("until"))
        learned = fields.get("learned")
        for attribute in learned[:MAX_LEARNED] if isinstance(learned, list) else ():
            key = str(fields.get("type_uid")), str(attribute)
            if until:
                self.withdrawn.pop(key, None)
            else:
                self.withdrawn[key] = since + BENIGN_MS
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
            verdict = names.get(integer(finding.get("verdict_id")), "")
            why, uid = str(finding.get("comment") or ""), str(finding["metadata"].get("uid"))
            self._by_scope.setdefault(scope, []).append(len(self.all))
            self.all.append(Suppression(uid, scope, since, until, verdict, by, why, str(info.get("uid"))))

    def covering(self, anomaly: Anomaly) -> Suppression | None:
        """The suppression that covers this event, if any."""
        places = self._by_scope.get(Scope(anomaly.shown, anomaly.type_uid // 100, anomaly.cause), ())
        candidates = (self.all[place] for place in places)
        return next((s for s in candidates if s.since <= anomaly.time < s.until), None)


@dataclass(frozen=True)
class Preview:
    """What a suppression would have covered: the number of alerts (Creates), of their events, and some titles."""

    alerts: int
    events: int
    titles: tuple[str, ...]


def preview(findings: Iterable[Finding], scope: Scope) -> Preview:
    """What a suppression of this scope would have covered among these findings."""
    counts: dict[str, int] = {}
    titles: dict[str, None] = {}
    alerts = 0
    for finding in findings:
        if scope_of(finding) == scope and finding.get("activity_id") in (1, UPDATE):
            uid = str(finding["finding_info"].get("uid"))
            counts[uid] = max(counts.get(uid, 0), integer(finding.get("count")))
            alerts += finding["activity_id"] == 1
            titles.setdefault(str(finding["finding_info"].get("title")))
    return Preview(alerts, sum(counts.values()), tuple(titles)[:5])
