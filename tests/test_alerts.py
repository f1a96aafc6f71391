"""Every alert is a valid Detection Finding, says why in words, has ids that never change, and holds no secret."""

import gzip
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

import encoder.sequence_training
import encoder.training
from encoder.events import Message, decode
from state.episodes import CREATE, UPDATE, Decision, Episode
from state.windows import MemoryWindows
from streamer import wording
from streamer.alerts import build_alerts
from streamer.bundle import Bundle
from streamer.closing import close_alert
from streamer.detector import Detector, Explanation, FieldFinding, RateFinding, ScoredBatch
from streamer.finding import OCSF_VERSION, Alert, confidence
from streamer.fitting import fit
from streamer.observables import EVIDENCE, OBSERVABLE_TYPES, Leaf, Shape, evidence, observables
from streamer.peers import flatten
from streamer.redaction import Redactor
from streamer.simulate import schedule, simulate, write

DATA = os.environ.get("RIPCURRENT_EVAL_DATA")
STREAMS = ("flows-nsl", "windows-a", "sequences-hdfs", "cloud")
NOW = 1_790_000_000_000
Json = dict[str, Any]
Told = list[tuple[ScoredBatch, int, Explanation]]

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
    return Explanation(fields, more.get("neighbours", ()), 3.0, 0.5, more.get("window", ()))


def alerts(
    batch: ScoredBatch,
    explanations: list[Explanation] | None = None,
    rows: NDArray[np.intp] | None = None,
    **changes: Any,
) -> list[Alert]:
    chosen: Json = {"line": 1e-4, "bundle_version": "lab-3f2a", "tenant": "default", "now_ms": NOW, **changes}
    told = explanations or [explanation(PORT)] * len(batch)
    return build_alerts(batch, np.arange(len(batch)) if rows is None else rows, told, **chosen)


def one(record: Json = WORD, told: Explanation | None = None, **changes: Any) -> Json:
    batch = scored([record], **{k: changes.pop(k) for k in ("cause", "entity") if k in changes})
    (alert,) = alerts(batch, [told or explanation(PORT)], **changes)
    return check(alert)


PROFILE = jsonschema.Draft202012Validator(orjson.loads((files("streamer") / "alert.schema.json").read_bytes()))


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


def test_the_validator_refuses_what_is_wrong() -> None:
    finding = one()
    for path, value in (("score", 1), ("class_uid", 2001), ("finding_info", {}), ("time", "now")):
        assert list(VALIDATOR.iter_errors({**finding, path: value})), path


def test_the_profile_refuses_what_breaks_its_promises() -> None:
    finding = one()
    PROFILE.check_schema(PROFILE.schema)
    assert not list(PROFILE.iter_errors(finding))
    for path, value in (("is_alert", False), ("count", 0), ("class_uid", 2001), ("activity_id", 3), ("evidences", ...)):
        wrong = {k: v for k, v in (finding | {path: value}).items() if v is not ...}
        assert list(PROFILE.iter_errors(wrong)), path
    for path, value in (("p_value", 1e-62), ("episode", {}), ("score", 1), ("cause", ...)):
        wrong = {k: v for k, v in (finding["unmapped"] | {path: value}).items() if v is not ...}
        assert list(PROFILE.iter_errors(finding | {"unmapped": wrong})), path


def test_an_alert_says_who_did_what_and_what_is_usual() -> None:
    finding = one()
    title = "Unusual destination port 4444 in network activity of process winword.exe of user bob on host PC-7"
    assert finding["finding_info"]["title"] == f"{title}; usually 443 (92 %)"
    assert finding["message"].startswith(title)
    desc = finding["finding_info"]["desc"]
    assert "destination port (dst_endpoint.port): 4444; usually 443 (92 %); expected 1 in 8,100." in desc
    assert "events:3:100:0" in desc
    assert "6 times as far" in desc


