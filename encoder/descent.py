"""Gradient descent as both networks are trained: AdamW, one cycle of the learning rate, gradients clipped.

Promises the same steps for the same losses. Knows neither what is learned nor when it is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

LEARNING_RATE = 2e-3
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls as a cosine (Smith and Topin 2018)."""
REPORT_EVERY = 100


def descend(
    net: nn.Module, loss: Callable[[], Tensor], *, steps: int, weight_decay: float
) -> Iterator[tuple[int, float]]:
    """Make the steps, each for a new loss; yields, every hundred, how many are made and their mean loss since."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    running = 0.0
    for step in range(1, steps + 1):
        found = loss()
        optimizer.zero_grad(set_to_none=True)
        found.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += float(found.detach())
        if step % REPORT_EVERY == 0:
            yield step, running / REPORT_EVERY
            running = 0.0
