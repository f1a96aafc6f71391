"""The record encoder: features to vectors, surprises, and how surely each field was replaced, on one device.

Promises that an event's vector and logits do not depend on its batch (`encoder.models.fixed_shape_runner`), and are
rounded to fp16 before any use. It knows no windows and no baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from encoder.features.schema import FIRST, MISSING, UNKNOWN, Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models.contextual_numbers import ContextualNumbers
from encoder.models.fixed_shape_runner import FixedShapeRunner, device_memory
from encoder.models.rarity import TENSORS, ContextRarity
from encoder.models.record_network import DEPTH, EMBEDDING, WIDTH, network_codes, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.ocsf.events import EncoderError

QUANTITY_STEPS = 8
"""Equal parts of the training values of a quantity that anonymised vectors distinguish."""
CHUNK = 256
"""Rows in one call of the network."""
MOST_SURE = 3
"""The fields of an event that the network finds the least at home; the others would add noise."""


@dataclass(frozen=True)
class Encoded:
    """n encoded events.

    vectors: float16 [n, 64]; max_surprise, max_surprise_for_actor: float32 [n], nats (`ContextRarity.summary`);
    most_surprising_field: int32 [n], the field (its place in the schema) whose value is the most surprising for the
    event type; replaced: float32 [n], nats, -log of the probability that none of the MOST_SURE fields was replaced,
    taken as independent; most_replaced_field: int32 [n], the field that was most surely replaced (of
    events that are not judged: the most surprising one); number_surprise: float32 [n], nats, and
    most_surprising_number: int32 [n], of the numbers given what they are of (`ContextualNumbers.summary`).
    """

    vectors: NDArray[np.float16]
    max_surprise: NDArray[np.float32]
    max_surprise_for_actor: NDArray[np.float32]
    most_surprising_field: NDArray[np.int32]
    replaced: NDArray[np.float32]
    most_replaced_field: NDArray[np.int32]
    number_surprise: NDArray[np.float32]
    most_surprising_number: NDArray[np.int32]


class RecordEncoder:
    """Schema, vectorizer, rarity counts, numbers in context and network as one, on `device`."""

    def __init__(
        self,
        schema: Schema,
        net: TabularResNet,
        rarity: ContextRarity,
        device: torch.device,
        numbers: ContextualNumbers | None = None,
    ) -> None:
        self.schema = schema
        self.numbers = numbers or ContextualNumbers.none(schema)
        self.device = device
        self.vectorize = Vectorizer(schema)
        with device_memory(device):
            self.net = net.to(device).eval().requires_grad_(False)
            self.rarity = rarity.to(device)
        self._embed = FixedShapeRunner(
            lambda codes, quantiles: self.net.embed(codes, quantiles).half(), device, size=CHUNK
        )
        self._logits = FixedShapeRunner(lambda codes, quantiles: self.net(codes, quantiles).half(), device, size=CHUNK)
        self._numbers = self.numbers.fields
        bins = [len(schema.fields[i].edges) + 1 for i in self._numbers.tolist()]
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
            arrays = {name: state[f"numbers.{name}"].numpy() for name in ContextualNumbers.ARRAYS}
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise EncoderError(f"the weights do not fit the feature schema ({reason}); fit the bundle again") from error
        return cls(schema, net, rarity, device, ContextualNumbers(schema, **arrays))

    def state(self) -> dict[str, Tensor]:
        """Tensors from which, with the schema, `from_state` makes the same encoder."""
        tensors = {f"net.{name}": value.cpu().contiguous() for name, value in self.net.state_dict().items()}
        tensors |= {f"rarity.{name}": getattr(self.rarity, name).cpu() for name in TENSORS}
        arrays = {f"numbers.{name}": getattr(self.numbers, name) for name in ContextualNumbers.ARRAYS}
        return tensors | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def encode(self, features: FeatureBatch, judged: NDArray[np.bool_] | None = None) -> Encoded:
        """All that is known of n events by themselves; meant for distinct rows (`FeatureBatch.distinct`). judged: bool
        [n], the events that the network judges (None: all); of the others nothing is replaced."""
        surprise = self.rarity(features)
        max_surprise, max_surprise_for_actor = (score.cpu().numpy() for score in self.rarity.summary(surprise))
        most_surprising_field = self._discrete[surprise.by_type.argmax(1).cpu().numpy()]
        replaced, most_replaced_field = np.zeros(len(features), np.float32), most_surprising_field.copy()
        rows = np.arange(len(features)) if judged is None else np.flatnonzero(judged)
        if len(rows):
            logits = self._logits(*self._read(features.take(rows))).float()
            surest = logits.topk(min(MOST_SURE, logits.shape[1])).values
            replaced[rows] = functional.softplus(surest).sum(1).numpy()
            most_replaced_field[rows] = logits.argmax(1).numpy()
        in_context = self.numbers.judge(features)
        number_surprise, most_surprising_number = self.numbers.summary(in_context, len(features))
        return Encoded(
            self.vectors(features),
            max_surprise,
            max_surprise_for_actor,
            most_surprising_field,
            replaced,
            most_replaced_field,
            number_surprise.astype(np.float32),
            most_surprising_number,
        )

    def unknown_surprise(self) -> NDArray[np.float32]:
        """float32 [event types, discrete fields], nats: the surprise of a value that training did not have, given the
        code of the type."""
        types, width = self.schema.fields[0].size, len(self.schema.fields)
        codes = np.full((types, width), UNKNOWN, np.int32)
        codes[:, 0] = np.arange(types)
        quantiles = np.full((types, len(self._numbers)), 0.5, np.float32)
        unknown = FeatureBatch(codes, quantiles, np.zeros(types, np.int64), np.full_like(quantiles, np.nan))
        surprise: NDArray[np.float32] = self.rarity(unknown).by_type.cpu().numpy()
        return surprise

    def surprise_without(self, features: FeatureBatch, fields: Sequence[int]) -> tuple[NDArray[np.float32], ...]:
        """`Encoded.max_surprise` and `max_surprise_for_actor` of n events, had training known their values of some
        discrete fields (places among `rarity.columns`). An actor with a new name has no history: where the actor is one
        of them, no value counts as more surprising for the actor than for the event type."""
        surprise = self.rarity(features)
        acting = any(self.rarity.names[place] in self.schema.actors for place in fields)
        known = torch.ones(len(self._discrete), device=surprise.by_type.device)
        known[list(fields)] = 0.0
        by_type = surprise.by_type * known
        by_actor = torch.minimum(surprise.by_actor, surprise.by_type) if acting else surprise.by_actor
        by_actor = by_actor * known
        scores = self.rarity.summary(replace(surprise, by_type=by_type, by_actor=by_actor))
        return tuple(score.cpu().numpy() for score in scores)

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

    def vectors(self, features: FeatureBatch) -> NDArray[np.float16]:
        """float16 [n, 64]: the record embeddings."""
        return self._embed(*self._read(features)).numpy()

    def replaced_fields(self, features: FeatureBatch) -> NDArray[np.float32]:
        """float32 [n, fields], nats: -log of the probability that the value of a field belongs to the rest of the
        event; 0 for fields that the network does not judge."""
        return functional.softplus(self._logits(*self._read(features)).float()).numpy()

    def _read(self, features: FeatureBatch) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        return network_codes(features.codes, self.net.sizes), features.quantiles
