"""Matplotlib figures: what every plot of the package shares."""

import numpy as np

from pi_jax.errors import InputError

INSIDE, BEYOND, NEUTRAL = "#1f5fa8", "#c0392b", "#555555"


def new_figure(width: float, height: float, panels: int):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))
