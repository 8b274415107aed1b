"""Logits of an exported folder in transformers against those of the run it came from, far beyond the base window.

    python benchmarks/export_parity.py --source runs/smollm2-16k --export smollm2-16k-hf \
        --text smollm2/text/test/moby_dick.txt --output benchmarks/results/NAME.json

Both read the same text, in float32, in one pass; the logits of the last tokens are compared. Exits with status 1 if
they differ by more than the tolerance, or if the control (the same folder with its scaling taken out) does not differ.
"""

import dataclasses
import datetime
import json
import pathlib
import sys

import jax
import numpy as np
import tyro

from pi_jax import atomic, cli
from pi_jax.config import ComputeConfig, MeshConfig
from pi_jax.convert.open import open_model
from pi_jax.evaluate.perplexity.command import read_tokens
from pi_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare an export with its source at far positions."""

    source: str
    """Folder of the run."""
    export: str
    """Hugging Face folder made of it."""
    text: str
    """A text of at least `length` tokens."""
    length: int = 12064
    """Tokens read."""
    compared: int = 64
    """Last tokens whose logits are compared."""
    tolerance: float = 1e-3
    """Largest difference allowed."""
    output: str = ""
    """JSON file for the result."""


def main(args: Parity) -> None:
    """Computes both and compares."""
    import torch
    import transformers

    source = open_model(args.source)
    _, (tokens,) = read_tokens([args.text], source.files, source.config.vocab_size, args.length)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = source.load(ComputeConfig(dtype="float32", remat="none"), mesh)

        @jax.jit
        def last_logits(model, ids, positions):
            return model.logits(model(ids, positions)[:, -args.compared :])

        ids = tokens.astype(np.int32)[None]
        ours = np.asarray(last_logits(model, ids, np.arange(len(tokens), dtype=np.int32)[None]))[0]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.export, dtype=torch.float32).eval()

    def their_logits(model) -> np.ndarray:
        with torch.no_grad():
            ids = torch.tensor(tokens.astype(np.int64))[None]
            return model(ids, use_cache=False, logits_to_keep=args.compared).logits[0].numpy()

    difference = float(np.abs(ours - their_logits(theirs)).max())
    scaled = json.loads((pathlib.Path(args.export) / "config.json").read_text())
    unscaled = transformers.LlamaConfig(**(scaled | {"rope_scaling": None}))
    control = transformers.LlamaForCausalLM(unscaled)
    control.load_state_dict(theirs.state_dict())
    control_difference = float(np.abs(ours - their_logits(control.eval())).max())
    report = {
        "benchmark": "export_parity",
        "date": datetime.date.today().isoformat(),
        "class": type(theirs).__name__,
        "positions": [args.length - args.compared, args.length - 1],
        "largest_difference": difference,
        "largest_difference_without_scaling": control_difference,
        "largest_logit": float(np.abs(ours).max()),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__, "jax": jax.__version__},
    }
    print(json.dumps(report, indent=2))
    if args.output:
        atomic.write_json(args.output, report)
    if difference > args.tolerance or control_difference < 10 * args.tolerance:
        sys.exit(f"error: differs by {difference} (allowed {args.tolerance}); control by {control_difference}")


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(Parity)))
