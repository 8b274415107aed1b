"""Attention on a mesh, inside `jax.shard_map`."""

import jax
import jax.numpy as jnp

from pi_jax.parallel.sharding import GATHERED, RULES, in_mesh


def _in_order(x_BT):
    """Undoes the zigzag order of full sequences: even chunks ascend, odd ones descend.

    Uses reshapes instead of a gather, whose gradient is slow.
    """
    shards = jax.sharding.get_abstract_mesh().shape[RULES.sequence]
    pairs = x_BT.reshape(x_BT.shape[0], shards, 2, -1, *x_BT.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], axis=1)], axis=1).reshape(x_BT.shape)


def attend(attention, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, zigzag=False):
    """Calls `attention(q, k, v, segment_ids=[, q_positions=])` on the sequences, heads and queries of each device.

    Sequences and heads are independent. If the sequence axis is sharded, every device needs the keys and values before
    its queries: keys and values are gathered over the context axis, and the positions of the queries are passed along.
    """
    if not in_mesh():
        return attention(q_BSNH, k_BSKH, v_BSKH, segment_ids=segment_ids_BS)
    split = jax.sharding.get_abstract_mesh().shape[RULES.sequence] > 1
    gathered = GATHERED.spec(("batch", None, "kv_heads", None))
    k_BSKH, v_BSKH = (jax.reshard(x, gathered) for x in (k_BSKH, v_BSKH))
    segments = ()
    if segment_ids_BS is not None:
        segments = (segment_ids_BS, jax.reshard(segment_ids_BS, GATHERED.spec(("batch", None))))

    def local(q, k, v, *segments):
        if not split:  # without positions, so that backends that take none can be used
            return attention(q, k, v, segment_ids=segments or None)
        shard, length = jax.lax.axis_index(RULES.sequence), q.shape[1]
        order = shard * length + jnp.arange(length)
        if zigzag:
            k, v, *segments = (*map(_in_order, (k, v)), *segments[:1], *map(_in_order, segments[1:]))
            half, last = length // 2, 2 * k.shape[1] // length - 1
            order = jnp.arange(half) + half * jnp.stack([shard, last - shard])[:, None]
        q_positions = jnp.broadcast_to(order.reshape(-1), q.shape[:2])
        return attention(q, k, v, segment_ids=tuple(segments) or None, q_positions=q_positions)

    out_specs = jax.typeof(q_BSNH).sharding.spec
    return jax.shard_map(local, out_specs=out_specs, check_vma=False)(q_BSNH, k_BSKH, v_BSKH, *segments)
