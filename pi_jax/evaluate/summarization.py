"""Summarization of long documents, scored with ROUGE: the paper's GovReport protocol (section 3.5, Table 6).

The paper's prompt contains the first 15,000 tokens of a document. Up to 1,000 tokens are sampled with temperature 0.5
and top-p 0.95. ROUGE is computed with Google's `rouge-score`, and F-measures are averaged over documents. Our choices,
where the paper gives no details: words are stemmed, there is a line break between prompt and summary, and a summary
ends at EOS.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro
from rouge_score import rouge_scorer

from pi_jax import cli, log
from pi_jax.data.documents import Document, read_documents
from pi_jax.data.prepare import SUMMARIZE
from pi_jax.data.tokenizer import Prompt
from pi_jax.errors import InputError, some
from pi_jax.evaluate import result
from pi_jax.evaluate.loaded import AnswerOptions, LoadedModel, answer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""rougeL treats the complete text as one sequence; rougeLsum combines the subsequences found for each line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summarization(AnswerOptions):
    """Compute ROUGE of a model's summaries of long documents: GovReport as in the paper's Table 6."""

    data: tuple[str, ...] = ()
    """.jsonl, .json (both also .gz or .zst) or .parquet files with documents and their reference summaries."""
    document_field: str = "report"
    """Field with the document."""
    summary_field: str = "summary"
    """Field with the reference summary."""
    documents: int | None = None
    """Number of documents to evaluate, from the first; default: all."""
    max_input: int = 15_000
    """Maximum number of tokens of a document; the rest is cut off."""
    max_new_tokens: int = 1_000
    """Maximum number of tokens of a summary."""
    temperature: float = 0.5
    """Sampling temperature; 0 always selects the most likely token."""
    top_p: float = 0.95
    """Sample from the smallest set of most likely tokens whose total probability reaches this value."""
    seed: int = 0
    """Random seed for sampling."""
    bos: bool = False
    """Prepend the model's BOS token to the prompt."""

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise InputError("--data is empty: it needs at least one .jsonl or .parquet file")
        for name in ("documents", "max_input", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def rouge(references: Sequence[str], summaries: Sequence[str]) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Computes precision, recall and F-measure of `METRICS`, averaged over documents, and the F-measures per document.

    Words are lower-cased and stemmed, as `rouge_score` does with `use_stemmer`.
    """
    scorer = rouge_scorer.RougeScorer(METRICS, use_stemmer=True)
    scores = [scorer.score(r, s) for r, s in zip(references, summaries, strict=True)]
    names = {"precision": "precision", "recall": "recall", "f": "fmeasure"}
    means = {m: {k: float(np.mean([getattr(s[m], n) for s in scores])) for k, n in names.items()} for m in METRICS}
    return means, [{m: s[m].fmeasure for m in METRICS} for s in scores]


def read_pairs(args: Summarization) -> list[Document]:
    """Reads the documents (as `prompt`) and their reference summaries (as `text`).

    Raises:
      InputError: as `read_documents`, or if there are no documents with a summary.
    """
    found = read_documents(args.data, args.summary_field, args.document_field)
    pairs = [d for d, _ in zip(found, range(args.documents), strict=False)] if args.documents else list(found)
    if empty := [d.name for d in pairs if not d.prompt.strip() or not d.text.strip()]:
        log.warn(f"skipped {some(empty)}: the document or its summary is empty")
    pairs = [d for d in pairs if d.prompt.strip() and d.text.strip()]
    if not pairs:
        raise InputError(f"--data {', '.join(args.data)} contains no document with a summary")
    return pairs


def summarization(args: Summarization) -> dict[str, Any]:
    """Runs the command and returns its result."""
    loaded = LoadedModel.for_evaluation(args)
    config, tokenizer = loaded.config, loaded.tokenizer
    before = [loaded.bos] if args.bos else []
    pairs = read_pairs(args)
    prompts = Prompt(SUMMARIZE, args.max_input).encode(tokenizer, [d.prompt for d in pairs])
    prompts = [[*before, *p.tolist()] for p in prompts]
    generator = loaded.generator(max(map(len, prompts)) + args.max_new_tokens)
    started = time.monotonic()
    summaries = answer(
        generator,
        tokenizer,
        prompts,
        args.max_new_tokens,
        batch_tokens=args.batch_tokens,
        what="summaries",
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    summaries = [text.strip() for text in summaries]
    means, each = rouge([d.text for d in pairs], summaries)
    report = result.report(
        "summarization",
        args.model,
        config,
        protocol={
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
        results={"documents": len(pairs), "seconds": round(time.monotonic() - started, 1), **means},
        summaries=[
            {"name": d.name, "prompt_tokens": len(p), "summary": s, **scores}
            for d, p, s, scores in zip(pairs, prompts, summaries, each, strict=True)
        ],
    )
    log.info(f"{args.model}: {config.rope}, {len(pairs)} documents, {args.dtype}; F-measure in %")
    log.info("  ".join(f"{name} {100 * means[name]['f']:.2f}" for name in METRICS))
    result.write(args.output, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: summarization(tyro.cli(Summarization, prog="python -m pi_jax.evaluate summarization", args=argv)))
