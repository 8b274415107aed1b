"""The LLaMA transformer in Flax NNX, from the whole to its parts: Llama, Block, Attention, MLP, RMSNorm.

Modules are plain pytrees of parameters: `jax.jit`, `jax.grad` and `jax.lax.scan` take them as they are. All layers are
one `Block` whose parameters carry a leading layer axis L, and the forward pass is a `lax.scan` over it, so compile time
does not grow with depth. Every parameter states the logical axes of its dimensions; `sharding` turns these into
partitions.

Weights are stored output-first, (out, in), as in Hugging Face files: the gradient of such a product comes out in the
stored order, which spares a transposition of every weight in every step (a third of the backward pass on a CPU).

Shapes: B batch, S sequence, D hidden, N query heads, K key/value heads, H head size, F feed-forward, V vocabulary,
L layers, R = H/2 rotated pairs.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pi_jax import rope, trees
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.model.attention import attention, device, sharded
from pi_jax.model.attention.custom_vjp import SAVED_NAME
from pi_jax.parallel import sharding

_INIT_STD = 0.02
_LAYER_INPUT = "layer_input"

# What is kept of a layer for its backward pass, by `compute.remat`; the rest is recomputed.
_POLICIES = {
    "layer": jax.checkpoint_policies.nothing_saveable,  # but the layer's input, which `jax.checkpoint` keeps always
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _weight(key: jax.Array, shape: tuple[int, ...], axes: sharding.LogicalAxes, dtype: str) -> nnx.Param:
    value = _INIT_STD * jax.random.normal(key, shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def _use(param: nnx.Param, dtype: str) -> jax.Array:
    """A parameter's value for computing: in the compute dtype, assembled from its FSDP shards (cast first: half the
    bytes on the wire)."""
    return sharding.gather(param[...].astype(dtype), param.axes)


class Llama(nnx.Module):
    """Decoder-only transformer (Touvron et al. 2023) with RMSNorm, SwiGLU, grouped queries and scaled RoPE."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, key: jax.Array):
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        table = (config.vocab_size, config.hidden_size)
        self.config, self.compute = config, compute
        self.embedding = _weight(embed_key, table, ("vocab", "embed"), compute.param_dtype)
        layer_keys = jax.random.split(layers_key, config.num_hidden_layers)
        self.layers = jax.vmap(functools.partial(Block, config, compute))(layer_keys)
        self.norm = RMSNorm(config, compute)
        if not config.tie_word_embeddings:
            self.head = _weight(head_key, table, ("vocab", "embed"), compute.param_dtype)

    def __call__(
        self,
        tokens_BS: Int[Array, "B S"],
        positions_BS: Int[Array, "B S"],
        segment_ids_BS: Int[Array, "B S"] | None = None,
        zigzag: bool = False,
    ) -> Float[Array, "B S D"]:
        """Final hidden states, normed; `output_weights` maps them to logits, a chunk at a time (`pi_jax.model.loss`).

        Args:
          tokens_BS: token ids.
          positions_BS: RoPE positions, before interpolation. Attention is causal in the order of the row, whatever
            these say, so they may restart in each document or skip ahead.
          segment_ids_BS: document of each token; a token sees only its own. None: the row is one document.
          zigzag: the tokens of a row lie in `sharding.zigzag` order, not one after the other.
        """
        dtype = self.compute.dtype
        with jax.named_scope("embed"):
            x_BSD = sharding.take(_use(self.embedding, dtype), tokens_BS)
        with jax.named_scope("rope_phases"):
            cos_sin_BSR = rope.cos_sin(positions_BS, self.config.head_dim, self.config.rope)

        backend = functools.partial(attention, implementation=self.compute.attention)
        attend = functools.partial(sharded.attend, backend, segment_ids_BS=segment_ids_BS, zigzag=zigzag)

        def block(x_BSD, layer):
            return layer(checkpoint_name(x_BSD, _LAYER_INPUT), cos_sin_BSR, attend), None

        if self.compute.remat != "none":
            # Inside scan nothing can be merged across iterations.
            block = jax.checkpoint(block, prevent_cse=False, policy=_POLICIES[self.compute.remat])
        with jax.named_scope("layers"):
            x_BSD, _ = jax.lax.scan(block, x_BSD, self.layers)
        with jax.named_scope("final_norm"):
            return self.norm(x_BSD)

    def output_weights(self) -> Float[Array, "V D"]:
        """Output projection in the compute dtype: the head, or the embedding where the two are tied."""
        return _use(self.embedding if self.config.tie_word_embeddings else self.head, self.compute.dtype)

    def logits(self, hidden_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Float32 logits of all given positions; for a long sequence use `pi_jax.model.loss` instead."""
        axes = ("batch", "sequence", "vocab")
        return sharding.einsum("BSD,VD->BSV", hidden_BSD, self.output_weights(), axes=axes, dtype=jnp.float32)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config, compute)
        self.attention = Attention(config, compute, attention_key)
        self.mlp_norm = RMSNorm(config, compute)
        self.mlp = MLP(config, compute, mlp_key)

    def __call__(self, x_BSD, cos_sin_BSR, attend):
        with jax.named_scope("attention"):
            x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_sin_BSR, attend)
        with jax.named_scope("mlp"):
            return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    `attend(q_BSNH, k_BSKH, v_BSKH)` is attention within the row, or to a KV cache.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.compute = compute
        self.q = _weight(keys[0], (N, H, D), ("heads", "head", "embed"), compute.param_dtype)
        self.k = _weight(keys[1], (K, H, D), ("kv_heads", "head", "embed"), compute.param_dtype)
        self.v = _weight(keys[2], (K, H, D), ("kv_heads", "head", "embed"), compute.param_dtype)
        self.o = _weight(keys[3], (D, N, H), ("embed", "heads", "head"), compute.param_dtype)

    def __call__(self, x_BSD, cos_sin_BSR, attend):
        dtype = self.compute.dtype
        one = x_BSD.shape[1] == 1  # a step of generation
        with jax.named_scope("qkv"):
            project = _one_to_heads if one else _to_heads
            q_BSNH, k_BSKH, v_BSKH = (project(x_BSD, _use(w, dtype), w.axes[0]) for w in (self.q, self.k, self.v))
        with jax.named_scope("rope"):
            q_BSNH, k_BSKH = (rope.apply_rotary(x, *cos_sin_BSR) for x in (q_BSNH, k_BSKH))

        out_BSNH = attend(q_BSNH, k_BSKH, v_BSKH)
        with jax.named_scope("out"):
            o_DNH, axes = _use(self.o, dtype), ("batch", "sequence", None)
            if one:
                out_BSF = out_BSNH.reshape(*out_BSNH.shape[:2], -1)
                return sharding.einsum("BSF,DF->BSD", out_BSF, o_DNH.reshape(len(o_DNH), -1), axes=axes)
            return sharding.einsum("BSNH,DNH->BSD", out_BSNH, o_DNH, axes=axes)


def _to_heads(x_BSD, w_NHD, heads):
    return sharding.einsum("BSD,NHD->BSNH", x_BSD, w_NHD, axes=("batch", "sequence", heads, "head"))


def _one_to_heads(x_B1D, w_NHD, heads):
    """The same for a single token, by a matrix: XLA's CPU backend transposes three-dimensional weights each time, which
    costs ten times their products."""
    N, H, D = w_NHD.shape
    flat_B1F = sharding.einsum("BSD,FD->BSF", x_B1D, w_NHD.reshape(N * H, D), axes=("batch", "sequence", heads))
    return flat_B1F.reshape(*x_B1D.shape[:2], N, H)


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        D, F = config.hidden_size, config.intermediate_size
        self.compute = compute
        self.gate = _weight(keys[0], (F, D), ("mlp", "embed"), compute.param_dtype)
        self.up = _weight(keys[1], (F, D), ("mlp", "embed"), compute.param_dtype)
        self.down = _weight(keys[2], (D, F), ("embed", "mlp"), compute.param_dtype)

    def __call__(self, x_BSD):
        gate, up = (_use(w, self.compute.dtype) for w in (self.gate, self.up))
        # Apart on accelerators: joined, they take a layer's widest memory twice, and XLA adds their gradients up whole
        # on every device. Apart for a step of generation: joining the weights would cost ten times their products.
        if x_BSD.shape[1] == 1 or device.platform() != "cpu":
            axes = ("batch", "sequence", "mlp")
            gate_BSF, up_BSF = (sharding.einsum("BSD,FD->BSF", x_BSD, w, axes=axes) for w in (gate, up))
            hidden_BSF = jax.nn.silu(gate_BSF) * up_BSF
        else:
            # One product for both: its gradient reads the input once, a quarter less time for the layer on a CPU.
            wide = ("batch", "sequence", None, "mlp")
            both_BSCF = sharding.einsum("BSD,CFD->BSCF", x_BSD, jnp.stack([gate, up]), axes=wide)
            hidden_BSF = jax.nn.silu(both_BSCF[:, :, 0]) * both_BSCF[:, :, 1]
        down = _use(self.down, self.compute.dtype)
        return sharding.einsum("BSF,DF->BSD", hidden_BSF, down, axes=("batch", "sequence", None))


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) in float32, rounded before its scale is applied, as in HF."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig):
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size, compute.param_dtype), axes=("norm",))

    def __call__(self, x_BSD):
        return _rms_norm(self.eps, x_BSD, self.scale[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps, x_BSD, scale_D):
    return _rms_norm_forward(eps, x_BSD, scale_D)[0]


def _rms_norm_forward(eps, x_BSD, scale_D):
    x = x_BSD.astype(jnp.float32)
    inverse_BS = jax.lax.rsqrt(jnp.mean(x * x, axis=-1) + eps)
    normed = (x * inverse_BS[..., None]).astype(x_BSD.dtype)
    return normed * scale_D.astype(x_BSD.dtype), (x_BSD, scale_D, inverse_BS)


def _rms_norm_backward(eps, residuals, d_BSD):
    # By hand for two reasons: it keeps nothing but its input, and its sums are products, which XLA's CPU backend
    # computes ten times faster than the reductions that automatic differentiation leaves.
    x_BSD, scale_D, inverse_BS = residuals
    x, d, scale = (v.astype(jnp.float32) for v in (x_BSD, d_BSD, scale_D))
    tokens = ("batch", "sequence")
    d_scale = sharding.einsum("BSD,BSD,BS->D", d, x, inverse_BS, axes=("norm",))
    along = sharding.einsum("BSD,BSD,D->BS", d, x, scale, axes=tokens) * inverse_BS**3 / x.shape[-1]
    d_x = d * scale * inverse_BS[..., None] - x * along[..., None]
    return d_x.astype(x_BSD.dtype), d_scale.astype(scale_D.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def abstract(config: ModelConfig, compute: ComputeConfig) -> Llama:
    """The model's shapes and dtypes without any weights."""
    return jax.eval_shape(lambda: Llama(config, compute, jax.random.key(0)))


def parameter_axes(model: Llama) -> dict[str, sharding.LogicalAxes]:
    """Name of each parameter -> logical axes of its array, "layers" first where the layers are stacked."""
    params = trees.by_name(model, is_leaf=lambda x: isinstance(x, nnx.Param))
    return {name: ("layers", *p.axes) if name.startswith("layers.") else p.axes for name, p in params.items()}
