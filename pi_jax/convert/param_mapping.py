"""THE table: what each parameter is called elsewhere, and how it lies there.

Our weights are stored output-first, (out, in), like those of Hugging Face and Meta, so nothing is ever transposed. What
differs:

- We keep the layers stacked in one array and the head axes (N, H) apart; the others have a tensor a layer and N*H in
  one.
- Meta splits tensors over its `consolidated.NN.pth` files (model parallelism), each along one dimension.
- Meta rotates the pairs (2i, 2i+1) of a head, Hugging Face and we the pairs (i, i + H/2): rows of q and k are
  reordered.

Everything that crosses the border is a `Tensor`: one layer of one parameter, with Hugging Face's name, shape and row
order. Readers give them and writers take them (`pi_jax.convert.stream`). `pi_jax.model` makes the same arrays with the
same logical axes; a test holds the two together.
"""

import dataclasses

from pi_jax.config import ModelConfig
from pi_jax.parallel.sharding import LogicalAxes

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter, in all layers."""

    name: str
    """Ours; "layers." first where the array has a leading layer axis."""
    hf: str
    """Hugging Face's, with {} for the layer."""
    meta: str
    """Meta's, with {} for the layer."""
    axes: LogicalAxes
    """Logical axes of one layer of ours. A "head" axis is merged into the one before it elsewhere."""
    meta_split: int | None
    """Dimension along which Meta's files split the tensor; None: each file holds all of it."""
    meta_pairs: bool = False
    """Meta keeps the two halves of each rotated pair in neighbouring rows."""

    @property
    def stacked(self) -> bool:
        """Whether there is one a layer."""
        return self.name.startswith("layers.")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Ours, of one layer."""
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
        """Theirs for an index into one layer of ours. The head axis itself (H) is never split."""
        bounds: list[tuple[int, int]] = []
        for axis, part, size in zip(self.axes, index, self.shape(config), strict=True):
            start, stop, _ = part.indices(size)
            if axis == "head":
                bounds[-1] = (bounds[-1][0] * size, bounds[-1][1] * size)
            else:
                bounds.append((start, stop))
        return tuple(slice(*b) for b in bounds)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Theirs: (N, H, D) -> (N*H, D), and for the output (D, N, H) -> (D, N*H)."""
        return tuple(part.stop for part in self.hf_index((slice(None),) * len(self.axes), config))


_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_HEADS, _KV_HEADS = ("heads", "head", "embed"), ("kv_heads", "head", "embed")
_NORM, _IN, _OUT, _VOCAB = ("norm",), ("mlp", "embed"), ("embed", "mlp"), ("vocab", "embed")

# Meta splits the embedding by columns up to LLaMA 2 and by rows since Llama 3: `meta.py` looks at the shapes.
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

HF_IGNORED = (".rotary_emb.inv_freq",)
"""Endings of tensors that old files carry and that hold no weights."""
META_IGNORED = ("rope.freqs",)
"""The same of Meta's."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One layer of one parameter, as it crosses the border."""

    spec: ParamSpec
    layer: int | None
    shape: tuple[int, ...]
    """Hugging Face's."""

    @property
    def name(self) -> str:
        """Hugging Face's."""
        return self.spec.hf.format(self.layer)

    @property
    def meta_name(self) -> str:
        """Meta's."""
        return self.spec.meta.format(self.layer)


def param_specs(config: ModelConfig) -> list[ParamSpec]:
    """The parameters of a model: without a head of its own where that is tied to the embedding."""
    return [spec for spec in PARAM_SPECS if spec.name != "head" or not config.tie_word_embeddings]


def stacks(config: ModelConfig) -> dict[str, list[Tensor]]:
    """Name of each parameter of ours -> its tensors, one a layer."""
    return {
        spec.name: [
            Tensor(spec, layer, spec.hf_shape(config))
            for layer in (range(config.num_hidden_layers) if spec.stacked else [None])
        ]
        for spec in param_specs(config)
    }


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a model, layer after layer: the order in which it is computed."""
    by_name = stacks(config)
    layers = zip(*(found for found in by_name.values() if found[0].spec.stacked), strict=True)
    first, *rest = (found[0] for found in by_name.values() if not found[0].spec.stacked)
    return [first, *(tensor for layer in layers for tensor in layer), *rest]
