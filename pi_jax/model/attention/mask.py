"""The attention mask, causal by order and isolated by document, and the blocks of scores that it leaves to compute.

Shapes: B batch, S queries, T keys, I query blocks, J key blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Padding inside a backend: padded queries come before every key and padded keys after every query, so that padding
# never takes part in attention.
BEFORE_ALL = jnp.iinfo(jnp.int32).min
AFTER_ALL = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Query i attends to key j if kv_order[j] <= q_order[i] and both are in the same document (segment)."""

    q_order_BS: Int[Array, "B S"]
    q_segments_BS: Int[Array, "B S"]
    kv_order_BT: Int[Array, "B T"]
    kv_segments_BT: Int[Array, "B T"]
    in_order: bool = dataclasses.field(metadata={"static": True})
    """Queries and keys are both in the order 0, 1, 2 ...: the causal structure is known at trace time."""
    one_document: bool = dataclasses.field(metadata={"static": True})
    """All segments are the same, which is known at trace time."""

    def visible(self) -> Bool[Array, "B S T"]:
        """The dense mask. O(S * T) memory."""
        causal = self.kv_order_BT[:, None, :] <= self.q_order_BS[:, :, None]
        return causal & (self.kv_segments_BT[:, None, :] == self.q_segments_BS[:, :, None])

    def padded(self, q_block: int, kv_block: int) -> "Mask":
        """The mask padded to whole blocks; padded queries and keys do not take part in attention."""
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
        """Which pairs of blocks overlap and which are full; lengths must be multiples of the block sizes.

        In a full pair every query attends to every key. A pair that overlaps but is not full is partial. The result is
        computed from the minimum and maximum order and segment of each block. It is conservative: a pair may count as
        overlapping although no query attends to a key (the ranges overlap, but the segments differ), never the reverse.
        """
        q_first, q_last, q_low, q_high = (
            x[:, :, None] for x in _spans(self.q_order_BS, self.q_segments_BS, BEFORE_ALL, q_block)
        )
        kv_first, kv_last, kv_low, kv_high = (
            x[:, None, :] for x in _spans(self.kv_order_BT, self.kv_segments_BT, AFTER_ALL, kv_block)
        )
        overlap = (kv_first <= q_last) & (q_low <= kv_high) & (kv_low <= q_high)
        one_segment = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
        return overlap, (kv_last <= q_first) & one_segment

    def block_ranges(self, q_block: int, kv_block: int) -> tuple[Int[Array, "B I 4"], Int[Array, "B J 4"]]:
        """The key blocks that each query block has to visit, and the query blocks for each key block.

        Each range is four numbers, first <= full_first <= full_last <= last: blocks outside [first, last) are masked
        completely, blocks in [full_first, full_last) are full, and the rest are partial. In a sequence of packed
        documents the range covers the document.
        """
        overlap, full = self.block_pairs(q_block, kv_block)
        transposed = (jnp.swapaxes(x, 1, 2) for x in (overlap, full))
        return _ranges(overlap, full), _ranges(*transposed)


def _spans(order, segments, padding, block):
    """Minimum and maximum order of each block, and minimum and maximum segment of its tokens other than padding."""
    order, segments = (x.reshape(x.shape[0], -1, block) for x in (order, segments))
    real = order != padding
    low = jnp.min(jnp.where(real, segments, AFTER_ALL), axis=-1)
    high = jnp.max(jnp.where(real, segments, BEFORE_ALL), axis=-1)
    return jnp.min(order, axis=-1), jnp.max(order, axis=-1), low, high


def _ranges(overlap, full):
    count = overlap.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    last = jnp.max(jnp.where(overlap, index + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(overlap, index, count), axis=-1), last)
    full_first = jnp.min(jnp.where(full, index, count), axis=-1)
    after = ~full & (index > full_first[..., None])
    full_last = jnp.min(jnp.where(after, index, count), axis=-1)
    return jnp.stack([first, jnp.minimum(full_first, last), jnp.minimum(full_last, last), last], axis=-1)
