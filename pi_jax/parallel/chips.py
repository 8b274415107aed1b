"""The hardware table: memory, peak FLOP/s and compile-time description of each supported GPU and TPU."""

import dataclasses

GIB = 2**30


GPUS_PER_HOST = 8


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
    """Dimensions of a TPU's torus."""
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


GPU_TARGET = """
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

# Dense bf16 peak of one device, TFLOP/s, from the makers' data sheets; the key is part of `device_kind`.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
}


def peak_tflops(device_kind: str) -> float:
    """Dense bf16 peak of a device by its `device_kind`, in TFLOP/s; 0 for an unknown one."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_kind), 0.0)
