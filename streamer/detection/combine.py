"""Combines the parts of the score into one p-value for each event.

Each part is calibrated on held-out normal data, so that parts can be compared. The evidence against an event is that of
the strongest part, weighted by how far the part is trusted, and is calibrated again.
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
from streamer.detection.stretch_score import StretchScorer

SEQUENCE_DISCOUNT = 5.0
"""Nats that are subtracted from the evidence of a sequence. The order of a machine's actions varies more than the
actions: an order that one window in 150 has is no evidence."""
MISSING_TRUST = 0.7
COOCCURRENCE_TRUST = 0.7
"""Weights relative to the record score, measured in docs/detection.md."""
HISTORY_TRUST = 4 / 3
"""The weight of all evidence from history relative to the record: unusual records come every day, unusual histories
seldom. Measured there, too."""
BLEND = 0.01
"""The weight of the weaker of record and history: it orders events whose stronger evidence is equal."""
STRETCH_SHARE = 0.1
"""The weight of the stretch beside the stronger of record and history (docs/decisions/0007)."""
DOUBT = 4.0
"""Nats of evidence by record or history from which on the stretch is asked: below, its share decides nothing."""
TIED_NATS = 0.1
"""Nats: held-out events this near to the strongest one count as one episode with it."""
SEVERITY_PER_DECADE = 12.5


def severity(p_value: NDArray[np.float64]) -> NDArray[np.float32]:
    """0 to 100, 12.5 for each power of ten by which normal data is rarer than this: 50 is one in ten thousand events,
    100 one in a hundred million. Severities of different bundles are comparable."""
    return np.clip(-SEVERITY_PER_DECADE * np.log10(p_value), 0, 100).astype(np.float32)


@dataclass
class EventScorer:
    """Combines record and history: the stronger of the two counts, and a share of the stretch, calibrated again.

    sequences, rates and stretch: None where no event of training named an entity; cooccurrence: None where none
    named a user.
    """

    record: RecordScorer
    sequences: SequenceScorer | None
    rates: RateScorer | None
    event: Calibration
    cooccurrence: CooccurrenceScorer | None
    stretch: StretchScorer | None = None

    def p_value(
        self, record: NDArray[np.float64], history: NDArray[np.float64], stretch: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """p-values, float64 [n] in (0, 1], from the evidence of record, history and stretch, float64 [n] in nats.

        Beyond the held-out sample, a p-value first stays at the share of events that tie with the strongest held-out
        one, because an unseen episode may have as many events as that one. It falls, as exp(-evidence), only once the
        evidence alone is rarer than that share.
        """
        evidence = joined(record, history, stretch)
        held_out = self.event.scores
        ties = len(held_out) - np.searchsorted(held_out, held_out[-1] - TIED_NATS)
        # The small slope keeps the order of events within the plateau.
        as_rare = (1 + ties) / (len(held_out) + 1) * np.exp(-0.001 * evidence)
        p_value: NDArray[np.float64] = np.maximum(self.event.p_value(evidence), np.minimum(as_rare, np.exp(-evidence)))
        return p_value


def discounted(sequence: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, nats: the evidence of an order or an ending above SEQUENCE_DISCOUNT, at least 0."""
    beyond: NDArray[np.float64] = np.maximum(sequence - SEQUENCE_DISCOUNT, 0.0)
    return beyond


def weighted(
    order: NDArray[np.float64],
    missing: NDArray[np.float64],
    rate: NDArray[np.float64],
    cooccurrence: NDArray[np.float64],
) -> NDArray[np.float64]:
    """float64 [4, m], nats: the parts of the evidence of an entity's history, each with its weight. Arguments: float64
    [m], nats."""
    return HISTORY_TRUST * np.stack(
        [discounted(order), MISSING_TRUST * missing, rate, COOCCURRENCE_TRUST * cooccurrence]
    )


def in_doubt(record: NDArray[np.float64], history: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [n]: whose stretch is asked. record, history: float64 [n], nats."""
    doubtful: NDArray[np.bool_] = np.maximum(record, history) >= DOUBT
    return doubtful


def joined(
    record: NDArray[np.float64], history: NDArray[np.float64], stretch: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64 [n], nats: the stronger of record and weighted history, and a share of the stretch; float64 [n] each,
    stretch 0 where it was not asked."""
    return np.maximum(record, history) + BLEND * history + STRETCH_SHARE * stretch
