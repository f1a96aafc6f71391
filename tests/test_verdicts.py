"""A verdict silences exactly what was looked at, for a time; it is previewed, counted, listed and lifted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
from alert_samples import SCHEMA, WORD, one, scored
from loop_harness import EVENT, HashDetector, Topics, create, p_value, running, until
from ocsf_json_schema import OcsfJsonSchemaEmbedded
from test_alert_commands import create_topic, invoke, lines, send
from test_pipeline import Quiet, with_threshold
from typer.testing import CliRunner

from state.episodes import Anomaly
from state.memory.episodes import MemoryEpisodes
from streamer.alerting.pipeline import AlertPipeline
from streamer.alerting.suppression_feed import SuppressionFeed, publish
from streamer.alerting.verdicts import DAY_MS, Scope, Suppressions, preview, scope_of, verdict_on
from streamer.cli.main import app
from streamer.errors import ConfigurationError
from streamer.redaction import MASK
from streamer.service.loop import Service
from streamer.settings import load

NOW = WORD["time"]
INCIDENT = jsonschema.Draft202012Validator(
    OcsfJsonSchemaEmbedded(SCHEMA).get_class_schema(class_name="detection_finding", profiles=["incident"])
)
ODD = Anomaly(
    *(("events", 0), 0, 0, NOW + 1, "host:pc-7", "record:dst_endpoint.port", 75.0, 4, 1e-5),
    type_uid=400101,
    shown="host:PC-7",
)


def say(verdict: str, now_ms: int = NOW, **more: Any) -> dict[str, Any]:
    return verdict_on(one(), verdict, by="ann", why="a test", now_ms=now_ms, **more)[0]


@pytest.mark.parametrize(("verdict", "ids"), [("true-positive", (2, 2)), ("benign", (5, 4)), ("ignore", (3, 3))])
def test_a_verdict_is_a_valid_update_of_the_finding(verdict: str, ids: tuple[int, int]) -> None:
    update = say(verdict)
    assert [error.message for error in INCIDENT.iter_errors(update)] == []
    assert (update["verdict_id"], update["status_id"]) == ids
    assert (update["type_uid"], update["comment"], update["assignee"]) == (200402, "a test", {"name": "ann"})
    assert "is_alert" not in update
    assert update["finding_info"]["uid"] == one()["finding_info"]["uid"]
    assert update["metadata"]["uid"] != one()["metadata"]["uid"]


def test_a_suppression_is_of_one_entity_class_and_cause_and_of_the_time_after_its_verdict() -> None:
    suppressions = Suppressions()
    suppressions.add(say("benign"))
    assert suppressions.covering(ODD) is not None
    for other in (
        {"shown": "host:PC-8"},
        {"cause": "record:src_endpoint.port"},
        {"type_uid": 300201},
        {"time": NOW - 1},
        {"time": NOW + 30 * DAY_MS},
    ):
        assert suppressions.covering(replace(ODD, **other)) is None, other
    assert suppressions.covering(replace(ODD, time=NOW + 30 * DAY_MS - 1)) is not None


def test_a_later_verdict_on_the_same_takes_the_place_of_the_earlier_and_a_true_positive_lifts_it() -> None:
    suppressions = Suppressions()
    suppressions.add(say("ignore", until_ms=NOW + DAY_MS))
    suppressions.add(say("ignore", NOW + 1000, until_ms=NOW + 2 * DAY_MS))
    assert suppressions.covering(replace(ODD, time=NOW + DAY_MS + 1)) is not None
    suppressions.add(say("true-positive", NOW + 5000))
    assert suppressions.covering(replace(ODD, time=NOW + 4999)) is not None
    assert suppressions.covering(replace(ODD, time=NOW + 5000)) is None
    assert [(s.since, s.until) for s in suppressions.all] == [(NOW, NOW + 1000), (NOW + 1000, NOW + 5000)]


def test_what_would_hide_more_than_was_looked_at_is_refused() -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"entity": ""}, {}, "needs an entity"),
        ({"entity": f"user:{MASK}"}, {}, "needs an entity"),
        ({"cause": ""}, {}, "needs an entity"),
        ({}, {"until_ms": NOW + 91 * DAY_MS}, "90 days at most"),
        ({}, {"until_ms": NOW}, "end before it begins"),
    ]
    for changes, more, words in cases:
        finding = one()
        finding["unmapped"] |= changes
        with pytest.raises(ConfigurationError, match=words):
            verdict_on(finding, "benign", by="ann", why="", now_ms=NOW, **more)
    suppressions = Suppressions()
    forged = say("benign")
    for changes in ({"entity": ""}, {"until": NOW + 900 * DAY_MS}, {"class_uid": "all"}, {"cause": None}):
        fields = forged["unmapped"]["verdict"] | changes
        suppressions.add(forged | {"unmapped": forged["unmapped"] | {"verdict": fields}})
    assert [s for s in suppressions.all if s.scope.cause != "None"] == []


def test_the_preview_counts_what_would_have_been_silenced() -> None:
    finding = one()
    other = one(entity="host:PC-8")
    update = finding | {"activity_id": 2, "count": 40}
    scope = scope_of(finding)
    assert scope == Scope("host:PC-7", 4001, "record:dst_endpoint.port")
    found = preview([finding, update, other, finding | {"activity_id": 3}], scope)
    assert (found.alerts, found.events) == (1, 40)
    assert len(found.titles) == 1


@pytest.fixture
def settings_for(kafka: str, unique: Callable[[str], str]) -> Iterator[Any]:
    names = {"alerts": create_topic(kafka, unique("alerts")), "feedback": create_topic(kafka, unique("feedback"))}
    yield load({"kafka.bootstrap_servers": kafka, **names})


def test_feedback_is_given_previewed_listed_followed_and_lifted(kafka: str, settings_for: Any) -> None:
    now = int(time.time() * 1000)
    batch = with_threshold(scored([{**WORD, "time": now - 60_000 + i} for i in range(12)]))
    memory = MemoryEpisodes()
    alerts = AlertPipeline(Quiet(), memory, bundle_version="b").alerts(batch, np.arange(12))
    send(kafka, settings_for.alerts, alerts)
    uid, flag = alerts[0].uid, f"--feedback={settings_for.feedback}"

    def run(*arguments: str) -> list[str]:
        return lines(invoke(kafka, settings_for.alerts, *arguments, flag))

    following = SuppressionFeed(settings_for)
    anomaly = replace(ODD, time=now + 10_000)
    assert following.covering(anomaly) is None
    (close,) = AlertPipeline(Quiet(), memory, bundle_version="b").finish(("events", 3), 200, 1e-4)
    send(kafka, settings_for.alerts, [close])
    assert run("feedback", close.uid, "true-positive", "--yes")[0].endswith("like none seen before")
    told = run("feedback", uid[:12], "benign", "--for", "7d", "--why", "a backup", "--by", "ann", "--yes")
    assert told[1].startswith("silences host:PC-7, class 4001, record:dst_endpoint.port until ")
    assert told[2] == "of the last day that is 1 alert with 10 events"
    until(lambda: following.covering(anomaly) is not None)
    assert SuppressionFeed(settings_for).covering(anomaly) is not None, "also at the next start"
    (listed,) = [orjson.loads(line) for line in run_listed(kafka, settings_for, "--json")]
    assert (listed["verdict"], listed["by"], listed["why"]) == ("benign", "ann", "a backup")
    text = "\n".join(run("explain", uid))
    assert "12 events; benign" in text
    run("feedback", uid, "true-positive", "--by", "bob", "--yes")
    until(lambda: following.covering(replace(anomaly, time=now + 60_000)) is None)
    following.close()
    assert run_listed(kafka, settings_for, "--json") == []
    (ended,) = run_listed(kafka, settings_for, "--json", "--all")
    assert orjson.loads(ended)["by"] == "ann", "who said so stays known"
    assert "for how long?" in str(invoke(kafka, settings_for.alerts, "feedback", uid, "ignore", flag).exception)
    asked = invoke(kafka, settings_for.alerts, "feedback", uid, "benign", flag)
    assert asked.exit_code == 1
    assert "Do it?" in asked.output


def run_listed(kafka: str, settings: Any, *more: str) -> list[str]:

    flags = [f"--kafka-bootstrap-servers={kafka}", f"--feedback={settings.feedback}"]
    done = CliRunner().invoke(app, ["suppressions", *flags, *more], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    return done.stdout.splitlines()


def test_the_service_tells_nothing_of_what_is_silenced_and_counts_it(
    kafka: str, unique: Callable[[str], str], settings_for: Any
) -> None:
    topics: Topics = create(kafka, unique("silenced"), partitions=1)
    n = 1500
    topics.produce_events(n)
    finding = one(entity="user:1", cause="record:cause.1")
    finding["finding_info"]["related_events"][0]["type_uid"] = EVENT["type_uid"]
    start = int(EVENT["time"])  # type: ignore[call-overload]
    publish(settings_for, verdict_on(finding, "benign", by="ann", why="", now_ms=start)[0])
    feedback = SuppressionFeed(settings_for)
    detector = HashDetector()
    findings = AlertPipeline(detector, MemoryEpisodes(), bundle_version="b", suppressing=feedback)
    service = Service(topics.settings(), detector, findings, threshold=0.02)
    with running(service) as raised:
        topics.wait_until_read(n)
    feedback.close()
    assert raised == []
    told = [orjson.loads(message.value()) for message in topics.read("alerts")]
    crossed = [offset for offset in range(n) if p_value(f"{topics.events}:0:{offset}:0") <= 0.02]
    silenced = [offset for offset in crossed if offset % 5 == 1]
    assert silenced
    assert {finding["unmapped"]["entity"] for finding in told} == {f"user:{i}" for i in (0, 2, 3, 4)}
    counted = [s for m in service.metrics.suppressed.collect() for s in m.samples if s.name.endswith("_total")]
    assert [sample.value for sample in counted] == [len(silenced)]


def test_a_true_positive_withdraws_what_may_be_learned_of_its_new_values_and_a_benign_lifts_it() -> None:
    lowered = {"fields": ["process.file.path#folder"], "parts": [], "share": 0.2, "since": NOW - DAY_MS}
    plain = one()
    alert = plain | {"unmapped": plain["unmapped"] | {"new_values": ["process.name"], "lowered": lowered}}
    type_uid = str(alert["finding_info"]["related_events"][0]["type_uid"])
    update, _ = verdict_on(alert, "true-positive", by="ann", why="", now_ms=NOW)
    suppressions = Suppressions()
    suppressions.add(orjson.loads(orjson.dumps(update)))
    until = NOW + 30 * DAY_MS
    assert suppressions.withdrawn == {(type_uid, "process.name"): until, (type_uid, "process.file.path"): until}
    benign, _ = verdict_on(alert, "benign", by="ann", why="", now_ms=NOW + 1)
    suppressions.add(orjson.loads(orjson.dumps(benign)))
    assert suppressions.withdrawn == {}
    for broken in ("x", [1, None], {"a": 1}):  # Anybody may write to the topic.
        update["unmapped"]["verdict"]["learned"] = broken
        suppressions.add(orjson.loads(orjson.dumps(update)))
