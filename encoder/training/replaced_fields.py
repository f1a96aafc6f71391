"""Trains the record network to tell which fields of an event were replaced, on events without labels.

Some fields of a training event get the value of another event of its type, or for numbers a value some way off. The
network gives each field a logit: was it replaced? (Replaced-token detection: ELECTRA, Clark et al. 2020,
arXiv:2003.10555; for anomalies in text DATE, Manolache et al. 2021, arXiv:2104.05591.) An anomaly is an event whose
values do not belong together. Any named value may also be hidden, shown as UNKNOWN, whether it was replaced or not. So
that a value is new says nothing here, and the others are judged without it; counting says how rare news is.

Promises: the same features and seed give the same weights on the same machine; the identity path is fitted first and
not trained. The number of steps is fixed and small, because unlabelled attacks in training are learned last
(docs/decisions/0002-replaced-fields.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from torch import Tensor
from torch.nn import functional

from encoder.features.normalization import NETWORK
from encoder.features.schema import FIRST, UNKNOWN, Schema
from encoder.features.vectorizer import FeatureBatch
from encoder.models.record_network import DEPTH, EMBEDDING, WIDTH, network_codes, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.training.trainer import Checkpoint, StepProgress, TrainingRun, steps_for, train_network

BATCH = 512
MIN_BATCH = 64
STEPS = 500
IDENTITY_ROWS = 100_000
"""Distinct rows, evenly spaced, to which the identity path is fitted: more do not change it and cost gigabytes."""
MOST_REPLACED = 0.6
"""The largest share of fields that are replaced, and of those that are hidden. The share of an event is this times the
square of a uniform number: mostly a few fields are, as in an anomaly."""
STEPPED = 0.28
"""Of the replaced numbers, the share that moves by a heavy-tailed step in place of taking another event's value."""
SAME_QUANTILE = 0.005
"""A number that moves by less counts as kept."""
_NUMBER_SCALE = 2.0
_FLAG_SCALE = 0.5
"""The distance of two different flags, where two different names have 1: flags are many and correlated."""
_COMMON = 5


def fit_identity(net: TabularResNet, schema: Schema, features: FeatureBatch, weights: NDArray[np.float64]) -> None:
    """Fit the identity path: one-hot codes and scaled quantiles, projected (`_directions`).

    features: n distinct rows; weights: float64 [n], the number of events of each. Values with fewer than five events
    and unknown names do not count in the distance.
    """
    sizes = net.sizes
    codes = network_codes(features.codes, sizes)
    starts = net.offsets.cpu().numpy()
    total = len(net.identity_codes)
    counts = np.zeros(total)
    for position, (start, size) in enumerate(zip(starts.tolist(), sizes, strict=True)):
        counts[start : start + size] = np.bincount(codes[:, position], weights=weights, minlength=size)
    scale = (counts >= _COMMON).astype(np.float64)
    scale[(counts >= weights.sum())] = 0.0  # a value that all events have distinguishes nothing
    for position, field in enumerate(schema.fields):
        if field.kind == "number":
            scale[starts[position] : starts[position] + sizes[position]] = 0.0  # the quantile stands for it
        elif field.derives == NETWORK:
            scale[starts[position] : starts[position] + sizes[position]] = 0.0  # the address stands for it
        elif field.kind == "identity":
            scale[starts[position] + UNKNOWN] = 0.0
        elif all(value.lstrip("-").isdecimal() for value in field.values):
            scale[starts[position] : starts[position] + sizes[position]] *= _FLAG_SCALE
    rows = np.linspace(0, len(codes) - 1, min(len(codes), IDENTITY_ROWS)).astype(np.intp)
    index, quantiles, weights = codes[rows] + starts, features.quantiles[rows], weights[rows]
    n, fields = index.shape
    one_hot = sparse.csr_matrix((scale[index].ravel(), (np.repeat(np.arange(n), fields), index.ravel())), (n, total))
    used = np.flatnonzero(scale)
    x = sparse.hstack([one_hot[:, used], sparse.csr_matrix(_NUMBER_SCALE * quantiles)]).tocsr()
    width = x.shape[1]
    out = net.identity_codes.shape[1]
    directions = np.eye(width) if width <= out else _directions(x, out)
    codes_map = np.zeros((total, out), np.float32)
    codes_map[used, : directions.shape[1]] = directions[: len(used)] * scale[used, None]
    numbers_map = np.zeros((features.quantiles.shape[1], out), np.float32)
    numbers_map[:, : directions.shape[1]] = _NUMBER_SCALE * directions[len(used) :]
    net.identity_codes.copy_(torch.from_numpy(codes_map))
    net.identity_numbers.copy_(torch.from_numpy(numbers_map))
    mean = np.average(x @ directions, axis=0, weights=weights)
    bias = np.zeros(out, np.float32)
    bias[: len(mean)] = -mean
    net.identity_bias.copy_(torch.from_numpy(bias))


