"""An event that crashes the detector goes to the dead letters alone; the others are scored as if it were not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import loop_harness
import numpy as np
import orjson
import pytest
from loop_harness import EVENT, LINE, EachRow, HashDetector, Topics, WindowDetector, create, p_value, running, until
from structlog.testing import capture_logs
from typer.testing import CliRunner

from encoder.ocsf.events import Message
from state.errors import StateLostError, StoreUnavailableError
from state.memory.episodes import MemoryEpisodes
from state.memory.timers import MemoryTimers
from state.memory.windows import MemoryWindows
from state.redis.windows import RedisWindows
from streamer.alerting import detection_finding
from streamer.alerting.finding_frame import Alert
from streamer.alerting.pipeline import AlertPipeline
from streamer.bundles.bundle_files import load
from streamer.cli.main import app
from streamer.detection import detector as detector_module
from streamer.detection.batches import ScoredBatch
from streamer.detection.detector import Detector
from streamer.detection.isolation import MOST, EventIsolation
from streamer.detection.score_files import score_files
from streamer.errors import StreamError
from streamer.explain.attribution import Explainer, Explanation
from streamer.service.loop import Service

CRASHES = "crashes in "


def crash(stage: str, messages: Sequence[Message]) -> None:
    """Raise if an event that is not skipped has the mark of this stage."""
    marked = detector_module.decode(messages)[0].columns.get("message")
    if marked is not None and f"{CRASHES}{stage}" in marked.values:
        raise KeyError("no such thing")


def poison(stage: str, i: int = 0) -> dict[str, Any]:
    return EVENT | {"time": EVENT["time"] + i, "message": CRASHES + stage}


class Fragile(HashDetector):
    """Fails where an event says that it does."""

    def prepare(self, messages: Sequence[Message]) -> tuple[HashDetector, Sequence[Message]]:
        crash("prepare", messages)
        return super().prepare(messages)

    def judge(self, prepared: tuple[HashDetector, Sequence[Message]]) -> ScoredBatch:
        crash("judge", prepared[1])
        return super().judge(prepared)

    def remember(self, messages: Sequence[Message]) -> None:
        crash("remember", messages)
        super().remember(messages)


class FragileWindows(Fragile, WindowDetector):
    """The same, with windows."""


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("crashing"), partitions=1)


def run(topics: Topics, detector: HashDetector, n: int, windows: Any = None, **more: Any) -> Service:
    service = Service(topics.settings(**more), detector, EachRow(), threshold=LINE, windows=windows)
    with running(service) as raised:
        until(lambda: bool(raised) or sum(max(offset, 0) for offset in topics.committed().values()) >= n, 60)
    assert raised == []
    return service


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_events_that_crash_a_stage_go_alone_to_the_dead_letters(topics: Topics, delivery: str) -> None:
    values = [orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(200)]
    values[3] = orjson.dumps({"events": [EVENT, poison("judge"), 7, EVENT, poison("prepare")]})
    values[77], values[78] = orjson.dumps(poison("prepare")), orjson.dumps(poison("judge"))
    values[199] = orjson.dumps(poison("judge"))
    topics.produce(values, 0, key=b"k", headers=[("h", b"v")])
    service = run(topics, Fragile(), 200, delivery=delivery)
    prefix = "__connect.errors."
    dead = {}
    for letter in topics.read("dead"):
        headers = {key.removeprefix(prefix): value.decode() for key, value in letter.headers()}
        assert (headers["topic"], headers["partition"], headers["h"]) == (topics.events, "0", "v")
        member = headers["exception.message"].partition(":")[0] if "member" in headers["exception.message"] else ""
        dead[headers["offset"], member] = (
            headers["stage"],
            headers["exception.class.name"],
            letter.key(),
            letter.value(),
        )
    assert dead == {
        ("3", "member 1"): ("judge", "KeyError", b"k", orjson.dumps(poison("judge"))),
        ("3", "member 2"): ("decode", "NotAnObject", b"k", b"7"),
        ("3", "member 4"): ("prepare", "KeyError", b"k", orjson.dumps(poison("prepare"))),
        ("77", ""): ("prepare", "KeyError", b"k", values[77]),
        ("78", ""): ("judge", "KeyError", b"k", values[78]),
        ("199", ""): ("judge", "KeyError", b"k", values[199]),
    }
    scores = [orjson.loads(message.value()) for message in topics.read("scores")]
    labels = [f"{s['topic']}:{s['partition']}:{s['offset']}:{s['index']}" for s in scores]
    others = {(i, 0) for i in range(200)} - {(77, 0), (78, 0), (199, 0)} | {(3, 3)}
    assert sorted(labels) == sorted(f"{topics.events}:0:{offset}:{index}" for offset, index in others)
    assert [score["p_value"] for score in scores] == [p_value(label) for label in labels]
    assert topics.alerts() == sorted(label for label in labels if p_value(label) <= LINE)
    taken = service.metrics.registry.get_sample_value
    assert taken("ripcurrent_crashing_events_total", {"stage": "prepare"}) == 2
    assert taken("ripcurrent_crashing_events_total", {"stage": "judge"}) == 3
    assert taken("ripcurrent_rejects_total", {"exception": "KeyError"}) == 5
    assert taken("ripcurrent_rejects_total", {"exception": "NotAnObject"}) == 1

    flags = [f"--kafka-bootstrap-servers={topics.bootstrap}", f"--dead-letters={topics.name}-dead"]
    table = CliRunner().invoke(app, ["dlq", "list", *flags], env={"COLUMNS": "200"}).stdout
    assert [words for words in map(str.split, table.splitlines()) if words[1:4] == ["judge", "│", "KeyError"]]


def test_windows_hold_nothing_of_an_event_that_crashed(
    kafka: str, redis_url: str, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same stream with garbage in the place of the events that crash gives the same scores and windows."""
    monkeypatch.setattr(loop_harness, "p_value", lambda label: p_value(label.split(":", 1)[1]))  # in any topic
    given = [orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(300)]
    scores: list[dict[int, float]] = []
    for crashing in (True, False):
        topics = create(kafka, unique("windows"), partitions=1)
        values = list(given)
        for i, stage in ((5, "prepare"), (120, "judge"), (121, "judge"), (299, "prepare")):
            values[i] = orjson.dumps(poison(stage, i)) if crashing else b"garbage"
        topics.produce(values, 0)
        windows = RedisWindows(redis_url, encoder="e", dim=4, tenant=topics.name)
        run(topics, FragileWindows(windows), 300, windows, batch_size=64)
        found = [orjson.loads(message.value()) for message in topics.read("scores")]
        scores.append({score["offset"]: score["p_value"] for score in found})
        assert len(found) == len(scores[-1]) == 296
    assert scores[0] == scores[1]