def test_every_part_that_an_analyst_needs_is_there() -> None:
    finding = one()
    info = finding["finding_info"]
    assert (finding["activity_id"], finding["type_uid"], finding["is_alert"]) == (CREATE, 200401, True)
    assert (finding["severity_id"], finding["severity"], finding["status_id"]) == (4, "High", 1)
    assert (finding["confidence_score"], finding["confidence_id"], finding["risk_score"]) == (90, 3, 71)
    assert finding["time"] == NOW
    assert info["first_seen_time"] == info["last_seen_time"] == finding["start_time"] == WORD["time"]
    assert (info["analytic"]["type_id"], info["analytic"]["version"]) == (4, "lab-3f2a")
    assert info["related_events"][0]["uid"] == "event-1"
    assert info["related_events"][0]["type_uid"] == 400101
    assert finding["unmapped"]["source"] == {"topic": "events", "partition": 3, "offset": 100, "index": 0}
    assert finding["evidences"][0]["src_endpoint"]["port"] == 49604, "text where a number belongs is read"
    assert finding["evidences"][0]["actor"]["process"]["file"]["name"] == "winword.exe"
    assert {(o["value"], o["type_id"]) for o in finding["observables"]} == {
        ("bob", 4),
        ("winword.exe", 9),
        ("winword.exe", 7),
        ("812", 15),
        ("C:\\Office\\winword.exe", 45),
        ("PC-7", 1),
        ("10.0.0.5", 2),
        ("49604", 11),
        ("203.0.113.9", 2),
        ("4444", 11),
    }, "the command line is evidence, but with its secret masked it can be searched for nowhere"
    analysis = finding["anomaly_analyses"][0]
    assert analysis["anomalies"][0]["observations"] == [{"value": "4444"}]
    assert analysis["baselines"][0]["observed_pattern"] == "443 (92 %), 80 (6 %)"
    assert json.loads(finding["raw_data"])["device"]["hostname"] == "PC-7"


def test_the_documented_alert_is_the_one_that_comes_out() -> None:
    page = (Path(__file__).parent.parent / "docs" / "alerts.md").read_text()
    finding = one(
        told=explanation(PORT, neighbours=({"dst_endpoint.port": "443", "actor.process.name": "winword.exe"},))
    )
    finding["metadata"]["product"]["version"] = "0.1.0"
    assert json.loads(page.split("```json\n")[1].split("```")[0]) == finding
    undocumented = [name for name in finding if f"`{name}" not in page]
    assert undocumented == []


def test_headers_find_the_event_without_reading_the_alert() -> None:
    (alert,) = alerts(scored([WORD]))
    assert dict(alert.headers) == {
        "ripcurrent.source": b"events:3:100:0",
        "ripcurrent.bundle": b"lab-3f2a",
        "ripcurrent.tenant": b"default",
        "ocsf.version": b"1.8.0",
        "ocsf.class_uid": b"2004",
        "content-type": b"application/json",
    }
    assert alert.key == b"host:PC-7"
    (nameless,) = alerts(scored([WORD], entity=""))
    assert nameless.key.decode() == check(nameless)["finding_info"]["uid"]


def test_ids_never_change_and_tell_events_entities_causes_and_bundles_apart() -> None:
    assert one()["metadata"]["uid"] == "bf863aac-7d5b-584d-97dd-573d3bc18899"
    uids = {one()["metadata"]["uid"], one(now_ms=NOW + 1)["metadata"]["uid"], one(line=2e-4)["metadata"]["uid"]}
    assert len(uids) == 1
    for change in ({"entity": "user:bob"}, {"cause": "record:x"}, {"bundle_version": "other"}):
        uids.add(one(**change)["metadata"]["uid"])
    uids.update(alert.uid for alert in alerts(scored([WORD, WORD])))
    assert len(uids) == 5, "the first of the two equal events is the one above"
    assert one(bundle_version="other")["finding_info"]["uid"] == one()["finding_info"]["uid"]


STORY = Episode(
    *("events:3:7:0", "events:3:100:0", "host:PC-7", "host:PC-7", "record:dst_endpoint.port"),
    *(1_779_999_400_000, 1_780_000_000_000, 12, 3, 95.0, 5, 1e-9),
    ("record:dst_endpoint.port", "sequence:order"),
    ("host:PC-8", "host:PC-9"),
)


