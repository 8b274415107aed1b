"""Every experiment in `configs/` compiled for the machines it is meant for: `make test-compiled`."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from pi_jax.config import extend, load_config
from pi_jax.parallel import sharding
from pi_jax.plan import memory, topology

pytestmark = pytest.mark.compiled

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
MACHINES = {path.stem: "a100-80gb:128" for path in CONFIGS.glob("*b_*.py")}
MACHINES |= {
    path.stem: "a100-80gb:32" for path in CONFIGS.glob("*b_8k*.py") if not path.stem.startswith("65b")
}  # the paper's
MACHINES |= {"llama2_7b_32k": "h100:8", "llama3_8b_128k": "h100:32"}


def _plan(name, machine, **changes):
    config = load_config(str(CONFIGS / f"{name}.py"))
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    cluster = topology.parse(machine)
    if machine.startswith("h100"):
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="pallas_triton"))
    mesh = sharding.make_mesh(config.mesh, cluster.devices())
    return memory.plan(config, extend(config.model, config.rope), mesh, cluster.chip.memory, machine)


@pytest.mark.parametrize("name, machine", MACHINES.items())
def test_every_experiment_fits_its_machine(name, machine):
    assert _plan(name, machine).fits


@pytest.mark.parametrize("name, machine", [("7b_32k", "v5p:32"), ("65b_8k", "v5p:64")])
def test_experiments_fit_tpus(name, machine):
    rows = {"7b_32k": 32, "65b_8k": 64}[name]
    assert _plan(name, machine, data={"batch_size": rows}, compute={"gradient_accumulation_steps": 1}).fits


@pytest.mark.parametrize(
    "name, machine, rows, limit",
    [("7b_32k", "h100:8", 8, 27), ("7b_32k", "h100:2", 2, 66), ("65b_32k", "h100:128", 128, 59)],
)
def test_memory_stays_below_what_others_take(name, machine, rows, limit):
    """With layers' inputs on the host; GiB."""
    model = {"7b_32k": "7b_32k", "65b_32k": "65b_8k"}[name]
    compute = {"remat": "offload", "gradient_accumulation_steps": 1}
    changes = {"data": {"batch_size": rows, "window": 32768}, "compute": compute}
    found = _plan(model, machine, **changes, rope={"factor": 16.0})
    assert found.peak <= limit * 2**30 and found.host > 0


def test_one_gpu_holds_7b_at_32k():
    changes = {"data": {"batch_size": 1}, "optimizer": {"offload": True}, "compute": {"remat": "offload"}}
    assert _plan("7b_32k", "h100:1", **changes).fits


def test_activations_grow_with_the_window_no_faster_than_the_window():
    peaks = [
        _plan("7b_32k", "h100:8", data={"batch_size": 8, "window": window}, rope={"factor": window / 2048})
        for window in (32768, 65536)
    ]
    fixed = sum(peaks[0].parts[name] for name in ("parameters", "moments", "gradients"))
    assert peaks[1].peak - fixed <= 2.1 * (peaks[0].peak - fixed)


@pytest.mark.parametrize(
    "config, topology, options",
    [
        ("65b_8k", "h100:8", ("--data.batch-size", "8", "--compute.gradient-accumulation-steps", "1")),
        ("llama2_7b_32k", "v5e:8", ()),
        ("tiny", "v5e:8", ()),
    ],
)
def test_the_command_prints_its_plan_and_nothing_else(config, topology, options):
    """Whether the step fits or not; the compilers themselves would print warnings and stack traces."""
    command = [sys.executable, "-m", "pi_jax.plan", "--config", f"configs/{config}.py", "--topology", topology]
    unset = ("JAX_PLATFORMS", "XLA_FLAGS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TF_CPP_MIN_LOG_LEVEL")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [*command, *options], cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == "" and done.returncode == (0 if config == "tiny" else 1)
    assert ("does NOT fit" in done.stdout) == (config != "tiny")
