"""Checksums of the arrays in a checkpoint, which do not depend on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pi_jax import trees

_PRIME = 0x01000193
_ROWS = 1 << 17  # number of values that `fingerprint_of_part` processes at a time


def _fingerprint(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the position-weighted sum of an array's bits mod 2^32, and whether all its values are finite."""
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis, out_sharding=jax.typeof(bits).sharding)
        place = place * jnp.uint32(_PRIME) + step
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32), finite


def fingerprint_of_part(x: np.ndarray, first: int = 0) -> int:
    """Returns the checksum of the part of an array that begins at `first` along the first axis.

    The sum of the checksums of all parts, mod 2^32, equals the result of `fingerprint`. This version runs on the host
    and is twenty times as fast: within a row the weights grow linearly, so two matrix products, exact in float64, give
    the contribution of the row.
    """
    columns = x.shape[-1]
    starts = np.zeros(1, np.uint32)
    for axis, size in enumerate(x.shape[:-1]):
        here = np.arange(size, dtype=np.uint32) + np.uint32(first if axis == 0 else 0)
        starts = (starts[:, None] * np.uint32(_PRIME) + here).reshape(-1)
    starts = starts * np.uint32(_PRIME if x.ndim > 1 else 0) + np.uint32(0 if x.ndim > 1 else first)
    halves = np.ascontiguousarray(x).view(np.uint16).reshape(len(starts), columns, -1)
    ones_and_places = np.stack([np.ones(columns), np.arange(columns)], axis=1)
    total, step = 0, max(1, _ROWS // columns)
    for row in range(0, len(starts), step):
        weights = (2 * starts[row : row + step] + np.uint32(1)).astype(np.uint64)
        for half in range(halves.shape[2]):
            sums = (halves[row : row + step, :, half].astype(np.float64) @ ones_and_places).astype(np.uint64)
            total += int((sums[:, 0] * weights + 2 * sums[:, 1]).sum(dtype=np.uint64)) << (16 * half)
    return total % 2**32


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    on_device = jax.device_put(leaves, jax.memory.Space.Device)
    return {name: _fingerprint(x) for name, x in on_device.items()}


def fingerprint(state: Any) -> dict[str, int]:
    """Maps the name of each array to the checksum of its content, which is the same on every mesh.

    Raises:
      FloatingPointError: if an array contains values that are not finite, so that such a state never replaces a good
        checkpoint.
    """
    leaves = trees.by_name(state)
    offloaded = [name for name, x in leaves.items() if jax.typeof(x).memory_space == jax.memory.Space.Host]
    found = jax.device_get(_fingerprints({name: x for name, x in leaves.items() if name not in offloaded}))
    for name in offloaded:  # one at a time, as the device does not have room for all of them
        found |= jax.device_get(_fingerprints({name: leaves[name]}))
    bad = [name for name, (_, finite) in found.items() if not finite]
    if bad:
        raise FloatingPointError(f"not finite: {', '.join(bad[:5])}")
    return {name: int(checksum) for name, (checksum, _) in found.items()}