def test_a_fault_that_is_not_the_events_stops_the_service_in_one_line(topics: Topics) -> None:
    topics.produce([orjson.dumps(poison("judge", i)) for i in range(100)], 0)
    service = Service(topics.settings(), Fragile(), EachRow(), threshold=LINE)
    with running(service) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert f"judge failed on {MOST + 1} of the latest " in str(raised[0])
    assert "KeyError: 'no such thing'" in str(raised[0])
    assert "\n" not in str(raised[0])
    assert topics.committed()[0] <= 0
    assert topics.read("dead") == []


def test_a_batch_whose_events_fail_together_and_not_alone_stops_the_service(topics: Topics) -> None:
    def together(messages: Sequence[Message]) -> None:
        if len(messages) > 1:
            raise ZeroDivisionError("of two\nor more")

    topics.produce_events(10)
    with running(Service(topics.settings(), HashDetector(together), EachRow(), threshold=LINE)) as raised:
        until(lambda: bool(raised))
    assert isinstance(raised[0], StreamError)
    assert "on none of them alone: ZeroDivisionError: of two" in str(raised[0])
    assert "\n" not in str(raised[0])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        StoreUnavailableError("away"),
        StreamError("a person"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        OSError("no space left on device"),
    ],
)
def test_errors_of_stores_memory_and_system_are_not_the_events(error: Exception) -> None:
    calls = []

    def fail(messages: Sequence[Message]) -> None:
        calls.append(len(messages))
        raise error

    with pytest.raises(type(error)) as raised:
        EventIsolation().score(HashDetector(fail), [Message("t", 0, i, 0, orjson.dumps(EVENT)) for i in range(9)])
    assert raised.value is error
    assert calls == [9]


def test_few_crashing_events_among_many_never_stop_the_stream_however_often_they_are_delivered() -> None:
    isolation, detector = EventIsolation(), Fragile()
    for offset in range(0, 40_000, 500):
        batch = [Message("t", 0, offset + i, 0, orjson.dumps(EVENT)) for i in range(499)]
        batch.append(Message("t", 0, offset + 499, 0, orjson.dumps(poison("judge"))))
        for _ in range(20 if offset == 0 else 1):
            scored = isolation.score(detector, batch)
        assert (len(scored), [reject.message for reject in scored.rejects]) == (499, [499])


def test_lost_windows_are_filled_past_an_event_that_crashes(topics: Topics) -> None:
    class Lost:
        age_ms = 1_000_000_000
        asked = 0

        def check_epoch(self, offsets: Any) -> None:
            self.asked += 1
            if self.asked == 1:
                raise StateLostError("gone", wiped=True, resume={(topics.events, 0): 0})

        def prepare(self, offsets: Any) -> None: ...
        def identify(self, topics: Any) -> None: ...
        def identified(self) -> dict[Any, int]:
            return {}

        def committed(self, offsets: Any) -> None: ...
        def round_trips(self) -> dict[str, float]:
            return {}

        def begin_rebuild(self, lost: StateLostError, others: Any = ()) -> None: ...
        def finish_rebuild(self, sources: Any, horizon_ms: int = 0) -> None: ...

    topics.produce([orjson.dumps(EVENT)] * 7 + [orjson.dumps(poison("remember"))] + [orjson.dumps(EVENT)] * 7, 0)
    run(topics, HashDetector(), 15)
    topics.produce_events(5)
    detector = Fragile()
    with running(Service(topics.settings(), detector, EachRow(), threshold=LINE, windows=Lost())) as raised:
        topics.wait_until_read(20)
    assert raised == []
    assert {message.offset for message in detector.remembered if not message.skipped} == set(range(15)) - {7}


