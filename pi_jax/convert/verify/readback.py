"""Reads written weights back with third-party code: the safetensors library, torch or Orbax.

Each function opens a target and returns a function from a tensor to its value in Hugging Face's layout, without using
pi_jax's readers. Because the libraries map files into memory, a file is reopened after every 256 MiB, so that touched
pages do not accumulate.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from pi_jax.atomic import is_remote
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import CheckpointConfig, ModelConfig
from pi_jax.convert import param_mapping, pipeline
from pi_jax.convert.folders import read_json
from pi_jax.convert.formats.safetensors import File

Read = Callable[[param_mapping.Tensor], np.ndarray]
"""Function from a tensor to its value."""
_MAPPED_BYTES = 256 << 20


class _Opened:
    """Opens files with a library and reopens them once a limit of bytes has been read."""

    def __init__(self, opener: Callable[[str], Any], share: int = 1):
        self._opener, self._limit = opener, _MAPPED_BYTES // share
        self._path, self._file, self._read = None, None, 0
        self._done: dict[str, int] = {}

    def __call__(self, path: Any) -> Any:
        if str(path) != self._path or self._read > self._limit:
            self._file = None  # release the old mapping before creating a new one
            self._path, self._file, self._read = str(path), self._opener(str(path)), 0
            self._read_ahead()
        return self._file

    def _read_ahead(self) -> None:
        """Prefetches the next part of the file, because the kernel reads mapped files in small pieces."""
        if hasattr(os, "posix_fadvise"):
            with open(self._path, "rb") as file:
                start = self._done.get(self._path, 0)
                os.posix_fadvise(file.fileno(), start, 2 * self._limit, os.POSIX_FADV_WILLNEED)

    def count(self, nbytes: int) -> None:
        self._read += nbytes
        self._done[self._path] = self._done.get(self._path, 0) + nbytes


def hf(folder: epath.Path) -> Read:
    """Reads with the safetensors library, or with pi_jax's reader on remote storage, which it does not support."""
    import safetensors

    index = folder / "model.safetensors.index.json"
    files = read_json(index)["weight_map"] if index.exists() else {}
    if is_remote(folder):
        return lambda t: File(folder / files.get(t.name, "model.safetensors")).read(t.name)
    opened = _Opened(lambda path: safetensors.safe_open(path, framework="np"))

    def read(tensor: param_mapping.Tensor) -> np.ndarray:
        array = opened(folder / files.get(tensor.name, "model.safetensors")).get_tensor(tensor.name)
        opened.count(array.nbytes)
        return array

    return read


def meta(folder: epath.Path, config: ModelConfig) -> Read:
    """Reads with torch and joins the parts as Hugging Face's conversion script does."""
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
    """Reads with Orbax, one array of stacked layers at a time."""
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
        # Copy: a view would keep this array in memory while the next one is loaded.
        return np.array(held[name] if tensor.layer is None else held[name][tensor.layer]).reshape(tensor.shape)

    return read


def names(folder: Any) -> list[str]:
    """The names of the tensors in a Hugging Face folder."""
    import safetensors

    index = epath.Path(folder) / "model.safetensors.index.json"
    if index.exists():
        return list(read_json(index)["weight_map"])
    with safetensors.safe_open(str(epath.Path(folder) / "model.safetensors"), framework="np") as file:
        return list(file.keys())


def part(folder: Any, name: str, shape: Sequence[int] | None) -> np.ndarray:
    """Reads the first rows and columns of a tensor in a Hugging Face folder; `shape` None: all."""
    import safetensors

    index = epath.Path(folder) / "model.safetensors.index.json"
    files = read_json(index)["weight_map"] if index.exists() else {}
    path = epath.Path(folder) / files.get(name, "model.safetensors")
    with safetensors.safe_open(str(path), framework="np") as file:
        return file.get_tensor(name) if shape is None else file.get_slice(name)[tuple(slice(0, n) for n in shape)]
