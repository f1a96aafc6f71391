"""What release 0.1.0 left behind is taken up by a service of today: the keys of its Redis, and its topics.

Its bundle is not: the record score was made anew since, and `fit` makes another bundle of the same history.

`tests/fixtures/release-0.1.0/README.md` says what the files hold.
"""

from __future__ import annotations

import base64
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from confluent_kafka import Consumer, Producer, TopicPartition
from loop_harness import Topics, create
from service_process import Service, lines

from state.episode_rules import EpisodeRules
from state.redis import formats
from streamer.bundles.bundle_files import load
from streamer.bundles.manifest import BundleError
from streamer.devtools.simulator.generator import simulate
from streamer.training.fit import fit

FIXTURE = Path(__file__).parent / "fixtures" / "release-0.1.0"
NAME = "release"
DATABASE = 13
CLASSES = (1006, 1007, 3002)
"""Those of the events, and of the training of the bundle."""
RUN = 31
"""Events in a row to one partition; half of them are a whole number of runs."""


def rows(part: str, name: str) -> list[Any]:
    with gzip.open(FIXTURE / part / f"{name}.ndjson.gz") as file:
        return [orjson.loads(line) for line in file]


def raw(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def database(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url.removesuffix("/0") + f"/{DATABASE}")


def restore_redis(client: redis.Redis) -> None:
    for row in rows("half", "redis"):
        key = base64.b64decode(row["key"])
        if row["type"] == "string":
            client.set(key, base64.b64decode(row["value"]))
        elif row["type"] == "hash":
            client.hset(key, mapping={base64.b64decode(name): base64.b64decode(held) for name, held in row["value"]})
        else:
            client.zadd(key, {base64.b64decode(member): score for member, score in row["value"]})
        if row["ttl_ms"] >= 0:
            client.pexpire(key, row["ttl_ms"])


def restore_topics(topics: Topics, events: list[bytes]) -> None:
    """The first half of the events, what release 0.1.0 made of them, and how far its group had come."""
    for partition, run in in_runs(events):
        topics.produce(run, partition)
    producer = Producer({"bootstrap.servers": topics.bootstrap})
    for suffix in ("scores", "ledger"):
        for row in rows("half", suffix):
            headers = [(name, raw(value)) for name, value in row["headers"]]
            topic = f"{NAME}-{suffix}"
            producer.produce(topic, raw(row["value"]), raw(row["key"]), row["partition"], headers=headers)
    assert producer.flush(30) == 0
    group = Consumer({"bootstrap.servers": topics.bootstrap, "group.id": NAME})
    offsets = [TopicPartition(topics.events, partition, offset) for partition, offset in committed("half").items()]
    group.commit(offsets=offsets, asynchronous=False)
    group.close()


def in_runs(events: list[bytes], first: int = 0) -> Iterator[tuple[int, list[bytes]]]:
    """Events with the partition to which they went in the recording. first: of all of them."""
    for start in range(0, len(events), RUN):
        yield (first + start) // RUN % 2, events[start : start + RUN]


def committed(part: str) -> dict[int, int]:
    """Of each partition, in order."""
    offsets = orjson.loads((FIXTURE / part / "committed.json").read_bytes())
    return {int(name.rpartition(":")[2]): offset for name, offset in sorted(offsets.items())}


def whole(suffix: str) -> list[Any]:
    """The values of the messages of an undisturbed run of release 0.1.0."""
    return [orjson.loads(raw(row["value"]) or b"null") for row in rows("whole", suffix)]


def place(score: dict[str, Any]) -> tuple[int, int, int]:
    return score["partition"], score["offset"], score["index"]


@pytest.mark.extended
def test_a_service_of_today_goes_on_where_release_0_1_0_stopped(
    kafka: str, redis_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = fitted_today(tmp_path)
    topics = create(kafka, NAME, partitions=2)
    events, half = lines(FIXTURE / "events.ndjson.gz"), sum(committed("half").values())
    restore_topics(topics, events[:half])
    restore_redis(database(redis_url))
    service = Service(topics, bundle, redis_url, DATABASE, tenant=NAME, ledger=f"{NAME}-ledger", threshold=None)
    with service.running():
        done = half
        for partition, run in in_runs(events[half:], half):  # as in the recording, so that partitions interleave alike
            topics.produce(run, partition)
            done += len(run)
            topics.wait_until_read(done, 240)
    log = capfd.readouterr().err
    assert "windows are filled" in log  # Those of another embedding say nothing.

    scores = [orjson.loads(message.value()) for message in topics.read("scores")]
    expected = {place(score) for score in whole("scores")}
    assert sorted(map(place, scores)) == sorted(expected)  # nothing lost, nothing doubled

    found = [orjson.loads(message.value())["metadata"]["uid"] for message in topics.read("alerts")]
    assert len(found) == len(set(found))
    assert not set(found) & {row["uid"] for row in rows("half", "alerts")}


def fitted_today(folder: Path) -> Path:
    """A bundle of the training events of the release's bundle (`record.py`), which this release refuses to read."""
    days = simulate(seed=3, days=2, events_per_day=2600, incidents={})
    events = [event for day in days for event in day.events if orjson.loads(event)["class_uid"] in CLASSES]
    (folder / "train.ndjson").write_bytes(b"\n".join(events))
    fit([folder / "train.ndjson"], folder / "bundle")
    return folder / "bundle"


def test_the_bundle_of_release_0_1_0_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    shutil.copy(FIXTURE / "manifest.json", tmp_path / "bundle")
    with pytest.raises(BundleError, match="bundle format 5, this version reads 8; fit the bundle again"):
        load(tmp_path / "bundle")


def test_the_formats_are_those_of_release_0_1_0_as_long_as_their_keys_are() -> None:
    """A field of an episode that gets another name is another format."""
    for row in rows("half", "redis"):
        key = base64.b64decode(row["key"])
        if row["type"] == "string":
            assert formats.suffix("windows", base64.b64decode(row["value"])[0]) == ""
        elif b":episodes:" in key and not formats.suffix("episodes", formats.EPISODES):
            values = {base64.b64decode(name).decode(): base64.b64decode(held) for name, held in row["value"]}
            del values["v"]
            written = EpisodeRules.read(values)
            assert {name[0] for name in values} == {"a", "d", "e"}
            for name, value in values.items():
                assert fields_of(written.value(name)) == fields_of(value)


def fields_of(value: bytes) -> Any:
    """An episode, decision or position, without the value that 0.1.0 kept as it was and this release as a hash."""
    found = orjson.loads(value)
    return {**found, "what": None} if isinstance(found, dict) else found
