"""The sequence encoder: how surprising an entity's newest record is after its window, that nothing follows it, and how
the window looks as a whole.

A temporal residual network (dilated causal convolutions, van den Oord et al. 2016, arXiv:1609.03499, in pre-norm
residual blocks) reads record embeddings and time gaps; counts of short runs of records stand beside it. Promises that
a score depends on its window alone. Knows of what kind an entity is, not who.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional

from encoder.entities import KINDS
from encoder.events import EncoderError
from encoder.vectorize import row_hash

WIDTH = 32
"""Members of a window: what the network can see, and a power of two."""
FEATURES = 32
EMBEDDING = 64
CODES = 512
"""Records told apart as outcomes: the commonest and, of the rest, clusters."""
STEPS = 800
BATCH = 96
LEARNING_RATE = 2e-3
MIN_ENDINGS = 50
"""Endings of a kind of entity from which to learn how its routines end."""
MIN_SILENCE_MS = 1000
ORDER = 3
"""Outcomes before the one that is counted."""
AGE_MS = 7 * 86_400_000

_LEAST = 1e-12
_ODD = np.int64(0x1E3779B97F4A7C15)

Progress = Callable[[int, int, float], None]


class Pairs(Protocol):
    """The (event, entity) pairs of n events, as `encoder.entities.entities` finds them."""

    @property
    def row(self) -> NDArray[np.int32]: ...
    @property
    def kind(self) -> NDArray[np.int8]: ...
    @property
    def entity(self) -> list[str]: ...


class CausalBlock(nn.Module):
    """Pre-norm residual block over a slot and the one `dilation` before it: float32 [..., FEATURES] twice to once. The
    last layer starts at zero, so that an untrained block is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.now = nn.Linear(width, width)
        self.before = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, now: Tensor, before: Tensor) -> Tensor:
        hidden = functional.gelu(self.now(self.norm(now)) + self.before(self.norm(before)))
        out: Tensor = now + self.project(hidden)
        return out


