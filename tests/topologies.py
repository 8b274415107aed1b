"""Devices to compile for without the hardware: `AbstractDevice`s for tracing, whole topologies for XLA.

The CUDA ones need jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm; the TPU ones libtpu. Neither
needs a driver or a device: `make test-compiled` makes an environment that has them.
"""

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pi_jax.plan import topology

GPU_NAMES = {
    (8, 0): "NVIDIA A100-SXM4-80GB",
    (8, 6): "NVIDIA GeForce RTX 3090",
    (9, 0): "NVIDIA H100 80GB HBM3",
}
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (9, 0): 232448}
"""Bytes that one program may take."""


def abstract_gpu(capability: tuple[int, int]):
    """A context in which code is traced and lowered as for one such GPU."""
    device = AbstractDevice(GPU_NAMES[capability], 1, "cuda")
    mesh = AbstractMesh((1,), ("device",), (AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def gpu_mesh(capability: tuple[int, int]) -> jax.sharding.Mesh:
    """A mesh of one A100 or H100, to compile for."""
    return _mesh(topology.parse({(8, 0): "a100-80gb:1", (9, 0): "h100:1"}[capability]).devices())


def tpu_mesh(name: str) -> jax.sharding.Mesh:
    """A mesh of one chip of a topology such as "v5e:2x2"."""
    return _mesh(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:1])


def _mesh(devices) -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("device",), (AxisType.Explicit,), devices=devices)
