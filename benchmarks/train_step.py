"""Training speed against a plain transformers + torch loop: the same model, text, batch, optimizer and precision.

    python benchmarks/train_step.py --model demo/model --text demo/text/train --output benchmarks/results/NAME.json

One run measures both: each side does its steps in a process of its own, in turns (ours, theirs, ours, ...), so that
neither has the machine when it is quiet and the other when it is not. A side's figure is its fastest step: on a machine
with other work the mean says more about that work. The first losses of both are compared, so that a fast wrong answer
does not count.
"""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Tokens per second of a training step, ours against a plain torch loop, in one run."""

    model: str
    """Hugging Face folder."""
    text: str
    """Text files or a folder of them."""
    window: int = 2048
    """Tokens in a step, one row."""
    steps: int = 3
    """Timed steps in a turn, after one that is not."""
    turns: int = 2
    """Turns of each side."""
    threads: int = 0
    """Of torch; 0: all cores."""
    remat: str = "none"
    """Ours: 'none', as theirs, or 'layer'."""
    output: str = ""
    """JSON file for the result."""
    side: str = ""
    """For the worker processes."""


def _tokens(args: Benchmark) -> np.ndarray:
    from pi_jax.evaluate.perplexity import read_tokens

    _, documents = read_tokens([args.text], args.model, 10**9, args.window + 1)
    return next(d for d in documents if len(d) == args.window + 1).astype(np.int32)


def ours(args: Benchmark) -> dict:
    import jax

    from pi_jax import sharding
    from pi_jax.config import ComputeConfig, MeshConfig, OptimizerConfig
    from pi_jax.convert.sources import open_model
    from pi_jax.optimizer import make_optimizer
    from pi_jax.step import first_state, make_step

    tokens = _tokens(args)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    ones = np.ones((1, args.window))
    batch = {
        "tokens": tokens[None, :-1],
        "targets": tokens[None, 1:],
        "positions": np.arange(args.window, dtype=np.int32)[None],
        "segment_ids": ones.astype(np.int32),
        "loss_weights": ones.astype(np.float32),
    }
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-5, warmup_steps=0), 100)
    with jax.set_mesh(mesh):
        compute = ComputeConfig(dtype="float32", remat=args.remat, loss_chunk=1024)
        state = first_state(open_model(args.model).load(compute, mesh), optimizer)
        update = make_step(optimizer)

        def one():
            nonlocal state
            state, values = update(state, sharding.put_batch(mesh, batch))
            return float(values["loss"])

        return _time(one, args.steps) | {"jax": jax.__version__}


def theirs(args: Benchmark) -> dict:
    import torch
    import transformers

    torch.set_num_threads(args.threads or os.cpu_count())
    tokens = torch.tensor(_tokens(args)[None], dtype=torch.long)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def one():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return _time(one, args.steps) | {"torch": torch.__version__, "transformers": transformers.__version__}


def _time(step, steps: int) -> dict:
    import resource

    losses, seconds = [step()], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"losses": losses, "seconds": seconds, "peak_gib": round(peak, 2)}


def main(args: Benchmark) -> None:
    """Runs both sides in turns and prints the ratio."""
    if args.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[args.side](args)))
        return
    results = {"ours": [], "theirs": []}
    for _ in range(args.turns):
        for side, turns in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {[round(s, 2) for s in turns[-1]['seconds']]} s a step", flush=True)
    first = {side: turns[0]["losses"][0] for side, turns in results.items()}
    if abs(first["ours"] - first["theirs"]) > 1e-3:
        sys.exit(f"error: the first losses differ, {first}: the two sides do not compute the same thing")
    best = {side: min(s for t in turns for s in t["seconds"]) for side, turns in results.items()}
    speed = {side: args.window / seconds for side, seconds in best.items()}
    report = {
        "benchmark": "train_step",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}",
        "command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:]),
        "window": args.window,
        "remat": args.remat,
        "tokens_per_second": {side: round(s, 1) for side, s in speed.items()},
        "ratio": round(speed["ours"] / speed["theirs"], 3),
        "runs": results,
    }
    print(f"ours {speed['ours']:.1f} tok/s, torch {speed['theirs']:.1f} tok/s: ratio {report['ratio']}")
    if args.output:
        from pi_jax.cli import write_json

        write_json(args.output, report)


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
