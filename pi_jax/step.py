"""One update of the model: its state, the compiled step, and the shapes and places of both without any arrays."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pi_jax import sharding
from pi_jax.config import ComputeConfig, Config, DataConfig, ModelConfig
from pi_jax.errors import InputError
from pi_jax.loss import batch_loss, total_weight
from pi_jax.model import Llama, abstract, parameter_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step."""

    step: jax.Array
    """Finished updates, int32."""
    model: Llama
    opt_state: optax.OptState


StepFn = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_step(optimizer: optax.GradientTransformation) -> StepFn:
    """The compiled update: (state, batch) -> (state, {'loss', 'grad_norm'}); it takes the old state's memory."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradients = _loss_and_gradients(state.model, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
        values = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, model, opt_state), values

    return step


def _loss_and_gradients(model: Llama, batch: dict[str, jax.Array]) -> tuple[jax.Array, Llama]:
    """Of the mean over all tokens of the batch, whatever the number of parts it is computed in."""
    parts = model.compute.accumulation
    of_part = functools.partial(jax.value_and_grad(batch_loss), model, total=total_weight(batch))
    if parts == 1:
        return of_part(batch)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, model))
    return jax.lax.scan(add, nothing, sharding.split_rows(batch, parts))[0]


def first_state(model: Llama, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0; on an explicit mesh the optimizer's moments come out split like their parameters."""

    @jax.jit
    def rest(model):
        return jnp.int32(0), optimizer.init(model)

    step, opt_state = rest(model)
    return TrainState(step, model, opt_state)


def abstract_model(config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """Shapes, dtypes and places of the model's arrays on a mesh."""
    template = abstract(config, compute)
    return jax.tree.map(_on, template, sharding.shard_tree(mesh, template, parameter_axes(template)))


def abstract_state(model: Llama, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and places of all that `first_state` makes of such a model; call it with the mesh set."""
    shapes = jax.eval_shape(functools.partial(first_state, optimizer=optimizer), model)
    return jax.tree.map(functools.partial(_placed, mesh), shapes)


def abstract_batch(config: DataConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of what a step reads."""
    place = sharding.named(mesh, ("batch", "sequence"))
    rows = _on(jax.ShapeDtypeStruct((config.batch_size, config.window), "int32"), place)
    return {k: rows.update(dtype="float32") if k == "loss_weights" else rows for k in columns(config)}


def columns(config: DataConfig) -> list[str]:
    """What a step reads of a batch. Where documents may see each other no backend need know of them."""
    return ["tokens", "targets", "positions", "loss_weights", *(["segment_ids"] if config.segment_masking else [])]


def _on(leaf: jax.ShapeDtypeStruct, place: jax.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _placed(mesh: jax.sharding.Mesh, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A shape whose partition is known by its type, on the devices of the mesh; a step count is on all of them."""
    spec, memory = (leaf.sharding.spec, leaf.sharding.memory_kind) if leaf.sharding is not None else (jax.P(), None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec, memory_kind=memory))


def check_sizes(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Checks that the model and the batch divide over the mesh.

    Raises:
      InputError: naming the field, its value and what would do.
    """
    sizes = {
        "data.batch_size": (config.data.batch_size, "batch"),
        "data.window": (config.data.window, "sequence"),
        "model.hidden_size": (model.hidden_size, "embed"),
        "model.num_attention_heads": (model.num_attention_heads, "heads"),
        "model.num_key_value_heads": (model.num_key_value_heads, "kv_heads"),
        "model.intermediate_size": (model.intermediate_size, "mlp"),
        "model.vocab_size": (model.vocab_size, "vocab"),
    }
    sharding.require_divisible(mesh, sizes)
    rows_each, parts = config.data.batch_size // sharding.row_shards(mesh), config.compute.accumulation
    if rows_each % parts:
        raise InputError(
            f"compute.accumulation is {parts}, which does not divide the {rows_each} rows a device has of a batch of "
            f"{config.data.batch_size} over {sharding.row_shards(mesh)} parts of the mesh"
        )
    shards = mesh.shape["context"]
    if shards > 1 and config.data.window % (2 * shards):
        raise InputError(
            f"data.window is {config.data.window}: with mesh.context {shards} it must be a multiple of {2 * shards}, "
            "two chunks a device"
        )
