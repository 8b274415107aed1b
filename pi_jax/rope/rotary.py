"""Turning queries and keys by their positions.

Shapes: B batch, S sequence, N heads, H head size, R = H/2 rotated pairs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pi_jax.rope.scaling import Length, Scaling


def cos_sin(
    positions_BS: Num[Array, "B S"], head_dim: int, scaling: Scaling, length: Length = None
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """cos and sin of every position and rotated pair, float32.

    Two kinds, `Dynamic` and `LongRope`, turn at a speed that depends on the length of the sequence. As in transformers
    it is the largest position of the call plus one, over the whole batch, padding included. With a KV cache this has a
    consequence, which transformers shares and servers rely on: cached keys were rotated when they came in and keep
    those phases, so that in a decoding that crosses into a new length old keys and new queries turn at different
    speeds, and logits differ from one pass over the whole text. The other kinds do not have this problem.

    Args:
      positions_BS: RoPE positions before interpolation; integers or fractions.
      head_dim: H.
      scaling: how the phases are scaled.
      length: tokens in the sequence, an integer or a traced scalar, where it is not the largest position plus one.
    """
    if length is None:
        length = jnp.max(positions_BS) + 1
    inv_freq_R = jnp.asarray(scaling.inverse_frequencies(head_dim, length))
    # A broadcast multiply, never a dot: a float32 dot is TF32 on NVIDIA and bfloat16 on TPU by default.
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
    """Queries or keys turned by their (interpolated) positions. A model with many layers calls `cos_sin` once."""
    return apply_rotary(x_BSNH, *cos_sin(positions_BS, x_BSNH.shape[-1], scaling))
