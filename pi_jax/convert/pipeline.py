"""Copies and verifies a model one tensor at a time, so that the complete model is never in memory.

A `Reader` returns tensors on request; a `Writer` consumes them in order. Each tensor is one layer of one parameter
(`param_mapping.Tensor`), so peak memory is that of a few such tensors, whatever the size of the model.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import xxhash
from tqdm import tqdm

from pi_jax.convert.param_mapping import Index, Tensor
from pi_jax.errors import InputError
from pi_jax.parallel import supervisor

Dtypes = dict[str, np.dtype]
"""Hugging Face name of each tensor -> its dtype."""
Digests = dict[str, str]
"""Hugging Face name of each tensor -> XXH3 hash of its bytes in Hugging Face's layout."""

_FLOATS = ("float32", "float16", "bfloat16")
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # all bits set: infinity or NaN
_PIECE = 1 << 20  # values that `require_finite` checks at a time


class Reader(Protocol):
    """The weights of a model, read lazily. The constructor checks that all tensors exist and have the right shapes."""

    order: list[Tensor]
    """All tensors, in the order in which reading them is fastest."""
    dtypes: Dtypes
    """Dtype of each tensor that `read` returns."""

    def read(self, tensor: Tensor, index: Index = ...) -> np.ndarray:
        """Returns a tensor, or the part of it selected by `index`.

        Raises:
          InputError: if the tensor cannot be read or contains values that are not finite.
        """


class Writer(Protocol):
    """The destination of a conversion."""

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Writes the next tensor. Tensors must come in the order that was passed to the constructor."""

    def close(self) -> None:
        """Completes and closes all files."""

    def discard(self) -> None:
        """Closes all files after an error without completing them. The caller removes the folder."""


def require_float(where: str, name: str, dtype: str) -> None:
    """Checks that a tensor in a file has a supported floating-point dtype."""
    if dtype not in _FLOATS:
        raise InputError(f"{where}: {name} has dtype {dtype}: weights must be one of {', '.join(_FLOATS)}")


def require_finite(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """Returns the array after checking that all its values are finite. Checks the bits piecewise, without a copy."""
    exponent = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    for start in range(0, bits.size, _PIECE):
        if ((bits[start : start + _PIECE] & exponent) == exponent).any():
            raise InputError(f"{where}: {name} contains values that are not finite")
    return array


class Cast:
    """A reader that casts the tensors of another reader."""

    def __init__(self, reader: Reader, dtype: str):
        """Casts all tensors to `dtype`; "same" keeps the dtypes of `reader`."""
        self._reader = reader
        self.order = reader.order
        self.dtypes = reader.dtypes if dtype == "same" else dict.fromkeys(reader.dtypes, np.dtype(dtype))

    def read(self, tensor: Tensor, index: Index = (...,)) -> np.ndarray:
        """See `Reader`.

        Raises:
          InputError: also if a value is too large for float16.
        """
        array, dtype = self._reader.read(tensor, index), self.dtypes[tensor.name]
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if dtype.name == "float16" and not np.isfinite(cast).all():
            raise InputError(f"{tensor.name} contains values too large for float16: use --dtype bfloat16 or float32")
        return cast


def main_dtype(dtypes: Dtypes) -> str:
    """Returns the most frequent dtype, which is the one that `config.json` states."""
    names = [dtype.name for dtype in dtypes.values()]
    return max(set(names), key=names.count)


def digest(array: np.ndarray) -> str:
    """Returns the 128-bit XXH3 hash of an array's bytes. It detects errors, not attacks, and costs little."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def with_progress(tensors: Iterable[Tensor], dtypes: Dtypes, what: str, quiet: bool) -> Iterable[Tensor]:
    """Yields the tensors and shows a progress bar in bytes."""
    sizes = {t.name: int(np.prod(t.shape)) * dtypes[t.name].itemsize for t in tensors}
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc=what, disable=quiet or None, mininterval=0.5
    ) as bar:
        for tensor in tensors:
            supervisor.tick()
            yield tensor
            bar.update(sizes[tensor.name])


def copy(reader: Reader, writer: Writer, verify: bool, quiet: bool = False) -> Digests:
    """Copies every tensor from a reader to a writer.

    Returns:
      The digests of the tensors passed to the writer if `verify` is true, else an empty dict.
    """
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
    """Yields each tensor, its value and, if `wanted`, a future of its digest. Reads one tensor ahead."""
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
    """Reads every tensor back from `target` and compares its digest with that of the tensor passed to the writer.

    Args:
      target: folder that was written; named in the error message.
      digests: result of `copy`.
      order: tensors in the order in which to read them.
      dtypes: expected dtype of each tensor.
      read: function from a tensor to its value, independent of the writer.
      quiet: whether to hide the progress bar.

    Raises:
      InputError: if a tensor differs; the message names the first one.
    """
    for tensor, array, found in _with_digests(order, dtypes, read, True, "reading back", quiet):
        same = array.dtype == dtypes[tensor.name] and array.shape == tensor.shape
        if not same or found.result() != digests[tensor.name]:
            raise InputError(f"{target}: {tensor.name} differs from the source when it is read back")
