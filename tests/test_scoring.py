"""Evidence is joined so that the stronger counts, and small oddities of one piece of work add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.entities import KINDS
from state.windows import MemoryWindows, WindowEntries, Windows
from streamer.scoring import PART_OF, PIECES, SEQUENCE_DOUBT, Parts, SequenceScorer, beyond_doubt, remembered

NATS = st.floats(0, 600, allow_nan=False)
RNG = np.random.default_rng(0)


@given(NATS, NATS)
def test_density_and_surprise_are_little_more_than_the_stronger(density: float, surprise: float) -> None:
    (joined,) = Parts(np.array([density]), np.array([surprise])).combined()
    strongest = max(2 * density, surprise)
    assert strongest * (1 - 1e-9) - 1e-9 <= joined <= strongest * 1.2600 + 1e-9  # 2 ** (1 / 3)


def test_a_sequence_says_nothing_until_it_is_rare() -> None:
    counted = beyond_doubt(-np.log([1.0, 0.05, 0.01, 1e-4]))
    assert counted[:3].tolist() == [0, 0, 0]
    assert counted[3] == pytest.approx(4 * np.log(10) - SEQUENCE_DOUBT)


def windows(*evidence: list[float]) -> Windows:
    """Of processes, one each, whose records have so much evidence against them."""
    store = MemoryWindows(dim=3)
    for i, nats in enumerate(evidence):
        n = len(nats)
        at, none = np.arange(n, dtype=np.int64), np.zeros(n, np.int32)
        kept = remembered(np.arange(2 * n).reshape(n, 2).astype(np.float16), np.array(nats))
        store.append(WindowEntries([f"process:{i}"] * n, at, kept, (("t", i),), none, at, none))
    return store.latest([f"process:{i}" for i in range(len(evidence))])


class Ordinary:
    """A network to which no order is odd."""

    def __call__(self, vectors, times, length, kinds, few):  # type: ignore[no-untyped-def]
        assert vectors.shape[2] == 2, "what the network sees does not tell how odd the records were"
        return type("Scores", (), dict.fromkeys(("surprise", "missing", "ending"), np.zeros(len(length))))


def scorer() -> SequenceScorer:
    return SequenceScorer(Ordinary())  # type: ignore[arg-type]


def together(*evidence: list[float]) -> list[float]:
    return scorer().raw(windows(*evidence), np.zeros(len(evidence), np.int8))["together"].tolist()  # type: ignore[no-any-return]


def test_several_small_oddities_are_more_than_one_great_one() -> None:
    several, great, none = together([3.0] * 9, [40.0] + [1.0] * 8, [1.0] * 9)
    assert several == pytest.approx(6)
    assert great == pytest.approx((PART_OF - 1) / 3)
    assert none == 0


def test_the_same_done_again_is_not_odd_again() -> None:
    once, again = windows([3.0] * 8), windows([3.0] * 8)
    again.vectors[:, -4:, :-1] = again.vectors[:, -5:-4, :-1]
    one, other = (scorer().raw(each, np.zeros(1, np.int8))["together"][0] for each in (once, again))
    assert one == pytest.approx(16 / np.sqrt(8))
    assert other == pytest.approx(8 / np.sqrt(4))


def test_what_is_not_known_of_all_records_says_nothing() -> None:
    half, n = RNG.exponential(size=(200, 4)), 400
    normal = windows(*half.tolist(), *np.column_stack([np.full(200, -1.0), half * 9]).tolist())
    judge, kinds = scorer(), np.full(n, KINDS.index("process"), np.int8)
    judge.fit(judge.raw(normal, kinds), kinds, np.zeros(n, bool), np.arange(n, dtype=np.int32))
    raw = judge.raw(windows([4.0] * 4, [-1.0, *[4.0] * 4], [-1.0]), kinds[:3])
    assert np.isnan(raw["together"]).tolist() == [False, True, True]
    evidence = judge.evidence("together", raw, kinds[:3])
    assert evidence[0] > 4, "half of what calibrates was not known, and does not count"
    assert not evidence[1:].any()


def test_oddities_add_up_in_one_piece_of_work_and_not_in_all_that_somebody_does() -> None:
    n = 400
    normal = windows(*RNG.exponential(size=(n, 8)).tolist())
    for kind in ("process", "user"):
        judge, kinds = scorer(), np.full(n, KINDS.index(kind), np.int8)
        judge.fit(judge.raw(normal, kinds), kinds, np.zeros(n, bool), np.arange(n, dtype=np.int32))
        odd = windows([3.0] * 8, [1.0] * 8)
        evidence = judge.evidence("together", judge.raw(odd, kinds[:2]), kinds[:2])
        if kind in PIECES:
            assert evidence[0] > 5 and evidence[1] < 2
        else:
            assert not evidence.any()
