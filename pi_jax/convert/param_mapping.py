"""Maps each parameter of pi_jax to its name and layout in the Hugging Face and Meta formats.

All three formats store weights as (out, in), so nothing is ever transposed. They differ as follows:

- pi_jax stacks the layers of a parameter in one array and keeps the head axes (N, H) separate. The other formats have
  one tensor per layer and merge the head axes into N*H.
- Meta splits tensors over its `consolidated.NN.pth` files (model parallelism), each along one dimension.
- Meta rotates the pairs (2i, 2i+1) of a head, Hugging Face and pi_jax rotate the pairs (i, i + H/2), so the rows of q
  and k are reordered.

Readers and writers exchange `Tensor`s (`pi_jax.convert.pipeline`): one layer of one parameter, with Hugging Face's
name, shape and row order. `pi_jax.model` creates the same arrays with the same logical axes; a test checks that the two
agree.
"""

import dataclasses

from pi_jax.config import ModelConfig
from pi_jax.parallel.sharding import LogicalAxes

Index = tuple[slice, ...]
"""One slice per dimension of a tensor."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Names and layout of one parameter, for all layers."""

    name: str
    """Name in pi_jax. It starts with "layers." if the array has a leading layer axis."""
    hf: str
    """Name in the Hugging Face format, with {} for the layer."""
    meta: str
    """Name in the Meta format, with {} for the layer."""
    axes: LogicalAxes
    """Logical axes of one layer in pi_jax. The other formats merge a "head" axis into the axis before it."""
    meta_split: int | None
    """Dimension along which Meta's files split the tensor; None if each file contains the complete tensor."""
    meta_pairs: bool = False
    """Whether Meta stores the two components of each rotated pair in adjacent rows."""

    @property
    def stacked(self) -> bool:
        """Whether each layer has its own tensor of this parameter."""
        return self.name.startswith("layers.")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one layer in pi_jax."""
        sizes = {
            "vocab": config.vocab_size,
            "embed": config.hidden_size,
            "norm": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head": config.head_dim,
            "mlp": config.intermediate_size,
        }
        return tuple(sizes[axis] for axis in self.axes)

    def hf_index(self, index: Index, config: ModelConfig) -> Index:
        """Converts an index into one layer in pi_jax to Hugging Face's layout. The head axis (H) is never split."""
        bounds: list[tuple[int, int]] = []
        for axis, part, size in zip(self.axes, index, self.shape(config), strict=True):
            start, stop, _ = part.indices(size)
            if axis == "head":
                bounds[-1] = (bounds[-1][0] * size, bounds[-1][1] * size)
            else:
                bounds.append((start, stop))
        return tuple(slice(*b) for b in bounds)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape in the Hugging Face format: (N*H, D) for (N, H, D), and (D, N*H) for (D, N, H)."""
        return tuple(part.stop for part in self.hf_index((slice(None),) * len(self.axes), config))


_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_HEADS, _KV_HEADS = ("heads", "head", "embed"), ("kv_heads", "head", "embed")
_NORM, _IN, _OUT, _VOCAB = ("norm",), ("mlp", "embed"), ("embed", "mlp"), ("vocab", "embed")

# Meta splits the embedding by columns up to LLaMA 2 and by rows since Llama 3; `meta.py` decides by the shapes.
PARAM_SPECS = (
    ParamSpec("embedding", "model.embed_tokens.weight", "tok_embeddings.weight", _VOCAB, 1),
    ParamSpec(
        "layers.attention_norm.scale",
        "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention_norm.weight",
        _NORM,
        None,
    ),
    ParamSpec("layers.attention.q", _ATTENTION + "q_proj.weight", "layers.{}.attention.wq.weight", _HEADS, 0, True),
    ParamSpec("layers.attention.k", _ATTENTION + "k_proj.weight", "layers.{}.attention.wk.weight", _KV_HEADS, 0, True),
    ParamSpec("layers.attention.v", _ATTENTION + "v_proj.weight", "layers.{}.attention.wv.weight", _KV_HEADS, 0),
    ParamSpec(
        "layers.attention.o", _ATTENTION + "o_proj.weight", "layers.{}.attention.wo.weight", ("embed",) + _HEADS[:2], 1
    ),
    ParamSpec(
        "layers.mlp_norm.scale",
        "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.ffn_norm.weight",
        _NORM,
        None,
    ),
    ParamSpec("layers.mlp.gate", _MLP + "gate_proj.weight", "layers.{}.feed_forward.w1.weight", _IN, 0),
    ParamSpec("layers.mlp.up", _MLP + "up_proj.weight", "layers.{}.feed_forward.w3.weight", _IN, 0),
    ParamSpec("layers.mlp.down", _MLP + "down_proj.weight", "layers.{}.feed_forward.w2.weight", _OUT, 1),
    ParamSpec("norm.scale", "model.norm.weight", "norm.weight", _NORM, None),
    ParamSpec("head", "lm_head.weight", "output.weight", _VOCAB, 0),
)

HF_NAMES = {spec.name: spec.hf for spec in PARAM_SPECS}
"""Name of each parameter in pi_jax -> its name in the Hugging Face format."""

HF_IGNORED = (".rotary_emb.inv_freq",)
"""Name suffixes of tensors in older Hugging Face files that are not weights."""
META_IGNORED = ("rope.freqs",)
"""Name suffixes of tensors in Meta's files that are not weights."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One layer of one parameter, in Hugging Face's layout."""

    spec: ParamSpec
    layer: int | None
    """Index of the layer; None for a parameter outside the layers."""
    shape: tuple[int, ...]
    """Shape in the Hugging Face format."""

    @property
    def name(self) -> str:
        """Name in the Hugging Face format."""
        return self.spec.hf.format(self.layer)

    @property
    def meta_name(self) -> str:
        """Name in the Meta format."""
        return self.spec.meta.format(self.layer)


def param_specs(config: ModelConfig) -> list[ParamSpec]:
    """Returns the parameters of a model. The output head is omitted if it is tied to the embedding."""
    return [spec for spec in PARAM_SPECS if spec.name != "head" or not config.tie_word_embeddings]


def stacks(config: ModelConfig) -> dict[str, list[Tensor]]:
    """Maps the name of each parameter in pi_jax to its tensors, one per layer."""
    return {
        spec.name: [
            Tensor(spec, layer, spec.hf_shape(config))
            for layer in (range(config.num_hidden_layers) if spec.stacked else [None])
        ]
        for spec in param_specs(config)
    }


def tensors(config: ModelConfig) -> list[Tensor]:
    """Returns all tensors of a model, layer by layer, in the order of the forward pass."""
    by_name = stacks(config)
    layers = zip(*(found for found in by_name.values() if found[0].spec.stacked), strict=True)
    first, *rest = (found[0] for found in by_name.values() if not found[0].spec.stacked)
    return [first, *(tensor for layer in layers for tensor in layer), *rest]
