"""Generation: against transformers token by token, cached against uncached, on every mesh."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax import rope
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig, extend
from pi_jax.convert.formats import hf
from pi_jax.errors import InputError
from pi_jax.generate import Generator, generator, kv_cache, sampling
from pi_jax.generate.__main__ import main as generate_main
from pi_jax.generate.streaming import Stream
from pi_jax.model import Llama
from pi_jax.parallel import placement, sharding
from pi_jax.tiny import tiny_model_config

FLOAT32 = ComputeConfig(dtype="float32", remat="none")
PROMPTS = [[5, 17, 200, 3], list(range(40, 75)), [9], [100 + i % 60 for i in range(70)], [7] * 16]
KINDS = {
    "default": RopeConfig(),
    "linear": RopeConfig("linear", 4.0),
    "dynamic": RopeConfig("dynamic", 2.0),
}


def _lively(config, mesh):
    """Weights large enough for attention and position to matter."""
    with jax.set_mesh(mesh):
        model = Llama(config, FLOAT32, jax.random.key(0))
        return jax.tree.map(lambda x: x * (8.0 if x.ndim > 1 and x.shape[-1] > 2 and x.max() < 1 else 1.0), model)


@pytest.fixture(scope="module")
def models(mesh):
    return {name: _lively(extend(tiny_model_config(), kind), mesh) for name, kind in KINDS.items()}


@jax.jit
def _logits_of(model, ids):
    return model.logits(model(ids, jnp.arange(ids.shape[1])[None]))


def _uncached(model, prompt, count):
    """Greedy continuation, each token from a pass over everything before it; and the logits it was taken from."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        padded = np.zeros((1, 96), np.int32)  # one program for all prompts
        padded[0, : len(tokens)] = tokens
        logits.append(np.asarray(_logits_of(model, padded)[0, len(tokens) - 1]))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], np.array(logits)


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_cached_tokens_are_those_of_whole_passes_in_any_company(kind, models, mesh):
    """Chunks of 16: prompts of 1 to 70 tokens end inside, at and beyond a chunk."""
    generator = Generator(models[kind], mesh, max_length=128, chunk=16)
    expected = [_uncached(models[kind], prompt, 12)[0] for prompt in PROMPTS]
    assert len({tuple(x) for x in expected}) == len(expected)
    assert generator(PROMPTS, 12) == expected
    assert [generator([prompt], 12)[0] for prompt in PROMPTS[1::2]] == expected[1::2]


