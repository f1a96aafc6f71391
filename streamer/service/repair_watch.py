"""Which repairs touch much of the traffic: those say that a sender is wrong about something, or that the repair is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from encoder.ocsf.repairs import widespread

ENOUGH = 100
"""Events from which on a share is judged."""
WINDOW = 1000
"""Events after which counting begins anew, so that a share is that of recent traffic."""


class RepairWatch:
    """Shares of events that repairs touched, of the last ENOUGH to WINDOW events or the last batch."""

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        """By kind of repair, of those that are widespread."""
        self._events = 0
        self._repairs: Counter[str] = Counter()

    def observe(self, events: int, repairs: Mapping[str, int]) -> dict[str, float]:
        """Count the repairs of a batch; returns the shares of those that have become widespread with it."""
        if self._events >= WINDOW:
            self._events, self._repairs = 0, Counter()
        self._events += events
        self._repairs.update(repairs)
        if self._events < ENOUGH:
            return {}
        before, self.shares = self.shares, widespread(self._repairs, self._events)
        return {kind: share for kind, share in self.shares.items() if kind not in before}
