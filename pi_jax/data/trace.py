"""`python -m pi_jax.data.trace`: which text a training step reads."""

import argparse
import dataclasses
from collections.abc import Sequence

from pi_jax import cli
from pi_jax.config import parse
from pi_jax.config.schema import BUILTIN
from pi_jax.data.pipeline import open_pipeline
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.errors import InputError
from pi_jax.tiny import tiny_inputs

_TOKENS = 24
"""Tokens at the start of a sequence that are printed."""


def trace(argv: Sequence[str] | None = None) -> None:
    """Prints where each sequence of a step's batch comes from, and how it begins.

    Raises:
      InputError: if the step or the row does not exist, or the config or a store cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pi_jax.data.trace",
        description="Print which text a training step reads. Further options are those of `python -m pi_jax.train`.",
    )
    parser.add_argument("--config", required=True, help="experiment file of the run")
    parser.add_argument("--step", type=int, required=True, help="step of the run, from 1, as in its log")
    parser.add_argument("--row", type=int, help="sequence of the batch, from 0; all by default")
    options, overrides = parser.parse_known_args(argv)
    config = parse(["--config", options.config, *overrides])[0].data
    if options.step < 1:
        raise InputError(f"--step is {options.step}: steps are counted from 1")
    if options.row is not None and not 0 <= options.row < config.batch_size:
        raise InputError(f"--row is {options.row}: the batch has the rows 0 to {config.batch_size - 1}")
    if BUILTIN in config.sources:
        made = tiny_inputs()["tokens"]
        config = dataclasses.replace(config, sources=tuple(made if s == BUILTIN else s for s in config.sources))
    pipeline = open_pipeline(config)
    tokenizer = load_tokenizer(pipeline.tokenizer_dir)
    origins, batch = pipeline.trace(options.step - 1), pipeline.batch(options.step - 1)
    for row in range(config.batch_size) if options.row is None else [options.row]:
        text = tokenizer.decode(batch["tokens"][row][:_TOKENS])
        print(f"row {row}: {origins[row]}, {origins[row].tokens} tokens: {text!r}")


if __name__ == "__main__":
    cli.run(trace)
