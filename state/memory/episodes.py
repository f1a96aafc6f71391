"""Episodes in this process: the second implementation of the contract in `state.episodes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from state.episode_rules import EpisodeRules
from state.episodes import Anomaly, Decision, End, Position
from state.errors import SourcePartition


class MemoryEpisodes:
    """Episodes in this process: for `score` and evaluation."""

    def __init__(self) -> None:
        self._rules, self._position = EpisodeRules(), Position()

    def decide(self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End]) -> list[Decision]:
        found = self._rules.decide(anomalies, ends, self._position)
        self._position.advance(ends)
        self._rules.changed.clear()
        return found

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None:
        self._position.commit(offsets)

    def identify(self, topics: Mapping[SourcePartition, int]) -> None:
        self._position.forget(self._rules.identify(topics, self._position))
        self._rules.changed.clear()

    def open(self) -> int:
        return len(self._rules)
