"""The formats of what is kept in Redis, and the keys that carry them.

A value that a release before could not read, or would read wrongly, has another format: give it the next number here.
Keys carry the number, so that releases of two formats can share a server: neither reads or writes what the other does.
A release that finds no keys of its own format fills windows and timers again from Kafka, as after a loss, and copies
the episodes, which Kafka does not have, from the newest format before (`EpisodeRules.read` must still read it).
"""

from __future__ import annotations

from collections.abc import Iterator

WINDOWS = 4  # 4: the fingerprints of the last events
TIMERS = 2  # 2: the events that they keep are masked
EPISODES = 1
_WITHOUT_NUMBER = {"windows": 3, "timers": 1, "episodes": 1}
"""Those of release 0.1.0, whose keys end without a number."""


def suffix(kind: str, number: int) -> str:
    """What the keys of a format end with."""
    return "" if number == _WITHOUT_NUMBER[kind] else f"-format{number}"


def earlier(kind: str, number: int) -> Iterator[str]:
    """The suffixes of the formats before, the newest first."""
    return (suffix(kind, before) for before in range(number - 1, _WITHOUT_NUMBER[kind] - 1, -1))
