"""Platform and compute capability that a computation is traced for; also for a mesh without the hardware."""

import re

import jax

# Compute capability of GPUs that are compiled for without being there, by what their name says.
_CAPABILITIES = {"A100": (8, 0), "A40": (8, 6), "A10": (8, 6), "RTX 30": (8, 6), "RTX 40": (8, 9), "L4": (8, 9)}
_CAPABILITIES |= {"H100": (9, 0), "H200": (9, 0), "GH200": (9, 0), "B200": (10, 0), "B300": (10, 3), "RTX 50": (12, 0)}


def _device():
    """The device of the mesh in use, as far as a mesh knows it; else the default one."""
    abstract, real = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None), jax.devices()[0]
    here = abstract is None or not abstract.platform or abstract.device_kind == real.device_kind
    return real if here else abstract


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    name = _device().platform
    return "gpu" if name in ("cuda", "rocm") else name


def compute_capability() -> tuple[int, int]:
    """Compute capability of the NVIDIA GPU in use: (9, 0) for an H100, (0, 0) for other vendors, (8, 0) if unknown."""
    device = _device()
    if told := getattr(device, "compute_capability", None):
        found = re.fullmatch(r"(\d+)\.(\d+)", told)
        return (int(found[1]), int(found[2])) if found else (0, 0)  # AMD's are names, such as gfx90a
    # Without the hardware there is only a name. The longest match wins: an A100 is not an A10.
    names = [name for name in _CAPABILITIES if name in device.device_kind]
    return _CAPABILITIES[max(names, key=len)] if names else (8, 0)
