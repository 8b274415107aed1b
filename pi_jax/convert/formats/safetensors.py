"""Reads and writes safetensors files one tensor at a time.

The safetensors library maps complete files into memory to read them and needs a complete file in memory to write it,
which large models do not allow. The format is simple: a length, a JSON header and the raw bytes. Files written here are
verified with the library.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
from typing import Any

import ml_dtypes  # noqa: F401  (adds bfloat16 to NumPy)
import numpy as np
from etils import epath

from pi_jax import limits
from pi_jax.convert.param_mapping import Index, Tensor
from pi_jax.convert.pipeline import Dtypes, require_finite, require_float
from pi_jax.errors import LFS_BYTES, InputError, require_downloaded
from pi_jax.files import require_regular

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {numpy: name for name, numpy in _DTYPES.items()}
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Entry:
    """Layout of a tensor in its file."""

    dtype: str
    """NumPy name of the dtype, or the name in the file if NumPy has no such dtype."""
    shape: tuple[int, ...]
    offset: int
    """Position of the first byte in the file."""


class File:
    """An open safetensors file. Reads only the tensors and rows that are requested."""

    def __init__(self, path: epath.Path):
        """Reads and checks the header.

        Raises:
          InputError: if the file is truncated or its header is invalid or too large.
        """
        self.path = path
        require_regular(path)
        try:
            self._file = path.open("rb")
            self._size = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            require_downloaded(path, self._file.read(LFS_BYTES))
            self.entries = self._header()
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{path} is not a complete safetensors file: {reason}") from None

    def _header(self) -> dict[str, Entry]:
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        if self._size < 8 or length > self._size - 8:
            raise ValueError(f"its header has {length} bytes, but the file has {self._size}")
        limits.require(f"the header of {self.path} has", length, limits.JSON)
        header = json.loads(self._file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its header has something else than strings in __metadata__")
        entries, data, end = {}, self._size - 8 - length, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
            if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or not start <= stop <= data:
                raise ValueError(f"the header gives {name} bytes {start} to {stop} of {data}")
            if entry["dtype"] in _DTYPES and stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
                raise ValueError(
                    f"{name} has {stop - start} bytes, which is not the size of {dtype}{list(shape)!s:.80}"
                )
            if start != end:
                raise ValueError(f"{name} begins at byte {start}, but the tensor before it ends at {end}")
            entries[name] = Entry(dtype, shape, 8 + length + start)
            end = stop
        if end != data:
            raise ValueError(f"its tensors have {end} bytes, but {data} follow the header")
        return entries

    def read(self, name: str, index: Index = (...,)) -> np.ndarray:
        """Returns a tensor, or the part of it selected by `index`. Reads only the rows that `index` selects."""
        entry = self.entries[name]
        require_float(str(self.path), name, entry.dtype)
        rows = index[0] if isinstance(index[0], slice) else slice(None)
        array = require_finite(str(self.path), name, read_rows(self._file, self.path, name, entry, rows))
        return array[(slice(None), *index[1:])]


def read_rows(file: Any, path: Any, name: str, entry: Entry, rows: slice) -> np.ndarray:
    """Reads rows of the row-major tensor at `entry.offset` of an open file."""
    start, stop, _ = rows.indices(entry.shape[0])
    array = np.empty((stop - start, *entry.shape[1:]), entry.dtype)
    view = memoryview(array.reshape(-1).view(np.uint8))
    try:
        file.seek(entry.offset + start * array[:1].nbytes if len(array) else entry.offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise InputError(f"{path} is truncated: it ends within {name}")
            done += count
    except OSError as error:
        raise InputError(f"{path}: {name} cannot be read: {error.strerror or error}") from None
    return array


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header contains a name twice")
    return found


class Writer:
    """Writes one or several safetensors files and, if there are several, their index."""

    def __init__(self, folder: epath.Path, order: list[Tensor], dtypes: Dtypes, shard_bytes: int):
        """Assigns the tensors to files.

        Args:
          folder: folder in which to create the files.
          order: all tensors, in the order in which they will be written.
          dtypes: dtype of each tensor.
          shard_bytes: maximum size of a file; a larger tensor gets its own file.
        """
        self._folder = folder
        self._dtypes = dtypes
        self._shards: list[list[Tensor]] = [[]]
        size = self._total = 0
        for tensor in order:
            nbytes = self._nbytes(tensor)
            if self._shards[-1] and size + nbytes > shard_bytes:
                self._shards.append([])
                size = 0
            self._shards[-1].append(tensor)
            size += nbytes
            self._total += nbytes
        self._current = 0
        self._left: list[Tensor] = []
        self._file: Any = None

    def _nbytes(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape) * self._dtypes[tensor.name].itemsize

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return f"model-{shard + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"

    def _header(self, tensors: list[Tensor]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in tensors:
            end = offset + self._nbytes(tensor)
            dtype = _NAMES[self._dtypes[tensor.name].name]
            header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Writes the next tensor."""
        if not self._left:
            self._left = list(self._shards[self._current])
            self._file = (self._folder / self._name(self._current)).open("wb")
            self._file.write(self._header(self._left))
        assert self._left.pop(0) == tensor and array.dtype == self._dtypes[tensor.name]
        self._file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        start_storing(self._file, array.nbytes)
        if not self._left:
            finish(self._file)
            self._current += 1

    def close(self) -> None:
        """Writes the index, if there are several files."""
        assert self._current == len(self._shards)
        if len(self._shards) > 1:
            weight_map = {t.name: self._name(i) for i, shard in enumerate(self._shards) for t in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def discard(self) -> None:
        """Closes the current file without completing it."""
        if self._file is not None:
            discard(self._file)


def discard(file: Any) -> None:
    """Closes a file whose content is no longer needed, ignoring errors."""
    with contextlib.suppress(OSError, ValueError):
        file.close()


def start_storing(file: Any, nbytes: int) -> None:
    """Makes the kernel start writing the last `nbytes` bytes to disk, so that the final `fsync` is short."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(io.UnsupportedOperation):
            os.posix_fadvise(file.fileno(), file.tell() - nbytes, nbytes, os.POSIX_FADV_DONTNEED)


def finish(file: Any) -> None:
    """Closes a written file. A local file is on disk when this returns."""
    file.flush()
    with contextlib.suppress(io.UnsupportedOperation):
        os.fsync(file.fileno())
    file.close()
