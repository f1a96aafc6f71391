"""The frame of a Detection Finding: its ids, its levels, and the attributes that a Create, an Update and a Close share.

Promises that ids are functions of the event and the decision about it, and that levels mean what `docs/alerts.md` says.
It does not know the texts of alerts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import orjson

from state.episodes import CLOSE, CREATE, UPDATE

OCSF_VERSION = "1.8.0"
NAMESPACE: UUID = uuid5(NAMESPACE_URL, "urn:ripcurrent:alerts")
_ACTIVITY = {CREATE: "Create", UPDATE: "Update", CLOSE: "Close"}
_SEVERITY = ((90, 5, "Critical"), (70, 4, "High"), (40, 3, "Medium"), (20, 2, "Low"), (0, 1, "Informational"))
_RISK = ((80, 4, "Critical"), (60, 3, "High"), (40, 2, "Medium"), (20, 1, "Low"), (0, 0, "Info"))
_CONFIDENCE = ((90, 3, "High"), (50, 2, "Medium"), (0, 1, "Low"))
try:
    _VERSION = version("ripcurrent")
except PackageNotFoundError:  # run from a copy of the sources that nobody installed
    _VERSION = "unknown"


@dataclass(frozen=True)
class Alert:
    """One message for the alert topic. uid: `metadata.uid`; key: the entity (the finding's uid where there is none), so
    that all alerts of one entity stay in order; value: the finding as JSON; row: its event's row in the batch, for an
    inactivity the row at which it was detected; -1 for a Close, which has none."""

    uid: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]
    activity: int = CREATE
    row: int = -1


@dataclass(frozen=True)
class Frame:
    """What identifies an alert. coordinates: of its event; ids: entity and cause; finding: `finding_info.uid`; now_ms:
    epoch ms at which it is made."""

    activity: int
    coordinates: str
    ids: tuple[str, str]
    finding: str
    bundle: str
    tenant: str
    now_ms: int

    @property
    def uid(self) -> str:
        return alert_uid(self.coordinates, *self.ids, self.activity, self.bundle)

    def value(self, *, severity: float, confidence: int, first_seen: int, last_seen: int, count: int) -> dict[str, Any]:
        """The attributes that Create, Update and Close share."""
        severity_id, severity_name = level(severity)
        confidence_id, confidence_name = _level(confidence, _CONFIDENCE)
        risk = round(severity * (1 + confidence / 100) / 2)
        risk_id, risk_name = _level(risk, _RISK)
        closed = self.activity == CLOSE
        return {
            "activity_id": self.activity,
            "activity_name": _ACTIVITY[self.activity],
            "category_uid": 2,
            "category_name": "Findings",
            "class_uid": 2004,
            "class_name": "Detection Finding",
            "type_uid": 200400 + self.activity,
            "type_name": f"Detection Finding: {_ACTIVITY[self.activity]}",
            "time": self.now_ms,
            "start_time": first_seen,
            "end_time": last_seen,
            "count": count,
            "severity_id": severity_id,
            "severity": severity_name,
            "confidence_id": confidence_id,
            "confidence": confidence_name,
            "confidence_score": confidence,
            "risk_level_id": risk_id,
            "risk_level": risk_name,
            "risk_score": risk,
            "risk_details": "severity, halved where the event only just crossed the alert line",
            "status_id": 4 if closed else 1,
            "status": "Resolved" if closed else "New",
            "metadata": {
                "uid": self.uid,
                "correlation_uid": self.finding,
                "tenant_uid": self.tenant,
                "version": OCSF_VERSION,
                "product": {"name": "Ripcurrent", "vendor_name": "Ripcurrent", "version": _VERSION},
                "event_code": self.ids[1],
                "processed_time": self.now_ms,
            },
            **({"is_alert": True} if self.activity == CREATE else {}),
        }

    @property
    def analytic(self) -> dict[str, Any]:
        """The part of `finding_info` that names the analytic."""
        kind = self.ids[1].partition(":")[0] or "record"
        return {
            "types": [f"{kind} anomaly"],
            "analytic": {
                "type_id": 4,
                "type": "Learning (ML/DL)",
                "name": f"Ripcurrent {kind} anomaly",
                "uid": f"ripcurrent-{kind}",
                "version": self.bundle,
                "algorithm": "residual network, nearest neighbours, conformal p-value",
            },
        }

    def alert(self, value: dict[str, Any], entity: str, row: int = -1) -> Alert:
        """The message of this value; entity: redacted."""
        headers = [
            ("ripcurrent.source", self.coordinates.encode()),
            ("ripcurrent.bundle", self.bundle.encode()),
            ("ripcurrent.tenant", self.tenant.encode()),
            ("ocsf.version", OCSF_VERSION.encode()),
            ("ocsf.class_uid", b"2004"),
            ("content-type", b"application/json"),
        ]
        key = (entity or self.finding).encode()
        return Alert(self.uid, key, orjson.dumps(value), headers, self.activity, row)


def alert_uid(coordinates: str, entity: str, cause: str, activity: int, bundle_version: str) -> str:
    """`metadata.uid`: the same decision about the same event always has the same id."""
    return _uid(coordinates, entity, cause, activity, bundle_version)


def finding_uid(first_coordinates: str, entity: str, cause: str) -> str:
    """`finding_info.uid`: shared by the Create, the Updates and the Close of one episode."""
    return _uid(first_coordinates, entity, cause)


def _uid(*parts: str | int) -> str:
    return str(uuid5(NAMESPACE, orjson.dumps(parts).decode()))


def confidence(p_value: float, threshold: float) -> int:
    """0 to 99: of 100 normal events that cross the threshold by chance, how many would lie nearer to it."""
    share = p_value / threshold if threshold > 0 else 1.0
    return min(99, max(0, round(100 * (1 - share)))) if math.isfinite(share) else 0


def level(severity: float) -> tuple[int, str]:
    """`severity_id` and `severity` of 0 to 100 points."""
    return _level(severity, _SEVERITY)


def _level(score: float, levels: Sequence[tuple[int, int, str]]) -> tuple[int, str]:
    return next(((uid, name) for least, uid, name in levels if score >= least), levels[-1][1:])
