"""XLA settings of train, evaluate and generate: flags by GPU generation, and the cache of compiled programs.

The user's own settings always win.
"""

import hashlib
import os
import pathlib
import platform
import re
import subprocess
import sys

import jax

# From NVIDIA's JAX-Toolbox, docs/GPU_performance.md; not measured by us.
_SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"  # gathers weights of a layer during the one before


_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"}  # JAX's 75 % would waste 13 GiB of 80


_ORDER = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # kernels start in the order the scheduler chose; harmful on Blackwell


XLA_SETTINGS = {
    8: ((_SCHEDULER,), _MEMORY | _ORDER),
    9: ((_SCHEDULER,), _MEMORY | _ORDER),
    10: ((_SCHEDULER,), _MEMORY),
}
"""GPU generation -> (XLA flags, environment variables)."""


def set_xla_options(env) -> None:
    """Applies `XLA_SETTINGS` for the local GPUs, except what the user has set."""
    if env.get("PI_JAX_XLA") == "off" or env.get("JAX_PLATFORMS", "cuda") == "cpu":
        return
    flags, variables = XLA_SETTINGS.get(_gpu_generation(), ((), {}))
    for name, value in variables.items():
        env.setdefault(name, value)
    given = env.get("XLA_FLAGS", "")
    wanted = [flag for flag in flags if flag.split("=")[0] not in given and known(flag)]
    if wanted:
        env["XLA_FLAGS"] = " ".join([given, *wanted]).strip()


def known(flag: str) -> bool:
    """Whether this XLA accepts a flag; tried in a subprocess, because an unknown flag aborts the process."""
    child = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=child, capture_output=True
    ).returncode


def _gpu_generation() -> int:
    """Major compute capability of the first GPU; 0: none."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.match(r"\s*(\d+)\.", found)
    return int(match[1]) if match else 0


def cache_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that the same command starts faster the next time.

    They are in `~/.cache/pi_jax` (or `$XDG_CACHE_HOME/pi_jax`), in a folder per kind of CPU, because XLA compiles for
    the instructions of the machine it runs on. `JAX_COMPILATION_CACHE_DIR` moves the cache; set but empty, it turns the
    cache off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pi_jax"
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none: compile every time
        return
    jax.config.update("jax_compilation_cache_dir", str(root / _cpu_kind()))


def _cpu_kind() -> str:
    """The same on machines whose CPUs have the same instructions."""
    try:
        flags = re.search(r"^(flags|Features)\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        flags = None
    described = flags[2] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
