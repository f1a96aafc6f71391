"""Episodes in Valkey or Redis, shared by all processes of a tenant; the rules are those of `state.episode_rules`.

Each process keeps a copy of the book. What a batch changes is stored by one server-side function, and only if nobody
else has stored anything since; else it gives back all of the book, and the batch is decided again on that.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from state.episode_rules import EpisodeRules
from state.episodes import Anomaly, Decision, End, Position
from state.errors import SourcePartition, StoreUnavailableError
from state.redis.client import RedisServer
from state.windows import DAY_MS

_FUNCTIONS = (files("state.redis") / "episodes.lua").read_text()
TTL_MS = 30 * DAY_MS
"""After that long without an anomaly nobody needs the book."""
TRIES = 100
"""How often others may be faster before that is an error; with ten processes in a storm."""


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
        self._key = f"{{{tenant}}}:episodes:{space}"
        self._server = RedisServer(url, _FUNCTIONS, timeout_s=timeout_s, retries=retries, depth=1, **connection)
        self._book, self._version = EpisodeRules(), ""
        self._position = Position()

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._server.close()

    def decide(self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End]) -> list[Decision]:
        decisions = self._server.retried(lambda: self._decide(anomalies, ends))
        self._position.advance(ends)
        return decisions

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._position.commit(offsets)

    def open(self) -> int:
        return len(self._book)

    def _decide(self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End]) -> list[Decision]:
        for _ in range(TRIES):
            decisions = self._book.decide(anomalies, ends, self._position)
            if self._stored():
                return decisions
        raise StoreUnavailableError(f"{self._server.place}: others changed the episodes {TRIES} times meanwhile")

    def _stored(self) -> bool:
        """Store what has changed. If others have, or if it fails, the book is read anew before it is used again."""
        arguments: list[Any] = [self._version, uuid.uuid4().hex, TTL_MS]
        for name in sorted(self._book.changed):
            arguments += [name, self._book.value(name)]
        self._version = "unknown"
        version, values = self._server.call("swap", self._key, arguments)
        self._version = version.decode()
        if values is None:
            self._book.changed.clear()
            return True
        pairs = iter(values)
        self._book = EpisodeRules.read(
            {name.decode(): value for name, value in zip(pairs, pairs, strict=True) if name != b"v"}
        )
        return False
