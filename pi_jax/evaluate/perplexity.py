"""Sliding-window perplexity, every token scored exactly once, weighted by token.

Five different things carry this name. This one: a window of W tokens starts at the beginning of a document and
advances by S tokens. The first window scores all its tokens but the very first; each later one only the tokens it
adds, so that these have at least W - S tokens before them. Perplexity is exp(sum of losses / tokens scored), over all
documents. No BOS is prepended unless asked for. (Press et al. 2021 after Chen et al. 2023, section 3.1; weighting as in
PoSE. YaRN's evaluator averages windows instead.)

Losses are kept by position in the document: that shows *where* a window breaks, which an average hides.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from pi_jax import cli, sharding
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig
from pi_jax.errors import InputError
from pi_jax.loss import token_losses
from pi_jax.model import Llama

_CHARACTERS_A_TOKEN = 64
"""Of a text whose first tokens are wanted, this many characters a token are tokenized first."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a document are read, of which [first, stop) are scored."""

    document: int
    start: int
    first: int
    stop: int


def sliding_windows(document: int, length: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `length` tokens: each token but the first is scored once."""
    stop = min(window, length)
    yield Window(document, 0, 1, stop)
    while stop < length:
        first, stop = stop, min(stop + stride, length)
        yield Window(document, stop - window, first, stop)


def _scorer(model: Llama, length: int, tail: int, mesh: jax.sharding.Mesh):
    """Compiled: tokens [rows, length] -> losses [rows, tail] of the last `tail` tokens."""

    @jax.jit
    def losses(model, tokens, positions):
        hidden = model(tokens, positions)
        # Logits only of what is scored: the token at i is predicted from the hidden state at i - 1.
        hidden, tokens = sharding.gather_sequence(hidden), sharding.gather_sequence(tokens)
        hidden, targets = hidden[:, length - 1 - tail : -1], tokens[:, length - tail :]
        weights = model.output_weights()
        return token_losses(hidden, weights, targets, model.compute.loss_chunk)

    def score(tokens: np.ndarray) -> np.ndarray:
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        batch = sharding.put_batch(mesh, {"tokens": tokens, "positions": np.ascontiguousarray(positions)})
        return np.asarray(losses(model, batch["tokens"], batch["positions"]))

    return score


def score_documents(
    model: Llama,
    documents: Sequence[np.ndarray],
    window: int,
    stride: int,
    mesh: jax.sharding.Mesh,
    bos: int | None = None,
    progress: bool = True,
) -> list[np.ndarray]:
    """The loss in nats of every token of every document; NaN for what is not scored (the first token, without BOS).

    Args:
      model: with parameters on `mesh`.
      documents: token ids, one array each.
      window: tokens that the model sees at most, BOS included.
      stride: tokens a window advances.
      mesh: its data and fsdp axes take windows side by side.
      bos: token put before every window, or None.
      progress: show on stderr how far it is.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    shift = bos is not None
    results = [np.full(len(tokens), np.nan, np.float32) for tokens in documents]
    # With BOS, a window holds one token fewer, and even a document's first token is predicted.
    plan = list(
        itertools.chain.from_iterable(
            sliding_windows(i, len(t), window - shift, stride) for i, t in enumerate(documents)
        )
    )
    quiet = jax.process_index() > 0 or not progress
    # On a terminal a bar; in a log file a line now and then.
    bar = tqdm(
        total=len(plan),
        desc=f"window {window}",
        unit="window",
        disable=quiet,
        mininterval=1 if sys.stderr.isatty() else 60,
    )
    # Full windows score up to all their tokens, later ones at most `stride`: two shapes, each compiled once.
    for full in (True, False):
        group = [w for w in plan if (w.start == 0 and w.first == 1) == full]
        tail = window - 1 if full else min(stride, window - 1)
        score = _scorer(model, window, tail, mesh)
        for batch in (group[i : i + rows] for i in range(0, len(group), rows)):
            tokens = np.zeros((rows, window), np.int32)
            for row, w in zip(tokens, batch, strict=False):
                part = documents[w.document][w.start : w.stop]
                if full:  # a short document is padded behind; causality keeps the padding out of sight
                    row[shift : shift + len(part)] = part
                else:
                    row[:] = part if not shift else np.concatenate([[bos], part])
                if shift:
                    row[0] = bos
            scored = score(tokens)
            for losses, w in zip(scored, batch, strict=False):
                first = 0 if shift and full else w.first
                offset = shift + first - w.start - (window - tail)  # of the first scored token in `losses`
                results[w.document][first : w.stop] = losses[offset : offset + w.stop - first]
            bar.update(len(batch))
    bar.close()
    return results


def summarize(losses: Sequence[np.ndarray], names: Sequence[str], edges: Sequence[int]) -> dict[str, Any]:
    """Perplexity over all tokens, for each document, and by position in the document between `edges`."""
    longest = max(len(x) for x in losses)
    edges = sorted({0, *(e for e in edges if 0 < e < longest), longest})

    def stats(parts: Sequence[np.ndarray]) -> dict[str, Any]:
        scored = np.concatenate([p[~np.isnan(p)] for p in parts]).astype(np.float64)
        if not len(scored):
            return {"tokens": 0, "loss": None, "perplexity": None}
        return {"tokens": len(scored), "loss": scored.mean(), "perplexity": math.exp(min(scored.mean(), 700.0))}

    buckets = [{"from": a, "to": b, **stats([x[a:b] for x in losses])} for a, b in itertools.pairwise(edges)]
    per_document = [{"name": n, **stats([x])} for n, x in zip(names, losses, strict=True)]
    return {**stats(losses), "by_position": buckets, "documents": per_document}


def default_edges(longest: int) -> list[int]:
    """Powers of two from 256 on."""
    return [2**i for i in range(8, max(9, longest.bit_length()))]


def read_tokens(
    data: Sequence[str], tokenizer_dir: str, vocab_size: int, max_tokens: int | None, text_field: str = "text"
) -> tuple[list[str], list[np.ndarray]]:
    """Names and token ids (no special tokens) of the documents in text files, cut to `max_tokens`.

    Raises:
      InputError: if there is no text, or the tokenizer has ids that the model has not.
    """
    from pi_jax.data import documents, prepare

    tokenizer = prepare.load_tokenizer(tokenizer_dir)
    if len(tokenizer.get_vocab()) > vocab_size:
        raise InputError(
            f"{tokenizer_dir}: the tokenizer has {len(tokenizer.get_vocab())} tokens, the model's vocab_size is "
            f"{vocab_size}: they do not belong together"
        )
    found = [d for d in documents.read_documents(data, text_field) if d.text]

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return prepare.encode(tokenizer, texts, bos=False, eos=False)

    # The beginning of a book will do for its first tokens; where it gives too few, the whole is tokenized.
    cut = _CHARACTERS_A_TOKEN * max_tokens if max_tokens else None
    tokens = encode([d.text[:cut] for d in found])
    short = [i for i, d in enumerate(found) if cut and len(d.text) > cut and len(tokens[i]) <= max_tokens]
    for i, whole in zip(short, encode([found[i].text for i in short]), strict=True):
        tokens[i] = whole
    kept = [(d.name, t[:max_tokens]) for d, t in zip(found, tokens, strict=True) if len(t) >= 2]
    if not kept:
        raise InputError(f"{', '.join(data)}: there is no text to evaluate on")
    return [n for n, _ in kept], [t for _, t in kept]


def check_windows(documents: Sequence[np.ndarray], windows: Sequence[int], stride: int) -> int:
    """The length of the longest document.

    Raises:
      InputError: if a window is longer, or advances by so much that a scored token would have none before it.
    """
    longest = max(len(tokens) for tokens in documents)
    if max(windows) > longest:
        raise InputError(
            f"window {max(windows)} is longer than every document (the longest has {longest} tokens): "
            "evaluate on longer text or a shorter window"
        )
    for window in windows:
        if stride >= window < longest:
            raise InputError(f"stride {stride} with a window of {window}: the stride must be shorter than the window")
    return longest


def evaluate_model(
    model: Llama,
    mesh: jax.sharding.Mesh,
    names: Sequence[str],
    documents: Sequence[np.ndarray],
    windows: Sequence[int],
    stride: int,
    bos: int | None = None,
    edges: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """One result for each window; see `summarize`.

    Raises:
      InputError: if a window is longer than every document.
    """
    longest = check_windows(documents, windows, stride)
    results = []
    for window in windows:
        started = time.monotonic()
        losses = score_documents(model, documents, window, stride, mesh, bos)
        summary = summarize(losses, names, edges or default_edges(longest))
        seconds = time.monotonic() - started
        results.append({"window": window, "stride": stride, "seconds": round(seconds, 1), **summary})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results for people: a row a window, a column a range of positions."""
    buckets = results[0]["by_position"]
    heads = ["window", "tokens", "perplexity", *(f"{_short(b['from'])}-{_short(b['to'])}" for b in buckets)]
    rows = [
        [str(r["window"]), f"{r['tokens']:,}", _number(r["perplexity"])]
        + [_number(b["perplexity"]) for b in r["by_position"]]
        for r in results
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in [heads, *rows])


def _short(n: int) -> str:
    return f"{n // 1024}k" if n and n % 1024 == 0 else str(n)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}" if x < 1000 else f"{x:.3g}"


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sliding-window perplexity of a model on text: every token scored once, weighted by token."""

    model: str
    """Hugging Face folder, or the folder of a pi_jax run."""
    data: tuple[str, ...]
    """Text files, folders or globs: .txt, .jsonl(.gz, .zst), .parquet."""
    windows: tuple[int, ...]
    """Window sizes in tokens."""
    stride: int = 256
    """Tokens a window advances."""
    max_tokens: int | None = None
    """Cut documents to this many tokens."""
    edges: tuple[int, ...] = ()
    """Bounds of the ranges of document positions that are reported; empty: powers of two."""
    bos: bool = False
    """Put the model's BOS token before every window."""
    rope: RopeConfig = RopeConfig()
    """Scaling to stamp on a model that has none: interpolation without fine-tuning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    text_field: str = "text"
    """Field of .jsonl and .parquet."""
    output: str = ""
    """Also write the result to this JSON file."""

    def __post_init__(self):
        if self.stride < 1 or any(w < 2 for w in self.windows) or not self.windows:
            raise InputError(f"windows {self.windows} with stride {self.stride}: need windows >= 2 and a stride >= 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise InputError(f"max-tokens is {self.max_tokens}: it must be at least 2")


def perplexity(args: Perplexity) -> dict[str, Any]:
    """Runs the command; returns what it prints as a dictionary."""
    from pi_jax.convert.sources import open_model

    cli.require_writable(args.output)
    source = open_model(args.model, args.rope)
    names, documents = read_tokens(args.data, source.files, source.config.vocab_size, args.max_tokens, args.text_field)
    bos = source.config.bos_token_id if args.bos else None
    if args.bos and bos is None:
        raise InputError(f"--bos: {source.files}/config.json has no bos_token_id")
    mesh = sharding.make_mesh(MeshConfig())
    compute = ComputeConfig(dtype=args.dtype, param_dtype=args.dtype, remat="none")
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        model = source.load(compute, mesh)
        results = evaluate_model(model, mesh, names, documents, args.windows, args.stride, bos, args.edges)
    print(
        f"{args.model}: {source.config.rope}, {len(documents)} documents, {'BOS' if args.bos else 'no BOS'}, "
        f"stride {args.stride}, {args.dtype}; perplexity by position in the document"
    )
    print(table(results))
    report = {
        "command": "perplexity",
        "model": args.model,
        "rope": f"{source.config.rope}",
        "protocol": {"bos": args.bos, "stride": args.stride, "average": "tokens", "dtype": args.dtype},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "results": results,
    }
    if args.output:
        cli.write_json(args.output, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: perplexity(tyro.cli(Perplexity, prog="python -m pi_jax.evaluate perplexity", args=argv)))
