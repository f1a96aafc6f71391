"""A range scored again gives what the service gave, as often as it is asked for, and changes nothing that is live."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from loop_harness import Topics, create, until
from p_values import assert_same_scores
from service_process import LINE, Service, alerts_of, lines, scores_of, short_training
from typer.testing import CliRunner, Result

from state.episodes import CLOSE
from streamer.cli.main import app
from streamer.replay.comparison import compare
from streamer.training.fit import fit

Scores = dict[tuple[int, int, int], float]

_QUICK = "import streamer.replay.replay as r; r.CHECKPOINT_S = 0.05; from streamer.cli.main import main; main()"
KILLABLE = [sys.executable, "-c", _QUICK]
"""The command, with a checkpoint every few batches."""


def arguments(topics: Topics, bundle: Path, *more: Any) -> list[str]:
    flags = {"bundle": bundle, "events": topics.events, "threshold": LINE, "device": "cpu", "tenant": topics.events}
    flags |= {"kafka-bootstrap-servers": topics.bootstrap, "kafka-group-id": topics.name}
    return ["replay", *(f"--{key}={value}" for key, value in flags.items()), *map(str, more)]


def replay(topics: Topics, bundle: Path, *more: Any) -> Result:
    done = CliRunner().invoke(app, arguments(topics, bundle, *more))
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def alerts_in(path: Path) -> dict[str, dict[str, Any]]:
    found = [orjson.loads(line) for line in lines(path)]
    alerts = {alert["metadata"]["uid"]: alert for alert in found}
    assert len(alerts) == len(found)
    return alerts


def scores_in(path: Path) -> Scores:
    found = [orjson.loads(line) for line in lines(path)]
    scores = {(score["partition"], score["offset"], score["index"]): score["p_value"] for score in found}
    assert len(scores) == len(found)
    return scores


def everything_live(bootstrap: str, redis_url: str) -> Any:
    """Every group's commits, every topic's end, and every key of Redis."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    groups = sorted(group.group_id for group in admin.list_consumer_groups().result(10).valid)
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "looks"})

    def ends_now() -> dict[tuple[str, int], Any]:
        partitions = [
            TopicPartition(name, partition)
            for name, topic in sorted(admin.list_topics(timeout=10).topics.items())
            if not name.startswith("__")
            for partition in topic.partitions
        ]
        return {(p.topic, p.partition): consumer.get_watermark_offsets(p, timeout=10) for p in partitions}

    ends: dict[tuple[str, int], Any] = {}

    def all_known() -> bool:
        try:
            ends.update(ends_now())
        except KafkaException:  # A topic of a test before is still being deleted.
            return False
        return True

    until(all_known, 60)
    consumer.close()
    digest = sha256()
    with redis.Redis.from_url(redis_url.removesuffix("/0") + "/1") as server:
        keys = sorted(server.keys())
        for key in keys:
            digest.update(key + (server.dump(key) or b""))
    assert keys
    return groups, ends, digest.hexdigest()


