"""Rotary position embedding and its scaling kinds: the paper's contribution is `Linear`.

Position Interpolation (Chen et al. 2023, arXiv 2306.15595, Eq. 4) replaces position m by m / factor, so that
`factor` times the pre-trained window falls into the range of phases the model has seen. Here, as in Hugging Face
transformers, the factor divides the inverse frequencies; the two are the same function.

Everything is float32, in transformers' order of operations: `position * (inv_freq / factor)`, then cos and sin, then
the rotation, and only the rotated result is rounded to the activation dtype. A position or an inverse frequency in
bfloat16 is wrong by the whole range at 32k: bfloat16 keeps 1,153 of the first 32,768 integers apart.

Layout: half-split. Channel i is rotated together with channel i + H/2, as in Hugging Face weights. Meta's weights pair
2i with 2i + 1 and are permuted at import.

`kinds` says how fast each channel pair turns, `rotation` turns queries and keys, `hf` reads and writes `config.json`.
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
