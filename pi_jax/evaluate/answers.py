"""Prompts to answers: what passkey and RULER share."""

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
"""Tokens of prompts that are read side by side, where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """Which model answers, and how it is computed."""

    batch_tokens: int = BATCH_TOKENS
    """Tokens of prompts that are read side by side; a longer prompt is read alone. Lower it if memory runs out."""


def open_generator(options: AnswerOptions, longest: int) -> tuple[Generator, Any, ModelConfig]:
    """The generator for prompts and answers of up to `longest` tokens, the tokenizer, the architecture.

    Raises:
      InputError: if the model or its tokenizer cannot be read or do not belong together.
    """
    if options.batch_tokens < 1:
        raise InputError(f"batch-tokens is {options.batch_tokens}: it must be at least 1")
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
