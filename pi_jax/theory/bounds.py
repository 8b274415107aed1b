"""Bounds on attention scores under interpolation and extrapolation (the paper's section 2.3, appendices B and C).

The attention score of a query and a key that are s tokens apart is a(s) = Re sum_j h_j exp(i s theta_j) (Eq. 3).
Interpolation evaluates it between the integers that were trained, extrapolation beyond them. The paper bounds both, but
its constant for interpolation is too small (`interpolation_bound`). `python -m pi_jax.theory --output DIR` plots
Figures 2 and 5 and prints the tables. With `--model` and `--text`, `pi_jax.theory.measured` measures h and a(s) in a
real model.

All computation is in float64. Shapes: H head size, R = H/2 rotated pairs.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Complex, Float

SEED = 0
"""Seed of all random numbers."""


def frequencies(head_dim: int, theta: float = 10000.0) -> Float[np.ndarray, " R"]:
    """Returns theta_j = theta^(-2j/H), float64."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def score(h_R: Complex[np.ndarray, "*batch R"], distance: Any, theta_R: np.ndarray) -> Float[np.ndarray, "*batch"]:
    """Returns a(s) (Eq. 3). `distance` is a number or an array that broadcasts with all axes of `h_R` but the last."""
    return np.real(np.sum(h_R * np.exp(1j * np.asarray(distance)[..., None] * theta_R), axis=-1))


def printed_bound(head_dim: int, theta: float = 10000.0) -> float:
    """Bound of Theorem 2.1 at adjacent integers as printed (Eq. 7), in units of max|h_j|: H / (32 ln c). Too small."""
    return head_dim / (32 * math.log(theta))


def interpolation_bound(head_dim: int, theta: float = 10000.0) -> float:
    """Bound of Theorem 2.1 at adjacent integers with the constant that follows from its proof, in units of max|h_j|.

    |a(s) - chord(s)| <= (s - s1)(s2 - s) / 2 * max|a''| and |a''| <= max|h_j| sum_j theta_j^2, a geometric series with
    the sum (1 - c^-2) / (1 - c^(-4/H)); (s - s1)(s2 - s) is 1/4 at most. The paper replaces that sum by H / (4 ln c)
    through c^x <= 1 + x ln c (Eq. 14), but c^x is convex and the inequality holds the other way round.
    """
    return (1 - theta**-2) / (8 * (1 - theta ** (-4 / head_dim)))


def counter_example(head_dim: int, theta: float = 10000.0) -> float:
    """Returns |a(1/2) - chord|, with the chord between a(0) and a(1), for h_j = exp(-i theta_j / 2), so |h_j| = 1."""
    theta_R = frequencies(head_dim, theta)
    a_0, a_half, a_1 = score(np.exp(-0.5j * theta_R), np.array([0.0, 0.5, 1.0]), theta_R)
    return abs(a_half - (a_0 + a_1) / 2)


def extrapolation_bound(distances: np.ndarray, head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """Returns B(s) = sum_k |A_{k+1}(s)| with A_k(s) = sum_{j<k} exp(i s theta_j) (Eq. 8): |a(s)| <= 2 max|h_j| B(s)."""
    rotations = np.exp(1j * np.asarray(distances)[:, None] * frequencies(head_dim, theta))
    return np.abs(np.cumsum(rotations, axis=1)).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A score function fitted to noise on [0, window), as in Figure 2."""

    window: int
    """Number of fitted distances."""
    theta_R: np.ndarray
    h_R: np.ndarray
    targets: np.ndarray
    """Values to which the function was fitted, for distances 0 to window - 1."""

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        return score(self.h_R, distances, self.theta_R)


def fit(head_dim: int = 128, window: int = 2048, seed: int = SEED) -> Fit:
    """Fits the H functions cos(s theta_j), sin(s theta_j) to `window` standard-normal targets by least squares.

    It uses float64 and SVD (`numpy.linalg.lstsq`). The problem is singular to working precision, so the size of the
    scores outside the window depends on the solver and the precision. They are very large in any case.
    """
    theta_R = frequencies(head_dim)
    angles = np.arange(window)[:, None] * theta_R
    targets = np.random.default_rng(seed).standard_normal(window)
    solution = np.linalg.lstsq(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), targets, rcond=None)[0]
    cosines, sines = np.split(solution, 2)
    return Fit(window, theta_R, cosines - 1j * sines, targets)


def bound_rows(head_dims: Sequence[int] = (8, 16, 32, 64, 80, 96, 128), reach: int = 4096) -> list[dict[str, float]]:
    """Returns for each head size: B(s)/H at 0, its minimum over [0, reach) and where it is, the share of s for which
    B(s)/H is below 1, the counter-example to the printed bound, and both bounds."""
    rows = []
    for d in head_dims:
        ratios = extrapolation_bound(np.arange(reach), d) / d
        rows.append(
            {
                "head_dim": d,
                "reach": reach,
                "at_0": ratios[0],
                "minimum": ratios.min(),
                "at": int(ratios.argmin()),
                "share_below_1": float((ratios < 1).mean()),
                "counter_example": counter_example(d),
                "printed_bound": printed_bound(d),
                "corrected_bound": interpolation_bound(d),
            }
        )
    return rows


def bound_tables(rows: Sequence[dict[str, float]]) -> str:
    """Formats the rows of `bound_rows` as two tables."""
    lines = [
        "Extrapolation (Eq. 8): the paper argues with B(s) >= H",
        "   H        s <  B(0)/H  min B(s)/H   at s  B(s)/H < 1",
    ]
    for r in rows:
        lines.append(
            f"{r['head_dim']:4}  {r['reach']:7}  {r['at_0']:6.2f}  {r['minimum']:10.4f}  {r['at']:5}  "
            f"{r['share_below_1']:9.1%}"
        )
    lines += [
        "",
        "Interpolation (Theorem 2.1): |a(1/2) - chord| of h_j = exp(-i theta_j / 2), and the bounds, for max|h_j| = 1",
        "   H  counter-example  printed bound  exceeded by  corrected bound",
    ]
    for r in {r["head_dim"]: r for r in rows}.values():
        lines.append(
            f"{r['head_dim']:4}  {r['counter_example']:15.4f}  {r['printed_bound']:13.4f}  "
            f"{r['counter_example'] / r['printed_bound']:10.2f}x  {r['corrected_bound']:15.4f}"
        )
    return "\n".join(lines)
