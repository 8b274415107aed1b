"""Orbax checkpoints that are whole, checked and never silently skipped; the only module that knows Orbax.

A state is stored as a flat dict of arrays by name ("model.layers.attention.q"), readable by any zarr3 reader. Each
checkpoint carries fingerprints of its arrays, because one flipped bit in array data loads without an error, and a
leftover empty folder named after a step would pass for the latest. A restore takes the newest step that checks out,
says why it left newer ones, and never falls back to starting afresh.

Layers are stacked in one array; on disk each layer is a chunk of its own, so that a model can be read and written a
layer at a time (`Checkpoints.open_weights`, `WeightsWriter`), which is how weights are converted without holding them.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from pi_jax import trees
from pi_jax.config import CheckpointConfig
from pi_jax.errors import InputError

_STATE = "state"  # Orbax's name for the folder of the arrays
_METADATA = "_CHECKPOINT_METADATA"
_PRIME = 0x01000193
_ROWS = 1 << 17  # values whose checksum is taken at a time


def _fingerprint(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The position-weighted sum of an array's bits mod 2^32 (whatever the mesh) and whether all is finite."""
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis, out_sharding=jax.typeof(bits).sharding)
        place = place * jnp.uint32(_PRIME) + step
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32), finite


def fingerprint_of_part(x: np.ndarray, first: int = 0) -> int:
    """The checksum of a part of an array, which begins at `first` along the first axis; those of the parts add up.

    The same as `fingerprint`, on the host and twenty times as fast: within a row the weights grow evenly, so that two
    products of matrices, exact in float64, hold all that a row contributes.
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
    return {name: _fingerprint(x) for name, x in leaves.items()}


def fingerprint(state: Any) -> dict[str, int]:
    """Name of each array -> checksum of its content, the same on every mesh.

    Raises:
      FloatingPointError: if an array holds values that are not finite; such a state must not push out a good one.
    """
    found = jax.device_get(_fingerprints(trees.by_name(state)))
    bad = [name for name, (_, finite) in found.items() if not finite]
    if bad:
        raise FloatingPointError(f"not finite: {', '.join(bad[:5])}")
    return {name: int(checksum) for name, (checksum, _) in found.items()}


def _context() -> ocp.Context:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    layers_apart = ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))
    context.array.saving.scoped_storage_options_creator = lambda path, _: (
        layers_apart if ".layers." in f".{trees.path_name(path)}" else None
    )
    return context


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came back: `state` at `step`, the metadata saved with it, and why newer steps were left."""

    step: int
    state: Any
    metadata: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The checkpoints of a run; a context manager, because what is in flight is lost without `close`."""

    def __init__(self, folder: str | pathlib.Path, config: CheckpointConfig, writer: bool = True):
        """Opens a folder; only the run itself is its `writer`, which clears away what a dead run left half-written."""
        policies = ocp.training.save_decision_policies
        self._folder = _absolute(folder)
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            context=_context(),
            save_decision_policy=policies.FixedIntervalPolicy(config.every),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=writer,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps there are, newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    def save(self, step: int, state: Any, metadata: dict[str, Any], last: bool = False) -> None:
        """Saves in the background if the interval says so; `last` saves in any case and waits for it.

        Raises:
          FloatingPointError: if the state is not finite.
        """
        if not (last or self._checkpointer.should_save(step)) or step in self.steps():
            return
        metadata = {**metadata, "fingerprint": fingerprint(state)}
        response = self._checkpointer.save_async(step, trees.by_name(state), force=True, custom_metadata=metadata)
        if last:
            response.result()

    def restore(self, template: Any, prefix: str = "") -> Restored | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Args:
          template: pytree of `jax.ShapeDtypeStruct` with shardings: what must be there and where it goes.
          prefix: of the stored names, to restore a part of a state: "model." for the weights alone. A part may be
            wanted in another dtype than it is stored in.

        Raises:
          InputError: if there are checkpoints and none of them is usable.
        """
        wanted = {prefix + name: leaf for name, leaf in trees.by_name(template).items()}
        skipped = []
        for step in self.steps():
            try:
                leaves, metadata = self._load(step, wanted, partial=bool(prefix))
            except InputError as error:
                skipped.append(f"step {step}: {error}")
                continue
            state = jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in wanted])
            return Restored(step, state, metadata, skipped)
        if skipped:
            raise InputError(f"{self._folder} holds no usable checkpoint ({'; '.join(skipped)}): not starting afresh")
        return None

    def open_weights(self, shapes: dict[str, tuple[int, ...]], prefix: str, step: int | None = None) -> "Weights":
        """The stored weights, to be read a layer at a time.

        Args:
          shapes: what must be there, by name without the prefix.
          prefix: of the stored names.
          step: which checkpoint; None: the newest that can be opened.

        Raises:
          InputError: if there is none.
        """
        skipped = []
        for number in self.steps() if step is None else [step]:
            try:
                metadata, found = self._stored(number)
                missing = [name for name in shapes if prefix + name not in found]
                if missing:
                    raise InputError(f"holds another state (lacks {missing[:2]})")
                for name, shape in shapes.items():
                    stored = found[prefix + name]
                    if tuple(stored.shape) != shape:
                        raise InputError(f"{name} has shape {tuple(stored.shape)}, not {shape}")
                checksums = metadata.get("fingerprint", {})
                return Weights(self._folder, number, prefix, list(shapes), checksums)
            except InputError as error:
                skipped.append(f"step {number}: {error}")
        raise InputError(f"{self._folder} holds no usable checkpoint ({'; '.join(skipped) or 'none at all'})")

    def load_unchecked(self, step: int, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Arrays by their stored names, as Orbax reads them: for a caller who knows what must come."""
        try:
            return self._checkpointer.load(step, wanted)
        except Exception as error:
            raise InputError(f"{self._folder} at step {step} cannot be loaded ({_root(error)})") from None

    def _stored(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was saved with a checkpoint, and what is known of its arrays."""
        try:
            stored = self._checkpointer.metadata(step)
            return dict(stored.custom_metadata or {}), dict(stored.metadata or {})
        except Exception as error:  # Orbax raises many kinds, the true reason innermost
            raise InputError(f"unreadable ({_root(error)})") from None

    def _load(self, step: int, wanted: dict[str, Any], partial: bool) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        metadata, found = self._stored(step)
        missing = sorted(set(wanted) - set(found))
        if missing or (not partial and set(found) - set(wanted)):
            extra = sorted(set(found) - set(wanted))
            raise InputError(f"holds another state (lacks {missing[:2]}, has besides {extra[:2]})")
        as_stored = dict(wanted)
        for name, leaf in wanted.items():  # Orbax would cast a dtype silently
            dtype = found[name].dtype
            if tuple(found[name].shape) != leaf.shape or (
                dtype != leaf.dtype and not (partial and _floats(dtype, leaf))
            ):
                raise InputError(f"{name} is {dtype}{found[name].shape}, not {leaf.dtype}{leaf.shape}")
            as_stored[name] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        try:
            leaves = self._checkpointer.load(step, as_stored)
        except Exception as error:
            raise InputError(f"cannot be loaded ({_root(error)})") from None
        expected = metadata.get("fingerprint", {})
        differing = [name for name, checksum in fingerprint(leaves).items() if expected.get(name) != checksum]
        if differing:
            raise InputError(f"content differs from what was saved in {differing[:3]}")
        return {name: leaf.astype(wanted[name].dtype) for name, leaf in leaves.items()}, metadata


def _floats(*arrays: Any) -> bool:
    return all(jnp.issubdtype(getattr(a, "dtype", a), jnp.floating) for a in arrays)


def _absolute(folder: str | pathlib.Path) -> epath.Path:
    return epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))


