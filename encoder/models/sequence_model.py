"""The sequence model: how surprising an entity's newest record is after its window, and how surprising it is that none
follows.

A temporal residual network (dilated causal convolutions, van den Oord et al. 2016, arXiv:1609.03499, in pre-norm
residual blocks) reads record embeddings and time gaps; n-gram counts of codes (`encoder.models.codebook`) complement
it. Promises that a score depends on its window alone. It knows the kind of an entity, not its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from encoder.models.antecedents import Antecedents, known, recent
from encoder.models.codebook import ORDER, Codebook
from encoder.models.fixed_shape_runner import FixedShapeRunner
from encoder.models.ngram_counts import NgramCounts
from encoder.models.temporal_convolution import WIDTH, SequenceNet, gap_features, used_slots
from encoder.ocsf.entities import KINDS
from encoder.ocsf.events import EncoderError

CHUNK = 512
"""Windows in one call of the network."""
FEW = 16
"""Windows in one call for small inputs. The shape is fixed, too, so that a window's score does not depend on others."""
STEPS_OF = 64
"""Windows in one call of the network for the surprise of every step, which few windows are asked for."""
LIKELY = 8
"""Most likely codes of the network that are considered as expected."""

_LEAST = 1e-12


@dataclass(frozen=True)
class SequenceScores:
    """Scores of m windows, in nats.

    surprise: float32 [m], -log p(newest record | earlier ones); ending: float32 [m], -log p(no record follows within
    the timeout of the kind), 0 for kinds without a timeout, meant for entities that are inactive since; missing:
    float32 [m], -log p(the usual earlier record is missing), 0 where it is not.
    """

    surprise: NDArray[np.float32]
    ending: NDArray[np.float32]
    missing: NDArray[np.float32]


