"""Saves and restores Orbax checkpoints, and verifies them.

A state is stored as a flat dict of named arrays ("model.layers.attention.q"), which any zarr3 reader can read. Each
checkpoint contains fingerprints of its arrays, because Orbax loads array data with a flipped bit without an error and
accepts an empty folder named after a step as the latest checkpoint. A restore uses the newest checkpoint that passes
verification and reports why it skipped newer ones. It never falls back to starting from scratch.

Layers are stacked in one array. On disk each layer is a separate chunk, so a model can be read and written one layer at
a time (`Checkpoints.open_weights`, `WeightsWriter`). Conversion relies on this to keep memory low.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from pi_jax import trees
from pi_jax.checkpoint.fingerprint import fingerprint
from pi_jax.checkpoint.layerwise import Weights
from pi_jax.checkpoint.storage import absolute, root_cause, storage_context
from pi_jax.config import CheckpointConfig
from pi_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state."""

    step: int
    state: Any
    metadata: dict[str, Any]
    """Metadata that was saved with the state."""
    skipped: list[str]
    """For each newer checkpoint that was skipped, its step and the reason."""


class Checkpoints:
    """The checkpoints of a run. A context manager, because pending writes are lost unless it is closed."""

    def __init__(self, folder: str | pathlib.Path, config: CheckpointConfig, writer: bool = True):
        """Opens a folder of checkpoints.

        Args:
          folder: local folder or URL.
          config: how often to save, and how many checkpoints to keep.
          writer: whether this is the training run. If so, incomplete checkpoints of an interrupted run are deleted.
        """
        policies = ocp.training.save_decision_policies
        self._folder = absolute(folder)
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            context=storage_context(),
            save_decision_policy=policies.FixedIntervalPolicy(config.every),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=writer,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    def save(self, step: int, state: Any, metadata: dict[str, Any], last: bool = False) -> None:
        """Saves in the background if a checkpoint is due at this step.

        Args:
          step: step of the state.
          state: pytree of arrays.
          metadata: JSON values to save with it.
          last: save even if no checkpoint is due, and wait until it is written.

        Raises:
          FloatingPointError: if the state contains values that are not finite.
        """
        if not (last or self._checkpointer.should_save(step)) or step in self.steps():
            return
        metadata = {**metadata, "fingerprint": fingerprint(state)}
        response = self._checkpointer.save_async(step, trees.by_name(state), force=True, custom_metadata=metadata)
        if last:
            response.result()

    def metadata(self) -> dict[str, Any]:
        """Returns what was saved with the newest checkpoint whose metadata can be read; {} if there is none."""
        for step in self.steps():
            with contextlib.suppress(InputError):
                if metadata := self._stored(step)[0]:
                    return metadata
        return {}

    def restore(self, template: Any, prefix: str = "") -> Restored | None:
        """Restores the newest usable checkpoint; returns None if there are no checkpoints.

        Args:
          template: pytree of `jax.ShapeDtypeStruct` with shardings: the arrays to restore.
          prefix: prefix of the stored names, to restore a part of a state, such as "model." for the weights. A part may
            be restored in another dtype than it was saved in.

        Raises:
          InputError: if there are checkpoints but none of them is usable.
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
            raise InputError(
                f"{self._folder} contains no usable checkpoint ({'; '.join(skipped)}): not starting from scratch"
            )
        return None

    def open_weights(self, shapes: dict[str, tuple[int, ...]], prefix: str, step: int | None = None) -> "Weights":
        """Opens stored weights, to read them one layer at a time.

        Args:
          shapes: name of each required array, without the prefix -> its shape.
          prefix: prefix of the stored names.
          step: checkpoint to open; None selects the newest that can be opened.

        Raises:
          InputError: if there is no usable checkpoint.
        """
        skipped = []
        for number in self.steps() if step is None else [step]:
            try:
                metadata, found = self._stored(number)
                missing = [name for name in shapes if prefix + name not in found]
                if missing:
                    raise InputError(f"contains another state: it lacks {missing[:2]}")
                for name, shape in shapes.items():
                    stored = found[prefix + name]
                    if tuple(stored.shape) != shape:
                        raise InputError(f"{name} has shape {tuple(stored.shape)}, not {shape}")
                checksums = metadata.get("fingerprint", {})
                return Weights(self._folder, number, prefix, list(shapes), checksums)
            except InputError as error:
                skipped.append(f"step {number}: {error}")
        raise InputError(f"{self._folder} contains no usable checkpoint ({'; '.join(skipped) or 'there are none'})")

    def load_unchecked(self, step: int, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Loads arrays by their stored names without verifying fingerprints; the caller must verify the result."""
        try:
            return self._checkpointer.load(step, wanted)
        except Exception as error:
            raise InputError(f"{self._folder} at step {step} cannot be loaded ({root_cause(error)})") from None

    def _stored(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the metadata saved with a checkpoint, and the metadata of its arrays by name."""
        try:
            stored = self._checkpointer.metadata(step)
            return dict(stored.custom_metadata or {}), dict(stored.metadata or {})
        except Exception as error:  # Orbax raises many types of exception; the innermost one states the reason
            raise InputError(f"unreadable ({root_cause(error)})") from None

    def _load(self, step: int, wanted: dict[str, Any], partial: bool) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        metadata, found = self._stored(step)
        missing = sorted(set(wanted) - set(found))
        if missing or (not partial and set(found) - set(wanted)):
            extra = sorted(set(found) - set(wanted))
            raise InputError(f"contains another state: it lacks {missing[:2]} and also contains {extra[:2]}")
        as_stored = dict(wanted)
        for name, leaf in wanted.items():  # Orbax would cast to another dtype silently
            dtype = found[name].dtype
            if tuple(found[name].shape) != leaf.shape or (
                dtype != leaf.dtype and not (partial and _floats(dtype, leaf))
            ):
                raise InputError(f"{name} is {dtype}{found[name].shape}, not {leaf.dtype}{leaf.shape}")
            as_stored[name] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        try:
            leaves = self._checkpointer.load(step, as_stored)
        except Exception as error:
            raise InputError(f"cannot be loaded ({root_cause(error)})") from None
        expected = metadata.get("fingerprint", {})
        differing = [name for name, checksum in fingerprint(leaves).items() if expected.get(name) != checksum]
        if differing:
            raise InputError(f"content differs from what was saved in {differing[:3]}")
        return {name: leaf.astype(wanted[name].dtype) for name, leaf in leaves.items()}, metadata


def _floats(*arrays: Any) -> bool:
    return all(jnp.issubdtype(getattr(a, "dtype", a), jnp.floating) for a in arrays)