def test_an_episode_keeps_its_finding_and_only_its_create_is_an_alert() -> None:
    story = [Decision(activity, ("events", 3), 100, 0, STORY) for activity in (CREATE, UPDATE)]
    made = alerts(scored([WORD] * 2), decisions=story)
    made.append(close_alert(STORY, line=1e-4, bundle_version="lab-3f2a", tenant="default", now_ms=NOW))
    found = [check(alert) for alert in made]
    assert len({f["finding_info"]["uid"] for f in found}) == 1
    assert len({f["metadata"]["uid"] for f in found}) == 3
    assert len({alert.key for alert in made}) == 1
    assert [f.get("is_alert") for f in found] == [True, None, None]
    assert [f["type_uid"] for f in found] == [200401, 200402, 200403]
    assert [f["status"] for f in found] == ["New", "New", "Resolved"]
    assert {(f["count"], f["start_time"], f["end_time"]) for f in found} == {(12, STORY.first_seen, STORY.last_seen)}
    assert {f["severity"] for f in found} == {"Critical"}, "the worst of the episode, not the last"
    assert [f["unmapped"]["episode"]["events"] for f in found] == [12] * 3


def test_an_episode_says_how_many_where_and_that_it_is_over() -> None:
    (made,) = alerts(scored([WORD]), decisions=[Decision(UPDATE, ("events", 3), 100, 0, STORY)])
    info = check(made)["finding_info"]
    assert info["title"].endswith("; usually 443 (92 %); the same at 2 others")
    assert (
        "So far 12 such events in 10 min, the first at events:3:7:0 (destination port, order of events). "
        "Also at host:PC-8, host:PC-9."
    ) in info["desc"]
    closed = close_alert(STORY, line=1e-4, bundle_version="b", tenant="t", now_ms=NOW)
    info = check(closed)["finding_info"]
    assert info["title"] == "Over: unusual destination port of host PC-7 and at 2 others; 12 events in 10 min"
    assert {event["uid"] for event in info["related_events"]} == {"events:3:7:0", "events:3:100:0"}
    single = replace(STORY, last=STORY.first, last_seen=STORY.first_seen, count=1, entities=1, others=())
    (alone,) = [check(close_alert(single, line=1e-4, bundle_version="b", tenant="t", now_ms=NOW))["finding_info"]]
    assert alone["title"] == "Over: unusual destination port of host PC-7; 1 event"


def test_history_that_is_missing_and_p_values_beyond_measure_are_said() -> None:
    batch = scored([WORD, WORD])
    batch.p_value[:] = 1e-62
    known, missing = [check(a) for a in alerts(replace(batch, complete=np.array([True, False])))]
    assert known["unmapped"]["p_value"] == 1e-12
    assert "history_complete" not in known["unmapped"]
    assert missing["unmapped"]["history_complete"] is False
    assert "is not known, so it may look more unusual than it is" in missing["finding_info"]["desc"]


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        alerts(scored([WORD, WORD]), [explanation(PORT)])


def test_a_sequence_tells_its_time_and_its_worst_event() -> None:
    start = WORD["time"]
    window = tuple((start - 60_000 * (8 - i), f"events:3:{i}:0", f"logon to HOST-{i}", 0.1 * i) for i in range(5))
    finding = one(told=explanation(window=window), cause="sequence:rate", entity="user:bob")
    assert finding["finding_info"]["title"].endswith("on host PC-7: 5 events in 4 min, least expected logon to HOST-4")
    assert finding["finding_info"]["title"].startswith("Unusual rate of events of process winword.exe of user bob")
    assert finding["start_time"] == start - 8 * 60_000
    assert len(finding["finding_info"]["related_events"]) == 6
    assert finding["unmapped"]["timeline"][4]["share"] == pytest.approx(0.4)


def test_a_rate_is_told_with_its_number_and_what_was_usual() -> None:
    def told(cause: str, entity: str, rate: RateFinding) -> Json:
        explained = [replace(explanation(PORT), rate=rate)]
        return check(alerts(scored([WORD], cause, entity), explained)[0])

    failures = told("rate:failures.day", "user:bob", RateFinding("failures", "day", 23.4, 3.0, own=True))
    title = "Unusually many failures of user bob: about 23 failures within a day; never more than 3 before"
    assert failures["finding_info"]["title"] == title
    assert failures["finding_info"]["analytic"]["uid"] == "ripcurrent-rate"
    first = failures["anomaly_analyses"][0]["anomalies"][0]
    assert (first["observation_parameter"], first["observations"]) == ("failures.day", [{"value": "23"}])
    sent = told("rate:bytes.hour", "host:PC-7", RateFinding("bytes", "hour", 41_200_000.0, 0.0, own=False))
    much = "Unusually much data of host PC-7: about 41.2 MB sent within two hours; others like it seldom have any"
    assert sent["finding_info"]["title"] == much


