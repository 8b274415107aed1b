"""Logits of a real model in pi_jax and in transformers: as imported, and as exported with its window doubled.

    python benchmarks/convert_parity.py --model smollm2/model --text smollm2/text/test/moby_dick.txt \
        --output benchmarks/results/NAME.json

The import is compared on the first tokens of a real text. The export (`linear`, factor 2) is compared on tokens whose
second half has positions from 12,000: beyond the base window, and far from the first half, to which it attends.
Float32, all layers, all logits. Exits with status 1 if they differ by more than the tolerance, or if the control (the
same positions, unscaled) does not differ. `export_parity.py` reads 12,000 real tokens instead.
"""

import dataclasses
import datetime
import json
import sys
import tempfile

import jax
import numpy as np
import tyro

from pi_jax import atomic, cli
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig
from pi_jax.convert.__main__ import Convert, convert
from pi_jax.convert.open import open_model
from pi_jax.evaluate.perplexity.command import read_tokens
from pi_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare a model in and out."""

    model: str
    """Hugging Face folder."""
    text: str
    """A text file."""
    length: int = 512
    """Tokens read."""
    far: int = 12000
    """Position of the first token of the second half."""
    tolerance: float = 1e-3
    """Largest difference allowed."""
    output: str = ""
    """JSON file for the result."""


def ours(folder: str, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits by pi_jax."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        model = open_model(folder).load(ComputeConfig(dtype="float32", remat="none"), mesh)
        run = jax.jit(lambda model, tokens, positions: model.logits(model(tokens, positions)))
        return np.asarray(run(model, tokens[None].astype(np.int32), positions[None].astype(np.int32)))[0]


def theirs(folder: str, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():  # with a mask, or it takes jumping positions for packed documents
        return model(
            torch.from_numpy(tokens.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[None],
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            use_cache=False,
        ).logits[0].numpy()  # fmt: skip


def main(args: Parity) -> None:
    """Computes and compares."""
    import transformers

    config = open_model(args.model).config
    _, (tokens,) = read_tokens([args.text], args.model, config.vocab_size, args.length)
    near = np.arange(len(tokens))
    far = np.where(near < len(tokens) // 2, near, near - len(tokens) // 2 + args.far)
    with tempfile.TemporaryDirectory() as folder:
        convert(Convert(args.model, f"{folder}/long", rope=RopeConfig("linear", 2.0)))
        expected = theirs(args.model, tokens, near)
        imported = float(np.abs(ours(args.model, tokens, near) - expected).max())
        found = ours(f"{folder}/long", tokens, far)
        exported = float(np.abs(found - theirs(f"{folder}/long", tokens, far)).max())
        control = float(np.abs(found - theirs(args.model, tokens, far)).max())
    report = {
        "benchmark": "convert_parity",
        "date": datetime.date.today().isoformat(),
        "tokens": len(tokens),
        "imported, largest difference": imported,
        "exported with linear factor 2, largest difference": exported,
        "positions of the export": [int(far[0]), int(far[-1])],
        "control, unscaled": control,
        "largest logit": float(np.abs(expected).max()),
        "versions": {"transformers": transformers.__version__, "jax": jax.__version__},
    }
    print(json.dumps(report, indent=2))
    if args.output:
        atomic.write_json(args.output, report)
    if max(imported, exported) > args.tolerance or control < 10 * args.tolerance:
        sys.exit(f"error: differs by {imported} and {exported} (allowed {args.tolerance}); control by {control}")


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(Parity)))
