"""Speed and memory of conversions of a synthetic model, compared with `cp` of the same bytes on the same disk.

    python benchmarks/convert.py --folder build/convert --output benchmarks/results/NAME.json

The model has the shape of LLaMA-2-7B and random bfloat16 weights (13.5 GB). It needs three times that disk space; all
files are removed at the end. Every measurement runs in a separate process, whose peak resident memory is reported by
the kernel, and the files that it reads are evicted from the page cache first. A rate is the size of the model over the
time until everything is on disk (including a final `sync`), relative to the mean of three `cp` in the same run.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import tyro

from pi_jax import atomic, cli
from pi_jax.atomic import new_folder
from pi_jax.config import ModelConfig
from pi_jax.convert import model_card, param_mapping
from pi_jax.convert.formats import hf

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Convert a synthetic model between all forms."""

    folder: str = "build/convert"
    """Made, filled and removed."""
    layers: int = 32
    """32 for the 7B shape."""
    output: str = ""
    """JSON file for the result."""


class Synthetic:
    """A reader that generates random weights; all tensors of a shape have the same values, rolled."""

    def __init__(self, config: ModelConfig):
        self.order = param_mapping.tensors(config)
        self.dtypes = dict.fromkeys((t.name for t in self.order), np.dtype(ml_dtypes.bfloat16))
        self._values = {
            shape: (0.02 * np.random.default_rng(0).standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
            for shape in {t.shape for t in self.order}
        }

    def read(self, tensor: param_mapping.Tensor, index=(...,)) -> np.ndarray:
        """See `pipeline.Reader`."""
        return np.roll(self._values[tensor.shape], (tensor.layer or 0) + len(tensor.name), axis=0)[index]


def seven_b(layers: int) -> ModelConfig:
    """The shape of LLaMA-2-7B."""
    return ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


def forget(folder: pathlib.Path) -> None:
    """Evicts the files of a folder from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(source: pathlib.Path, command: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak GiB of a process, until its files are on disk."""
    forget(source)
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"error: {' '.join(command)} failed")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / GIB


def main(args: Benchmark) -> None:
    """Makes the model, converts, measures, removes."""
    folder = pathlib.Path(args.folder)
    config = seven_b(args.layers)
    sizes = [2 * int(np.prod(t.shape)) for t in param_mapping.tensors(config)]
    stacked = max(
        2 * int(np.prod(t.shape)) * (args.layers if t.spec.stacked else 1) for t in param_mapping.tensors(config)
    )
    bounds = {"between HF and Meta": max(sizes) * 3 / GIB + 1, "to and from a checkpoint": stacked * 2 / GIB + 1}
    try:
        subprocess.run([sys.executable, __file__, "make", str(folder / "model"), str(args.layers)], check=True)
        rows = []

        def measure(name: str, source: str, command: list[str]) -> None:
            seconds, busy, peak = run(folder / source, command)
            rows.append(
                {
                    "what": name,
                    "seconds": round(seconds, 1),
                    "processor seconds": round(busy, 1),
                    "load": round(os.getloadavg()[0], 1),
                    "GB/s": round(sum(sizes) / 1e9 / seconds, 3),
                    "peak GiB": round(peak, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)

        def copy() -> None:
            measure("cp", "model", ["cp", "-r", str(folder / "model"), str(folder / "copy")])
            shutil.rmtree(folder / "copy")

        copy()
        for source, form in (("model", "meta"), ("meta", "hf"), ("model", "orbax"), ("orbax", "hf")):
            for verify in ("--no-verify", "--verify"):
                target = folder / (form if verify == "--verify" and form != "hf" else "thrown-away")
                command = [sys.executable, "-m", "pi_jax.convert", "--source", str(folder / source)]
                command += ["--target", str(target), "--format", form, verify]
                measure(f"{'hf' if source == 'model' else source} to {form}, {verify}", source, command)
                shutil.rmtree(folder / "thrown-away", ignore_errors=True)
            if source != "model":
                shutil.rmtree(folder / source)
                copy()
        copies = [row["seconds"] for row in rows if row["what"] == "cp"]
        for row in rows:
            row["rate / cp"] = round(sum(copies) / len(copies) / row["seconds"], 2)
        report = {
            "benchmark": "convert",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "parameters": config.num_parameters(),
            "GB": round(sum(sizes) / 1e9, 2),
            "allowed peak GiB": {k: round(v, 2) for k, v in bounds.items()},
            "rows": rows,
        }
        print(json.dumps(report, indent=2))
        if args.output:
            atomic.write_json(args.output, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        shape = seven_b(int(sys.argv[3]))
        with new_folder(sys.argv[2]) as made:
            hf.write(Synthetic(shape), shape, made, hf.SHARD_BYTES, model_card.Facts(), None, verify=False)
    else:
        cli.run(lambda: main(tyro.cli(Benchmark)))
