"""Clusters that are not here: topologies to compile for, by a name such as "h100:8" or "v5p:64".

XLA compiles for a GPU it cannot ask if it is told what it would have asked (a `GpuTargetConfig`), and libtpu for any
TPU by its name. Neither needs a driver or a device, only `pip install 'pi_jax[compilers]'`.
"""

import dataclasses
import importlib.util
import math
import os

# Read when the plug-ins are loaded.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from jax.experimental import topologies

from pi_jax.errors import InputError

GIB = 2**30
_GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device; values of the makers' data sheets."""

    name: str
    """As JAX calls it (`device_kind`)."""
    memory: int
    """Bytes that a program may use."""
    gpu: dict[str, str | int | float] | None = None
    """What XLA asks of a GPU; None: a TPU."""
    dimensions: int = 3
    """Of a TPU's torus."""
    largest: int = 8192
    """Chips of the largest slice."""


def _gpu(name: str, memory: int, **values) -> Chip:
    return Chip(name, memory, values | {"name": name, "memory": memory})


_A100 = {"per_core": 167936, "per_block": 166912, "cores": 108, "fpus": 64, "l2": 41943040, "clock": 1.41}
_A100 |= {"bandwidth": 2039040000000, "capability": "major: 8"}
_H100 = {"per_core": 233472, "per_block": 232448, "cores": 132, "fpus": 128, "l2": 52428800, "clock": 1.98}
_H100 |= {"bandwidth": 3352320000000, "capability": "major: 9 feature_extension: ACCELERATED_FEATURES"}
CHIPS = {
    "a100-80gb": _gpu("NVIDIA A100-SXM4-80GB", 85100068864, **_A100),
    "a100-40gb": _gpu("NVIDIA A100-SXM4-40GB", 42297786368, **_A100 | {"bandwidth": 1555000000000}),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 84942979072, **_H100),
    "h200": _gpu("NVIDIA H200", 150040215552, **_H100 | {"bandwidth": 4800000000000}),
    "v5e": Chip("TPU v5 lite", 16 * GIB, dimensions=2, largest=256),
    "v5p": Chip("TPU v5", 95 * GIB),
    "v6e": Chip("TPU v6 lite", 32 * GIB, dimensions=2, largest=256),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {per_core} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {per_block} cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one kind."""

    kind: str
    """A key of `CHIPS`."""
    count: int
    """Devices: GPUs, or TPU chips (not cores)."""

    @property
    def chip(self) -> Chip:
        """What one device is."""
        return CHIPS[self.kind]

    def __str__(self):
        return f"{self.kind}:{self.count}"

    def devices(self) -> list:
        """Devices to compile for.

        Raises:
          InputError: if the compiler for them is not installed.
        """
        if self.chip.gpu:
            _require_installed("jax_cuda13_plugin", "NVIDIA GPUs")
            hosts = math.ceil(self.count / _GPUS_PER_HOST)
            shape = f"1x{hosts}x{self.count // hosts}"
            return list(
                topologies.get_topology_desc(
                    platform="cuda", topology_name=shape, topology=shape, target_config=_TARGET.format(**self.chip.gpu)
                ).devices
            )
        _require_installed("libtpu", "TPUs")
        if self.count == 1:  # no slice is smaller than a host
            return Topology(self.kind, 4).devices()[:1]
        shape = "x".join(map(str, self._torus()))
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{self.kind}:{shape}").devices)

    def _torus(self) -> tuple[int, ...]:
        """The most cubic shape of a slice; sides are powers of two."""
        sides = [1] * self.chip.dimensions
        for _ in range(self.count.bit_length() - 1):
            sides[sides.index(min(sides))] *= 2
        return tuple(sorted(sides, reverse=self.chip.dimensions == 3))


def parse(text: str) -> Topology:
    """'h100:8' as a topology.

    Raises:
      InputError: if there is no such device, or no such number of them.
    """
    kind, _, count = text.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology {text}: there is no {kind!r}; write KIND:COUNT with one of {', '.join(CHIPS)}")
    if not count.isdecimal() or not int(count):
        raise InputError(f"--topology {text}: write {kind}:COUNT with the number of devices, for example {kind}:8")
    number, chip = int(count), CHIPS[kind]
    if chip.gpu and number > _GPUS_PER_HOST and number % _GPUS_PER_HOST:
        raise InputError(f"--topology {text}: hosts have {_GPUS_PER_HOST} GPUs, so more than that must be a multiple")
    if not chip.gpu and (number & (number - 1) or number > chip.largest or number == 2):
        raise InputError(
            f"--topology {text}: slices of {kind} have 1, 4, 8, 16 ... {chip.largest} chips (chips, not cores)"
        )
    return Topology(kind, number)


def _require_installed(module: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"the compiler for {what} is not installed: pip install 'pi_jax[compilers]'")


def has_cudnn() -> bool:
    """Whether attention by cuDNN can be compiled."""
    try:
        return importlib.util.find_spec("nvidia.cudnn") is not None
    except ModuleNotFoundError:
        return False
