"""Why the encoder is residual, as a picture: the gradient of each layer in a plain and in a residual stack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from encoder.presets import gradient_magnitudes
from streamer.errors import ConfigurationError


def plot_gradients(
    path: Path, *, layers: int = 20, width: int = 128, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw both stacks to a PNG; returns the mean absolute gradient per layer of the plain and the residual one,
    float64 [layers] from first to last. Raises ConfigurationError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("drawing needs matplotlib: install ripcurrent with the extra `plots`") from error
    plain = gradient_magnitudes(residual=False, layers=layers, width=width, seed=seed)
    residual = gradient_magnitudes(residual=True, layers=layers, width=width, seed=seed)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for magnitudes, label, marker in ((plain, "plain", "o"), (residual, "residual", "s")):
        axes.semilogy(np.arange(1, layers + 1), magnitudes, marker=marker, markersize=4, label=label)
    axes.set_xlabel("layer, first to last")
    axes.set_ylabel("mean |gradient| of the weights")
    axes.set_title(f"{layers} layers of width {width}, default initialisation, no normalisation")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
    return plain, residual
