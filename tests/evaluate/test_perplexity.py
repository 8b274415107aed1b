"""Sliding windows: every token once, with the context it should have."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax.config import ComputeConfig, RopeConfig, extend
from pi_jax.errors import InputError
from pi_jax.evaluate import loglikelihood
from pi_jax.evaluate.perplexity import command, sliding
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config

COMPUTE = ComputeConfig(dtype="float32", loss_chunk=16)


@pytest.mark.parametrize(("length", "window", "stride"), [(1000, 100, 30), (100, 100, 1), (7, 100, 5), (101, 100, 99)])
def test_every_token_is_scored_once_with_enough_before_it(length, window, stride):
    windows = list(sliding.sliding_windows(0, length, window, stride))
    scored = list(itertools.chain.from_iterable(range(w.first, w.stop) for w in windows))
    assert scored == list(range(1, length))
    for w in windows:
        assert 0 <= w.start < w.first and w.stop - w.start <= window
        assert w.first - w.start >= min(window - stride, w.first) and w.start % stride == 0


@pytest.mark.parametrize("length", [100, 101, 102, 250])
def test_disjoint_windows_score_what_has_something_before_it(length):
    windows = list(sliding.sliding_windows(0, length, 100, 100))
    scored = list(itertools.chain.from_iterable(range(w.first, w.stop) for w in windows))
    assert scored == [i for i in range(length) if i % 100]
    assert all(w.start % 100 == 0 and w.start < w.first < w.stop <= w.start + 100 for w in windows)
    windows = list(sliding.sliding_windows(0, length, 100, 100, bos=True))
    assert [i for w in windows for i in range(w.first, w.stop)] == list(range(length))
    assert all(w.start == w.first for w in windows)


@jax.jit
def _log_probabilities(model, ids):
    return jax.nn.log_softmax(model.logits(model(ids, jnp.arange(ids.shape[1])[None])))


def _by_hand(model, tokens, window, stride, bos):
    """Token after token, each from a forward pass of its own over the context the protocol gives it."""
    losses = np.full(len(tokens), np.nan)
    width = window - (bos is not None)
    stop = min(width, len(tokens))
    start, first = 0, 0 if bos is not None else 1
    while True:
        for i in range(max(first, start + (bos is None)), stop):
            context = ([bos] if bos is not None else []) + list(tokens[start:i])
            padded = np.zeros((1, window), np.int32)  # what comes after is out of sight
            padded[0, : len(context)] = context
            losses[i] = -np.asarray(_log_probabilities(model, padded))[0, len(context) - 1, tokens[i]]
        if stop == len(tokens):
            return losses
        start, first, stop = start + stride, stop, min(start + stride + width, len(tokens))


@pytest.mark.parametrize(
    ("bos", "devices", "stride"), [(None, 1, 7), (256, 4, 7), (None, 1, 24), (256, 1, 23)], ids=str
)
def test_losses_equal_those_by_hand(bos, devices, stride):
    from pi_jax.config import MeshConfig
    from pi_jax.parallel import sharding

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).astype(np.int32) for n in (33, 9, 25)]
    with jax.set_mesh(mesh):
        model = Llama(extend(tiny_model_config(), RopeConfig("linear", 2.0)), COMPUTE, jax.random.key(0))
        found = sliding.score_documents(model, documents, 24, stride, mesh, bos)
    alone = Llama(model.config, COMPUTE, jax.random.key(0))
    for tokens, losses in zip(documents, found, strict=True):
        np.testing.assert_allclose(losses, _by_hand(alone, tokens, 24, stride, bos), atol=1e-4)


def test_one_program_serves_a_window(mesh):
    documents = [np.arange(n) % 250 for n in (90, 7, 41)]
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), COMPUTE, jax.random.key(0))
        before = loglikelihood._score._cache_size()
        for _ in range(2):  # as at two steps of a training run
            sliding.score_documents(model, documents, 26, 7, mesh)
    assert loglikelihood._score._cache_size() == before + 1


def test_summary_by_token_by_window_and_by_document():
    losses = [np.array([np.nan, 1.0, 2.0, 3.0], np.float32), np.array([np.nan, 4.0], np.float32)]
    windows = sliding.plan_windows([4, 2], 3, 1)
    assert len(windows) == 3
    result = command.summarize(losses, ["a", "b"], [2], windows)
    assert result["tokens"] == 4 and result["windows"] == 3
    np.testing.assert_allclose(result["loss"], 2.5)
    np.testing.assert_allclose(result["perplexity"], np.exp(2.5))
    np.testing.assert_allclose(result["window_mean_perplexity"], np.exp((1.5 + 3 + 4) / 3))
    assert [(b["from"], b["to"], b["tokens"]) for b in result["by_position"]] == [(0, 2, 2), (2, 4, 2)]
    assert [b["loss"] for b in result["curve"]] == [None, 2.5, 2.0, 3.0]
    assert [d["tokens"] for d in result["documents"]] == [3, 1]
    np.testing.assert_allclose(result["documents"][0]["window_mean_perplexity"], np.exp((1.5 + 3) / 2))
    assert "12.18" in command.table([{"window": 4, **result}])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, inputs, mesh):
    from pi_jax.convert.formats import hf

    folder = tmp_path_factory.mktemp("model") / "hf"
    with jax.set_mesh(mesh):
        hf.save(Llama(tiny_model_config(), COMPUTE, jax.random.key(0)), str(folder), inputs["tokenizer"])
    return str(folder)


def test_the_command_writes_what_it_prints(model_folder, inputs, tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    command.main(
        ["--model", model_folder, "--data", inputs["heldout"], "--windows", "64", "128", "--stride", "32"]
        + ["--max-tokens", "200", "--rope.kind", "linear", "--rope.factor", "2", "--output", str(out)]
    )
    report = json.loads(out.read_text())
    assert [r["window"] for r in report["results"]] == [64, 128]
    assert report["results"][0]["tokens"] == 3 * 199 and report["protocol"]["bos"] == "none"
    printed = capsys.readouterr()
    assert "Linear(theta=10000.0, factor=2.0)" in printed.out and "warning" not in printed.err
    assert f"{report['results'][1]['perplexity']:.2f}" in printed.out
    assert [f.name for f in out.parent.iterdir()] == ["result.json"]


def _run(*words):
    command.main(list(words))


def test_what_a_reader_must_know_is_said(model_folder, inputs, tmp_path, capsys):
    for name, text in {"long": "a" * 300, "short": "b" * 30, "none": "", "blank": " \n" * 200}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    _run("--model", model_folder, "--data", str(tmp_path), "--windows", "128", "--stride", "64")
    told = capsys.readouterr().err
    assert "window 128 exceeds the window of the model, 64 tokens" in told
    assert "short.txt (30)" in told and "none.txt: a document needs at least two tokens" in told
    assert "blank.txt, " in told


@pytest.mark.parametrize("policy", ["none", "document", "window"])
def test_bos_policies_against_transformers(model_folder, inputs, tmp_path, policy):
    """And token weights, windows' means: all as an independent computation has them."""
    import importlib.util

    import torch
    import transformers

    spec = importlib.util.spec_from_file_location("theirs", "tests/transformers_perplexity.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    texts = ["the grass is green and the sky is blue " * 5, "here we go", "x" * 97]
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    out = tmp_path / "ours.json"
    _run(
        *("--model", model_folder, "--data", *map(str, files), "--windows", "48", "--stride", "20", "--bos", policy),
        *("--output", str(out)),
    )
    ours = json.loads(out.read_text())["results"][0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    documents = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    if policy == "document":
        documents = [[256, *d] for d in documents]
    expected = theirs.sliding_perplexity(model, documents, 48, 20, 256 if policy == "window" else None)
    assert ours["tokens"] == expected["tokens"]
    for name in ("perplexity", "window_mean_perplexity"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5)
    assert abs(ours["perplexity"] - ours["window_mean_perplexity"]) > 1e-4 * ours["perplexity"]


def test_truncation_with_bos_is_yarns(model_folder, tmp_path):
    """YaRN's `--truncate`: BOS and the first W - 1 tokens of each document in one forward pass, then the mean of means.

    With W tokens of text there would be a second window for the last one."""
    import torch
    import transformers

    texts = ["the grass is green and the sky is blue " * 5, "here we go. there and back again. " * 4, "x" * 97]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    words = ("--model", model_folder, "--data", str(tmp_path / "text"), "--windows", "64", "--bos", "window")
    results = []
    for tokens in ("63", "64"):
        out = tmp_path / f"{tokens}.json"
        stride = () if tokens == "63" else ("--stride", "32")  # a single window is not moved
        _run(*words, "--max-tokens", tokens, *stride, "--output", str(out))
        results += json.loads(out.read_text())["results"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    means = []
    for text in texts:
        ids = torch.tensor([[256, *tokenizer(text, add_special_tokens=False)["input_ids"][:63]]])
        with torch.no_grad():
            means.append(model(ids, labels=ids).loss.item())
    assert results[0]["tokens"] == 3 * 63 and results[0]["windows"] == 3
    np.testing.assert_allclose(results[0]["window_mean_perplexity"], np.exp(np.mean(means)), rtol=1e-5)
    np.testing.assert_allclose(results[0]["perplexity"], np.exp(np.mean(means)), rtol=1e-5)  # equally long documents
    assert results[1]["windows"] == 6
    assert abs(results[1]["window_mean_perplexity"] / np.exp(np.mean(means)) - 1) > 1e-3


def test_windows_passed_as_documents_give_longloras(model_folder):
    """LongLoRA scores every token of every window of the joined documents; its last window is left out."""
    import importlib.util

    import torch
    import transformers

    from pi_jax.evaluate.loaded import LoadedModel

    spec = importlib.util.spec_from_file_location("theirs", "tests/transformers_perplexity.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).tolist() for n in (70, 41, 90)]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = theirs.stream_perplexity(model, documents, 48, 16)
    stream = np.concatenate(documents)
    windows = [stream[i : i + 48] for i in range(0, len(stream) - 48, 16)[:-1]]
    loaded = LoadedModel.open(model_folder)
    with loaded.computing() as weights:
        (found,) = command.evaluate_model(weights, loaded.mesh, [""] * len(windows), windows, (48,), 48)
    assert found["windows"] == expected["windows"] == 9
    np.testing.assert_allclose(found["window_mean_perplexity"], expected["window_mean_perplexity"], rtol=1e-5)


@pytest.mark.parametrize("policy", ["none", "window"])
def test_disjoint_windows_against_transformers(model_folder, tmp_path, policy):
    """Every window in a forward pass of its own."""
    import torch
    import transformers

    text = "the grass is green and the sky is blue " * 5
    (tmp_path / "a.txt").write_text(text)
    out = tmp_path / "ours.json"
    width = 48 if policy == "none" else 47
    words = ("--windows", "48", "--stride", f"{width}", "--bos", policy, "--output", str(out))
    _run("--model", model_folder, "--data", str(tmp_path / "a.txt"), *words)
    ours = json.loads(out.read_text())["results"][0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = []
    for at in range(0, len(ids), width):
        row = torch.tensor([([256] if policy == "window" else []) + ids[at : at + width]])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none"))
    assert ours["windows"] == len(losses) == 5 and ours["tokens"] == sum(map(len, losses))
    np.testing.assert_allclose(ours["perplexity"], np.exp(torch.cat(losses).double().mean().item()), rtol=1e-5)


def test_a_mesh_gives_the_same(model_folder, inputs, tmp_path):
    words = ["--model", model_folder, "--data", inputs["heldout"], "--windows", "64", "--stride", "32"]
    words += ["--max-tokens", "200"]
    found = []
    for i, mesh in enumerate(((), ("--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.context", "2"))):
        _run(*words, *mesh, "--output", str(tmp_path / f"{i}.json"))
        found.append(json.loads((tmp_path / f"{i}.json").read_text())["results"][0]["perplexity"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_an_interrupted_evaluation_goes_on(model_folder, inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    words = ["--model", model_folder, "--data", inputs["heldout"], "--windows", "64", "--stride", "32"]
    words += ["--max-tokens", "300", "--output", str(out)]
    _run(*words[:-1], str(tmp_path / "whole.json"))
    calls, real = [], sliding.score_sequences

    def score_sequences(*arguments, fail=True):
        calls.append(arguments[1].shape)
        if fail and len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sliding, "BATCH_TOKENS", 64)  # a row on each of eight devices
    monkeypatch.setattr(sliding, "_SECONDS_BETWEEN_SAVES", 0)
    monkeypatch.setattr(sliding, "score_sequences", score_sequences)
    with pytest.raises(SystemExit) as stop:
        _run(*words)
    assert stop.value.code == 130 and not out.exists()
    first, calls[:] = list(calls), []
    monkeypatch.setattr(sliding, "score_sequences", lambda *x: score_sequences(*x, fail=False))
    _run(*words)
    assert "Continuing after 16 windows" in capsys.readouterr().out
    monkeypatch.undo()
    resumed, whole = (json.loads(f.read_text())["results"] for f in (out, tmp_path / "whole.json"))
    needed = sum(-(-r["windows"] // 8) for r in whole)
    assert len(first) - 1 + len(calls) == needed
    for r in (*resumed, *whole):
        r.pop("seconds")
    for a, b in zip(*map(jax.tree.leaves, (resumed, whole)), strict=True):
        assert a == b if isinstance(a, str) else abs(a - b) <= 1e-6 * abs(b)
    assert not list(tmp_path.glob("*.partial*"))


def test_losses_of_another_evaluation_are_not_taken_up(tmp_path):
    path = tmp_path / "x.partial"
    partial = sliding.Partial(path, "this")
    partial.save("64/32", 3, np.ones(5, np.float32), last=True)
    assert sliding.Partial(path, "this").load("64/32", np.zeros(5))[0] == 3
    other = sliding.Partial(path, "other")
    assert other.rejected and other.load("64/32", np.zeros(5))[0] == 0
    path.write_bytes(path.read_bytes()[:-40])
    damaged = sliding.Partial(path, "this")
    assert damaged.rejected and damaged.windows_done == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: there is no such folder"),
        ({"--data": "nothing.txt"}, "nothing.txt"),
        ({"--windows": "100000"}, "longer than every document"),
        ({"--windows": "1"}, "windows"),
        ({"--stride": "0"}, "stride"),
        ({"--stride": "65"}, "stride is 65: it must be at most the window, 64"),
        (
            {"--stride": "64", "--bos": "window"},
            "stride is 64: it must be at most the 63 tokens of text in a window of 64 with BOS",
        ),
        ({"--rope.kind": "cubic"}, "cubic"),
        ({"--output": "/proc/none/x.json"}, "cannot be written"),
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
        command.main(list(words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--stride": "65"}, "stride is 65"),
        ({"--windows": "128"}, "window 128 is longer than every document: --max-tokens is 100"),
        ({"--windows": "102", "--bos": "window"}, "window 102 is longer than every document"),
        ({"--output": "pyproject.toml/x.json"}, "pyproject.toml/x.json cannot be written"),
    ],
)
def test_what_the_arguments_show_is_refused_before_anything_is_opened(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(command.LoadedModel, "open", lambda *_, **__: pytest.fail("the model was opened"))
    right = {"--model": "m", "--data": "d.txt", "--windows": "64", "--max-tokens": "100", "--stride": "32"}
    with pytest.raises(SystemExit) as stop:
        _run(*itertools.chain.from_iterable((right | arguments).items()))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_what_the_text_shows_is_refused_before_the_weights_are_loaded(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.LoadedModel, "weights", property(lambda _: pytest.fail("the weights were loaded")))
    (tmp_path / "a.txt").write_text("a" * 100)
    words = ("--model", model_folder, "--data", str(tmp_path), "--windows", "102", "--stride", "32")
    for bos in ("none", "window"):
        with pytest.raises(SystemExit) as stop:
            _run(*words, "--bos", bos)
        assert stop.value.code == 2
        told = f"window 102 is longer than every document (the longest has 100 tokens{' and BOS' * (bos == 'window')})"
        assert told in capsys.readouterr().err


def test_a_foreign_tokenizer_is_noticed(inputs):
    with pytest.raises(InputError, match="contains token .* but the model's vocab_size is 100"):
        command.read_tokens([inputs["heldout"]], inputs["tokenizer"], 100, 50)


def test_the_first_tokens_are_those_of_the_whole_text(inputs, tmp_path, monkeypatch):
    """Also where a token stands for more characters than expected: here `<pad>`, for five instead of two."""
    monkeypatch.setattr(command, "_CHARACTERS_A_TOKEN", 2)
    text = "<pad>" * 40 + "abc" * 2000
    (tmp_path / "a.txt").write_text(text)
    _, (whole,) = command.read_tokens([str(tmp_path)], inputs["tokenizer"], 260, None)
    for count in (3, 39, 60):
        _, (first,) = command.read_tokens([str(tmp_path)], inputs["tokenizer"], 260, count)
        np.testing.assert_array_equal(first, whole[:count])
