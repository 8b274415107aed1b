"""The result of an evaluation: its schema, writing it as JSON, and printing tables."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax

from pi_jax import atomic
from pi_jax.config import ModelConfig


def report(command: str, path: str, config: ModelConfig, protocol: dict[str, Any], **found: Any) -> dict[str, Any]:
    """Builds the result that an evaluation writes with `--output`: model, protocol, devices and measurements.

    Args:
      command: name of the evaluation.
      path: folder of the model.
      config: architecture of the model, including the applied scaling.
      protocol: all settings that must be equal for two results to be comparable.
      found: `results`, and other fields specific to the evaluation.
    """
    return {
        "command": command,
        "model": path,
        "rope": f"{config.rope}",
        "model_window": config.max_position_embeddings,
        "original_window": config.original_window,
        "protocol": protocol,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **found,
    }


def write(path: str, value: Any) -> None:
    """Writes `value` as JSON from process 0. Does nothing if the path is empty."""
    if path and jax.process_index() == 0:
        atomic.write_json(path, value)


def effective_length(lengths: Sequence[int], scores: Sequence[float], threshold: float) -> int:
    """The largest length such that it and all shorter ones reach the threshold; 0 if none does."""
    passed = itertools.takewhile(lambda pair: pair[1] >= threshold, sorted(zip(lengths, scores, strict=True)))
    return max((length for length, _ in passed), default=0)


def table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Formats cells as a table. The first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)
