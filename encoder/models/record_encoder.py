"""The record encoder: features to vectors and surprises, on one device.

Promises that an event's vector does not depend on its batch (`encoder.models.fixed_shape_runner`), and is rounded to
fp16 before any use. It knows no windows and no baseline.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoder.features.schema import FIRST, MISSING, UNKNOWN, Field, Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models.fixed_shape_runner import FixedShapeRunner, device_memory
from encoder.models.rarity import TENSORS, ContextRarity
from encoder.models.record_network import DEPTH, EMBEDDING, WIDTH, network_codes, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.ocsf.events import EncoderError

QUANTITY_STEPS = 8
"""Equal parts of the training values of a quantity that anonymised vectors distinguish."""
CHUNK = 256
"""Rows in one call of the network."""


@dataclass(frozen=True)
class Encoded:
    """n encoded events.

    vectors: float16 [n, 64]; max_surprise, max_surprise_for_actor: float32 [n], nats (`ContextRarity.summary`);
    most_surprising_field: int32 [n], the field (its place in the schema) whose value is the most surprising for the
    event type; farthest_number: int32 [n], the number field farthest from the median of training, -1 where the event
    has no number.
    """

    vectors: NDArray[np.float16]
    max_surprise: NDArray[np.float32]
    max_surprise_for_actor: NDArray[np.float32]
    most_surprising_field: NDArray[np.int32]
    farthest_number: NDArray[np.int32]


@dataclass(frozen=True)
class Expectation:
    """What one field of one event was expected to be. surprise: -log p of its value; expected: the most likely other
    values with their p, normalised as in the schema ("" for absent, a range for a number)."""

    field: int
    surprise: float
    expected: tuple[tuple[str, float], ...]


class RecordEncoder:
    """Schema, vectorizer, rarity counts and network as one, on `device`."""

    def __init__(self, schema: Schema, net: TabularResNet, rarity: ContextRarity, device: torch.device) -> None:
        self.schema = schema
        self.device = device
        self.vectorize = Vectorizer(schema)
        with device_memory(device):
            self.net = net.to(device).eval().requires_grad_(False)
            self.rarity = rarity.to(device)
        self._runner = FixedShapeRunner(lambda codes, quantiles: self.net(codes, quantiles).half(), device, size=CHUNK)
        numbers = [i for i, field in enumerate(schema.fields) if field.kind == "number"]
        self._numbers = np.array(numbers, np.int32)
        bins = [len(schema.fields[i].edges) + 1 for i in numbers]
        self._coarse = np.array([max(1, round(count / QUANTITY_STEPS)) for count in bins], np.int32)
        self._identities = np.array([i for i, field in enumerate(schema.fields) if field.kind == "identity"], np.int32)
        self._discrete = np.array(rarity.columns, np.int32)

    @classmethod
    def from_state(cls, schema: Schema, state: dict[str, Tensor], device: torch.device) -> RecordEncoder:
        """The encoder of a `state`. Raises EncoderError where the weights are of another schema."""
        sizes = network_sizes(schema)
        numbers = sum(field.kind == "number" for field in schema.fields)
        net = TabularResNet(sizes=sizes, numbers=numbers, width=WIDTH, depth=DEPTH, embedding=EMBEDDING)
        weights = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
        try:
            net.load_state_dict(weights)
            rarity = ContextRarity(schema, *(state[f"rarity.{name}"] for name in TENSORS))
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise EncoderError(f"the weights do not fit the feature schema ({reason}); fit the bundle again") from error
        return cls(schema, net, rarity, device)

    def state(self) -> dict[str, Tensor]:
        """Tensors from which, with the schema, `from_state` makes the same encoder."""
        tensors = {f"net.{name}": value.cpu().contiguous() for name, value in self.net.state_dict().items()}
        return tensors | {f"rarity.{name}": getattr(self.rarity, name).cpu() for name in TENSORS}

    def encode(self, features: FeatureBatch) -> Encoded:
        """Vectors and surprises of n events; meant for distinct rows (`FeatureBatch.distinct`)."""
        surprise = self.rarity(features)
        max_surprise, max_surprise_for_actor = (score.cpu().numpy() for score in self.rarity.summary(surprise))
        most_surprising_field = self._discrete[surprise.by_type.argmax(1).cpu().numpy()]
        return Encoded(
            self.vectors(features),
            max_surprise,
            max_surprise_for_actor,
            most_surprising_field,
            self._farthest_number(features),
        )

    def anonymised(self, features: FeatureBatch) -> NDArray[np.float16]:
        """float16 [n, 64]: vectors without identities: of names only their presence, of quantities only a coarse value.
        Two machines that do the same get the same vectors, so the sequence model also applies to machines that training
        did not have."""
        codes = features.codes.copy()
        named = codes[:, self._identities]
        codes[:, self._identities] = np.where(named == MISSING, MISSING, UNKNOWN)
        bins = codes[:, self._numbers]
        codes[:, self._numbers] = np.where(bins < FIRST, bins, FIRST + (bins - FIRST) // self._coarse * self._coarse)
        coarse = np.round(features.quantiles * QUANTITY_STEPS) / np.float32(QUANTITY_STEPS)
        hidden = FeatureBatch(codes, coarse, features.actor, np.full_like(features.numbers, np.nan))
        first, like = hidden.distinct()
        return self.vectors(hidden.take(first))[like]

    def _farthest_number(self, features: FeatureBatch) -> NDArray[np.int32]:
        if not len(self._numbers):
            return np.full(len(features), -1, np.int32)
        present = features.codes[:, self._numbers] != MISSING
        out = np.where(present, np.abs(features.quantiles - 0.5), -1.0)
        return np.where(present.any(1), self._numbers[out.argmax(1)], -1).astype(np.int32)

    def vectors(self, features: FeatureBatch) -> NDArray[np.float16]:
        """float16 [n, 64]: the record embeddings."""
        return self._runner(network_codes(features.codes, self.net.sizes), features.quantiles).numpy()

    def _tensors(self, features: FeatureBatch) -> tuple[Tensor, Tensor]:
        codes = torch.from_numpy(network_codes(features.codes, self.net.sizes)).to(self.device)
        return codes, torch.from_numpy(features.quantiles).to(self.device)

    def expectations(self, features: FeatureBatch, row: int, fields: NDArray[np.int32]) -> list[Expectation]:
        """For one event: hide each of `fields` (int32 [f]) in turn and let the network predict it."""
        one = features.take(np.array([row], np.intp))
        codes, quantiles = (tensor.repeat(len(fields), 1) for tensor in self._tensors(one))
        place = {int(position): i for i, position in enumerate(self._numbers)}
        for i, position in enumerate(fields.tolist()):
            codes[i, position] = self.net.sizes[position]
            if position in place:
                quantiles[i, place[position]] = 0.5
        with torch.inference_mode():
            predicted = self.net.log_probabilities(self.net(codes, quantiles))
        expectations = []
        for i, position in enumerate(fields.tolist()):
            field, p = self.schema.fields[position], predicted[position][i].exp().cpu().numpy()
            code = int(network_codes(one.codes, self.net.sizes)[0, position])
            likely = [int(c) for c in np.argsort(-p)[:4] if p[c] >= 0.05 and c != code]
            named = ((self._name(field, c, len(p)), float(p[c])) for c in likely[:3])
            expected = tuple((name, share) for name, share in named if name is not None)
            surprise = float(-np.log(max(p[code], 1e-12)))
            if position in place and one.codes[0, position] >= FIRST:
                far = _tail(field, float(one.quantiles[0, place[position]]))
                if far > surprise:  # the other fields explain it, but it is far from usual, as they are
                    surprise, expected = far, ((_middle(field), 0.9),)
            expectations.append(Expectation(position, surprise, expected))
        return expectations

    @staticmethod
    def _name(field: Field, code: int, codes: int) -> str | None:
        """A code as text: "" for absent, a range for a number, None where it stands for many values."""
        if code == MISSING:
            return ""
        if code == UNKNOWN or (field.kind != "number" and codes < field.size and code == codes - 1):
            return None
        if field.kind == "presence":
            return "present"
        if field.kind == "number":
            return _range(field, code - FIRST)
        return field.values[code - FIRST]


def _range(field: Field, place: int) -> str:
    """The bin of a number as text: "0", "3 to 12", "over 4200", to three digits."""
    low = field.edges[place - 1] if place > 0 else None
    high = field.edges[place] if place < len(field.edges) else None
    inside = field.grid[
        0 if low is None else bisect_right(field.grid, low) : None if high is None else bisect_right(field.grid, high)
    ]
    if not inside:  # the bin has no value of the grid
        inside = tuple(x for x in (low, high) if x is not None)
    least, most = _rounded(inside[0]), _rounded(inside[-1])
    if least == most:
        return least
    return f"over {_rounded(low)}" if high is None and low is not None else f"{least} to {most}"


def _tail(field: Field, quantile: float) -> float:
    """-log of the share of training values at least this far from the median, on both sides."""
    return float(-np.log(max(2 * min(quantile, 1 - quantile), 1 / max(len(field.grid), 1))))


def _middle(field: Field) -> str:
    """The range of nine in ten training values."""
    last = len(field.grid) - 1
    least, most = _rounded(field.grid[round(0.05 * last)]), _rounded(field.grid[round(0.95 * last)])
    return least if least == most else f"{least} to {most}"


def _rounded(logarithmic: float) -> str:
    """A number from the signed log scale as text: whole numbers below 1000 exactly, others to three digits."""
    x = float(np.sign(logarithmic) * np.expm1(abs(logarithmic)))
    whole = round(x)
    if abs(x - whole) < 1e-6 * max(1.0, abs(x)) and abs(whole) < 1000:
        return str(whole)
    return f"{float(f'{x:.3g}'):.12g}"
