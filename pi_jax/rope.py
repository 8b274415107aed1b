"""Rotary position embedding and its scaling kinds: the paper's contribution is `Linear`.

Position Interpolation (Chen et al. 2023, arXiv 2306.15595, Eq. 4) replaces position m by m / factor, so that
`factor` times the pre-trained window falls into the range of phases the model has seen. Here, as in Hugging Face
transformers, the factor divides the inverse frequencies; the two are the same function.

Everything is float32, in transformers' order of operations: `position * (inv_freq / factor)`, then cos and sin, then
the rotation, and only the rotated result is rounded to the activation dtype. A position or an inverse frequency in
bfloat16 is wrong by the whole range at 32k: bfloat16 keeps 1,153 of the first 32,768 integers apart.

Layout: half-split. Channel i is rotated together with channel i + H/2, as in Hugging Face weights. Meta's weights pair
2i with 2i + 1 and are permuted at import.

Shapes: B batch, S sequence, N heads, H head size, R = H/2 rotated pairs.
"""

import dataclasses
import math
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from pi_jax.errors import InputError


@runtime_checkable
class Scaling(Protocol):
    """What a scaling kind provides. Another kind is one frozen dataclass and one line in `KINDS`."""

    kind: ClassVar[str]
    theta: float

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each rotated pair, float32 of shape [head_dim / 2]."""

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin (YaRN's temperature); 1 for the kinds that do not use it."""


def _plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"head_dim is {head_dim}: rotary embedding needs a positive even head size")
    # transformers computes this with torch's float32 power, which is all but correctly rounded; NumPy's float32
    # power is not (up to 14 of 64 frequencies differ in the last bit), hence the detour through float64.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power


def _checked(name: str, value: Any, at_least: float) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < at_least:
        raise InputError(f"rope {name} is {value!r}: it must be a finite number >= {at_least:g}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Default:
    """RoPE as pre-trained: theta_j = theta^(-2j/H) (RoFormer; paper Eq. 1)."""

    theta: float = 10000.0
    kind: ClassVar[str] = "default"
    attention_factor: ClassVar[float] = 1.0

    def __post_init__(self):
        object.__setattr__(self, "theta", _checked("theta", self.theta, 1.0))

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        return _plain_frequencies(self.theta, head_dim)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position Interpolation (paper Eq. 4): every phase is divided by `factor` = new window / pre-trained window."""

    theta: float = 10000.0
    factor: float = 1.0
    kind: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0

    def __post_init__(self):
        object.__setattr__(self, "theta", _checked("theta", self.theta, 1.0))
        object.__setattr__(self, "factor", _checked("factor", self.factor, 1.0))

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        return _plain_frequencies(self.theta, head_dim) / np.float32(self.factor)


KINDS: dict[str, type] = {cls.kind: cls for cls in (Default, Linear)}


def build_scaling(kind: str, theta: float, factor: float = 1.0) -> Scaling:
    """The scaling of a kind's name, as a config file or a command line gives it.

    Raises:
      InputError: for an unknown kind, or a theta or factor that is no finite number >= 1.
    """
    if kind not in KINDS:
        raise InputError(f"rope.kind is {kind!r}: known kinds are {', '.join(KINDS)}")
    if kind == "default":
        if factor != 1.0:
            raise InputError(f"rope.factor is {factor} but rope.kind 'default' scales nothing: use 'linear'")
        return Default(theta)
    return KINDS[kind](theta=theta, factor=factor)


def phases(
    positions_BS: Num[Array, "B S"], head_dim: int, scaling: Scaling
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """cos and sin of every position and rotated pair, float32; positions may be integers or fractions."""
    inv_freq_R = jnp.asarray(scaling.inverse_frequencies(head_dim))
    # A broadcast multiply, never a dot: a float32 dot is TF32 on NVIDIA and bfloat16 on TPU by default.
    angles_BSR = positions_BS.astype(jnp.float32)[..., None] * inv_freq_R
    return (
        jnp.cos(angles_BSR) * scaling.attention_factor,
        jnp.sin(angles_BSR) * scaling.attention_factor,
    )


def apply_phases(
    x_BSNH: Float[Array, "B S N H"], cos_BSR: Float[Array, "B S R"], sin_BSR: Float[Array, "B S R"]
) -> Float[Array, "B S N H"]:
    """Rotates channel pairs (i, i + H/2) in float32 and rounds once to the dtype of `x_BSNH`."""
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BSR[:, :, None, :], sin_BSR[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BSNH.dtype)


def rotate(
    x_BSNH: Float[Array, "B S N H"], positions_BS: Num[Array, "B S"], scaling: Scaling
) -> Float[Array, "B S N H"]:
    """Queries or keys turned by their (interpolated) positions. A model with many layers calls `phases` once."""
    return apply_phases(x_BSNH, *phases(positions_BS, x_BSNH.shape[-1], scaling))


def from_hf(config: dict[str, Any]) -> Scaling:
    """The scaling that a Hugging Face `config.json` describes, in either of its two layouts.

    transformers 4 writes `rope_theta` and `rope_scaling` (kind under `rope_type` or `type`); transformers 5 writes
    `rope_parameters`, with theta inside. A missing theta is 10000, as in transformers.

    Raises:
      InputError: for an unknown kind, a missing or bad factor, or two layouts that disagree.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    found = {}
    for key, section in (("rope_parameters", new), ("rope_scaling", old)):
        if section:
            if not isinstance(section, dict):
                raise InputError(f"{key} is {section!r}: it must be an object or null")
            found[key] = _from_section(key, section, config)
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise InputError(
            f"rope_parameters says {found['rope_parameters']} but rope_scaling says {found['rope_scaling']}: "
            "remove the one that is wrong"
        )
    for scaling in found.values():
        return scaling
    return Default(config.get("rope_theta", 10000.0))


def _from_section(key: str, section: dict[str, Any], config: dict[str, Any]) -> Scaling:
    theta = section.get("rope_theta", config.get("rope_theta", 10000.0))
    names = {section[k] for k in ("rope_type", "type") if k in section}
    if len(names) != 1:
        # A factor without a kind is how other exporters lost their scaling silently: never guess.
        raise InputError(f"{key} is {section}: it must name one kind under 'rope_type' (or 'type')")
    (kind,) = names
    if kind not in KINDS:
        raise InputError(f"{key} has rope_type {kind!r}: known kinds are {', '.join(KINDS)}")
    if kind == "default":
        return Default(theta)
    if "factor" not in section:
        raise InputError(f"{key} of rope_type {kind!r} has no 'factor'")
    return KINDS[kind](theta=theta, factor=section["factor"])


def to_hf(scaling: Scaling, layout: str = "v4") -> dict[str, Any]:
    """The keys of `config.json` for a scaling.

    Layout "v4" is what every reader of today takes (transformers 4 and 5, vLLM, SGLang, llama.cpp); "v5" is what
    transformers 5 itself writes, which transformers 4 reads as *unscaled without a word*. The factor is always a
    float: vLLM refuses an integer.
    """
    section = {"rope_type": scaling.kind}
    if scaling.kind != "default":
        section["factor"] = float(scaling.factor)
    if layout == "v5":
        return {"rope_parameters": {**section, "rope_theta": scaling.theta}}
    if scaling.kind == "default":
        return {"rope_theta": scaling.theta, "rope_scaling": None}
    return {"rope_theta": scaling.theta, "rope_scaling": {**section, "type": scaling.kind}}


jax.tree_util.register_static(Default)
jax.tree_util.register_static(Linear)
