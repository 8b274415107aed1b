"""Reference implementation for the tests: textbook attention in float32, with all scores in memory at once."""

import jax.numpy as jnp

from pi_jax.model.attention.mask import Mask


def reference_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`. O(S * T) memory: for tests and short sequences."""
    B, S, N, H = q_BSNH.shape
    K = k_BTKH.shape[2]
    q_BSKGH = q_BSNH.astype(jnp.float32).reshape(B, S, K, N // K, H)
    scores_BKGST = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH.astype(jnp.float32), precision="highest") * scale
    visible = mask.visible()[:, None, None]
    # A query that attends to no key has maximum -inf; replacing it by 0 keeps exp and its gradient finite.
    m_BKGS = jnp.max(scores_BKGST, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    m_BKGS = jnp.where(jnp.isfinite(m_BKGS), m_BKGS, 0.0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores_BKGST - m_BKGS, 0.0)), 0.0)
    l_BKGS = jnp.sum(weights, axis=-1, keepdims=True)
    safe_l_BKGS = jnp.where(l_BKGS > 0, l_BKGS, 1.0)
    out = jnp.einsum("BKGST,BTKH->BSKGH", weights / safe_l_BKGS, v_BTKH.astype(jnp.float32), precision="highest")
    lse = jnp.where(l_BKGS > 0, m_BKGS + jnp.log(safe_l_BKGS), -jnp.inf)[..., 0]
    lse_BSN = jnp.moveaxis(lse, 3, 1).reshape(B, S, N)
    return out.reshape(B, S, N, H).astype(q_BSNH.dtype), lse_BSN
