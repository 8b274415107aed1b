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
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from pi_jax import log, trees
from pi_jax.atomic import is_remote
from pi_jax.checkpoint.fingerprint import fingerprint, fingerprint_of_part
from pi_jax.checkpoint.layerwise import Weights
from pi_jax.checkpoint.storage import (
    ReadableSteps,
    absolute,
    is_folder,
    open_array,
    reason,
    root_cause,
    storage_context,
    without_logged_errors,
)
from pi_jax.config import CheckpointConfig
from pi_jax.errors import InputError
from pi_jax.parallel import ending


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
          folder: local folder or gs:// URL.
          config: how often to save, and how many checkpoints to keep.
          writer: whether this is the training run. If so, incomplete checkpoints of an interrupted run are deleted.
        """
        self._folder, self._every, self._verified = absolute(folder), config.every, -1
        is_folder(self._folder)
        self._names = ReadableSteps()
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_logged_errors())
            try:
                self._checkpointer = ocp.training.Checkpointer(
                    self._folder,
                    context=storage_context(),
                    preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
                    cleanup_tmp_directories=writer,
                    step_name_format=self._names,
                )
            except Exception as error:
                raise InputError(f"{folder} cannot be {'written' if writer else 'read'}: {reason(error)}") from None
            # Orbax would report its steps to JAX's preemption service, whose only caller must be the supervisor.
            self._checkpointer._manager.reached_preemption = lambda step: False
            self._stack = stack.pop_all()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with self._stack:
            try:
                self._checkpointer.close()
            except Exception as error:
                if kind is None:
                    raise self._not_written(error) from None

    def _not_written(self, error: Exception) -> InputError:
        if is_remote(self._folder):
            ending.abandon_threads()
        return InputError(f"a checkpoint cannot be written to {self._folder}: {reason(error)}")

    def steps(self) -> list[int]:
        """Steps of all checkpoints, newest first."""
        return sorted({c.step for c in self._checkpointer.checkpoints} | set(self._names.damaged), reverse=True)

    def save(self, step: int, state: Any, metadata: dict[str, Any], last: bool = False) -> None:
        """Saves in the background if a checkpoint is due at this step.

        Args:
          step: step of the state.
          state: pytree of arrays.
          metadata: JSON values to save with it.
          last: save even if no checkpoint is due, wait until it is written, and read it back.

        Raises:
          FloatingPointError: if the state contains values that are not finite.
          InputError: if this checkpoint, or the one before it, cannot be written or does not read back as it was saved.
        """
        if not last and step % self._every:
            return
        if step not in self.steps():
            self._start(step, state, metadata)
        if not last or step == self._verified:
            return
        try:
            self._wait()
            self.verify(step)
        except InputError as error:
            log.warn(f"{error}: saving it again")
            self.set_aside(step - 1)
            self._start(step, state, metadata)
            self._wait()
            self.verify(step)
        self._verified = step

    def _start(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        metadata = {**metadata, "fingerprint": fingerprint(state)}
        try:
            self._checkpointer.save_async(step, trees.by_name(state), force=True, custom_metadata=metadata)
        except Exception as error:  # Orbax raises many types of exception, also for the checkpoint before
            raise self._not_written(error) from None

    def _wait(self) -> None:
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._not_written(error) from None

    def verify(self, step: int) -> None:
        """Reads a checkpoint from storage, a part on each process, and compares it with what was saved.

        Raises:
          InputError: if it cannot be read or differs.
        """
        expected, sums, failure = {}, {}, None
        try:
            expected, sums = self._sums_of_a_part(step)
        except InputError as error:
            failure = error
        if jax.process_count() > 1:  # all must come to the same conclusion, also if only one cannot read its part
            if multihost_utils.process_allgather(np.array(failure is not None)).any():
                raise failure or InputError(f"the checkpoint of step {step} cannot be read back by another process")
            parts = multihost_utils.process_allgather(np.array(list(sums.values()), np.uint32))
            sums = dict(zip(sums, parts.sum(axis=0, dtype=np.uint32).tolist(), strict=True))
        if failure:
            raise failure
        differing = [name for name, total in sums.items() if expected.get(name) != total]
        if differing:
            raise InputError(
                f"the checkpoint of step {step} reads back differently from what was saved: {differing[:3]}"
            )

    def _sums_of_a_part(self, step: int) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the checksums that were saved, and those of what this process reads; all add up mod 2^32."""
        metadata, found = self._stored(step)
        arrays = {name: open_array(self._folder, step, name) for name in sorted(found)}
        parts = [
            (name, layer)
            for name, array in arrays.items()
            for layer in (range(array.shape[0]) if ".layers." in f".{name}" and array.rank else [None])
        ]
        sums = dict.fromkeys(arrays, 0)
        for name, layer in parts[jax.process_index() :: jax.process_count()]:
            try:
                part = arrays[name][... if layer is None else slice(layer, layer + 1)].read().result()
            except ValueError as error:
                raise InputError(f"the checkpoint of step {step} cannot be read back: {reason(error)}") from None
            sums[name] = (sums[name] + fingerprint_of_part(np.atleast_1d(part), layer or 0)) % 2**32
        return metadata.get("fingerprint", {}), sums

    def set_aside(self, step: int) -> list[str]:
        """Moves all checkpoints after a step out of the way, so that their steps can be saved again.

        Returns:
          The folders that they were moved to.
        """
        newer = [number for number in self.steps() if number > step]
        moved = [self._folder.parent / "rejected" / str(number) for number in newer]
        if newer and jax.process_index() == 0:
            (self._folder.parent / "rejected").mkdir(parents=True, exist_ok=True)
            if is_remote(self._folder):
                (self._folder.parent / "rejected" / ".keep").touch()  # object storage has no empty folders
            for number, folder in zip(newer, moved, strict=True):
                if folder.exists():
                    folder.rmtree()
                (self._folder / str(number)).rename(folder)
        if newer:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("rejected checkpoints moved")
            self._names.damaged.clear()
            self._checkpointer.reload()
        return [f"{folder}" for folder in moved]

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
        if step in self._names.damaged:
            raise InputError(f"unreadable ({self._names.damaged[step]})")
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