def test_the_nearest_normal_event_and_what_differs() -> None:
    neighbour = {"dst_endpoint.port": "443", "actor.process.name": "winword.exe", "metadata.uid": "other"}
    desc = one(told=explanation(PORT, neighbours=(neighbour,)))["finding_info"]["desc"]
    assert "The nearest normal event differs in destination port (4444 here, 443 there)." in desc


TITLES = [
    (FieldFinding("status_id", "2", (("1", 0.99),), 5), 3002, "Unusual outcome failure in authentication"),
    (
        FieldFinding("type_uid", "100702", (("100701", 0.97),), 5),
        1007,
        "Unusual kind of event process activity: terminate of process",
    ),
    (
        FieldFinding("traffic.bytes_out", "43133000", (), 5),
        4001,
        "Unusual bytes sent 43.1 MB in network activity of",
    ),
    (FieldFinding("unmapped.serror_rate", "1", (), 5), 4001, "Unusual serror rate 1 in network activity"),
    (
        FieldFinding("actor.user.name", "", (("bob", 0.7),), 5),
        6003,
        "No user in API activity of process winword.exe on",
    ),
    (
        FieldFinding("actor.process.name", "evil.exe", (), 5),
        1007,
        "Unusual acting process evil.exe in process activity",
    ),
    (FieldFinding("actor.process.cmd_line", "x" * 500, (), 5), 1007, f"Unusual command line {'x' * 53}…{'x' * 26} in"),
    (FieldFinding("activity_id", "4", (("2", 0.8),), 5), 6003, "Unusual activity delete in API activity"),
]


@pytest.mark.parametrize(("field", "class_uid", "begins"), TITLES)
def test_titles_speak_of_things_not_of_paths(field: FieldFinding, class_uid: int, begins: str) -> None:
    title = one({**WORD, "class_uid": class_uid}, explanation(field), cause=f"record:{field.path}")["finding_info"][
        "title"
    ]
    assert title.startswith(begins)
    assert len(title) < 320


ODD = "rundll32.exe does not usually do this: unusual destination port 4444 in network activity of process winword.exe"
MORE_TITLES = [
    (FieldFinding("dst_endpoint.port", "4444", (), 7, given="rundll32.exe"), ODD),
    (
        FieldFinding("actor.process.name", "winword.exe", (), 7, new=True),
        "Never seen before: acting process winword.exe in network activity of user bob on host PC-7",
    ),
    (
        FieldFinding("traffic.bytes_out", "559000", (("304 to 24700", 0.9),), 6),
        "Unusually high bytes sent 559 kB in network activity of process winword.exe of user bob on host PC-7; "
        "usually 304 to 24.7 kB (90 %)",
    ),
    (
        FieldFinding("unmapped.same_srv_rate", "0.05", (("0.99 to 1", 0.9),), 6),
        "Unusually low same service rate 0.05 in network activity of process winword.exe of user bob on host PC-7; "
        "usually 0.99 to 1 (90 %)",
    ),
    (FieldFinding("actor.session.is_mfa", "false", (), 6), "Unusual use of a second factor: no in network activity"),
]


@pytest.mark.parametrize(("field", "begins"), MORE_TITLES)
def test_titles_say_whether_it_is_new_high_low_or_odd_for_whom(field: FieldFinding, begins: str) -> None:
    assert one(told=explanation(field), cause=f"record:{field.path}")["finding_info"]["title"].startswith(begins)


