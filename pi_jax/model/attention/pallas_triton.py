"""Flash attention for NVIDIA GPUs from Ampere (sm80) on, in Pallas, compiled by Triton: forward, dq and dk/dv kernels.

FlashAttention-2 (Dao 2023), extended for packed sequences of long documents:

- In all three kernels, blocks of scores outside a query's document or after the query are neither computed nor read:
  each program visits one range of blocks (`Mask.block_ranges`), so packed documents cost as much as they would
  separately.
- Most blocks are full and run in a loop without a mask; only partial blocks, on the diagonal or at a document boundary,
  compare orders and segments. Orders and segments may be any integers, so a shard of the queries, in any order, can
  attend to all keys; a range may then contain blocks that are masked completely, which only costs time.
- Base-2 softmax: the factor log2(e) is part of the scale, and exp2 is one instruction.
- Grouped heads: K and V are never repeated, and dk and dv are written once, summed over the heads of the group.

No array of size S x T exists in memory, forward or backward. The backward pass uses out and lse (`custom_vjp`). As in
the paper, m is the running maximum, l the running sum, and alpha the factor that rescales both to a new maximum.

Shapes: B batch, S queries, T keys, N query heads, K key/value heads, G = N/K, H head size; Q and P are the sizes of a
block of queries and of keys. Triton requires powers of two: other head sizes are padded with zeros when loaded.
"""

import dataclasses
import functools
import math
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pi_jax.model.attention import device
from pi_jax.model.attention.custom_vjp import flash_attention
from pi_jax.model.attention.mask import Mask

# JAX 0.11 warns at every lowering that this backend will be removed at some point; see docs/attention.md.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

_LOG2_E = math.log2(math.e)
_WIDEST = 256


@dataclasses.dataclass(frozen=True)
class Tile:
    """Block sizes and compilation parameters of one kernel."""

    queries: int
    """Queries per block of scores; a power of two, at least 16."""
    keys: int
    """Keys per block of scores; a power of two, at least 16."""
    warps: int
    """Warps (32 threads each) per program."""
    stages: int
    """Pipeline stages: blocks in flight, each in shared memory, while one is computed."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    forward: Tile
    dq: Tile
    dkv: Tile


# Shared memory per program: 163 KiB on sm80, 227 KiB on sm90 and sm100, 99 KiB on sm86, sm89 and sm120. Sources:
#   [t] the best of tokamax's autotuning records for this kind of kernel (H100 and A100, bfloat16, causal, 16k tokens)
#   [c] compiled: of the sizes that fit, one with no or few spilled registers (`tests/test_attention_compiled.py`
#       reports how many); not timed
_HOPPER = {  # padded head size -> tiles; also for newer chips with as much shared memory
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),  # [t]
    128: Tiles(Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # [t]
    256: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 2)),  # [c]
}
_A100 = {
    64: Tiles(Tile(128, 64, 4, 4), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),  # [t] forward, [c] backward
    128: Tiles(Tile(128, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),  # [t] forward, [c] backward
    256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),  # [c]
}
_SMALL = {  # chips with less shared memory, such as consumer GPUs
    64: Tiles(Tile(128, 32, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),  # [c]
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),  # [c]
    256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),  # [c]
}
_FLOAT32 = {  # for tests and small models; [c]
    64: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def tiles(head_dim: int, dtype, capability: tuple[int, int]) -> Tiles:
    """The block sizes for a head size, dtype and compute capability."""
    match capability:
        case _ if jnp.dtype(dtype) == jnp.float32:
            table = _FLOAT32
        case (8, 0) | (8, 7):
            table = _A100
        case (9, _) | (10, _):
            table = _HOPPER
        case _:
            table = _SMALL
    return table[max(64, _width(head_dim))]


def refuses(q_BSNH, k_BTKH, mask: Mask, return_lse: bool) -> str | None:
    """Why this backend cannot serve the call, or None if it can."""
    if device.platform() == "tpu":
        return "runs on an NVIDIA GPU (and in interpret mode on a CPU), not on a TPU"
    if device.platform() == "gpu" and device.compute_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if q_BSNH.shape[3] > _WIDEST:
        return f"takes head sizes up to {_WIDEST}, not {q_BSNH.shape[3]}"
    return None


def pallas_triton_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`. On a CPU the kernels run in interpret mode, which is correct but slow."""
    S = q_BSNH.shape[1]
    best = tiles(q_BSNH.shape[-1], q_BSNH.dtype, device.compute_capability())
    # Short sequences use small blocks; all sequences are padded to whole blocks of every kernel.
    best = Tiles(*(_fitting(getattr(best, f.name), S, k_BTKH.shape[1]) for f in dataclasses.fields(best)))
    every = [getattr(best, f.name) for f in dataclasses.fields(best)]
    q_block, kv_block = max(t.queries for t in every), max(t.keys for t in every)
    q_BSNH, k_BTKH, v_BTKH = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
        for x, block in ((q_BSNH, q_block), (k_BTKH, kv_block), (v_BTKH, kv_block))
    )
    settings = (scale, best, device.platform() == "cpu")
    out, lse_BSN = _attend(settings, q_BSNH, k_BTKH, v_BTKH, mask.padded(q_block, kv_block))
    return out[:, :S], lse_BSN[:, :S]