@pytest.mark.extended
def test_a_replay_gives_the_alerts_and_scores_of_the_service_twice_and_touches_nothing(
    undisturbed: Topics, folder: Path, redis_url: str, tmp_path: Path
) -> None:
    before = everything_live(undisturbed.bootstrap, redis_url)
    for name in ("one", "two"):
        size = {"one": 37, "two": 2048}[name]
        done = replay(
            undisturbed,
            folder / "bundle",
            *("--out", tmp_path / name, "--scores", tmp_path / f"{name}.scores", "--batch-size", size),
        )
        assert "do not cover" not in done.stderr
    assert everything_live(undisturbed.bootstrap, redis_url) == before

    live = alerts_of(undisturbed)
    one, two = alerts_in(tmp_path / "one"), alerts_in(tmp_path / "two")
    assert one.keys() == two.keys() == live.keys() != set()
    assert {body["finding_info"]["uid"] for body in one.values()} == {
        body["finding_info"]["uid"] for _, body in live.values()
    }
    scores = {(0, *at): p_value for at, p_value in scores_of(undisturbed).items()}
    assert_same_scores(scores_in(tmp_path / "one.scores"), scores_in(tmp_path / "two.scores"))
    assert_same_scores(scores_in(tmp_path / "one.scores"), scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.scores", "two", "two.scores"]


@pytest.mark.extended
def test_a_part_of_the_stream_gives_what_the_service_gave_there_and_says_what_a_short_warm_up_lacks(
    undisturbed: Topics, folder: Path, tmp_path: Path
) -> None:
    out, kept = tmp_path / "part", tmp_path / "part.scores"
    replay(undisturbed, folder / "bundle", "--from", 1500, "--to", "0=1900", "--out", out, "--scores", kept)
    live = {(0, *at): p_value for at, p_value in scores_of(undisturbed).items() if 1500 <= at[0] < 1900}
    assert_same_scores(scores_in(kept), live)
    told = {uid: body for uid, (_, body) in alerts_of(undisturbed).items() if body["activity_id"] != CLOSE}
    expected = {uid for uid, body in told.items() if 1500 <= _offset(body) < 1900}
    assert {uid for uid, body in alerts_in(out).items() if body["activity_id"] != CLOSE} == expected != set()

    done = replay(undisturbed, folder / "bundle", "--from", 1500, "--warmup", 0, "--out", out, "--scores", kept)
    assert "events have history that a warm-up of 0 does not cover" in done.stderr
    incomplete = sum(not orjson.loads(line)["complete"] for line in lines(kept))
    assert f"{incomplete:,} events have history" in done.stderr
    cold = scores_in(kept)
    assert max(abs(cold[at] - live[at]) for at in live) > 1e-3


def _offset(alert: dict[str, Any]) -> int:
    return int(alert["unmapped"]["source"]["offset"])


@pytest.mark.slow
def test_beside_a_replay_the_service_scores_as_ever(
    undisturbed: Topics, kafka: str, unique: Callable[[str], str], folder: Path, redis_url: str, tmp_path: Path
) -> None:
    beside = replace(create(kafka, unique("beside"), partitions=1), source=undisturbed.events)
    n = len(lines(folder / "test.ndjson"))
    service = Service(beside, folder / "bundle", redis_url, 7, batch_size=64, tenant=undisturbed.events)
    with subprocess.Popen(service.command) as process:
        until(lambda: process.poll() is not None or service.done() > 0)
        replay(undisturbed, folder / "bundle", "--out", tmp_path / "out")
        until(lambda: process.poll() is not None or service.done() >= n)
        process.terminate()
        assert process.wait(30) == 0
    assert alerts_of(beside).keys() == alerts_in(tmp_path / "out").keys() == alerts_of(undisturbed).keys()
    assert_same_scores(scores_of(beside), scores_of(undisturbed))


@pytest.mark.extended
@pytest.mark.parametrize("target", ["file", pytest.param("topic", marks=pytest.mark.slow)])
def test_a_replay_that_is_killed_goes_on_where_it_was(
    undisturbed: Topics,
    unique: Callable[[str], str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    own = unique("replayed")
    admin = AdminClient({"bootstrap.servers": undisturbed.bootstrap})
    admin.create_topics([NewTopic(own, 1, 1)])[own].result(10)
    progress = tmp_path / ("out.progress" if target == "file" else f"{own}.progress")
    more = ["--out", "out"] if target == "file" else ["--out-topic", own]
    killed = [*arguments(undisturbed, folder / "bundle", *more), "--batch-size=16"]
    positions = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen([*KILLABLE, *killed], cwd=tmp_path, stderr=subprocess.PIPE) as process:
            least = (positions or [0])[-1] + 300
            until(lambda least=least: process.poll() is not None or _messages(progress) >= least)
            assert process.poll() is None, process.communicate()
            process.send_signal(number)
            said = process.communicate(timeout=30)[1].decode()
        assert ("the same command goes on where it was" in said) == (number == signal.SIGTERM)
        assert process.returncode == (130 if number == signal.SIGTERM else -number)
        positions.append(_messages(progress))
    assert positions[-1] < len(lines(folder / "test.ndjson"))
    if target == "file":  # What was written after the last checkpoint is not written twice.
        with (tmp_path / "out").open("ab") as file:
            file.write(b'{"cut off')
    other = subprocess.run([*KILLABLE, *killed, "--from=5"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert f"{progress.name} is of another replay that was cut off" in other.stderr

    monkeypatch.chdir(tmp_path)
    done = replay(undisturbed, folder / "bundle", *more, "--batch-size=16")
    assert "going on after" in done.stderr
    expected = alerts_of(undisturbed)
    if target == "file":
        assert alerts_in(tmp_path / "out").keys() == expected.keys()
    else:
        found = undisturbed.read_topic(own)
        uids = [orjson.loads(message.value())["metadata"]["uid"] for message in found]
        assert sorted(uids) == sorted(expected)
        assert {message.key() for message in found} == {key for key, _ in expected.values()}
        groups = admin.list_consumer_groups().result(10).valid
        assert not [group.group_id for group in groups if "replay" in group.group_id]
    assert not progress.exists()


def _messages(progress: Path) -> int:
    with suppress(FileNotFoundError):
        return int(orjson.loads(progress.read_bytes())["counts"]["messages"])
    return 0


@pytest.mark.extended
def test_two_replays_of_several_partitions_agree(
    kafka: str, unique: Callable[[str], str], folder: Path, tmp_path: Path
) -> None:
    topics = create(kafka, unique("several"), partitions=3)
    topics.produce(lines(folder / "test.ndjson")[:900])
    runs = []
    for name in ("one", "two"):
        replay(topics, folder / "bundle", "--out", tmp_path / name, "--scores", tmp_path / f"{name}.scores")
        runs.append((alerts_in(tmp_path / name).keys(), scores_in(tmp_path / f"{name}.scores")))
    assert runs[0][0] == runs[1][0]
    assert_same_scores(runs[0][1], runs[1][1])
    assert len(runs[0][1]) == 900


def test_an_empty_range_and_wrong_ones(undisturbed: Topics, folder: Path, tmp_path: Path) -> None:
    done = replay(undisturbed, folder / "bundle", "--last", "1ms", "--out", tmp_path / "none")
    assert "0 events of 0 messages, 0 alerts" in done.stdout
    assert (tmp_path / "none").read_bytes() == b""
    for more, words in [
        (["--from", "soon"], "is no place in a topic"),
        (["--out-topic", f"{undisturbed.name}-alerts", f"--events={undisturbed.name}-alerts"], "belongs to the live"),
        (["--out-topic", "nowhere"], "nowhere; create with"),
    ]:
        failed = CliRunner().invoke(app, arguments(undisturbed, folder / "bundle", *more))
        assert failed.exit_code == 1
        assert words in str(failed.exception)


def test_compare_says_what_another_bundle_gains_loses_and_ranks_otherwise(
    undisturbed: Topics, folder: Path, tmp_path: Path
) -> None:
    with short_training():
        fit([folder / "train.ndjson"], tmp_path / "other", seed=1)
    out = tmp_path / "differences"
    for bundle, name in ((folder / "bundle", "own"), (tmp_path / "other", "others")):
        replay(undisturbed, bundle, "--out", tmp_path / name, "--scores", tmp_path / f"{name}.scores")
    done = replay(undisturbed, folder / "bundle", "--compare", tmp_path / "other", "--out", out)
    changes = [orjson.loads(line) for line in lines(out)]
    # Compared are all events at or under the line; what of them is told as one alert is another question.
    for name, p_value in (("own", "p_before"), ("others", "p_after")):
        crossed = {at for at, p in scores_in(tmp_path / f"{name}.scores").items() if p <= LINE}
        found = {_at(change["at"]): change[p_value] for change in changes if change[p_value] is not None}
        assert found.keys() == crossed != set()
        told = {_at(_label(body)) for body in alerts_in(tmp_path / name).values()}
        assert told <= crossed
    by_what = {what: [c for c in changes if c["what"] == what] for what in ("gained", "lost", "kept", "re-ranked")}
    assert all(change["p_before"] is None for change in by_what["gained"])
    assert all(change["p_after"] is None for change in by_what["lost"])
    assert by_what["kept"] + by_what["re-ranked"]
    assert f"{len(by_what['gained'])} gained" in done.stdout


def _at(label: str) -> tuple[int, int, int]:
    partition, offset, index = map(int, label.rsplit(":", 3)[1:])
    return partition, offset, index


def _label(alert: dict[str, Any]) -> str:
    at = alert["unmapped"]["source"]
    return f"{at['topic']}:{at['partition']}:{at['offset']}:{at['index']}"


def test_ranks_are_those_among_the_alerts_of_both() -> None:
    def line(side: str, at: str, p_value: float, cause: str = "c") -> dict[str, Any]:
        return {"side": side, "at": at, "entity": "user:a", "cause": cause, "p_value": p_value}

    before = [line("before", at, p) for at, p in [("a", 0.1), ("b", 0.2), ("c", 0.3), ("gone", 0.001)]]
    after = [line("after", at, p) for at, p in [("a", 0.01), ("c", 0.02), ("b", 0.03), ("new", 0.001)]]
    after.append(line("after", "gone", 0.002, "another"))
    found = {(change.at, change.cause): change for change in compare([*before, *after])}
    assert {at: change.what for at, change in found.items()} == {
        ("a", "c"): "kept",
        ("b", "c"): "re-ranked",
        ("c", "c"): "re-ranked",
        ("new", "c"): "gained",
        ("gone", "c"): "lost",
        ("gone", "another"): "gained",
    }
    assert (found["b", "c"].rank_before, found["b", "c"].rank_after) == (2, 3)
    assert [change.what for change in compare([*before, *after])][:3] == ["gained", "gained", "lost"]


def test_a_bundle_fitted_to_a_range_of_a_topic_is_that_of_the_file_with_the_same_events(
    kafka: str, unique: Callable[[str], str], folder: Path, tmp_path: Path
) -> None:
    topics = create(kafka, unique("fit"), partitions=3)
    events = lines(folder / "train.ndjson")[:600]
    (tmp_path / "events.ndjson").write_bytes(b"\n".join(events))
    after = int(time.time() * 1000) - 60_000  # one after the other, whatever the partition
    producer = Producer({"bootstrap.servers": kafka})
    for i, event in enumerate([b"before the range", *events, b"after it"]):
        producer.produce(topics.events, event, partition=i % 3, timestamp=after + i)
    assert producer.flush(20) == 0
    given = ["--topic", topics.events, "--from", after + 1, "--to", after + 601, "--kafka-bootstrap-servers", kafka]
    with short_training():
        for name, source in [("file", [tmp_path / "events.ndjson"]), ("topic", given)]:
            done = CliRunner().invoke(app, ["fit", "--out", str(tmp_path / name), *map(str, source)])
            assert done.exit_code == 0, done.exception
            assert "600 read, 600 used, 0 could not be read" in done.stdout
    manifests = [orjson.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("file", "topic")]
    for manifest in manifests:
        assert manifest["files"].pop("exemplars.ndjson")  # they say where their events stand
    assert manifests[0]["files"] == manifests[1]["files"]
    for wrong in ([], ["events.ndjson", "--topic", "t"], ["events.ndjson", "--last", "1h"]):
        assert "events come from files, or from --topic" in str(CliRunner().invoke(app, ["fit", *wrong]).exception)
