"""The whole path with a bundle that was fitted: files and topics in, alerts out, and the same scores however they are
asked for, cut into batches or cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from loop_harness import Topics, create
from p_values import assert_same_p_values, assert_same_scores
from service_process import Service, alerts_of, lines, scores_of, short_training, undisturbed_run
from test_cli import ripcurrent, seconds_to_fail

from encoder.ocsf.events import Message
from state.memory.windows import MemoryWindows
from streamer.bundles.bundle_files import load
from streamer.detection.detector import Detector
from streamer.detection.live_calibration import LiveCalibration
from streamer.detection.score_files import score_files
from streamer.training.fit import fit

DATA = os.environ.get("RIPCURRENT_EVAL_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="RIPCURRENT_EVAL_DATA names no folder of recordings")


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("end"), partitions=1)


def assert_killed_equals_undisturbed(
    killed: Topics, undisturbed: Topics, bundle: Path, redis_url: str, n: int, **settings: Any
) -> None:
    """Run over the n events of the undisturbed run, in other batches, killed on the way and started again."""
    settings |= {"batch_size": 50, "batches_per_transaction": 2, "transaction_latency_ms": 20}
    service = Service(killed, bundle, redis_url, 2, **settings)
    service.run_until(n // 2, kill=True, seconds=600)
    done = service.done()
    assert done < n
    service.run_until(n, seconds=600)

    expected, found = scores_of(undisturbed), scores_of(killed)
    assert len(found) == n
    assert_same_scores(found, expected)
    expected_alerts, found_alerts = alerts_of(undisturbed), alerts_of(killed)
    assert found_alerts.keys() == expected_alerts.keys() != set()
    for uid, (key, _) in expected_alerts.items():
        assert found_alerts[uid][0] == key
    print(f"{n} events, killed at {done}; {len(found_alerts)} alerts")


@pytest.mark.extended
def test_sigkill_half_way_leaves_the_alerts_and_scores_of_an_undisturbed_run(
    undisturbed: Topics, topics: Topics, folder: Path, redis_url: str
) -> None:
    killed = replace(topics, source=undisturbed.events)
    n = len(lines(folder / "test.ndjson"))
    assert_killed_equals_undisturbed(killed, undisturbed, folder / "bundle", redis_url, n)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_data
def test_sigkill_half_way_on_a_recorded_stream(
    topics: Topics, tmp_path: Path, redis_url: str, unique: Callable[[str], str]
) -> None:
    bundle, line = tmp_path / "bundle", 0.002
    fit([Path(DATA) / "windows-a.train.ndjson.gz"], bundle)
    events = lines(Path(DATA) / "windows-a.test.ndjson.gz")
    undisturbed_run(topics, bundle, redis_url, events, threshold=line)
    killed = replace(create(topics.bootstrap, unique("killed"), partitions=1), source=topics.events)
    assert_killed_equals_undisturbed(killed, topics, bundle, redis_url, len(events), threshold=line)


@pytest.mark.extended
def test_a_file_scores_as_the_topic_with_the_same_events(
    undisturbed: Topics, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The service has a fixed threshold, so it learns nothing while it serves.
    monkeypatch.setattr(LiveCalibration, "moves", property(lambda _: False, lambda *_: None), raising=False)
    scored = score_files([folder / "test.ndjson"], load(folder / "bundle"))
    offline = [{"p_value": p, "cause": cause} for p, cause in zip(scored.p_value, scored.cause, strict=True)]
    online = scores_of(undisturbed)
    # At the end of a file, and not of a stream, it shows who fell silent: that is judged beside what the event gives.
    same = [n for n, score in enumerate(offline) if score["cause"] != "sequence:silence"]
    assert len(same) > 0.9 * len(offline)
    assert len(offline) == len(online)
    assert_same_p_values([offline[n]["p_value"] for n in same], [online[n, 0] for n in same])


def test_scores_do_not_depend_on_how_the_stream_is_cut(folder: Path) -> None:
    bundle = load(folder / "bundle")
    events = lines(folder / "test.ndjson")[:300]
    messages = [Message("events", 0, offset, -1, value) for offset, value in enumerate(events)]
    scores = []
    for size in (1, 7, 512):
        detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
        parts = [detector.score(messages[start : start + size]) for start in range(0, len(messages), size)]
        scores.append(np.concatenate([part.p_value for part in parts]))
    assert_same_p_values(scores[0], scores[2])
    assert_same_p_values(scores[1], scores[2])


def test_what_is_broken_is_kept_or_repaired_and_the_stream_goes_on(
    topics: Topics, folder: Path, redis_url: str
) -> None:
    first, *rest = [orjson.loads(line) for line in lines(folder / "test.ndjson")[:60]]
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    bad: list[bytes | None] = [b"not json", b"", None, b"null", orjson.dumps([first]), deep, b"\xff\xfe\xfa"]
    repaired = [
        orjson.dumps(first | {"message": "x" * 5_000_000}),
        orjson.dumps(first | {"message": "MARK"}).replace(b"MARK", b"\xff\xfe"),
        orjson.dumps(first | {"time": first["time"] // 1000, "unmapped": "text", "metadata": None}),
        b"\x00\x00\x00\x00\x07" + orjson.dumps(first),
    ]
    bundle = orjson.dumps({"events": [first, 7, first]})
    values = [*bad, *repaired, bundle, *map(orjson.dumps, rest)]
    topics.produce(values, 0)
    Service(topics, folder / "bundle", redis_url, 4, threshold=1.0).run_until(len(values))
    dead = {int(dict(message.headers())["__connect.errors.offset"]): message.value() for message in topics.read("dead")}
    assert dead == dict(enumerate(bad)) | {len(bad) + len(repaired): b"7"}
    scored = scores_of(topics)
    alone = [(offset, 0) for offset in range(len(bad), len(values)) if values[offset] != bundle]
    at = values.index(bundle)
    assert set(scored) == {*alone, (at, 0), (at, 2)}
    counted: dict[str, int] = {}
    for _, body in alerts_of(topics).values():  # At this line everything is an anomaly, told or counted.
        counted[body["finding_info"]["uid"]] = max(counted.get(body["finding_info"]["uid"], 0), body["count"])
    assert len(scored) / 10 < sum(counted.values()) <= len(scored)


@pytest.mark.extended
@needs_data
def test_the_example_events_pass_through_fit_score_and_run(topics: Topics, tmp_path: Path, redis_url: str) -> None:
    examples = Path(DATA) / "ocsf-examples.ndjson"
    with short_training():
        fitted = fit([examples], tmp_path / "bundle")
    assert (fitted.events, len(fitted.unread)) == (93, 0)
    done = ripcurrent("score", str(examples), "--bundle", "bundle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "scores.ndjson")) == 93
    topics.produce(list(lines(examples)), 0)
    Service(topics, tmp_path / "bundle", redis_url, 5, threshold=1.0).run_until(93)
    assert len(scores_of(topics)) == 93
    told = [body for _, body in alerts_of(topics).values()]
    created = {body["finding_info"]["uid"] for body in told if body["activity_name"] == "Create"}
    assert 0 < len(created) <= 93
    assert {body["finding_info"]["uid"] for body in told} == created
    assert topics.read("dead") == []


@pytest.mark.extended
def test_a_bundle_that_cannot_be_used_is_named_in_one_line_within_seconds(
    topics: Topics, folder: Path, tmp_path: Path, redis_url: str
) -> None:
    def edited(name: str, change: Callable[[Path], None]) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder / "bundle", copy)
        change(copy)
        return copy

    def cut(name: str) -> Callable[[Path], None]:
        return lambda bundle: os.truncate(bundle / name, (bundle / name).stat().st_size // 2)

    def another_schema(bundle: Path) -> None:
        manifest = orjson.loads((bundle / "manifest.json").read_bytes())
        schema = orjson.loads((bundle / "schema.json").read_bytes())
        schema["fields"] = schema["fields"][:-1]
        (bundle / "schema.json").write_bytes(orjson.dumps(schema))
        manifest["files"]["schema.json"] = sha256((bundle / "schema.json").read_bytes()).hexdigest()
        (bundle / "manifest.json").write_bytes(orjson.dumps(manifest))

    cases = [
        (tmp_path / "nowhere", "no bundle at"),
        (edited("schema", lambda bundle: (bundle / "schema.json").write_text("{}")), "schema.json was changed"),
        (edited("other-schema", another_schema), "schema"),
        (edited("weights", cut("encoder.safetensors")), "encoder.safetensors was changed or cut off"),
        (edited("index", cut("baseline.hnsw")), "baseline.hnsw was changed or cut off"),
        (edited("lacking", lambda bundle: (bundle / "exemplars.ndjson").unlink()), "lacks exemplars.ndjson"),
        (edited("manifest", cut("manifest.json")), "manifest.json cannot be read"),
    ]
    limit_s = seconds_to_fail(tmp_path)
    for bundle, message in cases:
        began = time.monotonic()
        command = Service(topics, bundle, redis_url, 6).command
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert time.monotonic() - began < limit_s, bundle.name
        assert done.returncode == 1, (bundle.name, done.stderr)
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("ripcurrent: "), line
        assert message in line, (bundle.name, line)
