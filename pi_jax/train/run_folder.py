"""Files of a run other than checkpoints: its config, what an export needs, and exports during training."""

import itertools
import json
import pathlib
import re
import shutil
from typing import Any

import jax
from etils import epath

from pi_jax import __version__, atomic, log
from pi_jax.checkpoint import Checkpoints, is_folder
from pi_jax.config import Config, ModelConfig, flatten
from pi_jax.convert import model_card
from pi_jax.convert.folders import EARLIER, copy_files, read_json
from pi_jax.convert.formats import hf
from pi_jax.convert.formats.native import CHECKPOINTS as RUN_CHECKPOINTS
from pi_jax.convert.formats.native import EXPORTS as RUN_EXPORTS
from pi_jax.convert.formats.native import MODEL as RUN_MODEL
from pi_jax.convert.formats.native import Reader as RunReader
from pi_jax.convert.formats.native import checkpoints_of
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.parallel import processes

LOCK = ".lock"
"""Lock of the process that writes the folder."""


def require_folder(output: pathlib.Path, what: str = "train.output") -> None:
    """Creates a folder of a run, which a field of the config names.

    Raises:
      InputError: if it cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{what} {output} is a file: it must name a folder") from None
    except OSError as error:
        raise InputError(f"{what} {output} cannot be created: {error.strerror}") from None


def checkpoints_folder(output: pathlib.Path, config: Config) -> epath.Path:
    """Returns the folder of a run's checkpoints; creates the folder around it if it is a local one.

    Raises:
      InputError: if it cannot be created, or if checkpoints that the run has are in another folder.
    """
    folder = config.checkpoint.folder
    if folder and not atomic.is_remote(folder):
        require_folder(pathlib.Path(folder), "checkpoint.folder")
        processes.require_shared(pathlib.Path(folder))
    now, before = epath.Path(folder or output) / RUN_CHECKPOINTS, checkpoints_of(output)
    if now != before and not is_folder(now) and is_folder(before):
        raise InputError(
            f"the checkpoints of {output} are in {before}, not in {now}: restore checkpoint.folder, or copy them"
        )
    return now


def export_folder(output: pathlib.Path, step: int) -> pathlib.Path:
    """Folder of the export of a step."""
    return output / RUN_EXPORTS / f"step-{step}"


def export(output: pathlib.Path, step: int, model: Llama, dtype: str, checkpoints: Checkpoints) -> None:
    """Exports the weights as a Hugging Face folder. The run continues if the folder cannot be written."""
    target = export_folder(output, step)
    if target.exists():  # from before the run was resumed from an earlier checkpoint
        shutil.rmtree(target)
    try:
        facts = model_card.facts_of_run(output, step)
        weights = None if jax.process_count() == 1 else RunReader(output, model.config, step, checkpoints)
        hf.save(model, str(target), str(output / RUN_MODEL), dtype, facts=facts, weights=weights)
        log.info(f"Exported step {step}: {target}")
    except InputError as error:
        log.info(f"Not exported at step {step}: {error}")


def read_config(output: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of config.json: 'config', 'versions' and 'first_step'; {} if it is missing or damaged."""
    try:
        return read_json(output / "config.json")
    except InputError:
        return {}


def as_recorded(config: Config) -> dict[str, Any]:
    """Returns a config and the versions in use as config.json records them."""
    flat = {
        k: v if isinstance(v, (int, float, str, bool, list, tuple, type(None))) else f"{v}"
        for k, v in flatten(config).items()
    }
    versions = {"pi_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    return json.loads(json.dumps({"config": flat, "versions": versions}))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns 'field: before -> now' for each field whose value changed. A field that only one has did not change."""
    return [f"{k}: {_shown(before[k])} -> {_shown(v)}" for k, v in now.items() if k in before and before[k] != v]


def _shown(value: Any) -> str:
    text = f"{value}".removesuffix(".0") if isinstance(value, float) else f"{value or repr(value)}"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)  # digests of token stores


def refused_changes(identity: dict[str, Any], recorded: dict[str, Any], config: Config, output: pathlib.Path) -> str:
    """Returns the fields that must not change when a run resumes, but did.

    Args:
      identity: `Experiment.identity` of the config.
      recorded: the same, as saved with a checkpoint.
      config: the config.
      output: folder of the run. Its config.json has the fields behind a value such as the whole RoPE scaling.
    """
    found = []
    before, now = read_config(output).get("config", {}), as_recorded(config)["config"]
    for field, value in json.loads(json.dumps(identity)).items():
        if whole := changes(recorded, {field: value}):
            parts = {k: v for k, v in now.items() if k == field or k.startswith(f"{field}.")}
            found += changes(before, parts) or whole
    return ", ".join(found)


def write_run_files(output: pathlib.Path, config: Config, model: ModelConfig, files: str, done: int) -> None:
    """Writes the resolved config, config.json, and what an export needs, model/config.json and the tokenizer.

    Args:
      output: folder of the run. If its config.json says something else, a copy of that is kept in `EARLIER`.
      config: the config.
      model: the architecture.
      files: folder with the tokenizer.
      done: steps done so far.
    """
    before, now = read_config(output), as_recorded(config)
    if before | now != before:
        if before:
            folder = output / EARLIER
            folder.mkdir(exist_ok=True)
            names = (folder / f"{number}.json" for number in itertools.count(1))
            shutil.copy(output / "config.json", next(name for name in names if not name.exists()))
        atomic.write_json(str(output / "config.json"), now | {"first_step": done + 1})
    folder = output / RUN_MODEL
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(files, folder, model.max_position_embeddings)
    atomic.write_json(str(folder / "config.json"), hf.config_dict(model, config.compute.param_dtype))