def _width(head_dim: int) -> int:
    """The head size padded for Triton, whose products need at least 16."""
    return max(16, pl.next_power_of_2(head_dim))


def _fitting(tile: Tile, q_len: int, kv_len: int) -> Tile:
    def fit(block, length):
        return min(block, max(16, pl.next_power_of_2(length)))

    return dataclasses.replace(tile, queries=fit(tile.queries, q_len), keys=fit(tile.keys, kv_len))


def _dot(x, y):
    precision = None
    if x.dtype == jnp.float32:
        # One TensorFloat-32 product, Triton's default, has 10 bits of precision; three products recover float32. A CPU
        # has no such product.
        algorithm = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if device.platform() == "cpu" else algorithm
    return plgpu.dot(x, y, precision=precision)


def _load(ref, start, size, head_dim: int, *head):
    """Loads tokens [start, start + size) of a [tokens, (heads,) padded head size] reference, zero in the padding."""
    at = ref.at[pl.ds(start, size), *head, :]
    padded = ref.shape[-1]
    if padded == head_dim:
        return plgpu.load(at)
    return plgpu.load(at, mask=(jnp.arange(padded) < head_dim)[None, :], other=0.0)


def _store(ref, value, head_dim: int):
    padded = ref.shape[-1]
    mask = None if padded == head_dim else (jnp.arange(padded) < head_dim)[None, :]
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


def _visit(range_ref, repeat: int, step, carry):
    """Runs `step(repetition, block, masked, carry)` over a range of blocks: first full blocks, then partial ones.

    The repetitions (heads of a group) and the blocks form a single loop, which Triton can pipeline.
    """
    first, full_first, full_last, last = (range_ref[i] for i in range(4))
    full, before, after = full_last - full_first, full_first - first, last - full_last

    def full_step(t, carry):
        n = jax.lax.div(t, full) if repeat > 1 else jnp.int32(0)
        return step(n, full_first + t - n * full, False, carry)

    def partial_step(t, carry):
        n = jax.lax.div(t, before + after) if repeat > 1 else jnp.int32(0)
        t -= n * (before + after)
        return step(n, jnp.where(t < before, first + t, full + first + t), True, carry)

    carry = jax.lax.fori_loop(0, repeat * full, full_step, carry)
    return jax.lax.fori_loop(0, repeat * (before + after), partial_step, carry)


