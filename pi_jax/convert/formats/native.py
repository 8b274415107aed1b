"""pi_jax's own folders, a run or a converted model: `checkpoints/` (weights, by Orbax) and `model/` (config.json in
Hugging Face form, tokenizer files)."""

import contextlib
from typing import Any

import numpy as np
from etils import epath

from pi_jax.checkpoint import Checkpoints, WeightsWriter
from pi_jax.config import CheckpointConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.convert.folders import copy_files, write_json
from pi_jax.convert.formats import hf
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError

MODEL = "model"
CHECKPOINTS = "checkpoints"
EXPORTS = "hf"
"""Hugging Face folders that a run writes while it trains."""
_PREFIX = "model."


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        name: ((len(tensors),) if tensors[0].spec.stacked else ()) + tensors[0].spec.shape(config)
        for name, tensors in param_mapping.stacks(config).items()
    }


class Reader:
    """The weights of a checkpoint, in Hugging Face's shapes, read a layer at a time."""

    def __init__(self, folder: Any, config: ModelConfig, step: int | None = None, opened: Checkpoints | None = None):
        """Opens the newest checkpoint, or that of `step`. One of several processes alone can read only an `opened` one.

        Raises:
          InputError: if it is not there or not of this model.
        """
        path = epath.Path(folder) / CHECKPOINTS
        if not path.is_dir():
            raise InputError(f"{folder} has no checkpoint yet")
        with contextlib.ExitStack() as stack:
            opened = opened or stack.enter_context(Checkpoints(path, CheckpointConfig(), writer=False))
            self._weights = opened.open_weights(_shapes(config), _PREFIX, step)
        self.step = self._weights.step
        stacks = param_mapping.stacks(config)
        by_stack = [tensor for tensors in stacks.values() for tensor in tensors]
        self.order = param_mapping.tensors(config) if self._weights.layers_apart else by_stack
        self.dtypes = {tensor.name: self._weights.dtypes[tensor.spec.name] for tensor in by_stack}
        self._shapes = {tensor.name: tensor.shape for tensor in by_stack}
        self._where = str(path)

    def read(self, tensor: param_mapping.Tensor, index: param_mapping.Index = (...,)) -> np.ndarray:
        """See `stream.Reader`."""
        array = self._weights.read(tensor.spec.name, tensor.layer)
        return pipeline.require_finite(self._where, tensor.name, array).reshape(self._shapes[tensor.name])[index]


class Writer:
    """A checkpoint of weights alone; `train.init_from`, evaluate and convert take its folder like any model."""

    def __init__(self, folder: epath.Path, config: ModelConfig, dtypes: pipeline.Dtypes):
        """Lays it out in `folder`.

        Raises:
          InputError: if the layers of one parameter have different dtypes.
        """
        self._config = config
        shapes = {}
        for name, tensors in param_mapping.stacks(config).items():
            kinds = {dtypes[tensor.name] for tensor in tensors}
            if len(kinds) > 1:
                found = " and ".join(sorted(kind.name for kind in kinds))
                raise InputError(f"{name} is {found} in different layers: choose one with --dtype")
            shapes[name] = (_shapes(config)[name], kinds.pop())
        self._writer = WeightsWriter(folder / CHECKPOINTS, shapes, _PREFIX)

    def write(self, tensor: param_mapping.Tensor, array: np.ndarray) -> None:
        """Takes the next tensor."""
        self._writer.write(tensor.spec.name, tensor.layer, array.reshape(tensor.spec.shape(self._config)))

    def close(self) -> None:
        """Finishes the checkpoint."""
        self._writer.close()

    def discard(self) -> None:
        """Nothing is open between two writes."""


def write(
    reader: pipeline.Reader,
    config: ModelConfig,
    folder: epath.Path,
    extras: str,
    verify: bool = True,
    quiet: bool = False,
) -> None:
    """Fills an empty folder from a reader and, with `verify`, compares what then lies there; see `hf.write`."""
    dtypes = reader.dtypes
    digests = pipeline.copy(reader, Writer(folder, config, dtypes), verify, quiet)
    (folder / MODEL).mkdir()
    copy_files(extras, folder / MODEL)
    write_json(folder / MODEL / "config.json", hf.config_dict(config, pipeline.main_dtype(dtypes)))
    if verify:
        hf.require_same(str(folder), hf.read_config(str(folder / MODEL)), config)
        by_stack = [tensor for tensors in param_mapping.stacks(config).values() for tensor in tensors]
        read = readback.run(folder / CHECKPOINTS, config, dtypes)
        pipeline.verify(str(folder), digests, by_stack, dtypes, read, quiet)
