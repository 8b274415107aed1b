"""The mesh, and the only table that maps logical axes to mesh axes.

Every dimension of every parameter and activation has a logical name. `ShardingRules` maps it to the axes of the mesh
("data", "fsdp", "context", "tensor") over which it is sharded. Other modules use logical names only. The mesh is in
explicit mode (`jax.set_mesh`): a sharding is part of an array's type, and a mismatch is an error during tracing.

FSDP: parameters, gradients and optimizer state are sharded along `embed` over "fsdp" and also over "context", whose
devices need the same weights. `gather` all-gathers a weight just before it is used. Its transpose reduce-scatters the
gradient, so no device ever holds a full copy of the model or its gradients.

Context parallelism: each device holds a part of every sequence and gathers the keys and values of the full sequence.
With causal attention, contiguous parts would give the last device most of the work. Instead, a sequence is split into
two chunks per device, and device i of n holds chunks i and 2n - 1 - i ("zigzag"), so that all attend to the same number
of keys. `put_batch` creates this layout.

Without a mesh, the functions that move or constrain arrays do nothing, so the same model code runs on one device.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pi_jax.config import MeshConfig
from pi_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "context", "tensor")
LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis or axes; None: never sharded."""

    # Activations.
    batch: tuple[str, ...] = ("data", "fsdp")
    sequence: str | None = "context"
    # Parameters; heads, mlp and vocab name the same dimensions of activations.
    layers: str | None = None
    embed: tuple[str, ...] | None = ("fsdp", "context")
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head: str | None = None
    norm: str | None = None
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"

    def spec(self, axes: LogicalAxes) -> PartitionSpec:
        """Returns the partition of an array whose dimensions have these logical names.

        Raises:
          ValueError: if two dimensions would be sharded over the same mesh axis.
        """
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for part in parts if part for name in _names(part)]
        if len(used) != len(set(used)):
            raise ValueError(f"axes {axes} map to {parts}: a mesh axis can shard one dimension only")
        return PartitionSpec(*parts)


RULES = ShardingRules()
GATHERED = dataclasses.replace(RULES, embed=None)
"""Rules for a weight that has been gathered for use: as stored, but not sharded by FSDP."""


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Makes a mesh of all devices, or of those given. A size of -1 is computed from the others.

    Raises:
      InputError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    rest = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % rest == 0:
        sizes[sizes.index(-1)] = len(devices) // rest
    if math.prod(sizes) != len(devices):
        given = ", ".join(f"{a}={getattr(config, a)}" for a in MESH_AXES)
        raise InputError(f"mesh {given} does not fit {len(devices)} devices: the sizes must multiply to that number")
    return jax.make_mesh(tuple(sizes), MESH_AXES, (AxisType.Explicit,) * 4, devices=devices)


def for_generation(mesh: Mesh) -> Mesh:
    """Returns the same devices with the context axis merged into fsdp: one new token has no sequence to shard."""
    sizes = dict(mesh.shape) | {"context": 1, "fsdp": mesh.shape["fsdp"] * mesh.shape["context"]}
    # Parameters stay on the same devices.
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Explicit,) * 4)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch dimension."""
    return math.prod(mesh.shape[axis] for axis in RULES.batch)


def require_divisible(mesh: Mesh, sizes: dict[str, tuple[int, str]]) -> None:
    """Checks that dimensions divide over the mesh; `sizes` maps a field's name to (its size, logical axis).

    Raises:
      InputError: if one does not, naming the field, its size and the number of shards.
    """
    for name, (size, axis) in sizes.items():
        rule = getattr(RULES, axis) or ()
        shards = math.prod(mesh.shape[a] for a in _names(rule))
        if size % shards:
            fitting = ", ".join(str(n) for n in range(1, min(size, jax.device_count(), 1024) + 1) if size % n == 0)
            raise InputError(
                f"{name} is {size}, which does not divide over {shards} devices ({axis} axis of the mesh): "
                f"{fitting} would do"
            )


def in_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def named(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """Returns the sharding of a stored array with these logical axes."""
    return NamedSharding(mesh, RULES.spec(axes))


def gather(weight: jax.Array, axes: LogicalAxes) -> jax.Array:
    """All-gathers a stored parameter along its FSDP axes; the gradient is reduce-scattered."""
    return jax.reshard(weight, GATHERED.spec(axes)) if in_mesh() else weight


def einsum(equation: str, *operands: jax.Array, axes: LogicalAxes, dtype=None) -> jax.Array:
    """`jnp.einsum` with the sharding of activations with these logical axes and, if given, `dtype` for its result."""
    out_sharding = GATHERED.spec(axes) if in_mesh() else None
    return jnp.einsum(equation, *operands, preferred_element_type=dtype, out_sharding=out_sharding)


def take(table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """Looks up the embeddings of tokens."""
    out = GATHERED.spec(("batch", "sequence", None)) if in_mesh() else None
    return table_VD.at[tokens_BS].get(out_sharding=out)


def gather_sequence(x_BS):
    """All-gathers an array along its sequence dimension, so that it can be sliced."""
    return jax.reshard(x_BS, GATHERED.spec(("batch",) + (None,) * (x_BS.ndim - 1))) if in_mesh() else x_BS


def replicate(tree):
    """Replicates arrays on all devices, so that every process can read them."""
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), tree) if in_mesh() else tree


def shard_map_batch_heads(function, *arrays, out: tuple[LogicalAxes, ...]):
    """Calls `function(*arrays)` per device, on its sequences and heads; `out` has the logical axes of the results."""
    if not in_mesh():
        return function(*arrays)
    return jax.shard_map(function, out_specs=tuple(GATHERED.spec(axes) for axes in out), check_vma=False)(*arrays)


def shard_map_tokens(function, hidden, weight, *arrays, summed: bool):
    """Calls `function(hidden, weight, *arrays)` per device, on its tokens and the full weight.

    `function` returns a value per token or, if `summed`, one number, which is summed over all devices. The gradient of
    the weight is then reduced once, not once per chunk of a loop inside the function.
    """
    if not in_mesh():
        return function(hidden, weight, *arrays)
    weight = jax.reshard(weight, PartitionSpec())
    tokens = PartitionSpec(*jax.typeof(hidden).sharding.spec[:2])
    if not summed:
        return jax.shard_map(function, out_specs=tokens, check_vma=False)(hidden, weight, *arrays)
    axes = tuple(name for part in tokens if part for name in _names(part))

    def local(*shards):
        return jax.lax.psum(function(*shards), axes)

    return jax.shard_map(local, out_specs=PartitionSpec(), check_vma=False)(hidden, weight, *arrays)


def _names(part) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part)