class SequenceNet(nn.Module):
    """Windows to what comes next.

    Input: vectors float32 [m, W, dim], gaps float32 [m, W, 2] (`gap_features`), used bool [m, W], kind int64 [m].
    Unused slots, on the left, say that the entity had no earlier records.
    """

    def __init__(self, *, dim: int, outcomes: int, kinds: int) -> None:
        super().__init__()
        self.records = nn.Linear(dim, FEATURES)
        self.gaps = nn.Linear(2, FEATURES, bias=False)
        self.kinds = nn.Embedding(kinds, FEATURES)
        self.nothing = nn.Parameter(torch.randn(FEATURES) * 0.1)
        self.blocks = nn.ModuleList(CausalBlock(FEATURES) for _ in range(WIDTH.bit_length() - 1))
        self.norm = nn.LayerNorm(FEATURES)
        self.next = nn.Linear(FEATURES, outcomes)
        self.broken = nn.Linear(FEATURES, 1)

    def _slots(self, vectors: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        members = self.records(vectors) + self.gaps(gaps)
        slots: Tensor = torch.where(used[..., None], members, self.nothing) + self.kinds(kind)[:, None]
        return slots

    def all_slots(self, vectors: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        """float32 [m, W, FEATURES]: what is known after each slot."""
        x = self._slots(vectors, gaps, used, kind)
        for level, block in enumerate(self.blocks):
            dilation = 1 << level
            x = block(x, functional.pad(x, (0, 0, dilation, 0))[:, :-dilation])
        return self.norm(x)  # type: ignore[no-any-return]

    def last_slots(self, vectors: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        """float32 [m, 2, FEATURES]: the last two of `all_slots`, for a third of the work: each level halves what the
        next one needs."""
        x = self._slots(vectors, gaps, used, kind)
        m = len(x)
        x = self.blocks[0](x, functional.pad(x, (0, 0, 1, 0))[:, :-1])
        x = x.view(m, WIDTH // 2, 2, FEATURES)
        for block in self.blocks[1:]:
            halves = x.view(m, -1, 2, 2, FEATURES)
            x = block(halves[:, :, 1], halves[:, :, 0])
        return self.norm(x[:, 0])  # type: ignore[no-any-return]


def gap_features(times: NDArray[np.int64], used: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Times to the gaps before each slot: float32 [m, W, 2], on a log scale (1 ms to a week: 0 to 1) and whether there
    was a member before. times: int64 [m, W], event ms."""
    gaps = np.zeros((*times.shape, 2), np.float32)
    both = used[:, 1:] & used[:, :-1]
    between = np.maximum(times[:, 1:] - times[:, :-1], 0)
    gaps[:, 1:, 0] = np.where(both, np.log1p(between) / math.log1p(AGE_MS), 0.0)
    gaps[:, 1:, 1] = both
    return gaps


def used_slots(length: NDArray[np.int32], width: int) -> NDArray[np.bool_]:
    """bool [m, W]: members stand on the right."""
    used: NDArray[np.bool_] = np.arange(width) >= width - length[:, None]
    return used


class Codebook:
    """Record vectors to outcomes: the commonest distinct vectors of training, then cluster centres of the others.

    centres: float32 [k, d]; reach: float32 [k], the farthest that a training vector lay from its centre. A vector
    beyond the reach of its nearest centre is OTHER, outcome k: like nothing in training.
    """

    def __init__(self, centres: Tensor, reach: Tensor) -> None:
        self.centres, self.reach = centres, reach

    @property
    def other(self) -> int:
        return len(self.centres)

    @classmethod
    def fit(cls, vectors: NDArray[np.float16], *, seed: int, size: int = CODES) -> Codebook:
        """vectors: float16 [n, d], of training events."""
        first, inverse = distinct_rows(vectors)
        counts = np.bincount(inverse)
        order = np.argsort(-counts, kind="stable")
        distinct = vectors[first[order]].astype(np.float32)
        common = distinct if len(distinct) <= size else distinct[: size // 2]
        rest = distinct[len(common) :]
        centres = common
        if len(rest):
            weights = np.sqrt(counts[order[len(common) :]])
            model = MiniBatchKMeans(size - len(common), random_state=seed, batch_size=1024, n_init=1, max_iter=20)
            centres = np.concatenate([common, model.fit(rest, sample_weight=weights).cluster_centers_])
        book = cls(torch.from_numpy(np.ascontiguousarray(centres, np.float32)), torch.zeros(len(centres)))
        nearest, distance = book._nearest(torch.from_numpy(distinct))
        book.reach.scatter_reduce_(0, nearest, distance, "amax")
        # A little beyond: as far as vectors of one meaning were seen to lie apart, over all of the book.
        book.reach = torch.maximum(book.reach * 1.05, torch.full_like(book.reach, 1e-3)) + 0.5 * book.reach.median()
        return book

    def _nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.cdist(part, self.centres).min(dim=1) for part in torch.split(vectors, 4096)]
        if not found:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])

    def __call__(self, vectors: NDArray[np.float16]) -> NDArray[np.int64]:
        """float16 [n, d] to int64 [n]: each distinct vector is looked up once."""
        first, inverse = distinct_rows(vectors)
        known = torch.from_numpy(vectors[first].astype(np.float32)).to(self.centres.device)
        nearest, distance = self._nearest(known)
        codes = torch.where(distance <= self.reach[nearest], nearest, self.other).cpu().numpy()
        return codes[inverse]


def distinct_rows(vectors: NDArray[np.float16]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first row of each kind, and for every row which of them is its like. vectors: float16 [n, d]."""
    bits = np.ascontiguousarray(vectors).view(np.uint16).astype(np.int32)
    keys = row_hash((bits[:, ::2] << 16) + bits[:, 1::2] if bits.shape[1] % 2 == 0 else bits)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.ravel()


class RunCounts:
    """-log p of an outcome after the runs of up to ORDER outcomes before it, by counting, with Witten-Bell backoff
    (Bell et al. 1990): what a network has to beat on routines.

    An entity counts once for each run and outcome: what one machine does a thousand times a day is one observation of
    what machines do. keys: int64 [k], sorted; counts: float32 [k, 2], of (kind, run, outcome) how many entities, and of
    (kind, run) their sum and the number of distinct outcomes.
    """

    def __init__(self, keys: NDArray[np.int64], counts: NDArray[np.float32], outcomes: int) -> None:
        self.keys, self.counts, self.outcomes = keys, counts, outcomes

    @classmethod
    def fit(
        cls,
        entity: NDArray[np.int64],
        kind: NDArray[np.int64],
        runs: NDArray[np.int64],
        outcome: NDArray[np.int64],
        outcomes: int,
    ) -> RunCounts:
        """entity, kind: int64 [m]; runs: int64 [m, ORDER], latest first, -1 where there was nothing; outcome: int64
        [m]."""
        keys: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.float64]] = []
        for order in range(ORDER + 1):
            wanted = _run_keys(kind, runs, order, outcome)
            _, once = np.unique(wanted ^ (entity * _ODD), return_index=True)
            pair, first, count = np.unique(wanted[once], return_index=True, return_counts=True)
            at = once[first]
            run, inverse = np.unique(_run_keys(kind[at], runs[at], order, None), return_inverse=True)
            totals = np.bincount(inverse, weights=count)
            keys += [pair, run]
            counts += [np.column_stack([count, count]), np.column_stack([totals, np.bincount(inverse)])]
        all_keys = np.concatenate(keys)
        by_key = np.argsort(all_keys, kind="stable")
        return cls(all_keys[by_key], np.concatenate(counts)[by_key].astype(np.float32), outcomes)

    def _look_up(self, keys: NDArray[np.int64]) -> NDArray[np.float32]:
        if not len(self.keys):
            return np.zeros((len(keys), 2), np.float32)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where((self.keys[at] == keys)[:, None], self.counts[at], np.float32(0))

    def probability(
        self, kind: NDArray[np.int64], runs: NDArray[np.int64], outcome: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """float64 [m], as in `fit`."""
        p = np.full(len(kind), 1.0 / self.outcomes)
        for order in range(ORDER + 1):
            hits = self._look_up(_run_keys(kind, runs, order, outcome))[:, 0]
            total, distinct = self._look_up(_run_keys(kind, runs, order, None)).T
            seen = total > 0
            p = np.where(seen, (hits + distinct * p) / np.maximum(total + distinct, 1.0), p)
        return p


def _run_keys(
    kind: NDArray[np.int64], runs: NDArray[np.int64], order: int, outcome: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    what = np.full(len(kind), -1, np.int64) if outcome is None else outcome
    parts = [np.full(len(kind), order, np.int64), kind, what, *runs[:, :order].T]
    return row_hash(np.column_stack(parts).astype(np.int32)).view(np.int64)


class _History:
    """Training pairs by entity and event time, with what followed each.

    position: int64 [m], pairs in the order (entity, time, stream); first: int64 [m], the place in that order of the
    entity's first pair; row, kind, time: of each place.
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
        """The windows that end at these places: int64 [k, W] places, bool [k, W] which are used."""
        at = places[:, None] + np.arange(1 - WIDTH, 1)
        inside = at >= self.first[places][:, None]
        at = np.where(inside, at, places[:, None])
        return at, inside & (self.time[places][:, None] - self.time[at] <= AGE_MS)

    def silence(self) -> dict[int, int]:
        """For each kind whose routines end, the silence in ms after which one has ended: twice the gap that one in a
        thousand exceeds. A kind ends if enough of its entities fell silent for so long before the events do."""
        found = {}
        gaps = np.diff(self.time, append=0)
        now = self.time.max(initial=0)
        for kind in np.unique(self.kind).tolist():
            mine = self.kind == kind
            inner = gaps[mine & ~self.is_last]
            if not len(inner):
                continue
            quiet = max(MIN_SILENCE_MS, 2 * int(np.quantile(inner, 0.999)))
            ended = mine & self.is_last & (now - self.time > quiet)
            if ended.sum() >= max(MIN_ENDINGS, 0.5 * (mine & self.is_last).sum()):
                found[kind] = quiet
        return found


@dataclass(frozen=True)
class SequenceScores:
    """Of m windows, each about its newest member; nats.

    surprise: float32 [m], -log p(newest record | those before); usual: float32 [m], -log p(newest record) among all of
    its kind of entity: what is beyond it is the order's doing; broken: float32 [m], -log p(the window is whole: not
    shuffled, spliced or with a piece left out); ending: float32 [m], -log p(nothing follows for the kind's silence), 0
    for kinds that do not end: counts only once the entity has fallen silent; embedding: float32 [m, FEATURES].
    """

    surprise: NDArray[np.float32]
    usual: NDArray[np.float32]
    broken: NDArray[np.float32]
    ending: NDArray[np.float32]
    embedding: NDArray[np.float32]


@dataclass(frozen=True)
class SequenceReport:
    """What is worth keeping of a fit: mean nats a record on the last tenth, which the network did not train on, of the
    network and of the counts, and the share of records there that are like nothing before, by kind of entity."""

    steps: int
    losses: list[float]
    network: float
    counts: float
    novelty: dict[str, float]


class SequenceModel:
    """Scores windows.

    silence: ms of silence, by kind of entity, after which `ending` counts; other kinds do not end.
    """

    def __init__(
        self,
        net: SequenceNet,
        codebook: Codebook,
        counts: RunCounts,
        *,
        scale: float,
        novelty: Mapping[str, float],
        silence: Mapping[str, int],
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.codebook, self.counts = codebook, counts
        self.scale, self.novelty, self.silence = scale, dict(novelty), dict(silence)
        self._novelty = np.array([self.novelty.get(kind, 1.0) for kind in KINDS])
        self._quiet = np.array([self.silence.get(kind, 0) for kind in KINDS], np.int64)

    @property
    def device(self) -> torch.device:
        return self.codebook.centres.device

    def __call__(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        length: NDArray[np.int32],
        kind: NDArray[np.int8],
    ) -> SequenceScores:
        """vectors: float16 [m, W, d], times: int64 [m, W], length: int32 [m], right-aligned as `state.windows.Windows`
        has them; kind: int8 [m], index into `entities.KINDS`."""
        m = len(length)
        used = used_slots(length, WIDTH)
        if vectors.shape[:2] != (m, WIDTH):
            raise ValueError(f"windows of shape {vectors.shape}: [m, {WIDTH}, d] with m = {m} was expected")
        recent = used[:, -ORDER - 1 :]
        codes = np.where(
            recent, self.codebook(vectors[:, -ORDER - 1 :].reshape(m * (ORDER + 1), -1)).reshape(m, -1), -1
        )
        gaps = gap_features(times, used)
        outputs = np.empty((m, 2, FEATURES), np.float32)
        p_next, p_end, p_broken = np.empty(m), np.empty(m), np.empty(m)
        end = self.codebook.other + 1
        for start in range(0, m, 1024):
            part = slice(start, start + 1024)
            x = torch.from_numpy(vectors[part].astype(np.float32) * self.scale).to(self.device)
            arrays = (
                torch.from_numpy(a).to(self.device) for a in (gaps[part], used[part], kind[part].astype(np.int64))
            )
            with torch.no_grad():
                known = self.net.last_slots(x, *arrays)
                p = self.net.next(known).softmax(dim=-1).double().cpu().numpy()
                p_broken[part] = self.net.broken(known[:, 1])[:, 0].double().sigmoid().cpu().numpy()
            outputs[part] = known.cpu().numpy()
            p_next[part] = np.take_along_axis(p[:, 0], codes[part, -1:], axis=1)[:, 0]
            p_end[part] = p[:, 1, end]
        kinds = kind.astype(np.int64)
        latest = codes[:, ::-1]
        by_count = self.counts.probability(kinds, latest[:, 1:], codes[:, -1])
        ends = self._quiet[kinds] > 0
        end_count = self.counts.probability(kinds[ends], latest[ends, :-1], np.full(int(ends.sum()), end))
        surprise = -0.5 * (np.log(np.maximum(p_next, _LEAST)) + np.log(by_count))
        ending = np.zeros(m)
        ending[ends] = -0.5 * (np.log(np.maximum(p_end[ends], _LEAST)) + np.log(end_count))
        usual = -np.log(self.counts.probability(kinds, latest[:, :0], codes[:, -1]))
        new = codes[:, -1] == self.codebook.other
        surprise[new] = usual[new] = -np.log(self._novelty[kinds[new]])
        return SequenceScores(
            surprise.astype(np.float32),
            usual.astype(np.float32),
            -np.log1p(-np.minimum(p_broken, 1 - 1e-7)).astype(np.float32),
            ending.astype(np.float32),
            outputs[:, 1],
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `from_state` makes the same model."""
        tensors = {f"net.{name}": tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        tensors["codebook.centres"], tensors["codebook.reach"] = self.codebook.centres, self.codebook.reach
        tensors["counts.keys"] = torch.from_numpy(self.counts.keys)
        tensors["counts.counts"] = torch.from_numpy(self.counts.counts)
        config = {
            "dim": self.codebook.centres.shape[1],
            "outcomes": self.counts.outcomes,
            "kinds": list(KINDS),
            "scale": self.scale,
            "novelty": self.novelty,
            "silence": self.silence,
        }
        return tensors, config

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], device: torch.device
    ) -> SequenceModel:
        """Raises `EncoderError` where tensors and configuration do not belong together."""
        try:
            if list(config["kinds"]) != list(KINDS):
                raise EncoderError(f"sequences of entity kinds {config['kinds']}, not {KINDS}: fit the bundle again")
            net = SequenceNet(dim=int(config["dim"]), outcomes=int(config["outcomes"]), kinds=len(KINDS))
            net.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("net.")})
            book = Codebook(tensors["codebook.centres"].to(device), tensors["codebook.reach"].to(device))
            counts = RunCounts(
                tensors["counts.keys"].cpu().numpy(), tensors["counts.counts"].cpu().numpy(), int(config["outcomes"])
            )
            scale = float(config["scale"])
            novelty = {str(kind): float(share) for kind, share in config["novelty"].items()}
            silence = {str(kind): int(ms) for kind, ms in config["silence"].items()}
        except (KeyError, TypeError, RuntimeError) as error:
            raise EncoderError(f"not the state of a sequence model ({error}); fit the bundle again") from error
        return cls(net.to(device), book, counts, scale=scale, novelty=novelty, silence=silence)


def fit_sequences(
    vectors: NDArray[np.float16],
    times: NDArray[np.int64],
    pairs: Pairs,
    *,
    withheld: NDArray[np.bool_],
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[SequenceModel, SequenceReport]:
    """Fit to the history of n events.

    vectors: float16 [n, d], record embeddings; times: int64 [n], event ms; pairs: whom the events are about; withheld:
    bool [n], events that are somebody's past and that nothing is learned from, to calibrate on. The network does not
    train on the last tenth of the time either, where it is compared with the counts. Raises `EncoderError` where no
    other event names an entity.
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
    silence = history.silence()
    codes = codebook(vectors)[history.row]
    follows = _outcomes(history, codes, silence, end)
    next_learned = np.append(learned[1:], True)
    follows[~np.where(follows == end, learned, next_learned)] = -1
    net = SequenceNet(dim=vectors.shape[1], outcomes=end + 1, kinds=len(KINDS)).to(device)
    scale = 1.0 / max(float(np.sqrt(np.square(codebook.centres.numpy()).mean())), 1e-6)
    task = _Task(net, history, vectors, scale, codes, learned, follows, held, seed, device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    losses: list[float] = []
    running = 0.0
    for step in range(1, STEPS + 1):
        loss = task.loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += float(loss.detach())
        if step % 100 == 0:
            losses.append(running / 100)
            running = 0.0
            if progress is not None:
                progress(step, STEPS, losses[-1])
    runs = _runs(history, codes)
    known = (follows >= 0) & ~held
    begins = learned & (history.first == np.arange(len(history)))
    counted = _count(history, codes, follows, runs, known, begins & ~held, end + 1)
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
        scale=scale,
        novelty=novelty,
        silence={KINDS[kind]: ms for kind, ms in silence.items()},
    )
    return model, SequenceReport(STEPS, losses, _nats(p_net), _nats(p_count), novelty)


def _nats(p: NDArray[np.float64]) -> float:
    return float(-np.log(p).mean()) if len(p) else 0.0


def _outcomes(history: _History, codes: NDArray[np.int64], silence: Mapping[int, int], end: int) -> NDArray[np.int64]:
    """int64 [m]: what followed each pair: the next record's outcome, the end, or -1 where the events ended first."""
    quiet = np.array([silence.get(kind, np.iinfo(np.int64).max) for kind in range(len(KINDS))])[history.kind]
    later = np.append(history.time[1:], 0)
    later[history.is_last] = history.time.max()
    follows = np.where(history.is_last, -1, np.append(codes[1:], -1))
    follows[later - history.time > quiet] = end
    return follows


def _runs(history: _History, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [m, ORDER]: the outcomes up to and with each pair, latest first, -1 before the first."""
    at = np.arange(len(history))[:, None] - np.arange(ORDER)
    return np.where(at >= history.first[:, None], codes[np.maximum(at, 0)], -1)


def _count(
    history: _History,
    codes: NDArray[np.int64],
    follows: NDArray[np.int64],
    runs: NDArray[np.int64],
    known: NDArray[np.bool_],
    begins: NDArray[np.bool_],
    outcomes: int,
) -> RunCounts:
    """Counts of what follows what, and of what entities begin with."""
    nothing = np.full((int(begins.sum()), ORDER), -1, np.int64)
    return RunCounts.fit(
        np.concatenate([history.first[known], history.first[begins]]),
        np.concatenate([history.kind[known], history.kind[begins]]),
        np.concatenate([runs[known], nothing]),
        np.concatenate([follows[known], codes[begins]]),
        outcomes,
    )


def _novelty(kind: NDArray[np.int64], new: NDArray[np.bool_]) -> dict[str, float]:
    """The share of held-out records like nothing before, by kind of entity, smoothed as if two more had been seen."""
    seen, found = (np.bincount(kind[which], minlength=len(KINDS)) for which in (np.ones_like(new), new))
    return dict(zip(KINDS, ((found + 1) / (seen + 2)).tolist(), strict=True))


class _Task:
    """The training task: predict what follows at every slot, and tell whole windows from broken ones."""

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
        self.rng = np.random.default_rng(seed)
        trained = np.flatnonzero(~held)
        counts = np.bincount(history.kind[trained], minlength=len(KINDS))
        weight = 1.0 / np.sqrt(np.maximum(counts, 1))[history.kind[trained]]
        self.trained, self.cumulative = trained, np.cumsum(weight)

    def _tensors(self, at: NDArray[np.int64], gaps: NDArray[np.float32], used: NDArray[np.bool_]) -> list[Tensor]:
        rows = torch.from_numpy(self.history.row[at]).to(self.device)
        kind = torch.from_numpy(self.history.kind[at[:, -1]]).to(self.device)
        x = self.vectors[rows].float() * self.scale
        return [x, torch.from_numpy(gaps).to(self.device), torch.from_numpy(used).to(self.device), kind]

    def loss(self) -> Tensor:
        drawn = np.searchsorted(self.cumulative, self.rng.random(BATCH) * self.cumulative[-1])
        places = self.trained[np.minimum(drawn, len(self.trained) - 1)]
        at, used = self.history.slots(places)
        gaps = gap_features(self.history.time[at], used)
        known = self.net.all_slots(*self._tensors(at, gaps, used))
        target = np.where(used, self.follows[at], -1)
        begins = ~used[:, :-1] & used[:, 1:]
        target[:, :-1][begins] = self.begins[at[:, 1:][begins]]
        wanted = torch.from_numpy(target).to(self.device)
        follow = functional.cross_entropy(self.net.next(known).flatten(0, 1), wanted.flatten(), ignore_index=-1)
        spoiled, spoiled_gaps, spoiled_used, changed = spoil(at, gaps, used, self.codes, self.history.kind, self.rng)
        broken = self.net.last_slots(*self._tensors(spoiled, spoiled_gaps, spoiled_used))[:, 1][
            torch.from_numpy(changed)
        ]
        whole = known[:, -1][torch.from_numpy(changed)]
        logits = self.net.broken(torch.cat([whole, broken]))[:, 0]
        truth = torch.cat([torch.zeros(len(whole)), torch.ones(len(broken))]).to(self.device)
        return follow + functional.binary_cross_entropy_with_logits(logits, truth) if len(logits) else follow

    def probability(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """The network's probability of what followed at these places."""
        found = [np.empty(0)]
        for part in np.array_split(places, max(1, len(places) // 512)):
            at, used = self.history.slots(part)
            gaps = gap_features(self.history.time[at], used)
            with torch.no_grad():
                p = self.net.next(self.net.last_slots(*self._tensors(at, gaps, used))[:, 1]).softmax(dim=-1)
            wanted = self._all_follows[part]
            found.append(p.double().cpu().numpy()[np.arange(len(part)), wanted])
        return np.concatenate(found)


def spoil(
    at: NDArray[np.int64],
    gaps: NDArray[np.float32],
    used: NDArray[np.bool_],
    codes: NDArray[np.int64],
    kind: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Windows with a piece shuffled, with the past of another window of their kind, or with a piece left out; in equal
    shares. Returns places, gaps, used, and which windows are not what they were. Gaps stay where they are, or go with
    the records left out: a strange pause would give it away."""
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
