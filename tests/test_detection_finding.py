"""Every alert is a valid Detection Finding, says why, has ids that never change, and holds no secret."""

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import (
    NOW,
    PORT,
    PROFILE,
    VALIDATOR,
    WORD,
    ExplainedRows,
    Json,
    alerts,
    check,
    explanation,
    one,
    scored,
)
from cpu_time import least_cpu_s
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import encoder.training.replaced_fields
import encoder.training.sequence
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import KINDS
from encoder.ocsf.events import Message
from state.episodes import CREATE, UPDATE, Decision, Episode
from state.memory.windows import MemoryWindows
from streamer.alerting.close_alert import close_alert
from streamer.alerting.observables import EVIDENCE, Leaf, Shape
from streamer.alerting.text import SUMMARY_PATHS
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector
from streamer.detection.live_calibration import Lowered
from streamer.devtools.simulator.generator import schedule, simulate, write
from streamer.explain.attribution import Explainer, Explanation, FieldFinding
from streamer.explain.peer_comparison import PeerComparison
from streamer.offline.reference_detectors import flatten
from streamer.redaction import Redactor
from streamer.training.fit import fit

DATA = os.environ.get("RIPCURRENT_EVAL_DATA")
STREAMS = ("flows-nsl", "windows-a", "sequences-hdfs", "cloud")


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


PEERS = PeerComparison("value", "dst_endpoint.port", "host", 2, 211, ("pc-9", "build01"), at_least=True)


def test_the_documented_alert_is_the_one_that_comes_out() -> None:
    page = (Path(__file__).parent.parent / "docs" / "alerts.md").read_text()
    neighbours = ({"dst_endpoint.port": "443", "actor.process.name": "winword.exe"},)
    finding = one(why=explanation(PORT, neighbours=neighbours, peers=PEERS))
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
    uids = {one()["metadata"]["uid"], one(now_ms=NOW + 1)["metadata"]["uid"], one(threshold=2e-4)["metadata"]["uid"]}
    assert len(uids) == 1
    for change in ({"entity": "user:bob"}, {"cause": "record:x"}, {"bundle_version": "other"}):
        uids.add(one(**change)["metadata"]["uid"])
    uids.update(alert.uid for alert in alerts(scored([WORD, WORD])))
    assert len(uids) == 5, "the first of the two equal events is the one above"
    assert one(bundle_version="other")["finding_info"]["uid"] == one()["finding_info"]["uid"]


EPISODE = Episode(
    *("events:3:7:0", "events:3:100:0", "host:PC-7", "host:PC-7", "record:dst_endpoint.port"),
    *(1_779_999_400_000, 1_780_000_000_000, 12, 3, 95.0, 5, 1e-9),
    ("record:dst_endpoint.port", "sequence:order"),
    ("host:PC-8", "host:PC-9"),
)


def test_an_episode_keeps_its_finding_and_only_its_create_is_an_alert() -> None:
    decisions = [Decision(activity, ("events", 3), 100, 0, EPISODE) for activity in (CREATE, UPDATE)]
    made = alerts(scored([WORD] * 2), decisions=decisions)
    made.append(close_alert(EPISODE, threshold=1e-4, bundle_version="lab-3f2a", tenant="default", now_ms=NOW))
    findings = [check(alert) for alert in made]
    assert len({f["finding_info"]["uid"] for f in findings}) == 1
    assert len({f["metadata"]["uid"] for f in findings}) == 3
    assert len({alert.key for alert in made}) == 1
    assert [f.get("is_alert") for f in findings] == [True, None, None]
    assert [f["type_uid"] for f in findings] == [200401, 200402, 200403]
    assert [f["status"] for f in findings] == ["New", "New", "Resolved"]
    assert {(f["count"], f["start_time"], f["end_time"]) for f in findings} == {
        (12, EPISODE.first_seen, EPISODE.last_seen)
    }
    assert {f["severity"] for f in findings} == {"Critical"}, "the worst of the episode, not the last"
    assert [f["unmapped"]["episode"]["events"] for f in findings] == [12] * 3


