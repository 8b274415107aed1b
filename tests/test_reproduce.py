"""`reproduce/tables.py`: the commands for each table of the paper."""

import pathlib
import subprocess
import sys

import pytest

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
