"""Trains the record encoder by masked-field prediction, on events without labels.

Promises: the same features and seed give the same weights on the same machine; the identity path is fitted first and
not trained; the final weights are those with the smallest loss on the latest slice of time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

from encoder.features.normalization import NETWORK
from encoder.features.schema import FIRST, UNKNOWN, Schema
from encoder.features.vectorizer import FeatureBatch
from encoder.models.record_network import DEPTH, EMBEDDING, WIDTH, network_codes, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.training.trainer import Checkpoint, StepProgress, TrainingRun, steps_for, train_network

BATCH = 512
MIN_BATCH = 64
STEPS = 1500
IDENTITY_ROWS = 100_000
"""Distinct rows, evenly spaced, to which the identity path is fitted: more do not change it and cost gigabytes."""
NEW_NAMES = 0.15
"""The share of training events whose names are replaced by UNKNOWN, because an unknown host alone is no anomaly."""
RESIDUAL_PENALTY = 1.0
"""The weight of the penalty on the residual part of the embedding, which must add to the identity part and not replace
it."""
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
            scale[starts[position] : starts[position] + sizes[position] + 1] = 0.0  # the quantile stands for it
        elif field.derives == NETWORK:
            scale[starts[position] : starts[position] + sizes[position] + 1] = 0.0  # the address stands for it
        elif field.kind == "identity":
            scale[starts[position] + UNKNOWN] = 0.0
        elif all(value.lstrip("-").isdecimal() for value in field.values):
            scale[starts[position] : starts[position] + sizes[position] + 1] *= _FLAG_SCALE
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
    """A network whose identity path is fitted and whose residual part is nothing yet. features: distinct rows;
    weights: float64 [n], events each stands for."""
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
    validation: FeatureBatch,
    *,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    progress: StepProgress | None = None,
) -> tuple[TabularResNet, TrainingRun]:
    """Fit the encoder to distinct rows with their multiplicities; validation: rows of a later slice of time. Losses are
    in nats for each masked field.

    Rows are drawn in proportion to the square root of their multiplicity, so that rare rows count. checkpoint: a file
    from which training resumes after a kill.
    """
    sizes = net.sizes
    net.to(device).train().requires_grad_(True)
    codes = torch.from_numpy(network_codes(features.codes, sizes)).to(device)
    quantiles = torch.from_numpy(features.quantiles).to(device)
    draw = torch.from_numpy(np.sqrt(weights))
    events = int(weights.sum())
    steps, batch = steps_for(STEPS, events), min(BATCH, max(MIN_BATCH, events))
    masks = _Masks(schema, net)
    held = validation.take(np.linspace(0, len(validation) - 1, min(2048, len(validation))).astype(np.intp))
    held_codes = torch.from_numpy(network_codes(held.codes, sizes)).to(device)
    held_quantiles = torch.from_numpy(held.quantiles).to(device)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * STEPS + step)
        rows = torch.multinomial(draw, batch, replacement=True, generator=generator).to(device)
        return masks.loss(net, codes[rows].long(), quantiles[rows], generator)

    def validate() -> float:
        return float(masks.loss(net, held_codes.long(), held_quantiles, torch.Generator().manual_seed(seed)))

    report = train_network(
        net,
        loss,
        steps=steps,
        weight_decay=1e-4,
        validate=validate if len(held) else None,
        checkpoint=Checkpoint.of(checkpoint, [features.codes, features.quantiles, weights], schema.hash, steps, seed),
        progress=progress,
    )
    return net.eval().requires_grad_(False), report


class _Masks:
    """The training task: hide a random share of the fields and names, and predict them."""

    def __init__(self, schema: Schema, net: TabularResNet) -> None:
        device = net.offsets.device
        self._tokens = net.mask_tokens
        self._identity = torch.tensor([field.kind == "identity" for field in schema.fields], device=device)
        numbers = [i for i, field in enumerate(schema.fields) if field.kind == "number"]
        self._numbers = torch.tensor(numbers, dtype=torch.int64, device=device)

    def loss(self, net: TabularResNet, codes: Tensor, quantiles: Tensor, generator: torch.Generator) -> Tensor:
        n, fields = codes.shape

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(codes.device)

        forget = (random(n, 1) < NEW_NAMES) & self._identity & (codes >= FIRST)
        codes = torch.where(forget, UNKNOWN, codes)
        hidden = random(n, fields) < 0.6 * random(n, 1)
        masked_quantiles = torch.where(hidden[:, self._numbers], 0.5, quantiles)
        identity, residual = net.parts(torch.where(hidden, self._tokens, codes), masked_quantiles)
        predicted = net.log_probabilities(identity + residual)
        surprise = torch.stack([-p.gather(1, codes[:, i : i + 1])[:, 0] for i, p in enumerate(predicted)], 1)
        share = hidden + 0.05
        size = identity.detach().square().sum(1).mean() + 1e-6
        return (surprise * share).sum() / share.sum() + RESIDUAL_PENALTY * residual.square().sum(1).mean() / size
