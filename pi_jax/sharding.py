"""The mesh, and the only table that maps logical axes to mesh axes.

Every dimension of every parameter and activation has a logical name. `ShardingRules` says over which axes of the mesh
("data", "fsdp", "context", "tensor") it is split; all other modules speak of logical names only. The mesh is explicit
(`jax.set_mesh`): a sharding is part of an array's type, and a mistake is an error while tracing.

FSDP: parameters, gradients and optimizer state are split along `embed` over "fsdp", and over "context" besides, whose
devices need the same weights. `gather` assembles a weight just before its use; its transpose splits the gradient again,
so no device ever holds a whole model of either.

Context parallelism: each device has a part of every row and gathers the keys and values of the whole row. Causality
would give the last device most of the work, so a row is cut into two chunks a device and device i of n holds chunks i
and 2n - 1 - i, "zigzag": all have the same number of keys to visit. `put_batch` lays rows out so.

Outside a mesh all functions here do nothing, so a model runs on one device without a word about sharding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pi_jax import trees
from pi_jax.config import MeshConfig
from pi_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "context", "tensor")
LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis or axes; None: never split."""

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
        """The partition of an array whose dimensions have these logical names.

        Raises:
          ValueError: if two dimensions would be split over the same mesh axis.
        """
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for part in parts if part for name in _names(part)]
        if len(used) != len(set(used)):
            raise ValueError(f"axes {axes} map to {parts}: a mesh axis can split one dimension only")
        return PartitionSpec(*parts)


RULES = ShardingRules()
GATHERED = dataclasses.replace(RULES, embed=None)
"""Rules of a weight assembled for use: as stored, but whole along what FSDP splits."""


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of all devices, or of those given; a size of -1 takes what the others leave.

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
    """The same devices with those of the context axis given to rows: one new token has no sequence to split."""
    sizes = dict(mesh.shape) | {"context": 1, "fsdp": mesh.shape["fsdp"] * mesh.shape["context"]}
    # Parameters stay where they are.
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Explicit,) * 4)


def row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES.batch)


def require_divisible(mesh: Mesh, sizes: dict[str, tuple[int, str]]) -> None:
    """Checks that dimensions divide over the mesh; `sizes` maps a field's name to (its size, logical axis).

    Raises:
      InputError: naming the field, its size and the shards it would be cut into.
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


def _in_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def named(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """The sharding of a stored array with these logical axes."""
    return NamedSharding(mesh, RULES.spec(axes))


def shard_tree(mesh: Mesh, tree, axes: dict[str, LogicalAxes]):
    """The sharding of each leaf of a tree of parameters, by the logical axes of its name."""
    return trees.map_with_name(lambda name, _: named(mesh, axes[name]), tree)


def gather(weight: jax.Array, axes: LogicalAxes) -> jax.Array:
    """A stored parameter made whole along its FSDP axis, for use on every device; the gradient is split again."""
    return jax.reshard(weight, GATHERED.spec(axes)) if _in_mesh() else weight


def einsum(equation: str, *operands: jax.Array, axes: LogicalAxes, dtype=None) -> jax.Array:
    """`jnp.einsum` whose result has the sharding of activations with these logical axes, and that dtype if given."""
    out_sharding = GATHERED.spec(axes) if _in_mesh() else None
    return jnp.einsum(equation, *operands, preferred_element_type=dtype, out_sharding=out_sharding)


def take(table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """Rows of an embedding table for tokens."""
    out = GATHERED.spec(("batch", "sequence", None)) if _in_mesh() else None
    return table_VD.at[tokens_BS].get(out_sharding=out)


def gather_sequence(x_BS):
    """An array of tokens with its sequence whole on every device, so that parts of it can be cut out."""
    return jax.reshard(x_BS, GATHERED.spec(("batch",) + (None,) * (x_BS.ndim - 1))) if _in_mesh() else x_BS


def on_every_device(tree):
    """Arrays made whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), tree) if _in_mesh() else tree


def zigzag(length: int, shards: int) -> np.ndarray:
    """Place in the row of each token of a row laid out for `shards` devices: [0 .. length) if there is one."""
    chunks = np.arange(length).reshape(2 * shards, -1) if shards > 1 else np.arange(length)[None]
    order = [c for i in range(shards) for c in (i, 2 * shards - 1 - i)] if shards > 1 else [0]
    return chunks[order].reshape(-1)


def _in_order(x_BT):
    """A whole row out of zigzag order: even chunks ascend, odd ones descend (no gather: its gradient is slow)."""
    shards = jax.sharding.get_abstract_mesh().shape[RULES.sequence]
    pairs = x_BT.reshape(x_BT.shape[0], shards, 2, -1, *x_BT.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], axis=1)], axis=1).reshape(x_BT.shape)


