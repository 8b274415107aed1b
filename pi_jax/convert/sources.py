"""A model from wherever it lies: a Hugging Face folder or the folder of a pi_jax run, recognised by what is in it.

A run's folder holds `checkpoints/` (weights, by Orbax) and `model/` (config.json in Hugging Face form, tokenizer
files): all that an export needs, should the base model be gone.
"""

import dataclasses
import pathlib

import jax

from pi_jax import sharding
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import CheckpointConfig, ComputeConfig, ModelConfig, RopeConfig, extend
from pi_jax.convert import hf
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes

RUN_MODEL = "model"
RUN_CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model is and what it is; `load` reads its weights."""

    path: str
    kind: str
    """'hf' or 'run'."""
    config: ModelConfig

    @property
    def files(self) -> str:
        """Folder with config.json and the tokenizer's files."""
        return str(pathlib.Path(self.path) / RUN_MODEL) if self.kind == "run" else self.path

    def load(self, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
        """The model with its weights split over the mesh.

        Raises:
          InputError: if files are missing, broken, or not what `config` asks for.
        """
        if self.kind == "hf":
            return hf.load(self.path, self.config, compute, mesh)
        template = abstract(self.config, compute)
        shardings = sharding.shard_tree(mesh, template, parameter_axes(template))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
        folder = pathlib.Path(self.path) / RUN_CHECKPOINTS
        restored = None
        if folder.is_dir():
            with Checkpoints(folder, CheckpointConfig(), writer=False) as checkpoints:
                restored = checkpoints.restore(target, prefix="model.")
        if restored is None:
            raise InputError(f"{self.path} has no checkpoint yet")
        for reason in restored.skipped:
            print(f"{self.path}: left out {reason}")
        return restored.state


def open_model(path: str, rope: RopeConfig = RopeConfig()) -> Source:
    """Recognises a model's folder.

    Args:
      path: Hugging Face folder or run folder.
      rope: a scaling to stamp on a model that has none.

    Raises:
      InputError: if the folder is neither, or its model is not supported.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise InputError(f"{path}: there is no such folder")
    if (folder / RUN_MODEL / "config.json").is_file():
        return Source(path, "run", extend(hf.read_config(str(folder / RUN_MODEL)), rope))
    if (folder / "config.json").is_file():
        return Source(path, "hf", extend(hf.read_config(path), rope))
    raise InputError(f"{path} is no model: it has neither config.json (Hugging Face) nor {RUN_MODEL}/ (a pi_jax run)")
