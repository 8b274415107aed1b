"""The contract of our own flash-attention backends: the residuals of the backward pass and their checkpoint name.

A backend provides a forward and a backward function. The residuals are q, k, v, the mask, the output and the log of the
softmax denominator (`lse`), from which the attention weights are recomputed (Dao et al. 2022). All backends save the
same residuals, so they are interchangeable, and a remat policy can save the arrays named `SAVED_NAME` to avoid a second
forward pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED_NAME = "attention"
"""Checkpoint name of out and lse, for `jax.checkpoint_policies.save_only_these_names`."""


def flash_attention(forward: Callable, backward: Callable) -> Callable:
    """A differentiable function (scale, q, k, v, mask) -> (out, lse).

    Args:
      forward: (scale, q, k, v, mask) -> (out, lse), lse = -inf where a query attends to no key.
      backward: (scale, q, k, v, mask, lse, d_out, delta) -> (d_q, d_k, d_v), with lse = 0 where it was -inf, and
        delta = sum(d_out * out) - d_lse, summed over the head, so that d_scores = weights * (d_out . v - delta).
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