def test_cached_logits_are_those_of_whole_passes(models, mesh, monkeypatch):
    model, seen = models["linear"], []
    last_logits = generator._last_logits

    def spy(*arguments):
        logits = last_logits(*arguments)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits, ordered=True)
        return logits

    monkeypatch.setattr(generator, "_last_logits", spy)
    generator._choose.clear_cache()
    generator._decode.clear_cache()
    Generator(model, mesh, max_length=128, chunk=16)([PROMPTS[1], PROMPTS[3]], 8)
    jax.effects_barrier()
    generator._choose.clear_cache()
    generator._decode.clear_cache()
    for row, prompt in enumerate((PROMPTS[1], PROMPTS[3])):
        expected = _uncached(model, prompt, 8)[1]
        np.testing.assert_allclose(np.array(seen)[:, row], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_those_of_transformers(kind, models, mesh, tmp_path, inputs):
    """Five prompts alone and a ragged batch of four, 48 tokens: up to and beyond the pre-trained window."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with jax.set_mesh(mesh):
        hf.save(models[kind], str(tmp_path / "m"), inputs["tokenizer"], dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    theirs.generation_config.eos_token_id = None

    def expect(prompts):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=0)
        return out[:, width:].tolist()

    generator = Generator(models[kind], mesh, max_length=128, chunk=32)
    assert [generator([p], 48)[0] for p in PROMPTS] == [expect([p])[0] for p in PROMPTS]
    assert generator(PROMPTS[1:], 48) == expect(PROMPTS[1:])


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)], ids=str)
def test_every_mesh_gives_the_same_and_splits_the_cache(sizes, models, mesh, monkeypatch):
    wide = sharding.make_mesh(MeshConfig(*sizes))
    expected = Generator(models["linear"], mesh, max_length=128, chunk=16)(PROMPTS, 8)
    with jax.set_mesh(wide):
        from pi_jax.model import parameter_axes

        model = placement.put_params(wide, jax.tree.map(np.asarray, models["linear"]), parameter_axes(models["linear"]))
    generator = Generator(model, wide, max_length=128, chunk=16)
    drawn = generator(PROMPTS, 4, temperature=1.0, top_p=0.9)
    assert drawn == Generator(models["linear"], mesh, max_length=128, chunk=16)(PROMPTS, 4, temperature=1.0, top_p=0.9)
    made = []
    empty = kv_cache.empty
    monkeypatch.setattr(kv_cache, "empty", lambda *a: made.append(empty(*a)) or made[-1])
    assert generator(PROMPTS, 8) == expected
    rows = 8 // sizes[3]
    assert made[0].k_BTKH.shape[0] == 8 and made[0].k_BTKH.shape[2] == 2  # K/V heads, not query heads
    assert made[0].k_BTKH.sharding.shard_shape(made[0].k_BTKH.shape)[::2] == (8 // rows, 2 // sizes[3])


def test_stop_tokens_end_a_row_and_only_that(models, mesh):
    generator = Generator(models["default"], mesh, max_length=128, chunk=16)
    free = generator(PROMPTS, 10)
    stop = free[1][4]
    came = []
    stopped = generator(PROMPTS, 10, stop_tokens=[stop], on_token=lambda row, token: came.append((row, token)))
    for a, b in zip(free, stopped, strict=True):
        assert b == (a[: a.index(stop)] if stop in a else a)
    assert [[t for r, t in came if r == row] for row in range(len(PROMPTS))] == stopped
    assert generator([], 4) == []


def test_draws_depend_on_the_seed_and_follow_the_distribution(models, mesh):
    generator = Generator(models["default"], mesh, max_length=64, chunk=16)
    a, b, c = (generator([PROMPTS[0]], 20, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert a == b != c
    assert generator([PROMPTS[0]], 20, temperature=1.0, top_p=1e-6) == generator([PROMPTS[0]], 20)
    logits = _uncached(models["default"], PROMPTS[0], 1)[1][0] / 2.0
    p = np.exp(logits - logits.max())
    p /= p.sum()
    drawn = [row[0] for row in generator([PROMPTS[0]] * 2048, 1, temperature=2.0)]
    share = np.bincount(drawn, minlength=len(p)) / len(drawn)
    assert np.abs(share - p).sum() < 2 * np.sqrt(2 / np.pi * p * (1 - p) / len(drawn)).sum()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    p = np.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
    for top_p, kept in ((0.65, [[1, 3], [0]]), (0.71, [[1, 2, 3], [0]]), (1.0, [[0, 1, 2, 3], [0, 1, 2, 3]])):
        found = sampling.top_p_filter(jnp.log(p), jnp.float32(top_p))
        assert [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(found)] == kept


def test_a_prompt_is_read_in_chunks_without_its_logits(models, mesh):
    """No array of the compiled program has prompt x vocabulary elements."""
    config = models["default"].config
    made = Generator(models["default"], mesh, max_length=600, chunk=64)
    shapes = []
    original = rope.cos_sin
    try:
        rope.cos_sin = lambda positions, *a: shapes.append(positions.shape) or original(positions, *a)
        generator._embed.clear_cache()
        made([list(np.arange(300) % config.vocab_size)], 2)
    finally:
        rope.cos_sin = original
        generator._embed.clear_cache()
    assert set(shapes) <= {(1, 64), (1, 1)} and (1, 64) in shapes


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 999]], {}, "prompt 0 has token 999: tokens must be 0 or more and less than vocab_size, 260"),
        ([[1] * 60], {"max_new_tokens": 10}, "60 tokens: with 10 new tokens it exceeds max_length, 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_what_cannot_be_generated_is_said(prompts, settings, message, models, mesh):
    generator = Generator(models["default"], mesh, max_length=64)
    with pytest.raises(InputError, match=message):
        generator(prompts, **({"max_new_tokens": 4} | settings))


def test_the_command_streams_and_writes(inputs, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--model", inputs["model"], "--max-new-tokens", "12", "--dtype", "float32", "--output", str(out)]
    generate_main([*words, "--prompt", "Ada keeps"])
    streamed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert streamed == report["results"][0]["continuation"] + "\n" and report["results"][0]["prompt_tokens"] == 9
    (tmp_path / "p.txt").write_text("Ben takes the")
    generate_main([*words, "--prompt", "Ada keeps", "--prompt-file", str(tmp_path / "p.txt")])
    again = json.loads(out.read_text())["results"]
    assert again[0] == report["results"][0] and len(again) == 2
    assert "'Ben takes the'" in capsys.readouterr().out


def test_a_stream_waits_for_the_whole_character(inputs, capsys):
    from pi_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(inputs["tokenizer"])
    stream = Stream(tokenizer)
    shown = []
    for token in tokenizer("aé€")["input_ids"]:
        stream(0, token)
        shown.append(capsys.readouterr().out)
    stream.close()
    assert shown == ["a", "", "é", "", "", "€"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: there is no such folder"),
        ({"--prompt": None}, "nothing to continue"),
        ({"--prompt": ""}, "prompt 0 is empty"),
        ({"--prompt-file": "no.txt"}, "no.txt cannot be read"),
        ({"--chat": None}, "has no chat template"),
        ({"--max-new-tokens": "0"}, "max_new_tokens is 0"),
        ({"--mesh.tensor": "8"}, "the model's num_attention_heads is 4, which does not divide over 8 devices"),
        ({"--chunk": "0"}, "chunk is 0"),
        ({"--output": "/proc/none/x.json"}, "/proc/none/x.json cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(inputs, arguments, message, capsys):
    right = {"--model": inputs["model"], "--prompt": "Ada", "--max-new-tokens": "4"} | arguments
    words = itertools.chain.from_iterable(
        (k,) if v is None else (k, v) for k, v in right.items() if k != "--prompt" or v is not None
    )
    with pytest.raises(SystemExit) as stop:
        generate_main(list(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_beyond_the_window_both_numbers_are_named(inputs, capsys):
    generate_main(["--model", inputs["model"], "--prompt", "Ada", "--max-new-tokens", "70", "--dtype", "float32"])
    assert "73 tokens exceeds the window of the model, 64 tokens" in capsys.readouterr().err
