"""Rotary position embedding (RoPE) and its scaling kinds. Position Interpolation is `Linear`.

Position Interpolation (Chen et al. 2023, arXiv 2306.15595, Eq. 4) replaces position m by m / factor, so that `factor`
times the pre-trained window maps to the range of phases that the model has seen. Here, as in Hugging Face transformers,
the inverse frequencies are divided by the factor instead, which gives the same function.

All computation is in float32, in transformers' order of operations: `position * (inv_freq / factor)`, then cos and sin,
then the rotation. Only the rotated result is rounded to the activation dtype. Positions in bfloat16 would be useless at
32k: bfloat16 distinguishes only 1,153 of the first 32,768 integers.

The layout is half-split: channel i is rotated together with channel i + H/2, as in Hugging Face weights. Meta's weights
pair 2i with 2i + 1 and are permuted on import.

`scaling` defines the frequency of each channel pair, `rotary` rotates queries and keys, and `hf_config` reads and
writes `config.json`.
"""

from pi_jax.rope.hf_config import KINDS, from_hf, to_hf, window_from_hf, window_to_hf
from pi_jax.rope.rotary import apply_rotary, cos_sin, rotate
from pi_jax.rope.scaling import CHOICES, Default, Dynamic, Linear, Llama3, LongRope, Scaling, Yarn, build_scaling, ntk

__all__ = [
    "CHOICES",
    "KINDS",
    "Default",
    "Dynamic",
    "Linear",
    "Llama3",
    "LongRope",
    "Scaling",
    "Yarn",
    "apply_rotary",
    "build_scaling",
    "cos_sin",
    "from_hf",
    "ntk",
    "rotate",
    "to_hf",
    "window_from_hf",
    "window_to_hf",
]
