"""Reads and writes torch's `.pth` files, as published by Meta: zip archives of a pickle and raw tensors.

To read a file, torch's weights-only unpickler lists the tensors and their offsets. It creates nothing but tensors
without data. The bytes are then read with ordinary file reads, because touched pages of a mapped file count as resident
memory. To write a file, this module creates the archive itself, one tensor at a time, because torch.save needs all
tensors in memory.
"""

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import pickletools
import re
import struct
import zipfile
from typing import Any

import numpy as np

from pi_jax import limits
from pi_jax.convert.formats.safetensors import Entry, discard, finish, read_rows, start_storing
from pi_jax.convert.param_mapping import Index
from pi_jax.convert.pipeline import require_finite, require_float
from pi_jax.errors import LFS_BYTES, InputError, require_downloaded
from pi_jax.files import require_regular

_OLDEST_TORCH = (2, 10)  # in older versions, a file can corrupt memory (CVE-2026-24747) or run code (CVE-2025-32434)
_ALIGNMENT = 64
_TENSORS = (
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch\.nn\.parameter Parameter|"
    r"torch (?!Typed|Untyped)\w+Storage"
)
"""What the pickle of a state dict names: pattern of `module name`."""


def require_torch() -> Any:
    """Imports torch and checks that this version opens files safely.

    Raises:
      InputError: if torch is not installed or too old.
    """
    try:
        import torch
    except ImportError:
        raise InputError("Meta's .pth files need torch, which is not installed: pip install 'torch>=2.10'") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        raise InputError(
            f"torch {torch.__version__} does not open .pth files safely (CVE-2026-24747): install 2.10 or newer"
        )
    return torch


class File:
    """An open `.pth` file. Reads only the tensors and rows that are requested."""

    def __init__(self, path: pathlib.Path):
        """Reads and checks the list of tensors.

        Raises:
          InputError: if the file is not a complete archive of plain tensors, or its list of tensors is too large.
        """
        self.path = path
        torch = require_torch()
        require_regular(path)
        try:
            with open(path, "rb") as file:
                require_downloaded(path, file.read(LFS_BYTES))
                sizes = _records(path, file)
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
            raise InputError(_more_than_tensors(path, reason.strip() or "its pickle is rejected")) from None
        except InputError:
            raise
        except Exception as error:  # a damaged pickle makes torch raise many types of exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} is not a complete .pth file: {reason[:160]}") from None
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise InputError(
                f"{path} contains a {type(state).__name__}: it must contain a dict whose values are all tensors"
            )
        self.entries = {str(name): _entry(path, str(name), tensor, sizes) for name, tensor in state.items()}
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (lives as long as this object)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Reads rows of a tensor."""
        entry = self.entries[name]
        require_float(str(self.path), name, entry.dtype)
        return require_finite(str(self.path), name, read_rows(self._file, self.path, name, entry, rows))


def _records(path: pathlib.Path, file: Any) -> dict[int, int]:
    """Returns the size of each record of an archive, by its position, after checking what torch will load at once.

    Its unpickler runs no code, but calls some constructors with any argument, such as `bytearray(10**12)`.
    """
    archive = zipfile.ZipFile(file)
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path} contains compressed records: torch.save writes them uncompressed")
        parts = pathlib.PurePosixPath(record.filename).parts
        if len(parts) > 1 and parts[1] == "data":
            continue  # the values of a tensor
        limits.require(f"{path}: the record {record.filename[:80]} has", record.file_size, limits.JSON)
        if parts[-1] == "data.pkl":
            _check_pickle(path, archive.read(record))
    return {_start(file, record): record.file_size for record in archive.infolist()}


def _check_pickle(path: pathlib.Path, data: bytes) -> None:
    """Checks that a pickle names nothing but tensors, and contains at most as many operations as a list of them."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number % 10_000 == 0:
            limits.require(f"{path}: its pickle has", number, limits.PICKLE, "operations")
        if opcode.name == "GLOBAL" and not re.fullmatch(_TENSORS, argument):
            raise InputError(_more_than_tensors(path, argument))


def _more_than_tensors(path: pathlib.Path, reason: str) -> str:
    return (
        f"{path} contains more than plain tensors ({reason[:160]}): none of its code was run; convert it to "
        "safetensors where it was created"
    )


def _start(file: Any, record: zipfile.ZipInfo) -> int:
    """Returns the position of the first byte of a record's data."""
    file.seek(record.header_offset + 26)
    return record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))  # lengths of the name and extra field


def _entry(path: pathlib.Path, name: str, tensor: Any, sizes: dict[int, int]) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    message = f"{path}: {name} is stated to be {dtype}{list(shape)}, but it is not stored row by row"
    if not tensor.is_contiguous():
        raise InputError(message)
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    offset = storage._checkpoint_offset or 0
    # torch computes the offset from what torch.save does, so it is wrong if another program has packed the archive.
    if sizes.get(offset) != storage.nbytes():
        raise InputError(f"{path}: {name} is not where torch.save puts it: load the file with torch and save it again")
    if start + math.prod(shape) * tensor.element_size() > storage.nbytes():
        raise InputError(message)
    return Entry(dtype, shape, offset + start)


