"""The key/value cache for generation: static shapes, one slot per token, one pair of arrays per layer.

The tokens of a sequence occupy consecutive slots, in order. Sequences of unequal length end in the same slot, so that
one slot index serves all of them: shorter sequences start later, and the slots before their start are masked. Keys are
stored after rotation (docs/rope.md). Only K/V heads are stored, which the queries of a group share.

Shapes: B batch, T slots, S new tokens, N query heads, K key/value heads, G = N/K, H head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi_jax.model.attention import attention
from pi_jax.parallel import sharding

_AXES = ("batch", None, "kv_heads", None)


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k_BTKH: Float[Array, "B T K H"]
    v_BTKH: Float[Array, "B T K H"]


def empty(mesh: jax.sharding.Mesh, shape: tuple[int, int, int, int], dtype: str) -> LayerCache:
    """Returns a cache of zeros of shape [batch, slots, K/V heads, head size], sharded by batch and heads."""
    return LayerCache(*(jnp.zeros(shape, dtype, device=sharding.named(mesh, _AXES)) for _ in range(2)))


def extend(
    cache: LayerCache,
    q_BSNH: Float[Array, "B S N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    slot: Int[Array, ""],
    start_B: Int[Array, " B"],
    implementation: str,
) -> tuple[Float[Array, "B S N H"], LayerCache]:
    """Adds new tokens to the cache and computes their attention to themselves and all tokens before them.

    Args:
      cache: keys and values of the tokens before.
      q_BSNH: queries of the new tokens.
      k_BSKH: keys of the new tokens.
      v_BSKH: values of the new tokens.
      slot: slot of the first new token.
      start_B: first slot of each sequence.
      implementation: attention backend for several tokens. A single token only needs matrix-vector products.

    Returns:
      The result of the attention, and the extended cache.
    """

    def local(q, k, v, k_cache, v_cache, slot, start):
        k_cache, v_cache = (
            jax.lax.dynamic_update_slice_in_dim(c, x.astype(c.dtype), slot, axis=1)
            for c, x in ((k_cache, k), (v_cache, v))
        )
        one = q.shape[1] == 1
        backend = _attend_one if one else functools.partial(_attend_many, implementation=implementation)
        return backend(q, k_cache, v_cache, slot, start), k_cache, v_cache

    out, k, v = sharding.shard_map_batch_heads(
        local, q_BSNH, k_BSKH, v_BSKH, *cache, slot, start_B, out=(("batch", None, "heads", None), _AXES, _AXES)
    )
    return out, LayerCache(k, v)


def _attend_many(q_BSNH, k_BTKH, v_BTKH, slot, start_B, implementation):
    """Uses the attention backends. Positions mask the slots after a query; segments mask those before its sequence."""
    B, S = q_BSNH.shape[:2]
    queries_BS = jnp.broadcast_to(slot + jnp.arange(S), (B, S))
    keys_BT = jnp.broadcast_to(jnp.arange(k_BTKH.shape[1]), (B, k_BTKH.shape[1]))
    segments = tuple((x >= start_B[:, None]).astype(jnp.int32) for x in (queries_BS, keys_BT))
    return attention(
        q_BSNH, k_BTKH, v_BTKH, segment_ids=segments, q_positions=queries_BS, implementation=implementation
    )


def _attend_one(q_B1NH, k_BTKH, v_BTKH, slot, start_B):
    B, _, N, H = q_B1NH.shape
    K = k_BTKH.shape[2]
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    slots_T = jnp.arange(k_BTKH.shape[1])
    seen_BT = (slots_T <= slot) & (slots_T >= start_B[:, None])
    scores_BKGT = jnp.einsum("BKGH,BTKH->BKGT", q_BKGH, k_BTKH, preferred_element_type=jnp.float32)
    scores_BKGT = jnp.where(seen_BT[:, None, None], scores_BKGT * H**-0.5, -jnp.inf)
    weights_BKGT = jax.nn.softmax(scores_BKGT, axis=-1).astype(v_BTKH.dtype)
    out_BKGH = jnp.einsum("BKGT,BTKH->BKGH", weights_BKGT, v_BTKH, preferred_element_type=jnp.float32)
    return out_BKGH.astype(q_B1NH.dtype).reshape(q_B1NH.shape)
