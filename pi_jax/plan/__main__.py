"""`python -m pi_jax.plan`: checks whether the train step of an experiment fits in memory."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from pi_jax import atomic, cli, log
from pi_jax.config import Config, extend, parse
from pi_jax.errors import InputError
from pi_jax.parallel import sharding
from pi_jax.plan import topology
from pi_jax.plan.memory import as_json, plan, report, search
from pi_jax.train.resolve import resolve_model, with_builtin


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compile the train step of an experiment for hardware that is not present; print memory, FLOPs and collectives.

    `--config FILE` and all overrides are those of `pi_jax.train`. Exits with status 1 if the step does not fit."""

    topology: str
    """Device kind and number of devices, KIND:COUNT, such as a100-80gb:32, h100:8 or v5p:64 (chips)."""
    search: bool = False
    """Find the smallest number of devices, up to COUNT, that the step fits on, and the largest batch per device."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE.json")] = ""
    """Also write the result to this JSON file."""


def run(arguments: Arguments, config: Config) -> bool:
    """Prints the plan and returns whether the step fits."""
    cluster = topology.parse(arguments.topology)
    cluster.require_compiler()
    if arguments.output:
        atomic.require_writable(arguments.output)
    if config.model:  # a plan needs no weights, so the folder of the base model does not have to exist
        model = extend(config.model, config.rope)
    else:
        model, _ = resolve_model(with_builtin(config))
    compute = config.compute
    if compute.attention == "auto" and cluster.kind in ("h100", "h200") and not topology.has_cudnn():
        log.info("cuDNN is not installed (pip install nvidia-cudnn-cu13): planning with attention pallas_triton")
        config = dataclasses.replace(config, compute=dataclasses.replace(compute, attention="pallas_triton"))
    if arguments.search:
        tried = search(config, model, cluster)
        found = [p for p in tried if p.fits]
        result = found[-1] if found else tried[-1]
    else:
        mesh = sharding.make_mesh(config.mesh, cluster.devices())
        tried = [result := plan(config, model, mesh, cluster.chip.memory, str(cluster))]
    print(report(result, config, model))
    if arguments.output:
        atomic.write_json(
            arguments.output, as_json(result) | ({"tried": list(map(as_json, tried))} if arguments.search else {})
        )
    return result.fits


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""

    def command():
        words = list(sys.argv[1:] if argv is None else argv)
        arguments, rest = tyro.cli(Arguments, prog="python -m pi_jax.plan", args=words, return_unknown_args=True)
        if not rest:
            raise InputError("--config is missing: pass an experiment file, for example configs/7b_32k.py")
        config, _ = parse(rest, command="plan")
        if not run(arguments, config):
            sys.exit(1)

    cli.run(command)


if __name__ == "__main__":
    main()
