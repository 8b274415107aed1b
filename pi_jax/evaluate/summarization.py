"""Summaries of long documents, scored by ROUGE: the paper's GovReport protocol (section 3.5, Table 6).

The first 15,000 tokens of a document stand in the paper's prompt; up to 1,000 tokens are drawn with temperature 0.5 and
top-p 0.95; ROUGE is Google's `rouge-score`, F-measures averaged over documents. What the paper does not say is fixed
here: words are stemmed, the prompt's last line ends before the summary, a summary ends at EOS.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rouge_score import rouge_scorer
from tqdm import tqdm

from pi_jax import cli, sharding
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig
from pi_jax.data.documents import Document, read_documents
from pi_jax.data.prepare import SUMMARIZE, Prompt, load_tokenizer
from pi_jax.errors import InputError
from pi_jax.evaluate.perplexity import require_vocabulary, warn
from pi_jax.evaluate.scoring import rows_at_a_time
from pi_jax.generate import Generator
from pi_jax.metrics import note

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""rougeL takes the whole text as one sequence; rougeLsum joins the sequences of its lines."""


@dataclasses.dataclass(frozen=True)
class Summarization:
    """ROUGE of a model's summaries of long documents: GovReport as in the paper's Table 6."""

    model: str
    """Hugging Face folder, or the folder of a pi_jax run."""
    data: tuple[str, ...]
    """.jsonl(.gz, .zst) or .parquet files with documents and their reference summaries."""
    document_field: str = "report"
    """Field with the document."""
    summary_field: str = "summary"
    """Field with the reference summary."""
    documents: int | None = None
    """Only the first so many."""
    max_input: int = 15_000
    """Tokens of the document that are kept, the first ones."""
    max_new_tokens: int = 1_000
    """Tokens of a summary, at most."""
    temperature: float = 0.5
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of likeliest tokens that has this probability."""
    seed: int = 0
    """Of the draws."""
    batch_tokens: int = 16_384
    """Tokens that a device holds at a time: one long document, or several short ones."""
    bos: bool = False
    """Put the model's BOS token before the prompt."""
    rope: RopeConfig = RopeConfig()
    """Scaling to stamp on a model that has none: interpolation without fine-tuning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    output: str = ""
    """Also write the result, with every summary, to this JSON file."""

    def __post_init__(self):
        if not self.data:
            raise InputError("--data is empty: it needs at least one .jsonl or .parquet file")
        for name in ("documents", "max_input", "max_new_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def rouge(references: Sequence[str], summaries: Sequence[str]) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Precision, recall and F-measure of each of `METRICS` averaged over documents, and F of each document.

    Words are lower-cased and stemmed, as `rouge_score` does with `use_stemmer`.
    """
    scorer = rouge_scorer.RougeScorer(METRICS, use_stemmer=True)
    scores = [scorer.score(r, s) for r, s in zip(references, summaries, strict=True)]
    names = {"precision": "precision", "recall": "recall", "f": "fmeasure"}
    means = {m: {k: float(np.mean([getattr(s[m], n) for s in scores])) for k, n in names.items()} for m in METRICS}
    return means, [{m: s[m].fmeasure for m in METRICS} for s in scores]


def read_pairs(args: Summarization) -> list[Document]:
    """Documents as prompts and their summaries as texts.

    Raises:
      InputError: for what `read_documents` refuses, or no documents.
    """
    found = read_documents(args.data, args.summary_field, args.document_field)
    pairs = [d for d, _ in zip(found, range(args.documents), strict=False)] if args.documents else list(found)
    if empty := [d.name for d in pairs if not d.prompt.strip() or not d.text.strip()]:
        warn(f"{', '.join(empty[:3])}{' and more' if len(empty) > 3 else ''} left out: no document, or no summary")
    pairs = [d for d in pairs if d.prompt.strip() and d.text.strip()]
    if not pairs:
        raise InputError(f"{', '.join(args.data)}: there is no document with a summary in it")
    return pairs


def summarization(args: Summarization) -> dict[str, Any]:
    """Runs the command; returns what it prints as a dictionary."""
    from pi_jax.convert.sources import open_model

    cli.require_writable(args.output)
    source = open_model(args.model, args.rope)
    config, tokenizer = source.config, load_tokenizer(source.files)
    require_vocabulary(tokenizer, source.files, config.vocab_size)
    if args.bos and config.bos_token_id is None:
        raise InputError(f"--bos: {source.files}/config.json has no bos_token_id")
    pairs = read_pairs(args)
    prompts = [p.tolist() for p in Prompt(SUMMARIZE, args.max_input).encode(tokenizer, [d.prompt for d in pairs])]
    prompts = [[config.bos_token_id, *p] if args.bos else p for p in prompts]
    longest = max(map(len, prompts)) + args.max_new_tokens
    if longest > config.max_position_embeddings:
        warn(
            f"prompts and summaries of up to {longest} tokens are beyond the {config.max_position_embeddings} that the "
            f"model is scaled to ({config.rope}): lower --max-input, or extend the model"
        )
    mesh = sharding.make_mesh(MeshConfig())
    compute = ComputeConfig(dtype=args.dtype, param_dtype=args.dtype, remat="none")
    started = time.monotonic()
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        generator = Generator(source.load(compute, mesh), mesh, max_length=longest)
    found = _summaries(args, generator, mesh, tokenizer, prompts, _stop_tokens(config.eos_token_id, tokenizer))
    summaries = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]
    means, each = rouge([d.text for d in pairs], summaries)
    report = {
        "command": "summarization",
        "model": args.model,
        "rope": f"{config.rope}",
        "model_window": config.max_position_embeddings,
        "original_window": config.original_window,
        "protocol": {
            "prompt": SUMMARIZE,
            "max_input": args.max_input,
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
            "bos": args.bos,
            "rouge": "rouge-score with stemming, mean over documents",
            "dtype": args.dtype,
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "results": {"documents": len(pairs), "seconds": round(time.monotonic() - started, 1), **means},
        "summaries": [
            {"name": d.name, "prompt_tokens": len(p), "new_tokens": len(t), "summary": s, **scores}
            for d, p, t, s, scores in zip(pairs, prompts, found, summaries, each, strict=True)
        ],
    }
    note(f"{args.model}: {config.rope}, {len(pairs)} documents, {args.dtype}; F-measure in %")
    note("  ".join(f"{name} {100 * means[name]['f']:.2f}" for name in METRICS))
    if args.output and jax.process_index() == 0:
        cli.write_json(args.output, report)
    return report


def _stop_tokens(eos: int | tuple[int, ...] | None, tokenizer: Any) -> tuple[int, ...]:
    of_model = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
    return of_model or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))


def _summaries(args, generator, mesh, tokenizer, prompts, stop_tokens) -> list[list[int]]:
    """New tokens for each prompt; those of about the same length share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc="summaries", disable=jax.process_index() > 0) as bar:
        at = 0
        while at < len(order):
            length = len(prompts[order[at]]) + args.max_new_tokens
            batch = order[at : at + rows_at_a_time(mesh, length, args.batch_tokens, len(order) - at)]
            new = generator(
                [prompts[i] for i in batch],
                args.max_new_tokens,
                stop_tokens=stop_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                seed=args.seed + at,  # else the rows of every batch would draw alike
            )
            for i, tokens in zip(batch, new, strict=True):
                found[i] = tokens
            at += len(batch)
            bar.update(len(batch))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: summarization(tyro.cli(Summarization, prog="python -m pi_jax.evaluate summarization", args=argv)))
