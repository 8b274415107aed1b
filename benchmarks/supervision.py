"""What it costs that a run can be stopped and watched: lock, watchdog, and waiting for the device two steps behind.

    python benchmarks/supervision.py --output benchmarks/results/NAME.json

One run measures both sides, in turns: the compiled step of the tiny config in a bare loop that waits for the device
every tenth step, and the same step in the supervised loop of `pi_jax.train`. A turn is short, and each pair of turns
gives a ratio, so that other load on the machine affects both sides; the result is the median of the ratios. Both sides
read a batch that was made before.
"""

import collections
import dataclasses
import datetime
import pathlib
import platform
import tempfile
import time

import jax
import numpy as np
import tyro

from pi_jax import atomic
from pi_jax.config.cli import load_config
from pi_jax.model import Llama
from pi_jax.parallel import placement, supervisor
from pi_jax.train import loop
from pi_jax.train.abstract import columns
from pi_jax.train.resolve import resolve
from pi_jax.train.step import init_train_state, make_step


@dataclasses.dataclass(frozen=True)
class Supervision:
    """Step time of the supervised loop against a bare one, in one run."""

    steps: int = 10
    """Steps in a turn."""
    turns: int = 60
    """Turns of each side."""
    output: str = ""
    """JSON file for the result."""


def main(args: Supervision) -> float:
    """Prints and returns the ratio of the step times."""
    config = load_config(str(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"))
    experiment = resolve(config)
    mesh, step_fn, names = experiment.mesh, make_step(experiment.optimizer), columns(config.data)
    seconds = collections.defaultdict(list)
    with (
        jax.set_mesh(mesh),
        tempfile.TemporaryDirectory() as folder,
        atomic.lock(pathlib.Path(folder, ".lock"), "the benchmark"),
    ):
        local = placement.local_batch_slice(mesh, config.data.batch_size)
        batch = {k: experiment.pipeline.batch(0, local)[k] for k in names}
        batch = placement.put_batch(mesh, batch, local.start, config.data.batch_size)
        model = Llama(experiment.model, config.compute, jax.random.key(0))
        state = init_train_state(model, experiment.optimizer)
        state, values = step_fn(state, batch)

        for turn in range(2 * args.turns):
            jax.block_until_ready(state)
            if turn % 4 in (1, 2):  # the order within a pair alternates
                with supervisor.supervise() as supervised:
                    clock = loop._Clock(experiment, 0, supervised)
                    began = time.perf_counter()
                    for step in range(1, args.steps + 1):
                        state, values = step_fn(state, batch)
                        clock.add(step, values)
                        if step % 10 == 0:
                            clock.means(step)
                    seconds["supervised"].append((time.perf_counter() - began) / args.steps)
            else:
                kept = []
                began = time.perf_counter()
                for step in range(1, args.steps + 1):
                    state, values = step_fn(state, batch)
                    kept.append(values)
                    if step % 10 == 0:
                        _ = {k: float(np.mean([jax.device_get(v[k]) for v in kept])) for k in values}
                        kept = []
                seconds["bare"].append((time.perf_counter() - began) / args.steps)
    medians = {side: float(np.median(times)) for side, times in seconds.items()}
    ratios = np.array(seconds["supervised"]) / np.array(seconds["bare"])
    ratio, low, high = (float(np.percentile(ratios, p)) for p in (50, 25, 75))
    print(f"bare {medians['bare'] * 1e3:.2f} ms, supervised {medians['supervised'] * 1e3:.2f} ms a step")
    print(f"x {ratio:.4f}, quartiles of {len(ratios)} pairs of turns {low:.4f} to {high:.4f}")
    if args.output:
        about = {
            "date": f"{datetime.date.today()}",
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "machine": f"{platform.machine()}, {jax.device_count()} devices",
        }
        result = {"ratio": ratio, "quartiles": [low, high], "seconds_per_step": medians}
        atomic.write_json(args.output, about | result | dataclasses.asdict(args))
    return ratio


if __name__ == "__main__":
    main(tyro.cli(Supervision))
