"""Reads and writes the weights of a checkpoint one layer at a time."""

import json
import pathlib

import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from pi_jax.checkpoint.fingerprint import fingerprint_of_part
from pi_jax.checkpoint.storage import METADATA, absolute, open_array, reason, storage_context
from pi_jax.errors import InputError


class Weights:
    """The weights in one checkpoint, read one layer at a time.

    The checksum of an array is verified once all its layers have been read.
    """

    def __init__(self, folder: epath.Path, step: int, prefix: str, names: list[str], checksums: dict[str, int]):
        """Opens the arrays without reading them.

        Args:
          folder: folder of the checkpoints.
          step: checkpoint to read.
          prefix: prefix of the stored names.
          names: names of the arrays, without the prefix.
          checksums: stored name of each array -> its checksum.
        """
        self.step = step
        self._where = f"{folder} at step {step}"
        self._arrays = {name: open_array(folder, step, prefix + name) for name in names}
        self._wanted = {name: checksums.get(prefix + name) for name in names}
        self._found: dict[str, dict[int, int]] = {name: {} for name in names}
        self.dtypes = {name: array.dtype.numpy_dtype for name, array in self._arrays.items()}
        self._held: tuple[str, np.ndarray] | None = None

    @property
    def layers_apart(self) -> bool:
        """Whether each layer is stored as a separate chunk. If not, reading a layer reads the complete array."""
        return all(
            array.chunk_layout.read_chunk.shape[0] == 1
            for name, array in self._arrays.items()
            if name.startswith("layers.")
        )

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Reads an array, or one layer of it.

        Raises:
          InputError: if it cannot be read, or if this is the last layer and the checksum of the array is wrong.
        """
        try:
            if layer is not None and not self.layers_apart:
                if self._held is None or self._held[0] != name:
                    self._held = None  # free the memory before reading the next array
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
            raise InputError(f"{self._where}: {name} differs from what was saved: use the checkpoint of another step")
        return part if layer is None else part[0]


class _Blank(np.ndarray):
    """An array of zeros that uses no memory. Orbax copies the arrays it saves; here the copy is the array itself."""

    def __deepcopy__(self, memo):
        return self


class WeightsWriter:
    """Writes a checkpoint at step 0 that contains only weights, one layer at a time.

    Orbax creates the checkpoint with zeros; the layers are then filled in, and finally the fingerprints are added. The
    weights are not compressed, which would save a quarter of the size at a fraction of the speed.
    """

    def __init__(self, folder: str | pathlib.Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], prefix: str):
        """Creates the checkpoint, filled with zeros.

        Args:
          folder: folder of the checkpoints; it must not exist.
          shapes: name of each array, without the prefix -> its shape and dtype.
          prefix: prefix of the stored names.
        """
        self._folder, self._prefix = absolute(folder), prefix
        blank = {
            prefix + name: np.broadcast_to(np.zeros((), dtype), shape).view(_Blank)
            for name, (shape, dtype) in shapes.items()
        }
        try:
            with ocp.training.Checkpointer(self._folder, context=storage_context()) as checkpointer:
                checkpointer.save(0, blank, force=True)
        except Exception as error:  # Orbax raises many types of exception
            raise OSError(reason(error)) from None
        self._arrays = {name: open_array(self._folder, 0, prefix + name, uncompressed=True) for name in shapes}
        self._sums = dict.fromkeys(shapes, 0)

    def write(self, name: str, layer: int | None, array: np.ndarray) -> None:
        """Writes an array, or one layer of it."""
        part = array if layer is None else array[None]
        self._sums[name] += fingerprint_of_part(part, layer or 0)
        try:
            self._arrays[name][... if layer is None else slice(layer, layer + 1)].write(part).result()
        except ValueError as error:  # the only type that TensorStore raises
            raise OSError(reason(error)) from None

    def close(self) -> None:
        """Adds the fingerprints, without which the checkpoint is not accepted."""
        path = self._folder / "0" / METADATA
        metadata = json.loads(path.read_text())
        fingerprints = {self._prefix + name: total % 2**32 for name, total in self._sums.items()}
        metadata["custom_metadata"] = {"fingerprint": fingerprints}
        path.write_text(json.dumps(metadata))
