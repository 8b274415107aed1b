"""Sliding-window perplexity, which scores each token exactly once.

Several different quantities are called sliding-window perplexity. Here it is exp(sum of losses / tokens scored) over
all documents, which are never joined; `pi_jax.evaluate.perplexity.sliding` defines the windows. By default, no BOS is
prepended. (Press et al. 2021 as used by Chen et al. 2023, section 3.1; weighting as in PoSE.) The result also contains
what YaRN's evaluator calls perplexity: exp of the mean over windows of the mean loss per window.

Losses are reported by position in the document, which shows *where* a window fails or stops helping. An average hides
this.
"""

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro

from pi_jax import cli, log
from pi_jax.config import ModelConfig
from pi_jax.errors import InputError, some
from pi_jax.evaluate import result
from pi_jax.evaluate.loaded import LoadedModel, ModelOptions
from pi_jax.evaluate.perplexity.sliding import Partial, Window, identity, plan_windows, score_documents
from pi_jax.model import Llama

_CHARACTERS_A_TOKEN = 64
"""Characters to tokenize per needed token, if only the first tokens of a text are needed."""
_CURVE_POINTS = 64

BosPolicy = Literal["none", "document", "window"]
"""'none': no BOS; 'document': before the first token of each document, as in training; 'window': before each window,
which then contains one token of text fewer (YaRN, PoSE)."""


def summarize(
    losses: Sequence[np.ndarray], names: Sequence[str], edges: Sequence[int], windows: Sequence[Window]
) -> dict[str, Any]:
    """Computes perplexity over all tokens, by window, by document, and by position in the document.

    Args:
      losses: losses of the tokens of each document; NaN for tokens that are not scored.
      names: names of the documents.
      edges: boundaries of the ranges of positions.
      windows: windows that scored the tokens, for the mean over windows.
    """
    longest = max(len(x) for x in losses)
    edges = sorted({0, *(e for e in edges if 0 < e < longest), longest})
    fine = np.unique(np.linspace(0, longest, min(longest, _CURVE_POINTS) + 1).astype(int))
    counts, sums = _by_position(losses, longest)

    def ranges(edges: Sequence[int]) -> list[dict[str, Any]]:
        cut = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        return [{"from": a, "to": b, **_stats(counts[a:b].sum(), sums[a:b].sum())} for a, b in cut]

    means = [float(np.nanmean(losses[w.document][w.first : w.stop])) for w in windows]
    of_document = [[m for m, w in zip(means, windows, strict=True) if w.document == i] for i in range(len(losses))]
    documents = [
        {"name": name, **_stats(np.sum(~np.isnan(x)), np.nansum(x, dtype=np.float64)), **_window_mean(own)}
        for name, x, own in zip(names, losses, of_document, strict=True)
    ]
    return {
        **_stats(counts.sum(), sums.sum()),
        **_window_mean(means),
        "by_position": ranges(edges),
        "curve": ranges(fine),
        "documents": documents,
    }


