"""Greedy generation of a real model against transformers, token by token: an independent check, run by hand.

    python tests/transformers_generation.py --model smollm2/model

Five prompts alone and a ragged batch of four, 64 tokens each in float32, plain and interpolated by 2 without tuning;
and the logits of every step against one pass over the whole text without a cache.
"""

import dataclasses

import jax
import numpy as np
import tyro

from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig
from pi_jax.convert.open import open_model
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.generate import Generator
from pi_jax.generate import generator as implementation
from pi_jax.parallel import placement, sharding

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "Q: What is the boiling point of water at sea level?\nA:",
    "def fibonacci(n):\n    ",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of",
)
NEW = 64


@dataclasses.dataclass(frozen=True)
class Check:
    """Compares greedy tokens with transformers'."""

    model: str
    """Hugging Face folder."""


def main(args: Check) -> None:
    """Prints what was compared; fails on the first difference."""
    import torch
    import transformers

    tokenizer = load_tokenizer(args.model)
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for rope in (RopeConfig(), RopeConfig("linear", 2.0)):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        theirs.generation_config.eos_token_id = None
        if rope.kind == "linear":
            config = theirs.config
            config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": rope.factor}
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)

        def expect(some, theirs=theirs):
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
            out = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            return out[:, width:].tolist()

        with jax.set_mesh(mesh):
            model = open_model(args.model, rope).load(ComputeConfig(dtype="float32", remat="none"), mesh)
        generator = Generator(model, mesh, max_length=256)
        for prompt in prompts:
            assert generator([prompt], NEW) == expect([prompt]), (rope, tokenizer.decode(prompt))
        assert generator(prompts[:4], NEW) == expect(prompts[:4]), rope
        print(f"{rope}: {len(prompts)} prompts and a ragged batch of 4, {NEW} tokens each: equal", flush=True)
        worst = _logits(generator, model, prompts[1], mesh)
        print(f"{rope}: cached and uncached logits differ by {worst:.1e} at most", flush=True)


def _logits(generator, model, prompt, mesh) -> float:
    """The largest difference of a step's logits from those of a whole pass, over a generation."""
    seen = []
    head = implementation._last_logits

    def spy(*arguments):
        logits = head(*arguments)
        jax.debug.callback(lambda x: seen.append(np.asarray(x[0])), logits, ordered=True)
        return logits

    implementation._last_logits = spy
    jax.clear_caches()
    try:
        new = generator([prompt], NEW)[0]
        jax.effects_barrier()
    finally:
        implementation._last_logits = head
        jax.clear_caches()
    tokens = np.array([[*prompt, *new]], np.int32)
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        batch = placement.put_batch(mesh, {"t": tokens, "p": np.arange(tokens.size, dtype=np.int32)[None]})
        whole = np.asarray(jax.jit(lambda m, t, p: m.logits(m(t, p)))(model, batch["t"], batch["p"]))[0]
    expected = whole[len(prompt) - 1 : -1]
    return float(np.abs(np.array(seen) - expected).max())


if __name__ == "__main__":
    main(tyro.cli(Check))
