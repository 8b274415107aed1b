"""cuDNN's fused attention by `jax.nn.dot_product_attention`: NVIDIA's own kernels, for rows of one document."""

import jax
import jax.numpy as jnp

from pi_jax.model.attention import device
from pi_jax.model.attention.mask import Mask


def refuses(q_BSNH, k_BTKH, mask: Mask, return_lse: bool) -> str | None:
    """What it cannot do of this call, or None."""
    if device.platform() != "gpu":
        return f"runs on an NVIDIA GPU, not on a {device.platform().upper()}"
    if device.compute_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if not mask.one_document:
        return "knows no documents and would let them read each other, so it takes no segment_ids"
    if not mask.in_order or q_BSNH.shape[1] != k_BTKH.shape[1]:
        return "is causal from the first token on, so it takes no positions, and as many queries as keys"
    if return_lse:
        return "rounds lse to the dtype of q and has no gradient of it, so it takes no return_lse"
    if q_BSNH.dtype == jnp.float32:
        return "takes bfloat16 and float16, not float32"
    if q_BSNH.shape[3] % 8 or q_BSNH.shape[3] > 128:
        return f"takes head sizes that are multiples of 8 up to 128, not {q_BSNH.shape[3]}"
    return None


def cudnn_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`; lse is None."""
    out = jax.nn.dot_product_attention(q_BSNH, k_BTKH, v_BTKH, scale=scale, is_causal=True, implementation="cudnn")
    return out, None
