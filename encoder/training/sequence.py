"""Trains the sequence model on the histories of entities.

Self-supervised: predict the next code at every slot of a window, and distinguish real windows from shuffled, spliced
and cut ones. Promises the same model for the same events and seed on one machine, and that withheld events are not
learned from. It does not calibrate scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from encoder.models.antecedents import LASTING, Antecedents, known, recent
from encoder.models.codebook import ORDER, Codebook
from encoder.models.ngram_counts import NgramCounts
from encoder.models.sequence_model import SequenceModel
from encoder.models.temporal_convolution import AGE_MS, WIDTH, SequenceNet, gap_features
from encoder.ocsf.entities import KINDS
from encoder.ocsf.events import EncoderError
from encoder.training.trainer import Checkpoint, StepProgress, steps_for, train_network

STEPS = 800
MIN_ENTITIES = 20
"""The least entities of a kind whose antecedents are learned: three hosts say nothing about a fourth."""
BATCH = 96
MIN_ENDINGS = 50
"""The least ended entities of a kind from which endings are learned."""
MIN_SILENCE_MS = 1000


class Pairs(Protocol):
    """The pairs of event and entity of n events, as from `encoder.ocsf.entities.entities`."""

    @property
    def row(self) -> NDArray[np.int32]: ...
    @property
    def kind(self) -> NDArray[np.int8]: ...
    @property
    def entity(self) -> list[str]: ...


class _History:
    """Training pairs, sorted by entity and event time.

    The order is (entity, time, stream). row, kind, time: int64 [m], of each place in that order; first: int64 [m], the
    place of the entity's first pair; is_last: bool [m], whether it is the entity's last pair.
    """

    def __init__(self, times: NDArray[np.int64], pairs: Pairs) -> None:
        _, entity = np.unique(np.array(pairs.entity, object).astype(str), return_inverse=True)
        time = times[pairs.row]
        order = np.lexsort((np.arange(len(entity)), time, entity))
        self.row, self.kind, self.time = (
            pairs.row[order].astype(np.int64),
            pairs.kind[order].astype(np.int64),
            time[order],
        )
        entity = entity[order]
        starts = np.append(True, entity[1:] != entity[:-1])
        self.is_last = np.append(starts[1:], True)
        self.first = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))

    def __len__(self) -> int:
        return len(self.row)

    def slots(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The windows that end at these places (int64 [k]): int64 [k, W], their places, and bool [k, W], which are
        used."""
        at = places[:, None] + np.arange(1 - WIDTH, 1)
        inside = at >= self.first[places][:, None]
        at = np.where(inside, at, places[:, None])
        return at, inside & (self.time[places][:, None] - self.time[at] <= AGE_MS)

    def timeouts(self) -> dict[int, int]:
        """By kind whose routines end: the ms without a record after which a routine has ended, twice the gap that one
        in a thousand exceeds. A kind counts if enough of its entities were inactive for so long at the end of the
        events."""
        by_kind = {}
        gaps = np.diff(self.time, append=0)
        now = self.time.max(initial=0)
        for kind in np.unique(self.kind).tolist():
            mine = self.kind == kind
            inner = gaps[mine & ~self.is_last]
            if not len(inner):
                continue
            timeout = max(MIN_SILENCE_MS, 2 * int(np.quantile(inner, 0.999)))
            ended = mine & self.is_last & (now - self.time > timeout)
            if ended.sum() >= max(MIN_ENDINGS, 0.5 * (mine & self.is_last).sum()):
                by_kind[kind] = timeout
        return by_kind


@dataclass(frozen=True)
class SequenceReport:
    """Figures of a fit. losses: of training; network, counts: mean nats a record on the last tenth, on which neither
    was trained; novelty: the share of records there with the code OTHER, by kind of entity."""

    losses: list[float]
    network: float
    counts: float
    novelty: dict[str, float]


