"""Devices that are not here, to compile for: `AbstractDevice`s for tracing, whole topologies for XLA.

The CUDA ones need jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm; the TPU ones libtpu. Neither
needs a driver or a device: `make test-compiled` makes an environment that has them.
"""

import os

# Read when the plug-ins are loaded.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

GPU_NAMES = {
    (8, 0): "NVIDIA A100-SXM4-80GB",
    (8, 6): "NVIDIA GeForce RTX 3090",
    (9, 0): "NVIDIA H100 80GB HBM3",
}
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (9, 0): 232448}
"""Bytes that one program may take."""

# What XLA wants to know of a device that it cannot ask (a `GpuTargetConfig` in text form); values of the data sheets.
_GPU = """
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
_GPU_VALUES = {
    (8, 0): {"per_core": 167936, "cores": 108, "fpus": 64, "bandwidth": 2039040000000, "l2": 41943040, "clock": 1.41}
    | {"memory": 85100068864, "capability": "major: 8"},
    (9, 0): {"per_core": 233472, "cores": 132, "fpus": 128, "bandwidth": 3352320000000, "l2": 52428800, "clock": 1.98}
    | {"memory": 84942979072, "capability": "major: 9 feature_extension: ACCELERATED_FEATURES"},
}


def abstract_gpu(capability: tuple[int, int]):
    """A context in which code is traced and lowered as for one such GPU."""
    device = AbstractDevice(GPU_NAMES[capability], 1, "cuda")
    mesh = AbstractMesh((1,), ("device",), (AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def gpu_mesh(capability: tuple[int, int]) -> jax.sharding.Mesh:
    """A mesh of one A100 or H100, to compile for."""
    values = {"name": GPU_NAMES[capability], "per_block": SHARED_MEMORY[capability], **_GPU_VALUES[capability]}
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=_GPU.format(**values)
    )
    return _mesh(topology.devices[:1])


def tpu_mesh(name: str) -> jax.sharding.Mesh:
    """A mesh of one chip of a topology such as "v5e:2x2"."""
    return _mesh(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:1])


def _mesh(devices) -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("device",), (AxisType.Explicit,), devices=devices)
