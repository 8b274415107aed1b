"""Topologies for ahead-of-time compilation without the hardware, named as "h100:8" or "v5p:64".

XLA compiles for a GPU that is not present if it is given its properties (a `GpuTargetConfig`); libtpu compiles for any
TPU by its name. Neither needs a driver or a device, only `pip install 'pi_jax[compilers]'`.
"""

import dataclasses
import importlib.util
import math

from jax.experimental import topologies

from pi_jax.errors import InputError
from pi_jax.parallel.chips import CHIPS, GPU_TARGET, GPUS_PER_HOST, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices of one kind."""

    kind: str
    """Device kind; a key of `CHIPS`."""
    count: int
    """Number of GPUs or TPU chips (not cores)."""

    @property
    def chip(self) -> Chip:
        """Properties of one device."""
        return CHIPS[self.kind]

    def __str__(self):
        return f"{self.kind}:{self.count}"

    def require_compiler(self) -> None:
        """Checks that the compiler for these devices is installed.

        Raises:
          InputError: if it is not.
        """
        module, what = ("jax_cuda13_plugin", "NVIDIA GPUs") if self.chip.gpu else ("libtpu", "TPUs")
        if not _installed(module):
            raise InputError(
                f"--topology {self}: the compiler for {what} is not installed: pip install 'pi_jax[compilers]'"
            )

    def devices(self) -> list:
        """Returns the devices to compile for.

        Raises:
          InputError: if the compiler for these devices is not installed.
        """
        self.require_compiler()
        if self.chip.gpu:
            hosts = math.ceil(self.count / GPUS_PER_HOST)
            shape = f"1x{hosts}x{self.count // hosts}"
            return list(
                topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=shape,
                    topology=shape,
                    target_config=GPU_TARGET.format(**self.chip.gpu),
                ).devices
            )
        if self.count == 1:  # the smallest slice is one host
            return Topology(self.kind, 4).devices()[:1]
        shape = "x".join(map(str, self._torus()))
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{self.kind}:{shape}").devices)

    def _torus(self) -> tuple[int, ...]:
        """Returns the most cubic shape of a slice. Its sides are powers of two."""
        sides = [1] * self.chip.dimensions
        for _ in range(self.count.bit_length() - 1):
            sides[sides.index(min(sides))] *= 2
        return tuple(sorted(sides, reverse=self.chip.dimensions == 3))


def parse(text: str) -> Topology:
    """Parses a topology such as 'h100:8'.

    Raises:
      InputError: if the device kind is unknown, or there is no topology with this number of devices.
    """
    kind, _, count = text.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology {text}: unknown kind {kind!r}; write KIND:COUNT with one of {', '.join(CHIPS)}")
    if not count.isdecimal() or not int(count):
        raise InputError(f"--topology {text}: write {kind}:COUNT with the number of devices, for example {kind}:8")
    number, chip = int(count), CHIPS[kind]
    if chip.gpu and number > GPUS_PER_HOST and number % GPUS_PER_HOST:
        raise InputError(
            f"--topology {text}: the number of GPUs must be at most {GPUS_PER_HOST} (one host) or a multiple of it"
        )
    if not chip.gpu and (number & (number - 1) or number > chip.largest or number == 2):
        raise InputError(
            f"--topology {text}: slices of {kind} have 1, 4, 8, 16 ... {chip.largest} chips (chips, not cores)"
        )
    return Topology(kind, number)


def has_cudnn() -> bool:
    """Whether cuDNN is installed, so that attention with cuDNN can be compiled."""
    return _installed("nvidia.cudnn")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False
