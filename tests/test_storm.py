"""A storm of anomalies through the whole service: it is told in a handful of alerts and does not hold up the stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from loop_harness import Topics, create, until
from service_process import Service, alerts_of, short_training

from streamer.devtools.simulator.generator import simulate, write
from streamer.training.fit import fit

NORMAL, MANY_EVENTS, HOSTS = 30_000, 100_000, 700


def storm(example: bytes, begins: int) -> list[bytes]:
    """A program that training never saw, started on every host, a thousand times a second."""
    events = []
    for i in range(MANY_EVENTS):
        event = orjson.loads(example)
        event["time"] = begins + i
        event["metadata"]["uid"] = f"storm-{i}"
        event["device"] = {
            **event["device"],
            "hostname": f"WS-{i % HOSTS}",
            "ip": f"10.77.{i % HOSTS // 250}.{i % 250}",
        }
        event["process"]["name"] = event["process"]["file"]["name"] = "locker.exe"
        event["process"]["file"]["path"] = "C:\\ProgramData\\locker.exe"
        event["process"]["cmd_line"] = f"C:\\ProgramData\\locker.exe --all --key {i:x}"
        events.append(orjson.dumps(event))
    return events


def seconds_an_event(service: Service, topics: Topics, events: list[bytes]) -> float:
    """Of the last nine tenths, the service being at work already."""
    before = service.done()
    topics.produce(events, 0)
    until(lambda: service.done() > before + len(events) // 10)
    began, done = time.perf_counter(), service.done()
    until(lambda: service.done() >= before + len(events), 600)
    return (time.perf_counter() - began) / (before + len(events) - done)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_anomalies_are_a_handful_of_alerts(
    kafka: str, unique: Callable[[str], str], tmp_path: Path, redis_url: str
) -> None:
    days = list(simulate(seed=9, days=5))
    write(days[:3], tmp_path / "days.ndjson")
    with short_training():
        fit([tmp_path / "days.ndjson"], tmp_path / "bundle")
    normal = [event for day in days[3:] for event in day.events][:NORMAL]
    launch = next(event for event in normal if b'"process"' in event and orjson.loads(event)["type_uid"] == 100701)
    begins = orjson.loads(normal[-1])["time"] + 1000
    storming = storm(launch, begins)
    topics = create(kafka, unique("storm"), partitions=1)
    service = Service(topics, tmp_path / "bundle", redis_url, 7, threshold=5e-3)
    with service.running():
        usual, stormy = seconds_an_event(service, topics, normal), seconds_an_event(service, topics, storming)
        for after in (1, 2):  # so that what has ended is closed
            topics.produce([orjson.dumps(orjson.loads(launch) | {"time": begins + after * 2 * 3_600_000})], 0)
            until(lambda: service.done() >= NORMAL + MANY_EVENTS + after)  # noqa: B023
    told = [body for _, body in alerts_of(topics).values() if body["unmapped"]["source"]["offset"] >= NORMAL]
    creates = {body["finding_info"]["uid"] for body in told if body["activity_name"] == "Create"}
    counted = sum(max(body["count"] for body in told if body["finding_info"]["uid"] == uid) for uid in creates)
    ratio = stormy / usual
    print(f"{len(told)} messages of {len(creates)} findings, {counted:,} events; {ratio:.2f} times normal an event")
    assert len(creates) <= 5
    assert counted > 0.99 * MANY_EVENTS
    assert ratio < 2
