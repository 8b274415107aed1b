"""`reproduce/tables.py`: the commands for each table of the paper."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from pi_jax import tiny

ROOT = pathlib.Path(__file__).parent.parent


def make(*words):
    command = [sys.executable, "reproduce/tables.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_dry_run_prints_the_commands(tmp_path):
    done = make(4, "--dry-run", "--only", "7B-8192-PI", "--output", tmp_path / "out")
    assert "train --config configs/7b_8k.py" in done.stdout and "--evaluate.passkey-lengths 8192" in done.stdout
    assert "- / 8,192" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["7"], "must be 1 to 6"), (["1"], "needs --text"), (["4", "--only", "8B"], "table 4 has 7B-8192-FT")],
)
def test_bad_options_are_one_sentence(words, message):
    done = make(*words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


LOCAL_TASK = """task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""


@pytest.mark.slow
def test_all_tables_in_miniature(tmp_path):
    """One after the other in one folder, so that they share runs."""
    (tmp_path / "data.jsonl").write_text('{"question": "Is it?", "options": [" yes", " no"], "label": 0}\n' * 4)
    (tmp_path / "local.yaml").write_text(LOCAL_TASK.format(folder=tmp_path))
    for name in ("train", "test"):
        lines = [json.dumps({"report": tiny.story(seed), "summary": tiny.story(seed)[:60]}) for seed in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    extra = {5: ["--tasks", tmp_path / "local.yaml"], 6: ["--govreport", tmp_path]}
    for table in (1, 2, 3, 4, 5, 6):
        done = make(table, "--smoke", "--output", tmp_path / "out", *extra.get(table, []))
        assert done.returncode == 0, done.stdout + done.stderr
        written = (tmp_path / "out" / f"table{table}.md").read_text()
        rows = [line.split(" | ") for line in written.splitlines() if re.match(r"\| \d+B-", line)]
        assert rows and "no meaning" in written
        if table in (1, 2, 6):
            assert not any(cell.startswith("- /") for row in rows for cell in row[1:]), written
        if table in (3, 4):
            assert not any(row[2].startswith("-") for row in rows), written
        assert done.stdout.count(" train ") == {1: 2, 6: 2}.get(table, 0)


def test_a_run_without_the_numbers_of_a_table_is_refused(tmp_path):
    (tmp_path / "7B-8192-PI").mkdir()
    (tmp_path / "7B-8192-PI" / "result.json").write_text("{}")
    (tmp_path / "7B-8192-PI" / "metrics.jsonl").write_text('{"step": 200, "passkey/8192": 8192}\n')
    done = make(3, "--only", "7B-8192-PI", "--output", tmp_path, "--text", "none.txt")
    assert done.returncode == 2 and "has no perplexity/8192" in done.stderr
    done = make(4, "--only", "7B-8192-PI", "--output", tmp_path)
    assert done.returncode == 0 and "8,192 / 8,192" in done.stdout
