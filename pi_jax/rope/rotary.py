"""Rotates queries and keys by their positions.

Shapes: B batch, S sequence, N heads, H head size, R = H/2 rotated pairs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pi_jax.rope.scaling import Length, Scaling


def cos_sin(
    positions_BS: Num[Array, "B S"], head_dim: int, scaling: Scaling, length: Length = None
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """Returns cos and sin of each position and rotated pair, float32.

    The frequencies of `Dynamic` and `LongRope` depend on the length of the sequence. As in transformers, the length is
    the largest position of the call plus one, over the whole batch, including padding. This matters with a KV cache:
    cached keys keep the phases with which they were rotated, so when the length grows during decoding, old keys and new
    queries have different frequencies, and logits differ from those of one pass over the complete text. transformers
    has the same property, and servers rely on it. The other kinds are not affected.

    Args:
      positions_BS: RoPE positions before interpolation; integers or fractions.
      head_dim: H.
      scaling: how the phases are scaled.
      length: length of the sequence in tokens, an integer or a traced scalar; None: the largest position plus one.
    """
    if length is None:
        length = jnp.max(positions_BS) + 1
    inv_freq_R = jnp.asarray(scaling.inverse_frequencies(head_dim, length))
    # Use a broadcast multiply instead of a dot: by default, a float32 dot is TF32 on NVIDIA and bfloat16 on TPU.
    angles_BSR = positions_BS.astype(jnp.float32)[..., None] * inv_freq_R
    return jnp.cos(angles_BSR) * scaling.attention_scaling, jnp.sin(angles_BSR) * scaling.attention_scaling


def apply_rotary(
    x_BSNH: Float[Array, "B S N H"], cos_BSR: Float[Array, "B S R"], sin_BSR: Float[Array, "B S R"]
) -> Float[Array, "B S N H"]:
    """Rotates channel pairs (i, i + H/2) in float32 and rounds once to the dtype of `x_BSNH`."""
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BSR[:, :, None, :], sin_BSR[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BSNH.dtype)


def rotate(
    x_BSNH: Float[Array, "B S N H"], positions_BS: Num[Array, "B S"], scaling: Scaling
) -> Float[Array, "B S N H"]:
    """Rotates queries or keys by their (interpolated) positions. A model calls `cos_sin` once for all its layers."""
    return apply_rotary(x_BSNH, *cos_sin(positions_BS, x_BSNH.shape[-1], scaling))
