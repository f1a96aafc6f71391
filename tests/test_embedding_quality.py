"""The checks of the embedding tell a good one from a collapsed one, and a fit keeps and draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_schema import feed
from test_training import rows

from encoder.models.rarity import ContextRarity
from encoder.models.record_encoder import RecordEncoder
from encoder.models.record_network import DEPTH, EMBEDDING, WIDTH, network_sizes
from encoder.models.resnet import TabularResNet
from encoder.training.embedding_quality import EmbeddingChecks, check_embedding
from encoder.training.replaced_fields import fit_identity


def checked(events: Sequence[dict[str, Any]], scale: float = 1.0) -> EmbeddingChecks:
    """Of an encoder of which only the identity path is fitted, times `scale`."""
    schema, features, weights = rows(events)
    net = TabularResNet(
        sizes=network_sizes(schema), numbers=features.quantiles.shape[1], width=WIDTH, depth=DEPTH, embedding=EMBEDDING
    )
    fit_identity(net, schema, features, weights)
    for buffer in (net.identity_codes, net.identity_numbers, net.identity_bias):
        buffer.mul_(scale)
    encoder = RecordEncoder(schema, net, ContextRarity.fit(schema, features, weights[:, None]), torch.device("cpu"))
    return check_embedding(encoder, features, seed=0)


def test_a_good_embedding_is_told_from_a_collapsed_one() -> None:
    good, collapsed = checked(feed()), checked(feed(), 0.0)
    assert good.silhouette > 0.0 == collapsed.silhouette
    assert good.agreement > 0.4 > collapsed.agreement
    assert 4 < good.effective_rank <= EMBEDDING and collapsed.effective_rank == pytest.approx(1.0)
    assert good.distinct > 0.9 and collapsed.distinct == 0.0
    assert good.stability > 0.5


def test_a_training_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    from streamer.cli.plots import plot_training

    training = {
        "loss": [2.0, 1.0],
        "sequences": None,
        "embedding": {"silhouette": -0.1, "effective_rank": 20.0},
    }
    for sequences in (None, {"loss": [1.0]}):
        plot_training(tmp_path / "training.png", training | {"sequences": sequences})
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_one_kind_of_event_can_be_checked() -> None:
    assert checked([{"a": i % 9, "activity_id": 1} for i in range(50)]).silhouette == 0.0
