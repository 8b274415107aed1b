"""`reproduce/tables.py`: every table of the paper, in miniature."""

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


@pytest.mark.slow
@pytest.mark.parametrize("table", range(1, 7))
def test_each_table_in_miniature(table, tmp_path):
    """All cells that the paper fills and a short run can reach have a number of ours."""
    words = ["--smoke", "--output", tmp_path / "out"]
    if table == 5:
        (tmp_path / "data.jsonl").write_text('{"question": "Is it?", "options": [" yes", " no"], "label": 0}\n' * 4)
        (tmp_path / "local.yaml").write_text(
            "task: local\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
            'doc_to_text: "{{question}}"\ndoc_to_choice: "{{options}}"\ndoc_to_target: label\n'
            "metric_list: [{metric: acc}]\nmetadata: {version: 1}\n"
        )
        words += ["--tasks", tmp_path / "local.yaml"]
    if table == 6:
        for name in ("train", "test"):
            lines = [json.dumps({"report": tiny.story(seed), "summary": tiny.story(seed)[:60]}) for seed in range(12)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        words += ["--govreport", tmp_path]
    done = make(table, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    written = (tmp_path / "out" / f"table{table}.md").read_text()
    rows = [line.split(" | ") for line in written.splitlines() if re.match(r"\| \d+B-", line)]
    assert rows and "no meaning" in written
    if table in (1, 2, 6):
        assert not any(cell.startswith("- /") for row in rows for cell in row[1:])
    if table in (3, 4):
        assert all(not row[2].startswith("-") for row in rows)


def test_a_dry_run_prints_the_commands(tmp_path):
    done = make(4, "--dry-run", "--only", "7B-8192-PI", "--output", tmp_path / "out")
    assert "train --config configs/7b_8k.py" in done.stdout and "--evaluate.passkey-lengths 8192" in done.stdout
    assert "- / 8,192" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "message"), [(["7"], "must be 1 to 6"), (["1"], "needs --text")])
def test_bad_options_are_one_sentence(words, message):
    done = make(*words)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr
