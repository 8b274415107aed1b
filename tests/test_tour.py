"""The notebook docs/tour.ipynb: its code cells run in order, in one process, and show what the text says."""

import json
import os
import pathlib
import re
import subprocess
import sys
import traceback

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


def _run_cells(notebook: str) -> dict:
    """Executes all code cells in one namespace; prints the number and source of a cell that fails, and exits."""
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(pathlib.Path(notebook).read_text(encoding="utf-8"))["cells"], start=1):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        try:
            exec(compile(source, f"cell {number}", "exec"), namespace)
        except Exception:
            sys.exit(f"cell {number} failed:\n\n{source}\n\n{traceback.format_exc()}")
    return namespace


def _check_results(names: dict) -> None:
    import numpy as np

    unscaled, interpolated = names["before"]["base, unscaled"], names["before"]["base, interpolated"]
    after = names["after"]
    assert set(after) == {64, 128, 256}
    assert unscaled[256] > 1.5 * unscaled[64], unscaled  # the base model fails beyond its window
    assert after[256] < 0.75 * unscaled[256], (after, unscaled)
    assert all(after[window] < 0.5 * interpolated[window] for window in after), (after, interpolated)
    assert after[256] < 1.2 * after[64], after
    assert names["exported"].config == names["tuned"].config
    np.testing.assert_array_equal(names["exported"].logits(names["text"]), names["tuned"].logits(names["text"]))


def _run(notebook: pathlib.Path, tmp_path: pathlib.Path) -> subprocess.CompletedProcess:
    """This file as a script: the cells of the notebook and the checks of their results, on one device."""
    root = str(NOTEBOOK.parents[1])
    environment = {**os.environ, "MPLBACKEND": "Agg", "XLA_FLAGS": "", "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    command = [sys.executable, __file__, str(notebook)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_cell_runs_and_the_results_hold(tmp_path):
    done = _run(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_a_failing_cell_is_named(tmp_path):
    sources = ("markdown", "# Title"), ("code", "x = 1"), ("code", "y = x / 0  # the mistake")
    cells = [{"cell_type": kind, "source": [text]} for kind, text in sources]
    (tmp_path / "broken.ipynb").write_text(json.dumps({"cells": cells}))
    done = _run(tmp_path / "broken.ipynb", tmp_path)
    assert done.returncode == 1
    assert all(words in done.stderr for words in ("cell 3 failed", "the mistake", "ZeroDivisionError"))


def test_the_file_is_small_and_names_no_place_outside_the_repository():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4 and len(text) < 200_000
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    assert not re.findall(r"[\s'\"(]/\w+/", "\n".join(_strings(notebook)))


def _strings(value) -> list[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [f" {value}"]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for one in values for string in _strings(one)]


if __name__ == "__main__":
    _check_results(_run_cells(sys.argv[1]))
