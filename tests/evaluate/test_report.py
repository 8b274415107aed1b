"""The report from real result files: what stands in it is what stands in them."""

import json
import pathlib
import re
import sys

import pytest

from pi_jax.evaluate import __main__ as evaluate
from pi_jax.evaluate.report.page import Table

REAL = pathlib.Path("benchmarks/results/2026-11-23-smollm2-16k")


def _write(folder, name, command, **content):
    about = {"model": "m", "rope": "Linear(theta=10000.0, factor=2.0)", "model_window": 16384, "device": "1 x cpu"}
    (folder / name).write_text(json.dumps({"command": command, **about, "protocol": {"dtype": "float32"}, **content}))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A folder as the other commands leave it, and a file that is none of theirs."""
    folder = tmp_path_factory.mktemp("results")
    grid = {"depths": [0.0, 0.5, 1.0], "lengths": [1024, 2048], "success": [[1.0, 0.9], [0.8, 0.0], [1.0, 0.7]]}
    by_distance = [{"k": 512 * i, "distance": 512.0 * i, "success": 1 / i} for i in (1, 2, 3, 4)]
    entry = {"length": 2048, "k_max": 1536, "k_max_strict": 512, "success": 0.5, "by_distance": by_distance}
    _write(folder, "passkey.json", "passkey", results=[entry], grid=grid)
    scores = [{"length": n, "average": a, "tasks": {"niah_single_1": a + 1}} for n, a in ((4096, 90.0), (8192, 80.0))]
    _write(folder, "ruler.json", "ruler", results=scores, effective_length=4096)
    tasks = {"boolq": {"acc": 0.7312, "acc_stderr": 0.01, "questions": 99}, "other": {"acc": 0.5, "questions": 9}}
    _write(folder, "harness.json", "harness", results=tasks)
    rouge = {
        name: {"precision": 0.1, "recall": 0.2, "f": f}
        for name, f in zip(("rouge1", "rouge2", "rougeL", "rougeLsum"), (0.6004, 0.28, 0.295, 0.3), strict=True)
    }
    _write(folder, "summaries.json", "summarization", results={"documents": 972, **rouge})
    lines = [{"step": s, "loss": 3.0 - s / 1000, "perplexity/8192": 20.0 - s / 100} for s in (200, 400, 600)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def report(others, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "report.html"
    inputs = [f"original={REAL}/base-*.json", f"original={REAL}/truncated-*.json", f"untuned={REAL}/untuned-*.json"]
    inputs += [f"tuned & more={REAL}/tuned-*.json*", f"tuned & more={others}"]
    evaluate.main(["report", "--inputs", *inputs, "--output", str(page), "--title", "A < B"])
    return page.read_text(), page.with_suffix(".md").read_text()


def _row(markdown, label, heading):
    part = markdown[markdown.index(heading) :]
    line = next(line for line in part.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip().strip("*") for cell in line.strip("| ").split("|")][1:]


def test_perplexities_are_those_of_the_files(report):
    _, markdown = report
    found = {
        name: json.loads((REAL / f"{name}-16384.json").read_text())["results"][0]
        for name in ("base", "truncated", "tuned")
    }
    heading = "## Perplexity: moby_dick.txt, 16,383 tokens"
    assert _row(markdown, "original ", heading) == [f"{found[n]['perplexity']:.2f}" for n in ("truncated", "base")]
    assert _row(markdown, "tuned & more ", heading) == ["-", f"{found['tuned']['perplexity']:.2f}"]
    expected = [f"{b['perplexity']:.2f}" for b in found["tuned"]["by_position"]]
    assert _row(markdown, "tuned & more, window 16,384", heading) == expected
    assert "stride 2,048: original, window 8,192" in markdown  # protocols that differ are told apart
    assert "## Perplexity: 3 documents, 12,285 tokens" in markdown  # and other text has a table of its own


def test_the_papers_tables_are_there(report):
    _, markdown = report
    assert _row(markdown, "tuned & more, 8192", "Table 3") == ["18.00", "16.00", "14.00"]
    assert _row(markdown, "tuned & more", "Effective window") == ["2,048", "1,536", "512"]
    assert _row(markdown, "tuned & more", "Average score (0 to 100)") == ["90.00", "80.00", "4,096"]
    assert _row(markdown, "niah_single_1", "**By task**") == ["91.0", "81.0"]
    assert _row(markdown, "tuned & more", "(Table 5)") == ["73.1", "50.0"] and "| model | BoolQ | other |" in markdown
    assert _row(markdown, "tuned & more", "(Table 6)") == ["972", "60.0", "28.0", "29.5", "30.0"]


def test_the_page_is_whole_in_itself(report):
    page, _ = report
    assert page.count("<svg") == 6 == page.count("<figure>")
    outside = re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)[^)]*\)|@import', page)
    assert not outside and "<script" not in page
    assert "A &lt; B" in page and "tuned &amp; more" in page and "<title>A < B" not in page
    for words in ("position in the document (tokens)", "perplexity", "depth of the key", "prompt length in tokens"):
        assert words in page
    assert page.count('class="protocol"') == page.count("<section")


def test_the_best_number_of_a_column_is_marked():
    table = Table(["model", "a", "b"], [["x", 2.0, 5.0], ["y", 1.5, None]], best="low")
    assert [[best for _, best in row] for row in table.shown()] == [[False, False, False], [False, True, False]]
    assert [[text for text, _ in row] for row in table.shown()] == [["x", "2.00", "5.00"], ["y", "1.50", "-"]]


def test_without_matplotlib_the_extra_is_named(others, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("pi_jax.evaluate.report")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["report", "--inputs", f"a={others}", "--output", str(tmp_path / "x.html")])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: the figures of a report need matplotlib: pip install 'pi_jax[eval]'\n"


def test_the_markdown_must_be_writable_before_a_file_is_read(tmp_path, capsys):
    (tmp_path / "x.md").mkdir()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["report", "--inputs", "a=nothing.json", "--output", str(tmp_path / "x.html")])
    assert stop.value.code == 2 and "x.md cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nothing.json"], "write LABEL=PATH"),
        (["a=nothing.json"], "no file matches nothing.json"),
        (["a=pyproject.toml"], "pyproject.toml cannot be read as JSON"),
        (["a=OTHER/config.json"], "config.json is neither a result of python -m pi_jax.evaluate"),
        (["a=tests"], "the folder contains no result file of pi_jax"),
    ],
)
def test_bad_input_is_one_sentence(inputs, message, others, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        words = [i.replace("OTHER", str(others)) for i in inputs]
        evaluate.main(["report", "--inputs", *words, "--output", str(tmp_path / "x.html")])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())