def attend(attention, q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, zigzag=False):
    """Calls `attention(q, k, v, segment_ids=[, q_positions=])` on each device's own rows, heads and queries.

    Rows and heads are independent. Where the sequence is split, every device needs all keys and values of its rows up
    to its queries: they are gathered over the context axis, and the queries are told their place in the row.
    """
    if not _in_mesh():
        return attention(q_BSNH, k_BSKH, v_BSKH, segment_ids=segment_ids_BS)
    split = jax.sharding.get_abstract_mesh().shape[RULES.sequence] > 1
    whole = GATHERED.spec(("batch", None, "kv_heads", None))
    k_BSKH, v_BSKH = (jax.reshard(x, whole) for x in (k_BSKH, v_BSKH))
    segments = ()
    if segment_ids_BS is not None:
        segments = (segment_ids_BS, jax.reshard(segment_ids_BS, GATHERED.spec(("batch", None))))

    def local(q, k, v, *segments):
        if not split:  # said without positions, so that backends which take none can be used
            return attention(q, k, v, segment_ids=segments or None)
        shard, length = jax.lax.axis_index(RULES.sequence), q.shape[1]
        place = shard * length + jnp.arange(length)
        if zigzag:
            k, v, *segments = (*map(_in_order, (k, v)), *segments[:1], *map(_in_order, segments[1:]))
            half, last = length // 2, 2 * k.shape[1] // length - 1
            place = jnp.arange(half) + half * jnp.stack([shard, last - shard])[:, None]
        q_positions = jnp.broadcast_to(place.reshape(-1), q.shape[:2])
        return attention(q, k, v, segment_ids=tuple(segments) or None, q_positions=q_positions)

    out_specs = jax.typeof(q_BSNH).sharding.spec
    return jax.shard_map(local, out_specs=out_specs, check_vma=False)(q_BSNH, k_BSKH, v_BSKH, *segments)


def on_rows_and_heads(function, *arrays, out: tuple[LogicalAxes, ...]):
    """Calls `function(*arrays)` on each device's own rows and heads; `out` names the axes of its results."""
    if not _in_mesh():
        return function(*arrays)
    return jax.shard_map(function, out_specs=tuple(GATHERED.spec(axes) for axes in out), check_vma=False)(*arrays)


def on_token_shards(function, hidden, weight, *arrays, summed: bool):
    """Calls `function(hidden, weight, *arrays)` on each device's own tokens, with the whole weight.

    `function` returns a value a token, or with `summed` one number, which is added up over all devices. So the gradient
    of the weight is added up once, not once for each chunk of a loop inside the function.
    """
    if not _in_mesh():
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


def put_tree(mesh: Mesh, tree, axes: dict[str, LogicalAxes]):
    """Parameters on (another arrangement of) a mesh, by the logical axes of their names."""
    return jax.device_put(tree, shard_tree(mesh, tree, axes))


def put_same(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global batch, [B, S] or [B] each, that every process holds whole: each places what its own devices need."""
    axes = ("batch", "sequence")
    return {
        k: jax.make_array_from_callback(v.shape, named(mesh, axes[: v.ndim]), v.__getitem__) for k, v in batch.items()
    }


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array on every process, wherever its parts are."""
    return np.asarray(x if x.is_fully_addressable or x.is_fully_replicated else _gathered(x))


@jax.jit
def _gathered(x):
    return on_every_device(x)


def local_rows(mesh: Mesh, rows: int) -> slice:
    """The rows of a global batch that the devices of this process need."""
    spans = [index[0].indices(rows)[:2] for index in _placed_rows(mesh, rows)]
    return slice(min(first for first, _ in spans), max(last for _, last in spans))


def _placed_rows(mesh: Mesh, rows: int):
    return named(mesh, ("batch",)).addressable_devices_indices_map((rows,)).values()


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], first: int = 0, rows: int | None = None
) -> dict[str, jax.Array]:
    """Rows of a global batch as global arrays, in zigzag order, split over the mesh.

    Args:
      mesh: where to.
      batch: [B, S] each: at least the rows that this process needs, `local_rows`.
      first: row of the global batch that `batch` begins with.
      rows: of the global batch; None: those of `batch`.
    """
    place = named(mesh, ("batch", "sequence"))
    here, length = next(iter(batch.values())).shape
    order = zigzag(length, mesh.shape[RULES.sequence])

    def put(x_BS):
        def part(index):
            start, stop, _ = index[0].indices(rows or here)
            return x_BS[start - first : stop - first, order[index[1]]]

        return jax.make_array_from_callback((rows or here, length), place, part)

    return jax.tree.map(put, batch)


def split_rows(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """[B, S] -> [parts, B / parts, S]: parts of a batch, each spread over the same devices as the whole."""

    def split(x_BS):
        shape = (x_BS.shape[0] // parts, parts, x_BS.shape[1])
        out = RULES.spec(("batch", None, "sequence")) if _in_mesh() else None
        return jnp.moveaxis(jnp.reshape(x_BS, shape, out_sharding=out), 1, 0)

    return jax.tree.map(split, batch)