def test_numbers_have_units_and_names_stay_as_they_are() -> None:
    assert wording.value("traffic.bytes", "43133000", {}) == "43.1 MB"
    assert wording.value("traffic.bytes", "over 4200", {}) == "over 4.2 kB"
    assert wording.value("duration", "388", {}) == "388 ms"
    assert wording.value("dst_endpoint.port", "44444", {}) == "44444"
    assert wording.value("process.pid", "12345", {}) == "12345"
    assert wording.value("unmapped.rate", "0.333333", {}) == "0.333"
    assert wording.value("privileges", '["SeDebug","SeLoad"]', {}) == "SeDebug, SeLoad"
    told = {"type_uid": 300201, "status_id": 2, "dst_endpoint.hostname": "WS-7"}
    assert wording.told(told) == "authentication: logon, failure, WS-7"


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Told]:
    """A detector fitted to two simulated days, its training cut short, and the oddest of a third day."""
    folder = tmp_path_factory.mktemp("alerts")
    days = list(simulate(seed=5, days=3, events_per_day=2_600, incidents=schedule(3, clean=2)))
    write(days[:2], folder / "train.ndjson.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.training, "STEPS", 200)
        patch.setattr(encoder.sequence_training, "STEPS", 100)
        bundle = fit([folder / "train.ndjson.gz"], folder / "bundle").bundle
    return explained(bundle, days[2].events, each=4)


def explained(bundle: Bundle, lines: Sequence[bytes], each: int) -> tuple[Detector, Told]:
    """The most unusual of each batch, by record and by sequence, explained as the service does: right after scoring."""
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
    stream = [Message("events", 0, i, NOW, line) for i, line in enumerate(lines)]
    found: Told = []
    for start in range(0, len(stream), 256):
        batch = detector.score(stream[start : start + 256])
        by_sequence = np.array([cause.startswith("sequence:") for cause in batch.cause])
        for kind in (by_sequence, ~by_sequence):
            rows = np.flatnonzero(kind)
            rows = rows[np.argsort(batch.p_value[rows], kind="stable")[:each]]
            found += [(batch, int(r), e) for r, e in zip(rows, detector.explain(batch, rows), strict=True)]
    return detector, found


def test_a_fitted_detector_explains_in_words(day: tuple[Detector, Told]) -> None:
    _, told = day
    assert {batch.cause[row].partition(":")[0] for batch, row, _ in told} >= {"record", "sequence"}
    for batch, row, why in told:
        (alert,) = alerts(batch, [why], np.array([row]))
        info = check(alert)["finding_info"]
        assert why.fields or why.window
        for field in why.fields:
            assert field.observed not in [text for text, _ in field.expected], "what was expected did happen"
            assert not any(set("{}#*") & set(text) for text, _ in field.expected if field.path != "process.cmd_line")
        assert "a rare value" not in info["desc"]
        assert len(info["title"]) < 400
        assert not why.window or batch.cause[row].startswith("sequence:")
    assert any(why.window for _, _, why in told)


def test_explaining_an_alert_takes_milliseconds(day: tuple[Detector, Told]) -> None:
    detector, ((batch, _, _), *_) = day
    detector.explain(batch, np.arange(3))
    started = time.process_time()
    detector.explain(batch, np.arange(50))
    per_alert = (time.process_time() - started) / 50
    assert per_alert < 0.02, f"{per_alert * 1e3:.0f} ms an alert"


def test_two_usual_values_are_named_and_rare_ones_are_not() -> None:
    def usual(*expected: tuple[str, float]) -> str:
        return wording.usually("dst_endpoint.port", "4444", expected, {})

    assert usual(("443", 0.48), ("80", 0.31), ("53", 0.1)) == "usually 443 (48 %) or 80 (31 %)"
    assert usual(("443", 0.998)) == "usually 443 (over 99 %)"
    assert usual(("4444", 0.9), ("443", 0.04)) == ""


def test_rarity_and_confidence_in_words() -> None:
    assert wording.one_in(9.0) == "1 in 8,100"
    assert wording.one_in(0.0) == "every time"
    assert wording.one_in(100.0) == "less than 1 in a billion"
    assert wording.one_in(float("nan")) == "every time"
    assert [confidence(p, 1e-4) for p in (1e-4, 5e-5, 1e-5, 0.0, 1.0)] == [0, 50, 90, 99, 0]


def test_no_secret_leaves_in_an_alert() -> None:
    record = {
        **WORD,
        "api": {"operation": "x", "token": {"value": "hunter2"}},
        "unmapped": {"note": "postgres://bob:hunter2@db/x", "password": "hunter2"},
    }
    told = explanation(
        FieldFinding("actor.process.cmd_line", "winword.exe --password hunter2", (("a --password hunter2", 0.9),), 5),
        FieldFinding("unmapped.password", "hunter2", (("hunter2", 0.5),), 5),
        neighbours=({"actor.process.cmd_line": "x --password hunter2", "unmapped.password": "hunter2"},),
        window=((WORD["time"], "events:3:1:0", "run --password hunter2", 0.5),),
    )
    for cause in ("record:actor.process.cmd_line", "sequence:order"):
        (alert,) = alerts(scored([record], cause), [told])
        check(alert)
        assert b"hunter2" not in alert.value


def test_listed_attributes_are_nowhere_in_the_alert_nor_its_key() -> None:
    told = explanation(FieldFinding("actor.user.name", "bob", (("alice", 0.9),), 5))
    batch = scored([WORD], cause="record:actor.user.name", entity="user:bob")
    (alert,) = alerts(batch, [told], redactor=Redactor(["actor.user.name"]))
    check(alert)
    assert alert.key == b"user:[masked]"
    assert b"bob" not in alert.value
    assert b"alice" not in alert.value


def test_a_huge_event_makes_a_small_alert_that_says_so() -> None:
    (alert,) = alerts(scored([{**WORD, "unmapped": {str(i): "y" * 3000 for i in range(500)}}]))
    finding = check(alert)
    assert len(alert.value) < 64 * 1024
    assert finding["metadata"]["is_truncated"]
    assert not one()["metadata"].get("is_truncated")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["-", "443", "2026-07-03T08:00:00Z", "C:\\", "/", "GET"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def objects(wanted: Leaf | Shape | list[Shape], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that fit, nearly fit, or do not fit at all."""
    if isinstance(wanted, Leaf):
        return SCALARS
    if isinstance(wanted, list):
        return st.lists(objects(wanted[0], depth + 1), max_size=2) | SCALARS
    optional = {name: objects(inner, depth + 1) for name, inner in wanted.attributes.items()} if depth < 4 else {}
    return st.fixed_dictionaries({}, optional=optional) | ANYTHING


EVENTS = st.builds(
    lambda known, rest: {**rest, **known},
    st.fixed_dictionaries(
        {},
        optional={
            **{name: objects(inner, 1) for name, inner in EVIDENCE.attributes.items()},
            **dict.fromkeys(
                ("class_uid", "type_uid", "activity_id", "time", "unmapped", "module", "class_name"), ANYTHING
            ),
            "metadata": st.fixed_dictionaries({}, optional=dict.fromkeys(("uid", "product", "version"), ANYTHING))
            | ANYTHING,
        },
    ),
    st.dictionaries(st.text(max_size=8), ANYTHING, max_size=4),
)
FIELDS = st.builds(
    FieldFinding,
    st.one_of(
        st.text(max_size=20), st.sampled_from(["dst_endpoint.port", "type_uid", "activity_id", "resources[].uid"])
    ),
    st.text(max_size=20) | st.integers().map(str),
    st.lists(st.tuples(st.text(max_size=8), st.floats()), max_size=3).map(tuple),
    st.floats(),
)
NAMES = st.builds("{}{}".format, st.sampled_from(["", "record:", "sequence:", "user:", "ip:"]), st.text(max_size=12))
EXPLANATIONS = st.builds(
    Explanation,
    st.lists(FIELDS, max_size=3).map(tuple),
    st.lists(st.dictionaries(st.text(max_size=8), SCALARS, max_size=3), max_size=2).map(tuple),
    st.floats(),
    st.floats(),
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(max_size=8), st.text(), st.floats()), max_size=3).map(
        tuple
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(EVENTS, EXPLANATIONS, NAMES, NAMES, st.floats(0, 1), st.floats())
def test_any_event_and_any_explanation_make_a_valid_alert(
    record: Json, told: Explanation, entity: str, cause: str, p_value: float, severity: float
) -> None:
    batch = scored([record], cause, entity)
    batch.p_value[:] = p_value
    with np.errstate(over="ignore"):
        batch.severity[:] = severity
    (alert,) = alerts(batch, [told])
    check(alert)


def test_shapes_and_observable_types_are_those_of_the_schema() -> None:
    captions = SCHEMA["objects"]["observable"]["attributes"]["type_id"]["enum"]
    types = SCHEMA["dictionary"]["types"]["attributes"]
    published = VALIDATOR.schema["$defs"]
    kinds = {"string": str, "integer": int, "boolean": bool}
    assert {uid: captions[str(uid)]["caption"] for uid in OBSERVABLE_TYPES} == OBSERVABLE_TYPES

    def walk(name: str, shape: Shape) -> None:
        theirs, known = published[name.replace("/", "_")], SCHEMA["objects"][name]["attributes"]
        assert set(theirs.get("required", ())) == set(shape.required), name
        if name != "evidences":
            allowed = {choice for option in theirs.get("anyOf", ()) for choice in option["required"]}
            assert set(shape.one_of) <= allowed and bool(shape.one_of) == bool(allowed), name
        for attribute, wanted in shape.attributes.items():
            where, own = f"{name}.{attribute}", known[attribute]
            schema = theirs["properties"][attribute]
            if isinstance(wanted, Leaf):
                assert kinds[schema["type"]] is wanted.kind, where
                assert set(schema.get("enum", ())) == wanted.allowed, where
                observable = own.get("observable") or types.get(own["type"], {}).get("observable") or 0
                assert observable == wanted.observable, where
            else:
                assert isinstance(wanted, list) == (schema.get("type") == "array"), where
                walk(own["object_type"], wanted if isinstance(wanted, Shape) else wanted[0])

    walk("evidences", EVIDENCE)


def read(path: Path, limit: int) -> list[Json]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return [orjson.loads(text) for text in lines][:: 1 if limit == 0 else limit]


def guessed(records: list[Json]) -> list[Explanation]:
    """Explanations in the form of the real ones: a few values of each event, and another event as its neighbour."""
    flat = [{k: str(v) for k, v in flatten(record).items()} for record in records]
    told = []
    for row, event in enumerate(flat):
        paths = sorted(event)[row % 7 :: 5][:5]
        other = flat[row // 2]
        fields = [FieldFinding(p, event[p], ((other.get(p, ""), 0.7), ("0", 0.2)), 7.5) for p in paths]
        told.append(explanation(*fields, neighbours=(dict(list(other.items())[:12]),)))
    return told


@pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")
@pytest.mark.parametrize("name", [*STREAMS, "ocsf-examples"])
def test_real_events_make_valid_alerts_quickly(name: str) -> None:
    examples = name == "ocsf-examples"
    records = read(
        Path(DATA or "") / (f"{name}.ndjson" if examples else f"{name}.test.ndjson.gz"), 0 if examples else 97
    )
    batch = scored(records)
    told = guessed(batch.records)
    alerts(batch, told)
    started = time.perf_counter()
    made = alerts(batch, told)
    per_alert = (time.perf_counter() - started) / len(made)
    for alert in made:
        check(alert)
    assert len(made) == len(records)
    assert per_alert < 1e-3, f"{per_alert * 1e6:.0f} us an alert"


@given(
    st.ip_addresses().map(str) | st.from_regex(r"[0-9a-f:.]{1,45}", fullmatch=True), st.emails() | st.text(max_size=9)
)
def test_addresses_are_kept_where_the_schema_knows_them_as_such(ip: str, email: str) -> None:
    one({"src_endpoint": {"ip": ip, "mac": ip}, "user": {"name": "x", "email_addr": email}, "device": {"ip": ip}})


def test_a_name_where_an_address_belongs_stays_a_name() -> None:
    assert evidence({"src_endpoint": {"ip": "AWS Internal"}})["src_endpoint"] == {"name": "AWS Internal"}
    assert evidence({"src_endpoint": {"ip": "fe80::1%eth0", "port": 70000}})["src_endpoint"] == {"ip": "fe80::1"}


def test_evidence_keeps_nothing_that_is_not_evidence() -> None:
    assert evidence({"actor": "bob", "device": {"hostname": 7}, "process": {"name": "no id"}, "file": {"size": 1}}) == {
        "device": {"hostname": "7", "type_id": 0}
    }
    assert evidence({"module": {"file": {"path": "/lib/x.so"}}})["file"]["name"] == "x.so"
    assert observables({"actor": {"user": {"name": "-"}}}, "e") == []


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_makes_valid_alerts_with_a_fitted_detector(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.training, "STEPS", 200)
    monkeypatch.setattr(encoder.sequence_training, "STEPS", 100)
    bundle = fit([Path(DATA or "") / f"{name}.train.ndjson.gz"], tmp_path / "bundle").bundle
    with gzip.open(Path(DATA or "") / f"{name}.test.ndjson.gz") as lines:
        _, told = explained(bundle, list(lines), each=2)
    for batch, row, why in told:
        check(alerts(batch, [why], np.array([row]))[0])
