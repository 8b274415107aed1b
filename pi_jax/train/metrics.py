"""Logs metrics to the console, JSONL, TensorBoard and Weights & Biases; computes model FLOPs and MFU.

Model FLOPs per trained token = 6 P + 6 L N H S. This counts forward and backward (3x the forward): 2 FLOPs per weight
used in a matrix product (P: all but the embedding lookup) and the two attention products over half the window S
(causal). Recomputation does not count. MFU = FLOPs per second / (devices x peak FLOP/s per device).
"""

import contextlib
import json
import pathlib
import time
from typing import Any

import jax

from pi_jax import atomic
from pi_jax.config import LoggingConfig, ModelConfig
from pi_jax.errors import InputError
from pi_jax.parallel import chips


def flops_per_token(model: ModelConfig, window: int) -> float:
    """Model FLOPs per trained token in sequences of `window` tokens, by the formula in the module docstring."""
    multiplied = model.num_parameters()
    if not model.tie_word_embeddings:
        multiplied -= model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_dim * window
    return 6.0 * multiplied + 6.0 * attention


def peak_flops(config: LoggingConfig) -> float | None:
    """Peak FLOP/s of all devices together; None if unknown."""
    kind = jax.devices()[0].device_kind
    tflops = config.peak_tflops or chips.peak_tflops(kind)
    return tflops * 1e12 * jax.device_count() or None


def last_record(folder: pathlib.Path) -> dict[str, float] | None:
    """Returns the values of the last step in metrics.jsonl that has a loss; None if there is none."""
    path = folder / "metrics.jsonl"
    records = [r for r in _records(path) if "loss" in r] if path.exists() else []
    return {k: v for k, v in records[-1].items() if k not in ("step", "time")} if records else None


def evaluated(folder: pathlib.Path, step: int) -> bool:
    """Whether metrics.jsonl has the results of an evaluation after a step."""
    path = folder / "metrics.jsonl"
    records = _records(path) if path.exists() else []
    return any(r["step"] == step and any("/" in name for name in r) for r in records)


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The valid lines of a JSONL file of metrics."""
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append(record)
    return found


class Metrics:
    """Context manager that writes each record to all sinks, on process 0 only."""

    def __init__(self, folder: pathlib.Path, config: LoggingConfig, run_config: dict[str, Any], first_step: int):
        self._sinks = []
        if jax.process_index():
            return
        self._jsonl = _Jsonl(folder / "metrics.jsonl", first_step)
        self._sinks.append(self._jsonl)
        if config.tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", first_step))
        if config.wandb_project:
            self._sinks.append(_Wandb(folder, config.wandb_project, run_config))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step."""
        for sink in self._sinks:
            sink.write(step, values)


class _Jsonl:
    def __init__(self, path: pathlib.Path, first_step: int):
        # Drop what an interrupted run logged after its last checkpoint: the resumed run writes these steps again.
        # A line that a crash damaged is dropped, too.
        kept = [record for record in _records(path) if record["step"] <= first_step] if path.exists() else []
        with atomic.new_file(path) as file:
            file.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: pathlib.Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: pathlib.Path, project: str, run_config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise InputError("logging.wandb_project is set but wandb is not installed: pip install wandb") from None
        self._run = wandb.init(project=project, dir=str(folder), name=folder.name, config=run_config, resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def console_line(step: int, steps: int, values: dict[str, float], seconds_left: float) -> str:
    """Formats the values of a step as a line for the console."""
    skipped = f"  skipped {values['skipped_steps']:.0f}" if values.get("skipped_steps") else ""
    mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.2f}  "
        f"lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tok/s  "
        f"{values['tflops_per_second']:.3g} TFLOP/s{mfu}  {duration(seconds_left)} left{skipped}"
    )


def duration(seconds: float) -> str:
    """Formats seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