def test_an_episode_says_how_many_where_and_that_it_is_over() -> None:
    (made,) = alerts(scored([WORD]), decisions=[Decision(UPDATE, ("events", 3), 100, 0, EPISODE)])
    info = check(made)["finding_info"]
    assert info["title"].endswith("; usually 443 (92 %); the same at 2 others")
    assert (
        "So far 12 such events in 10 min, the first at events:3:7:0 (destination port, order of events). "
        "Also at host:PC-8, host:PC-9."
    ) in info["desc"]
    closed = close_alert(EPISODE, threshold=1e-4, bundle_version="b", tenant="t", now_ms=NOW)
    info = check(closed)["finding_info"]
    assert info["title"] == "Over: unusual destination port of host PC-7 and at 2 others; 12 events in 10 min"
    assert {event["uid"] for event in info["related_events"]} == {"events:3:7:0", "events:3:100:0"}
    single = replace(EPISODE, last=EPISODE.first, last_seen=EPISODE.first_seen, count=1, entities=1, others=())
    (alone,) = [check(close_alert(single, threshold=1e-4, bundle_version="b", tenant="t", now_ms=NOW))["finding_info"]]
    assert alone["title"] == "Over: unusual destination port of host PC-7; 1 event"


def test_history_that_is_missing_and_p_values_beyond_measure_are_said() -> None:
    batch = scored([WORD, WORD])
    batch.p_value[:] = 1e-62
    known, missing = [check(a) for a in alerts(replace(batch, complete=np.array([True, False])))]
    assert known["unmapped"]["p_value"] == 1e-12
    assert "history_complete" not in known["unmapped"]
    assert missing["unmapped"]["history_complete"] is False
    assert "is not known, so it may look more unusual than it is" in missing["finding_info"]["desc"]


