"""Samples tokens from logits, with temperature and nucleus sampling (Holtzman et al. 2020).

Shapes: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi_jax.parallel import sharding


def sample(
    key: jax.Array, logits_BV: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, " B"]:
    """Samples a token for each sequence. It depends only on the key, the index of the sequence and its logits.

    Args:
      key: random key of this step.
      logits_BV: logits, float32.
      temperature: divisor of the logits; greater than 0.
      top_p: sample from the smallest set of most likely tokens whose total probability reaches this value.
    """
    index_B = sharding.gather_sequence(jnp.arange(len(logits_BV)))  # sharded in the same way as the batch

    def one(index, logits_V):
        return jax.random.categorical(jax.random.fold_in(key, index), logits_V)

    return jax.vmap(one)(index_B, top_p_filter(logits_BV / temperature, top_p)).astype(jnp.int32)


def top_p_filter(logits_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Sets the logits of all tokens to -inf except the nucleus (Holtzman et al. 2020), the smallest set of most likely
    tokens whose total probability reaches `top_p`."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    # The least likely token in the nucleus is the last one whose predecessors do not reach the probability.
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
