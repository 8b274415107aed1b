"""Perplexity as YaRN, EasyContext, PoSE and LongLoRA define it: ours and that of loops over PyTorch and transformers.

    python benchmarks/perplexity_parity.py --model smollm2/model --data TEXTS --output FILE.json

The loops are in `tests/transformers_perplexity.py`, which shares no code with pi_jax. For LongLoRA's, no option of
`pi_jax.evaluate perplexity` scores a token more than once: its windows are passed as documents. Exits with status 1 if
two differ by more than 1e-4 of their value.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare perplexities with those of other repositories' protocols."""

    model: str
    """Hugging Face folder."""
    data: tuple[str, ...]
    """Text files."""
    window: int = 1024
    """Window in tokens."""
    stride: int = 256
    """Tokens that a window advances."""
    max_tokens: int = 2048
    """Documents are cut to this many tokens."""
    output: str = ""
    """JSON file for the result."""


def _by_command(args: Parity, max_tokens: int) -> dict:
    """`pi_jax.evaluate perplexity` with BOS before every window."""
    from pi_jax.evaluate.perplexity.command import Perplexity, perplexity

    common = {"windows": (args.window,), "stride": args.stride, "bos": "window"}
    return perplexity(Perplexity(model=args.model, data=args.data, max_tokens=max_tokens, **common))["results"][0]


def _by_windows(args: Parity) -> tuple[dict, dict]:
    """LongLoRA's windows over the joined documents, and disjoint windows over the same tokens."""
    from pi_jax.evaluate.loaded import LoadedModel
    from pi_jax.evaluate.perplexity.command import evaluate_model, read_tokens

    loaded = LoadedModel.open(args.model)
    _, documents = read_tokens(args.data, args.model, loaded.config.vocab_size, args.max_tokens)
    stream = np.concatenate(documents)
    starts = range(0, len(stream) - args.window, args.stride)[:-1]
    windows = [stream[i : i + args.window] for i in starts]
    found = []
    for texts in (windows, [stream]):
        with loaded.computing() as model:
            names = [str(i) for i in range(len(texts))]
            found += evaluate_model(model, loaded.mesh, names, texts, (args.window,), args.window)
    return found[0], found[1]


def _loops(args: Parity, *options: str) -> dict:
    words = [sys.executable, "tests/transformers_perplexity.py", "--model", args.model, "--data", *args.data]
    words += ["--window", str(args.window), "--stride", str(args.stride), *options]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Parity) -> None:
    """Computes each quantity twice; prints and writes both and their difference."""
    from train_step import _cpu

    from pi_jax.atomic import write_json

    ours, theirs = _by_command(args, args.max_tokens), _loops(args, "--bos", "--max-tokens", str(args.max_tokens))
    cut = args.window - 1
    ours_cut, theirs_cut = _by_command(args, cut), _loops(args, "--bos", "--max-tokens", str(cut))
    ours_stream, disjoint = _by_windows(args)
    theirs_stream = _loops(args, "--stream", "--max-tokens", str(args.max_tokens))
    mean = "window_mean_perplexity"
    pairs = {
        "YaRN, EasyContext": (ours[mean], theirs[mean]),
        "PoSE": (ours["perplexity"], theirs["perplexity"]),
        "YaRN, EasyContext, --truncate": (ours_cut[mean], theirs_cut[mean]),
        "LongLoRA": (ours_stream[mean], theirs_stream[mean]),
    }
    results = [
        {"protocol": name, "ours": a, "theirs": b, "relative_difference": abs(a / b - 1)}
        for name, (a, b) in pairs.items()
    ]
    report = {
        "benchmark": "perplexity_parity",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}",
        "command": "python " + " ".join(sys.argv),
        "results": results,
        "windows": {"sliding": ours["windows"], "LongLoRA": theirs_stream["windows"], "disjoint": disjoint["windows"]},
        "disjoint_windows_of_the_joined_documents": disjoint["perplexity"],
        "versions": {name: theirs[name] for name in ("torch", "transformers")},
    }
    print(json.dumps(report, indent=2))
    if args.output:
        write_json(args.output, report)
    if max(r["relative_difference"] for r in results) > 1e-4:
        sys.exit("error: two perplexities differ by more than 1e-4 of their value")


if __name__ == "__main__":
    main(tyro.cli(Parity))
