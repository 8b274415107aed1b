"""Training speed against a plain transformers + torch loop: the same model, text, batch, optimizer and precision.

    python benchmarks/train_step.py --model smollm2/model --text smollm2/text/train \\
        --output benchmarks/results/NAME.json
    python benchmarks/train_step.py --shape 7b --layers 4 --window 32768 --dtype bfloat16 --remat layer --compile \\
        --output benchmarks/results/NAME.json

The second form is for a GPU: random weights of a published model's shape, with as many layers as fit. With bfloat16
both sides keep float32 master weights. MFU uses the formula of `pi_jax.train.metrics` for both sides.

One run measures both sides: they run their steps in separate processes and alternate (ours, theirs, ours, ...), so that
other load on the machine affects both. The result of a side is its fastest step, because the mean would mostly reflect
that load. The first losses are compared, so that a fast but wrong answer does not count.
"""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Literal

import numpy as np
import tyro

from pi_jax.parallel import chips, placement


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Tokens per second of a training step, ours against a plain torch loop, in one run."""

    model: str = ""
    """Hugging Face folder."""
    text: str = ""
    """Text files or a folder of them; empty: random tokens."""
    shape: Literal["", "7b", "13b", "llama-3-8b"] = ""
    """Instead of a model: random weights of this shape."""
    layers: int = 4
    """Of `shape`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and products."""
    compile: bool = False
    """Theirs: by torch.compile."""
    window: int = 2048
    """Tokens per step, one sequence."""
    steps: int = 3
    """Timed steps in a turn, after one that is not."""
    turns: int = 2
    """Turns of each side."""
    threads: int = 0
    """Of torch; 0: all cores."""
    remat: str = "none"
    """'none', or 'layer': theirs with gradient checkpointing, too."""
    output: str = ""
    """JSON file for the result."""
    side: str = ""
    """For the worker processes."""


def _tokens(args: Benchmark) -> np.ndarray:
    if not args.text:
        return np.random.default_rng(0).integers(0, 32000, args.window + 1, np.int32)
    from pi_jax.evaluate.perplexity.command import read_tokens

    _, documents = read_tokens([args.text], args.model, 10**9, args.window + 1)
    return next(d for d in documents if len(d) == args.window + 1).astype(np.int32)


def ours(args: Benchmark) -> dict:
    import jax

    from pi_jax.config import ComputeConfig, MeshConfig, OptimizerConfig
    from pi_jax.convert.open import open_model
    from pi_jax.parallel import sharding
    from pi_jax.train.optimizer import make_optimizer
    from pi_jax.train.step import init_train_state, make_step

    tokens = _tokens(args)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    ones = np.ones((1, args.window))
    batch = {
        "tokens": tokens[None, :-1],
        "targets": tokens[None, 1:],
        "positions": np.arange(args.window, dtype=np.int32)[None],
        "loss_weights": ones.astype(np.float32),
    }
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-5, warmup_steps=0), 100)
    with jax.set_mesh(mesh):
        compute = ComputeConfig(dtype=args.dtype, remat=args.remat, loss_chunk=1024)
        state = init_train_state(open_model(args.model).load(compute, mesh), optimizer)
        update = make_step(optimizer)

        def one():
            nonlocal state
            state, values = update(state, placement.put_batch(mesh, batch))
            return float(values["loss"])

        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        facts = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "device_peak_bytes": peak}
        return _time(one, args.steps) | facts


def theirs(args: Benchmark) -> dict:
    import torch
    import transformers

    torch.set_num_threads(args.threads or os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.tensor(_tokens(args)[None], dtype=torch.long, device=device)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train().to(device)
    if args.remat == "layer":
        model.gradient_checkpointing_enable()
    if args.compile:
        model.compile()
    low = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def one():
        with low:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    facts = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"attention": model.config._attn_implementation}
    return _time(one, args.steps) | facts


def _random_model(args: Benchmark, folder: str) -> None:
    """Writes float32 weights of a shape, for both sides."""
    import torch
    import transformers

    from pi_jax.config.recipes import MODELS
    from pi_jax.convert.formats import hf

    model = dataclasses.replace(MODELS[args.shape], num_hidden_layers=args.layers)
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_dict(hf.config_dict(model, "float32"))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


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
    elif args.shape:
        with tempfile.TemporaryDirectory() as folder:
            _random_model(args, folder)
            compare(dataclasses.replace(args, model=folder), "--model", folder)
    elif args.model:
        compare(args)
    else:
        sys.exit("error: neither --model nor --shape is given: say what to train")


def compare(args: Benchmark, *more: str) -> None:
    """Runs both sides in turn; `more`: additional arguments."""
    from pi_jax.convert.open import open_model
    from pi_jax.train import metrics

    results = {"ours": [], "theirs": []}
    for _ in range(args.turns):
        for side, turns in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], *more, "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {[round(s, 2) for s in turns[-1]['seconds']]} s a step", flush=True)
    first = {side: turns[0]["losses"][0] for side, turns in results.items()}
    if abs(first["ours"] - first["theirs"]) > (1e-3 if args.dtype == "float32" else 5e-2):
        sys.exit(f"error: the first losses differ, {first}: the two sides do not compute the same thing")
    best = {side: min(s for t in turns for s in t["seconds"]) for side, turns in results.items()}
    speed = {side: args.window / seconds for side, seconds in best.items()}
    flops = metrics.flops_per_token(open_model(args.model).config, args.window)
    device = results["ours"][0]["device"]
    peak = chips.peak_tflops(device) * 1e12 or None
    report = {
        "benchmark": "train_step",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}",
        "command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:]),
        "device": device,
        "shape": f"{args.layers} layers of {args.shape}" if args.shape else args.model,
        "window": args.window,
        "dtype": args.dtype,
        "remat": args.remat,
        "tokens_per_second": {side: round(s, 1) for side, s in speed.items()},
        "ratio": round(speed["ours"] / speed["theirs"], 3),
        "model FLOPs of a token = 6 P + 6 L N H S": flops,
        "tflops_per_second": {side: round(s * flops / 1e12, 3) for side, s in speed.items()},
        "mfu": {side: round(s * flops / peak, 4) for side, s in speed.items()} if peak else None,
        "runs": results,
    }
    print(f"ours {speed['ours']:.1f} tok/s, torch {speed['theirs']:.1f} tok/s: ratio {report['ratio']}")
    print(f"TFLOP/s, (6 P + 6 L N H S) a token: {report['tflops_per_second']}; MFU {report['mfu'] or 'not known here'}")
    if args.output:
        from pi_jax.atomic import write_json

        write_json(args.output, report)


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