@pytest.mark.parametrize("stage", ["prepare", "judge"])
def test_scores_of_the_real_detector_are_those_of_a_stream_without_the_event(folder: Path, stage: str) -> None:
    class FragileDetector(Detector):
        def prepare(self, messages: Sequence[Message]) -> Any:
            crash("prepare", messages)
            return super().prepare(messages)

        def judge(self, prepared: Any) -> ScoredBatch:
            column = prepared.events.columns.get("message")
            if column is not None and CRASHES + "judge" in column.values:
                raise KeyError("no such thing")
            return super().judge(prepared)

    bundle = load(folder / "bundle")
    lines = (folder / "test.ndjson").read_bytes().splitlines()[:600]
    found = []
    for crashing in (True, False):
        stream = list(lines)
        for i in (0, 250, 251, 599):
            stream[i] = orjson.dumps(orjson.loads(lines[i]) | {"message": CRASHES + stage}) if crashing else b"garbage"
        detector = FragileDetector(bundle, MemoryWindows(dim=bundle.dim), timers=MemoryTimers())
        isolation, parts = EventIsolation(), []
        for start in range(0, 600, 200):
            batch = [Message("t", 0, start + i, 0, line) for i, line in enumerate(stream[start : start + 200])]
            parts.append(isolation.score(detector, batch))
        found.append(parts)
    for scored, expected in zip(*found, strict=True):
        assert [(r.message, r.index) for r in scored.rejects] == [(r.message, r.index) for r in expected.rejects]
        assert {r.stage for r in scored.rejects} <= {stage}
        for name in ("p_value", "entity", "cause", "complete", "level"):
            np.testing.assert_array_equal(getattr(scored, name), getattr(expected, name))


def test_score_of_a_file_goes_past_an_event_that_crashes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (folder / "test.ndjson").read_bytes().splitlines()[:100]
    lines[40] = orjson.dumps(orjson.loads(lines[40]) | {"message": CRASHES + "entities"})
    (tmp_path / "events.ndjson").write_bytes(b"\n".join(lines))
    real = detector_module.find_entities

    def entities(events: Any) -> Any:
        column = events.columns.get("message")
        if column is not None and CRASHES + "entities" in column.values:
            raise KeyError("no such thing")
        return real(events)

    monkeypatch.setattr(detector_module, "find_entities", entities)
    scored = score_files([tmp_path / "events.ndjson"], load(folder / "bundle"))
    assert len(scored) == 99
    assert "line 41 of events.ndjson: 'no such thing'" in str(scored.unread)
    assert "1 KeyError" in str(scored.unread)


@pytest.mark.parametrize("where", ["explain", "evidence"])
def test_an_alert_that_cannot_be_explained_or_worded_is_told_with_less(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth event fails where its alert is explained, or where its attributes are shown."""
    bundle = load(folder / "bundle")
    lines = (folder / "test.ndjson").read_bytes().splitlines()[:600]
    crashing = {orjson.loads(line)["metadata"]["uid"]: i for i, line in enumerate(lines) if i % 10 == 0}
    windows = MemoryWindows(dim=bundle.dim)
    scored = Detector(bundle, windows).score([Message("t", 0, i, 0, line) for i, line in enumerate(lines)])
    scored = replace(scored, threshold=np.full(len(scored), 0.2))
    explainer, evidence = Explainer(bundle, windows), detection_finding.evidence

    def is_crashing(record: dict[str, Any]) -> bool:
        return record.get("metadata", {}).get("uid") in crashing

    class Fragile:
        def explain(self, scored: ScoredBatch, rows: Any) -> list[Explanation]:
            if where == "explain" and any(is_crashing(scored.records[row]) for row in rows):
                raise KeyError("no reason")
            return explainer.explain(scored, rows)

    def fragile_evidence(record: dict[str, Any]) -> Any:
        if where == "evidence" and is_crashing(record):
            raise KeyError("no words")
        return evidence(record)

    def alerts(explaining: Any) -> list[Alert]:
        clock = lambda: 1_700_000_000.0  # noqa: E731
        pipeline = AlertPipeline(explaining, MemoryEpisodes(), bundle_version="b", clock=clock)
        return pipeline.alerts(scored, np.flatnonzero(scored.p_value <= 0.2))

    whole = alerts(explainer)
    monkeypatch.setattr(detection_finding, "evidence", fragile_evidence)
    with capture_logs() as logs:
        told = alerts(Fragile())
    assert {entry["event"] for entry in logs} == {"an alert cannot be made, trying with less"}
    assert [alert.uid for alert in told] == [alert.uid for alert in whole]
    changed = [after.row for before, after in zip(whole, told, strict=True) if before.value != after.value]
    assert changed == [alert.row for alert in whole if alert.row in crashing.values()] != []
    for alert in told:
        finding = orjson.loads(alert.value)
        assert finding["class_uid"] == 2004 and finding["finding_info"]["title"]
