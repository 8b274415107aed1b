"""The public attention function: checks its arguments and selects a backend that supports all of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi_jax.errors import InputError
from pi_jax.model.attention import chunked, cudnn, device, pallas_triton, reference, splash
from pi_jax.model.attention.mask import Mask


class Backend(NamedTuple):
    """One implementation: `attend(q, k, v, mask, scale) -> (out, lse)`, and a check of what it supports."""

    attend: Callable
    refuses: Callable = lambda q, k, mask, return_lse: None
    """(q, k, mask, return_lse) -> why the backend cannot serve the call, or None. No argument is ever ignored."""


IMPLEMENTATIONS = {
    "reference": Backend(reference.reference_attention),
    "chunked": Backend(chunked.chunked_attention),
    "pallas_triton": Backend(pallas_triton.pallas_triton_attention, pallas_triton.refuses),
    "splash": Backend(splash.splash_attention, splash.refuses),
    "cudnn": Backend(cudnn.cudnn_attention, cudnn.refuses),
}
_DTYPES = ("float32", "bfloat16", "float16")


def _preferred() -> tuple[str, ...]:
    """Backends that "auto" tries, in this order. The last supports every argument on every platform."""
    match device.platform():
        case "tpu":
            return "splash", "chunked"
        case "gpu" if device.compute_capability() >= (9, 0):
            return "cudnn", "pallas_triton", "chunked"  # Triton does not use all of Hopper's features
        case "gpu":
            return "pallas_triton", "chunked"
        case _:
            return ("chunked",)


def attention(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B S"] | tuple[Int[Array, "B S"], Int[Array, "B T"]] | None = None,
    q_positions: Int[Array, "B S"] | None = None,
    kv_positions: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
):
    """Softmax attention, causal by position and isolated by segment, with grouped K/V heads.

    Query i attends to key j if kv_positions[j] <= q_positions[i] and both have the same segment id. Positions here are
    the *order* of tokens in a sequence, not RoPE positions, which may restart in each document or skip ahead. A query
    that attends to no key gets a zero output (and lse = -inf), never NaN. The softmax uses float32.

    Args:
      q_BSNH: queries; N is a multiple of K, and query heads n*N/K to (n+1)*N/K - 1 share K/V head n.
      k_BTKH: keys.
      v_BTKH: values.
      segment_ids: document of each token, as any integers; a pair (of queries, of keys) if the two differ. None: all
        tokens are in one document.
      q_positions: order of the queries; None: 0 to S-1.
      kv_positions: order of the keys; None: 0 to T-1. With `q_positions`, a shard of the queries can attend to all
        keys.
      scale: factor applied to the scores, greater than 0; None: 1 / sqrt(H).
      implementation: a name in `IMPLEMENTATIONS`, or "auto": the first one for the platform that supports the call.
      return_lse: also return the log of the softmax denominator, float32 [B, S, N], differentiable. It is needed to
        merge attention over parts of the keys.

    Returns:
      The output, [B, S, N, H] in the dtype of `q_BSNH`; with `return_lse`, a pair of the output and lse.

    Raises:
      ValueError: if an argument is invalid, naming the argument, its value and what is valid; also if the selected
        implementation does not support one of the arguments (as `InputError`).
    """
    _check(q_BSNH, k_BTKH, v_BTKH)
    batch, q_len, _, head_dim = q_BSNH.shape
    kv_len = k_BTKH.shape[1]
    if not isinstance(segment_ids, tuple):
        if segment_ids is not None and q_len != kv_len:
            raise ValueError(f"segment_ids is one array but there are {q_len} queries and {kv_len} keys: give a pair")
        segment_ids = (segment_ids, segment_ids)
    q_segments, kv_segments = segment_ids
    mask = Mask(
        _order_or_segments("q_positions", q_positions, batch, q_len, jnp.arange),
        _order_or_segments("segment_ids", q_segments, batch, q_len, jnp.zeros),
        _order_or_segments("kv_positions", kv_positions, batch, kv_len, jnp.arange),
        _order_or_segments("segment_ids", kv_segments, batch, kv_len, jnp.zeros),
        in_order=q_positions is None and kv_positions is None,
        one_document=q_segments is None and kv_segments is None,
    )
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}: it must be a finite number greater than 0")
    name = _choose(implementation, q_BSNH, k_BTKH, mask, return_lse)
    with jax.named_scope(f"attention_{name}"):
        out, lse = IMPLEMENTATIONS[name].attend(q_BSNH, k_BTKH, v_BTKH, mask, scale)
    return (out, lse) if return_lse else out


def _choose(implementation: str, q, k, mask: Mask, return_lse: bool) -> str:
    if implementation == "auto":
        return next(n for n in _preferred() if IMPLEMENTATIONS[n].refuses(q, k, mask, return_lse) is None)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r}: it must be one of {known}")
    if reason := IMPLEMENTATIONS[implementation].refuses(q, k, mask, return_lse):
        raise InputError(
            f"implementation is {implementation!r}, which {reason}: choose another implementation, or 'auto'"
        )
    return implementation


def _check(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}: it must have 4 dimensions [batch, tokens, heads, head size]")
        if x.dtype.name not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype.name}: it must be one of {', '.join(_DTYPES)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype.name} but q is {q.dtype.name}: they must have the same dtype")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {v.shape} but k has {k.shape}: they must be the same")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k has shape {k.shape} but q has {q.shape}: batch and head size must be the same")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads: they must divide the {q.shape[2]} heads of q")


def _order_or_segments(name: str, x, batch: int, length: int, default):
    if x is None:
        return jnp.broadcast_to(default(length).astype(jnp.int32), (batch, length))
    if x.shape != (batch, length):
        raise ValueError(f"{name} has shape {x.shape}: it must be {(batch, length)}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} is {x.dtype.name}: it must be an integer array")
    return x.astype(jnp.int32)
