"""Sliding windows: every token once, with the context it should have."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax.config import ComputeConfig, RopeConfig, extend
from pi_jax.errors import InputError
from pi_jax.evaluate import perplexity
from pi_jax.model import Llama
from pi_jax.testing import tiny_model_config

COMPUTE = ComputeConfig(dtype="float32", loss_chunk=16)


@pytest.mark.parametrize(("length", "window", "stride"), [(1000, 100, 30), (100, 100, 1), (7, 100, 5), (101, 100, 100)])
def test_every_token_is_scored_once_with_enough_before_it(length, window, stride):
    windows = list(perplexity.sliding_windows(0, length, window, stride))
    scored = list(itertools.chain.from_iterable(range(w.first, w.stop) for w in windows))
    assert scored == list(range(1, length))
    for w in windows:
        assert 0 <= w.start < w.first and w.stop - w.start <= window
        assert w.first - w.start >= min(window - stride, w.first)


def _by_hand(model, tokens, window, stride, bos):
    """Token after token, each from a forward pass of its own over the context the protocol gives it."""
    losses = np.full(len(tokens), np.nan)
    width = window - (bos is not None)
    stop = min(width, len(tokens))
    start, first = 0, 0 if bos is not None else 1
    logits_of = jax.jit(lambda ids: model.logits(model(ids, jnp.arange(window)[None])))
    while True:
        for i in range(first, stop):
            context = ([bos] if bos is not None else []) + list(tokens[start:i])
            padded = np.zeros((1, window), np.int32)  # what comes after is out of sight
            padded[0, : len(context)] = context
            logits = logits_of(padded)[0, len(context) - 1]
            losses[i] = jax.nn.logsumexp(logits) - logits[tokens[i]]
        if stop == len(tokens):
            return losses
        first, stop = stop, min(stop + stride, len(tokens))
        start = stop - width


@pytest.mark.parametrize("bos", [None, 256])
@pytest.mark.parametrize("devices", [1, 4])
def test_losses_equal_those_by_hand(bos, devices):
    from pi_jax import sharding
    from pi_jax.config import MeshConfig

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).astype(np.int32) for n in (41, 9, 24)]
    with jax.set_mesh(mesh):
        model = Llama(extend(tiny_model_config(), RopeConfig("linear", 2.0)), COMPUTE, jax.random.key(0))
        found = perplexity.score_documents(model, documents, 24, 7, mesh, bos, progress=False)
    alone = Llama(model.config, COMPUTE, jax.random.key(0))
    for tokens, losses in zip(documents, found, strict=True):
        np.testing.assert_allclose(losses, _by_hand(alone, tokens, 24, 7, bos), atol=1e-4)


def test_summary_weights_by_token():
    losses = [np.array([np.nan, 1.0, 2.0, 3.0]), np.array([np.nan, 4.0])]
    result = perplexity.summarize(losses, ["a", "b"], [2])
    assert result["tokens"] == 4
    np.testing.assert_allclose(result["loss"], 2.5)
    np.testing.assert_allclose(result["perplexity"], np.exp(2.5))
    assert [(b["from"], b["to"], b["tokens"]) for b in result["by_position"]] == [(0, 2, 2), (2, 4, 2)]
    assert [d["tokens"] for d in result["documents"]] == [3, 1]
    assert "12.18" in perplexity.table([{"window": 4, **result}])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, inputs, mesh):
    from pi_jax.convert import hf

    folder = tmp_path_factory.mktemp("model") / "hf"
    with jax.set_mesh(mesh):
        hf.save(Llama(tiny_model_config(), COMPUTE, jax.random.key(0)), str(folder), inputs["tokenizer"])
    return str(folder)


def test_the_command_writes_what_it_prints(model_folder, inputs, tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    perplexity.main(
        ["--model", model_folder, "--data", inputs["heldout"], "--windows", "64", "128", "--stride", "32"]
        + ["--max-tokens", "200", "--rope.kind", "linear", "--rope.factor", "2", "--output", str(out)]
    )
    report = json.loads(out.read_text())
    assert [r["window"] for r in report["results"]] == [64, 128]
    assert report["results"][0]["tokens"] == 3 * 199 and report["protocol"]["average"] == "tokens"
    printed = capsys.readouterr().out
    assert "Linear(theta=10000.0, factor=2.0)" in printed
    assert f"{report['results'][1]['perplexity']:.2f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: there is no such folder"),
        ({"--data": "nothing.txt"}, "nothing.txt"),
        ({"--windows": "100000"}, "longer than every document"),
        ({"--windows": "1"}, "windows"),
        ({"--stride": "0"}, "stride"),
        ({"--stride": "64"}, "stride 64 with a window of 64: the stride must be shorter"),
        ({"--rope.kind": "cubic"}, "cubic"),
        ({"--output": "/proc/none/x.json"}, "/proc/none/x.json cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(model_folder, inputs, arguments, message, capsys):
    right = {
        "--model": model_folder,
        "--data": inputs["heldout"],
        "--windows": "64",
        "--max-tokens": "100",
        "--stride": "32",
    }
    words = itertools.chain.from_iterable((right | arguments).items())
    with pytest.raises(SystemExit) as stop:
        perplexity.main(list(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_foreign_tokenizer_is_noticed(inputs):
    with pytest.raises(InputError, match="260 tokens, the model's vocab_size is 100"):
        perplexity.read_tokens([inputs["heldout"]], inputs["tokenizer"], 100, 50)


def test_the_first_tokens_are_those_of_the_whole_text(inputs, tmp_path, monkeypatch):
    """Also where a token stands for more characters than expected: here `<pad>`, for five instead of two."""
    monkeypatch.setattr(perplexity, "_CHARACTERS_A_TOKEN", 2)
    text = "<pad>" * 40 + "abc" * 2000
    (tmp_path / "a.txt").write_text(text)
    _, (whole,) = perplexity.read_tokens([str(tmp_path)], inputs["tokenizer"], 260, None)
    for count in (3, 39, 60):
        _, (first,) = perplexity.read_tokens([str(tmp_path)], inputs["tokenizer"], 260, count)
        np.testing.assert_array_equal(first, whole[:count])
