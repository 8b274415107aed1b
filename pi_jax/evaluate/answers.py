"""Generates answers to prompts, for passkey, RULER and summarization."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from pi_jax.config import ModelConfig
from pi_jax.errors import InputError
from pi_jax.evaluate.loaded import LoadedModel, ModelOptions
from pi_jax.generate import Generator, stop_tokens

BATCH_TOKENS = 32768
"""Default of `AnswerOptions.batch_tokens`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """Options of evaluations that generate text."""

    batch_tokens: int = BATCH_TOKENS
    """Maximum number of tokens per batch of prompts; a longer prompt forms its own batch. Lower it if memory runs
    out."""


def open_generator(options: AnswerOptions, longest: int) -> tuple[Generator, Any, ModelConfig]:
    """Opens a model for prompts and answers of up to `longest` tokens together.

    Returns:
      The generator, the tokenizer and the architecture.

    Raises:
      InputError: if the model or its tokenizer cannot be read, or the tokenizer belongs to another model.
    """
    if options.batch_tokens < 1:
        raise InputError(f"--batch-tokens is {options.batch_tokens}: it must be at least 1")
    loaded = LoadedModel.for_evaluation(options)
    return loaded.generator(longest), loaded.tokenizer, loaded.config


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
    """Generates an answer to each prompt, with greedy decoding by default. Shows a progress bar on stderr.

    Args:
      generator: generator of the model.
      tokenizer: tokenizer of the model.
      prompts: token ids of each prompt.
      new_tokens: maximum number of tokens of an answer.
      batch_tokens: see `AnswerOptions`.
      what: label of the progress bar.
      temperature: see `Generator`.
      top_p: see `Generator`.
      seed: see `Generator`.

    Returns:
      The answers as text, in the order of the prompts.
    """
    longest = max(len(p) for p in prompts) + new_tokens
    size = max(1, batch_tokens // longest // generator.batch_shards) * generator.batch_shards
    size = min(size, -(-len(prompts) // generator.batch_shards) * generator.batch_shards)
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
    sampling = {"temperature": temperature, "top_p": top_p}
    for at in range(0, len(order), size):
        part = order[at : at + size]
        given = [prompts[i] for i in part]
        given += [given[0]] * (size - len(part))  # pad the last batch to the same shape, to avoid another compilation
        # Each batch needs its own seed; otherwise all batches would use the same random numbers.
        found = generator(given, new_tokens, stop_tokens=stops, seed=seed + at, **sampling)
        for i, tokens in zip(part, found, strict=False):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        bar.update(len(part))
    bar.close()
    return texts
