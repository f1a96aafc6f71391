"""Sequences: what an entity does next, and that it stopped, are judged by how entities of its kind went on before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import orjson
import pytest
import torch
from numpy.typing import NDArray

from encoder.models.codebook import Codebook
from encoder.models.sequence_model import SequenceModel, SequenceScores
from encoder.models.temporal_convolution import WIDTH, SequenceNet, gap_features, used_slots
from encoder.ocsf.entities import KINDS
from encoder.ocsf.events import EncoderError
from encoder.training import sequence as sequence_training
from encoder.training.sequence import fit_sequences

CPU = torch.device("cpu")
RUN, HOST = KINDS.index("correlation"), KINDS.index("host")
ROUTINE = (0, 1, 2, 3, 4, 5)
VECTORS = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float16)
"""Records 0 to 5 make the routine, 6 is known from nowhere."""


@dataclass(frozen=True)
class Pairs:
    row: NDArray[np.int32]
    kind: NDArray[np.int8]
    entity: list[str]


def routines(runs: int) -> tuple[NDArray[np.float16], NDArray[np.int64], Pairs]:
    """Runs of the routine, one a second, a step every 200 ms, in a jumble on one host; step 2 sometimes twice."""
    rng = np.random.default_rng(1)
    events: list[tuple[int, int, str]] = []
    for run in range(runs):
        steps = [step for step in ROUTINE for _ in range(1 + (step == 2 and rng.random() < 0.3))]
        events += [
            (1000 * run + 200 * i + int(rng.integers(50)), step, f"correlation:{run}") for i, step in enumerate(steps)
        ]
    events.sort()
    n = len(events)
    row = np.repeat(np.arange(n, dtype=np.int32), 2)
    kind = np.tile(np.array([RUN, HOST], np.int8), n)
    entity = [name for _, _, run in events for name in (run, "host:h")]
    codes = np.array([code for _, code, _ in events])
    return VECTORS[codes], np.array([time for time, _, _ in events], np.int64), Pairs(row, kind, entity)


def fitted(runs: int, *, seed: int) -> SequenceModel:
    vectors, times, pairs = routines(runs)
    nothing = np.zeros(len(times), np.bool_)
    return fit_sequences(vectors, times, pairs, withheld=nothing, seed=seed, device=CPU)[0]


@pytest.fixture(scope="module")
def model() -> SequenceModel:
    steps = sequence_training.STEPS
    sequence_training.STEPS = 150
    try:
        return fitted(400, seed=0)
    finally:
        sequence_training.STEPS = steps


def score(model: SequenceModel, *windows: tuple[int, ...], kind: int = RUN, pause: int = 200) -> SequenceScores:
    m = len(windows)
    vectors = np.zeros((m, WIDTH, 16), np.float16)
    times = np.zeros((m, WIDTH), np.int64)
    for i, steps in enumerate(windows):
        vectors[i, WIDTH - len(steps) :] = VECTORS[list(steps)]
        times[i, WIDTH - len(steps) :] = 1_000_000 + pause * np.arange(len(steps))
    return model(vectors, times, np.array([len(w) for w in windows], np.int32), np.full(m, kind, np.int8))


def test_a_wrong_next_step_is_surprising_and_the_right_one_is_not(model: SequenceModel) -> None:
    right, wrong, left_out, unknown = score(model, (0, 1, 2, 3), (0, 1, 2, 5), (0, 1, 3), (0, 1, 2, 6)).surprise
    assert right < 1
    assert min(wrong, left_out, unknown) > right + 3


def test_to_begin_in_the_middle_is_surprising(model: SequenceModel) -> None:
    first, middle = score(model, (0,), (3,)).surprise
    assert first < 0.5
    assert middle > first + 3


def test_a_routine_that_stops_half_way_is_surprising_and_its_end_is_not(model: SequenceModel) -> None:
    whole, half = score(model, ROUTINE, ROUTINE[:3]).ending
    assert whole < 0.5
    assert half > whole + 3


def test_only_kinds_that_end_have_endings(model: SequenceModel) -> None:
    assert set(model.timeouts) == {"correlation"}
    assert score(model, ROUTINE[:3], kind=HOST).ending.tolist() == [0.0]


def test_a_score_depends_on_its_window_alone(model: SequenceModel) -> None:
    windows = [ROUTINE[:k] for k in range(1, 7)] + [ROUTINE * 5]
    together = score(model, *windows)
    for i, window in enumerate(windows):
        alone = score(model, window)
        for name in ("surprise", "ending"):
            np.testing.assert_allclose(getattr(alone, name)[0], getattr(together, name)[i], atol=1e-5)


def test_the_last_slots_are_those_of_all_slots() -> None:
    torch.manual_seed(0)
    net = SequenceNet(dim=16, vocabulary=5, kinds=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    length = np.array([0, 1, 2, 17, 31, 32], np.int32)
    used = used_slots(length, WIDTH)
    times = np.cumsum(np.random.default_rng(0).integers(0, 10**6, (6, WIDTH)), axis=1)
    x = torch.randn(6, WIDTH, 16)
    inputs = (x, torch.from_numpy(gap_features(times, used)), torch.from_numpy(used), torch.zeros(6, dtype=torch.int64))
    with torch.no_grad():
        torch.testing.assert_close(net.last_slots(*inputs), net.all_slots(*inputs)[:, -2:], atol=1e-5, rtol=1e-5)


def test_what_is_in_unused_slots_does_not_matter(model: SequenceModel) -> None:
    vectors = np.zeros((2, WIDTH, 16), np.float16)
    vectors[:, -2:] = VECTORS[:2]
    vectors[1, :-2] = 7.0
    times = np.tile(np.arange(WIDTH, dtype=np.int64), (2, 1))
    scores = model(vectors, times, np.array([2, 2], np.int32), np.array([RUN, RUN], np.int8))
    assert scores.surprise[0] == scores.surprise[1]
    assert scores.ending[0] == scores.ending[1] > 0


def test_a_record_like_nothing_in_training_has_the_outcome_other() -> None:
    codebook = Codebook.fit(np.repeat(VECTORS[:6], 50, axis=0), seed=0)
    assert codebook.other == 6
    codes = codebook(VECTORS)
    assert len(set(codes[:6].tolist())) == 6
    assert codes[6:].tolist() == [6, 6]


def test_state_and_back_gives_the_same_scores(model: SequenceModel) -> None:
    tensors, config = model.state()
    again = SequenceModel.from_state(tensors, orjson.loads(orjson.dumps(config)), CPU)
    a, b = score(model, ROUTINE, (0, 5)), score(again, ROUTINE, (0, 5))
    for name in ("surprise", "ending"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    with pytest.raises(EncoderError, match="fit the bundle again"):
        SequenceModel.from_state({}, config, CPU)


def test_the_same_seed_gives_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_training, "STEPS", 5)
    first, again = (fitted(60, seed=3).state()[0] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_events_that_name_nobody_teach_no_sequences() -> None:
    nobody = Pairs(np.empty(0, np.int32), np.empty(0, np.int8), [])
    with pytest.raises(EncoderError, match="names an entity"):
        fit_sequences(VECTORS, np.arange(8), nobody, withheld=np.zeros(8, np.bool_), seed=0, device=CPU)


def test_nothing_is_learned_from_what_is_withheld() -> None:
    vectors, times, pairs = routines(60)
    late = times > 30_000
    models = [
        fit_sequences(v, times, pairs, withheld=late, seed=0, device=CPU)[0] for v in (vectors, _jumbled(vectors, late))
    ]
    counts = [model.counts for model in models]
    assert torch.equal(models[0].codebook.centres, models[1].codebook.centres)
    np.testing.assert_array_equal(counts[0].keys, counts[1].keys)
    np.testing.assert_array_equal(counts[0].counts, counts[1].counts)


def _jumbled(vectors: NDArray[np.float16], rows: NDArray[np.bool_]) -> NDArray[np.float16]:
    jumbled = vectors.copy()
    jumbled[rows] = np.random.default_rng(2).permutation(vectors[rows])
    return jumbled
