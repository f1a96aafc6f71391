"""The sizes of the record network, and the codes as it reads them: shared by training and serving."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from encoder.features.schema import FIRST, Schema

EMBEDDING = 64
WIDTH = 128
DEPTH = 3
HEAD_VALUES = 128
"""Values of a field that the network tells apart; the rarer ones share a code (rarity counts them one by one)."""


def network_sizes(schema: Schema) -> list[int]:
    """How many codes of each field the network tells apart."""
    return [min(field.size, FIRST + HEAD_VALUES + 1) for field in schema.fields]


def network_codes(codes: NDArray[np.int32], sizes: list[int]) -> NDArray[np.int32]:
    """Codes as the network reads them, int32 [n, fields]: the rare values of a field share its last code."""
    return np.minimum(codes, np.array(sizes, np.int32) - 1)
