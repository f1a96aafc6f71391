"""Alerts made from made-up scores, and the schemas that every alert has to satisfy."""

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import jsonschema
import numpy as np
import orjson
from numpy.typing import NDArray
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.alerting.detection_finding import build_alerts
from streamer.alerting.finding_frame import OCSF_VERSION, Alert
from streamer.detection.batches import ScoredBatch
from streamer.explain.attribution import Explanation, FieldFinding

NOW = 1_790_000_000_000
Json = dict[str, Any]
ExplainedRows = list[tuple[ScoredBatch, int, Explanation]]

SCHEMA = get_ocsf_schema(version=OCSF_VERSION)
VALIDATOR = jsonschema.Draft202012Validator(
    OcsfJsonSchemaEmbedded(SCHEMA).get_class_schema(class_name="detection_finding", profiles=[])
)

WORD: Json = {
    "metadata": {"uid": "event-1", "version": "1.5.0", "product": {"name": "Sysmon"}},
    "time": 1_780_000_000_000,
    "class_uid": 4001,
    "activity_id": 1,
    "type_uid": 400101,
    "device": {"hostname": "PC-7", "type_id": 2, "os": {"name": "Windows", "type_id": 100}},
    "actor": {
        "process": {
            "pid": 812,
            "name": "winword.exe",
            "cmd_line": "winword.exe --password hunter2",
            "file": {"path": "C:\\Office\\winword.exe"},
        },
        "user": {"name": "bob"},
    },
    "src_endpoint": {"ip": "10.0.0.5", "port": "49604"},
    "dst_endpoint": {"ip": "203.0.113.9", "port": 4444},
}
PORT = FieldFinding("dst_endpoint.port", "4444", (("443", 0.92), ("80", 0.06)), 9.0)


def scored(records: Iterable[Json], cause: str = "record:dst_endpoint.port", entity: str = "host:PC-7") -> ScoredBatch:
    """A batch as the detector gives it, made by the real decoder."""
    messages = [Message("events", 3, 100 + i, NOW, orjson.dumps(record)) for i, record in enumerate(records)]
    batch, rejects = decode(messages)
    n = len(batch)
    return ScoredBatch(
        batch.coordinates,
        batch.time,
        np.full(n, 1e-5),
        np.full(n, 75, np.float32),
        np.array([entity] * n, object),
        np.array([cause] * n, object),
        batch.records,
        rejects,
    )


def explanation(*fields: FieldFinding, **more: Any) -> Explanation:
    known = ("neighbours", "window", "instead", "rates")
    neighbours, window, instead, rates = (more.get(name, ()) for name in known)
    return Explanation(fields, neighbours, 3.0, 0.5, window, instead, rates, more.get("peers"), more.get("stretch"))


def alerts(
    batch: ScoredBatch,
    explanations: list[Explanation] | None = None,
    rows: NDArray[np.intp] | None = None,
    **changes: Any,
) -> list[Alert]:
    chosen: Json = {"threshold": 1e-4, "bundle_version": "lab-3f2a", "tenant": "default", "now_ms": NOW, **changes}
    given = explanations or [explanation(PORT)] * len(batch)
    return build_alerts(batch, np.arange(len(batch)) if rows is None else rows, given, **chosen)


def one(record: Json = WORD, why: Explanation | None = None, **changes: Any) -> Json:
    batch = scored([record], **{k: changes.pop(k) for k in ("cause", "entity") if k in changes})
    (alert,) = alerts(batch, [why or explanation(PORT)], **changes)
    return check(alert)


PROFILE = jsonschema.Draft202012Validator(orjson.loads((files("streamer.alerting") / "alert.schema.json").read_bytes()))


def check(alert: Alert) -> Json:
    """It is valid OCSF and has what our own profile promises; returns it."""
    finding: Json = orjson.loads(alert.value)
    broken = [f"{e.json_path}: {e.message[:200]}" for e in PROFILE.iter_errors(finding)]
    assert not broken, broken
    errors = [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in VALIDATOR.iter_errors(finding)]
    assert not errors, errors
    assert finding["metadata"]["uid"] == alert.uid
    for observable in finding.get("observables", ()):
        assert str(resolve(finding, observable["name"])) == observable["value"]
    return finding


def resolve(finding: Json, path: str) -> Any:
    node: Any = finding
    for part in path.replace("[", ".").replace("]", "").split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
