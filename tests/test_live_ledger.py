"""What the live calibration learns, in Kafka: recorded with the alerts, the same after a crash, shared by the processes
of a group, and there for a replay."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import loop_harness
import numpy as np
import orjson
import pytest
from confluent_kafka import Producer
from loop_harness import EVENT, EachRow, NewsDetector, Topics, create, figure, running, until
from numpy.typing import NDArray

from encoder.ocsf.events import Message
from streamer.alerting.threshold import HOUR_MS
from streamer.alerting.threshold_ledger import ThresholdLedger, recorded_decisions
from streamer.detection.live_calibration import Decision
from streamer.service.loop import Service

RATE = 4800.0
START = EVENT["time"] // HOUR_MS * HOUR_MS
N, RENAMED = 4000, 1000
"""Events of the stream, and the first that has the new name: 200 an hour."""


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("live"), partitions=1)


def value(i: int) -> bytes:
    return orjson.dumps(
        EVENT | {"time": START + i * HOUR_MS // 200, "device": {"hostname": "new" if i >= RENAMED else "old"}}
    )


def service_for(topics: Topics, instance: str = "one") -> Service:
    settings = topics.settings(alerts_per_day=60, **{"kafka.instance_id": instance})
    return Service(
        settings, NewsDetector(), EachRow(), threshold=ThresholdLedger(settings, instance, RATE), instance=instance
    )


def undisturbed(topics: Topics) -> tuple[NDArray[np.float64], list[Decision]]:
    """The p-values and decisions of one process that reads all events at once."""
    detector = NewsDetector()
    detector.live.moves = True
    scored = detector.score([Message(topics.events, 0, i, -1, value(i)) for i in range(N)])
    assert scored.live is not None
    return scored.p_value, scored.live.decisions


def scores_of(topics: Topics) -> NDArray[np.float64]:
    found = {body["offset"]: body["p_value"] for body in (orjson.loads(m.value()) for m in topics.read("scores"))}
    return np.array([found[i] for i in range(N)])


def assert_undisturbed(topics: Topics) -> None:
    p_value, decisions = undisturbed(topics)
    np.testing.assert_allclose(scores_of(topics), p_value, rtol=1e-6)
    assert recorded_decisions(topics.settings(), "b") == decisions
    assert any(decision.lowered for decision in decisions)


def test_decisions_are_recorded_and_a_replay_by_them_gives_the_same_scores(topics: Topics) -> None:
    topics.produce([value(i) for i in range(N)])
    service = service_for(topics)
    with running(service) as raised:
        topics.wait_until_read(N)
    assert raised == []
    assert_undisturbed(topics)
    p_value, _ = undisturbed(topics)
    hour = 200
    assert np.median(p_value[RENAMED : RENAMED + hour]) < 1e-3
    assert np.median(p_value[RENAMED + 5 * hour :]) > 0.1
    assert figure(service, "lowered_events_total", why="news") == N - RENAMED - hour
    replay = NewsDetector()
    recorded = recorded_decisions(topics.settings(), "b")
    assert recorded is not None
    replay.live.decisions.extend(recorded)
    for start in range(0, N, 777):
        batch = [Message(topics.events, 0, i, -1, value(i)) for i in range(start, min(start + 777, N))]
        scored = replay.score(batch)
        np.testing.assert_allclose(scored.p_value, p_value[start : start + 777], rtol=1e-6)
    assert recorded_decisions(topics.settings(), "another bundle") is None


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["the same", "another"])
def test_a_process_that_is_started_again_goes_on_with_what_was_counted(topics: Topics, names: list[str]) -> None:
    parts = 5
    for part in range(parts):
        topics.produce([value(i) for i in range(part * N // parts, (part + 1) * N // parts)])
        with running(service_for(topics, names[part % len(names)])) as raised:
            topics.wait_until_read((part + 1) * N // parts)
        assert raised == []
    if len(names) == 1:
        assert_undisturbed(topics)
    else:  # What another has judged is under the decision before: the end of an hour may be.
        p_value, decisions = undisturbed(topics)
        assert (np.abs(np.log(scores_of(topics) / p_value)) < 1e-4).mean() > 0.99
        found = recorded_decisions(topics.settings(), "b")
        assert found is not None
        assert [each.lowered[0].caps for each in found if each.lowered] == [
            each.lowered[0].caps for each in decisions if each.lowered
        ]


def test_a_process_that_is_killed_leaves_the_scores_of_an_undisturbed_run(topics: Topics) -> None:
    topics.produce([value(i) for i in range(N)])
    flags = json.loads(topics.settings(alerts_per_day=60, batches_per_transaction=3).model_dump_json())
    arguments = {k: v for k, v in flags.items() if k not in ("kafka", "redis", "threshold", "events")}
    arguments |= {"kafka.bootstrap_servers": topics.bootstrap, "kafka.group_id": topics.name, "events": topics.events}
    arguments |= {"kafka.instance_id": "one", "kafka.properties": {"session.timeout.ms": 6000}}
    arguments |= {"delay": 0.02, "events_per_day": RATE, "news": True}
    command = [sys.executable, loop_harness.__file__, json.dumps(arguments)]
    done = lambda: sum(max(offset, 0) for offset in topics.committed().values())  # noqa: E731
    for part in (2, 3):
        with subprocess.Popen(command) as process:
            until(lambda part=part: done() >= part * N // 6 or process.poll() is not None, 60)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert done() < N
    with subprocess.Popen(command) as process:
        until(lambda: done() >= N or process.poll() is not None, 60)
        process.terminate()
    assert process.returncode == 0
    assert_undisturbed(topics)


def test_one_process_decides_from_what_all_have_counted(topics: Topics) -> None:
    settings = topics.settings()
    producer = Producer({"bootstrap.servers": topics.bootstrap})
    owner, other = (ThresholdLedger(settings, name, RATE) for name in ("owner", "other"))
    owned = {"owner": {(topics.events, 0): 0}, "other": {(topics.events, 1): 0}}

    def judge(ledger: ThresholdLedger, name: str, rows: Sequence[int]) -> NewsDetector:
        detector = NewsDetector()
        detector.live = ledger.calibration(detector.live, owned[name])
        scored = detector.score([Message(topics.events, 0, i, -1, value(i)) for i in rows])
        ledger.judge(scored, owned[name])
        for output in ledger.outputs(0):
            producer.produce(output.topic, output.value, output.key)
        assert producer.flush(10) == 0
        ledger.committed()
        return detector

    owner.open()
    other.open()
    first, second = range(RENAMED, RENAMED + 200, 2), range(RENAMED + 1, RENAMED + 200, 2)
    judge(other, "other", second)
    judge(owner, "owner", first)
    assert not (recorded_decisions(settings, "b") or [Decision(0)])[-1].lowered
    # The owner takes note of it before it decides: as it would after a second, here as it takes over the partition.
    owned["owner"] |= owned["other"]
    judge(owner, "owner", [RENAMED + 200])
    decisions = recorded_decisions(settings, "b")
    assert decisions is not None
    alone = NewsDetector()
    alone.live.moves = True
    scored = alone.score([Message(topics.events, 0, i, -1, value(i)) for i in range(RENAMED, RENAMED + 201)])
    assert scored.live is not None
    assert decisions[-1].lowered[0].caps == scored.live.decisions[-1].lowered[0].caps
    # And the other judges by it.
    owned["other"] = {(topics.events, 2): 0}
    detector = judge(other, "other", [RENAMED + 300])
    assert detector.live.decisions == decisions
    for ledger in (owner, other):
        ledger.close()


def test_what_was_judged_and_not_committed_is_counted_again(topics: Topics) -> None:
    ledger = ThresholdLedger(topics.settings(), "one", RATE)
    ledger.open()
    owned = {(topics.events, 0): 0}
    keys = []
    for _ in range(2):
        detector = NewsDetector()
        detector.live = ledger.calibration(detector.live, owned)
        scored = detector.score([Message(topics.events, 0, i, -1, value(i)) for i in range(300)])
        ledger.judge(scored, owned)
        keys.append([(output.key, output.value) for output in ledger.outputs(0)])
        ledger.rewind()
    ledger.close()
    assert keys[0] == keys[1] != []


def test_another_bundle_begins_anew(topics: Topics) -> None:
    ledger = ThresholdLedger(topics.settings(), "one", RATE)
    ledger.open()
    owned = {(topics.events, 0): 0}
    detector = NewsDetector()
    detector.live = ledger.calibration(detector.live, owned)
    scored = detector.score([Message(topics.events, 0, i, -1, value(i)) for i in range(RENAMED, RENAMED + 300)])
    ledger.judge(scored, owned)
    assert scored.live is not None
    assert scored.live.lowered
    following = ledger.calibration(NewsDetector(bundle="next").live, owned)
    assert (following.bundle, following.decisions, following.tallies) == ("next", [], {})
    ledger.close()


def test_a_true_positive_withdraws_what_was_learned(topics: Topics) -> None:
    withdrawn = {("300201", "device.hostname"): START + 1000 * HOUR_MS}
    ledger = ThresholdLedger(topics.settings(), "one", RATE, lambda: withdrawn)
    ledger.open()
    owned = {(topics.events, 0): 0}
    detector = NewsDetector()
    detector.live = ledger.calibration(detector.live, owned)
    scored = detector.score([Message(topics.events, 0, i, -1, value(i)) for i in range(RENAMED, RENAMED + 300)])
    ledger.close()
    assert scored.live is not None
    assert all("device.hostname" not in each.fields for each in scored.live.lowered)
    assert replace(scored.live, withdrawn={}).bundle == "b"
