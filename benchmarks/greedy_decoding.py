"""Greedy decoding against transformers' `generate`: the same weights, prompts and number of tokens, in one run.

The two sides run in separate processes and alternate, so that other load on the machine affects both. The result of a
side is its fastest call, including prefill, after one untimed call (compilation). Both must produce the same tokens, so
that a fast but wrong answer does not count.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

PROMPTS = (
    "Once upon a time, in a small village by the sea, there lived",
    "The capital of France is",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of",
    "def fibonacci(n):\n    ",
)


@dataclasses.dataclass(frozen=True)
class Decode:
    """New tokens per second, ours against transformers, float32, greedy."""

    model: str
    """Hugging Face folder."""
    batches: tuple[int, ...] = (1, 4)
    """Prompts side by side."""
    new_tokens: int = 128
    """Of each prompt."""
    calls: int = 3
    """Timed calls in a turn."""
    turns: int = 2
    """Turns of each side."""
    threads: int = 0
    """Of torch; 0: all cores."""
    output: str = ""
    """JSON file for the result."""
    side: str = ""
    """For the worker processes."""


def ours(args: Decode, batch: int) -> Callable[[], list[list[int]]]:
    """A call that generates, with our code."""
    import jax

    from pi_jax.config import ComputeConfig, MeshConfig
    from pi_jax.convert.open import open_model
    from pi_jax.data.tokenizer import load_tokenizer
    from pi_jax.generate import Generator
    from pi_jax.parallel import sharding

    tokenizer = load_tokenizer(args.model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:batch]]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = open_model(args.model).load(ComputeConfig(dtype="float32", remat="none"), mesh)
    generator = Generator(model, mesh, max_length=1024)
    return lambda: generator(prompts, args.new_tokens)


def theirs(args: Decode, batch: int) -> Callable[[], list[list[int]]]:
    """The same with transformers."""
    import torch
    import transformers

    torch.set_num_threads(args.threads or os.cpu_count())
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:batch]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"attention_mask": mask, "max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **settings)[:, width:].tolist()


def main(args: Decode) -> None:
    """Runs both sides in turns and prints the ratio."""
    if args.side:
        made = {"ours": ours, "theirs": theirs}[args.side]
        print(json.dumps({batch: _time(made(args, batch), args.calls) for batch in args.batches}))
        return
    turns: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(args.turns):
        for side, done in turns.items():
            command = [sys.executable, sys.argv[0], "decode", *sys.argv[2:], "--side", side]
            worker = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            done.append(json.loads(worker.stdout.splitlines()[-1]))
            print(f"{side}: { ({k: [round(s, 2) for s in v['seconds']] for k, v in done[-1].items()}) }", flush=True)
    results = []
    for batch in map(str, args.batches):
        tokens = {side: done[0][batch]["tokens"] for side, done in turns.items()}
        if tokens["ours"] != tokens["theirs"]:
            sys.exit(f"error: with {batch} prompts the tokens differ: the two sides do not compute the same thing")
        speed = {
            side: int(batch) * args.new_tokens / min(s for t in done for s in t[batch]["seconds"])
            for side, done in turns.items()
        }
        seconds = {side: [t[batch]["seconds"] for t in done] for side, done in turns.items()}
        ratio = round(speed["ours"] / speed["theirs"], 3)
        speed = {side: round(s, 1) for side, s in speed.items()}
        results.append({"prompts": int(batch), "tokens_per_second": speed, "ratio": ratio, "seconds": seconds})
        print(f"{batch} prompts: ours {speed['ours']} tok/s, transformers {speed['theirs']} tok/s: ratio {ratio}")
    if args.output:
        from pi_jax.atomic import write_json

        write_json(args.output, _about() | {"new_tokens": args.new_tokens, "results": results})


def _time(call: Callable[[], list[list[int]]], calls: int) -> dict:
    tokens, seconds = call(), []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"tokens": tokens, "seconds": seconds}


def _about() -> dict:
    import jax
    import torch
    import transformers

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "benchmark": "decode",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {names[0] if names else 'unknown'}",
        "command": "python benchmarks/evaluate.py " + " ".join(sys.argv[1:]),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32",
    }
