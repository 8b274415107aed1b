"""Loads weights from a reader into sharded arrays, and reads them from a model in memory."""

import jax
import numpy as np

from pi_jax import trees
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import sharding


def load(reader: pipeline.Reader, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
    """Loads a model and shards its parameters over the mesh while they are read.

    Each process reads only the parts for its own devices, each tensor once, and holds at most these parts and one
    tensor in memory.

    Args:
      reader: the weights of a model of `config`, or of a larger model, of which the first rows, columns and layers are
        used.
      config: architecture.
      compute: `param_dtype` is the dtype of the loaded parameters.
      mesh: devices over which to shard them.
    """
    template = abstract(config, compute)
    axes = parameter_axes(template)
    stacks = param_mapping.stacks(config)

    def parameter(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        place = sharding.named(mesh, axes[name])
        tensors = stacks[name]
        spec = tensors[0].spec
        shape = (len(tensors), *spec.shape(config))  # a parameter outside the layers counts as one layer
        one = () if spec.stacked else (slice(None),)
        parts = {
            device: _bounds((*one, *index), shape)
            for device, index in place.addressable_devices_indices_map(leaf.shape).items()
        }
        buffers = {
            part: np.empty([b - a for a, b in part], leaf.dtype) for part in parts.values()
        }  # replicas share a buffer
        layers, *box = ((min(p[i][0] for p in buffers), max(p[i][1] for p in buffers)) for i in range(len(shape)))
        needed = spec.hf_index(tuple(slice(*bounds) for bounds in box), config)
        for layer in range(*layers):
            whole = reader.read(tensors[layer], needed).reshape([b - a for a, b in box])
            for ((first, last), *bounds), buffer in buffers.items():
                if first <= layer < last:
                    within = (slice(a - start, b - start) for (a, b), (start, _) in zip(bounds, box, strict=True))
                    buffer[layer - first] = whole[tuple(within)]
        shard = place.shard_shape(leaf.shape)
        pieces = [jax.device_put(buffers[part].reshape(shard), device) for device, part in parts.items()]
        return jax.make_array_from_single_device_arrays(leaf.shape, place, pieces)

    return trees.map_with_name(parameter, template)


def _bounds(index: param_mapping.Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop along each dimension."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


class Reader:
    """Reads the weights of a model in memory, one layer at a time. All must be addressable from this process."""

    def __init__(self, model: Llama):
        """Copies nothing to the host yet."""
        self._leaves = trees.by_name(model)
        self.order = param_mapping.tensors(model.config)
        self._shapes = {tensor.name: tensor.shape for tensor in self.order}
        self.dtypes = {tensor.name: np.dtype(self._leaves[tensor.spec.name].dtype) for tensor in self.order}

    def read(self, tensor: param_mapping.Tensor, index: param_mapping.Index = (...,)) -> np.ndarray:
        """See `pipeline.Reader`."""
        leaf = self._leaves[tensor.spec.name]
        array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        return pipeline.require_finite(
            "the model", tensor.name, np.ascontiguousarray(array.reshape(self._shapes[tensor.name]))
        )[index]
