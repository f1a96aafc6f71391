"""From distances and surprises to one p-value an event.

Each part of the record and the sequence score is calibrated on held-out normal data, so that they can be compared, and
the event is as unusual as the strongest of them says, each weighed by how far it is to be trusted. The result is
calibrated again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from state.calibration import Calibration
from streamer.detection.cooccurrence_score import CooccurrenceScorer
from streamer.detection.rate_score import RateScorer
from streamer.detection.record_score import RecordScorer
from streamer.detection.sequence_score import SequenceScorer

SEQUENCE_DOUBT = 5.0
"""Nats of a sequence's evidence that count for nothing: the order of what a machine does varies more than what it does,
so what one window in a hundred and fifty shows says nothing."""
MISSING_TRUST = 0.7
OVERLAP_TRUST = 0.7
"""Against the record score: measured in docs/detection.md."""
HISTORY_TRUST = 4 / 3
"""How much more all that history says is trusted than what a record says: every day brings odd records, and few odd
histories. Measured there, too."""
BLEND = 0.01
"""How much the weaker of record and history adds to the stronger: an order among events that it puts level."""
ALIKE = 0.1
"""Nats: held-out events that lie so near to the strongest are one story with it."""
SEVERITY_PER_DECADE = 12.5


def severity(p_value: NDArray[np.float64]) -> NDArray[np.float32]:
    """0 to 100, 12.5 for each power of ten by which normal data is rarer than this: 50 is one in ten thousand events,
    100 one in a hundred million. It means the same in every bundle."""
    return np.clip(-SEVERITY_PER_DECADE * np.log10(p_value), 0, 100).astype(np.float32)


@dataclass
class EventScorer:
    """Record and history joined: the event is as unusual as the stronger of the two says, calibrated again.

    sequences and rates: None where no event of training named an entity; overlaps: None where none named a user.
    """

    record: RecordScorer
    sequences: SequenceScorer | None
    rates: RateScorer | None
    event: Calibration
    cooccurrence: CooccurrenceScorer | None

    def p_value(self, record: NDArray[np.float64], history: NDArray[np.float64]) -> NDArray[np.float64]:
        """Evidence of both, float64 [n] in nats, to p-values.

        Beyond the sample they fall no faster than the evidence, and not before it is stronger than the sample can say:
        a story that nobody saw may well have as many events as the strongest of those that were held out.
        """
        evidence = joined(record, history)
        held_out = self.event.scores
        alike = len(held_out) - np.searchsorted(held_out, held_out[-1] - ALIKE)
        # A little less for more evidence, so that the order stays.
        as_rare = (1 + alike) / (len(held_out) + 1) * np.exp(-0.001 * evidence)
        found: NDArray[np.float64] = np.maximum(self.event.p_value(evidence), np.minimum(as_rare, np.exp(-evidence)))
        return found


def beyond_doubt(sequence: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, nats: what of the evidence of an order or an ending counts."""
    beyond: NDArray[np.float64] = np.maximum(sequence - SEQUENCE_DOUBT, 0.0)
    return beyond


def weighed(
    order: NDArray[np.float64],
    missing: NDArray[np.float64],
    rate: NDArray[np.float64],
    overlap: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [4, m], nats: the evidence of an entity's history, each part by its trust; the strongest counts."""
    return HISTORY_TRUST * np.stack([beyond_doubt(order), MISSING_TRUST * missing, rate, OVERLAP_TRUST * overlap])


def joined(record: NDArray[np.float64], history: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [n], nats: the stronger of record and (weighed) history."""
    return np.maximum(record, history) + BLEND * history
