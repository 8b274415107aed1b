"""A model from wherever it lies: a Hugging Face folder, a Meta folder or the folder of a pi_jax run, recognised by what
is in it.

A run's folder holds `checkpoints/` (weights, by Orbax) and `model/` (config.json in Hugging Face form, tokenizer
files): all that an export needs, should the base model be gone.
"""

import dataclasses
from typing import Literal

import jax
from etils import epath

from pi_jax.checkpoint import Checkpoints
from pi_jax.config import CheckpointConfig, ComputeConfig, ModelConfig, RopeConfig, extend
from pi_jax.convert import model_card, pipeline, sharded_load
from pi_jax.convert.folders import has_tokenizer
from pi_jax.convert.formats import hf, meta, native
from pi_jax.convert.formats.native import CHECKPOINTS as RUN_CHECKPOINTS
from pi_jax.convert.formats.native import MODEL as RUN_MODEL
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import placement


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model is and what it is; `load` reads its weights."""

    path: str
    kind: Literal["hf", "meta", "run"]
    config: ModelConfig

    @property
    def files(self) -> str:
        """Folder with the tokenizer's files and generation settings."""
        folder = epath.Path(self.path)
        if self.kind == "run":
            return str(folder / RUN_MODEL)
        beside = not (folder / "tokenizer.model").is_file() and (folder.parent / "tokenizer.model").is_file()
        if self.kind == "meta" and beside:  # as LLaMA 1 and 2 came
            return str(folder.parent)
        return self.path

    @property
    def tokenizer(self) -> str:
        """`files` if transformers finds a tokenizer there, else ""; Meta's own folders have none that it reads."""
        return self.files if self.kind != "meta" or has_tokenizer(self.files) else ""

    def reader(self, step: int | None = None) -> pipeline.Reader:
        """The weights, to be read one after the other.

        Args:
          step: of a run, which checkpoint; None: the newest.

        Raises:
          InputError: if files are missing, broken, or not what `config` asks for.
        """
        if step is not None and self.kind != "run":
            raise InputError(f"{self.path} is no run, so it has no step {step}: leave --step out")
        if self.kind == "hf":
            return hf.Reader(self.path, self.config)
        if self.kind == "meta":
            return meta.Reader(meta.Folder(self.path), self.config)
        return native.Reader(self.path, self.config, step)

    def load(self, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
        """The model with its weights split over the mesh.

        Raises:
          InputError: if files are missing, broken, or not what `config` asks for.
        """
        if self.kind != "run":
            return sharded_load.load(self.reader(), self.config, compute, mesh)
        template = abstract(self.config, compute)
        shardings = placement.shard_tree(mesh, template, parameter_axes(template))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
        folder = epath.Path(self.path) / RUN_CHECKPOINTS
        restored = None
        if folder.is_dir():
            with Checkpoints(folder, CheckpointConfig(), writer=False) as checkpoints:
                restored = checkpoints.restore(target, prefix="model.")
        if restored is None:
            raise InputError(f"{self.path} has no checkpoint yet")
        for reason in restored.skipped:
            print(f"{self.path}: left out {reason}")
        return restored.state

    def facts(self, step: int) -> model_card.Facts:
        """What is known of its training, for a model card."""
        if self.kind == "run":
            return model_card.facts_of_run(self.path, step)
        return model_card.Facts(base=epath.Path(self.path).name)


def open_model(path: str, rope: RopeConfig = RopeConfig(), window: int = 0) -> Source:
    """Recognises a model's folder.

    Args:
      path: Hugging Face folder, Meta folder or run folder.
      rope: scaling to apply to a model that has none.
      window: of a Meta folder, which does not say it: tokens that it was trained for; 0: by the rules of `meta`.

    Raises:
      InputError: if the folder is none of these, or its model is not supported.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        raise InputError(f"{path}: there is no such folder")
    if (folder / RUN_MODEL / "config.json").is_file():
        return Source(path, "run", extend(hf.read_config(str(folder / RUN_MODEL)), rope))
    if (folder / "config.json").is_file():
        return Source(path, "hf", extend(hf.read_config(path), rope))
    if meta.is_folder(folder):
        return Source(path, "meta", extend(meta.Folder(path).config(window), rope))
    raise InputError(
        f"{path} is no model: it has neither config.json (Hugging Face) nor params.json (Meta) nor {RUN_MODEL}/ (a "
        "pi_jax run)"
    )
