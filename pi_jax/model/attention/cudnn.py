"""cuDNN's fused attention through `jax.nn.dot_product_attention`, for sequences with a single document."""

import jax
import jax.numpy as jnp

from pi_jax.model.attention import device
from pi_jax.model.attention.mask import Mask


def refuses(q_BSNH, k_BTKH, mask: Mask, return_lse: bool) -> str | None:
    """Why this backend cannot serve the call, or None if it can."""
    if device.platform() != "gpu":
        return f"runs on an NVIDIA GPU, not on a {device.platform().upper()}"
    if device.compute_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if not mask.one_document:
        return "does not isolate documents, so it takes no segment_ids"
    if not mask.in_order or q_BSNH.shape[1] != k_BTKH.shape[1]:
        return "is causal from the first token, so it takes no positions and needs as many queries as keys"
    if return_lse:
        return "rounds lse to the dtype of q and has no gradient for it, so it takes no return_lse"
    if q_BSNH.dtype == jnp.float32:
        return "takes bfloat16 and float16, not float32"
    if q_BSNH.shape[3] % 8 or q_BSNH.shape[3] > 128:
        return f"takes head sizes that are multiples of 8 up to 128, not {q_BSNH.shape[3]}"
    return None


def cudnn_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`; lse is None."""
    out = jax.nn.dot_product_attention(q_BSNH, k_BTKH, v_BTKH, scale=scale, is_causal=True, implementation="cudnn")
    return out, None
