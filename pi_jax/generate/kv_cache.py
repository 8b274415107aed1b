"""The key/value cache of generation: static shapes, a slot a token, one pair of arrays a layer.

A row's tokens lie in consecutive slots, in order. Rows of unequal length end in the same slot, so that one slot index
serves all of them: the shorter ones begin later, and what lies before a row's beginning is no part of it. Keys are kept
as they were rotated (docs/rope.md). Only K/V heads are stored: grouped queries share them.

Shapes: B rows, T slots, S new tokens, N query heads, K key/value heads, G = N/K, H head size.
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
    """Zeros of [rows, slots, K/V heads, head size]: rows and heads split over the mesh."""
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
    """Attention of new tokens to themselves and all before them, and the cache with them in it.

    Args:
      cache: what came before.
      q_BSNH: queries of the new tokens.
      k_BSKH: their keys.
      v_BSKH: their values.
      slot: of the first of them.
      start_B: first slot of each row.
      implementation: backend for several tokens; a single one needs products of a matrix and a vector only.
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
    """The hot path: slots after a query's own are out of its sight by position, those before its row by segment."""
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
