"""Plots Figures 2 and 5 of the paper, and the measured attention scores of a model."""

import pathlib
from collections.abc import Sequence

import numpy as np

from pi_jax import plotting
from pi_jax.plotting import BEYOND, INSIDE, NEUTRAL, new_figure
from pi_jax.theory.bounds import Fit, extrapolation_bound
from pi_jax.theory.measured import Measured


def plot_figure2(path: pathlib.Path, fitted: Fit) -> dict[str, float]:
    """Plots Figure 2: a score function that is small inside its window, huge beyond it, and smooth between integers.

    Returns:
      The largest |a(s)| inside and beyond the window.
    """
    figure, (left, middle, right) = new_figure(15, 4.4, 3)
    window = fitted.window
    inside, beyond = np.arange(window), np.arange(window, 2 * window)
    a_inside, a_beyond = fitted(inside), fitted(beyond)
    left.plot(inside, a_inside, color=INSIDE, lw=0.8)
    left.set(title=f"Trained distances: |a(s)| stays below {np.abs(a_inside).max():.1f}", ylabel="score a(s)")
    middle.semilogy(inside, np.abs(a_inside), color=INSIDE, lw=0.6, label="trained")
    middle.semilogy(beyond, np.abs(a_beyond), color=BEYOND, lw=0.8, label="extrapolated")
    middle.axvline(window, color=NEUTRAL, ls="--", lw=1)
    middle.set(title=f"Beyond them it reaches {np.abs(a_beyond).max():.0e}", ylabel="|a(s)|, logarithmic")
    middle.set_ylim(bottom=1e-3)
    middle.legend(loc="upper left")
    fine, whole = np.arange(25, 75.01, 0.125), np.arange(25, 76)
    right.plot(fine, fitted(fine), color=BEYOND, lw=1.2, label="interpolated, steps of 1/8")
    right.plot(whole, fitted(whole), "o", color=INSIDE, ms=4, label="trained, whole distances")
    right.set(title="Between them it is smooth", ylabel="score a(s)")
    right.margins(y=0.25)
    right.legend(loc="upper right")
    for axes in (left, middle, right):
        axes.set_xlabel("distance s between query and key (tokens)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return {"inside_max": float(np.abs(a_inside).max()), "beyond_max": float(np.abs(a_beyond).max())}


def plot_figure5(path: pathlib.Path, reach: int = 4096, head_dims: Sequence[int] = (128, 64)) -> None:
    """Plots Figure 5: B(s)/H and the line at 1 on which the paper's "600 times" is based. Smaller heads go below it."""
    figure, (axes,) = new_figure(9, 5, 1)
    distances = np.arange(reach)
    for d, color in zip(head_dims, (INSIDE, BEYOND), strict=True):
        ratios = extrapolation_bound(distances, d) / d
        lowest = int(ratios.argmin())
        axes.semilogy(distances, ratios, color=color, lw=0.7, label=f"H = {d}: {ratios[0]:.2f} at 0")
        axes.plot(lowest, ratios[lowest], "v", color=color, ms=9, label=f"lowest: {ratios[lowest]:.4f} at s = {lowest}")
    axes.axhline(1, color="black", ls="--", lw=1.5)
    axes.text(0, 0.62, "below the line, B(s) < H and the paper's argument fails", va="top", fontsize=11)
    axes.set(
        title=f"B(s) >= H holds up to {reach} for the paper's head size, and not for a smaller one",
        xlabel="distance s between query and key (tokens)",
        ylabel="B(s) / H (no unit), logarithmic",
    )
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=130)


def plot_measured(path: pathlib.Path, m: Measured) -> None:
    """Plots the measurements of a model: size of h, scores inside and beyond the window, distance from the chord."""
    figure, (left, middle, right) = plotting.new_figure(15, 4.4, 3)
    layers = np.arange(len(m.largest_h_LM))
    low, median, high = np.quantile(m.largest_h_LM, (0.01, 0.5, 0.99), axis=1)
    left.fill_between(layers, low, high, color=plotting.INSIDE, alpha=0.25, label="1% to 99% of pairs")
    left.semilogy(layers, median, "o-", color=plotting.INSIDE, ms=4, label="median")
    left.set(title="Size of h", xlabel="layer", ylabel="max over j of |h_j| / sqrt(H)  (softmax units)")
    left.legend()
    shown = (
        (m.inside_LMD, plotting.INSIDE, "-", f"inside: s < {m.window}"),
        (m.beyond_LMD, plotting.BEYOND, "-", f"beyond: {m.window} <= s < {2 * m.window}"),
        (m.interpolated_LMD, plotting.NEUTRAL, "--", "beyond, interpolated: s / 2"),
    )
    bins = np.linspace(min(x.min() for x, *_ in shown), max(x.max() for x, *_ in shown), 120)
    for values, color, line, name in shown:
        middle.hist(values.ravel(), bins, density=True, histtype="step", color=color, ls=line, lw=1.5, label=name)
    middle.set(
        title=f"The same pairs: up to {m.inside_LMD.max():.0f} inside the window, {m.beyond_LMD.max():.0f} beyond",
        xlabel="score a(s) / sqrt(H)  (softmax units)",
        ylabel="density, logarithmic",
        yscale="log",
    )
    middle.margins(y=0.3)
    middle.legend(loc="upper right", fontsize=8.5)
    relative = (m.off_chord_LMD / m.largest_h_LM[..., None]).ravel()
    bound = float((m.theta_R**2).sum() / 8)
    right.hist(relative, np.linspace(0, 1.1 * bound, 120), density=True, color=plotting.INSIDE, label="measured")
    right.axvline(bound, color=plotting.BEYOND, lw=2, label=f"corrected bound {bound:.3f}")
    right.set(
        title="Half a token between trained distances",
        xlabel="|a(s + 1/2) - chord| / max|h_j|  (no unit)",
        ylabel="density, logarithmic",
        yscale="log",
    )
    right.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
