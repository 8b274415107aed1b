"""The contract of our own flash-attention backends: what is kept for the backward pass, and under which name.

A backend gives a forward and a backward function; kept are q, k, v, the mask, the output and the log of the softmax's
denominator (`lse`), from which the weights are recomputed (Dao et al. 2022). Since every backend keeps the same, they
can be swapped, and a remat policy can save what bears `SAVED_NAME` to spare the second forward pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED_NAME = "attention"
"""Of out and lse, for `jax.checkpoint_policies.save_only_these_names`."""


def flash_attention(forward: Callable, backward: Callable) -> Callable:
    """A differentiable function (scale, q, k, v, mask) -> (out, lse).

    Args:
      forward: (scale, q, k, v, mask) -> (out, lse), lse = -inf where a query sees no key.
      backward: (scale, q, k, v, mask, lse, d_out, delta) -> (d_q, d_k, d_v), with lse = 0 where it was -inf, and
        delta = sum(d_out * out) - d_lse over the head, so that d scores = weights * (d_out . v - delta).
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(scale, q, k, v, mask):
        return forward(scale, q, k, v, mask)

    def forward_rule(scale, q, k, v, mask):
        out, lse = (checkpoint_name(x, SAVED_NAME) for x in forward(scale, q, k, v, mask))
        return (out, lse), (q, k, v, mask, out, lse)

    def backward_rule(scale, residuals, cotangents):
        q, k, v, mask, out, lse = residuals
        d_out, d_lse = cotangents
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        return *backward(scale, q, k, v, mask, lse, d_out, delta), None

    attend.defvjp(forward_rule, backward_rule)
    return attend
