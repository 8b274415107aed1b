"""Flash attention for NVIDIA GPUs from Ampere (sm80) on, in Pallas, compiled by Triton: forward, dq and dk/dv kernels.

FlashAttention-2 (Dao 2023) with what packed rows of long documents need:

- Blocks of scores outside a query's document or after it are neither computed nor read, in all three kernels: each
  program visits one range of blocks (`Mask.block_ranges`), so packed documents cost what they would cost alone.
- Most blocks are wholly visible and run in a loop without a mask; only those on the diagonal or at the edge of a
  document compare orders and segments. Orders and segments may be any integers, so a shard of the queries, in any
  order, can meet all keys; a range then may hold blocks with nothing visible, which costs time and nothing else.
- Softmax in base 2: the factor log2(e) goes into the scale, and exp2 is one instruction.
- Grouped heads: K and V are never repeated, and dk and dv are written once, summed over the heads of the group.

Nothing of size S x T exists in memory, forward or backward. Kept for the backward pass: out and lse (`flash`).

Shapes: B batch, S queries, T keys, N query heads, K key/value heads, G = N/K, H head size; Q and P are the sizes of a
block of queries and of keys. Triton wants powers of two: other head sizes are padded with zeros as they are read.
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

# JAX 0.11 announced that this backend will go some day, at every lowering; docs/attention.md says what that means.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

_LOG2_E = math.log2(math.e)
_WIDEST = 256


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes at a time, and how it is compiled."""

    queries: int
    """Rows of a block of scores; powers of two, 16 or more."""
    keys: int
    """Columns of a block of scores."""
    warps: int
    """Groups of 32 threads a program."""
    stages: int
    """Blocks in flight while one is computed, each in shared memory."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    forward: Tile
    dq: Tile
    dkv: Tile


# Shared memory of a program: 163 KiB on sm80, 227 KiB on sm90 and sm100, 99 KiB on sm86, sm89 and sm120. Sources:
#   [t] the best of tokamax's autotuning records for this kind of kernel (H100 and A100, bfloat16, causal, 16k tokens)
#   [c] by compiling: of the sizes that fit, one with no or few spilled registers (`tests/test_attention_compiled.py`
#       says how many); not timed
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
_SMALL = {  # chips of people with one GPU
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
    """What it cannot do of this call, or None."""
    if device.platform() == "tpu":
        return "runs on an NVIDIA GPU (and interpreted on a CPU), not on a TPU"
    if device.platform() == "gpu" and device.compute_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if q_BSNH.shape[3] > _WIDEST:
        return f"takes head sizes up to {_WIDEST}, not {q_BSNH.shape[3]}"
    return None


def pallas_triton_attention(q_BSNH, k_BTKH, v_BTKH, mask: Mask, scale: float):
    """See `attention`. On a CPU the kernels are interpreted: right, and slow."""
    S = q_BSNH.shape[1]
    best = tiles(q_BSNH.shape[-1], q_BSNH.dtype, device.compute_capability())
    # Short rows take small blocks; all rows are padded to whole blocks of every kernel.
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
    """The head size as padded for Triton, whose products need 16 or more."""
    return max(16, pl.next_power_of_2(head_dim))


def _fitting(tile: Tile, q_len: int, kv_len: int) -> Tile:
    def fit(block, length):
        return min(block, max(16, pl.next_power_of_2(length)))

    return dataclasses.replace(tile, queries=fit(tile.queries, q_len), keys=fit(tile.keys, kv_len))


def _dot(x, y):
    precision = None
    if x.dtype == jnp.float32:
        # One TensorFloat-32 product, Triton's default, has 10 bits; three make up for that. A CPU has no such product.
        algorithm = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if device.platform() == "cpu" else algorithm
    return plgpu.dot(x, y, precision=precision)


def _rows(ref, start, size, head_dim: int, *head):
    """Rows [start, start + size) of a [rows, (heads,) padded head size] reference, zero in the padding."""
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
    """Runs `step(repetition, block, masked, carry)` over a range of blocks: the wholly visible ones, then the others.

    The repetitions (heads of a group) and the blocks make one loop, which Triton can pipeline as a whole.
    """
    first, whole_first, whole_last, last = (range_ref[i] for i in range(4))
    whole, before, after = whole_last - whole_first, whole_first - first, last - whole_last

    def whole_step(t, carry):
        n = jax.lax.div(t, whole) if repeat > 1 else jnp.int32(0)
        return step(n, whole_first + t - n * whole, False, carry)

    def masked_step(t, carry):
        n = jax.lax.div(t, before + after) if repeat > 1 else jnp.int32(0)
        t -= n * (before + after)
        return step(n, jnp.where(t < before, first + t, whole + first + t), True, carry)

    carry = jax.lax.fori_loop(0, repeat * whole, whole_step, carry)
    return jax.lax.fori_loop(0, repeat * (before + after), masked_step, carry)


def _forward_kernel(
    q_ref, k_ref, v_ref, q_order_ref, q_segments_ref, kv_order_ref, kv_segments_ref, range_ref,
    out_ref, lse_ref, *, scale: float, keys: int, head_dim: int,
):  # fmt: skip
    queries = q_ref.shape[0]
    q_QH = _rows(q_ref, 0, queries, head_dim)
    q_order_Q, q_segments_Q = q_order_ref[...], q_segments_ref[...]

    def step(_, block, masked, carry):
        top_Q, total_Q, acc_QH = carry
        start = block * keys
        k_PH = _rows(k_ref, start, keys, head_dim)
        scores_QP = _dot(q_QH, k_PH.T)
        if masked:
            at = pl.ds(start, keys)
            causal = kv_order_ref[at][None, :] <= q_order_Q[:, None]
            same = kv_segments_ref[at][None, :] == q_segments_Q[:, None]
            scores_QP = jnp.where(causal & same, scores_QP, -jnp.inf)
        new_top_Q = jnp.maximum(top_Q, jnp.max(scores_QP, axis=-1) * (scale * _LOG2_E))
        # A query that has seen no key yet has maximum -inf: subtract 0, so that exp2(-inf) = 0 and not NaN.
        shift_Q = jnp.where(new_top_Q == -jnp.inf, 0.0, new_top_Q) if masked else new_top_Q
        weights_QP = jnp.exp2(scores_QP * (scale * _LOG2_E) - shift_Q[:, None])  # one multiply-add and one exp2
        fade_Q = jnp.exp2(top_Q - shift_Q)
        v_PH = _rows(v_ref, start, keys, head_dim)
        acc_QH = acc_QH * fade_Q[:, None] + _dot(weights_QP.astype(v_PH.dtype), v_PH)
        return new_top_Q, total_Q * fade_Q + jnp.sum(weights_QP, axis=-1), acc_QH

    start = (
        jnp.full(queries, -jnp.inf, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros(q_QH.shape, jnp.float32),
    )
    top_Q, total_Q, acc_QH = _visit(range_ref, 1, step, start)
    some = total_Q > 0
    total_Q = jnp.where(some, total_Q, 1.0)
    _store(out_ref, acc_QH / total_Q[:, None], head_dim)
    lse_ref[...] = jnp.where(some, top_Q / _LOG2_E + jnp.log(total_Q), -jnp.inf)


def _dq_kernel(
    q_ref, k_ref, v_ref, q_order_ref, q_segments_ref, kv_order_ref, kv_segments_ref, range_ref,
    d_out_ref, lse_ref, delta_ref, dq_ref, *, scale: float, keys: int, head_dim: int,
):  # fmt: skip
    queries = q_ref.shape[0]
    q_QH, d_out_QH = (_rows(ref, 0, queries, head_dim) for ref in (q_ref, d_out_ref))
    q_order_Q, q_segments_Q = q_order_ref[...], q_segments_ref[...]
    lse_Q, delta_Q = lse_ref[...] * _LOG2_E, delta_ref[...]

    def step(_, block, masked, dq_QH):
        start = block * keys
        k_PH, v_PH = (_rows(ref, start, keys, head_dim) for ref in (k_ref, v_ref))
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
    k_PH, v_PH = (_rows(ref, 0, keys, head_dim) for ref in (k_ref, v_ref))
    kv_order_P, kv_segments_P = kv_order_ref[...], kv_segments_ref[...]

    def step(head, block, masked, carry):
        dk_PH, dv_PH = carry
        start = block * queries
        at = pl.ds(start, queries)
        q_QH, d_out_QH = (_rows(ref, start, queries, head_dim, head) for ref in (q_ref, d_out_ref))
        lse_Q, delta_Q = lse_ref[head, at] * _LOG2_E, delta_ref[head, at]
        # Keys first: so the weights are multiplied as they are and never turned.
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
    """Grid and block specs of a kernel that takes one block of queries of one head, and all keys."""
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    G, width = N // K, _width(H)
    last = S // tile.queries - 1
    # Late queries see the most keys: the longest programs start first.
    q_spec = pl.BlockSpec((None, tile.queries, None, width), lambda i, n, b: (b, last - i, n, 0))
    kv_spec = pl.BlockSpec((None, T, None, width), lambda i, n, b: (b, 0, n // G, 0))
    row_spec = pl.BlockSpec((None, tile.queries), lambda i, n, b: (b, last - i))
    column_spec = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    range_spec = pl.BlockSpec((None, None, 4), lambda i, n, b: (b, last - i, 0))
    value_spec = pl.BlockSpec((None, None, tile.queries), lambda i, n, b: (b, n, last - i))
    ranges = mask.block_ranges(tile.queries, tile.keys)[0]
    operands = (mask.q_order_BS, mask.q_segments_BS, mask.kv_order_BT, mask.kv_segments_BT, ranges)
    specs = [q_spec, kv_spec, kv_spec, row_spec, row_spec, column_spec, column_spec, range_spec]
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
    lse, delta = (jnp.swapaxes(x, 1, 2) for x in (lse, delta))  # to [B, N, S]: rows of a head side by side
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
    # Early keys are seen by the most queries; they come first anyway.
    q_spec = pl.BlockSpec((None, S, G, width), lambda j, n, b: (b, 0, n, 0))
    kv_spec = pl.BlockSpec((None, tile.keys, None, width), lambda j, n, b: (b, j, n, 0))
    row_spec = pl.BlockSpec((None, S), lambda j, n, b: (b, 0))
    column_spec = pl.BlockSpec((None, tile.keys), lambda j, n, b: (b, j))
    range_spec = pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0))
    value_spec = pl.BlockSpec((None, G, S), lambda j, n, b: (b, n, 0))
    ranges = mask.block_ranges(tile.queries, tile.keys)[1]
    return _call(
        functools.partial(_dkv_kernel, scale=scale, queries=tile.queries, head_dim=H),
        tile,
        interpret,
        grid=(T // tile.keys, K, B),
        in_specs=[q_spec, kv_spec, kv_spec, row_spec, row_spec, column_spec, column_spec, range_spec]
        + [q_spec, value_spec, value_spec],
        out_specs=[kv_spec, kv_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )(q, k, v, mask.q_order_BS, mask.q_segments_BS, mask.kv_order_BT, mask.kv_segments_BT, ranges, d_out, lse, delta)


_attend = flash_attention(_forward, _backward)
