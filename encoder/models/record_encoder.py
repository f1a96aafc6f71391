"""The encoder at work: features in, vectors and surprises out, on one device.

Promises: an event's vector does not depend on the batch it came in (`encoder.models.fixed_shape_runner`), and is
rounded to fp16 before any use.
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

BEHAVIOUR_STEPS = 8
"""Into how many equal parts of training's values a quantity falls where only what was done counts."""
CHUNK = 256
"""Rows of a pass through the network."""


@dataclass(frozen=True)
class Encoded:
    """n events as the encoder sees them.

    vectors: float16 [n, 64]; odd_value and odd_for_actor: float32 [n], nats (`ContextRarity.summary`); odd_field: int32
    [n], the field (its place in the schema) whose value is the least expected for the event type; far_number: int32
    [n], the number that lies furthest out in training's range, -1 where the event has none.
    """

    vectors: NDArray[np.float16]
    max_surprise: NDArray[np.float32]
    max_surprise_for_actor: NDArray[np.float32]
    most_surprising_field: NDArray[np.int32]
    farthest_number: NDArray[np.int32]


@dataclass(frozen=True)
class Expectation:
    """What one field of one event was expected to be: -log p of what it was, and the likeliest other values with their
    p, normalised as the schema has them (`` for absent, a range for a number)."""

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
        self._passes = FixedShapeRunner(lambda codes, quantiles: self.net(codes, quantiles).half(), device, size=CHUNK)
        numbers = [i for i, field in enumerate(schema.fields) if field.kind == "number"]
        self._numbers = np.array(numbers, np.int32)
        bins = [len(schema.fields[i].edges) + 1 for i in numbers]
        self._coarse = np.array([max(1, round(count / BEHAVIOUR_STEPS)) for count in bins], np.int32)
        self._identities = np.array([i for i, field in enumerate(schema.fields) if field.kind == "identity"], np.int32)
        self._discrete = np.array(rarity.columns, np.int32)

    @classmethod
    def from_state(cls, schema: Schema, state: dict[str, Tensor], device: torch.device) -> RecordEncoder:
        """From what `state` gave. Raises EncoderError where the weights are those of another schema."""
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
        """Tensors that, with the schema, make the encoder again."""
        tensors = {f"net.{name}": value.cpu().contiguous() for name, value in self.net.state_dict().items()}
        return tensors | {f"rarity.{name}": getattr(self.rarity, name).cpu() for name in TENSORS}

    def encode(self, features: FeatureBatch) -> Encoded:
        """Vectors and surprises of n events. Meant for distinct rows: see `FeatureBatch.distinct`."""
        surprise = self.rarity(features)
        max_surprise, max_surprise_for_actor = (score.cpu().numpy() for score in self.rarity.summary(surprise))
        most_surprising_field = self._discrete[surprise.by_type.argmax(1).cpu().numpy()]
        return Encoded(
            self.vectors(features),
            max_surprise,
            max_surprise_for_actor,
            most_surprising_field,
            self._far_number(features),
        )

    def anonymised(self, features: FeatureBatch) -> NDArray[np.float16]:
        """float16 [n, 64]: what was done, without by whom and where: of identities only that they are there, of
        quantities roughly how large. Two machines that do the same have the same, so a sequence of them says something
        about a machine that training never saw."""
        codes = features.codes.copy()
        named = codes[:, self._identities]
        codes[:, self._identities] = np.where(named == MISSING, MISSING, UNKNOWN)
        bins = codes[:, self._numbers]
        codes[:, self._numbers] = np.where(bins < FIRST, bins, FIRST + (bins - FIRST) // self._coarse * self._coarse)
        coarse = np.round(features.quantiles * BEHAVIOUR_STEPS) / np.float32(BEHAVIOUR_STEPS)
        hidden = FeatureBatch(codes, coarse, features.actor)
        first, like = hidden.distinct()
        return self.vectors(hidden.take(first))[like]

    def _far_number(self, features: FeatureBatch) -> NDArray[np.int32]:
        if not len(self._numbers):
            return np.full(len(features), -1, np.int32)
        present = features.codes[:, self._numbers] != MISSING
        out = np.where(present, np.abs(features.quantiles - 0.5), -1.0)
        return np.where(present.any(1), self._numbers[out.argmax(1)], -1).astype(np.int32)

    def vectors(self, features: FeatureBatch) -> NDArray[np.float16]:
        """float16 [n, 64]: the record embeddings alone."""
        return self._passes(network_codes(features.codes, self.net.sizes), features.quantiles).numpy()

    def _tensors(self, features: FeatureBatch) -> tuple[Tensor, Tensor]:
        codes = torch.from_numpy(network_codes(features.codes, self.net.sizes)).to(self.device)
        return codes, torch.from_numpy(features.quantiles).to(self.device)

    def expectations(self, features: FeatureBatch, row: int, fields: NDArray[np.int32]) -> list[Expectation]:
        """For one event: hide each of the fields in turn and ask the network for it."""
        one = features.take(np.array([row], np.intp))
        codes, quantiles = (tensor.repeat(len(fields), 1) for tensor in self._tensors(one))
        place = {int(position): i for i, position in enumerate(self._numbers)}
        for i, position in enumerate(fields.tolist()):
            codes[i, position] = self.net.sizes[position]
            if position in place:
                quantiles[i, place[position]] = 0.5
        with torch.inference_mode():
            predicted = self.net.log_probabilities(self.net(codes, quantiles))
        found = []
        for i, position in enumerate(fields.tolist()):
            field, p = self.schema.fields[position], predicted[position][i].exp().cpu().numpy()
            code = int(network_codes(one.codes, self.net.sizes)[0, position])
            likely = [int(c) for c in np.argsort(-p)[:4] if p[c] >= 0.05 and c != code]
            named = ((self._name(field, c, len(p)), float(p[c])) for c in likely[:3])
            expected = tuple((name, share) for name, share in named if name is not None)
            surprise = float(-np.log(max(p[code], 1e-12)))
            if position in place and one.codes[0, position] >= FIRST:
                far = _tail(field, float(one.quantiles[0, place[position]]))
                if far > surprise:  # as the other fields would have it, but far from what is usual: so are they
                    surprise, expected = far, ((_middle(field), 0.9),)
            found.append(Expectation(position, surprise, expected))
        return found

    @staticmethod
    def _name(field: Field, code: int, codes: int) -> str | None:
        """A code in words: `` for absent, a range for a number, None where it stands for many values."""
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
    """The bin of a number as people say it: "0", "3 to 12", "over 4200", to three digits."""
    low = field.edges[place - 1] if place > 0 else None
    high = field.edges[place] if place < len(field.edges) else None
    inside = field.grid[
        0 if low is None else bisect_right(field.grid, low) : None if high is None else bisect_right(field.grid, high)
    ]
    if not inside:  # no value of the grid fell into it
        inside = tuple(x for x in (low, high) if x is not None)
    least, most = _rounded(inside[0]), _rounded(inside[-1])
    if least == most:
        return least
    return f"over {_rounded(low)}" if high is None and low is not None else f"{least} to {most}"


def _tail(field: Field, quantile: float) -> float:
    """-log of the share of training values that lie at least this far out, either way."""
    return float(-np.log(max(2 * min(quantile, 1 - quantile), 1 / max(len(field.grid), 1))))


def _middle(field: Field) -> str:
    """Where nine in ten values of training lie."""
    last = len(field.grid) - 1
    least, most = _rounded(field.grid[round(0.05 * last)]), _rounded(field.grid[round(0.95 * last)])
    return least if least == most else f"{least} to {most}"


def _rounded(logarithmic: float) -> str:
    """A number from the signed log scale: whole numbers up to a thousand as they are, all else to three digits."""
    x = float(np.sign(logarithmic) * np.expm1(abs(logarithmic)))
    whole = round(x)
    if abs(x - whole) < 1e-6 * max(1.0, abs(x)) and abs(whole) < 1000:
        return str(whole)
    return f"{float(f'{x:.3g}'):.12g}"
