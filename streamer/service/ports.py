"""What the loop needs of the parts that it drives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.events import Message
from state.errors import SourcePartition, StateLostError
from streamer.detection.batches import ScoredBatch
from streamer.kafka.producer import Written


class BatchScorer(Protocol):
    """What the loop needs of a `Detector`: scoring in two steps, of which the first may be done ahead. live: its
    `LiveCalibration`, None where nothing is learned while serving."""

    live: Any

    def prepare(self, messages: Sequence[Message]) -> Any: ...

    def judge(self, prepared: Any) -> ScoredBatch: ...

    def remember(self, messages: Sequence[Message]) -> None: ...


class Rebuildable(Protocol):
    """What a rebuild needs of a `WindowStore`."""

    age_ms: int

    def prepare(self, offsets: Mapping[SourcePartition, int]) -> None: ...

    def begin_rebuild(self, lost: StateLostError, others: Iterable[SourcePartition] = ()) -> None: ...

    def finish_rebuild(self, sources: Iterable[SourcePartition], horizon_ms: int = 0) -> None: ...


class EntityStore(Rebuildable, Protocol):
    """What the loop needs of a `WindowStore`."""

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None: ...

    def identify(self, topics: Mapping[SourcePartition, int]) -> None: ...

    def identified(self) -> Mapping[SourcePartition, int]: ...

    def check_epoch(self, offsets: Mapping[SourcePartition, int]) -> None: ...

    def round_trips(self) -> Mapping[str, float]: ...

    def close(self) -> None: ...


class EmittedAlert(Written, Protocol):
    """What the loop needs of an `Alert`."""

    @property
    def activity(self) -> int: ...
    @property
    def row(self) -> int: ...


class Alerting(Protocol):
    """What the loop needs of `AlertPipeline`: it turns scored rows into alerts to publish, and may be asked again."""

    def alerts(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> Sequence[EmittedAlert]: ...

    def identify(self, topics: Mapping[SourcePartition, int]) -> None: ...

    def take_suppressed(self) -> Mapping[str, int]: ...

    def committed(self, offsets: Mapping[SourcePartition, int]) -> None: ...


class OwnedPartitions(Protocol):
    """What a bundle that is to serve needs of an `EventConsumer`, from any thread."""

    def owned(self) -> dict[SourcePartition, int]:
        """The partitions of this process, each with its next offset that is not committed."""
        ...

    def topics(self) -> dict[SourcePartition, int]:
        """The number of the topic of each."""
        ...


@dataclass(frozen=True)
class Opened:
    """A bundle that can score: its version, detector, alerts, and windows (None: nothing outside this process)."""

    version: str
    detector: BatchScorer
    alerting: Alerting
    windows: EntityStore | None


@dataclass(frozen=True)
class Bundles:
    """Where bundles come from. serving: the path of the one that serves first; opening: path -> an opened bundle, whose
    windows have a connection of their own."""

    serving: Path
    opening: Callable[[Path], Opened]