class Joined:
    """A tensor that is split over several files."""

    def __init__(self, files: list[File], name: str, dimension: int | None):
        """Checks that all parts have the same shape and dtype.

        Args:
          files: all files of the model.
          name: name of the tensor.
          dimension: dimension along which the files split it; None if each file contains the complete tensor.

        Raises:
          InputError: if a part is missing or different; the message names its file.
        """
        self._files, self._name, self._dimension = files, name, dimension
        first = files[0].entries.get(name)
        for file in files:
            entry = file.entries.get(name)
            if entry is None:
                raise InputError(f"{file.path} lacks {name}")
            require_float(str(file.path), name, entry.dtype)
            if (entry.shape, entry.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{file.path}: {name} is {entry.dtype}{list(entry.shape)}, but {files[0].path.name} has "
                    f"{first.dtype}{list(first.shape)}"
                )
        self._part = first.shape
        self.dtype = np.dtype(first.dtype)
        self.shape = tuple(n * len(files) if i == dimension else n for i, n in enumerate(first.shape))

    def read(self, index: Index) -> np.ndarray:
        """Returns the part selected by `index`, which has one slice per dimension."""
        if self._dimension is None:
            return self._files[0].read(self._name, index[0])[(slice(None), *index[1:])]
        size = self._part[self._dimension]
        start, stop, _ = index[self._dimension].indices(self.shape[self._dimension])
        found = []
        for number, file in enumerate(self._files):
            first, last = max(start - number * size, 0), min(stop - number * size, size)
            if first < last:
                here = tuple(slice(first, last) if i == self._dimension else part for i, part in enumerate(index))
                found.append(file.read(self._name, here[0])[(slice(None), *here[1:])])
        return found[0] if len(found) == 1 else np.concatenate(found, self._dimension)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Represents a tensor's bytes in the pickle."""

    kind: type
    """torch's storage class, which implies the dtype."""
    key: str
    """Name of the record with the bytes."""
    elements: int


class _Tensor:
    """Is pickled in the same way as torch pickles a contiguous tensor."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self._storage, self._shape = storage, shape

    def __reduce__(self):
        from torch._utils import _rebuild_tensor_v2

        stride = tuple(math.prod(self._shape[i + 1 :]) for i in range(len(self._shape)))
        return _rebuild_tensor_v2, (self._storage, 0, self._shape, stride, False, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.elements) if isinstance(obj, _Storage) else None


class Writer:
    """Writes one `.pth` file, one tensor at a time."""

    def __init__(self, path: pathlib.Path, contents: dict[str, tuple[str, tuple[int, ...]]]):
        """Creates the file and writes the list of tensors.

        Args:
          path: file to create.
          contents: name of each tensor -> its dtype and shape, in the order in which they will be written.
        """
        torch = require_torch()
        kinds = {"float32": torch.FloatStorage, "float16": torch.HalfStorage, "bfloat16": torch.BFloat16Storage}
        self._prefix = path.stem
        self._contents = contents
        self._names = list(contents)
        self._file = open(path, "wb")  # noqa: SIM115  (closed by `close`)
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        tensors = {
            name: _Tensor(_Storage(kinds[dtype], str(i), math.prod(shape)), shape)
            for i, (name, (dtype, shape)) in enumerate(contents.items())
        }
        stream = io.BytesIO()
        _Pickler(stream, protocol=2).dump(tensors)
        self._record("data.pkl", stream.getvalue())
        self._record("byteorder", b"little")

    def _record(self, name: str, data: Any) -> None:
        info = zipfile.ZipInfo(f"{self._prefix}/{name}")
        # torch memory-maps tensors, so their data must start at a multiple of 64; an extra field pads the header.
        # The header has 30 bytes, the name, 20 bytes for sizes beyond 4 GB, and 4 bytes for the extra field itself.
        start = self._file.tell() + 30 + len(info.filename) + 20 + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        with self._archive.open(info, "w", force_zip64=True) as record:
            record.write(data)
        start_storing(self._file, len(data))

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor."""
        place = len(self._contents) - len(self._names)
        assert self._names.pop(0) == name and (array.dtype.name, array.shape) == self._contents[name]
        self._record(f"data/{place}", memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))

    def close(self) -> None:
        """Completes and closes the archive."""
        assert not self._names
        self._record("version", b"3\n")
        self._archive.close()
        finish(self._file)

    def discard(self) -> None:
        """Closes the file without completing it."""
        self._archive.fp = None  # otherwise the archive is completed when it is garbage-collected
        discard(self._file)