def _directions(x: sparse.csr_matrix, out: int) -> NDArray[np.float64]:
    """float64 [width, out]: half are the principal directions, half random ones in what these leave (Achlioptas 2003).

    Rare values vary too little for a principal direction. In random directions the distances that they make are kept on
    average.
    """
    n, width = x.shape
    principal = TruncatedSVD(min(out // 2, n), random_state=0).fit(x).components_.T
    left = out - principal.shape[1]
    drawn = np.random.default_rng(0).standard_normal((width, left)) / left**0.5
    return np.concatenate([principal, drawn - principal @ (principal.T @ drawn)], axis=1)


def initial_network(
    schema: Schema, features: FeatureBatch, weights: NDArray[np.float64], *, seed: int
) -> TabularResNet:
    """A network whose identity path is fitted and whose logits say nothing yet. features: distinct rows; weights:
    float64 [n], events each stands for."""
    torch.manual_seed(seed)
    sizes = network_sizes(schema)
    net = TabularResNet(sizes=sizes, numbers=features.quantiles.shape[1], width=WIDTH, depth=DEPTH, embedding=EMBEDDING)
    fit_identity(net, schema, features, weights)
    return net


def train(
    net: TabularResNet,
    schema: Schema,
    features: FeatureBatch,
    weights: NDArray[np.float64],
    *,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    progress: StepProgress | None = None,
) -> tuple[TabularResNet, TrainingRun]:
    """Train on n distinct rows. weights: float64 [n], how many events each stands for. Losses are binary
    cross-entropies in nats for each judged field.

    Rows are drawn in proportion to the square root of their multiplicity, so that rare rows count. checkpoint: a file
    from which training resumes after a kill.
    """
    events = int(weights.sum())
    steps, size = steps_for(STEPS, events), min(BATCH, max(MIN_BATCH, events))
    batches = _ReplacedFields(schema, net.sizes, features, weights, seed)
    net.judged.copy_(torch.from_numpy(batches.judged))
    net.to(device).train().requires_grad_(True)
    judged = torch.from_numpy(np.flatnonzero(batches.judged)).to(device)

    def loss(step: int) -> Tensor:
        codes, quantiles, replaced = (torch.from_numpy(array).to(device) for array in batches(step, size))
        return functional.binary_cross_entropy_with_logits(net(codes, quantiles)[:, judged], replaced[:, judged])

    report = train_network(
        net,
        loss,
        steps=steps,
        weight_decay=1e-3,
        checkpoint=Checkpoint.of(checkpoint, [features.codes, features.quantiles, weights], schema.hash, steps, seed),
        progress=progress,
    )
    return net.eval().requires_grad_(False), report


class _ReplacedFields:
    """Batches of training events of which some fields are replaced. A step's batch depends on seed and step alone.

    judged: bool [fields], the fields that are replaced and judged: all that vary, except names of entities, because a
    name by itself is no anomaly.
    """

    def __init__(
        self, schema: Schema, sizes: list[int], features: FeatureBatch, weights: NDArray[np.float64], seed: int
    ) -> None:
        fields = schema.fields
        self._codes, self._quantiles = network_codes(features.codes, sizes), features.quantiles
        self._seed = seed
        self._named = np.array([field.kind in ("category", "identity") for field in fields])
        self._numbers = [i for i, field in enumerate(fields) if field.kind == "number"]
        self._grids = [np.array(fields[i].grid) for i in self._numbers]
        self._edges = [np.array(fields[i].edges) for i in self._numbers]
        varies = np.array([column.min() < column.max() for column in self._codes.T])
        varies[[0, *self._numbers]] = True  # the type, so that there is one
        self.judged = varies & [field.kind != "identity" for field in fields]
        draw = np.sqrt(weights)
        self._drawn = np.cumsum(draw) / draw.sum()
        # The rows of a type, one after the other, so that a draw from a type is a draw from a range.
        self._by_type = np.argsort(self._codes[:, 0], kind="stable")
        bounds = np.searchsorted(self._codes[self._by_type, 0], np.arange(sizes[0] + 1))
        self._of_type = np.cumsum(draw[self._by_type]) / draw.sum()
        self._ends = np.concatenate([[0.0], self._of_type])[bounds]

    def __call__(self, step: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """int64 [size, fields], float32 [size, numbers] and [size, fields]: codes and quantiles after replacement, and
        1 where a field was replaced."""
        rng = np.random.default_rng([self._seed, step])
        rows = self._rows(self._drawn, rng.random(size))
        kind = self._codes[rows, 0]
        low, high = self._ends[kind], self._ends[kind + 1]
        others = self._by_type[self._rows(self._of_type, low + rng.random(size) * (high - low))]
        codes, taken = self._codes[rows], self._codes[others]
        quantiles, taken_quantiles = self._quantiles[rows], self._quantiles[others]
        shape = codes.shape
        chosen = self._some(rng, shape) & self.judged
        self._step(rng, chosen, quantiles, taken, taken_quantiles)
        replaced = chosen & (taken != codes)
        moved = np.abs(taken_quantiles - quantiles) > SAME_QUANTILE
        replaced[:, self._numbers] |= chosen[:, self._numbers] & moved
        codes = np.where(chosen, taken, codes)
        quantiles = np.where(chosen[:, self._numbers], taken_quantiles, quantiles)
        hidden = self._some(rng, shape) & self._named & (codes >= FIRST)
        return np.where(hidden, UNKNOWN, codes).astype(np.int64), quantiles, replaced.astype(np.float32)

    @staticmethod
    def _some(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Some of the fields of each event, bool of this shape."""
        some: NDArray[np.bool_] = rng.random(shape) < MOST_REPLACED * rng.random((shape[0], 1)) ** 2
        return some

    @staticmethod
    def _rows(cumulative: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.intp]:
        return np.minimum(np.searchsorted(cumulative, at, "right"), len(cumulative) - 1)

    def _step(
        self,
        rng: np.random.Generator,
        chosen: NDArray[np.bool_],
        quantiles: NDArray[np.float32],
        taken: NDArray[np.int32],
        taken_quantiles: NDArray[np.float32],
    ) -> None:
        """Overwrite some of the values that are taken for chosen numbers by the own number and a step, on the signed
        log scale, of a size from a log-normal distribution of standard deviations."""
        n, numbers = quantiles.shape
        stepped = chosen[:, self._numbers] & (rng.random((n, numbers)) < STEPPED)
        steps = rng.standard_normal((n, numbers)) * np.exp(rng.standard_normal((n, numbers)))
        for place, (position, grid, edges) in enumerate(zip(self._numbers, self._grids, self._edges, strict=True)):
            rows = np.flatnonzero(stepped[:, place])
            own = grid[np.minimum((quantiles[rows, place] * len(grid)).astype(np.intp), len(grid) - 1)]
            x = own + steps[rows, place] * grid.std()
            taken[rows, position] = FIRST + np.searchsorted(edges, x)
            rank = np.searchsorted(grid, x, "left") + np.searchsorted(grid, x, "right")
            taken_quantiles[rows, place] = rank / (2 * len(grid))
