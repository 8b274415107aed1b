"""One update of the model: its state, the loss of a batch, and the compiled step."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pi_jax.model import Llama
from pi_jax.model.loss import weighted_loss
from pi_jax.parallel import placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes between steps."""

    step: jax.Array
    """Number of updates so far, int32."""
    model: Llama
    opt_state: optax.OptState


StepFn = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_step(optimizer: optax.GradientTransformationExtraArgs) -> StepFn:
    """Returns the compiled update (state, batch) -> (state, {'loss', 'grad_norm'}), which donates the old state.

    If the loss or the gradient is not finite, weights and optimizer stay as they are; only the step counts.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradients = _loss_and_gradients(state.model, batch)
        grad_norm = optax.tree.norm(gradients)
        with jax.named_scope("optimizer"):
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.model, finite=finite)
            model = optax.apply_updates(state.model, updates)
            # The weights and not the updates are chosen between: with updates of 0, 7B needs up to 15 GiB more.
            model = jax.tree.map(functools.partial(jnp.where, finite), model, state.model)
        return TrainState(state.step + 1, model, opt_state), {"loss": loss, "grad_norm": grad_norm}

    return step


def batch_loss(model: Llama, batch: dict[str, Array], total: Float[Array, ""] | None = None) -> Float[Array, ""]:
    """Mean loss in nats per token, weighted by `loss_weights`, of a batch placed by `placement.put_batch`.

    Args:
      model: the model.
      batch: `tokens`, `targets`, `positions`, optionally `segment_ids` (integers), and `loss_weights` (float32), each
        [B, S].
      total: divisor of the sum, if this is one part of a batch; None: the sum of the weights.
    """
    hidden_BSD = model(batch["tokens"], batch["positions"], batch.get("segment_ids"), zigzag=True)
    weights_BS = batch["loss_weights"]
    with jax.named_scope("loss"):
        chunk = model.compute.loss_chunk
        summed = weighted_loss(hidden_BSD, model.output_weights(), batch["targets"], weights_BS, chunk)
        return summed / (total_weight(batch) if total is None else total)


def total_weight(batch: dict[str, Array]) -> Float[Array, ""]:
    """Sum of the loss weights of a batch, at least 1."""
    return jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)


def _loss_and_gradients(model: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, Llama]:
    """Loss and gradients of the mean over all tokens of the batch, for any number of microbatches."""
    parts = model.compute.gradient_accumulation_steps
    of_part = functools.partial(jax.value_and_grad(batch_loss), model, total=total_weight(batch))
    if parts == 1:
        return of_part(batch)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, model))
    return jax.lax.scan(add, nothing, placement.split_batch(batch, parts))[0]


def init_train_state(model: Llama, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state at step 0. On an explicit mesh, moments are sharded like their parameters."""

    @jax.jit
    def rest(model):
        return jnp.int32(0), optimizer.init(model)

    step, opt_state = rest(model)
    return TrainState(step, model, opt_state)
