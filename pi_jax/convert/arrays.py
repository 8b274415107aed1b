"""From readers into sharded arrays, and from arrays in memory to writers."""

import jax
import numpy as np

from pi_jax import sharding, trees
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.convert import stream, weights
from pi_jax.model import Llama, abstract, parameter_axes


def load(reader: stream.Reader, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """A model with its parameters split over the mesh as they are read.

    Each process reads only what its own devices hold, each tensor once, and never holds more than these parts and one
    tensor.

    Args:
      reader: the weights; those of `config`, or larger ones whose first rows, columns and layers are taken.
      config: architecture.
      compute: `param_dtype` is the dtype that the parameters get.
      mesh: where they go.
    """
    template = abstract(config, compute)
    axes = parameter_axes(template)
    stacks = weights.stacks(config)

    def parameter(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        place = sharding.named(mesh, axes[name])
        tensors = stacks[name]
        weight = tensors[0].weight
        lead = int(weight.stacked)
        # Equal parts (replicas) are read into one buffer.
        parts = {
            device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True))
            for device, index in place.addressable_devices_indices_map(leaf.shape).items()
        }
        buffers = {_key(part): np.empty([s.stop - s.start for s in part], leaf.dtype) for part in parts.values()}
        rank = len(leaf.shape)
        box = [
            slice(min(p[i].start for p in parts.values()), max(p[i].stop for p in parts.values())) for i in range(rank)
        ]
        for layer, tensor in list(enumerate(tensors))[box[0]] if lead else [(0, tensors[0])]:
            whole = reader.read(tensor, weight.hf_index(tuple(box[lead:]), config))
            whole = whole.reshape([s.stop - s.start for s in box[lead:]])
            for key, buffer in buffers.items():
                if lead and not key[0][0] <= layer < key[0][1]:
                    continue
                within = tuple(
                    slice(start - s.start, stop - s.start)
                    for (start, stop), s in zip(key[lead:], box[lead:], strict=True)
                )
                buffer[(layer - key[0][0],) if lead else ...] = whole[within]
        return jax.make_array_from_single_device_arrays(
            leaf.shape, place, [jax.device_put(buffers[_key(part)], device) for device, part in parts.items()]
        )

    return trees.map_with_name(parameter, template)


def _key(part: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in part)


class Reader:
    """The weights of a model in memory, brought to the host a layer at a time; all must be reachable from here."""

    def __init__(self, model: Llama):
        """Copies nothing."""
        self._leaves = trees.by_name(model)
        self.order = weights.tensors(model.config)
        self._shapes = {tensor.name: tensor.shape for tensor in self.order}
        self.dtypes = {tensor.name: np.dtype(self._leaves[tensor.weight.name].dtype) for tensor in self.order}

    def read(self, tensor: weights.Tensor, index: weights.Index = (...,)) -> np.ndarray:
        """See `stream.Reader`."""
        leaf = self._leaves[tensor.weight.name]
        array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        return stream.require_finite(
            "the model", tensor.name, np.ascontiguousarray(array.reshape(self._shapes[tensor.name]))
        )[index]
