"""Sliding-window perplexity, ours against PyTorch and transformers: the same numbers, and how fast.

    python benchmarks/evaluate.py perplexity --model smollm2/model --data TEXTS --output benchmarks/results/NAME.json

The other side is `tests/transformers_perplexity.py`, which shares no code with pi_jax and, like pi_jax, computes only
the logits of scored tokens. Both run in separate processes and alternate. The comparison uses the fastest window of
each that scores `stride` tokens, because other load on the machine only slows things down; the CPU time of the process
is reported as well. Exits with status 1 if the perplexities differ by more than 0.1 %.
"""

import dataclasses
import datetime
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sliding-window perplexity: agreement and tokens per second, ours against transformers, in one run."""

    model: str
    """Hugging Face folder."""
    data: tuple[str, ...]
    """Text files."""
    windows: tuple[int, ...] = (512, 2048)
    """Window sizes in tokens."""
    stride: int = 256
    """Tokens that a window advances."""
    max_tokens: int = 4096
    """Documents are cut to this many tokens."""
    turns: int = 2
    """Turns of each side."""
    threads: int = 0
    """Of torch; 0: its default."""
    batch_tokens: int = 8192
    """Of ours: short windows are read several at a time."""
    output: str = ""
    """JSON file for the result."""
    side: int = 0
    """For the worker processes: a window of ours."""


def _ours(args: Perplexity) -> dict:
    import jax

    from pi_jax.config import ComputeConfig, MeshConfig
    from pi_jax.convert.open import open_model
    from pi_jax.evaluate.perplexity import command, sliding
    from pi_jax.parallel import sharding

    names, documents = command.read_tokens(args.data, args.model, 10**9, args.max_tokens)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        model = open_model(args.model).load(ComputeConfig("float32", "float32", "none"), mesh)
        plan = sliding.plan_windows([len(d) for d in documents], args.side, args.stride)
        times, later, ahead = [_clocks()], [], iter(plan)
        sliding.BATCH_TOKENS = args.batch_tokens

        def advance(done: int) -> None:
            times.append(_clocks())
            batch = list(itertools.islice(ahead, done))
            if batch and all(w.stop - w.first == args.stride for w in batch):
                later.append((times[-1] - times[-2]) / done)

        losses = sliding.score_documents(model, documents, args.side, args.stride, mesh, advance=advance)
    found = command.summarize(losses, names, [], plan)
    kept = {name: found[name] for name in ("tokens", "windows", "perplexity", "window_mean_perplexity")}
    wall, cpu = np.array(later).T.tolist()
    return {**kept, "seconds_a_window": wall, "cpu_seconds_a_window": cpu, "jax": jax.__version__}


def _clocks() -> np.ndarray:
    """Seconds passed, and seconds of all threads of this process, which other processes hardly change."""
    return np.array([time.perf_counter(), time.process_time()])


def _run(command: list[str]) -> dict:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Perplexity) -> None:
    """Runs both sides in turns; prints and writes the differences and the ratios."""
    if args.side:
        print(json.dumps(_ours(args)))
        return
    from train_step import _cpu

    results, worst = [], 0.0
    for window in args.windows:
        theirs = ["tests/transformers_perplexity.py", "--model", args.model, "--data", *args.data]
        theirs += ["--window", str(window), "--stride", str(args.stride), "--max-tokens", str(args.max_tokens)]
        theirs += ["--threads", str(args.threads)] if args.threads else []
        runs = {"ours": [], "theirs": []}
        for _ in range(args.turns):
            runs["ours"].append(_run([*sys.argv, "--side", str(window)]))
            runs["theirs"].append(_run(theirs))
        fastest, cpu = (
            {side: min(min(r[name]) for r in turns) for side, turns in runs.items()}
            for name in ("seconds_a_window", "cpu_seconds_a_window")
        )
        ours, other = (turns[0] for turns in runs.values())
        differences = {n: abs(ours[n] / other[n] - 1) for n in ("perplexity", "window_mean_perplexity")}
        worst = max(worst, *differences.values())
        results.append(
            {
                "window": window,
                "tokens_scored": {"ours": ours["tokens"], "theirs": other["tokens"]},
                "perplexity": {"ours": ours["perplexity"], "theirs": other["perplexity"]},
                "relative_difference": differences,
                "tokens_read_per_second": {side: round(window / seconds, 1) for side, seconds in fastest.items()},
                "ratio": round(fastest["theirs"] / fastest["ours"], 3),
                "tokens_read_per_cpu_second": {side: round(window / seconds, 1) for side, seconds in cpu.items()},
                "cpu_ratio": round(cpu["theirs"] / cpu["ours"], 3),
                "runs": runs,
            }
        )
        print(json.dumps({k: v for k, v in results[-1].items() if k != "runs"}), flush=True)
    report = {
        "benchmark": "sliding_perplexity",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}",
        "command": "python " + " ".join(sys.argv),
        "results": results,
    }
    if args.output:
        from pi_jax.atomic import write_json

        write_json(args.output, report)
    if worst > 1e-3:
        sys.exit(f"error: the perplexities differ by {worst:.2%}: more than 0.1 %")


if __name__ == "__main__":
    main(tyro.cli(Perplexity))