def _forward_kernel(
    q_ref, k_ref, v_ref, q_order_ref, q_segments_ref, kv_order_ref, kv_segments_ref, range_ref,
    out_ref, lse_ref, *, scale: float, keys: int, head_dim: int,
):  # fmt: skip
    queries = q_ref.shape[0]
    q_QH = _load(q_ref, 0, queries, head_dim)
    q_order_Q, q_segments_Q = q_order_ref[...], q_segments_ref[...]

    def step(_, block, masked, carry):
        m_Q, l_Q, acc_QH = carry
        start = block * keys
        k_PH = _load(k_ref, start, keys, head_dim)
        scores_QP = _dot(q_QH, k_PH.T)
        if masked:
            at = pl.ds(start, keys)
            causal = kv_order_ref[at][None, :] <= q_order_Q[:, None]
            same = kv_segments_ref[at][None, :] == q_segments_Q[:, None]
            scores_QP = jnp.where(causal & same, scores_QP, -jnp.inf)
        new_m_Q = jnp.maximum(m_Q, jnp.max(scores_QP, axis=-1) * (scale * _LOG2_E))
        # Until a query has attended to a key, its maximum is -inf: subtract 0, so that exp2(-inf) = 0, not NaN.
        shift_Q = jnp.where(new_m_Q == -jnp.inf, 0.0, new_m_Q) if masked else new_m_Q
        weights_QP = jnp.exp2(scores_QP * (scale * _LOG2_E) - shift_Q[:, None])  # one multiply-add and one exp2
        alpha_Q = jnp.exp2(m_Q - shift_Q)
        v_PH = _load(v_ref, start, keys, head_dim)
        acc_QH = acc_QH * alpha_Q[:, None] + _dot(weights_QP.astype(v_PH.dtype), v_PH)
        return new_m_Q, l_Q * alpha_Q + jnp.sum(weights_QP, axis=-1), acc_QH

    start = (
        jnp.full(queries, -jnp.inf, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros(q_QH.shape, jnp.float32),
    )
    m_Q, l_Q, acc_QH = _visit(range_ref, 1, step, start)
    some = l_Q > 0
    l_Q = jnp.where(some, l_Q, 1.0)
    _store(out_ref, acc_QH / l_Q[:, None], head_dim)
    lse_ref[...] = jnp.where(some, m_Q / _LOG2_E + jnp.log(l_Q), -jnp.inf)


def _dq_kernel(
    q_ref, k_ref, v_ref, q_order_ref, q_segments_ref, kv_order_ref, kv_segments_ref, range_ref,
    d_out_ref, lse_ref, delta_ref, dq_ref, *, scale: float, keys: int, head_dim: int,
):  # fmt: skip
    queries = q_ref.shape[0]
    q_QH, d_out_QH = (_load(ref, 0, queries, head_dim) for ref in (q_ref, d_out_ref))
    q_order_Q, q_segments_Q = q_order_ref[...], q_segments_ref[...]
    lse_Q, delta_Q = lse_ref[...] * _LOG2_E, delta_ref[...]

    def step(_, block, masked, dq_QH):
        start = block * keys
        k_PH, v_PH = (_load(ref, start, keys, head_dim) for ref in (k_ref, v_ref))
        weights_QP = jnp.exp2(_dot(q_QH, k_PH.T) * (scale * _LOG2_E) - lse_Q[:, None])
        if masked:
            at = pl.ds(start, keys)
            causal = kv_order_ref[at][None, :] <= q_order_Q[:, None]
            same = kv_segments_ref[at][None, :] == q_segments_Q[:, None]
            weights_QP = jnp.where(causal & same, weights_QP, 0.0)
        d_scores_QP = weights_QP * (_dot(d_out_QH, v_PH.T) - delta_Q[:, None])
        return dq_QH + _dot(d_scores_QP.astype(k_PH.dtype), k_PH)

    dq_QH = _visit(range_ref, 1, step, jnp.zeros(q_QH.shape, jnp.float32))
    _store(dq_ref, dq_QH * scale, head_dim)


def _dkv_kernel(
    q_ref, k_ref, v_ref, q_order_ref, q_segments_ref, kv_order_ref, kv_segments_ref, range_ref,
    d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, scale: float, queries: int, head_dim: int,
):  # fmt: skip
    keys = k_ref.shape[0]
    k_PH, v_PH = (_load(ref, 0, keys, head_dim) for ref in (k_ref, v_ref))
    kv_order_P, kv_segments_P = kv_order_ref[...], kv_segments_ref[...]

    def step(head, block, masked, carry):
        dk_PH, dv_PH = carry
        start = block * queries
        at = pl.ds(start, queries)
        q_QH, d_out_QH = (_load(ref, start, queries, head_dim, head) for ref in (q_ref, d_out_ref))
        lse_Q, delta_Q = lse_ref[head, at] * _LOG2_E, delta_ref[head, at]
        # Keys first, so that the weights are never transposed.
        weights_PQ = jnp.exp2(_dot(k_PH, q_QH.T) * (scale * _LOG2_E) - lse_Q[None, :])
        if masked:
            causal = kv_order_P[:, None] <= q_order_ref[at][None, :]
            same = kv_segments_P[:, None] == q_segments_ref[at][None, :]
            weights_PQ = jnp.where(causal & same, weights_PQ, 0.0)
        dv_PH += _dot(weights_PQ.astype(d_out_QH.dtype), d_out_QH)
        d_scores_PQ = weights_PQ * (_dot(v_PH, d_out_QH.T) - delta_Q[None, :])
        dk_PH += _dot(d_scores_PQ.astype(q_QH.dtype), q_QH)
        return dk_PH, dv_PH

    zeros = jnp.zeros(k_PH.shape, jnp.float32)
    dk_PH, dv_PH = _visit(range_ref, q_ref.shape[1], step, (zeros, zeros))
    _store(dk_ref, dk_PH * scale, head_dim)
    _store(dv_ref, dv_PH, head_dim)


def _by_query_block(q, k, mask: Mask, tile: Tile):
    """Grid and block specs of a kernel whose program reads one block of queries of one head, and all keys."""
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    G, width = N // K, _width(H)
    last = S // tile.queries - 1
    # The last queries attend to the most keys: start the longest programs first.
    q_spec = pl.BlockSpec((None, tile.queries, None, width), lambda i, n, b: (b, last - i, n, 0))
    kv_spec = pl.BlockSpec((None, T, None, width), lambda i, n, b: (b, 0, n // G, 0))
    q_token_spec = pl.BlockSpec((None, tile.queries), lambda i, n, b: (b, last - i))
    kv_token_spec = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    range_spec = pl.BlockSpec((None, None, 4), lambda i, n, b: (b, last - i, 0))
    value_spec = pl.BlockSpec((None, None, tile.queries), lambda i, n, b: (b, n, last - i))
    ranges = mask.block_ranges(tile.queries, tile.keys)[0]
    operands = (mask.q_order_BS, mask.q_segments_BS, mask.kv_order_BT, mask.kv_segments_BT, ranges)
    specs = [q_spec, kv_spec, kv_spec, q_token_spec, q_token_spec, kv_token_spec, kv_token_spec, range_spec]
    return (last + 1, N, B), operands, specs, q_spec, value_spec


def _call(kernel, tile: Tile, interpret: bool, **arguments):
    params = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    name = kernel.func.__name__.strip("_")
    return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, name=name, **arguments)


def _forward(settings, q, k, v, mask):
    scale, sizes, interpret = settings
    tile = sizes.forward
    B, S, N, H = q.shape
    grid, operands, specs, q_spec, value_spec = _by_query_block(q, k, mask, tile)
    out, lse_BNS = _call(
        functools.partial(_forward_kernel, scale=scale, keys=tile.keys, head_dim=H),
        tile,
        interpret,
        grid=grid,
        in_specs=specs,
        out_specs=[q_spec, value_spec],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, S), jnp.float32)],
    )(q, k, v, *operands)
    return out, jnp.swapaxes(lse_BNS, 1, 2)


