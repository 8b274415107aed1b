"""Summaries: prompts cut as the paper says, the same draws again, ROUGE as rouge-score has it."""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rouge_score import rouge_scorer

from pi_jax.config import ComputeConfig
from pi_jax.data.prepare import SUMMARIZE
from pi_jax.data.tokenizer import load_tokenizer
from pi_jax.evaluate import __main__ as evaluate
from pi_jax.evaluate import summarization
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config

RECORDS = [
    {"report": "The grass is green. " * 3, "summary": "Grass is green."},
    {"report": "The sky was blue and the roads were long. " * 4, "summary": "Long roads.\nBlue sky."},
    {"report": "", "summary": "Nothing."},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, inputs, mesh):
    from pi_jax.convert.formats import hf

    folder = tmp_path_factory.mktemp("model") / "hf"
    with jax.set_mesh(mesh):
        config = tiny_model_config(max_position_embeddings=256)
        model = Llama(config, ComputeConfig(dtype="float32"), jax.random.key(0))
        hf.save(jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, model), str(folder), inputs["tokenizer"])
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet")
    return folder


def _run(model, data, output, *more):
    words = ["--model", model, "--data", str(data), "--max-input", "70", "--max-new-tokens", "12"]
    evaluate.main(["summarization", *words, "--output", str(output), *more])
    return json.loads(output.read_text())


def test_the_command(model_folder, data, tmp_path, capsys):
    report = _run(model_folder, data / "a.jsonl", tmp_path / "a.json")
    again = _run(model_folder, data / "a.parquet", tmp_path / "b.json")
    other = _run(model_folder, data / "a.jsonl", tmp_path / "c.json", "--seed", "1")
    told = capsys.readouterr()
    assert "a.jsonl:3: the document or its summary is empty" in told.err
    assert report["results"]["documents"] == 2 and report["protocol"]["temperature"] == 0.5
    tokenizer = load_tokenizer(model_folder)
    around = len(tokenizer(SUMMARIZE.replace("{}", ""), add_special_tokens=False)["input_ids"])
    lengths = [min(70, len(r["report"])) for r in RECORDS[:2]]  # a token is a byte
    assert [s["prompt_tokens"] for s in report["summaries"]] == [around + n for n in lengths]

    def texts(r):
        return [s["summary"] for s in r["summaries"]]

    assert texts(report) == texts(again) != texts(other)
    assert len(set(texts(report))) == 2
    assert f"rouge1 {100 * report['results']['rouge1']['f']:.2f}" in told.out


def test_rouge_is_rouge_scores():
    references = ["The roads were long.\nThe sky was blue.", "Grass is green."]
    found = ["A long road under blue skies.\nRoads.", "The grass is greener."]
    means, each = summarization.rouge(references, found)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for name in summarization.METRICS:
        expected = [scorer.score(r, s)[name] for r, s in zip(references, found, strict=True)]
        assert [e[name] for e in each] == [s.fmeasure for s in expected]
        np.testing.assert_allclose(means[name]["f"], np.mean([s.fmeasure for s in expected]))
        np.testing.assert_allclose(means[name]["recall"], np.mean([s.recall for s in expected]))
    assert 0 < means["rouge2"]["f"] < means["rouge1"]["f"] < 1
    same, _ = summarization.rouge(references, references)
    assert all(same[name]["f"] == 1 for name in summarization.METRICS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--document-field", "text"], "line 1 has no field 'text': its fields are 'report', 'summary'"),
        (["--max-input", "0"], "--max-input is 0: it must be positive"),
        (["--output", "/proc/none/x.json"], "/proc/none/x.json cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(model_folder, data, tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.setattr(summarization, "answer", lambda *_, **__: ["one", "two"])
    with pytest.raises(SystemExit) as stop:
        _run(model_folder, data / "a.jsonl", tmp_path / "x.json", *more)
    assert stop.value.code == 2 and message in capsys.readouterr().err
