"""Creates the figures of a report as SVG text, to embed in a page."""

import collections
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pi_jax.errors import InputError

try:
    import matplotlib
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ModuleNotFoundError:
    raise InputError("the figures of a report need matplotlib: pip install 'pi_jax[eval]'") from None

matplotlib.use("Agg")
_SETTINGS = {
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "pi_jax",  # makes the output reproducible
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "legend.frameon": False,
}
_STYLES = ("-", "--", "-.", ":")

Line = tuple[str, str, Sequence[float], Sequence[float]]
"""Label of the model, label of the line among those of the model, x values, y values."""


def tokens(n: float) -> str:
    """Formats a number of tokens: 8192 as '8k', 200 as '200'."""
    n = int(n)
    return f"{n / 1024:g}k" if n >= 1024 and n % 256 == 0 else f"{n:,}"


def lines(
    data: Sequence[Line], x_label: str, y_label: str, *, log_y: bool = False, marks: Sequence[tuple[str, float]] = ()
) -> str:
    """Plots lines over tokens or steps. Each model has a color, and each of its lines a style.

    Args:
      data: lines to plot. If a line has one y fewer than x, it is plotted as steps between the x values.
      x_label: quantity and unit of x.
      y_label: quantity and unit of y.
      log_y: whether y is logarithmic.
      marks: name and x of each vertical line.
    """
    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(figsize=(9.6, 4.4), layout="constrained")
        axes.set_axisbelow(True)
        models = list(dict.fromkeys(model for model, *_ in data))
        seen = collections.Counter()
        for model, which, x, y in data:
            style = {"color": f"C{models.index(model) % 10}", "linestyle": _STYLES[seen[model] % len(_STYLES)]}
            style["label"] = f"{model}, {which}" if which else model
            seen[model] += 1
            if len(y) < len(x):  # values between edges
                axes.stairs(np.array(y, float), x, baseline=None, linewidth=1.8, **style)
            else:
                axes.plot(x, y, marker="o", markersize=4, linewidth=1.8, **style)
        for name, x in marks:
            axes.axvline(x, color="#6b7580", linewidth=1, linestyle=":")
            axes.annotate(
                name,
                (x, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2),
                textcoords="offset points",
                va="top",
                fontsize=9,
                color="#4a545e",
            )
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if _octaves(axes) < 4 else (1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if "%" in y_label:
            axes.set_ylim(-4, 104)
        _token_axis(axes, x_label)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=10)
        return _svg(figure)


def _octaves(axes: Any) -> float:
    low, high = axes.get_ylim()
    return float(np.log2(high / low))


def _token_axis(axes: Any, label: str) -> None:
    if "token" not in label:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    low, high = axes.get_xlim()
    step = 2 ** max(0, int(np.ceil(np.log2(max(high - max(low, 0), 1) / 9))))
    axes.set_xticks([x for x in range(0, int(high) + 1, step) if x >= low], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tokens(v)))


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Plots success rates from 0 to 1 by depth (rows) and length (columns), with the percentage in each cell."""
    with plt.rc_context({**_SETTINGS, "axes.grid": False}):
        grid = np.array(values, float)
        size = (min(11, 2.6 + 0.72 * len(columns)), 1.7 + 0.42 * len(rows))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                if np.isfinite(value):
                    color = "white" if abs(value - 0.5) > 0.38 else "black"  # the ends of the scale are dark
                    axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=color)
        axes.set(xlabel="prompt length in tokens", ylabel="depth of the key in %", title=title)
        figure.colorbar(image, ax=axes, label="found", format=FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        return _svg(figure)


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()[file.getvalue().index("<svg") :]
