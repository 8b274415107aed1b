"""Flash attention for TPUs: JAX's own Pallas kernel, `splash_attention`, with its two separate backward kernels.

The fused backward kernel is faster on short sequences, but it stores one dq per block of keys: 4.1 GiB for one sequence
of 32k tokens and 8 heads, where the separate kernels need 0.25 GiB. The causal structure is known at trace time, so
blocks above the diagonal are never visited; documents are masked within blocks.

Shapes: B batch, S queries, T keys, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pi_jax.model.attention import device
from pi_jax.model.attention.custom_vjp import SAVED_NAME
from pi_jax.model.attention.mask import Mask

BLOCK = 512
"""Tokens per block of queries and of keys; with 4096 the kernel does not fit into the chip's vector memory."""
_LANES = 128


def refuses(q_BSNH, k_BTKH, mask: Mask, return_lse: bool) -> str | None:
    """Why this backend cannot serve the call, or None if it can."""
    if device.platform() == "gpu":
        return "runs on a TPU (and in interpret mode on a CPU), not on a GPU"
    if not mask.in_order:
        return "needs the causal mask at trace time, so it takes no q_positions or kv_positions"
    if return_lse:
        return "has no gradient for lse, so it takes no return_lse"
    if q_BSNH.dtype == jnp.float16:
        return "takes float32 and bfloat16, because TPUs do not compute in float16"
    return None


def splash_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`; lse is None. On a CPU the kernel runs in interpret mode, which is correct but slow."""
    S, T, N, H = q_BSNH.shape[1], k_BTKH.shape[1], q_BSNH.shape[2], q_BSNH.shape[3]
    block = min(BLOCK, _LANES * -(-max(S, T) // _LANES))
    # Padding comes after all other tokens: no real query attends to it, and its output is sliced off.
    mask = mask.padded(block, block)
    width = 64 if H <= 64 else _LANES * -(-H // _LANES)

    def prepare(x):
        padding = ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, width - H))
        return jnp.swapaxes(jnp.pad(x, padding), 1, 2)

    # The kernel does not scale. In bfloat16 the additional rounding is no larger than that of the products.
    q, k, v = prepare((q_BSNH * np.float32(scale)).astype(q_BSNH.dtype)), prepare(k_BTKH), prepare(v_BTKH)
    attend = _kernel(N, q.shape[2], k.shape[2], block, device.platform() == "cpu")
    if mask.one_document:
        out = jax.vmap(attend)(q, k, v)
    else:
        out = jax.vmap(attend)(q, k, v, kernel.SegmentIds(mask.q_segments_BS, mask.kv_segments_BT))
    return jnp.swapaxes(out, 1, 2)[:, :S, :, :H], None


def _kernel(heads: int, q_len: int, kv_len: int, block: int, interpret: bool):
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    return kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((q_len, kv_len))] * heads),
        block_sizes=kernel.BlockSizes(**sizes, use_fused_bwd_kernel=False),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
