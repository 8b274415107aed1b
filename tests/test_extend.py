"""`pi-jax extend`: the whole journey on a tiny model, and its verdict."""

import dataclasses
import json
import re

import pytest

from pi_jax import tiny
from pi_jax.errors import InputError
from pi_jax.extend import stages, verdict
from pi_jax.extend.__main__ import main
from pi_jax.extend.journey import Extend, Journey, extend


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
def journey(options):
    extend(options)
    return Journey(options)


def test_a_journey_leaves_a_model_results_and_a_page(journey):
    for stage in journey.stages():
        assert stage.product.exists(), stage.title
    exported = json.loads((journey.output / "hf" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 512
    run = json.loads((journey.output / "tuned" / "config.json").read_text())["config"]
    assert (run["rope.kind"], run["rope.factor"], run["optimizer.schedule"]) == ("linear", 8.0, "cosine")
    direct = json.loads((journey.output / "direct" / "config.json").read_text())["config"]
    assert (direct["rope.kind"], direct["train.steps"]) == ("default", 4)
    direct = json.loads((journey.output / "direct" / "hf" / "step-4" / "config.json").read_text())
    assert (direct["max_position_embeddings"], direct["original_max_position_embeddings"]) == (512, 64)
    page = (journey.output / "report.html").read_text()
    assert "<title>model: 64 to 512 tokens</title>" in page
    assert not re.search(r"(src|href)=\"?https?:|url\((?!#)|@import|<script", page)  # opens without a network
    claims = json.loads((journey.output / "verdict.json").read_text())
    assert len(claims) == 3 + 2


def test_a_second_call_does_nothing_again(journey, capsys):
    before = {p: p.stat().st_mtime_ns for p in (journey.output / "results").iterdir()}
    extend(journey.options)
    assert capsys.readouterr().out.count("done already") == len(list(journey.stages()))
    assert before == {p: p.stat().st_mtime_ns for p in (journey.output / "results").iterdir()}


def test_a_missing_result_is_made_again_with_the_printed_command(journey, capsys):
    file = journey.result("yarn", "tales")
    before = json.loads(file.read_text())["results"][0]["perplexity"]
    file.unlink()
    extend(journey.options)
    assert "--rope.kind yarn --rope.factor 8 --data" in capsys.readouterr().out
    assert json.loads(file.read_text())["results"][0]["perplexity"] == before


def test_other_options_for_the_same_output_are_refused(journey, capsys):
    options = journey.options
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
    ],
)
def test_bad_options_are_one_sentence(options, changes, message):
    with pytest.raises(InputError, match=message):
        extend(dataclasses.replace(options, **changes))


def test_a_foreign_folder_is_refused(options, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="was not made by extend"):
        extend(dataclasses.replace(options, output=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_number_of_tokens_may_have_a_unit():
    assert (stages.tokens("32k"), stages.tokens("2048")) == (32768, 2048)


def test_claims_follow_the_numbers(journey, monkeypatch):
    """Both ways: with the paper's own numbers all claims hold, with a failed run none of those about tuning does."""

    def given(perplexities, keys):
        def entry(_, variant, text, window):
            value = perplexities[variant.name, window]
            return {"perplexity": value, "by_position": [{"perplexity": perplexities.get("last", value)}]}

        monkeypatch.setattr(verdict.Findings, "perplexity", entry)
        monkeypatch.setattr(verdict.Findings, "passkey", lambda _, v: {"k_max": keys[v.name], "success": 0.0})
        return [claim.holds for claim in verdict.Findings(journey).claims()]

    table = {("base", 64): 7.2, ("base", 512): 1500.0, ("untuned", 512): 16.1, ("tuned-4", 512): 6.95}
    keys = {"tuned-2": 512, "tuned-4": 512, "direct-4": 128}
    assert given(table, keys) == [True] * 5
    assert given(table | {("base", 512): 8.0}, keys) == [False, True, True, True, True]
    assert given(table | {"last": 40.0}, keys) == [True, False, True, True, True]
    assert given(table | {("tuned-4", 512): 7.3}, keys | {"tuned-4": 256}) == [True, True, False, False, True]
    assert given(table, keys | {"direct-4": 512})[-1] is False
