"""Figures about the quality of an embedding, without labels.

A figure that differs much from that of an earlier fit shows where to look. They promise nothing about detection.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from encoder.features.schema import MISSING
from encoder.features.vectorizer import FeatureBatch
from encoder.models.record_encoder import RecordEncoder

SAMPLE = 2000
HIDDEN = 0.1
"""The share of an event's attributes that are removed for `stability`."""
NEIGHBOURS = 10


@dataclass(frozen=True)
class EmbeddingChecks:
    """About distinct rows of training, at most 2,000 of them.

    silhouette: by event type, -1 to 1 (Rousseeuw 1987): how much nearer its own type is than the next; stability: the
    share of rows whose nearest row is still themselves without a tenth of their attributes; agreement: the share of the
    ten nearest rows that are among the ten nearest by the raw features, too; effective_rank: e to the entropy of the
    principal variances (Roy and Vetterli 2007), of 64, where 1 is a collapse; distinct: the share of rows that no
    other row shares its vector with.
    """

    silhouette: float
    stability: float
    agreement: float
    effective_rank: float
    distinct: float


def check_embedding(encoder: RecordEncoder, features: FeatureBatch, *, seed: int) -> EmbeddingChecks:
    """features: distinct rows, two or more."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(features), min(SAMPLE, len(features)), replace=False))
    sample = features.take(rows)
    vectors = encoder.vectors(sample).astype(np.float32)
    types = sample.codes[:, 0]
    kinds = len(np.unique(types))
    hidden = rng.random(sample.codes.shape) < HIDDEN
    hidden[:, [0, -1]] = False  # Keep the event type and the number of unknown paths.
    numbers = [i for i, field in enumerate(encoder.schema.fields) if field.kind == "number"]
    partly = FeatureBatch(
        np.where(hidden, MISSING, sample.codes).astype(np.int32),
        np.where(hidden[:, numbers], np.float32(0.5), sample.quantiles),
        sample.actor,
        np.where(hidden[:, numbers], np.float32(np.nan), sample.numbers),
    )
    moved = encoder.vectors(partly).astype(np.float32)
    few = min(NEIGHBOURS, len(rows) - 1)
    near, near_raw = (_neighbours(x, few) for x in (vectors, _raw(encoder, sample)))
    back = NearestNeighbors(n_neighbors=1).fit(vectors).kneighbors(moved, return_distance=False)[:, 0]
    variance = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False).astype(np.float64) ** 2
    share = variance[variance > 0] / max(variance.sum(), 1e-12)
    _, shared = np.unique(vectors, axis=0, return_inverse=True)
    return EmbeddingChecks(
        silhouette=float(silhouette_score(vectors, types)) if 1 < kinds < len(rows) else 0.0,
        stability=float((shared.ravel()[back] == shared.ravel()).mean()),
        agreement=float(
            np.mean([len(set(a) & set(b)) / few for a, b in zip(near.tolist(), near_raw.tolist(), strict=True)])
        ),
        effective_rank=float(np.exp(-(share * np.log(share)).sum())),
        distinct=float((np.bincount(shared.ravel())[shared.ravel()] == 1).mean()),
    )


def _neighbours(x: NDArray[np.float32] | sparse.csr_matrix, few: int) -> NDArray[np.intp]:
    """int [n, few]: the nearest other rows of each row."""
    nearest: NDArray[np.intp] = NearestNeighbors(n_neighbors=few).fit(x).kneighbors(return_distance=False)
    return nearest


def _raw(encoder: RecordEncoder, sample: FeatureBatch) -> sparse.csr_matrix:
    """One-hot codes and quantiles, as raw nearest neighbours take them: float32 [n, values + numbers]."""
    categories = [i for i, field in enumerate(encoder.schema.fields) if field.kind != "number"]
    starts = np.cumsum([0, *(encoder.schema.fields[i].size for i in categories)])
    places = sample.codes[:, categories] + starts[:-1]
    rows = np.repeat(np.arange(len(sample)), len(categories))
    one_hot = sparse.csr_matrix((np.ones(places.size, np.float32), (rows, places.ravel())), (len(sample), starts[-1]))
    return sparse.hstack([one_hot, sparse.csr_matrix(2 * sample.quantiles)]).tocsr()
