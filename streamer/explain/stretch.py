"""How what an entity did in its window differs from the nearest normal window of its kind."""

from __future__ import annotations

from collections import Counter
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

    steps: int
    distance: float
    usual_distance: float
    differing: tuple[tuple[int, int, int], ...]


def findings(scorer: StretchScorer, windows: Windows, kinds: NDArray[np.int8]) -> list[StretchFinding | None]:
    """Of each of m windows; None for those of a kind that has no normal windows, and where an entity gets as far from
    normal in half of all lives. kinds: int8 [m]."""
    codes = scorer.model.codes(windows.vectors, windows.length)
    distance, place = scorer.nearest(codes, kinds)
    found: list[StretchFinding | None] = []
    for i, kind in enumerate(kinds.tolist()):
        calibration = scorer.calibrations.get(f"{COMPOSITION}.{kind}")
        usual = float(np.median(calibration.scores)) if calibration is not None else np.inf
        if place[i] < 0 or distance[i] <= usual:
            found.append(None)
            continue
        here, there = (Counter(row[row >= 0].tolist()) for row in (codes[i], scorer.normal[kind].codes[place[i]]))
        differing = sorted(here | there, key=lambda code: (-abs(here[code] - there[code]), code))[:SHOWN]
        pairs = tuple((code, here[code], there[code]) for code in differing)
        found.append(StretchFinding(int(windows.length[i]), float(distance[i]), usual, pairs))
    return found
