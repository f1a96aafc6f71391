"""Episodes in Valkey or Redis, shared by all processes of a tenant; the rules are those of `state.episode_rules`.

Each process keeps a copy of the book. What a batch changes is stored by one server-side function, and only if nobody
else has stored anything since; else it gives back all of the book, and the batch is decided again on that. Where there
is no book of this format, the process begins with a copy of that of the format before.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from state.episode_rules import EpisodeRules
from state.episodes import Anomaly, Decision, End, Position
from state.errors import SourcePartition, StoreRefusedError, StoreUnavailableError
from state.redis import formats
from state.redis.client import RedisServer
from state.windows import DAY_MS

_FUNCTIONS = (files("state.redis") / "episodes.lua").read_text()
TTL_MS = 30 * DAY_MS
"""After that long without an anomaly nobody needs the book."""
TRIES = 100
"""How often others may be faster before that is an error; with ten processes in a storm."""

T = TypeVar("T")


_UNKNOWN = "unknown"
"""A version that no book has."""


class RedisEpisodes:
    """The episodes of a tenant. space: keeps those of a replay apart from those of the stream."""

    def __init__(
        self,
        url: str,
        *,
        tenant: str = "default",
        space: str = "stream",
        timeout_s: float = 5.0,
        retries: int = 3,
        **connection: Any,
    ) -> None:
        for name, value in (("tenant", tenant), ("space", space)):
            if not value or set(value) & set("{}:"):
                raise ValueError(
                    f"{name} {value!r} would not make a key: it must be non-empty, without '{{', '}}' and ':'"
                )
        key = f"{{{tenant}}}:episodes:{space}"
        self._key = key + formats.suffix("episodes", formats.EPISODES)
        self._earlier_keys = [key + of for of in formats.earlier("episodes", formats.EPISODES)]
        self._server = RedisServer(url, _FUNCTIONS, timeout_s=timeout_s, retries=retries, depth=1, **connection)
        self._rules, self._version = EpisodeRules(), _UNKNOWN
        self._position = Position()
        self._topics: dict[SourcePartition, int] = {}

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._server.close()

    def decide(self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End]) -> list[Decision]:
        decisions = self._server.retried(
            lambda: self._change(lambda: self._rules.decide(anomalies, ends, self._position))
        )
        self._position.advance(ends)
        return decisions

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._position.commit(offsets)

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        known = self._topics
        self._server.retried(lambda: self._change(lambda: self._rules.identify(topics, self._position)))
        # Also where another process has told the book before.
        self._position.forget(source for source, topic in topics.items() if known.get(source, topic) != topic)
        self._topics = known | dict(topics)

    def open(self) -> int:
        return len(self._rules)

    def _change(self, change: Callable[[], T]) -> T:
        """Change the book, again on what others made of it until it is stored."""
        for _ in range(TRIES):
            result = change()
            if self._stored():
                return result
        raise StoreUnavailableError(f"{self._server.place}: others changed the episodes {TRIES} times meanwhile")

    def _stored(self) -> bool:
        """Store what has changed. If others have, or if it fails, the book is read anew before it is used again."""
        arguments: list[Any] = [self._version, uuid.uuid4().hex, TTL_MS]
        for name in sorted(self._rules.changed):
            arguments += [name, self._rules.value(name)]
        self._version = _UNKNOWN
        version, values = self._server.call("swap", self._key, arguments)
        if values is None:
            self._version = version.decode()
            self._rules.changed.clear()
            return True
        self._rules = self._read(self._key, values) if version else self._earlier()
        self._version = version.decode()
        return False

    def _earlier(self) -> EpisodeRules:
        """The book of the newest format before this one, to be stored in this one; an empty one where there is none."""
        for key in self._earlier_keys:
            _, values = self._server.call("swap", key, [_UNKNOWN, "", TTL_MS])
            if values:
                rules = self._read(key, values)
                rules.change_all()
                return rules
        return EpisodeRules()

    def _read(self, key: str, values: Sequence[bytes]) -> EpisodeRules:
        pairs = iter(values)
        try:
            return EpisodeRules.read(
                {name.decode(): value for name, value in zip(pairs, pairs, strict=True) if name != b"v"}
            )
        except (ValueError, TypeError, KeyError) as error:
            raise StoreRefusedError(
                f"{self._server.place} has episodes at {key} that cannot be read ({error!r}): "
                f"`DEL {key}` forgets them, and alerts that go on are told as new ones"
            ) from error
