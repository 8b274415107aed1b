"""Computes the losses of tokens in a batch of sequences, for perplexity and the evaluation harness.

All processes pass the same sequences and get the same result, so an evaluation on several hosts runs the same program
on each of them.
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


def sequences_per_batch(mesh: jax.sharding.Mesh, length: int, batch_tokens: int, sequences: int) -> int:
    """Returns the batch size for sequences of `length` tokens: a multiple of the batch shards, as small as possible.

    Args:
      mesh: mesh; the batch is sharded over its data and fsdp axes.
      length: sequence length in tokens.
      batch_tokens: maximum number of tokens per device and batch; a device always gets at least one sequence.
      sequences: total number of sequences.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    each = max(1, math.ceil(sequences / devices))
    batches = math.ceil(each / max(1, batch_tokens // length))
    return devices * math.ceil(each / batches)  # makes the last batch about as full as the others


def score_sequences(
    model: Llama, tokens: Int[np.ndarray, "B S"], start: int, stop: int, chunk: int, mesh: jax.sharding.Mesh
) -> tuple[Float[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Computes the loss in nats of each token given the tokens before it, and whether it is the most likely token.

    Sequences are padded at the end with arbitrary tokens, which do not affect the result because attention is causal.
    Compiled once for each shape and `chunk`.

    Args:
      model: model with its parameters on `mesh`.
      tokens: a batch of the size given by `sequences_per_batch`, the same on all processes.
      start: first position to score, at least 1.
      stop: position after the last one to score.
      chunk: number of positions whose logits exist at a time. The scored range is extended to whole chunks.
      mesh: mesh that is currently set.
    """
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    placed = placement.put_global(mesh, {"tokens": tokens, "positions": positions})
    losses, greedy = _score(model, placed["tokens"], placed["positions"], np.int32(start), np.int32(stop), chunk)
    return placement.fetch(losses), placement.fetch(greedy)


@functools.partial(jax.jit, static_argnums=5)
def _score(model, tokens_BS, positions_BS, start, stop, chunk):
    hidden_BSD = sharding.gather_sequence(model(tokens_BS, positions_BS))
    tokens_BS = sharding.gather_sequence(tokens_BS)
    # The token at i is predicted from the hidden state at i - 1; the first token is not predicted.
    before_BSD = jnp.pad(hidden_BSD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return score_tokens(before_BSD, model.output_weights(), tokens_BS, chunk, start, stop)