def test_evidence_that_counts_less_is_said() -> None:
    since = 1_782_900_000_000
    lowered = np.empty(3, object)
    lowered[1] = Lowered("300201", ("container.name", "container.image.name#word"), 0.34, (), since, ())
    lowered[2] = Lowered("300201", (), 0.21, ("near",), since, ())
    usual, news, voice = [check(a) for a in alerts(replace(scored([WORD, WORD, WORD]), lowered=lowered))]
    assert "lowered" not in usual["unmapped"]
    assert (
        "New values of container name and container image name count for little since 2026-07-01 10:00:00 UTC: 34 % of "
        "such events have one."
    ) in news["finding_info"]["desc"]
    fields = ["container.name", "container.image.name#word"]
    assert news["unmapped"]["lowered"] == {"fields": fields, "parts": [], "share": 0.34, "since": since}
    assert (
        "The distance from the nearest normal event counts for less since 2026-07-01 10:00:00 UTC: it is unusual in "
        "21 % of such events."
    ) in voice["finding_info"]["desc"]


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        alerts(scored([WORD, WORD]), [explanation(PORT)])


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, ExplainedRows]:
    """A detector fitted to two simulated days, its training cut short, and the oddest of a third day."""
    folder = tmp_path_factory.mktemp("alerts")
    days = list(simulate(seed=5, days=3, events_per_day=2_600, incidents=schedule(3, clean=2)))
    write(days[:2], folder / "train.ndjson.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.training.replaced_fields, "STEPS", 200)
        patch.setattr(encoder.training.sequence, "STEPS", 100)
        bundle = fit([folder / "train.ndjson.gz"], folder / "bundle").bundle
    return explained(bundle, days[2].events, each=4)


def explained(bundle: Bundle, lines: Sequence[bytes], each: int) -> tuple[Detector, ExplainedRows]:
    """The most unusual of each batch, by record and by sequence, explained as the service does: right after scoring."""
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
    stream = [Message("events", 0, i, NOW, line) for i, line in enumerate(lines)]
    explained_rows: ExplainedRows = []
    for start in range(0, len(stream), 256):
        batch = detector.score(stream[start : start + 256])
        by_sequence = np.array([cause.startswith("sequence:") for cause in batch.cause])
        for kind in (by_sequence, ~by_sequence):
            rows = np.flatnonzero(kind)
            rows = rows[np.argsort(batch.p_value[rows], kind="stable")[:each]]
            explained_rows += [
                (batch, int(r), e)
                for r, e in zip(rows, Explainer(detector.bundle, detector.windows).explain(batch, rows), strict=True)
            ]
    return detector, explained_rows


def test_a_fitted_detector_explains_in_words(day: tuple[Detector, ExplainedRows]) -> None:
    _, explanations = day
    assert {batch.cause[row].partition(":")[0] for batch, row, _ in explanations} >= {"record", "sequence"}
    for batch, row, why in explanations:
        (alert,) = alerts(batch, [why], np.array([row]))
        info = check(alert)["finding_info"]
        assert why.fields or why.window
        for field in why.fields:
            assert field.observed not in [text for text, _ in field.expected], "what was expected did happen"
            assert not any(set("{}#*") & set(text) for text, _ in field.expected if field.path != "process.cmd_line")
        assert "a rare value" not in info["desc"]
        assert why.peers is None or why.peers.names == tuple(check(alert)["unmapped"]["peers"]["names"])
        assert len(info["title"]) < 400
        assert not why.window or batch.cause[row].startswith("sequence:")
    assert any(why.window for _, _, why in explanations)
    assert sum(why.peers is not None for _, _, why in explanations) > len(explanations) / 4


def scoring_an_event_s(detector: Detector, batch: ScoredBatch) -> float:
    """CPU seconds, of an event in a batch of the same events."""
    messages = [Message("events", 1, i, NOW, orjson.dumps(record)) for i, record in enumerate(batch.records)]
    fresh = Detector(detector.bundle, MemoryWindows(dim=detector.bundle.dim))
    return least_cpu_s(lambda: fresh.score(messages), 3) / len(messages)


def test_explaining_an_alert_costs_what_scoring_a_few_dozen_events_does(day: tuple[Detector, ExplainedRows]) -> None:
    detector, ((batch, _, _), *_) = day
    explain = Explainer(detector.bundle, detector.windows).explain
    ratio = least_cpu_s(lambda: explain(batch, np.arange(10))) / 10 / scoring_an_event_s(detector, batch)
    print(f"an alert costs {ratio:.0f} times what scoring an event does")
    assert ratio < 50


def test_explaining_a_sequence_that_comes_alone_costs_what_scoring_a_hundred_events_does(
    day: tuple[Detector, ExplainedRows],
) -> None:
    detector, explanations = day
    explain = Explainer(detector.bundle, detector.windows).explain
    batch, row = next((batch, row) for batch, row, why in explanations if why.window)
    ratio = least_cpu_s(lambda: explain(batch, np.array([row]))) / scoring_an_event_s(detector, batch)
    print(f"an alert on a sequence, alone, costs {ratio:.0f} times what scoring an event does")
    assert ratio < 100


def test_no_secret_leaves_in_an_alert() -> None:
    record = {
        **WORD,
        "api": {"operation": "x", "token": {"value": "hunter2"}},
        "unmapped": {"note": "postgres://bob:hunter2@db/x", "password": "hunter2"},
    }
    why = explanation(
        FieldFinding("actor.process.cmd_line", "winword.exe --password hunter2", (("a --password hunter2", 0.9),), 5),
        FieldFinding("unmapped.password", "hunter2", (("hunter2", 0.5),), 5),
        neighbours=({"actor.process.cmd_line": "x --password hunter2", "unmapped.password": "hunter2"},),
        window=((WORD["time"], "events:3:1:0", {"process.cmd_line": "run --password hunter2"}, 0.5),),
    )
    for cause in ("record:actor.process.cmd_line", "sequence:order"):
        (alert,) = alerts(scored([record], cause), [why])
        check(alert)
        assert b"hunter2" not in alert.value


def test_listed_attributes_are_nowhere_in_the_alert_nor_its_key() -> None:
    why = explanation(FieldFinding("actor.user.name", "bob", (("alice", 0.9),), 5))
    batch = scored([WORD], cause="record:actor.user.name", entity="user:bob")
    (alert,) = alerts(batch, [why], redactor=Redactor(["actor.user.name"]))
    check(alert)
    assert alert.key == b"user:[masked]"
    assert b"bob" not in alert.value
    assert b"alice" not in alert.value


def test_listed_attributes_are_masked_in_a_timeline_too() -> None:
    before = {"type_uid": 100701, "process.cmd_line": "transform --model v3", "process.file.name": "transform"}
    why = explanation(window=((WORD["time"] - 1, "events:3:1:0", before, 0.5), (WORD["time"], "events:3:100:0", {}, 0)))
    batch = scored([WORD], cause="sequence:order", entity="user:bob")
    shown, hidden = (alerts(batch, [why], redactor=Redactor(listed))[0] for listed in ([], ["process.cmd_line"]))
    assert b"process launch transform --model v3" in shown.value
    check(hidden)
    assert b"--model" not in hidden.value
    assert b"process launch [masked], transform" in hidden.value


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
    st.lists(
        st.tuples(
            st.integers(-(2**63), 2**63 - 1),
            st.text(max_size=8),
            st.dictionaries(st.sampled_from(SUMMARY_PATHS) | st.text(max_size=4), SCALARS, max_size=3),
            st.floats(),
        ),
        max_size=3,
    ).map(tuple),
    peers=st.none()
    | st.builds(
        PeerComparison,
        st.sampled_from(["count", "value", "more", "less", "event", "change"]),
        st.sampled_from(["", "dst_endpoint.port", "bytes.hour"]) | st.text(max_size=8),
        st.sampled_from(KINDS) | st.text(max_size=8),
        st.integers(0, 2**53),
        st.integers(0, 2**53),
        st.lists(st.text(max_size=8), max_size=5).map(tuple),
        st.booleans(),
        st.booleans(),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(EVENTS, EXPLANATIONS, NAMES, NAMES, st.floats(0, 1), st.floats())
def test_any_event_and_any_explanation_make_a_valid_alert(
    record: Json, why: Explanation, entity: str, cause: str, p_value: float, severity: float
) -> None:
    batch = scored([record], cause, entity)
    batch.p_value[:] = p_value
    with np.errstate(over="ignore"):
        batch.severity[:] = severity
    (alert,) = alerts(batch, [why])
    check(alert)


def read(path: Path, limit: int) -> list[Json]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return [orjson.loads(text) for text in lines][:: 1 if limit == 0 else limit]


def guessed(records: list[Json]) -> list[Explanation]:
    """Explanations in the form of the real ones: a few values of each event, and another event as its neighbour."""
    flat = [{k: str(v) for k, v in flatten(record).items()} for record in records]
    explanations = []
    for row, event in enumerate(flat):
        paths = sorted(event)[row % 7 :: 5][:5]
        other = flat[row // 2]
        fields = [FieldFinding(p, event[p], ((other.get(p, ""), 0.7), ("0", 0.2)), 7.5) for p in paths]
        explanations.append(explanation(*fields, neighbours=(dict(list(other.items())[:12]),)))
    return explanations


@pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")
@pytest.mark.parametrize("name", [*STREAMS, "ocsf-examples"])
def test_real_events_make_valid_alerts_at_a_bounded_cost(name: str) -> None:
    examples = name == "ocsf-examples"
    records = read(
        Path(DATA or "") / (f"{name}.ndjson" if examples else f"{name}.test.ndjson.gz"), 0 if examples else 97
    )
    batch = scored(records)
    told = guessed(batch.records)
    made = alerts(batch, told)
    for alert in made:
        check(alert)
    assert len(made) == len(records)
    messages = [Message("events", 0, i, NOW, orjson.dumps(record)) for i, record in enumerate(records)]
    ratio = least_cpu_s(lambda: alerts(batch, told)) / least_cpu_s(lambda: decode(messages))
    print(f"an alert costs {ratio:.0f} times what decoding its event does")
    assert ratio < 80


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder")
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_makes_valid_alerts_with_a_fitted_detector(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.training.replaced_fields, "STEPS", 200)
    monkeypatch.setattr(encoder.training.sequence, "STEPS", 100)
    bundle = fit([Path(DATA or "") / f"{name}.train.ndjson.gz"], tmp_path / "bundle").bundle
    with gzip.open(Path(DATA or "") / f"{name}.test.ndjson.gz") as lines:
        _, explanations = explained(bundle, list(lines), each=2)
    for batch, row, why in explanations:
        check(alerts(batch, [why], np.array([row]))[0])
