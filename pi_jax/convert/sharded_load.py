"""From readers into sharded arrays, and from arrays in memory to writers."""

import jax
import numpy as np

from pi_jax import trees
from pi_jax.config import ComputeConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import sharding


def load(reader: pipeline.Reader, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> Llama:
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
    stacks = param_mapping.stacks(config)

    def parameter(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        place = sharding.named(mesh, axes[name])
        tensors = stacks[name]
        spec = tensors[0].spec
        shape = (len(tensors), *spec.shape(config))  # what has no layers is treated as having one
        one = () if spec.stacked else (slice(None),)
        parts = {
            device: _bounds((*one, *index), shape)
            for device, index in place.addressable_devices_indices_map(leaf.shape).items()
        }
        buffers = {
            part: np.empty([b - a for a, b in part], leaf.dtype) for part in parts.values()
        }  # replicas share one
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
    """First and last + 1 along each dimension."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


class Reader:
    """The weights of a model in memory, brought to the host a layer at a time; all must be reachable from here."""

    def __init__(self, model: Llama):
        """Copies nothing."""
        self._leaves = trees.by_name(model)
        self.order = param_mapping.tensors(model.config)
        self._shapes = {tensor.name: tensor.shape for tensor in self.order}
        self.dtypes = {tensor.name: np.dtype(self._leaves[tensor.spec.name].dtype) for tensor in self.order}

    def read(self, tensor: param_mapping.Tensor, index: param_mapping.Index = (...,)) -> np.ndarray:
        """See `stream.Reader`."""
        leaf = self._leaves[tensor.spec.name]
        array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        return pipeline.require_finite(
            "the model", tensor.name, np.ascontiguousarray(array.reshape(self._shapes[tensor.name]))
        )[index]
