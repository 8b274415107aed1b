"""THE table: what each parameter is called elsewhere.

Shapes and logical axes are stated where parameters are made (`pi_jax.model`). Our weights are stored output-first like
Hugging Face's, so a tensor of theirs is a layer of ours with the head axes (N, H) flattened into one.
"""

from pi_jax import trees
from pi_jax.model import Llama

HF_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attention.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attention.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attention.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down": "model.layers.{}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}

HF_IGNORED = (".rotary_emb.inv_freq",)
"""Endings of tensors that old files carry and that hold no weights."""


def hf_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Hugging Face folder of this (abstract) model must hold: its name and shape."""
    shapes = {}
    for name, leaf in trees.by_name(model).items():
        if name.startswith("layers."):
            shape = hf_shape(name, leaf.shape[1:])
            shapes |= {HF_NAMES[name].format(layer): shape for layer in range(leaf.shape[0])}
        else:
            shapes[HF_NAMES[name]] = hf_shape(name, leaf.shape)
    return shapes


def hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Theirs for one layer's shape of ours: (N, H, D) -> (N*H, D), and for the output (D, N, H) -> (D, N*H)."""
    if len(shape) < 3:
        return tuple(shape)
    a, b, c = shape
    return (a, b * c) if name.endswith(".o") else (a * b, c)


def hf_index(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Theirs for an index into one layer of ours. The head axis itself (H) is never split."""
    bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    if len(shape) == 3:
        (a0, a1), (b0, b1), (c0, c1) = bounds
        if name.endswith(".o"):
            bounds = [(a0, a1), (b0 * shape[2], b1 * shape[2])]
        else:
            bounds = [(a0 * shape[1], a1 * shape[1]), (c0, c1)]
    return tuple(slice(*b) for b in bounds)
