"""The RoPE scaling kinds: frozen dataclasses with the field names of Hugging Face's `config.json`.

Arithmetic is float32 in transformers' order of operations, so that results are bit-identical (`tests/test_rope.py`).
"""

import dataclasses
import math
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from pi_jax.errors import InputError

Length: TypeAlias = int | jax.Array | None
"""Sequence length in tokens; may be traced. None: within the pre-trained window."""

_F32 = np.float32


@runtime_checkable
class Scaling(Protocol):
    """Interface of a scaling kind. To add a kind, add a frozen dataclass and an entry in `hf_config.KINDS`."""

    kind: ClassVar[str]
    theta: float

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> np.ndarray | jax.Array:
        """Returns the radians per position of each rotated pair, float32 of shape [head_dim / 2]."""

    @property
    def attention_scaling(self) -> float:
        """Factor by which cos and sin are multiplied (YaRN's temperature); 1 for kinds that do not use it."""


def _checked(name: str, value: Any, at_least: float = 0.0) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < at_least or value == 0:
        bound = f">= {at_least:g}" if at_least else "> 0"
        raise InputError(f"rope {name} is {value!r}: it must be a finite number {bound}")
    return float(value)


def _check(scaling: Any) -> None:
    """Checks each field of a scaling and converts its numbers to floats."""
    for field in dataclasses.fields(scaling):
        name, value = field.name, getattr(scaling, field.name)
        if value is None and field.default is None:
            continue
        if name.endswith("_embeddings"):
            if not isinstance(value, int) or isinstance(value, bool) or value < 2:
                raise InputError(f"rope {name} is {value!r}: it must be a whole number of tokens, 2 or more")
        elif name in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)) or not value:
                raise InputError(f"rope {name} is {value!r}: it must be a list of numbers")
            value = tuple(_checked(f"{name}[{i}]", x) for i, x in enumerate(value))
        elif isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise InputError(f"rope {name} is {value!r}: it must be true or false")
        else:
            value = _checked(name, value, 1.0 if name in ("theta", "factor") else 0.0)
        object.__setattr__(scaling, name, value)


def _exponents(head_dim: int) -> np.ndarray:
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"head_dim is {head_dim}: it must be positive and even for rotary embedding")
    return np.arange(0, head_dim, 2, dtype=_F32) / _F32(head_dim)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    """Returns theta^(2j/H) in float64, for a float32 theta and float32 exponents."""
    # transformers computes this with torch's float32 power, which is almost always correctly rounded. NumPy's float32
    # power is not (up to 14 of 64 frequencies differ in the last bit), so this uses float64.
    return np.float64(_F32(theta)) ** _exponents(head_dim).astype(np.float64)


def _plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    return _F32(1) / _powers(theta, head_dim).astype(_F32)


class _Checked:
    """Base class of all kinds: checks the fields; no temperature."""

    attention_scaling: ClassVar[float] = 1.0

    def __post_init__(self):
        _check(self)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Default(_Checked):
    """RoPE as pre-trained: theta_j = theta^(-2j/H) (RoFormer; paper Eq. 1)."""

    theta: float = 10000.0
    kind: ClassVar[str] = "default"

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> np.ndarray:
        return _plain_frequencies(self.theta, head_dim)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Linear(_Checked):
    """Position Interpolation (paper Eq. 4): every phase is divided by `factor` = new window / pre-trained window."""

    theta: float = 10000.0
    factor: float = 1.0
    kind: ClassVar[str] = "linear"

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> np.ndarray:
        return _plain_frequencies(self.theta, head_dim) / _F32(self.factor)


