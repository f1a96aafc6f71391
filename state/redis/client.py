"""The edge to Valkey or Redis (7 or later): server-side functions called in bounded pipelines, with timeouts, retries
and errors that say what to do.

Promises that an action given to `retried` returns or raises a `StateError`, and when: no answer is waited for longer
than `timeout_s`, and no action is repeated more than `retries` times. Does not promise that a failed action left
nothing behind: actions must bear being repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from state.errors import StoreFullError, StoreRefusedError, StoreUnavailableError

_TRANSIENT = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)
_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError)
_PAUSE_S = 0.05
_LATEST = 0.2
"""Weight of the latest answer in the round trip."""
_T = TypeVar("_T")


class RedisServer:
    """One server and one library of functions on it, for one thread.

    Args:
        url: redis://, rediss:// (TLS) or unix://, with user and password where the server wants them.
        functions: Lua that registers functions named PREFIX_something; PREFIX becomes the hash of this text, so that
            two versions of this program can share a server during an upgrade.
        timeout_s: for a connection and for each answer.
        retries: how often a failed action is repeated, after pauses that double from 50 ms.
        depth: calls in one pipeline, which bounds the memory of both ends.
        connection: further options of `redis.Redis.from_url`, such as ssl_ca_certs.
    """

    def __init__(
        self, url: str, functions: str, *, timeout_s: float, retries: int, depth: int, **connection: Any
    ) -> None:
        self._library = f"ripcurrent_{blake2b(functions.encode(), digest_size=4).hexdigest()}"
        self._code = f"#!lua name={self._library}\n" + functions.replace("PREFIX", self._library)
        self._retries, self._depth = retries, depth
        self._redis = redis.Redis.from_url(
            url,
            protocol=3,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # an action is retried as a whole, here
            **connection,
        )
        pool = self._redis.connection_pool.connection_kwargs
        self.place = f"Redis at {pool.get('path') or '{}:{}'.format(pool.get('host'), pool.get('port'))}"
        self.round_trip_s = 0.0
        """From the start of a request to the first answer to it, a moving average; 0 before the first."""

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def command(self, function: str, key: str | bytes | list[str], arguments: Sequence[Any]) -> tuple[Any, ...]:
        """A call of a function on one key, or on several of one hash tag, for `execute`."""
        keys = key if isinstance(key, list) else [key]
        return ("FCALL", f"{self._library}_{function}", len(keys), *keys, *arguments)

    def call(self, function: str, key: str | list[str], arguments: Sequence[Any]) -> Any:
        """Call a function on one key, or on several of one hash tag."""
        return self.execute([self.command(function, key, arguments)])[0]

    def execute(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run commands in pipelines of `depth`; their replies in order. The first error among them is raised.

        The next pipeline is sent before the replies to the last are read, so that the server never waits for this end.
        """
        pool = self._redis.connection_pool
        connection: Any = pool.get_connection()
        replies: list[Any] = []
        began = time.perf_counter()

        def read() -> None:
            replies.append(connection.read_response())
            if len(replies) == 1:
                taken = time.perf_counter() - began
                self.round_trip_s += (taken - self.round_trip_s) * (_LATEST if self.round_trip_s else 1.0)

        try:
            for start in range(0, len(commands), self._depth):
                connection.send_packed_command(connection.pack_commands(commands[start : start + self._depth]))
                while len(replies) < start:
                    read()
            while len(replies) < len(commands):
                read()
        except BaseException:
            connection.disconnect()  # what it still had to answer must not be taken for the answer to something else
            raise
        finally:
            pool.release(connection)
        return replies

    def hash(self, key: str) -> dict[str, int]:
        """A hash of numbers."""
        fields = cast("dict[bytes, bytes]", self._redis.hgetall(key))
        return {field.decode(): int(value) for field, value in fields.items()}

    def refuse_eviction(self) -> None:
        """Raise `StoreRefusedError` if a full server evicts keys: what was remembered would vanish without a word."""
        try:
            memory = self._redis.info("memory")
        except redis.exceptions.NoPermissionError:
            return
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            raise StoreRefusedError(
                f"{self.place} would evict windows when it is full (maxmemory-policy {memory['maxmemory_policy']}): "
                "set maxmemory-policy noeviction"
            )

    def retried(self, action: Callable[[], _T]) -> _T:
        """Run an action that talks to the server, again where the server may yet answer."""
        for attempt in range(self._retries + 1):
            try:
                return self._with_functions(action)
            except _REFUSED as error:
                raise StoreRefusedError(f"{self.place} refuses: {error}") from error
            except _TRANSIENT as error:
                # No connection to a demoted, restarted or slow server is worth keeping.
                self._redis.connection_pool.disconnect()
                if attempt == self._retries:
                    raise StoreUnavailableError(
                        f"{self.place} failed to answer {attempt + 1} times ({error}): pause, and try again"
                    ) from error
                time.sleep(_PAUSE_S * 2**attempt)
            except redis.exceptions.OutOfMemoryError as error:
                raise StoreFullError(
                    f"{self.place} is full ({error}): give it more memory or shorten the windows' age; pause until then"
                ) from error
            except redis.ResponseError as error:
                raise StoreRefusedError(f"{self.place} answers: {error}") from error
        raise AssertionError("unreachable")

    def _with_functions(self, action: Callable[[], _T]) -> _T:
        """Functions are loaded when the server does not know them: at first use, after a wipe, on a new primary."""
        try:
            return action()
        except redis.ResponseError as error:
            if "unction not found" not in str(error):
                raise
        try:
            self._redis.function_load(self._code)
        except redis.exceptions.NoPermissionError:
            raise
        except redis.ResponseError as error:
            if "unknown command" in str(error):
                raise StoreRefusedError(
                    f"{self.place} has no functions: Valkey or Redis 7 or later is needed"
                ) from error
            if "already exists" not in str(error):
                raise
        return action()


def ping(url: str, **arguments: Any) -> None:
    """One round trip, tried once. Raises StoreUnavailableError, also for a URL or arguments that redis-py refuses."""
    try:
        with redis.Redis.from_url(url, retry=None, **arguments) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError, TypeError) as error:
        raise StoreUnavailableError(str(error)) from None
