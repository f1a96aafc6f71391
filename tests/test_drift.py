"""Drift is told from traffic that is as it was, each sign by itself, and the doctor says it."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from confluent_kafka import Producer
from loop_harness import EVENT, create
from numpy.typing import NDArray
from test_bundle_store import bundle
from test_cli import ripcurrent
from typer.testing import CliRunner

from encoder.features.learner import SchemaLearner
from encoder.features.schema import Schema
from encoder.features.vectorizer import Vectorizer
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.bundles.manifest import read_manifest, resolve
from streamer.bundles.store import Store
from streamer.cli.doctor import examine
from streamer.cli.main import app
from streamer.detection.drift import DISTRUST, HEALTHY, HOUR_MS, MIN_EVENTS, REFIT, Drift, profile, stability
from streamer.detection.live_calibration import Decision, Lowered
from streamer.devtools.servers import free_port
from streamer.service.metric_collectors import DriftCollector
from streamer.service.metrics import Metrics, serve

START = EVENT["time"] // (24 * HOUR_MS) * 24 * HOUR_MS


def name(number: int) -> str:
    """Letters: digits in a name are templated away."""
    return "user-" + "".join(chr(97 + number // 26**place % 26) for place in range(3))


def events(n: int, seed: int, *, users: int = 20, admins: float = 0.1) -> list[Message]:
    generator = np.random.default_rng(seed)
    drawn = [
        EVENT
        | {
            "time": START + i * 24 * HOUR_MS // n,
            "user": {"name": name(int(generator.integers(users))), "type_id": int(generator.random() < admins) + 1},
            "status_id": int(generator.random() < 0.05) + 1,
            "src_endpoint": {"port": int(generator.integers(1, 1000))},
        }
        for i in range(n)
    ]
    return [Message("events", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(drawn)]


@pytest.fixture(scope="module")
def schema() -> Schema:
    learner = SchemaLearner()
    learner.add(decode(events(8000, 0))[0])
    return learner.finish()


def watched(schema: Schema, seen: list[Message], p_value: NDArray[np.float64] | None = None) -> Drift:
    vectorize = Vectorizer(schema)
    drift = Drift(schema, profile(schema, vectorize(decode(events(8000, 0))[0]).codes))
    batch, _ = decode(seen)
    p = np.random.default_rng(9).random(len(batch)) if p_value is None else p_value
    drift.observe(batch.time, vectorize(batch).codes, p)
    return drift


def test_traffic_as_it_was_is_healthy(schema: Schema) -> None:
    for seed in range(1, 6):
        health = watched(schema, events(3000, seed)).health()
        assert (health.verdict, health.reasons) == (HEALTHY, [])
        assert max(health.psi.values()) < 0.05
        assert health.unknown <= health.unknown_in_training + 0.001


def test_a_class_that_training_never_had_is_counted(schema: Schema) -> None:
    seen = events(2000, 1)
    strange = [
        Message(m.topic, m.partition, m.offset, -1, m.value.replace(b"300201", b"400106").replace(b"3002", b"4001"))
        for m in seen[:500]
        if m.value is not None
    ]
    health = watched(schema, [*strange, *seen[500:]]).health()
    assert health.unseen_types == pytest.approx(0.25)
    assert watched(schema, seen).health().unseen_types == 0.0


def test_too_few_events_give_no_verdict(schema: Schema) -> None:
    health = watched(schema, events(MIN_EVENTS - 1, 1)).health()
    assert (health.verdict, health.events) == ("", MIN_EVENTS - 1)


def test_a_field_that_has_shifted_is_named(schema: Schema) -> None:
    health = watched(schema, events(3000, 1, admins=0.6)).health()
    assert health.psi["user.type_id"] > 0.25
    assert [name for name, value in health.psi.items() if value > 0.25] == ["user.type_id"]


def test_values_that_training_never_had_are_counted(schema: Schema) -> None:
    health = watched(schema, events(3000, 1, users=400)).health()
    assert health.unknown > health.unknown_in_training + 0.05
    assert health.verdict in (REFIT, DISTRUST)
    assert any("never seen in training" in reason for reason in health.reasons)


@pytest.mark.parametrize(("times", "verdict"), [(1.0, HEALTHY), (3.0, REFIT), (8.0, DISTRUST), (0.1, REFIT)])
def test_p_values_that_are_not_as_rare_as_they_say(schema: Schema, times: float, verdict: str) -> None:
    seen = events(5000, 1)
    p = np.minimum(np.random.default_rng(3).random(len(seen)) / times, 1.0)
    health = watched(schema, seen, p).health()
    assert health.verdict == verdict
    assert health.share[0.01] == pytest.approx(0.01 * times, rel=0.5)


def test_what_is_older_than_a_week_does_not_count(schema: Schema) -> None:
    drift = watched(schema, events(3000, 1, admins=0.9))
    later, _ = decode(events(3000, 2))
    drift.observe(later.time + 7 * 24 * HOUR_MS, Vectorizer(schema)(later).codes, np.random.default_rng(4).random(3000))
    health = drift.health()
    assert (health.events, health.verdict) == (3000, HEALTHY)


def test_the_index_is_that_of_the_literature_and_chance_is_not_drift() -> None:
    bins = np.arange(4)
    a, b = np.array([4000, 3000, 2000, 1000]), np.array([1000, 2000, 3000, 4000])
    p, q = a / a.sum(), b / b.sum()
    assert stability(a, b, bins) == pytest.approx(float(((q - p) * np.log(q / p)).sum()), abs=0.002)
    generator = np.random.default_rng(0)
    found = [
        stability(generator.multinomial(5000, [0.01] * 100), generator.multinomial(1000, [0.01] * 100), np.arange(100))
        for _ in range(50)
    ]
    assert np.mean(found) < 0.02


def test_the_doctor_tells_what_is_wrong_and_how_the_service_does(
    kafka: str, redis_url: str, unique: Callable[[str], str], tmp_path: Path, schema: Schema
) -> None:
    topics = create(kafka, unique("doctor"), partitions=1)
    store = Store(tmp_path / "store")
    store.promote(str(bundle(tmp_path / "one", "2026-01-01T00:00:00+00:00", "one")))
    port = free_port()
    more = {"bundle": str(store.path), "redis.url": redis_url, "metrics_port": port}
    found = {finding.what: finding for finding in examine(topics.settings(**more))}
    assert [finding.mark for finding in found.values()] == ["ok", "ok", "ok", "ok", "ok", "warn"]
    assert found["service"].text.startswith(f"none answers at 127.0.0.1:{port}")

    metrics = Metrics()
    seen = watched(schema, events(3000, 1, users=2000))
    metrics.registry.register(DriftCollector(lambda: seen))
    metrics.set_repair_shares({"time_future": 0.97})
    server = serve(metrics, "127.0.0.1", port, alive=lambda: "", ready=lambda: "")
    try:
        text = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5).read().decode()
        assert 'ripcurrent_drift_verdict{verdict="do not trust"} 1.0' in text
        version = str(read_manifest(resolve(store.path))["version"])
        lowered = Lowered("300201", ("device.hostname",), 0.34, (), 1_700_000_000_000, ((1.0,),))
        decision = orjson.dumps(Decision(1_700_000_000_000, (lowered,)).to_json() | {"by": "one"})
        producer = Producer({"bootstrap.servers": kafka})
        producer.produce(f"{topics.name}-ledger", decision, f"default:calibration:1700000000000:{version}".encode())
        assert producer.flush(10) == 0
        found = {finding.what: finding for finding in examine(topics.settings(**more))}
        assert found["live calibration"].mark == "warn"
        assert found["live calibration"].text == (
            "counts for less since 2023-11-14 22:13:20 UTC: new values of device.hostname in 34% of the events of type "
            "300201"
        )
        drift, repairs = found["drift"], found["repairs"]
        flags = [f"--kafka-bootstrap-servers={kafka}", f"--alerts={topics.name}-alerts", f"--metrics-port={port}"]
        report = CliRunner().invoke(app, ["report", "--out", str(tmp_path / "report.html"), *flags])
    finally:
        server.shutdown()
        server.server_close()
    assert (drift.mark, drift.text.split(";")[0]) == ("bad", DISTRUST)
    assert report.exit_code == 0, report.exception
    rows = "<tr><td>do not trust</td></tr><tr><td>most shifted fields user.name"
    page = (tmp_path / "report.html").read_text()
    assert rows in page
    assert repairs.mark == "warn" and "time_future in 97% of recent events" in repairs.text
    assert "time_future in 97% of recent events" in page
    wrong = {finding.what: finding for finding in examine(topics.settings(**more | {"alerts": "nowhere"}))}
    assert wrong["kafka"].mark == "bad"
    assert "nowhere" in wrong["kafka"].text


def test_the_command_ends_with_1_where_something_is_wrong(tmp_path: Path) -> None:
    done = ripcurrent(
        "doctor", "--kafka-bootstrap-servers", "localhost:1", "--redis-url", "redis://localhost:1/0", cwd=tmp_path
    )
    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()][:3] == [
        ["bad", "bundle"],
        ["bad", "redis"],
        ["bad", "kafka"],
    ]
