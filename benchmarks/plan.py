r"""Memory of every experiment in `configs/` on its intended hardware, and of the limits stated in docs/performance.md.

    python benchmarks/plan.py --output benchmarks/results/DATE-plan.json

Compiles only; needs `pip install 'pi_jax[compilers]'` and no device. Prints the table of docs/performance.md.
"""

import dataclasses
import datetime
import pathlib
import platform
from typing import Annotated

import tyro

from pi_jax import atomic, cli
from pi_jax.config import Config, extend, load_config
from pi_jax.parallel import sharding
from pi_jax.plan import memory, topology

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
GIB = 2**30
# Config, machine, what is changed.
ROWS = [(name, "a100-80gb:32", {}) for name in ("7b_8k", "13b_8k", "33b_8k")]
ROWS += [(f"{name}_direct", machine, changes) for name, machine, changes in ROWS]
ROWS += [(name, "a100-80gb:128", {}) for name in ("7b_16k", "7b_32k", "13b_16k", "13b_32k", "33b_16k", "65b_8k")]
ROWS += [("llama2_7b_32k", "h100:8", {}), ("llama3_8b_128k", "h100:32", {})]
_HOST = {"compute": {"remat": "offload"}}
ROWS += [("7b_32k", "h100:8", {"data": {"batch_size": 8}, **more}) for more in ({}, _HOST)]
ROWS += [("7b_32k", "h100:2", {"data": {"batch_size": 2}, **more}) for more in ({}, _HOST)]
ROWS += [
    ("7b_32k", "h100:1", {"data": {"batch_size": 1}, "optimizer": {"offload": True}, **more}) for more in ({}, _HOST)
]
_65B = {"data": {"window": 32768, "batch_size": 128}, "rope": {"factor": 16.0}}
ROWS += [("65b_8k", "h100:128", _65B | more) for more in ({}, _HOST)]
ROWS += [("7b_32k", "h100:8", {"data": {"batch_size": 8, "window": 65536}, "rope": {"factor": 32.0}})]
ROWS += [("7b_32k", "v5p:32", {"data": {"batch_size": 32}}), ("65b_8k", "v5p:64", {"data": {"batch_size": 64}})]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Memory of every experiment, as the compilers of its machine lay it out."""

    output: Annotated[str, tyro.conf.arg(metavar="FILE.json")] = ""
    kinds: tuple[str, ...] = tuple(topology.CHIPS)
    """Only these devices."""


def changed(config: Config, changes: dict[str, dict]) -> Config:
    """The config with fields of its sections replaced."""
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def _option(section: str, field: str, value: object) -> str:
    """The change as an option of `python -m pi_jax.train`."""
    name = f"--{section}.{field}".replace("_", "-")
    return f"`{name}`" if value is True else f"`{name} {value}`"


def main() -> None:
    args = tyro.cli(Benchmark)
    results = []
    columns = ["experiment", "changed", "machine", "rows x tokens", "parameters", "moments", "gradients", "kept"]
    columns += ["working", "peak", "host"]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for name, machine, changes in ROWS:
        cluster = topology.parse(machine)
        if cluster.kind not in args.kinds:
            continue
        config = changed(load_config(str(CONFIGS / f"{name}.py")), changes)
        if cluster.kind.startswith("h"):  # "auto" would be cuDNN there, which is not compiled for without its library
            config = changed(config, {"compute": {"attention": "pallas_triton"}})
        mesh = sharding.make_mesh(config.mesh, cluster.devices())
        found = memory.plan(config, extend(config.model, config.rope), mesh, cluster.chip.memory, machine)
        results.append({"config": name, "changes": changes} | memory.as_json(found))
        words = ", ".join(_option(s, k, v) for s, values in changes.items() for k, v in values.items())
        sizes = " | ".join(f"{size / GIB:.1f}" for size in (*found.parts.values(), found.peak, found.host))
        print(f"| {name} | {words} | {machine} | {found.rows} x {config.data.window} | {sizes} |", flush=True)
    if args.output:
        facts = {"benchmark": "plan", "date": f"{datetime.date.today()}", "machine": f"{platform.machine()}, no device"}
        atomic.write_json(args.output, facts | {"rows": results})


if __name__ == "__main__":
    cli.run(main)
