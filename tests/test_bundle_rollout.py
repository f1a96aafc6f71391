"""A promoted bundle takes over while the service runs: no event is lost or scored twice, and every score is the one
that the bundle would have given if it had always served. A candidate scores beside.

Detectors of these tests score an event by the window that ends at it, so a window that is not what it was shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import redis
from loop_harness import (
    EVENT,
    LINE,
    EachRow,
    HashDetector,
    Topics,
    WindowDetector,
    create,
    figure,
    p_value,
    running,
    until,
)

from encoder.ocsf.events import Message
from state.memory.windows import MemoryWindows
from state.redis.windows import RedisWindows
from streamer.detection.batches import ScoredBatch
from streamer.devtools.servers import ValkeyServer
from streamer.errors import RipcurrentError
from streamer.service.loop import Service
from streamer.service.ports import Bundles, Opened


class Judge(WindowDetector):
    """One whose scores are its own: another name gives other scores."""

    name = "one"

    def judge(self, prepared: tuple[HashDetector, Sequence[Message]]) -> ScoredBatch:
        scored = super().judge(prepared)
        p = scored.p_value.copy()
        for row in range(len(scored)):
            p[row] = p_value(f"{p[row]!r}{self.name}") if self.name != "one" else p[row]
        return replace(scored, p_value=p)


@pytest.fixture
def topics(kafka: str, unique: Callable[[str], str]) -> Topics:
    return create(kafka, unique("succession"), partitions=1)


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer({}) as server:
        yield server


@pytest.fixture(autouse=True)
def empty(valkey: ValkeyServer) -> None:
    redis.from_url(valkey.url).flushall()


def point(store: Path, name: str) -> None:
    (store / "versions" / name).mkdir(parents=True, exist_ok=True)
    (store / "new").symlink_to(Path("versions") / name)
    (store / "new").replace(store / "current")


def service_for(
    topics: Topics, valkey: ValkeyServer, store: Path, held: list[RedisWindows] | None = None, **more: object
) -> Service:
    """A service whose bundles are called NAME_ENCODER: the scores of a name, the windows of an encoder. held: gets all
    windows that were opened."""

    def opening(path: Path) -> Opened:
        name, _, encoder = path.name.partition("_")
        if name == "broken":
            raise RipcurrentError(f"{path} is not whole")
        windows = RedisWindows(valkey.url, encoder=encoder, dim=4, timeout_s=1.0, retries=1)
        if held is not None:
            held.append(windows)
        detector = Judge(windows, lambda _: time.sleep(0.01))
        detector.name = name
        return Opened(path.name, detector, EachRow(), windows)

    settings = topics.settings(bundle=str(store), **more)
    serving = store / "versions" / "one_a"
    first = opening(serving)
    bundles = Bundles(store / (store / "current").readlink(), opening)
    return Service(settings, first.detector, first.alerting, threshold=LINE, windows=first.windows, bundles=bundles)


def scores_by(topics: Topics, name: str, n: int) -> list[float]:
    """What the judge of this name gives n events in an undisturbed run."""
    judge = Judge(MemoryWindows(dim=4))
    judge.name = name
    values = [orjson.dumps(EVENT | {"time": EVENT["time"] + i}) for i in range(n)]
    scored = judge.score([Message(topics.events, 0, i, -1, value) for i, value in enumerate(values)])
    return [float(p) for p in scored.p_value]


def assert_taken_over(topics: Topics, n: int, *names: str) -> list[int]:
    """Each event is scored once, by one of these in turn, as that one would in an undisturbed run; where each ended."""
    found = {}
    for message in topics.read("scores"):
        score = orjson.loads(message.value())
        assert score["offset"] not in found
        found[score["offset"]] = score["p_value"]
    assert sorted(found) == list(range(n))
    alerts, place, ends = [], 0, []
    for name in names:
        expected = scores_by(topics, name, n)
        begin = place
        while place < n and found[place] == expected[place]:
            alerts += [place] if expected[place] <= LINE else []
            place += 1
        assert place > begin, f"{name} has scored nothing from {begin} on"
        ends.append(place)
    assert place == n
    assert topics.alerts() == sorted(f"{topics.events}:0:{offset}:0" for offset in alerts)
    return ends


@pytest.mark.parametrize("successor", ["two_a", "two_b"], ids=["same encoder", "another encoder"])
def test_a_promoted_bundle_takes_over_under_load_without_losing_or_doubling(
    topics: Topics, valkey: ValkeyServer, tmp_path: Path, successor: str
) -> None:
    point(tmp_path, "one_a")
    topics.produce_events(1500)
    service = service_for(topics, valkey, tmp_path)
    with running(service) as raised:
        topics.wait_until_read(400)
        point(tmp_path, successor)
        for step in range(10):
            topics.produce_events_from(1500 + step * 150, 150)
            time.sleep(0.2)
        until(lambda: figure(service, "bundle_swaps_total") == 1)
        topics.produce_events_from(3000, 300)
        topics.wait_until_read(3300)
    assert raised == []
    first, _ = assert_taken_over(topics, 3300, "one", "two")
    assert 400 <= first < 3300


def test_back_again_and_one_that_cannot_be_opened(topics: Topics, valkey: ValkeyServer, tmp_path: Path) -> None:
    point(tmp_path, "one_a")
    service = service_for(topics, valkey, tmp_path)
    with running(service) as raised:
        topics.produce_events(200)
        topics.wait_until_read(200)
        point(tmp_path, "two_b")
        until(lambda: figure(service, "bundle_swaps_total") == 1)
        topics.produce_events_from(200, 200)
        topics.wait_until_read(400)
        point(tmp_path, "broken_b")
        until(lambda: figure(service, "bundles_refused_total") == 1)
        topics.produce_events_from(400, 200)
        topics.wait_until_read(600)
        point(tmp_path, "one_a")
        until(lambda: figure(service, "bundle_swaps_total") == 2)
        topics.produce_events_from(600, 200)
        topics.wait_until_read(800)
    assert raised == []
    assert figure(service, "bundles_refused_total") == 1
    assert assert_taken_over(topics, 800, "one", "two", "one") == [200, 600, 800]


def test_bundles_that_were_replaced_hold_no_connections(topics: Topics, valkey: ValkeyServer, tmp_path: Path) -> None:
    point(tmp_path, "one_a")
    held: list[RedisWindows] = []
    beside = str(tmp_path / "versions" / "two_b")
    service = service_for(topics, valkey, tmp_path, held, shadow=beside)
    client = redis.from_url(valkey.url)
    others = len(client.client_list())
    with running(service) as raised:
        for swaps, name in enumerate(["two_a", "three_b", "one_c", "two_b"], 1):
            topics.produce_events_from(swaps * 50, 50)
            topics.wait_until_read(swaps * 50)
            point(tmp_path, name)
            until(lambda swaps=swaps: service.metrics.swaps._value.get() == swaps)
        topics.produce_events_from(250, 50)
        topics.wait_until_read(250)
        until(lambda: bool(service._shadow and service._shadow._prepared))
        until(lambda: len(client.client_list()) == others + 2)  # the one that serves and the one beside
    assert raised == []
    assert len(held) >= 6


def test_a_candidate_beside_is_compared_and_changes_nothing(
    topics: Topics, valkey: ValkeyServer, tmp_path: Path
) -> None:
    point(tmp_path, "one_a")
    topics.produce_events(300)
    n = 300
    service = service_for(topics, valkey, tmp_path, shadow=str(tmp_path / "versions" / "two_b"))
    with running(service) as raised:
        topics.wait_until_read(n)
        while not figure(service, "shadow_events_total"):  # It joins once it has caught up.
            assert raised == [] and n < 20_000
            topics.produce_events_from(n, 50)
            n += 50
            topics.wait_until_read(n)
        topics.produce_events_from(n, 700)
        n += 700
        topics.wait_until_read(n)
    assert raised == []
    assert_taken_over(topics, n, "one")
    seen = int(figure(service, "shadow_events_total"))
    assert 700 < seen <= n
    ours, theirs = (scores_by(topics, name, n)[n - seen :] for name in ("one", "two"))
    whose = {name: figure(service, "shadow_alerts_total", whose=name) for name in ("both", "gained", "lost")}
    pairs = [(a <= LINE, b <= LINE) for a, b in zip(ours, theirs, strict=True)]
    assert whose == {
        "both": pairs.count((True, True)),
        "gained": pairs.count((False, True)),
        "lost": pairs.count((True, False)),
    }
    assert figure(service, "shadow_decades_total") > 0
    assert figure(service, "shadow_failures_total") == 0


def test_a_candidate_that_fails_is_counted_and_the_stream_goes_on(
    topics: Topics, valkey: ValkeyServer, tmp_path: Path
) -> None:
    point(tmp_path, "one_a")
    service = service_for(topics, valkey, tmp_path, shadow=str(tmp_path / "versions" / "broken_b"))
    with running(service) as raised:
        topics.produce_events(300)
        topics.wait_until_read(300)
        until(lambda: figure(service, "shadow_failures_total") >= 1)
    assert raised == []
    assert_taken_over(topics, 300, "one")