def fit_sequences(
    vectors: NDArray[np.float16],
    times: NDArray[np.int64],
    pairs: Pairs,
    *,
    withheld: NDArray[np.bool_],
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    progress: StepProgress | None = None,
) -> tuple[SequenceModel, SequenceReport]:
    """Fit to the history of n events.

    vectors: float16 [n, d], record embeddings; times: int64 [n], event ms; pairs: the entities of the events; withheld:
    bool [n], events that stay part of histories but are not learned from (they calibrate). The network is not trained
    on the last tenth of the time, where it is compared with the counts. checkpoint: a file from which training resumes
    after a kill. Raises `EncoderError` where no other event names an entity.
    """
    torch.manual_seed(seed)
    history = _History(times, pairs)
    learned = ~withheld[history.row]
    if not learned.any():
        raise EncoderError("no event names an entity: there are no sequences to learn from")
    held_from = np.quantile(history.time[learned], 0.9)
    held = history.time > held_from
    codebook = Codebook.fit(vectors[(times <= held_from) & ~withheld], seed=seed)
    end = codebook.other + 1
    timeouts = history.timeouts()
    codes = codebook(vectors)[history.row]
    follows = _next_codes(history, codes, timeouts, end)
    next_learned = np.append(learned[1:], True)
    follows[~np.where(follows == end, learned, next_learned)] = -1
    net = SequenceNet(dim=vectors.shape[1], vocabulary=end + 1, kinds=len(KINDS)).to(device)
    scale = 1.0 / max(float(np.sqrt(np.square(codebook.centres.numpy()).mean())), 1e-6)
    task = _Task(net, history, vectors, scale, codes, learned, follows, held, seed, device)
    steps = steps_for(STEPS, int((~withheld).sum()))
    kept = Checkpoint.of(checkpoint, [vectors, history.row, history.time, follows], steps, seed)
    run = train_network(net, task.loss, steps=steps, weight_decay=1e-2, checkpoint=kept, progress=progress)
    runs = _runs(history, codes)
    before_held = (follows >= 0) & ~held
    begins = learned & (history.first == np.arange(len(history)))
    counted = _count(history, codes, follows, runs, before_held, begins & ~held, end + 1)
    judged = np.flatnonzero((follows >= 0) & held)[:: max(1, int(held.sum()) // 8192)]
    p_count = counted.probability(history.kind[judged], runs[judged], follows[judged])
    p_net = task.probability(judged)
    new = held & learned
    novelty = _novelty(history.kind[new], codes[new] == codebook.other)
    everything = _count(history, codes, follows, runs, follows >= 0, begins, end + 1)
    model = SequenceModel(
        net,
        Codebook(codebook.centres.to(device), codebook.reach.to(device)),
        everything,
        Antecedents.fit(_preceded(history, codes, np.flatnonzero(learned)), end),
        scale=scale,
        novelty=novelty,
        timeouts={KINDS[kind]: ms for kind, ms in timeouts.items()},
    )
    return model, SequenceReport(run.losses, _nats(p_net), _nats(p_count), novelty)


def _nats(p: NDArray[np.float64]) -> float:
    return float(-np.log(p).mean()) if len(p) else 0.0


def _next_codes(
    history: _History, codes: NDArray[np.int64], timeouts: Mapping[int, int], end: int
) -> NDArray[np.int64]:
    """int64 [m]: the code that followed each pair: of the next record, `end`, or -1 where the events ended first."""
    timeout = np.array([timeouts.get(kind, np.iinfo(np.int64).max) for kind in range(len(KINDS))])[history.kind]
    later = np.append(history.time[1:], 0)
    later[history.is_last] = history.time.max()
    follows = np.where(history.is_last, -1, np.append(codes[1:], -1))
    follows[later - history.time > timeout] = end
    return follows


def _runs(history: _History, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [m, ORDER]: the codes up to and including each pair, latest first, -1 before the first."""
    at = np.arange(len(history))[:, None] - np.arange(ORDER)
    return np.where(at >= history.first[:, None], codes[np.maximum(at, 0)], -1)


def _count(
    history: _History,
    codes: NDArray[np.int64],
    follows: NDArray[np.int64],
    runs: NDArray[np.int64],
    known: NDArray[np.bool_],
    begins: NDArray[np.bool_],
    vocabulary: int,
) -> NgramCounts:
    """Counts of the codes that follow, and of the codes that entities begin with."""
    nothing = np.full((int(begins.sum()), ORDER), -1, np.int64)
    return NgramCounts.fit(
        np.concatenate([history.first[known], history.first[begins]]),
        np.concatenate([history.kind[known], history.kind[begins]]),
        np.concatenate([runs[known], nothing]),
        np.concatenate([follows[known], codes[begins]]),
        vocabulary,
    )


def _preceded(
    history: _History, codes: NDArray[np.int64], places: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Kind, code and the codes shortly before, for `Antecedents.fit`: of those places whose recent past is known, and
    of LASTING kinds with at least MIN_ENTITIES entities."""
    entities = np.bincount(history.kind[np.unique(history.first[places])], minlength=len(KINDS))
    places = places[(LASTING & (entities >= MIN_ENTITIES))[history.kind[places]]]
    for part in np.array_split(places, max(1, len(places) // 16_384)):
        at, used = history.slots(part)
        times, kind = history.time[at], history.kind[part]
        whole = known(times, used)
        before = np.where(recent(times, used), codes[at], -1)
        yield kind[whole], codes[part][whole], before[whole]


def _novelty(kind: NDArray[np.int64], new: NDArray[np.bool_]) -> dict[str, float]:
    """The share of held-out records with the code OTHER, by kind of entity, with add-one smoothing."""
    seen, unknown = (np.bincount(kind[which], minlength=len(KINDS)) for which in (np.ones_like(new), new))
    return dict(zip(KINDS, ((unknown + 1) / (seen + 2)).tolist(), strict=True))


class _Task:
    """The training task: predict the next code at every slot, and distinguish real windows from broken ones."""

    def __init__(
        self,
        net: SequenceNet,
        history: _History,
        vectors: NDArray[np.float16],
        scale: float,
        codes: NDArray[np.int64],
        learned: NDArray[np.bool_],
        follows: NDArray[np.int64],
        held: NDArray[np.bool_],
        seed: int,
        device: torch.device,
    ) -> None:
        self.net, self.history, self.codes = net, history, codes
        self.begins = np.where(learned, codes, -1)
        self._all_follows = follows
        self.follows = np.where(held, -1, follows)
        self.held = held
        self.vectors = torch.from_numpy(vectors).to(device)
        self.scale, self.device = scale, device
        self.seed = seed
        trained = np.flatnonzero(~held)
        counts = np.bincount(history.kind[trained], minlength=len(KINDS))
        weight = 1.0 / np.sqrt(np.maximum(counts, 1))[history.kind[trained]]
        self.trained, self.cumulative = trained, np.cumsum(weight)

    def _tensors(self, at: NDArray[np.int64], gaps: NDArray[np.float32], used: NDArray[np.bool_]) -> list[Tensor]:
        rows = torch.from_numpy(self.history.row[at]).to(self.device)
        kind = torch.from_numpy(self.history.kind[at[:, -1]]).to(self.device)
        x = self.vectors[rows].float() * self.scale
        return [x, torch.from_numpy(gaps).to(self.device), torch.from_numpy(used).to(self.device), kind]

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        drawn = np.searchsorted(self.cumulative, rng.random(BATCH) * self.cumulative[-1])
        places = self.trained[np.minimum(drawn, len(self.trained) - 1)]
        at, used = self.history.slots(places)
        gaps = gap_features(self.history.time[at], used)
        known = self.net.all_slots(*self._tensors(at, gaps, used))
        target = np.where(used, self.follows[at], -1)
        begins = ~used[:, :-1] & used[:, 1:]
        target[:, :-1][begins] = self.begins[at[:, 1:][begins]]
        wanted = torch.from_numpy(target).to(self.device)
        follow = functional.cross_entropy(self.net.next(known).flatten(0, 1), wanted.flatten(), ignore_index=-1)
        spoiled, spoiled_gaps, spoiled_used, changed = spoil(at, gaps, used, self.codes, self.history.kind, rng)
        broken = self.net.last_slots(*self._tensors(spoiled, spoiled_gaps, spoiled_used))[:, 1][
            torch.from_numpy(changed)
        ]
        whole = known[:, -1][torch.from_numpy(changed)]
        logits = self.net.broken(torch.cat([whole, broken]))[:, 0]
        truth = torch.cat([torch.zeros(len(whole)), torch.ones(len(broken))]).to(self.device)
        return follow + functional.binary_cross_entropy_with_logits(logits, truth) if len(logits) else follow

    def probability(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [k]: the network's probability of the code that followed at these places."""
        parts = [np.empty(0)]
        for part in np.array_split(places, max(1, len(places) // 512)) if len(places) else ():
            at, used = self.history.slots(part)
            gaps = gap_features(self.history.time[at], used)
            with torch.no_grad():
                p = self.net.next(self.net.last_slots(*self._tensors(at, gaps, used))[:, 1]).softmax(dim=-1)
            wanted = self._all_follows[part]
            parts.append(p.double().cpu().numpy()[np.arange(len(part)), wanted])
        return np.concatenate(parts)


def spoil(
    at: NDArray[np.int64],
    gaps: NDArray[np.float32],
    used: NDArray[np.bool_],
    codes: NDArray[np.int64],
    kind: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Windows with a part shuffled, with the past of another window of their kind, or with a part removed, in equal
    shares. Returns places, gaps, used, and bool [m], which windows changed. Gaps stay in place, or go with the removed
    records, so that an unusual gap does not reveal the change."""
    at, gaps, used = at.copy(), gaps.copy(), used.copy()
    m, width = at.shape
    before = np.where(used, codes[at], -1)
    by_kind = np.argsort(kind[at[:, -1]], kind="stable")
    partner = np.empty(m, np.intp)
    partner[by_kind] = np.roll(by_kind, 1)
    original, original_used = at.copy(), used.copy()
    how = rng.integers(0, 3, size=(m,), dtype=np.int64)
    for i in range(m):
        members = int(used[i].sum())
        if members < 3:
            continue
        first = width - members
        if how[i] == 0:
            size = int(rng.integers(2, min(members, 8) + 1))
            start = int(rng.integers(first, width - size + 1))
            at[i, start : start + size] = rng.permutation(at[i, start : start + size])
        elif how[i] == 1:
            cut = int(rng.integers(first + 1, width))
            theirs = original_used[partner[i]]
            at[i, :cut] = original[partner[i], :cut]
            used[i, :cut] = theirs[:cut]
            if not theirs[:cut].any():
                continue
        else:
            size = int(rng.integers(1, min(members - 2, 4) + 1))
            start = int(rng.integers(first, width - size))
            for array in (at, gaps, used):
                array[i, size : start + size] = array[i, :start].copy()
            used[i, :size] = False
    after = np.where(used, codes[at], -1)
    return at, gaps, used, (after != before).any(axis=1)
