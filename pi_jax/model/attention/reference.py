"""The judge: attention as the textbook writes it, float32, every score in memory at once."""

import jax.numpy as jnp

from pi_jax.model.attention.mask import Mask


def reference_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`. O(S * T) memory: for tests and short sequences."""
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.astype(jnp.float32).reshape(B, S, K, N // K, H)
    scores_BKGST = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH.astype(jnp.float32), precision="highest") * scale
    visible = mask.visible()[:, None, None]
    # A row that sees no key has maximum -inf; 0 in its place keeps exp and its gradient finite.
    top = jnp.max(scores_BKGST, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores_BKGST - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe_total = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("BKGST,BTKH->BSKGH", weights / safe_total, v_BTKH.astype(jnp.float32), precision="highest")
    lse = jnp.where(total > 0, top + jnp.log(safe_total), -jnp.inf)[..., 0]
    lse_BSN = jnp.moveaxis(lse, 3, 1).reshape(B, S, N)
    return out.reshape(B, S, N, H).astype(q_BSNH.dtype), lse_BSN
