"""Windows as a whole: embeddings, the index of normal ones, and evidence by lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.models.sequence_embedding import DIM, sequence_embeddings
from encoder.models.sequence_model import SequenceModel
from encoder.ocsf.entities import KINDS
from streamer.detection.stretch_score import COMPOSITION, RUN, StretchScorer

WIDTH, VOCABULARY = 32, 40
USER = KINDS.index("user")


@dataclass
class Codes:
    """In place of a fitted model: the vocabulary alone."""

    other: int = VOCABULARY - 1


class Model:
    codebook = Codes()


def drawn(n: int, among: range, seed: int = 0) -> NDArray[np.int16]:
    rng = np.random.default_rng(seed)
    return rng.integers(among.start, among.stop, (n, WIDTH)).astype(np.int16)


def fitted(lives: int, windows_of_each: int = 4) -> StretchScorer:
    """On lives that do codes 0 to 9."""
    scorer = StretchScorer(cast(SequenceModel, Model()))
    m = lives * windows_of_each
    entity, kinds = np.repeat(np.arange(lives), windows_of_each), np.full(m, USER, np.int8)
    scorer.learn(drawn(m, range(10), 1), kinds, entity, seed=0)
    surprise, steps = np.random.default_rng(2).normal(32, 4, m), np.full(m, WIDTH)
    order = np.arange(m, dtype=np.int64)
    scorer.fit(drawn(m, range(10), 3), surprise, steps, kinds, entity, order, order.astype(np.int32))
    return scorer


def evidence(scorer: StretchScorer, codes: NDArray[np.int16], surprise: float = 32.0) -> NDArray[np.float64]:
    m = len(codes)
    kinds = np.full(m, USER, np.int8)
    raw = scorer.statistics(codes, np.full(m, surprise), np.full(m, WIDTH), kinds)
    return scorer.evidence(raw, kinds, np.arange(m, dtype=np.int32), m)


def test_an_embedding_says_how_often_and_not_in_which_order() -> None:
    codes = drawn(50, range(VOCABULARY))
    embedded = sequence_embeddings(codes, VOCABULARY)
    assert embedded.dtype == np.float16 and embedded.shape == (50, DIM)
    assert np.allclose(np.linalg.norm(embedded.astype(np.float64), axis=1), 1, atol=2e-3)
    assert np.allclose(embedded, sequence_embeddings(np.sort(codes, axis=1)[:, ::-1], VOCABULARY), atol=1e-3)
    apart = np.linalg.norm(embedded.astype(np.float64)[:, None] - embedded.astype(np.float64), axis=2)
    assert apart[~np.eye(50, dtype=bool)].min() > 0.1


def test_an_embedding_does_not_depend_on_the_batch_and_unused_slots_say_nothing() -> None:
    codes = drawn(1100, range(VOCABULARY))
    whole = sequence_embeddings(codes, VOCABULARY)
    assert np.array_equal(whole[7:8], sequence_embeddings(codes[7:8], VOCABULARY))
    assert np.array_equal(whole[600:], sequence_embeddings(codes[600:], VOCABULARY))
    short = np.full((2, WIDTH), -1, np.int16)
    short[1, -3:] = (1, 1, 2)
    empty, three = sequence_embeddings(short, VOCABULARY)
    assert not empty.any()
    assert np.array_equal(three, sequence_embeddings(np.array([[2, 1, 1]], np.int16), VOCABULARY)[0])


def test_what_training_had_is_not_far_and_other_steps_are() -> None:
    scorer = fitted(lives=200)
    kinds = np.full(2, USER, np.int8)
    known = scorer.normal[USER].codes[:2]
    assert scorer.nearest(known, kinds)[0].tolist() == [0, 0]
    other = drawn(2, range(20, 30))
    assert scorer.nearest(other, kinds)[0].min() > 1
    usual, odd = evidence(scorer, drawn(300, range(10), 5)), evidence(scorer, other)
    assert np.median(usual) < 1.5 and odd.min() > np.quantile(usual, 0.99)


def test_a_run_of_mildly_unusual_steps_counts() -> None:
    scorer = fitted(lives=200)
    usual = drawn(1, range(10), 5)
    assert evidence(scorer, usual, surprise=70.0)[0] > evidence(scorer, usual, surprise=32.0)[0] + 2


@pytest.mark.parametrize("lives", [3, 60, 400])
def test_evidence_is_no_more_than_training_can_show(lives: int) -> None:
    windows_of_each = 4
    scorer = fitted(lives, windows_of_each)
    odd, odder = (evidence(scorer, drawn(1, range(20, 30)), surprise)[0] for surprise in (500.0, 5000.0))
    assert 0 < odd <= odder <= 2 * np.log(lives * windows_of_each + 1) + 0.5


def test_a_kind_that_training_had_not_is_not_judged() -> None:
    scorer = fitted(lives=60)
    kinds = np.full(1, KINDS.index("host"), np.int8)
    raw = scorer.statistics(drawn(1, range(20, 30)), np.array([500.0]), np.array([WIDTH]), kinds)
    assert raw[COMPOSITION][0] == 0
    assert scorer.evidence(raw, kinds, np.zeros(1, np.int32), 1)[0] == 0


def test_of_several_windows_of_an_event_the_most_unusual_counts() -> None:
    scorer = fitted(lives=200)
    codes = np.concatenate([drawn(1, range(10), 5), drawn(1, range(20, 30))])
    kinds = np.full(2, USER, np.int8)
    raw: dict[str, Any] = scorer.statistics(codes, np.full(2, 32.0), np.full(2, WIDTH), kinds)
    both = scorer.evidence(raw, kinds, np.array([1, 1], np.int32), 3)
    alone = scorer.evidence({name: raw[name][1:] for name in (COMPOSITION, RUN)}, kinds[1:], np.ones(1, np.int32), 3)
    assert both[1] == alone[1] > 0 and not both[[0, 2]].any()
