"""Result files, each under the name that its model has in the report."""

import dataclasses
import glob
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from pi_jax.errors import InputError

COMMANDS = ("perplexity", "passkey", "ruler", "harness", "summarization")
METRICS = "metrics"
"""Kind of a run's log, metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One file."""

    label: str
    path: str
    kind: str
    """A command of `COMMANDS`, or `METRICS`."""
    data: Any
    """What the command wrote; for a log, its lines."""


def gather(inputs: Sequence[str]) -> list[Result]:
    """Reads LABEL=PATH, in the order given; a path is a file, a glob or a folder.

    Raises:
      InputError: for an input without a label, a path without files, or a file that no command of ours wrote. In a
        folder such files are passed over.
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
            raise InputError(f"--inputs {text!r}: there is no result file of pi_jax in it")
    return results


def _files(path: str) -> tuple[list[str], bool]:
    """Files, and whether they were named one by one."""
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
            f"{file} is not a result of python -m pi_jax.evaluate ({', '.join(COMMANDS)}) nor a metrics.jsonl"
        )
    return None