def _open_array(folder: epath.Path, step: int, name: str, uncompressed: bool = False) -> ts.TensorStore:
    """An array as it is stored, or made anew, empty and uncompressed."""
    base = f"{folder / str(step) / _STATE}/"
    kvstore = {"driver": "ocdbt", "base": base if "://" in base else f"file://{base}", "path": f"{name}/"}
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore}
    try:
        array = ts.open(spec, open=True).result()
        if uncompressed:
            metadata = array.spec().to_json()["metadata"]
            for codec in metadata["codecs"]:
                if codec["name"] == "sharding_indexed":
                    inside = codec["configuration"]["codecs"]
                    codec["configuration"]["codecs"] = [c for c in inside if c["name"] != "zstd"]
            array = ts.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
        return array
    except ValueError as error:
        raise InputError(f"{name} cannot be opened ({str(error)[:200]})") from None


class Weights:
    """The weights in one checkpoint, read a layer at a time; what was read is checked once an array is through."""

    def __init__(self, folder: epath.Path, step: int, prefix: str, names: list[str], checksums: dict[str, int]):
        """Opens the arrays and reads nothing yet."""
        self.step = step
        self._where = f"{folder} at step {step}"
        self._arrays = {name: _open_array(folder, step, prefix + name) for name in names}
        self._wanted = {name: checksums.get(prefix + name) for name in names}
        self._found: dict[str, dict[int, int]] = {name: {} for name in names}
        self.dtypes = {name: array.dtype.numpy_dtype for name, array in self._arrays.items()}
        self._held: tuple[str, np.ndarray] | None = None

    @property
    def layers_apart(self) -> bool:
        """Whether each layer is a chunk of its own; else it takes the whole array to read one."""
        return all(
            array.chunk_layout.read_chunk.shape[0] == 1
            for name, array in self._arrays.items()
            if name.startswith("layers.")
        )

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """An array, or one layer of it.

        Raises:
          InputError: if it cannot be read; with the last layer, if the array is not what was saved.
        """
        try:
            if layer is not None and not self.layers_apart:
                if self._held is None or self._held[0] != name:
                    self._held = None  # before the next one comes
                    self._held = (name, self._arrays[name].read().result())
                part = self._held[1][layer : layer + 1]
            else:
                part = self._arrays[name][... if layer is None else slice(layer, layer + 1)].read().result()
        except ValueError as error:
            raise InputError(f"{self._where}: {name} cannot be read ({str(error)[:200]})") from None
        sums = self._found[name]
        sums[layer or 0] = fingerprint_of_part(part, layer or 0)
        through = layer is None or len(sums) == self._arrays[name].shape[0]
        if through and sum(sums.values()) % 2**32 != self._wanted[name]:
            raise InputError(f"{self._where}: {name} differs from what was saved: take another step")
        return part if layer is None else part[0]


