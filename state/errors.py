"""The errors of state: each message says what happened, to what, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

SourcePartition = tuple[str, int]
"""A source partition: (topic, partition)."""


class StateError(Exception):
    """Base of the errors of this package."""


class StoreUnavailableError(StateError):
    """The store does not answer, or not in time. Nothing is lost: pause the partitions and call again."""


class StoreFullError(StateError):
    """The store has no memory left for a write. Nothing is lost: pause the partitions until it has, and call again."""


class StoreRefusedError(StateError):
    """The store answers and refuses: wrong password, missing permission, a configuration that loses windows. A person
    must act."""


class StateLostError(StateError):
    """The store lost data: wiped, restored from an older snapshot, failed over, or never filled.

    wiped: nothing in it can be used (True), or it is correct up to an earlier point (False). resume: for each source
    concerned, the offset from which its events must be appended again; None is as far back as the windows' age reaches.
    """

    def __init__(self, message: str, *, wiped: bool, resume: Mapping[SourcePartition, int | None]) -> None:
        super().__init__(message)
        self.wiped = wiped
        self.resume = dict(resume)
