"""Tests and demo run on real servers that start by themselves, keep their port, and never outlive their owner."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from confluent_kafka.admin import AdminClient

from streamer.devtools import servers
from streamer.devtools.servers import KafkaServer, ValkeyServer
from streamer.errors import ConfigurationError


def test_kafka_answers_on_the_port_it_names(kafka: str) -> None:
    assert AdminClient({"bootstrap.servers": kafka}).list_topics(timeout=10).brokers


def test_valkey_keeps_its_port_and_what_it_was_told_to_keep_over_a_crash() -> None:
    with ValkeyServer({"appendonly": "yes"}) as server:
        client = redis.Redis.from_url(server.url)
        client.set("a", "1")
        port, directory = server.port, server.directory
        server.restart(kill=True)
        assert server.port == port
        assert client.get("a") == b"1"
    assert not directory.exists()


def test_a_stopped_server_refuses_and_a_started_one_answers_again() -> None:
    with ValkeyServer() as server:
        client = redis.Redis.from_url(server.url, retry=None)
        server.stop()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.ping()


def test_server_and_directory_are_gone_when_the_owner_is_killed() -> None:
    program = (
        "import time\nfrom streamer.devtools.servers import ValkeyServer\n"
        "with ValkeyServer() as s:\n    print(s.port, s.directory, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        port, directory = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(directory).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(directory).exists()
    while _accepts(int(port)):  # a killed process closes its sockets a moment after the signal
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_environment_replaces_both_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIPCURRENT_TEST_KAFKA", "broker:1")
    monkeypatch.setenv("RIPCURRENT_TEST_REDIS", "redis://host:2/0")
    with servers.kafka() as bootstrap, servers.valkey() as url:
        assert (bootstrap, url) == ("broker:1", "redis://host:2/0")


@pytest.mark.parametrize("missing", ["java", "mvn"])
def test_without_java_or_maven_the_error_says_the_three_ways(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    which = servers.shutil.which
    monkeypatch.setattr(servers.shutil, "which", lambda name, **kw: None if name == missing else which(name, **kw))
    with pytest.raises(ConfigurationError, match=r"Java 17 or later and Maven.*container.*RIPCURRENT_TEST_KAFKA"):
        KafkaServer()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    server = ValkeyServer({"no-such-directive": "1"})
    with pytest.raises(ConfigurationError, match="no-such-directive"), server:
        pass
    assert not server.directory.exists()
