"""`pi-jax extend`: the whole extension on a tiny model, and its verdict."""

import dataclasses
import json
import re
import sys

import pytest

from pi_jax import tiny
from pi_jax.errors import InputError
from pi_jax.extend import stages, verdict
from pi_jax.extend.__main__ import main
from pi_jax.extend.extension import Extend, Extension, extend
from pi_jax.extend.extension import _run as run_stage


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Training text, and two held-out texts."""
    folder = tmp_path_factory.mktemp("text")
    tiny.tiny_text(folder / "train", documents=6)
    tiny.tiny_text(folder / "stories", documents=1, first_seed=50)
    tiny.tiny_text(folder / "tales", documents=2, first_seed=60)
    return folder


@pytest.fixture(scope="module")
def options(inputs, text, tmp_path_factory):
    return Extend(
        model=inputs["model"],
        data=(str(text / "train"),),
        window="512",
        output=str(tmp_path_factory.mktemp("extend") / "out"),
        heldout=(str(text / "stories"), str(text / "tales")),
        steps=4,
        batch_size=8,
        learning_rate=1e-3,
        evaluations=2,
        compare=("direct", "yarn"),
        passkey_distances=2,
        passkey_trials=1,
        train_options="--compute.dtype float32 --optimizer.schedule cosine",
    )


@pytest.fixture(scope="module")
def extension(options):
    extend(options)
    return Extension(options)


def test_extend_leaves_a_model_results_and_a_page(extension):
    for stage in extension.stages():
        assert stage.product.exists(), stage.title
    exported = json.loads((extension.output / "hf" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 512
    run = json.loads((extension.output / "tuned" / "config.json").read_text())["config"]
    assert (run["rope.kind"], run["rope.factor"], run["optimizer.schedule"]) == ("linear", 8.0, "cosine")
    direct = json.loads((extension.output / "direct" / "config.json").read_text())["config"]
    assert (direct["rope.kind"], direct["train.steps"]) == ("default", 4)
    direct = json.loads((extension.output / "direct" / "hf" / "step-4" / "config.json").read_text())
    assert direct["max_position_embeddings"] == 512 and direct["rope_scaling"] is None
    page = (extension.output / "report.html").read_text()
    assert "<title>model: 64 to 512 tokens</title>" in page
    assert not re.search(r"(src|href)=\"?https?:|url\((?!#)|@import|<script", page)  # opens without a network
    assert page.count('<li class="yes"><b>') + page.count('<li class="no"><b>') == 6
    claims = json.loads((extension.output / "verdict.json").read_text())
    assert len(claims) == 3 + 3


def test_a_second_call_does_nothing_again(extension, capsys):
    before = {p: p.stat().st_mtime_ns for p in (extension.output / "results").iterdir()}
    extend(extension.options)
    assert capsys.readouterr().out.count("done already") == len(list(extension.stages()))
    assert before == {p: p.stat().st_mtime_ns for p in (extension.output / "results").iterdir()}


def test_a_missing_result_is_made_again_with_the_printed_command(extension, capsys):
    file = extension.result("yarn", "tales")
    before = json.loads(file.read_text())["results"][0]["perplexity"]
    file.unlink()
    extend(extension.options)
    assert "--rope.kind yarn --rope.factor 8.0 --data" in capsys.readouterr().out
    assert json.loads(file.read_text())["results"][0]["perplexity"] == before


def test_other_options_for_the_same_output_are_refused(extension, capsys):
    options = extension.options
    words = ["--model", options.model, "--data", *options.data, "--window", "512", "--output", options.output]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--steps", "8"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "steps: 4 -> 8" in error and "holds the results of other options" in error


def test_a_dry_run_prints_commands_and_writes_nothing(options, tmp_path, capsys):
    words = ["--model", options.model, "--data", *options.data, "--window", "1k", "--output", str(tmp_path / "o")]
    main([*words, "--dry-run", "--topology", "h100:8"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines][:2] == ["prepare", "plan"]
    assert lines[-1].startswith("python -m pi_jax convert") and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": "64"}, "has a window of 64: choose a longer one"),
        ({"window": "32m"}, "it must be a number of tokens"),
        ({"window": ""}, "it must be a number of tokens"),
        ({"steps": 10, "evaluations": 4}, "multiple of --evaluations"),
        ({"data": ()}, "--data is empty"),
        ({"model": "nowhere"}, "there is no such folder"),
        ({"data": ("nowhere.txt",)}, "nowhere.txt"),
        ({"heldout": ("nowhere.txt",)}, "nowhere.txt"),
        ({"window": "16k"}, "is longer than every document"),
        ({"window": "128", "heldout": ()}, "a passkey prompt and its answer need at least"),
        ({"train_options": "--a 'b"}, "--train-options is"),
        ({"train_options": "--train.steps 3"}, "--train-options changes train.steps"),
    ],
)
def test_bad_options_are_one_sentence(options, changes, message, tmp_path):
    """Before anything is written, so that the corrected command can use the same folder."""
    with pytest.raises(InputError, match=message):
        extend(dataclasses.replace(options, output=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_an_unknown_train_option_stops_before_anything_is_written(options, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        extend(dataclasses.replace(options, output=str(output), train_options="--optimizer.learnin-rate 1"))
    assert stopped.value.code == 2 and not output.exists()


def test_a_failed_stage_is_not_done(tmp_path, monkeypatch):
    """A plan that does not fit writes its result and exits with status 1: the next call must plan again."""
    stage = stages.Stage("Memory", ("plan",), tmp_path / "plan.json")

    def plan(argv):
        stage.product.write_text("{}")
        sys.exit(1)

    monkeypatch.setattr("pi_jax.plan.__main__.main", plan)
    with pytest.raises(SystemExit):
        run_stage(stage)
    assert not stage.product.exists()


@pytest.mark.parametrize("base", [64, 3000, 2049])
def test_the_factor_reaches_the_window(options, base, monkeypatch):
    source = Extension(options).source
    config = dataclasses.replace(source.config, max_position_embeddings=base)
    changed = dataclasses.replace(source, config=config)
    monkeypatch.setattr("pi_jax.extend.extension.open_model", lambda path: changed)
    for window in range(base + 1, base + 2000, 7):
        factor = Extension(dataclasses.replace(options, window=str(window))).factor
        assert int(base * factor) == window


def test_a_foreign_folder_is_refused(options, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="was not made by extend"):
        extend(dataclasses.replace(options, output=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_number_of_tokens_may_have_a_unit():
    assert (stages.tokens("32k"), stages.tokens("2048")) == (32768, 2048)


def test_claims_follow_the_numbers(extension, monkeypatch):
    """With the paper's own numbers all claims hold; with a failed run none about tuning does. Recovery is a claim for
    each of the two texts."""

    def given(perplexities, keys):
        def entry(_, variant, text, window):
            value = perplexities[variant.name, window]
            end = perplexities.get((variant.name, "end"), value)
            parts = [{"from": 0, "perplexity": end / 2}, {"from": 256, "perplexity": end}]
            return {"perplexity": value, "by_position": parts}

        monkeypatch.setattr(verdict.Findings, "perplexity", entry)
        monkeypatch.setattr(
            verdict.Findings, "passkey", lambda _, v: {"k_max": keys[v.name], "success": keys[v.name] / 512}
        )
        return [claim.holds for claim in verdict.Findings(extension).claims()]

    table = {("base", 64): 7.2, ("base", 512): 1500.0, ("untuned", 512): 16.1, ("tuned-4", 512): 6.95}
    keys = {"tuned-2": 512, "tuned-4": 512, "direct-4": 128}
    assert given(table, keys) == [True] * 6
    assert given(table | {("base", "end"): 8.0}, keys) == [False, True, True, True, True, True]
    assert given(table | {("untuned", "end"): 40.0}, keys) == [True, False, True, True, True, True]
    assert given(table | {("tuned-4", 512): 7.3}, keys | {"tuned-4": 256}) == [True, True, False, False, False, True]
    assert given(table, keys | {"tuned-4": 128})[-1] is False
