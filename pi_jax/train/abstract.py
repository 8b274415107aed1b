import functools

import jax
import optax

from pi_jax.config import ComputeConfig, Config, DataConfig, ModelConfig
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import placement, sharding
from pi_jax.train.step import TrainState, init_train_state


def abstract_model(config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """Shapes, dtypes and places of the model's arrays on a mesh."""
    template = abstract(config, compute)
    return jax.tree.map(_on, template, placement.shard_tree(mesh, template, parameter_axes(template)))


def abstract_state(model: Llama, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and places of all that `init_train_state` makes of such a model; call it with the mesh set."""
    shapes = jax.eval_shape(functools.partial(init_train_state, optimizer=optimizer), model)
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
    rows_each, parts = config.data.batch_size // sharding.batch_shards(mesh), config.compute.gradient_accumulation_steps
    if rows_each % parts:
        raise InputError(
            f"compute.gradient_accumulation_steps is {parts}, not a divisor of the {rows_each} sequences per device "
            f"(batch size {config.data.batch_size} over {sharding.batch_shards(mesh)} data-parallel shards)"
        )
    shards = mesh.shape["context"]
    if shards > 1 and config.data.window % (2 * shards):
        raise InputError(
            f"data.window is {config.data.window}: with mesh.context {shards} it must be a multiple of {2 * shards}, "
            "two chunks a device"
        )
