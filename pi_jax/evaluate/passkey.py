"""Passkey retrieval (Mohtashami & Jaggi 2023) with the protocol of Chen et al. 2023, section 3.3.

A five-digit key is hidden in filler text, k tokens from the end of the input, and the model is asked for it. There are
32 values of k, evenly spaced up to the window, with 10 keys each. k_max is the largest k such that at it and at all
smaller values the key is found in at least 20% of the trials. Our choices, where the paper gives no details:

- All inputs have the same length: the window minus the tokens of the answer, so that all positions are inside it.
- k counts from the first token of the key to the end of the input. The line with the key is placed between complete
  repetitions of the filler, as far from the end as possible but at most k tokens away. With the largest k, the window
  itself, it follows the header. `distance` in the result is the actual distance.
- The length is exact: the filler before the key starts in the middle of a repetition. It is never cut at the end,
  because a truncated filler before the question lowers the success rate.
- Decoding is greedy, and the first sequence of digits in the answer must be the key.
- The key is uniformly distributed in 10000..99999 and depends only on (seed, length, k, trial).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro

from pi_jax import atomic, cli, log, plotting
from pi_jax.data.tokenizer import require_known
from pi_jax.errors import InputError
from pi_jax.evaluate import result
from pi_jax.evaluate.loaded import AnswerOptions, LoadedModel, answer
from pi_jax.generate import Generator

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
NEW_TOKENS = 10
"""Maximum number of tokens of an answer."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and the key hidden in it."""

    tokens: list[int]
    key: int
    distance: int
    """Distance in tokens from the first token of the key to the end of the prompt."""


