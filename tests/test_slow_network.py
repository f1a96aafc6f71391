"""A network between the service and its servers that delays, throttles, drops or half-closes connections: nothing is
lost or doubled, no score changes, and /readyz names what is slow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from loop_harness import LINE, EachRow, Topics, WindowDetector, create, running, until
from tcp_proxy import Disturbance, TcpProxy
from test_window_rebuild import assert_undisturbed

from state.redis.windows import RedisWindows
from streamer.devtools.servers import KafkaServer, ValkeyServer, free_port
from streamer.service.loop import Service

SLOW = {"delayed": Disturbance(delay_s=0.2), "throttled": Disturbance(bytes_per_s=20_000)}
BROKEN: dict[str, Callable[[TcpProxy], int]] = {
    "cut": TcpProxy.cut,
    "half-closed by the server": lambda proxy: proxy.half_close(to_client=True),
    "half-closed by the client": lambda proxy: proxy.half_close(to_client=False),
}


@pytest.fixture(scope="module")
def broker() -> Iterator[TcpProxy]:
    """In front of a Kafka that gives the proxy as its address."""
    port = free_port()
    server = KafkaServer({"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"})
    with TcpProxy(port, server.port) as proxy, server:
        yield proxy


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def store(valkey: ValkeyServer) -> Iterator[TcpProxy]:
    with TcpProxy(free_port(), valkey.port) as proxy:
        yield proxy


def service_for(topics: Topics, store: TcpProxy, delay: float) -> Service:
    url = f"redis://127.0.0.1:{store.port}/0"
    windows = RedisWindows(url, encoder="test", dim=4, timeout_s=5.0, retries=1)
    detector = WindowDetector(windows, lambda _: time.sleep(delay))
    return Service(topics.settings(), detector, EachRow(), threshold=LINE, windows=windows)


def done(topics: Topics) -> int:
    return sum(max(offset, 0) for offset in topics.committed().values())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["Kafka", "Redis"])
@pytest.mark.parametrize("how", [*SLOW, *BROKEN])
def test_a_network_that_delays_throttles_cuts_or_half_closes_loses_and_doubles_nothing(
    broker: TcpProxy, store: TcpProxy, valkey: ValkeyServer, unique: Callable[[str], str], where: str, how: str
) -> None:
    n = 3000
    topics = create(f"127.0.0.1:{broker.port}", unique("network"), partitions=1)
    topics.produce_events(n)
    proxy = {"Kafka": broker, "Redis": store}[where]
    service = service_for(topics, store, 0.05)
    try:
        with running(service) as raised:
            topics.wait_until_read(200)
            at_first = done(topics)
            if how in SLOW:
                proxy.disturbance = SLOW[how]
                until(lambda: f"{where} at 127.0.0.1:{proxy.port} is slow" in service.slow())
                print(service.slow())
                assert service.not_alive() == ""
            else:
                for _ in range(10):
                    assert BROKEN[how](proxy) > 0
                    until(lambda: proxy.connections > 0)
                    time.sleep(0.2)  # Some cuts come while it connects, others in the middle of what it does.
            until(lambda: done(topics) > at_first)
            assert done(topics) < n, "all was read before the network was disturbed"
            proxy.disturbance = Disturbance()
            topics.wait_until_read(n)
            until(lambda: service.not_ready() == "")
    finally:
        proxy.disturbance = Disturbance()
    assert raised == []
    assert_undisturbed(topics, n, valkey)


@pytest.mark.slow
def test_a_network_that_is_disturbed_for_minutes(
    broker: TcpProxy, store: TcpProxy, valkey: ValkeyServer, unique: Callable[[str], str]
) -> None:
    """Each disturbance in turn, for seconds, on both ways."""
    n, seconds = 30_000, 150.0
    topics = create(f"127.0.0.1:{broker.port}", unique("network"), partitions=1)
    topics.produce_events(n)
    service, chance, named = service_for(topics, store, 0.25), random.Random(7), set[str]()
    try:
        with running(service) as raised:
            topics.wait_until_read(200)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                proxy, how = chance.choice([broker, store]), chance.choice([*SLOW, *BROKEN])
                proxy.disturbance = SLOW.get(how, Disturbance())
                until_then = time.monotonic() + chance.uniform(2, 8)
                while time.monotonic() < until_then:
                    if how in BROKEN:
                        BROKEN[how](proxy)
                    named.update(server.split(" at ")[0] for server in service.slow().split("; ") if server)
                    assert (raised, service.not_alive()) == ([], "")
                    time.sleep(chance.uniform(0.1, 1))
                proxy.disturbance = Disturbance()
            assert done(topics) < n, "all was read before the network was whole again"
            topics.wait_until_read(n, 300)
    finally:
        broker.disturbance = store.disturbance = Disturbance()
    assert raised == []
    assert named == {"Kafka", "Redis"}
    assert_undisturbed(topics, n, valkey)