def _backward(settings, q, k, v, mask, lse, d_out, delta):
    scale, sizes, interpret = settings
    lse, delta = (jnp.swapaxes(x, 1, 2) for x in (lse, delta))  # to [B, N, S]: the tokens of a head are contiguous
    grid, operands, specs, q_spec, value_spec = _by_query_block(q, k, mask, sizes.dq)
    dq = _call(
        functools.partial(_dq_kernel, scale=scale, keys=sizes.dq.keys, head_dim=q.shape[-1]),
        sizes.dq,
        interpret,
        grid=grid,
        in_specs=[*specs, q_spec, value_spec, value_spec],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v, *operands, d_out, lse, delta)
    return dq, *_backward_kv(scale, sizes.dkv, interpret, q, k, v, mask, lse, d_out, delta)


def _backward_kv(scale, tile, interpret, q, k, v, mask, lse, d_out, delta):
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    G, width = N // K, _width(H)
    # The most queries attend to the first keys, whose programs start first anyway.
    q_spec = pl.BlockSpec((None, S, G, width), lambda j, n, b: (b, 0, n, 0))
    kv_spec = pl.BlockSpec((None, tile.keys, None, width), lambda j, n, b: (b, j, n, 0))
    q_token_spec = pl.BlockSpec((None, S), lambda j, n, b: (b, 0))
    kv_token_spec = pl.BlockSpec((None, tile.keys), lambda j, n, b: (b, j))
    range_spec = pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0))
    value_spec = pl.BlockSpec((None, G, S), lambda j, n, b: (b, n, 0))
    ranges = mask.block_ranges(tile.queries, tile.keys)[1]
    return _call(
        functools.partial(_dkv_kernel, scale=scale, queries=tile.queries, head_dim=H),
        tile,
        interpret,
        grid=(T // tile.keys, K, B),
        in_specs=[q_spec, kv_spec, kv_spec, q_token_spec, q_token_spec, kv_token_spec, kv_token_spec, range_spec]
        + [q_spec, value_spec, value_spec],
        out_specs=[kv_spec, kv_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )(q, k, v, mask.q_order_BS, mask.q_segments_BS, mask.kv_order_BT, mask.kv_segments_BT, ranges, d_out, lse, delta)


_attend = flash_attention(_forward, _backward)