def ntk(theta: float, factor: float, head_dim: int) -> Default:
    """'NTK-aware' scaling: a larger base, theta * factor^(H / (H - 2)), which slows the slowest pair by `factor`.

    The result is plain RoPE with another theta and is written to `config.json` as such.
    """
    theta, factor = _checked("theta", theta, 1.0), _checked("factor", factor, 1.0)
    if len(_exponents(head_dim)) < 2:
        raise InputError(f"head_dim is {head_dim}: it must be at least 4 for kind 'ntk'")
    return Default(theta * factor ** (head_dim / (head_dim - 2)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(_Checked):
    """The "dynamic" kind of transformers: beyond the pre-trained window, the base grows with the sequence length.

    theta' = theta * (factor * length / original - (factor - 1))^(H / (H - 2)). It is meant for models that are used
    beyond their window without fine-tuning. In transformers, a module keeps the largest length it has seen until a
    sequence is shorter than the pre-trained window; here the result of a call depends only on its own length.
    """

    theta: float = 10000.0
    factor: float
    original_max_position_embeddings: int
    kind: ClassVar[str] = "dynamic"

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> jax.Array:
        original = self.original_max_position_embeddings
        length = jnp.maximum(original if length is None else length, original).astype(jnp.float32)
        growth = self.factor * length / original - (self.factor - 1)
        # Compute powers in float64 and round where transformers rounds. The only remaining difference is that torch's
        # float32 power is not always correctly rounded. On this small vector, even emulated float64 costs nothing.
        with jax.enable_x64(True):
            grown = self.theta * (growth.astype(jnp.float64) ** (head_dim / max(head_dim - 2, 1))).astype(jnp.float32)
            powers = grown.astype(jnp.float64) ** _exponents(head_dim).astype(np.float64)
            return 1 / powers.astype(jnp.float32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(_Checked):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolates slow pairs, keeps fast ones, and blends between them.

    The frequency of a pair that rotates more than `beta_fast` times within the original window is unchanged; that of a
    pair that rotates less than `beta_slow` times is divided by `factor`. cos and sin are multiplied by
    `attention_factor`; None means 0.1 ln(factor) + 1, or the ratio of two such terms if `mscale` and `mscale_all_dim`
    are given (DeepSeek).
    """

    theta: float = 10000.0
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    kind: ClassVar[str] = "yarn"

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise InputError(f"rope beta_fast is {self.beta_fast}: it must be >= beta_slow, {self.beta_slow}")
        if self.theta == 1:
            raise InputError("rope theta is 1.0: it must be greater than 1 for kind 'yarn'")

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

    def _turning_pair(self, turns: float, head_dim: int) -> float:
        """Returns the (fractional) index of the pair that rotates this many times within the original window."""
        wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> np.ndarray:
        first, last = (self._turning_pair(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001  # avoids a division by zero, as in transformers
        pairs = np.arange(head_dim // 2, dtype=_F32)
        kept = 1 - np.clip((pairs - _F32(first)) / _F32(last - first), 0, 1)
        powers = _powers(self.theta, head_dim).astype(_F32)
        return 1 / (_F32(self.factor) * powers) * (1 - kept) + 1 / powers * kept


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(_Checked):
    """The scaling of Llama 3.1: pairs with wavelengths above original / low_freq_factor are interpolated, those with
    wavelengths below original / high_freq_factor are unchanged, and the frequencies between are blended."""

    theta: float = 10000.0
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float
    kind: ClassVar[str] = "llama3"

    def __post_init__(self):
        super().__post_init__()
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise InputError(f"rope high_freq_factor is {high}: it must be greater than low_freq_factor, {low}")

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> np.ndarray:
        original, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        plain, factor = _plain_frequencies(self.theta, head_dim), _F32(self.factor)
        # torch computes number / tensor as number * (1 / tensor), which rounds twice; this does the same.
        wavelengths = _F32(2 * math.pi) * (1 / plain)
        kept = (_F32(original) * (1 / wavelengths) - _F32(low)) / _F32(high - low)
        blended = (1 - kept) * plain / factor + kept * plain
        slow, fast = wavelengths > _F32(original / low), wavelengths < _F32(original / high)
        return np.where(slow, plain / factor, np.where(fast, plain, blended))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(_Checked):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): divides the frequency of each pair by its own number.

    The numbers come from `short_factor` within the original window and from `long_factor` for longer sequences. cos and
    sin are multiplied by `attention_factor`; None means sqrt(1 + ln(factor) / ln(original)).
    """

    theta: float = 10000.0
    factor: float
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None
    kind: ClassVar[str] = "longrope"

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> np.ndarray | jax.Array:
        powers = _powers(self.theta, head_dim).astype(_F32)
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != len(powers):
                found = len(getattr(self, name))
                raise InputError(f"rope {name} has {found} numbers: head_dim {head_dim} requires {len(powers)}")
        short, long = (1 / (np.array(x, _F32) * powers) for x in (self.short_factor, self.long_factor))
        return short if length is None else jnp.where(length > self.original_max_position_embeddings, long, short)


CHOICES = ("default", "linear", "ntk", "dynamic", "yarn")
"""Kinds that a config file or the command line can select. The other kinds only occur in existing models."""


def build_scaling(kind: str, theta: float, factor: float = 1.0, *, window: int = 2048, head_dim: int = 128) -> Scaling:
    """Builds a scaling from the name of its kind, as given in a config file or on the command line.

    Args:
      kind: one of `CHOICES`.
      theta: base of the model's frequencies.
      factor: new window / pre-trained window.
      window: pre-trained window in tokens (dynamic, yarn).
      head_dim: head size (ntk).

    Raises:
      InputError: if the kind is unknown, or theta or factor is not a finite number >= 1.
    """
    if kind == "default":
        if factor != 1.0:
            raise InputError(f"rope.factor is {factor}, but rope.kind 'default' does not scale: use 'linear'")
        return Default(theta)
    if kind == "linear":
        return Linear(theta, factor)
    if kind == "ntk":
        return ntk(theta, factor, head_dim)
    if kind == "dynamic":
        return Dynamic(theta=theta, factor=factor, original_max_position_embeddings=window)
    if kind == "yarn":
        return Yarn(theta=theta, factor=factor, original_max_position_embeddings=window)
    raise InputError(f"rope.kind is {kind!r}: it must be one of {', '.join(CHOICES)}")
