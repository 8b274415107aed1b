"""LoadedModel: one way to open a model, for commands and notebooks; results are written by process 0 only."""

import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from pi_jax.config import MeshConfig, RopeConfig
from pi_jax.errors import InputError
from pi_jax.evaluate import passkey, result
from pi_jax.evaluate.loaded import LoadedModel
from pi_jax.evaluate.perplexity.command import Perplexity, perplexity

TEXT = "Ada keeps the lamp at the hill. Ben takes the key from the lake."


@pytest.fixture(scope="module")
def loaded(inputs):
    return LoadedModel.open(inputs["model"], rope=RopeConfig("linear", 4.0))


def test_loglikelihood_is_that_of_the_logits(loaded):
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = log_softmax(loaded.logits(TEXT).astype(np.float64), axis=-1)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(loaded.loglikelihood(TEXT), expected, atol=2e-5)


def test_the_scaling_is_applied(loaded, inputs):
    """The control: without it the logits differ."""
    assert loaded.config.max_position_embeddings == 256
    unscaled = LoadedModel.open(inputs["model"]).loglikelihood(TEXT)
    assert np.abs(unscaled - loaded.loglikelihood(TEXT)).max() > 1e-3


@pytest.mark.parametrize("mesh", [MeshConfig(context=4), MeshConfig(tensor=2, context=2)], ids=str)
def test_every_mesh_gives_the_same(mesh, loaded, inputs):
    wide = LoadedModel.open(inputs["model"], rope=RopeConfig("linear", 4.0), mesh=mesh)
    np.testing.assert_allclose(wide.loglikelihood(TEXT), loaded.loglikelihood(TEXT), atol=2e-5)
    assert wide.generate([TEXT], 4) == loaded.generate([TEXT], 4) == [loaded.generate(TEXT, 4)]


def test_a_short_text_is_refused(loaded):
    with pytest.raises(InputError, match="needs at least 2"):
        loaded.loglikelihood("A")


def test_perplexity_on_a_split_sequence_is_the_same(inputs):
    options = {"model": inputs["model"], "data": (inputs["heldout"],), "windows": (64,), "stride": 32}
    options |= {"max_tokens": 128}
    one, split = (perplexity(Perplexity(**options, mesh=m))["results"] for m in (MeshConfig(), MeshConfig(context=4)))
    assert split[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-5)
    with pytest.raises(InputError, match=r"window 66 .* mesh.context 4"):
        perplexity(Perplexity(**(options | {"windows": (66,)}), mesh=MeshConfig(context=4)))


def test_only_process_0_prints_and_writes(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(passkey, "measure_distances", lambda *_: {"length": 512, "k_max": 0, "k_max_strict": 0})
    monkeypatch.setattr(passkey, "table", lambda _: "the table")
    options = {"model": inputs["model"], "lengths": (512,), "output": str(tmp_path / "result.json")}
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        passkey.passkey(passkey.Passkey(**options))
        written = (tmp_path / "result.json").exists()
        assert (written, "the table" in capsys.readouterr().out) == ((True, True) if process == 0 else (False, False))
    assert json.loads((tmp_path / "result.json").read_text())["command"] == "passkey"


def test_columns_are_aligned():
    rows = [["task", "score"], ["a", "10.0"]]
    assert result.table(rows, left=1) == "task  score\na      10.0"