def _by_position(losses: Sequence[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of scored tokens at each position, and the sum of their losses, over all documents."""
    counts, sums = np.zeros(longest, np.int64), np.zeros(longest)
    for x in losses:
        counts[: len(x)] += ~np.isnan(x)
        sums[: len(x)] += np.nan_to_num(x.astype(np.float64))
    return counts, sums


def _stats(count: int, total: float) -> dict[str, Any]:
    if not count:
        return {"tokens": 0, "loss": None, "perplexity": None}
    return {"tokens": int(count), "loss": float(total / count), "perplexity": _exp(total / count)}


def _window_mean(means: Sequence[float]) -> dict[str, Any]:
    return {"windows": len(means), "window_mean_perplexity": _exp(float(np.mean(means)))}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def default_edges(longest: int) -> list[int]:
    """Returns powers of two from 256 on."""
    return [2**i for i in range(8, max(9, longest.bit_length()))]


def read_tokens(
    data: Sequence[str], tokenizer_dir: str, vocab_size: int, max_tokens: int | None, text_field: str = "text"
) -> tuple[list[str], list[np.ndarray]]:
    """Reads documents and tokenizes them without special tokens, truncated to `max_tokens`.

    Returns:
      The names of the documents and their token ids.

    Raises:
      InputError: if there is no text, or it contains a token that the model lacks.
    """
    from pi_jax.data import documents
    from pi_jax.data import tokenizer as tokenizers

    tokenizer = tokenizers.load_tokenizer(tokenizer_dir)
    found = list(documents.read_documents(data, text_field))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return tokenizers.encode(tokenizer, texts, bos=False, eos=False)

    # Tokenize only the beginning of a long document; if that gives too few tokens, tokenize the complete document.
    cut = _CHARACTERS_A_TOKEN * max_tokens if max_tokens else None
    texts = ["" if d.empty else d.text for d in found]
    tokens = encode([text[:cut] for text in texts])
    short = [i for i, text in enumerate(texts) if cut and len(text) > cut and len(tokens[i]) <= max_tokens]
    for i, whole in zip(short, encode([texts[i] for i in short]), strict=True):
        tokens[i] = whole
    kept = [(d.name, t[:max_tokens]) for d, t in zip(found, tokens, strict=True) if len(t) >= 2]
    for name, ids in kept:
        tokenizers.require_known(ids, tokenizer, vocab_size, name)
    if not kept:
        raise InputError(f"{', '.join(data)}: there is no text to evaluate on")
    if empty := [d.name for d, t in zip(found, tokens, strict=True) if len(t) < 2]:
        log.warn(f"skipped {some(empty)}: a document needs at least two tokens, not only white space")
    return [n for n, _ in kept], [t for _, t in kept]


def warn_about_windows(
    model: ModelConfig, names: Sequence[str], documents: Sequence[np.ndarray], windows: Sequence[int], bos: bool
) -> None:
    """Warns if a window, with BOS if `bos`, exceeds the window of the model or the length of a document."""
    if max(windows) > model.max_position_embeddings:
        log.warn(
            f"window {max(windows)} exceeds the window of the model, {model.max_position_embeddings} tokens "
            f"({model.rope}): expect a very large perplexity"
        )
    lengths = [len(tokens) for tokens in documents]
    if short := [f"{n} ({length})" for n, length in zip(names, lengths, strict=True) if length + bos < max(windows)]:
        log.warn(f"shorter than a window of {max(windows)} tokens, so scored in one window: {some(short)}")


def check_windows(documents: Sequence[np.ndarray], windows: Sequence[int], stride: int, bos: bool = False) -> int:
    """Checks the windows and returns the length of the longest document.

    Args:
      documents: token ids of each document.
      windows: window sizes in tokens, with BOS.
      stride: number of tokens by which a window advances.
      bos: whether BOS is prepended to each window.

    Raises:
      InputError: if a window is longer than all documents, or the stride skips tokens.
    """
    longest = max(len(tokens) for tokens in documents)
    if max(windows) > longest + bos:
        raise InputError(
            f"window {max(windows)} is longer than every document (the longest has {longest} tokens"
            f"{' and BOS' if bos else ''}): use longer text or a shorter window"
        )
    _check_stride(windows, stride, bos, longest)
    return longest


def _check_stride(windows: Sequence[int], stride: int, bos: bool, longest: int | None) -> None:
    """Checks that windows over a document of `longest` tokens (None: unknown) skip none of them."""
    for window in windows:
        width = window - bos
        if stride > width and (longest is None or longest > width):
            text = f"the {width} tokens of text in a window of {window} with BOS" if bos else f"the window, {window}"
            raise InputError(f"stride is {stride}: it must be at most {text}")


def evaluate_model(
    model: Llama,
    mesh: jax.sharding.Mesh,
    names: Sequence[str],
    documents: Sequence[np.ndarray],
    windows: Sequence[int],
    stride: int,
    bos: int | None = None,
    edges: Sequence[int] = (),
    partial: str = "",
) -> list[dict[str, Any]]:
    """Evaluates a model and returns one result per window; see `summarize`. Shows a progress bar on stderr.

    Args:
      model: model with its parameters on `mesh`.
      mesh: mesh that is currently set.
      names: names of the documents.
      documents: token ids of each document.
      windows: window sizes in tokens.
      stride: number of tokens by which a window advances.
      bos: token to prepend to each window, or None.
      edges: boundaries of the ranges of positions in the result; empty: powers of two.
      partial: file in which to save the losses computed so far, so that an interrupted evaluation can continue; empty:
        none.

    Raises:
      InputError: if a window is longer than every document, or the stride is longer than a window.
    """
    longest = check_windows(documents, windows, stride, bos is not None)
    lengths = [len(tokens) for tokens in documents]
    plans = {window: plan_windows(lengths, window, stride, bos) for window in windows}
    saved = Partial(partial, identity(model, documents, bos)) if partial else None
    if saved and saved.rejected:
        log.warn(f"{partial} is damaged or belongs to another evaluation: starting from the beginning")
    elif saved and saved.windows_done:
        log.info(f"Continuing after {saved.windows_done} windows saved in {partial}")
    results = []
    # The bar counts tokens, which makes the estimated time about right.
    total = sum(window * len(plan) for window, plan in plans.items())
    with log.progress(total, "perplexity", "token") as bar:
        for window, plan in plans.items():
            started = time.monotonic()

            def advance(done, window=window):
                bar.update(done * window)

            losses = score_documents(model, documents, window, stride, mesh, bos, advance, saved)
            summary = summarize(losses, names, edges or default_edges(longest), plan)
            seconds = time.monotonic() - started
            results.append({"window": window, "stride": stride, "seconds": round(seconds, 1), **summary})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Formats results as a table with one row per window and one column per range of positions."""
    buckets = results[0]["by_position"]
    heads = ["window", "tokens", "perplexity", "window mean"]
    heads += [f"{_short(b['from'])}-{_short(b['to'])}" for b in buckets]
    rows = [
        [str(r["window"]), f"{r['tokens']:,}", _number(r["perplexity"]), _number(r["window_mean_perplexity"])]
        + [_number(b["perplexity"]) for b in r["by_position"]]
        for r in results
    ]
    return result.table([heads, *rows])


def _short(n: int) -> str:
    return f"{n // 1024}k" if n and n % 1024 == 0 else str(n)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}" if x < 1000 else f"{x:.3g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(ModelOptions):
    """Compute sliding-window perplexity of a model on text, by token, by window and by document."""

    data: tuple[str, ...]
    """Text files, folders or globs: .txt, .md, .jsonl, .json (both also .gz or .zst), .parquet."""
    windows: tuple[int, ...]
    """Window sizes in tokens."""
    stride: int = 256
    """Number of tokens by which a window advances, at most the window: windows are then disjoint. A smaller stride
    gives tokens more context and takes longer."""
    max_tokens: int | None = None
    """Maximum number of tokens per document; the rest is cut off."""
    edges: tuple[int, ...] = ()
    """Boundaries of the reported ranges of document positions, in tokens; empty: powers of two."""
    bos: BosPolicy = "none"
    """Where to prepend the model's BOS token: nowhere, before each document, or before each window (which then contains
    one token of text fewer, as in YaRN's evaluator)."""
    text_field: str = "text"
    """Field with the text in .jsonl and .parquet files."""
    output: str = ""
    """Also write the result to this JSON file. An interrupted evaluation continues from FILE.partial."""


def _check(args: Perplexity) -> None:
    """Checks what the arguments alone show, before anything is read."""
    if args.stride < 1 or any(w < 2 for w in args.windows) or not args.windows:
        raise InputError(
            f"--windows is {args.windows} and --stride is {args.stride}: windows must be at least 2, and the stride at "
            "least 1"
        )
    if args.max_tokens is not None and args.max_tokens < 2:
        raise InputError(f"--max-tokens is {args.max_tokens}: it must be at least 2")
    if args.max_tokens is not None and max(args.windows) > args.max_tokens + (args.bos != "none"):
        raise InputError(f"window {max(args.windows)} is longer than every document: --max-tokens is {args.max_tokens}")
    longest = None if args.max_tokens is None else args.max_tokens + (args.bos == "document")
    _check_stride(args.windows, args.stride, args.bos == "window", longest)


def perplexity(args: Perplexity) -> dict[str, Any]:
    """Runs the command and returns its result."""
    _check(args)
    loaded = LoadedModel.for_evaluation(args)
    source, shards = loaded.source, loaded.mesh.shape["context"]
    if uneven := [window for window in args.windows if window % shards]:
        raise InputError(f"window {uneven[0]} is not divisible by mesh.context {shards}: choose a multiple of it")
    bos = loaded.bos if args.bos != "none" else None
    names, documents = read_tokens(args.data, source.files, source.config.vocab_size, args.max_tokens, args.text_field)
    if args.bos == "document":  # BOS itself is not scored
        documents = [np.concatenate([[bos], tokens]) for tokens in documents]
    check_windows(documents, args.windows, args.stride, args.bos == "window")
    warn_about_windows(source.config, names, documents, args.windows, args.bos == "window")
    partial = f"{args.output}.partial" if args.output else ""
    with loaded.computing() as model:
        results = evaluate_model(
            model,
            loaded.mesh,
            names,
            documents,
            args.windows,
            args.stride,
            bos if args.bos == "window" else None,
            args.edges,
            partial,
        )
    log.info(
        f"{args.model}: {source.config.rope}, {len(documents)} documents, BOS: {args.bos}, "
        f"stride {args.stride}, {args.dtype}; perplexity by position in the document"
    )
    log.info(table(results))
    report = result.report(
        "perplexity",
        args.model,
        source.config,
        protocol={
            "bos": args.bos,
            "stride": args.stride,
            "average": "perplexity: tokens; window_mean_perplexity: windows (YaRN)",
            "dtype": args.dtype,
            "max_tokens": args.max_tokens,
        },
        results=results,
    )
    result.write(args.output, report)
    if args.output and jax.process_index() == 0:
        pathlib.Path(partial).unlink(missing_ok=True)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: perplexity(tyro.cli(Perplexity, prog="python -m pi_jax.evaluate perplexity", args=argv)))
