import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pi_jax import trees
from pi_jax.parallel.sharding import RULES, LogicalAxes, in_mesh, named, replicate


def shard_tree(mesh: Mesh, tree, axes: dict[str, LogicalAxes]):
    """The sharding of each leaf of a tree of parameters, by the logical axes of its name."""
    return trees.map_with_name(lambda name, _: named(mesh, axes[name]), tree)


def zigzag(length: int, shards: int) -> np.ndarray:
    """Place in the row of each token of a row laid out for `shards` devices: [0 .. length) if there is one."""
    chunks = np.arange(length).reshape(2 * shards, -1) if shards > 1 else np.arange(length)[None]
    order = [c for i in range(shards) for c in (i, 2 * shards - 1 - i)] if shards > 1 else [0]
    return chunks[order].reshape(-1)


def put_params(mesh: Mesh, tree, axes: dict[str, LogicalAxes]):
    """Parameters on (another arrangement of) a mesh, by the logical axes of their names."""
    return jax.device_put(tree, shard_tree(mesh, tree, axes))


def put_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
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
    return replicate(x)


def local_batch_slice(mesh: Mesh, rows: int) -> slice:
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
      batch: [B, S] each: at least the rows that this process needs, `local_batch_slice`.
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


def split_batch(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """[B, S] -> [parts, B / parts, S]: parts of a batch, each spread over the same devices as the whole."""

    def split(x_BS):
        shape = (x_BS.shape[0] // parts, parts, x_BS.shape[1])
        out = RULES.spec(("batch", None, "sequence")) if in_mesh() else None
        return jnp.moveaxis(jnp.reshape(x_BS, shape, out_sharding=out), 1, 0)

    return jax.tree.map(split, batch)
