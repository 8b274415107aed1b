"""Reads result files and assigns each to the label of its model in the report."""

import dataclasses
import glob
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from pi_jax.errors import InputError

COMMANDS = ("perplexity", "passkey", "ruler", "harness", "summarization")
"""Evaluations whose result files can be read."""
METRICS = "metrics"
"""Kind of a training log, metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A result file."""

    label: str
    """Name of the model in the report."""
    path: str
    kind: str
    """A command of `COMMANDS`, or `METRICS`."""
    data: Any
    """Content of the file; for a training log, the list of its lines."""


def gather(inputs: Sequence[str]) -> list[Result]:
    """Reads inputs of the form LABEL=PATH in the given order. A path is a file, a glob or a folder.

    Raises:
      InputError: if an input has no label, a path matches no files, or a file is not a result file. In a folder, other
        files are ignored.
    """
    results = []
    for text in inputs:
        label, equals, path = text.partition("=")
        if not equals or not label or not path:
            raise InputError(f"--inputs {text!r}: write LABEL=PATH, as in 'tuned=results/tuned-*.json'")
        found, named = _files(path)
        read = [(file, _read(file, required=named)) for file in found]
        results += [Result(label, file, *content) for file, content in read if content]
        if not any(content for _, content in read):
            raise InputError(f"--inputs {text!r}: the folder contains no result file of pi_jax")
    return results


def _files(path: str) -> tuple[list[str], bool]:
    """Returns the files of a path, and whether all of them must be result files (those of a folder need not be)."""
    folder = pathlib.Path(path)
    if folder.is_dir():
        return sorted(str(f) for f in folder.iterdir() if f.name.endswith((".json", ".jsonl"))), False
    found = [path] if folder.is_file() else sorted(glob.glob(path))
    if not found:
        raise InputError(f"--inputs: no file matches {path}")
    return found, True


def _read(file: str, required: bool) -> tuple[str, Any] | None:
    try:
        text = pathlib.Path(file).read_text()
        if file.endswith(".jsonl"):
            lines = [json.loads(line) for line in text.splitlines()]
            if lines and all(isinstance(line, dict) and "step" in line for line in lines):
                return METRICS, lines
        else:
            data = json.loads(text)
            if isinstance(data, dict) and data.get("command") in COMMANDS:
                return data["command"], data
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    if required:
        raise InputError(
            f"{file} is neither a result of python -m pi_jax.evaluate ({', '.join(COMMANDS)}) nor a metrics.jsonl"
        )
    return None
