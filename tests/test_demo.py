"""The demo: its text is what its generator makes, its base model is the one described, and pre-training runs."""

import hashlib
import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest

from pi_jax.evaluate import passkey
from pi_jax.evaluate.loaded import BATCH_TOKENS, LoadedModel

DEMO = pathlib.Path(__file__).parent.parent / "demo"


def _load(name):
    sys.path.insert(0, str(DEMO))
    try:
        spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def text():
    return _load("text")


@pytest.fixture(scope="module")
def novels(text):
    return text.novels()


def test_the_ledgers_are_what_the_seed_makes(text, novels):
    ledgers, rng = text.Ledgers("\n".join(novels)), np.random.default_rng(2023)
    made = [ledgers.text(rng, text.CHARACTERS, text.FILLERS[i % 4]) for i in range(3)]
    assert text.read("ledgers.jsonl.gz")[:3] == made


def test_answers_follow_from_what_was_stated(text, novels):
    """Each answer is the value of an earlier statement; new values are never announced."""
    ledgers, rng = text.Ledgers("\n".join(novels)), np.random.default_rng(0)
    for _ in range(20):
        known = set()
        for piece, kind in ledgers.pieces(rng, 2000):
            value = piece.strip()  # a number comes after a blank of its own
            if kind == text.VALUE:
                known.add(value)
            elif kind == text.ANSWER and value:
                assert value in known


def test_the_passkey_prompt_is_in_no_training_text(text, novels):
    everything = "\n".join([*novels, *text.read("ledgers.jsonl.gz")])
    for part in (passkey.HEADER, "The grass is green", "Remember it.", "What is the pass key"):
        assert part not in everything


def test_the_weights_are_those_of_the_card():
    card = (DEMO / "base/README.md").read_text()
    (digest,) = re.findall(r"`([0-9a-f]{64})`", card)
    assert hashlib.sha256((DEMO / "base/model.safetensors").read_bytes()).hexdigest() == digest


def test_the_base_model_retrieves_inside_its_window():
    model = LoadedModel.open(str(DEMO / "base"))
    found = passkey.measure_distances(model.generator(256), model.tokenizer, 256, 6, 3, 1, BATCH_TOKENS)
    assert found["success"] > 0.95 and found["k_max"] >= 230


@pytest.mark.slow
def test_pretraining_runs(text, novels):
    """A few steps of each stage lower the loss of repeated tokens."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    pretrain = _load("pretrain")
    tokenizer = pretrain.make_tokenizer(novels[:1])
    assert [len(tokenizer.encode(f" {n}").ids) for n in (123, 48213)] == [1, 2]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=pretrain.VOCABULARY, tie_word_embeddings=True, **sizes))
    lines = []
    stages = [(window, 8, 100, *rest) for window, _, _, *rest in pretrain.STAGES]
    kept = []
    pretrain.train(model, pretrain.Batches(novels, tokenizer, 0), lambda: kept.append(1), stages, lines.append)
    assert len(kept) == 3
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines]
    assert len(losses) == 3 and all(0 < loss < 9 for loss in losses) and "answers" in lines[1]
