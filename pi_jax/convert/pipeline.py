"""How a model goes from one place to another: a tensor at a time, so that no machine has to hold it.

A `Reader` gives named tensors when they are asked for; a `Writer` takes one after the other. What passes is one layer
of one parameter (`weights.Tensor`), so the memory needed is that of a few such tensors, whatever the model's size.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import xxhash
from tqdm import tqdm

from pi_jax.convert.param_mapping import Index, Tensor
from pi_jax.errors import InputError

Dtypes = dict[str, np.dtype]
"""Dtype of each tensor, by Hugging Face's name."""
Digests = dict[str, str]
"""XXH3 of the bytes of each tensor in Hugging Face's order, by its name there."""

_FLOATS = ("float32", "float16", "bfloat16")
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # all ones: infinite or not a number
_PIECE = 1 << 20


class Reader(Protocol):
    """A model's weights somewhere, read lazily. Opening it has checked that all are there, with the right shapes."""

    order: list[Tensor]
    """All tensors, in the order in which they are read fastest."""
    dtypes: Dtypes

    def read(self, tensor: Tensor, index: Index = ...) -> np.ndarray:
        """A tensor, or the part of it within `index`.

        Raises:
          InputError: if it cannot be read or holds values that are not finite.
        """


class Writer(Protocol):
    """Where a model goes."""

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Takes the next tensor, in the order that the writer was made for."""

    def close(self) -> None:
        """Finishes what was written."""

    def discard(self) -> None:
        """Gives up after an error: closes files, whose folder is then removed."""


def require_float(where: str, name: str, dtype: str) -> None:
    """Checks the dtype of a tensor in a file."""
    if dtype not in _FLOATS:
        raise InputError(f"{where}: {name} is {dtype}: weights must be one of {', '.join(_FLOATS)}")


def require_finite(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """The array, if all its values are finite. In pieces, by their bits: no copy of it is made."""
    exponent = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    for start in range(0, bits.size, _PIECE):
        if ((bits[start : start + _PIECE] & exponent) == exponent).any():
            raise InputError(f"{where}: {name} holds values that are not finite")
    return array


class Cast:
    """A reader whose tensors come in another dtype."""

    def __init__(self, reader: Reader, dtype: str):
        """`dtype`: one for all, or "same" as the reader's own."""
        self._reader = reader
        self.order = reader.order
        self.dtypes = reader.dtypes if dtype == "same" else dict.fromkeys(reader.dtypes, np.dtype(dtype))

    def read(self, tensor: Tensor, index: Index = (...,)) -> np.ndarray:
        """See `Reader`.

        Raises:
          InputError: besides, if a value is too large for float16.
        """
        array, dtype = self._reader.read(tensor, index), self.dtypes[tensor.name]
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if dtype.name == "float16" and not np.isfinite(cast).all():
            raise InputError(f"{tensor.name} holds values too large for float16: choose --dtype bfloat16 or float32")
        return cast


def main_dtype(dtypes: Dtypes) -> str:
    """The one dtype that a config names: that of the largest tables and most of the weights."""
    names = [dtype.name for dtype in dtypes.values()]
    return max(set(names), key=names.count)


def digest(array: np.ndarray) -> str:
    """XXH3, 128 bits, of an array's bytes: against mistakes, not against attacks, and faster than memory is read."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def with_progress(tensors: Iterable[Tensor], dtypes: Dtypes, what: str, quiet: bool) -> Iterable[Tensor]:
    """The tensors one after the other, with a bar of the bytes done and their rate."""
    sizes = {t.name: int(np.prod(t.shape)) * dtypes[t.name].itemsize for t in tensors}
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc=what, disable=quiet or None, mininterval=0.5
    ) as bar:
        for tensor in tensors:
            yield tensor
            bar.update(sizes[tensor.name])


def copy(reader: Reader, writer: Writer, verify: bool, quiet: bool = False) -> Digests:
    """Moves every tensor; returns the digests of what was handed to the writer, if it is to be verified."""
    digests = {}
    try:
        for tensor, array, found in _with_digests(reader.order, reader.dtypes, reader.read, verify, "writing", quiet):
            writer.write(tensor, array)
            if found:
                digests[tensor.name] = found.result()
        writer.close()
    except BaseException:
        writer.discard()
        raise
    return digests


def _with_digests(
    order: list[Tensor],
    dtypes: Dtypes,
    read: Callable[[Tensor], np.ndarray],
    wanted: bool,
    what: str,
    quiet: bool,
) -> Iterator[tuple[Tensor, np.ndarray, Future[str] | None]]:
    """Tensors, their values and, if wanted, their digests to come; the next value is read while one is in use."""
    with ThreadPoolExecutor(2) as pool:
        coming = pool.submit(read, order[0])
        for tensor, following in zip(with_progress(order, dtypes, what, quiet), [*order[1:], None], strict=True):
            array = coming.result()
            found = pool.submit(digest, array) if wanted else None
            if following:
                coming = pool.submit(read, following)
            yield tensor, array, found


def verify(
    target: str,
    digests: Digests,
    order: list[Tensor],
    dtypes: Dtypes,
    read: Callable[[Tensor], np.ndarray],
    quiet: bool,
) -> None:
    """Compares every tensor that an independent reader finds in `target` with what was handed to the writer.

    Raises:
      InputError: naming the first tensor that differs.
    """
    for tensor, array, found in _with_digests(order, dtypes, read, True, "reading back", quiet):
        same = array.dtype == dtypes[tensor.name] and array.shape == tensor.shape
        if not same or found.result() != digests[tensor.name]:
            raise InputError(f"{target}: {tensor.name} read back differs from what was written")
