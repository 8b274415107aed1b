"""What pi_jax exports, read by transformers 4, in an environment of its own (`make test-transformers4`).

    python tests/transformers4.py write FOLDER     with pi_jax: tiny models, each kind of RoPE, and what they compute
    python tests/transformers4.py check FOLDER     with transformers 4 and torch: the same from the same folder

Compared are inverse frequencies (to a relative 1e-6; equal bits are counted), attention factor and logits (to 1e-4).

Not a pytest module: the second half runs where pi_jax is not installed.
"""

import pathlib
import shutil
import sys

import numpy as np

LENGTHS = (40, 64, 200)
"""Below, at and beyond the original window of 64 tokens."""


def write(folder: pathlib.Path) -> None:
    """Exports a model for each kind, with the logits that pi_jax computes."""
    import jax

    from pi_jax import rope
    from pi_jax.config import ComputeConfig, MeshConfig
    from pi_jax.convert.__main__ import Convert, convert
    from pi_jax.convert.formats import hf
    from pi_jax.model import Llama
    from pi_jax.parallel import sharding
    from pi_jax.tiny import tiny_model_config

    long = {"factor": 4.0, "original_max_position_embeddings": 64}
    lists = {"short_factor": tuple(1 + i / 8 for i in range(8)), "long_factor": tuple(1.0 + i for i in range(8))}
    kinds = {
        "default": rope.Default(),
        "linear": rope.Linear(factor=4.0),
        "ntk": rope.ntk(10000.0, 4.0, 16),
        "dynamic": rope.Dynamic(**long),
        "yarn": rope.Yarn(**long),
        "llama3": rope.Llama3(**long, low_freq_factor=1.0, high_freq_factor=4.0),
        "longrope": rope.LongRope(**long, **lists),
    }
    shapes = {name: {} for name in kinds}
    # Other shapes of models and folders, all scaled; the last goes through Meta's form.
    for name, shape in {"tied": {"tie_word_embeddings": True}, "MHA": {"num_key_value_heads": 4}}.items():
        kinds[name], shapes[name] = rope.Linear(factor=4.0), shape
    for name in ("shards", "meta"):
        kinds[name], shapes[name] = rope.Linear(factor=4.0), {}
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for name, scaling in kinds.items():
        window = 64 if name == "default" else 256
        original = 64 if window > 64 else None
        sizes = {"max_position_embeddings": window, "original_max_position_embeddings": original}
        config = tiny_model_config(scaling, **sizes, **shapes[name])
        with jax.set_mesh(mesh):
            model = Llama(config, ComputeConfig(dtype="float32"), jax.random.key(0))
            model = jax.tree.map(lambda x: x if x.ndim < 3 else 10 * x, model)  # so that attention matters
            if name == "meta":
                hf.save(model, str(folder / "original"), None)
                convert(Convert(str(folder / "original"), str(folder / "consolidated"), "meta"))
                convert(Convert(str(folder / "consolidated"), str(folder / name), "hf"))
                shutil.rmtree(folder / "original")
                shutil.rmtree(folder / "consolidated")
            else:
                hf.save(model, str(folder / name), None, shard_bytes=100_000 if name == "shards" else hf.SHARD_BYTES)
            logits = {}
            for length in LENGTHS:
                tokens = np.random.default_rng(length).integers(0, 256, (1, length)).astype(np.int32)
                positions = np.arange(length, dtype=np.int32)[None]
                logits[f"tokens{length}"] = tokens
                logits[f"logits{length}"] = np.asarray(model.logits(model(tokens, positions)))
                logits[f"inv_freq{length}"] = np.asarray(scaling.inverse_frequencies(16, jax.numpy.int32(length)))
        logits["attention"] = np.float64(scaling.attention_scaling)
        np.savez(folder / name / "expected.npz", **logits)


def check(folder: pathlib.Path) -> int:
    """Compares; the number of folders that differ."""
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    passed = failed = 0
    for path in sorted(folder.iterdir()):
        expected = np.load(path / "expected.npz")
        worst = worst_frequency = bits = 0.0
        for length in LENGTHS:
            # A fresh model each time: "dynamic" remembers the longest sequence it has met.
            model = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
            with torch.no_grad():
                found = model(torch.tensor(expected[f"tokens{length}"]).long(), use_cache=False).logits.numpy()
            worst = max(worst, float(np.abs(found - expected[f"logits{length}"]).max()))
            theirs, ours = model.model.rotary_emb.inv_freq.numpy(), expected[f"inv_freq{length}"]
            worst_frequency = max(worst_frequency, float(np.abs(theirs / ours - 1).max()))
            bits += float((theirs == ours).mean()) / len(LENGTHS)
            attention = abs(model.model.rotary_emb.attention_scaling - float(expected["attention"]))
        good = worst <= 1e-4 and worst_frequency <= 1e-6 and attention < 1e-9
        passed, failed = passed + good, failed + (not good)
        print(
            f"{path.name:8} logits within {worst:.1e}, frequencies {worst_frequency:.1e} ({bits:.0%} equal bits), "
            f"attention factor {attention:.0e}: {'ok' if good else 'DIFFERS'}"
        )
    print(f"{passed} passed, {failed} failed")
    return failed or not passed


if __name__ == "__main__":
    what, where = sys.argv[1], pathlib.Path(sys.argv[2])
    sys.exit(write(where) if what == "write" else check(where))
