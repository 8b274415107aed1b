"""Orbax checkpoints that are whole, checked and never silently skipped; the only module that knows Orbax.

A state is stored as a flat dict of arrays by name ("model.layers.attention.q"), readable by any zarr3 reader. Each
checkpoint carries fingerprints of its arrays, because one flipped bit in array data loads without an error, and a
leftover empty folder named after a step would pass for the latest. A restore takes the newest step that checks out,
says why it left newer ones, and never falls back to starting afresh.

Layers are stacked in one array; on disk each layer is a chunk of its own, so that a model can be read and written a
layer at a time (`Checkpoints.open_weights`, `WeightsWriter`), which is how weights are converted without holding them.
"""

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
            raise InputError(f"{self._folder} at step {step} cannot be loaded ({root_cause(error)})") from None

    def _stored(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was saved with a checkpoint, and what is known of its arrays."""
        try:
            stored = self._checkpointer.metadata(step)
            return dict(stored.custom_metadata or {}), dict(stored.metadata or {})
        except Exception as error:  # Orbax raises many kinds, the true reason innermost
            raise InputError(f"unreadable ({root_cause(error)})") from None

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
            raise InputError(f"cannot be loaded ({root_cause(error)})") from None
        expected = metadata.get("fingerprint", {})
        differing = [name for name, checksum in fingerprint(leaves).items() if expected.get(name) != checksum]
        if differing:
            raise InputError(f"content differs from what was saved in {differing[:3]}")
        return {name: leaf.astype(wanted[name].dtype) for name, leaf in leaves.items()}, metadata


def _floats(*arrays: Any) -> bool:
    return all(jnp.issubdtype(getattr(a, "dtype", a), jnp.floating) for a in arrays)
