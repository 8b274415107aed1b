"""Next-token cross-entropy in chunks along the sequence; the logits of a complete sequence never exist.

At 32k tokens and a vocabulary of 128k, the float32 logits take 16 GB. Here a scan computes the logits of one chunk,
reduces them and discards them. Gradients are computed in the same pass, while the logits are available, which takes
three matrix products instead of the four that recomputation needs. This is possible because the loss is a weighted sum
whose weights are known in advance, so its cotangent is a scalar (Hsu et al. 2024, "Liger Kernel", section 3.2).

Shapes: B batch, S sequence, C chunks of Z tokens, D hidden, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi_jax.parallel import sharding


def score_tokens(
    hidden_BSD: Float[Array, "B S D"],
    weights_VD: Float[Array, "V D"],
    targets_BS: Int[Array, "B S"],
    chunk: int,
    start: Int[Array, ""],
    stop: Int[Array, ""],
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Losses and greedy matches of the targets [start, stop) of each sequence; for evaluation, not differentiable.

    Logits are computed only for the chunks that overlap this range. The range is a run-time value, so one compiled
    program serves every range.

    Args:
      hidden_BSD: final hidden states, each of which predicts the target at the same index; the sequence axis is not
        sharded.
      weights_VD: output projection, in the dtype of the product; the softmax uses float32.
      targets_BS: tokens to predict.
      chunk: tokens per sequence whose logits exist at a time.
      start: first index to score.
      stop: index after the last one to score.

    Returns:
      Negative log-probability (nats, float32) of each target, and whether it is the most likely token; 0 and False in
      chunks outside the range.
    """
    local = functools.partial(_score_tokens, chunk)
    return sharding.shard_map_tokens(local, hidden_BSD, weights_VD, targets_BS, start, stop, summed=False)


def weighted_loss(
    hidden_BSD: Float[Array, "B S D"],
    weights_VD: Float[Array, "V D"],
    targets_BS: Int[Array, "B S"],
    loss_weights_BS: Float[Array, "B S"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of the losses times `loss_weights_BS` (float32), differentiable in the hidden states and the projection."""
    local = functools.partial(_weighted_loss, chunk)
    return sharding.shard_map_tokens(local, hidden_BSD, weights_VD, targets_BS, loss_weights_BS, summed=True)


def _score_tokens(chunk, hidden_BSD, weights_VD, targets_BS, start, stop):
    length = targets_BS.shape[1]
    hidden_CBZD, targets_CBZ = _chunks(hidden_BSD, chunk), _chunks(targets_BS, chunk)
    size = targets_CBZ.shape[2]

    def one(c, scores):
        logits_BZV = _logits(hidden_CBZD[c], weights_VD)
        losses_BZ, _ = _negative_log_probability(logits_BZV, targets_CBZ[c])
        picked_BZ = jnp.take_along_axis(logits_BZV, targets_CBZ[c][..., None], axis=-1)[..., 0]
        greedy_BZ = picked_BZ >= jnp.max(logits_BZV, axis=-1)
        return tuple(x.at[c].set(part) for x, part in zip(scores, (losses_BZ, greedy_BZ), strict=True))

    nothing = (jnp.zeros(targets_CBZ.shape, jnp.float32), jnp.zeros(targets_CBZ.shape, bool))
    scores = jax.lax.fori_loop(start // size, -(-stop // size), one, nothing)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(len(targets_BS), -1)[:, :length] for x in scores)


def _token_losses(chunk, hidden_BSD, weights_VD, targets_BS):
    def one(_, block):
        hidden_BZD, targets_BZ = block
        logits_BZV = _logits(hidden_BZD, weights_VD)
        return None, _negative_log_probability(logits_BZV, targets_BZ)[0]

    _, losses_CBZ = jax.lax.scan(one, None, (_chunks(hidden_BSD, chunk), _chunks(targets_BS, chunk)))
    return jnp.moveaxis(losses_CBZ, 0, 1).reshape(len(targets_BS), -1)[:, : targets_BS.shape[1]]


def _chunks(x, size):
    """[B, S, ...] -> [C, B, Z, ...], padded with zeros."""
    size = min(size, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _logits(hidden_BZD, weights_VD):
    """The product accumulates and returns float32: in bfloat16, a logit of 20 would have an error of up to 0.06."""
    return jnp.einsum("BZD,VD->BZV", hidden_BZD, weights_VD, preferred_element_type=jnp.float32)


def _negative_log_probability(logits_BZV, targets_BZ):
    """The loss and the log of the softmax denominator, both [B, Z]."""
    lse_BZ = jax.nn.logsumexp(logits_BZV, axis=-1)
    picked_BZ = jnp.take_along_axis(logits_BZV, targets_BZ[..., None], axis=-1)[..., 0]
    return lse_BZ - picked_BZ, lse_BZ


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(chunk, hidden_BSD, weights_VD, targets_BS, loss_weights_BS):
    return jnp.sum(_token_losses(chunk, hidden_BSD, weights_VD, targets_BS) * loss_weights_BS)


def _forward(chunk, hidden_BSD, weights_VD, targets_BS, loss_weights_BS):
    dtype = hidden_BSD.dtype

    def one(carry, block):
        total, d_weights_DV = carry
        hidden_BZD, targets_BZ, loss_weights_BZ = block
        logits_BZV = _logits(hidden_BZD, weights_VD)
        losses_BZ, lse_BZ = _negative_log_probability(logits_BZV, targets_BZ)
        probabilities_BZV = jnp.exp(logits_BZV - lse_BZ[..., None])
        hit_BZV = targets_BZ[..., None] == jnp.arange(logits_BZV.shape[-1])
        d_logits_BZV = ((probabilities_BZV - hit_BZV) * loss_weights_BZ[..., None]).astype(dtype)
        d_hidden_BZD = jnp.einsum("BZV,VD->BZD", d_logits_BZV, weights_VD)
        d_weights_DV += jnp.einsum("BZD,BZV->DV", hidden_BZD, d_logits_BZV, preferred_element_type=jnp.float32)
        return (total + jnp.sum(losses_BZ * loss_weights_BZ), d_weights_DV), d_hidden_BZD

    blocks = tuple(_chunks(x, chunk) for x in (hidden_BSD, targets_BS, loss_weights_BS))  # padding has weight 0
    # Accumulated transposed, (D, V), so that the smaller factor is transposed, not the gradient of the logits.
    start = (jnp.float32(0), jnp.zeros(weights_VD.shape[::-1], jnp.float32))
    (total, d_weights_DV), d_hidden_CBZD = jax.lax.scan(one, start, blocks)
    d_hidden_BSD = jnp.moveaxis(d_hidden_CBZD, 0, 1).reshape(len(targets_BS), -1, hidden_BSD.shape[-1])
    return total, (d_hidden_BSD[:, : hidden_BSD.shape[1]], d_weights_DV.T.astype(weights_VD.dtype))


def _backward(chunk, gradients, cotangent):
    d_hidden_BSD, d_weights_VD = gradients
    scale = cotangent.astype(d_hidden_BSD.dtype)
    return d_hidden_BSD * scale, d_weights_VD * scale, None, None


_weighted_loss.defvjp(_forward, _backward)
