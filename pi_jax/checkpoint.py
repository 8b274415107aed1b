"""Orbax checkpoints that are whole, checked and never silently skipped; the only module that knows Orbax.

A state is stored as a flat dict of arrays by name ("model.layers.attention.q"), readable by any zarr3 reader. Each
checkpoint carries fingerprints of its arrays, because one flipped bit in array data loads without an error, and a
leftover empty folder named after a step would pass for the latest. A restore takes the newest step that checks out,
says why it left newer ones, and never falls back to starting afresh.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from pi_jax import trees
from pi_jax.config import CheckpointConfig
from pi_jax.errors import InputError


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Per array, the position-weighted sum of its bits mod 2^32 (whatever the mesh) and whether all is finite."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis, out_sharding=jax.typeof(bits).sharding)
            place = place * jnp.uint32(0x01000193) + step
        finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32), finite

    return {name: one(x) for name, x in leaves.items()}


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
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        self._folder = pathlib.Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            context=context,
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
          prefix: of the stored names, to restore a part of a state: "model." for the weights alone.

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

    def _load(self, step: int, wanted: dict[str, Any], partial: bool) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        try:
            stored = self._checkpointer.metadata(step)
            metadata = dict(stored.custom_metadata or {})
            found = dict(stored.metadata or {})
        except Exception as error:  # Orbax raises many kinds, the true reason innermost
            raise InputError(f"unreadable ({_root(error)})") from None
        missing = sorted(set(wanted) - set(found))
        if missing or (not partial and set(found) - set(wanted)):
            extra = sorted(set(found) - set(wanted))
            raise InputError(f"holds another state (lacks {missing[:2]}, has besides {extra[:2]})")
        for name, leaf in wanted.items():  # Orbax would cast a dtype silently
            if (tuple(found[name].shape), found[name].dtype) != (leaf.shape, leaf.dtype):
                raise InputError(f"{name} is {found[name].dtype}{found[name].shape}, not {leaf.dtype}{leaf.shape}")
        try:
            leaves = self._checkpointer.load(step, wanted)
        except Exception as error:
            raise InputError(f"cannot be loaded ({_root(error)})") from None
        expected = metadata.get("fingerprint", {})
        differing = [name for name, checksum in fingerprint(leaves).items() if expected.get(name) != checksum]
        if differing:
            raise InputError(f"content differs from what was saved in {differing[:3]}")
        return leaves, metadata


def _root(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {str(error)[:200]}"
