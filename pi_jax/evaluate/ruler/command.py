"""Runs RULER (Hsieh et al. 2024), which measures the effective length of a model with the tasks in `tasks`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from pi_jax import atomic, cli, log
from pi_jax.errors import InputError
from pi_jax.evaluate import result
from pi_jax.evaluate.loaded import AnswerOptions, LoadedModel, answer
from pi_jax.evaluate.ruler.tasks import TASKS, THRESHOLD, Setup, make_samples, require_room, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ruler(AnswerOptions):
    """Evaluate a model on the synthetic RULER tasks that need no download."""

    lengths: tuple[int, ...] = (4096, 8192)
    """Lengths in tokens of a prompt and its answer together."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; empty: all tasks, without those that need essays if no essays are given."""
    samples: int = 100
    """Number of prompts per task and length; published results use 500."""
    essays: tuple[str, ...] = ()
    """Text files, folders or globs with the haystack of the tasks that hide needles in essays."""
    seed: int = 0
    """Random seed of the prompts."""


def _check(args: Ruler) -> None:
    if args.samples < 1:
        raise InputError(f"--samples is {args.samples}: it must be at least 1")
    for name in args.tasks:
        if name not in TASKS:
            raise InputError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
        if TASKS[name].essays and not args.essays:
            raise InputError(f"task {name} hides its needles in essays: pass text files with --essays")
    atomic.require_writable(args.output)  # before the essays are read


def ruler(args: Ruler) -> dict[str, Any]:
    """Runs the command and returns its result."""
    _check(args)
    essays = _read(args.essays)
    tasks = args.tasks or tuple(name for name, task in TASKS.items() if essays or not task.essays)
    lengths = sorted(set(args.lengths))
    loaded = LoadedModel.for_evaluation(args)
    tokenizer, config = loaded.tokenizer, loaded.config
    setups = {n: Setup(n, loaded.encode_prompt, essays) for n in lengths}
    for length in lengths:
        for task in tasks:
            require_room(task, setups[length], args.seed)
    generator = loaded.generator(lengths[-1])
    results, shown = [], []
    for length in lengths:
        scores = {}
        for task in tasks:
            made = make_samples(task, args.samples, setups[length], args.seed)
            texts = answer(
                generator,
                tokenizer,
                [tokens for tokens, _ in made],
                TASKS[task].new_tokens,
                batch_tokens=args.batch_tokens,
                what=f"{task} {length}",
            )
            scores[task] = float(np.mean([score(t, s.answers) for t, (_, s) in zip(texts, made, strict=True)]))
            shown.append({"length": length, "task": task, "answer": texts[0], "right": list(made[0][1].answers)})
        results.append({"length": length, "average": float(np.mean(list(scores.values()))), "tasks": scores})
    report = result.report(
        "ruler",
        args.model,
        config,
        protocol={
            "tasks": list(tasks),
            "prompts": "NVIDIA, May 2025",
            "samples": args.samples,
            "decoding": "greedy",
            "threshold": THRESHOLD,
            "essays": list(args.essays),
            "seed": args.seed,
            "dtype": args.dtype,
        },
        effective_length=result.effective_length(
            [r["length"] for r in results], [r["average"] for r in results], THRESHOLD
        ),
        results=results,
        first_answers=shown,
    )
    log.info(f"{args.model}: {config.rope}, {args.samples} samples per task and length, {args.dtype}; score, 0 to 100")
    log.info(table(report))
    result.write(args.output, report)
    return report


def table(report: dict[str, Any]) -> str:
    """Formats a result as a table with one row per task and one column per length."""
    results = report["results"]
    rows = [[name, *(f"{r['tasks'][name]:.1f}" for r in results)] for name in results[0]["tasks"]]
    rows.append(["average", *(f"{r['average']:.1f}" for r in results)])
    head = ["task", *(str(r["length"]) for r in results)]
    summary = f"effective length (average of at least {THRESHOLD}): {report['effective_length']}"
    return f"{result.table([head, *rows], left=1)}\n{summary}"


def _read(paths: Sequence[str]) -> str:
    from pi_jax.data import documents

    if not paths:
        return ""
    text = " ".join(d.text for d in documents.read_documents(paths, "text"))
    if not text.split():
        raise InputError(f"--essays {', '.join(paths)} contains no text")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: ruler(tyro.cli(Ruler, prog="python -m pi_jax.evaluate ruler", args=argv)))
