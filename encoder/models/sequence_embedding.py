"""The sequence embedding: what an entity did in its window, as one vector.

The square roots of how often each code stands in the window, projected to few dimensions with random signs (Achlioptas
2003). The square root keeps what is frequent from hiding the rest (Hellinger distance of compositions). Promises that
an embedding depends on the codes of its window alone, in every process and for any batches; so it needs no state of its
own, and redelivery, a crash or a rebuild of the window gives the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from encoder.features.vectorizer import row_hash

DIM = 64
"""Length of an embedding."""
_CHUNK = 512


def sequence_embeddings(codes: NDArray[np.int16], vocabulary: int) -> NDArray[np.float16]:
    """float16 [m, DIM], of length one; zero for an empty window. codes: int16 [m, W], below `vocabulary`, -1 in unused
    slots."""
    embeddings = np.zeros((len(codes), DIM), np.float16)
    signs = _signs(vocabulary)
    for start in range(0, len(codes), _CHUNK):
        part = codes[start : start + _CHUNK]
        count = (part[:, :, None] == part[:, None, :]).sum(2, dtype=np.uint8)
        # Each of k equal codes adds a k-th of the root of k.
        weight = torch.from_numpy(np.where(part >= 0, 1 / np.sqrt(count, dtype=np.float32), np.float32(0)))
        at = torch.from_numpy(np.maximum(part, 0).astype(np.int64))
        summed = functional.embedding_bag(at, signs, per_sample_weights=weight, mode="sum").numpy()
        length = np.sqrt(np.square(summed).sum(1, keepdims=True))
        embeddings[start : start + len(part)] = summed / np.maximum(length, 1e-9)
    return embeddings


@lru_cache(maxsize=4)
def _signs(vocabulary: int) -> torch.Tensor:
    """float32 [vocabulary, DIM]: +1 and -1, by the bits of a hash of each code."""
    bits = np.unpackbits(row_hash(np.arange(vocabulary, dtype=np.int32)[:, None]).view(np.uint8).reshape(-1, 8), axis=1)
    return torch.from_numpy(bits[:, :DIM].astype(np.float32) * 2 - 1)
