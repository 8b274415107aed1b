"""Shapes, dtypes and shardings of the train state and the batch, without any arrays; checks of sizes."""

import functools

import jax
import optax

from pi_jax.config import ComputeConfig, Config, DataConfig, ModelConfig
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import placement, sharding
from pi_jax.train.step import TrainState, init_train_state


def abstract_model(config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """Shapes, dtypes and shardings of the model's parameters on a mesh."""
    template = abstract(config, compute)
    return jax.tree.map(_on, template, placement.shard_tree(mesh, template, parameter_axes(template)))


def abstract_state(model: Llama, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state of such a model. Call it with the mesh set."""
    shapes = jax.eval_shape(functools.partial(init_train_state, optimizer=optimizer), model)
    return jax.tree.map(functools.partial(_placed, mesh), shapes)


def abstract_batch(config: DataConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch."""
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.window), "int32")
    tokens = _on(tokens, sharding.named(mesh, ("batch", "sequence")))
    return {k: tokens.update(dtype="float32") if k == "loss_weights" else tokens for k in columns(config)}


def columns(config: DataConfig) -> list[str]:
    """Names of the arrays in a batch; `segment_ids` only if attention between documents is masked."""
    return ["tokens", "targets", "positions", "loss_weights", *(["segment_ids"] if config.segment_masking else [])]


def _on(leaf: jax.ShapeDtypeStruct, place: jax.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _placed(mesh: jax.sharding.Mesh, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Puts an abstract array on the devices of the mesh, with the partition of its type; a step count is replicated."""
    spec, memory = (leaf.sharding.spec, leaf.sharding.memory_kind) if leaf.sharding is not None else (jax.P(), None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec, memory_kind=memory))


def check_sizes(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Checks that the model and the batch divide over the mesh.

    Raises:
      InputError: if one does not, naming the field and sizes that divide.
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
    sequences, parts = config.data.batch_size // sharding.batch_shards(mesh), config.compute.gradient_accumulation_steps
    if sequences % parts:
        raise InputError(
            f"compute.gradient_accumulation_steps is {parts}, not a divisor of the {sequences} sequences per device "
            f"(batch size {config.data.batch_size} over {sharding.batch_shards(mesh)} data-parallel shards)"
        )
    shards = mesh.shape["context"]
    if shards > 1 and config.data.window % (2 * shards):
        raise InputError(
            f"data.window is {config.data.window}: with mesh.context {shards} it must be a multiple of {2 * shards}, "
            "two chunks per device"
        )