class SequenceModel:
    """Scores windows.

    timeouts: by kind of entity, ms without a record after which `ending` counts; routines of other kinds do not end.
    """

    def __init__(
        self,
        net: SequenceNet,
        codebook: Codebook,
        counts: NgramCounts,
        antecedents: Antecedents,
        *,
        scale: float,
        novelty: Mapping[str, float],
        timeouts: Mapping[str, int],
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.codebook, self.counts, self.antecedents = codebook, counts, antecedents
        self.scale, self.novelty, self.timeouts = scale, dict(novelty), dict(timeouts)
        self._runner = FixedShapeRunner(self._probabilities, codebook.centres.device, size=CHUNK)
        self._small_runner = FixedShapeRunner(self._probabilities, codebook.centres.device, size=FEW)
        self._step_runner = FixedShapeRunner(self._step_losses, codebook.centres.device, size=STEPS_OF)
        self._novelty = np.array([self.novelty.get(kind, 1.0) for kind in KINDS])

    @property
    def timeout_ms(self) -> NDArray[np.int64]:
        """int64 [len(KINDS)]: after how long without an event an entity of that kind has ended, 0 for kinds that do not
        end."""
        return np.array([self.timeouts.get(kind, 0) for kind in KINDS], np.int64)

    @property
    def device(self) -> torch.device:
        return self.codebook.centres.device

    def _probabilities(self, x: Tensor, gaps: Tensor, used: Tensor, kind: Tensor) -> Tensor:
        """float32 [m, 2, codes + 1]: the probabilities of the newest record, and of the one that follows."""
        p: Tensor = self.net.next(self.net.last_slots(x, gaps, used, kind)).softmax(dim=-1)
        return p

    def _step_losses(self, x: Tensor, gaps: Tensor, used: Tensor, kind: Tensor, codes: Tensor) -> Tensor:
        """float32 [m, W]: -log p of the code in each slot after the slots before; 0 for the first slot."""
        before = self.net.next(self.net.all_slots(x, gaps, used, kind)[:, :-1]).log_softmax(dim=-1)
        losses = -before.gather(2, codes[:, 1:, None])[:, :, 0]
        return functional.pad(losses.clamp(max=-math.log(_LEAST)), (1, 0))

    def __call__(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        length: NDArray[np.int32],
        kind: NDArray[np.int8],
        *,
        few: bool = False,
    ) -> SequenceScores:
        """vectors: float16 [m, W, d], times: int64 [m, W], length: int32 [m], right-aligned as `state.windows.Windows`
        has them; kind: int8 [m], index into `entities.KINDS`; few: m is small (cheaper; equal to 1e-5)."""
        p, codes = self._evaluate(vectors, times, length, kind, self._small_runner if few else self._runner)
        m, end = len(length), self.codebook.other + 1
        p_next = np.take_along_axis(p[:, 0], codes[:, -1:], axis=1)[:, 0].astype(np.float64)
        p_end = p[:, 1, end].astype(np.float64)
        kinds = kind.astype(np.int64)
        latest = codes[:, ::-1]
        by_count = self.counts.probability(kinds, latest[:, 1:], codes[:, -1])
        ends = self.timeout_ms[kinds] > 0
        end_count = self.counts.probability(kinds[ends], latest[ends, :-1], np.full(int(ends.sum()), end))
        surprise = -0.5 * (np.log(np.maximum(p_next, _LEAST)) + np.log(by_count))
        ending = np.zeros(m)
        ending[ends] = -0.5 * (np.log(np.maximum(p_end[ends], _LEAST)) + np.log(end_count))
        new = codes[:, -1] == self.codebook.other
        surprise[new] = -np.log(self._novelty[kinds[new]])
        missing, _ = self._missing(vectors, times, used_slots(length, WIDTH), kinds, codes[:, -1])
        return SequenceScores(surprise.astype(np.float32), ending.astype(np.float32), missing)

    def codes(self, vectors: NDArray[np.float16], length: NDArray[np.int32]) -> NDArray[np.int16]:
        """int16 [m, W]: the codes of the members of m windows, -1 in unused slots. Arguments as in `__call__`."""
        used = used_slots(length, vectors.shape[1])
        codes = np.full(used.shape, -1, np.int16)
        codes[used] = self.codebook(vectors[used])
        return codes

    def total_surprise(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        kind: NDArray[np.int8],
        codes: NDArray[np.int16],
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The surprise of the members after those before them in the window, by network and counts, added up over the
        window: float64 [m], nats; and int64 [m], of how many members: in a full window, the first ones have lost what
        was before them. codes: int16 [m, W], of `codes`; others as in `__call__`."""
        m, width = codes.shape
        used = codes >= 0
        counted = used & ((np.arange(width) >= ORDER) | ~used[:, :1])
        counted[:, 0] = False
        x = vectors.astype(np.float32) * np.float32(self.scale)
        wanted = np.maximum(codes, 0).astype(np.int64)
        by_net = self._step_runner(x, gap_features(times, used), used, kind.astype(np.int64), wanted).numpy()
        row, slot = np.nonzero(counted)
        before = slot[:, None] - np.arange(1, ORDER + 1)
        runs = np.where(before >= 0, codes[row[:, None], np.maximum(before, 0)], -1).astype(np.int64)
        kinds, code = kind[row].astype(np.int64), wanted[row, slot]
        surprise = np.zeros((m, width), np.float32)
        surprise[row, slot] = 0.5 * (by_net[row, slot] - np.log(self.counts.probability(kinds, runs, code)))
        new = counted & (codes == self.codebook.other)
        surprise[new] = -np.log(self._novelty[kind[np.nonzero(new)[0]]])
        return surprise.sum(1, dtype=np.float64), counted.sum(1)

    def _missing(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        used: NDArray[np.bool_],
        kinds: NDArray[np.int64],
        code: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As `Antecedents.missing`, for any windows: 0 and -1 also where nothing is known."""
        nats, which = np.zeros(len(kinds), np.float32), np.full(len(kinds), -1, np.int64)
        rows = np.flatnonzero(self.antecedents.has_usual(kinds, code))
        rows = rows[known(times[rows], used[rows])]
        near = recent(times[rows], used[rows])
        before = np.full(near.shape, -1, np.int64)
        before[near] = self.codebook(vectors[rows][near])
        nats[rows], which[rows] = self.antecedents.missing(kinds[rows], code[rows], before)
        return nats, which

    def absent(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        length: NDArray[np.int32],
        kind: NDArray[np.int8],
    ) -> list[tuple[tuple[int, float], ...]]:
        """For a few windows, as in `__call__`: the code that usually comes shortly before the newest record and is
        missing, with the share of cases in which it comes; empty where none is missing."""
        used, newest = used_slots(length, WIDTH), self.codebook(vectors[:, -1])
        nats, which = self._missing(vectors, times, used, kind.astype(np.int64), newest)
        return [
            ((code, 1 - math.exp(-seldom)),) if code >= 0 else ()
            for code, seldom in zip(which.tolist(), nats.tolist(), strict=True)
        ]

    def expected(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        length: NDArray[np.int32],
        kind: NDArray[np.int8],
        after: NDArray[np.bool_],
    ) -> list[tuple[tuple[int, float], ...]]:
        """For a few windows, as in `__call__`: the most likely codes in place of the newest record, or after it (after:
        bool [m]), with their probabilities; without OTHER and the end."""
        p, codes = self._evaluate(vectors, times, length, kind, self._small_runner)
        results = []
        for i, late in enumerate(after.astype(np.int64).tolist()):
            runs = codes[i, ::-1][1 - late :][:ORDER]
            likely = np.argsort(-p[i, late, : self.codebook.other], kind="stable")[:LIKELY]
            each = np.full(len(likely), int(kind[i]), np.int64)
            by_count = self.counts.probability(each, np.repeat(runs[None, :], len(likely), axis=0), likely)
            both = np.sqrt(p[i, late, likely] * by_count)
            order = np.argsort(-both, kind="stable")
            results.append(tuple((int(likely[k]), float(both[k])) for k in order))
        return results

    def _evaluate(
        self,
        vectors: NDArray[np.float16],
        times: NDArray[np.int64],
        length: NDArray[np.int32],
        kind: NDArray[np.int8],
        runner: FixedShapeRunner,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The probabilities of m windows (`_probabilities`), float32 [m, 2, codes + 1], and the codes of their last
        ORDER + 1 slots, int64 [m, ORDER + 1], -1 where unused."""
        m = len(length)
        used = used_slots(length, WIDTH)
        if vectors.shape[:2] != (m, WIDTH):
            raise ValueError(f"windows of shape {vectors.shape}: [m, {WIDTH}, d] with m = {m} was expected")
        latest = self.codebook(vectors[:, -ORDER - 1 :].reshape(m * (ORDER + 1), -1)).reshape(m, -1)
        codes = np.where(used[:, -ORDER - 1 :], latest, -1)
        x = vectors.astype(np.float32) * np.float32(self.scale)
        p: NDArray[np.float32] = runner(x, gap_features(times, used), used, kind.astype(np.int64)).numpy()
        return p, codes

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which `from_state` makes the same model."""
        tensors = {f"net.{name}": tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        tensors["codebook.centres"], tensors["codebook.reach"] = self.codebook.centres, self.codebook.reach
        tensors["counts.keys"] = torch.from_numpy(self.counts.keys)
        tensors["counts.counts"] = torch.from_numpy(self.counts.counts)
        for name in ("keys", "before", "nats"):
            tensors[f"predecessors.{name}"] = torch.from_numpy(getattr(self.antecedents, name))
        config = {
            "dim": self.codebook.centres.shape[1],
            "outcomes": self.counts.vocabulary,
            "kinds": list(KINDS),
            "scale": self.scale,
            "novelty": self.novelty,
            "silence": self.timeouts,
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
            net = SequenceNet(dim=int(config["dim"]), vocabulary=int(config["outcomes"]), kinds=len(KINDS))
            net.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("net.")})
            codebook = Codebook(tensors["codebook.centres"].to(device), tensors["codebook.reach"].to(device))
            counts = NgramCounts(
                tensors["counts.keys"].cpu().numpy(), tensors["counts.counts"].cpu().numpy(), int(config["outcomes"])
            )
            keys, before, nats = (tensors[f"predecessors.{name}"].cpu().numpy() for name in ("keys", "before", "nats"))
            antecedents = Antecedents(keys, before, nats, codebook.other + 1)
            scale = float(config["scale"])
            novelty = {str(kind): float(share) for kind, share in config["novelty"].items()}
            timeouts = {str(kind): int(ms) for kind, ms in config["silence"].items()}
        except (KeyError, TypeError, RuntimeError) as error:
            raise EncoderError(f"not the state of a sequence model ({error}); fit the bundle again") from error
        return cls(net.to(device), codebook, counts, antecedents, scale=scale, novelty=novelty, timeouts=timeouts)
