"""Placement of arrays on the mesh: parameters by their logical axes, batches in zigzag order."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pi_jax import trees
from pi_jax.parallel.sharding import RULES, LogicalAxes, in_mesh, named, replicate


def shard_tree(mesh: Mesh, tree, axes: dict[str, LogicalAxes]):
    """Returns the sharding of each leaf of a parameter tree; `axes` maps its name to logical axes."""
    return trees.map_with_name(lambda name, _: named(mesh, axes[name]), tree)


def zigzag(length: int, shards: int) -> np.ndarray:
    """Returns the order in which the tokens of a sequence are stored for `shards` devices: natural order for one."""
    chunks = np.arange(length).reshape(2 * shards, -1) if shards > 1 else np.arange(length)[None]
    order = [c for i in range(shards) for c in (i, 2 * shards - 1 - i)] if shards > 1 else [0]
    return chunks[order].reshape(-1)


def put_params(mesh: Mesh, tree, axes: dict[str, LogicalAxes]):
    """Moves parameters to a mesh; `axes` maps the name of each to its logical axes."""
    return jax.device_put(tree, shard_tree(mesh, tree, axes))


def put_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Shards a batch that every process has in full, arrays [B, S] or [B]; each process places its devices' shards."""
    axes = ("batch", "sequence")
    return {
        k: jax.make_array_from_callback(v.shape, named(mesh, axes[: v.ndim]), v.__getitem__) for k, v in batch.items()
    }


def fetch(x: jax.Array) -> np.ndarray:
    """Returns a sharded array as a full NumPy array on every process."""
    return np.asarray(x if x.is_fully_addressable or x.is_fully_replicated else _gathered(x))


@jax.jit
def _gathered(x):
    return replicate(x)


def local_batch_slice(mesh: Mesh, batch_size: int) -> slice:
    """Returns which sequences of a global batch the devices of this process need."""
    indices = named(mesh, ("batch",)).addressable_devices_indices_map((batch_size,)).values()
    spans = [index[0].indices(batch_size)[:2] for index in indices]
    return slice(min(first for first, _ in spans), max(last for _, last in spans))


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], first: int = 0, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Shards the sequences of a batch over the mesh, with the tokens of each in zigzag order.

    Args:
      mesh: the mesh.
      batch: arrays [B, S] with at least the sequences that this process needs, see `local_batch_slice`.
      first: index in the global batch of the first sequence in `batch`.
      batch_size: sequences of the global batch; None if `batch` is all of it.
    """
    sharding = named(mesh, ("batch", "sequence"))
    local, length = next(iter(batch.values())).shape
    order = zigzag(length, mesh.shape[RULES.sequence])

    def put(x_BS):
        def part(index):
            start, stop, _ = index[0].indices(batch_size or local)
            return x_BS[start - first : stop - first, order[index[1]]]

        return jax.make_array_from_callback((batch_size or local, length), sharding, part)

    return jax.tree.map(put, batch)


def split_batch(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """Splits a batch [B, S] into microbatches [parts, B / parts, S], each sharded over all devices of the batch."""

    def split(x_BS):
        shape = (x_BS.shape[0] // parts, parts, x_BS.shape[1])
        out = RULES.spec(("batch", None, "sequence")) if in_mesh() else None
        return jnp.moveaxis(jnp.reshape(x_BS, shape, out_sharding=out), 1, 0)

    return jax.tree.map(split, batch)
