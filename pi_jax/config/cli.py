"""Experiment files and command-line overrides."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from pi_jax.config.schema import Config
from pi_jax.config.smoke import smoke
from pi_jax.config.validation import require
from pi_jax.errors import InputError
from pi_jax.rope import Scaling


def load_config(path: str) -> Config:
    """The config of an experiment file.

    Raises:
      InputError: if the file is missing, is not Python, has no `get_config`, or returns something else.
    """
    file = pathlib.Path(path)
    require(file.is_file(), f"--config {path}: there is no such file")
    require(file.suffix == ".py", f"--config {path}: an experiment is a Python file with get_config()")
    spec = importlib.util.spec_from_file_location(f"pi_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} cannot be used as a config: {type(error).__name__}: {error}") from error
    require(isinstance(config, Config), f"{path}: get_config() returned {type(config).__name__}, not Config")
    return config


@dataclasses.dataclass(frozen=True)
class _File:
    """Fine-tune a LLaMA-family model with a longer window by Position Interpolation.

    Every field of the experiment file can be overridden: --optimizer.learning-rate 1e-5. `--config FILE --help` lists
    them with the file's values."""

    config: str
    """Experiment file, for example configs/tiny.py."""
    smoke: bool = False
    """Run the same experiment in miniature: tiny model and text, every code path."""


def parse(argv: Sequence[str] | None = None, command: str = "train") -> tuple[Config, Config]:
    """The config as overridden by the command line, and the file's own, to show the difference.

    Exits with status 2 and a hint on an unknown or ill-typed field, as argparse does.
    """
    import sys

    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(word.split("=")[0] == "--config" for word in argv):
        tyro.cli(_File, prog=f"python -m pi_jax.{command}", args=argv)  # prints the help or names what is missing
    wants_help = [word for word in argv if word in ("-h", "--help")]
    file, overrides = tyro.cli(
        _File,
        prog=f"python -m pi_jax.{command}",
        args=[word for word in argv if word not in wants_help],
        return_unknown_args=True,
    )
    base = load_config(file.config)
    if file.smoke:
        base = smoke(base)
    config = tyro.cli(
        Config,
        prog=f"python -m pi_jax.{command} --config {file.config}",
        default=base,
        args=overrides + wants_help,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return config, base


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.learning_rate': 2e-5, ...}: every field by its dotted name."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(value) and not isinstance(value, Scaling):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def describe(config: Config, base: Config) -> str:
    """The resolved config for people: what differs from `base` first, then everything."""
    now, before = flatten(config), flatten(base)
    changed = [f"  {k} = {v!r}  (was {before.get(k)!r})" for k, v in now.items() if before.get(k) != v]
    lines = ["Changed from the config file:", *changed] if changed else []
    return "\n".join([*lines, "Config:", *(f"  {k} = {v!r}" for k, v in now.items())])