class _Blank(np.ndarray):
    """Zeros without memory; Orbax copies what it saves, and a copy would have some."""

    def __deepcopy__(self, memo):
        return self


class WeightsWriter:
    """A checkpoint at step 0 that holds weights alone, written a layer at a time.

    Orbax lays it out, with zeros for arrays; then the layers are filled in, and last the fingerprints. Not compressed:
    weights would shrink by a quarter, at a fraction of the speed.
    """

    def __init__(self, folder: str | pathlib.Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], prefix: str):
        """Lays out the checkpoint.

        Args:
          folder: of the checkpoints; must be new.
          shapes: shape and dtype of each array, by name without the prefix.
          prefix: of the stored names.
        """
        self._folder, self._prefix = _absolute(folder), prefix
        blank = {
            prefix + name: np.broadcast_to(np.zeros((), dtype), shape).view(_Blank)
            for name, (shape, dtype) in shapes.items()
        }
        try:
            with ocp.training.Checkpointer(self._folder, context=_context()) as checkpointer:
                checkpointer.save(0, blank, force=True)
        except Exception as error:  # Orbax raises many kinds
            raise OSError(_reason(error)) from None
        self._arrays = {name: _open_array(self._folder, 0, prefix + name, uncompressed=True) for name in shapes}
        self._sums = dict.fromkeys(shapes, 0)

    def write(self, name: str, layer: int | None, array: np.ndarray) -> None:
        """Fills in an array, or one layer of it."""
        part = array if layer is None else array[None]
        self._sums[name] += fingerprint_of_part(part, layer or 0)
        try:
            self._arrays[name][... if layer is None else slice(layer, layer + 1)].write(part).result()
        except ValueError as error:  # TensorStore's only kind
            raise OSError(_reason(error)) from None

    def close(self) -> None:
        """Adds the fingerprints, without which nothing reads the checkpoint."""
        path = self._folder / "0" / _METADATA
        metadata = json.loads(path.read_text())
        fingerprints = {self._prefix + name: total % 2**32 for name, total in self._sums.items()}
        metadata["custom_metadata"] = {"fingerprint": fingerprints}
        path.write_text(json.dumps(metadata))


def _reason(error: BaseException) -> str:
    """What the operating system said, where a library hands it on in a longer text."""
    error = _innermost(error)
    found = re.search(r"([^:]+) \[os_error_code=", str(error))
    return found.group(1).strip() if found else _root(error)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def _root(error: BaseException) -> str:
    error = _innermost(error)
    return f"{type(error).__name__}: {str(error)[:200]}"
