"""What was written, read by other people's code: safetensors' own library, torch, Orbax.

Each function opens a target and returns a function from a tensor to its value in Hugging Face's order, in which nothing
of our readers takes part. The libraries map files into memory; they are opened anew after some hundred megabytes, so
that what they have touched does not add up.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from pi_jax.checkpoint import Checkpoints
from pi_jax.config import CheckpointConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.convert.folders import is_remote, read_json

Read = Callable[[param_mapping.Tensor], np.ndarray]
_MAPPED_BYTES = 256 << 20


class _Opened:
    """A file opened by a library, again and again."""

    def __init__(self, opener: Callable[[str], Any], share: int = 1):
        self._opener, self._limit = opener, _MAPPED_BYTES // share
        self._path, self._file, self._read = None, None, 0
        self._done: dict[str, int] = {}

    def __call__(self, path: Any) -> Any:
        if str(path) != self._path or self._read > self._limit:
            self._file = None  # the old mapping goes before the new one comes
            self._path, self._file, self._read = str(path), self._opener(str(path)), 0
            self._read_ahead()
        return self._file

    def _read_ahead(self) -> None:
        """Tells the system what comes next: of a mapped file it would fetch little at a time."""
        if hasattr(os, "posix_fadvise"):
            with open(self._path, "rb") as file:
                start = self._done.get(self._path, 0)
                os.posix_fadvise(file.fileno(), start, 2 * self._limit, os.POSIX_FADV_WILLNEED)

    def count(self, nbytes: int) -> None:
        self._read += nbytes
        self._done[self._path] = self._done.get(self._path, 0) + nbytes


def hf(folder: epath.Path) -> Read:
    """By the safetensors library; on remote storage, which it does not know, by our own reader."""
    import safetensors

    index = folder / "model.safetensors.index.json"
    files = read_json(index)["weight_map"] if index.exists() else {}
    if is_remote(folder):
        return lambda t: safetensors.File(folder / files.get(t.name, "model.safetensors")).read(t.name)
    opened = _Opened(lambda path: safetensors.safe_open(path, framework="np"))

    def read(tensor: param_mapping.Tensor) -> np.ndarray:
        array = opened(folder / files.get(tensor.name, "model.safetensors")).get_tensor(tensor.name)
        opened.count(array.nbytes)
        return array

    return read


def meta(folder: epath.Path, config: ModelConfig) -> Read:
    """By torch, put together as Hugging Face's own conversion script does."""
    import ml_dtypes
    import torch

    files = sorted(folder.glob("consolidated.*.pth"))

    def load(path: str) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    opened = [_Opened(load, len(files)) for _ in files]
    heads = {"layers.attention.q": config.num_attention_heads, "layers.attention.k": config.num_key_value_heads}

    def read(tensor: param_mapping.Tensor) -> np.ndarray:
        parts = [file(path)[tensor.meta_name] for file, path in zip(opened, files, strict=True)]
        split = tensor.spec.meta_split
        if tensor.spec.name == "embedding" and parts[0].shape[1] == config.hidden_size:
            split = 0
        whole = parts[0].clone() if split is None or len(parts) == 1 else torch.cat(parts, dim=split)
        if tensor.spec.name in heads:
            count, (rows, columns) = heads[tensor.spec.name], whole.shape
            whole = whole.view(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        if whole.dtype == torch.bfloat16:
            array = whole.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = whole.numpy()
        for file, part in zip(opened, parts, strict=True):
            file.count(part.nbytes)
        return array

    return read


def run(folder: epath.Path, config: ModelConfig, dtypes: pipeline.Dtypes) -> Read:
    """By Orbax, an array of stacked layers at a time."""
    tensors = param_mapping.stacks(config)
    held: dict[str, np.ndarray] = {}
    checkpoints = Checkpoints(folder, CheckpointConfig(), writer=False)

    def read(tensor: param_mapping.Tensor) -> np.ndarray:
        name = tensor.spec.name
        if name not in held:
            held.clear()
            stacked = (len(tensors[name]),) if tensor.spec.stacked else ()
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shape = jax.ShapeDtypeStruct(stacked + tensor.spec.shape(config), dtypes[tensor.name], sharding=place)
            stored = f"model.{name}"
            held[name] = np.asarray(checkpoints.load_unchecked(0, {stored: shape})[stored])
        # A copy, as a view would keep the array while the next one comes.
        return np.array(held[name] if tensor.layer is None else held[name][tensor.layer]).reshape(tensor.shape)

    return read


def hf_part(folder: Any) -> Read:
    """As `hf`, of a smaller model: the first rows and columns that a tensor's shape asks for."""
    import safetensors

    index = epath.Path(folder) / "model.safetensors.index.json"
    files = read_json(index)["weight_map"] if index.exists() else {}

    def read(tensor: param_mapping.Tensor) -> np.ndarray:
        path = epath.Path(folder) / files.get(tensor.name, "model.safetensors")
        with safetensors.safe_open(str(path), framework="np") as file:
            return file.get_slice(tensor.name)[tuple(slice(0, n) for n in tensor.shape)]

    return read
