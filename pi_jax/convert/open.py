"""Opens a model in any supported format: a Hugging Face folder, a Meta folder or the folder of a pi_jax run.

The format is detected from the files in the folder. The folder of a run contains `checkpoints/` (weights, in Orbax
format) and `model/` (config.json in Hugging Face's format, tokenizer files), so an export does not need the base model.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import jax
from etils import epath

from pi_jax import limits
from pi_jax.checkpoint import Checkpoints, is_folder
from pi_jax.config import CheckpointConfig, ComputeConfig, ModelConfig, RopeConfig, extend
from pi_jax.convert import model_card, pipeline, sharded_load
from pi_jax.convert.folders import digest, has_tokenizer
from pi_jax.convert.formats import hf, meta, native
from pi_jax.convert.formats.native import MODEL as RUN_MODEL
from pi_jax.errors import InputError, no_folder
from pi_jax.files import require_own
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import placement


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in a folder: its location, format and architecture. `load` reads the weights."""

    path: str
    kind: Literal["hf", "meta", "run"]
    """Format of the folder."""
    config: ModelConfig

    @property
    def files(self) -> str:
        """Folder with the tokenizer files and generation settings."""
        folder = epath.Path(self.path)
        if self.kind == "run":
            return str(folder / RUN_MODEL)
        beside = not (folder / "tokenizer.model").is_file() and (folder.parent / "tokenizer.model").is_file()
        if self.kind == "meta" and beside:  # the layout in which Meta released LLaMA 1 and 2
            return str(folder.parent)
        return self.path

    @property
    def tokenizer(self) -> str:
        """`files` if it contains a tokenizer that transformers can load, else "" (as in Meta's own folders)."""
        return self.files if self.kind != "meta" or has_tokenizer(self.files) else ""

    def digest(self) -> str:
        """Identifies the weights without reading all of them; does not depend on the folder's name.

        For a run, those of its newest checkpoint.
        """
        folder = epath.Path(self.path)
        if self.kind != "run":
            return digest(sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pth")))
        with Checkpoints(native.checkpoints_of(folder), CheckpointConfig(), writer=False) as checkpoints:
            sums = checkpoints.metadata().get("fingerprint", {})
        weights = sorted((name, total) for name, total in sums.items() if name.startswith("model."))
        return hashlib.sha256(repr(weights).encode()).hexdigest()

    def reader(self, step: int | None = None) -> pipeline.Reader:
        """Returns a reader of the weights.

        Args:
          step: checkpoint to read if this is a run; None selects the newest.

        Raises:
          InputError: if files are missing or damaged, or do not match `config`.
        """
        if step is not None and self.kind != "run":
            raise InputError(f"{self.path} is not a run, so it has no step {step}: omit --step")
        if self.kind == "hf":
            return hf.Reader(self.path, self.config)
        if self.kind == "meta":
            return meta.Reader(meta.Folder(self.path), self.config)
        return native.Reader(self.path, self.config, step)

    def load(self, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
        """Loads the model with its weights sharded over the mesh.

        Raises:
          InputError: if files are missing or damaged, or do not match `config`.
        """
        if self.kind != "run":
            return sharded_load.load(self.reader(), self.config, compute, mesh)
        template = abstract(self.config, compute)
        shardings = placement.shard_tree(mesh, template, parameter_axes(template))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
        folder = native.checkpoints_of(self.path)
        restored = None
        if is_folder(folder):
            with Checkpoints(folder, CheckpointConfig(), writer=False) as checkpoints:
                restored = checkpoints.restore(target, prefix="model.")
        if restored is None:
            raise InputError(f"{self.path} has no checkpoint yet")
        for reason in restored.skipped:
            print(f"{self.path}: skipped {reason}")
        return restored.state

    def facts(self, step: int) -> model_card.Facts:
        """Returns the facts for the model card: how the model was trained, if it is a run."""
        if self.kind == "run":
            return model_card.facts_of_run(self.path, step)
        return model_card.Facts(base=epath.Path(self.path).name)


def open_model(path: str, rope: RopeConfig = RopeConfig(), window: int = 0, eos: Sequence[int] = ()) -> Source:
    """Detects the format of a model folder and reads its config.

    Args:
      path: Hugging Face folder, Meta folder or run folder.
      rope: scaling to apply to a model that has none.
      window: window of a Hugging Face or Meta folder in tokens, if its files do not state it or are wrong; 0 trusts
        them and, for a Meta folder, applies the rules in `pi_jax.convert.formats.meta`.
      eos: tokens that end a text, if the files do not state all of them; added to those that they state.

    Raises:
      InputError: if the folder is none of these, a file other than weights is a link out of it, or its model is not
        supported.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        raise no_folder(path)
    for name in (RUN_MODEL, "config.json", meta.PARAMS):
        require_own(folder / name, limits.JSON)
    if (folder / RUN_MODEL / "config.json").is_file():
        kind, config = "run", hf.read_config(str(folder / RUN_MODEL))
    elif (folder / "config.json").is_file():
        kind, config = "hf", hf.open_config(path, window)
    elif meta.is_folder(folder):
        kind, config = "meta", meta.Folder(path).config(window, eos)
    else:
        raise InputError(
            f"{path} is not a model folder: it must contain config.json (Hugging Face), params.json (Meta) or "
            f"{RUN_MODEL}/ (pi_jax run)"
        )
    if eos:
        if not all(0 <= token < config.vocab_size for token in eos):
            raise InputError(f"eos is {', '.join(map(str, eos))}: tokens must be below vocab_size, {config.vocab_size}")
        stated = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
        # What params.json does not state is only assumed; what other files state is kept.
        found = tuple(dict.fromkeys(t for t in (*(() if kind == "meta" else stated), *eos) if t is not None))
        config = dataclasses.replace(config, eos_token_id=found[0] if len(found) == 1 else found)
    return Source(path, kind, extend(config, rope))
