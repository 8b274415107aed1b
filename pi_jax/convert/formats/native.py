"""Reads and writes pi_jax's own folders, which are runs or converted models.

Such a folder contains `checkpoints/` (weights, in Orbax format) and `model/` (config.json in Hugging Face's format,
tokenizer files).
"""

import contextlib
from typing import Any

import numpy as np
from etils import epath

from pi_jax.checkpoint import Checkpoints, WeightsWriter, is_folder
from pi_jax.config import CheckpointConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.convert.folders import copy_files, read_json, write_json
from pi_jax.convert.formats import hf
from pi_jax.convert.verify import readback
from pi_jax.errors import InputError

MODEL = "model"
"""Subfolder with the config and tokenizer files."""
CHECKPOINTS = "checkpoints"
"""Subfolder with the checkpoints, in the folder itself or where config.json of a run says (`checkpoint.folder`)."""
EXPORTS = "hf"
"""Subfolder with the Hugging Face folders that a run exports during training."""
_PREFIX = "model."


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        name: ((len(tensors),) if tensors[0].spec.stacked else ()) + tensors[0].spec.shape(config)
        for name, tensors in param_mapping.stacks(config).items()
    }


def checkpoints_of(folder: Any) -> epath.Path:
    """Returns the folder of the checkpoints of a run or converted model."""
    elsewhere = ""
    with contextlib.suppress(InputError):  # a converted model has no config.json
        elsewhere = read_json(epath.Path(folder) / "config.json")["config"].get("checkpoint.folder", "")
    return epath.Path(elsewhere or folder) / CHECKPOINTS


class Reader:
    """Reads the weights of a checkpoint one layer at a time, in Hugging Face's shapes."""

    def __init__(self, folder: Any, config: ModelConfig, step: int | None = None, opened: Checkpoints | None = None):
        """Opens a checkpoint.

        Args:
          folder: folder of the run or converted model.
          config: architecture.
          step: checkpoint to open; None selects the newest.
          opened: the folder's checkpoints, if they are already open. Required if only one of several processes reads.

        Raises:
          InputError: if the checkpoint does not exist or belongs to another model.
        """
        path = checkpoints_of(folder)
        if not is_folder(path):
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
        """See `pipeline.Reader`."""
        array = self._weights.read(tensor.spec.name, tensor.layer)
        return pipeline.require_finite(self._where, tensor.name, array).reshape(self._shapes[tensor.name])[index]


class Writer:
    """Writes a checkpoint that contains only weights. `train.init_from`, evaluate and convert accept its folder."""

    def __init__(self, folder: epath.Path, config: ModelConfig, dtypes: pipeline.Dtypes):
        """Creates the checkpoint in `folder`, without values.

        Raises:
          InputError: if the layers of one parameter have different dtypes.
        """
        self._config = config
        shapes = {}
        for name, tensors in param_mapping.stacks(config).items():
            kinds = {dtypes[tensor.name] for tensor in tensors}
            if len(kinds) > 1:
                found = " and ".join(sorted(kind.name for kind in kinds))
                raise InputError(f"{name} is {found} in different layers: select one dtype with --dtype")
            shapes[name] = (_shapes(config)[name], kinds.pop())
        self._writer = WeightsWriter(folder / CHECKPOINTS, shapes, _PREFIX)

    def write(self, tensor: param_mapping.Tensor, array: np.ndarray) -> None:
        """Writes the next tensor."""
        self._writer.write(tensor.spec.name, tensor.layer, array.reshape(tensor.spec.shape(self._config)))

    def close(self) -> None:
        """Finishes the checkpoint."""
        self._writer.close()

    def discard(self) -> None:
        """Does nothing: no file is open between two writes."""


def write(
    reader: pipeline.Reader,
    config: ModelConfig,
    folder: epath.Path,
    extras: str,
    verify: bool = True,
    quiet: bool = False,
) -> None:
    """Writes a model into an empty folder and, if `verify` is true, reads it back and compares it; see `hf.write`."""
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
