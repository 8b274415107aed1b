"""Drawing tokens from logits: temperature and nucleus (Holtzman et al. 2020).

Shapes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi_jax.parallel import sharding


def draw(
    key: jax.Array, logits_BV: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, " B"]:
    """A token for each row; a row's draw depends on the key, its index and its logits alone.

    Args:
      key: of this step.
      logits_BV: float32.
      temperature: logits are divided by it; above 0.
      top_p: draw from the smallest set of likeliest tokens that has this probability.
    """
    rows_B = sharding.gather_sequence(jnp.arange(len(logits_BV)))  # split as the rows are

    def one(row, logits_V):
        return jax.random.categorical(jax.random.fold_in(key, row), logits_V)

    return jax.vmap(one)(rows_B, top_p_filter(logits_BV / temperature, top_p)).astype(jnp.int32)


def top_p_filter(logits_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Logits with -inf for all but the smallest set of likeliest tokens whose probability reaches `top_p` (nucleus
    sampling, Holtzman et al. 2020)."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    # The least likely token that stays: the last one before which the probability has not been reached.
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
