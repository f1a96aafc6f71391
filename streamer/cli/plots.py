"""Plots: gradient magnitudes of plain and residual networks, and the course of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.models.presets import gradient_magnitudes
from encoder.training.trainer import REPORT_EVERY
from streamer.errors import ConfigurationError


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure that is written to a PNG at the end. Raises ConfigurationError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("drawing needs matplotlib: install ripcurrent with the extra `plots`") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, format="png", dpi=120)


def plot_gradients(
    path: Path, *, layers: int = 20, width: int = 128, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw both stacks to a PNG; returns the mean absolute gradient per layer of the plain and the residual one,
    float64 [layers] from first to last. Raises ConfigurationError where matplotlib is not installed."""
    plain = gradient_magnitudes(residual=False, layers=layers, width=width, seed=seed)
    residual = gradient_magnitudes(residual=True, layers=layers, width=width, seed=seed)
    with _figure(path, 7, 4) as figure:
        axes = figure.add_subplot()
        for magnitudes, label, marker in ((plain, "plain", "o"), (residual, "residual", "s")):
            axes.semilogy(np.arange(1, layers + 1), magnitudes, marker=marker, markersize=4, label=label)
        axes.set_xlabel("layer, first to last")
        axes.set_ylabel("mean |gradient| of the weights")
        axes.set_title(f"{layers} layers of width {width}, default initialisation, no normalisation")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend()
    return plain, residual


def plot_training(path: Path, training: Mapping[str, Any]) -> None:
    """Draw the loss curves of both networks and the checks of the embedding to a PNG; training: of a manifest. Raises
    ConfigurationError where matplotlib is not installed."""
    sequences = training["sequences"] or {"loss": []}
    curves = (
        ("encoder", "nats an attribute", {"training": training["loss"]}),
        ("sequences", "nats a record, and a broken window", {"training": sequences["loss"]}),
    )
    with _figure(path, 12, 4) as figure:
        left, middle, right = figure.subplots(1, 3)
        for axes, (title, unit, drawn) in zip((left, middle), curves, strict=True):
            for label, losses in drawn.items():
                axes.plot(REPORT_EVERY * np.arange(1, len(losses) + 1), losses, marker="o", markersize=3, label=label)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel(unit)
            axes.grid(visible=True, alpha=0.3)
            axes.legend()
        checks = {name.replace("_", " "): value for name, value in training["embedding"].items()}
        shown = {name: value / 64 if name == "effective rank" else value for name, value in checks.items()}
        bars = right.barh(list(shown), list(shown.values()))
        right.bar_label(bars, [f"{value:.3g}" for value in checks.values()], padding=3)
        right.set_xlim(min(0.0, *shown.values()), 1.2)
        right.invert_yaxis()
        right.set_title("embedding (effective rank: of 64)")
