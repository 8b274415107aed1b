"""Files of a run other than checkpoints: its config, what an export needs, and exports during training."""

import pathlib
import shutil

import jax

from pi_jax import __version__, cli, log
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import Config, ModelConfig, flatten
from pi_jax.convert import model_card
from pi_jax.convert.folders import copy_files
from pi_jax.convert.formats import hf
from pi_jax.convert.formats.native import EXPORTS as RUN_EXPORTS
from pi_jax.convert.formats.native import MODEL as RUN_MODEL
from pi_jax.convert.formats.native import Reader as RunReader
from pi_jax.errors import InputError
from pi_jax.model import Llama


def require_folder(output: pathlib.Path) -> None:
    """Creates the folder of a run.

    Raises:
      InputError: if it cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"train.output {output} cannot be created: {error.strerror}") from None


def export(output: pathlib.Path, step: int, model: Llama, dtype: str, checkpoints: Checkpoints) -> None:
    """Exports the weights as a Hugging Face folder. The run continues if the folder cannot be written."""
    target = output / RUN_EXPORTS / f"step-{step}"
    if target.exists():  # from before the run was resumed from an earlier checkpoint
        shutil.rmtree(target)
    try:
        facts = model_card.facts_of_run(output, step)
        weights = None if jax.process_count() == 1 else RunReader(output, model.config, step, checkpoints)
        hf.save(model, str(target), str(output / RUN_MODEL), dtype, facts=facts, weights=weights)
        log.info(f"Exported step {step}: {target}")
    except InputError as error:
        log.info(f"Not exported at step {step}: {error}")


def write_run_files(output: pathlib.Path, config: Config, model: ModelConfig, files: str) -> None:
    """Writes the resolved config, config.json, and what an export needs, model/config.json and the tokenizer."""
    flat = {
        k: v if isinstance(v, (int, float, str, bool, list, tuple, type(None))) else f"{v}"
        for k, v in flatten(config).items()
    }
    versions = {"pi_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    cli.write_json(str(output / "config.json"), {"config": flat, "versions": versions})
    folder = output / RUN_MODEL
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(files, folder, model.max_position_embeddings)
    cli.write_json(str(folder / "config.json"), hf.config_dict(model, config.compute.param_dtype))
