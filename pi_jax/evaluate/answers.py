"""Prompts to answers: what passkey and RULER share."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
from tqdm import tqdm

from pi_jax import cli
from pi_jax.config import ComputeConfig, MeshConfig, ModelConfig, RopeConfig
from pi_jax.convert.open import open_model
from pi_jax.errors import InputError
from pi_jax.generate import Generator, require_mesh, stop_tokens, warn_beyond_window
from pi_jax.parallel import sharding

BATCH_TOKENS = 32768
"""Tokens of prompts that are read side by side, where nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Which model answers, and how it is computed."""

    model: str
    """Hugging Face folder, or the folder of a pi_jax run."""
    rope: RopeConfig = RopeConfig()
    """Scaling to stamp on a model that has none: interpolation without fine-tuning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens of prompts that are read side by side; a longer prompt is read alone."""
    mesh: MeshConfig = MeshConfig()
    """Devices: prompts are split over data, fsdp and context, heads over tensor."""
    output: str = ""
    """Also write the result to this JSON file."""


def open_generator(options: EvaluationOptions, longest: int) -> tuple[Generator, Any, ModelConfig]:
    """The generator for prompts and answers of up to `longest` tokens, the tokenizer, the architecture.

    Raises:
      InputError: if the model or its tokenizer cannot be read or do not belong together.
    """
    from pi_jax.data.tokenizer import load_tokenizer

    cli.require_writable(options.output)
    if options.batch_tokens < 1:
        raise InputError(f"batch-tokens is {options.batch_tokens}: it must be at least 1")
    source = open_model(options.model, options.rope)
    tokenizer = load_tokenizer(source.files)
    if len(tokenizer.get_vocab()) > source.config.vocab_size:
        raise InputError(
            f"{source.files}: the tokenizer has {len(tokenizer.get_vocab())} tokens, the model's vocab_size is "
            f"{source.config.vocab_size}: they do not belong together"
        )
    warn_beyond_window(source.config, longest)
    mesh = sharding.make_mesh(options.mesh)
    require_mesh(mesh, source.config)
    compute = ComputeConfig(dtype=options.dtype, param_dtype=options.dtype, remat="none")
    with jax.set_mesh(mesh):
        return Generator(source.load(compute, mesh), mesh, max_length=longest), tokenizer, source.config


def answer(
    generator: Generator,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    batch_tokens: int,
    what: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answers, as text, in the order of the prompts, greedy by default; a bar on stderr says how far it is."""
    longest = max(len(p) for p in prompts) + new_tokens
    rows = max(1, batch_tokens // longest // generator.batch_shards) * generator.batch_shards
    rows = min(rows, -(-len(prompts) // generator.batch_shards) * generator.batch_shards)
    stops = stop_tokens(generator.config, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    bar = tqdm(
        total=len(prompts),
        desc=what,
        unit="prompt",
        disable=jax.process_index() > 0,
        mininterval=1 if sys.stderr.isatty() else 60,
    )
    drawing = {"temperature": temperature, "top_p": top_p}
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        given = [prompts[i] for i in part]
        given += [given[0]] * (rows - len(part))  # the last batch has the shape of the others: nothing compiles anew
        # With one seed the rows of every batch would draw alike.
        found = generator(given, new_tokens, stop_tokens=stops, seed=seed + at, **drawing)
        for i, tokens in zip(part, found, strict=False):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        bar.update(len(part))
    bar.close()
    return texts