class PromptMaker:
    """Makes prompts of an exact length with any tokenizer, including the special tokens that it prepends."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._unit = len(self._encode(" ".join([FILLER] * 9))) - len(self._encode(" ".join([FILLER] * 8)))

    def _encode(self, text: str):
        return self._tokenizer.backend_tokenizer.encode(text)

    def _parts(self, before: int, after: int, key: int) -> tuple[list[int], int, int]:
        """Builds a prompt with the given repetitions of the filler before and after the key.

        Returns:
          The tokens, and the indices of the first token of the filler before the key and of the key.
        """
        lines = [HEADER, " ".join([FILLER] * before), KEY_LINE.format(key=key), " ".join([FILLER] * after), QUESTION]
        text = "\n".join(line for line in lines if line)
        encoded = self._encode(text)
        key_at = text.index(str(key))
        front = key_token = None
        for i, (start, end) in enumerate(encoded.offsets):
            if front is None and start >= len(HEADER) + 1:
                front = i
            if end > key_at and end > start:
                key_token = i
                break
        return list(encoded.ids), front, key_token

    def shortest(self) -> list[int]:
        """The shortest prompt, with one repetition of the filler on each side of the key."""
        return self._parts(1, 1, 12345)[0]

    def __call__(self, length: int, key: int, *, distance: int | None = None, depth: float | None = None) -> Prompt:
        """Makes a prompt. Pass either `distance` or `depth`.

        Args:
          length: exact length in tokens.
          key: number to find.
          distance: maximum distance in tokens from the key to the end.
          depth: share of the filler that precedes the key, 0 to 1.

        Raises:
          InputError: if the length is too short for one repetition of the filler on each side of the key.
        """
        shortest = len(self.shortest())
        if length < shortest:
            raise InputError(f"length is {length}: a passkey prompt needs at least {shortest} tokens")
        units = (length - shortest) // self._unit + 2
        bare, _, key_token = self._parts(1, 0, key)
        nearest = len(bare) - key_token
        after = (distance - nearest) // self._unit if depth is None else round((1 - depth) * units)
        after = min(max(after, 0), units)
        while True:
            before = max(1, units - after)
            tokens, front, key_token = self._parts(before, after, key)
            while len(tokens) < length:
                before += 1
                tokens, front, key_token = self._parts(before, after, key)
            surplus = len(tokens) - length
            place = len(tokens) - key_token
            fits = front + surplus < key_token and (depth is not None or place <= distance)
            if fits or after == 0:
                break
            after -= 1  # too little filler before the key, or the key is too far from the end
        if front + surplus >= key_token:
            raise InputError(f"length is {length}: a passkey prompt needs at least {shortest} tokens")
        del tokens[front : front + surplus]
        return Prompt(tokens, key, len(tokens) - (key_token - surplus))


def _key(*seed: int) -> int:
    return int(np.random.default_rng(seed).integers(10000, 100000))


def found(text: str, key: int) -> bool:
    """Whether the first sequence of digits in an answer is the key."""
    digits = re.search(r"\d+", text)
    return digits is not None and int(digits[0]) == key


def require_room(tokenizer: Any, vocab_size: int, lengths: Sequence[int], name: str) -> None:
    """Checks that a prompt and its answer fit in each length; `name` is what the message calls one.

    Raises:
      InputError: naming the shortest length and what is needed, or a token of the prompt that the model lacks.
    """
    prompt = PromptMaker(tokenizer).shortest()
    require_known(prompt, tokenizer, vocab_size, "the passkey prompt")
    shortest = len(prompt) + NEW_TOKENS
    if min(lengths) < shortest:
        raise InputError(
            f"{name} is {min(lengths)}: a passkey prompt and its answer need at least {shortest} tokens with this "
            "tokenizer"
        )


def measure_distances(
    generator: Generator, tokenizer: Any, length: int, distances: int, trials: int, seed: int, batch_tokens: int
) -> dict[str, Any]:
    """Measures k_max for a window of `length` tokens, including the answer.

    Raises:
      InputError: if the length is too short for the prompt.
    """
    make = PromptMaker(tokenizer)
    ks = [round(length * i / distances) for i in range(1, distances + 1)]
    prompts = [[make(length - NEW_TOKENS, _key(seed, length, k, t), distance=k) for t in range(trials)] for k in ks]
    rates = _rates(generator, tokenizer, prompts, batch_tokens, f"passkey {length}")
    real = [round(float(np.mean([p.distance for p in row])), 1) for row in prompts]
    return {
        "length": length,
        "k_max": result.effective_length(ks, rates, 0.2),
        "k_max_strict": result.effective_length(ks, rates, 1.0),
        "success": float(np.mean(rates)),
        "by_distance": [{"k": k, "distance": d, "success": r} for k, d, r in zip(ks, real, rates, strict=True)],
    }


def measure_grid(
    generator: Generator,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
    batch_tokens: int,
) -> dict[str, Any]:
    """Measures success rates by depth of the key (rows) and length of the input including its answer (columns)."""
    make = PromptMaker(tokenizer)
    columns = []
    for length in lengths:
        prompts = [
            [make(length - NEW_TOKENS, _key(seed, length, i, t, 1), depth=depth) for t in range(trials)]
            for i, depth in enumerate(depths)
        ]
        columns.append(_rates(generator, tokenizer, prompts, batch_tokens, f"passkey grid {length}"))
    return {
        "depths": list(depths),
        "lengths": list(lengths),
        "success": [list(row) for row in zip(*columns, strict=True)],
    }


def _rates(generator, tokenizer, prompts: list[list[Prompt]], batch_tokens: int, what: str) -> list[float]:
    flat = [p for row in prompts for p in row]
    texts = answer(generator, tokenizer, [p.tokens for p in flat], NEW_TOKENS, batch_tokens=batch_tokens, what=what)
    right = iter([found(text, p.key) for text, p in zip(texts, flat, strict=True)])
    return [float(np.mean([next(right) for _ in row])) for row in prompts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(AnswerOptions):
    """Measure passkey retrieval: up to which distance the model finds a number in its input."""

    lengths: tuple[int, ...] = ()
    """Windows in tokens for which to measure k_max; empty: the window of the model, unless there is a grid."""
    distances: int = 32
    """Number of values of k per length, evenly spaced up to the length."""
    trials: int = 10
    """Number of keys per value of k, and per cell of the grid."""
    grid_lengths: tuple[int, ...] = ()
    """Lengths in tokens of a grid of success rates by depth and length; empty: no grid."""
    grid_depths: tuple[float, ...] = tuple(i / 10 for i in range(11))
    """Depths of the grid: shares of the filler that precede the key."""
    seed: int = 0
    """Random seed of the keys."""
    figure: str = ""
    """Also plot the grid, or success against k if there is no grid, to this PNG file."""


def _check(args: Passkey) -> None:
    for name in ("distances", "trials"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if not args.grid_depths or not all(0 <= depth <= 1 for depth in args.grid_depths):
        raise InputError(f"--grid-depths is {args.grid_depths}: depths must be between 0 and 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}: it must be 0 or more")
    atomic.require_writable(args.figure)
    if args.figure:
        plotting.new_figure(1, 1, 1)  # fail early if matplotlib is not installed


def passkey(args: Passkey) -> dict[str, Any]:
    """Runs the command and returns its result."""
    _check(args)
    loaded = LoadedModel.for_evaluation(args)
    tokenizer, config = loaded.tokenizer, loaded.config
    lengths = args.lengths
    if not lengths and not args.grid_lengths:
        lengths = (config.max_position_embeddings,)
    require_room(tokenizer, config.vocab_size, (*lengths, *args.grid_lengths), "length")
    generator = loaded.generator(max((*lengths, *args.grid_lengths)))
    results = [
        measure_distances(generator, tokenizer, n, args.distances, args.trials, args.seed, args.batch_tokens)
        for n in lengths
    ]
    grid = None
    if args.grid_lengths:
        grid = measure_grid(
            generator, tokenizer, args.grid_lengths, args.grid_depths, args.trials, args.seed, args.batch_tokens
        )
    report = result.report(
        "passkey",
        args.model,
        config,
        protocol={
            "prompt": "Chen et al. 2023, Figure 3",
            **({"distances": args.distances} if results else {}),
            "trials": args.trials,
            "new_tokens": NEW_TOKENS,
            "decoding": "greedy",
            "seed": args.seed,
            "dtype": args.dtype,
        },
        results=results,
        grid=grid,
    )
    log.info(f"{args.model}: {config.rope}, {args.trials} trials, {args.dtype}")
    log.info(table(report))
    if args.figure and jax.process_index() == 0:
        plot(args.figure, report)
    result.write(args.output, report)
    return report


def table(report: dict[str, Any]) -> str:
    """Formats a result as text."""
    lines = []
    for r in report["results"]:
        lines.append(
            f"window {r['length']}: k_max {r['k_max']} (20% of trials), {r['k_max_strict']} (all trials); found in "
            f"{r['success']:.0%} of all trials"
        )
        lines.append("  k        " + "".join(f"{row['k']:>7}" for row in r["by_distance"]))
        lines.append("  found, % " + "".join(f"{100 * row['success']:7.0f}" for row in r["by_distance"]))
    if grid := report["grid"]:
        lines.append("found, %, by depth of the key (down) and length (across)")
        lines.append("        " + "".join(f"{n:>8}" for n in grid["lengths"]))
        for depth, row in zip(grid["depths"], grid["success"], strict=True):
            lines.append(f"  {depth:5.0%} " + "".join(f"{100 * x:8.0f}" for x in row))
    return "\n".join(lines)


def plot(path: str, report: dict[str, Any]) -> None:
    """Plots the grid as a heat map, or success against k if there is no grid."""
    grid = report["grid"]
    figure, (axes,) = plotting.new_figure(8, 4.8, 1)
    if grid:
        columns, rows = len(grid["lengths"]), len(grid["depths"])
        image = axes.imshow(100 * np.array(grid["success"]), cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(columns), [f"{n:,}" for n in grid["lengths"]])
        axes.set_yticks(range(rows), [f"{d:.0%}" for d in grid["depths"]])
        for i, row in enumerate(grid["success"]):
            for j, value in enumerate(row):
                axes.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value < 0.6 else "black",
                )
        figure.colorbar(image, ax=axes, label="key found (% of trials)")
        axes.set(xlabel="length of input and answer (tokens)", ylabel="depth of the key (share of the text before it)")
    else:
        for r in report["results"]:
            ks, rates = zip(*((row["k"], 100 * row["success"]) for row in r["by_distance"]), strict=True)
            axes.plot(ks, rates, "o-", ms=4, label=f"window {r['length']:,}: k_max {r['k_max']:,}")
        axes.axhline(20, color="0.5", ls="--", lw=1, label="20%")
        axes.set(xlabel="k: tokens from the key to the end", ylabel="key found (% of trials)", ylim=(-4, 104))
        axes.grid(alpha=0.3)
        axes.legend()
    trials = report["protocol"]["trials"]
    axes.set_title(
        f"Passkey, {report['model']}, {report['rope']}, window {report['model_window']:,}, {trials} trials", fontsize=10
    )
    with atomic.new_file(path) as file:
        figure.savefig(file, dpi=130, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: passkey(tyro.cli(Passkey, prog="python -m pi_jax.evaluate passkey", args=argv)))
