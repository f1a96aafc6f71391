"""How what an entity did in its window differs from the nearest normal window of its kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from state.windows import Windows
from streamer.detection.stretch_score import COMPOSITION, StretchScorer

SHOWN = 3
"""Steps that are compared: those that differ most."""


@dataclass(frozen=True)
class StretchFinding:
    """What an entity did in its window, of `steps` events, against the nearest normal window. distance: between their
    embeddings; usual_distance: half of the normal lives never get farther; differing: codes with how often each came
    here and there, most different first."""

    entity: str
    steps: int
    distance: float
    usual_distance: float
    differing: tuple[tuple[int, int, int], ...]


def findings(
    scorer: StretchScorer, windows: Windows, entities: Sequence[str], kinds: NDArray[np.int8]
) -> list[StretchFinding]:
    """Of each of m windows, of kinds that have normal windows. entities: m, whose they are; kinds: int8 [m]."""
    codes = scorer.model.codes(windows.vectors, windows.length)
    distance, place = scorer.nearest(codes, kinds)
    found = []
    for i, (entity, kind) in enumerate(zip(entities, kinds.tolist(), strict=True)):
        usual = float(np.median(scorer.calibrations[f"{COMPOSITION}.{kind}"].scores))
        here, there = (Counter(row[row >= 0].tolist()) for row in (codes[i], scorer.normal[kind].codes[place[i]]))
        differing = sorted(here | there, key=lambda code: (-abs(here[code] - there[code]), code))[:SHOWN]
        pairs = tuple((code, here[code], there[code]) for code in differing)
        found.append(StretchFinding(entity, int(windows.length[i]), float(distance[i]), usual, pairs))
    return found
