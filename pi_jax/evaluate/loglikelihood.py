"""Rows of tokens to the losses of chosen tokens: what perplexity and the standard harness have in common.

Every process passes the same rows and gets the same result, so an evaluation on several hosts is the same program on
each of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pi_jax.model import Llama
from pi_jax.model.loss import score_tokens
from pi_jax.parallel import placement, sharding


def sequences_per_batch(mesh: jax.sharding.Mesh, length: int, batch_tokens: int, rows: int) -> int:
    """How many rows of `length` tokens to pass at once: a multiple of the mesh's rows, no more than needed.

    Args:
      mesh: its data and fsdp axes take rows side by side.
      length: tokens in a row.
      batch_tokens: tokens that a device should read at a time; it reads at least one row.
      rows: rows that there are.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    each = max(1, math.ceil(rows / devices))
    batches = math.ceil(each / max(1, batch_tokens // length))
    return devices * math.ceil(each / batches)  # so that the last batch is as full as the others


def score_sequences(
    model: Llama, tokens: Int[np.ndarray, "B S"], start: int, stop: int, chunk: int, mesh: jax.sharding.Mesh
) -> tuple[Float[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Loss in nats of each token given those before it in its row, and whether it was the most probable one.

    Rows are padded behind by any tokens: causality keeps them out of sight. Compiled once for each shape and `chunk`.

    Args:
      model: with its parameters on `mesh`.
      tokens: as many rows as `sequences_per_batch` says, the same on every process.
      start: first column scored, at least 1.
      stop: column after the last one scored.
      chunk: columns whose logits exist at one time; what is scored is rounded outwards to them.
      mesh: the mesh that is set.
    """
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    placed = placement.put_global(mesh, {"tokens": tokens, "positions": positions})
    losses, greedy = _score(model, placed["tokens"], placed["positions"], np.int32(start), np.int32(stop), chunk)
    return placement.fetch(losses), placement.fetch(greedy)


@functools.partial(jax.jit, static_argnums=5)
def _score(model, tokens_BS, positions_BS, start, stop, chunk):
    hidden_BSD = sharding.gather_sequence(model(tokens_BS, positions_BS))
    tokens_BS = sharding.gather_sequence(tokens_BS)
    # The token at i is predicted from the hidden state at i - 1; column 0 is predicted by nothing.
    before_BSD = jnp.pad(hidden_BSD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return score_tokens(before_BSD, model.output_weights(), tokens_BS, chunk, start, stop)
