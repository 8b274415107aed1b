"""Flash attention in plain XLA: memory linear in length, on any platform. The default on a CPU.

Queries and keys are cut into blocks; the softmax is accumulated over key blocks (Milakov & Gimelshein 2018; Dao et al.
2022), and the backward pass recomputes the weights from `lse`. Pairs of blocks in which no query attends to any key,
because of causality or different documents, are never computed, forward or backward: each block has a list of the
blocks on the other side that it overlaps, so packed documents cost as much as they would separately.

Shapes: B batch, S queries, T keys, N query heads, K key/value heads, H head size; I query blocks, J key blocks of Q
keys. The queries of a block and the heads of a group share one axis, R, so that K and V are never repeated.
"""

import jax
import jax.numpy as jnp

from pi_jax.model.attention import device
from pi_jax.model.attention.custom_vjp import flash_attention
from pi_jax.model.attention.mask import Mask

BLOCK = 512
"""Tokens per block of queries and of keys: the fastest of 128, 256, 512 and 1024 on a CPU, forward and backward."""


def chunked_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`."""
    B, S, N, H = q_BSNH.shape
    T, K = k_BTKH.shape[1:3]
    group, P, Q = N // K, min(BLOCK, S), min(BLOCK, T)
    q_IBKRH = (
        _blocks(q_BSNH, P).reshape(-1, B, P, K, group, H).transpose(0, 1, 3, 2, 4, 5).reshape(-1, B, K, P * group, H)
    )
    k_JBKQH, v_JBKQH = (_blocks(x, Q).swapaxes(2, 3) for x in (k_BTKH, v_BTKH))
    mask = mask.padded(P, Q)
    rows = [jnp.repeat(_blocks(x, P), group, axis=-1) for x in (mask.q_order_BS, mask.q_segments_BS)]
    columns = [_blocks(x, Q) for x in (mask.kv_order_BT, mask.kv_segments_BT)]
    out, lse = _attend(scale, q_IBKRH, k_JBKQH, v_JBKQH, (rows, columns, _overlaps(mask, P, Q)))

    def unblock(x):
        x = x.reshape(-1, B, K, P, group, *x.shape[4:]).transpose(1, 0, 3, 2, 4, *range(5, x.ndim + 1))
        return x.reshape(B, -1, N, *x.shape[5:])[:, :S]

    return unblock(out), unblock(lse)


def _blocks(x, size):
    """[B, tokens, ...] -> [blocks, B, size, ...], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _overlaps(mask: Mask, q_block: int, kv_block: int):
    """The blocks that overlap: for each block of queries and each block of keys, (partner blocks, their number)."""
    overlap_IJ = jnp.any(mask.block_pairs(q_block, kv_block)[0], axis=0)

    def lists(overlap):
        return jnp.argsort(~overlap, axis=-1, stable=True), jnp.sum(overlap, axis=-1)

    return lists(overlap_IJ), lists(overlap_IJ.T)


def _bias(row, column):
    """0 where a query attends to a key and -inf elsewhere, [B, 1, R, Q]."""
    (q_order, q_segments), (kv_order, kv_segments) = row, column
    causal = kv_order[:, None, :] <= q_order[:, :, None]
    same = kv_segments[:, None, :] == q_segments[:, :, None]
    return jnp.where(causal & same, 0.0, -jnp.inf)[:, None]


def _dot(equation, x, y):
    if device.platform() == "cpu":
        # XLA's CPU backend multiplies half precision in float32 anyway, and fails for some shapes: "Unsupported
        # element type for DotThunk::Execute: BF16 x BF16 = F32" (jax 0.10.2).
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _at(tree, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _forward(scale, q, k, v, mask):
    rows, columns, ((partners_IJ, count_I), _) = mask

    def query_block(_, block):
        q_i, row, partners, count = block

        def key_block(n, carry):
            l_BKR, m_BKR, acc = carry
            k_j, v_j, column = _at((k, v, columns), partners[n])
            scores = _dot("BKRH,BKQH->BKRQ", q_i, k_j) * scale + _bias(row, column)
            new_m_BKR = jnp.maximum(m_BKR, jnp.max(scores, axis=-1))
            # Until a query has attended to a key, its maximum is -inf: subtract 0, so that exp(-inf) = 0, not NaN.
            shift = jnp.where(new_m_BKR == -jnp.inf, 0.0, new_m_BKR)
            weights = jnp.exp(scores - shift[..., None])
            alpha_BKR = jnp.exp(m_BKR - shift)
            acc = acc * alpha_BKR[..., None] + _dot("BKRQ,BKQH->BKRH", weights.astype(v_j.dtype), v_j)
            return l_BKR * alpha_BKR + jnp.sum(weights, axis=-1), new_m_BKR, acc

        shape = q_i.shape[:-1]
        start = (jnp.zeros(shape), jnp.full(shape, -jnp.inf), jnp.zeros(q_i.shape, jnp.float32))
        l_BKR, m_BKR, acc = jax.lax.fori_loop(0, count, key_block, start)
        some = l_BKR > 0
        out = acc / jnp.where(some, l_BKR, 1.0)[..., None]
        lse = jnp.where(some, m_BKR + jnp.log(jnp.where(some, l_BKR, 1.0)), -jnp.inf)
        return None, (out.astype(q_i.dtype), lse)

    _, (out, lse) = jax.lax.scan(query_block, None, (q, rows, partners_IJ, count_I))
    return out, lse


def _backward(scale, q, k, v, mask, lse, d_out, delta):
    rows, columns, (_, (partners_JI, count_J)) = mask

    def key_block(d_q, block):
        k_j, v_j, column, partners, count = block
        k_transposed = k_j.swapaxes(-1, -2)

        def query_block(n, carry):
            d_q, d_k, d_v = carry
            i = partners[n]
            q_i, d_out_i, lse_i, delta_i, row = _at((q, d_out, lse, delta, rows), i)
            # Keys first, [Q, R], and d_q transposed, [H, R], so that no product transposes the large weights.
            bias_QR = _bias(row, column).swapaxes(-1, -2)
            scores_QR = _dot("BKQH,BKRH->BKQR", k_j, q_i) * scale + bias_QR
            weights_QR = jnp.exp(scores_QR - lse_i[..., None, :])
            d_v += _dot("BKQR,BKRH->BKQH", weights_QR.astype(d_out_i.dtype), d_out_i)
            d_weights_QR = _dot("BKQH,BKRH->BKQR", v_j, d_out_i)
            d_scores_QR = (weights_QR * (d_weights_QR - delta_i[..., None, :]) * scale).astype(q_i.dtype)
            d_k += _dot("BKQR,BKRH->BKQH", d_scores_QR, q_i)
            d_q_i = _at(d_q, i) + _dot("BKHQ,BKQR->BKHR", k_transposed, d_scores_QR)
            return jax.lax.dynamic_update_index_in_dim(d_q, d_q_i, i, 0), d_k, d_v

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(0, count, query_block, (d_q, zeros, zeros))
        return d_q, (d_k, d_v)

    start = jnp.zeros(q.swapaxes(-1, -2).shape, jnp.float32)
    d_q, (d_k, d_v) = jax.lax.scan(key_block, start, (k, v, columns, partners_JI, count_J))
    return d_q.swapaxes(-1, -2).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_attend = flash_attention(_forward, _backward)
