"""Who sees whom: causal by order, isolated by document; and which blocks of scores that leaves to compute.

Shapes: B batch, S queries, T keys, I query blocks, J key blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Padding inside a backend: a query before every key and a key after every query, so neither sees or is seen.
BEFORE_ALL = jnp.iinfo(jnp.int32).min
AFTER_ALL = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Query i sees key j if kv_order[j] <= q_order[i] and their documents (segments) are the same."""

    q_order_BS: Int[Array, "B S"]
    q_segments_BS: Int[Array, "B S"]
    kv_order_BT: Int[Array, "B T"]
    kv_segments_BT: Int[Array, "B T"]
    in_order: bool = dataclasses.field(metadata={"static": True})
    """Queries and keys both stand in order, 0, 1, 2 ...: causality is known while tracing."""
    one_document: bool = dataclasses.field(metadata={"static": True})
    """All segments are the same: known while tracing."""

    def visible(self) -> Bool[Array, "B S T"]:
        """The mask itself. O(S * T) memory."""
        causal = self.kv_order_BT[:, None, :] <= self.q_order_BS[:, :, None]
        return causal & (self.kv_segments_BT[:, None, :] == self.q_segments_BS[:, :, None])

    def padded(self, q_block: int, kv_block: int) -> "Mask":
        """With queries and keys added that see and are seen by none, up to whole blocks."""
        q_extra, kv_extra = -self.q_order_BS.shape[1] % q_block, -self.kv_order_BT.shape[1] % kv_block

        def pad(x, extra, fill):
            return jnp.pad(x, ((0, 0), (0, extra)), constant_values=fill)

        return dataclasses.replace(
            self,
            q_order_BS=pad(self.q_order_BS, q_extra, BEFORE_ALL),
            q_segments_BS=pad(self.q_segments_BS, q_extra, 0),
            kv_order_BT=pad(self.kv_order_BT, kv_extra, AFTER_ALL),
            kv_segments_BT=pad(self.kv_segments_BT, kv_extra, 0),
        )

    def block_pairs(self, q_block: int, kv_block: int) -> tuple[Bool[Array, "B I J"], Bool[Array, "B I J"]]:
        """Which blocks meet, and which see each other wholly; lengths must be whole blocks.

        From the least and greatest order and segment of each block, so a pair may be listed as meeting although no
        query sees a key (ranges overlap, segments differ): never the other way round.
        """
        q_first, q_last, q_low, q_high = (
            x[:, :, None] for x in _spans(self.q_order_BS, self.q_segments_BS, BEFORE_ALL, q_block)
        )
        kv_first, kv_last, kv_low, kv_high = (
            x[:, None, :] for x in _spans(self.kv_order_BT, self.kv_segments_BT, AFTER_ALL, kv_block)
        )
        meet = (kv_first <= q_last) & (q_low <= kv_high) & (kv_low <= q_high)
        one_segment = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
        return meet, (kv_last <= q_first) & one_segment

    def block_ranges(self, q_block: int, kv_block: int) -> tuple[Int[Array, "B I 4"], Int[Array, "B J 4"]]:
        """The key blocks that each query block has to visit, and the query blocks for each key block.

        Each is four numbers, first <= whole_first <= whole_last <= last: outside [first, last) nothing is visible,
        within [whole_first, whole_last) everything. In a row of packed documents the range is that of the document.
        """
        meet, whole = self.block_pairs(q_block, kv_block)
        turned = (jnp.swapaxes(x, 1, 2) for x in (meet, whole))
        return _ranges(meet, whole), _ranges(*turned)


def _spans(order, segments, padding, block):
    """Least and greatest order of each block, and least and greatest segment of what is no padding in it."""
    order, segments = (x.reshape(x.shape[0], -1, block) for x in (order, segments))
    real = order != padding
    low = jnp.min(jnp.where(real, segments, AFTER_ALL), axis=-1)
    high = jnp.max(jnp.where(real, segments, BEFORE_ALL), axis=-1)
    return jnp.min(order, axis=-1), jnp.max(order, axis=-1), low, high


def _ranges(meet, whole):
    count = meet.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    last = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(meet, index, count), axis=-1), last)
    whole_first = jnp.min(jnp.where(whole, index, count), axis=-1)
    after = ~whole & (index > whole_first[..., None])
    whole_last = jnp.min(jnp.where(after, index, count), axis=-1)
    return jnp.stack([first, jnp.minimum(whole_first, last), jnp.minimum(whole_last, last), last], axis=-1)
