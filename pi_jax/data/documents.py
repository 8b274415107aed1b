"""Reads documents from text files, one at a time. JSON lines and Parquet files are never loaded completely.

A .txt or .md file is one document, unchanged. A .jsonl file contains one document per line and a .parquet file one per
row, each in a text field. A .json file contains JSON lines as well, or one object or a list of objects.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import reprlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pi_jax import limits, log
from pi_jax.data.find import TEXT, ending, search
from pi_jax.errors import InputError, some

_PARQUET_ROWS = 8
"""Parquet rows decoded at a time. A row takes megabytes with a long text, and any amount in a hostile file."""
_PARQUET_BUFFER = 2**20
"""Read buffer in bytes."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A document and where it was read."""

    name: str
    """File, with the line or row if it has several documents, counted from 1: 'book.txt', 'corpus.jsonl:17'."""
    text: str
    file_bytes: int
    """Bytes of the file that were read for this document. Over all documents they add up to about the file size."""
    prompt: str = ""
    """Text that precedes the document and is not predicted, from the prompt field; empty if no field was given."""

    @property
    def empty(self) -> bool:
        """Whether there is no text, or only white space."""
        return not self.text or self.text.isspace()


def read_documents(paths: Sequence[str], text_field: str = "text", prompt_field: str = "") -> Iterator[Document]:
    """Returns all documents of files, folders or globs, in order, including empty ones.

    Finds the files and warns of what it skips in folders at once, and reads them as the documents are asked for.

    Args:
      paths: see `find_files`.
      text_field: field of a JSON object or column of a .parquet file that contains the text.
      prompt_field: field with the prompt of the document; empty if documents have no prompt.

    Raises:
      InputError: as for `find_files`, or if a file cannot be read or is truncated, text is not UTF-8, a line is not a
        JSON object, or a field is missing, not a string or too long (`pi_jax.limits`). The message names the file, the
        line or row, and the field.
    """
    files, skipped = search(paths)
    for what in skipped:
        log.warn(what)
    return _read(files, [text_field, prompt_field] if prompt_field else [text_field])


def _read(files: list[str], wanted: list[str]) -> Iterator[Document]:
    """Yields the documents of files. `wanted` are the names of the field with the text and, if any, the prompt."""
    for file in files:
        kind = ending(file)
        try:
            if kind in TEXT:
                if len(wanted) > 1:
                    raise InputError(f"{file}: a {kind} file has no field {wanted[1]!r}: use .jsonl or .parquet")
                yield _read_text(file)
            elif kind == ".parquet":
                yield from _read_parquet(file, wanted)
            elif kind.startswith(".jsonl") or _begins_with_object(file):
                yield from _read_lines(file, wanted)
            else:
                yield from _read_list(file, wanted)
        except (OSError, pa.ArrowException, MemoryError) as error:  # damaged files can ask for any amount of memory
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{file} cannot be read: {reason}") from None


def _read_text(file: str) -> Document:
    limits.require(f"{file} is one document, and has", os.path.getsize(file), limits.DOCUMENT)
    data = pathlib.Path(file).read_bytes()
    return Document(file, _decode(file, data), len(data))


@contextlib.contextmanager
def _opened(file: str) -> Iterator[tuple[Any, Any]]:
    """The file, and its uncompressed content."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(file)[1].lower())
    with open(file, "rb") as raw:
        # Arrow's stream detects a truncated file; the reader of the zstandard package just ends.
        yield raw, io.BufferedReader(pa.CompressedInputStream(raw, codec)) if codec else raw


def _begins_with_object(file: str) -> bool:
    """Whether the first line with any content is a JSON object, so that the next lines can be some too."""
    with _opened(file) as (_, content):
        try:
            first = next((line for line in _lines(file, content) if line.strip()), b"")
        except InputError:
            return False  # a list in one line
    try:
        text = _decode(file, first)
        return text.lstrip().startswith("{") and isinstance(_parse(file, text, []), dict)
    except InputError:
        return False


def _lines(file: str, content: Any) -> Iterator[bytes]:
    """Yields lines that end in any way: a carriage return alone is never within a line of JSON."""
    limit = limits.raised(limits.DOCUMENT)
    while line := content.readline(limit + 1):
        if len(line) > limit:
            raise limits.exceeded(f"{file} has a line of", limits.DOCUMENT)
        yield from line.splitlines()


def _read_lines(file: str, wanted: list[str]) -> Iterator[Document]:
    with _opened(file) as (raw, content):
        before = 0
        for number, line in enumerate(_lines(file, content), start=1):
            where = f"{file} line {number}"
            text = _decode(where, line)
            if not text or text.isspace():
                continue
            record = _parse(where, text, wanted, "; each line must be one complete object")
            now = raw.tell()
            yield Document(f"{file}:{number}", file_bytes=now - before, **_texts(where, record, wanted))
            before = now


def _read_list(file: str, wanted: list[str]) -> Iterator[Document]:
    """Reads a JSON object, or a list of objects, that can extend over several lines."""
    with _opened(file) as (raw, content):
        data = content.read(limits.raised(limits.JSON_LIST) + 1)
        if len(data) > limits.raised(limits.JSON_LIST):
            raise limits.exceeded(f"{file} is not JSON lines, so it is loaded completely, and has", limits.JSON_LIST)
        text = _decode(file, data)
        size = raw.tell()
    value = _parse(file, text, wanted) if text.strip() else []
    if not isinstance(value, list):
        yield Document(file, file_bytes=size, **_texts(file, value, wanted))
        return
    for number, record in enumerate(value, start=1):
        texts = _texts(f"{file} item {number}", record, wanted)
        yield Document(f"{file}:{number}", file_bytes=_share(size, number, len(value)), **texts)


def _parse(where: str, text: str, wanted: list[str], hint: str = "") -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            for name in wanted:
                if names.count(name) > 1:
                    raise InputError(f"{where} has the field {name!r} twice: it must have it once")
        return record

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column" if "\n" in text else "column"
        reason = error.msg.removesuffix(" at")
        raise InputError(f"{where} is not JSON: {reason} at {place} {error.colno}{hint}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply: it must be an object with the text in a field") from None
    except InputError:
        raise
    except ValueError:  # Python does not convert longer numbers
        raise InputError(
            f"{where} has a number of more than {sys.get_int_max_str_digits()} digits: it must be a string"
        ) from None


def _texts(where: str, record: Any, wanted: list[str]) -> dict[str, str]:
    """Returns the text and the prompt of an object as fields of a `Document`."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is a JSON {type(record).__name__}: it must be an object with the text in a field")
    for name in wanted:
        if name not in record:
            raise InputError(f"{where} has no field {name!r}: its fields are {_listed(record)}")
    return _named(where, wanted, [record[name] for name in wanted])


def _named(where: str, wanted: list[str], values: Sequence[Any]) -> dict[str, str]:
    checked = (_checked(where, *pair) for pair in zip(wanted, values, strict=True))
    return dict(zip(("text", "prompt"), checked, strict=False))


def _read_parquet(file: str, wanted: list[str]) -> Iterator[Document]:
    try:
        # By default, pyarrow loads the column of the complete file; with these options, one page and a buffer.
        table = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:  # or the name of a column is damaged
        raise InputError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}") from None
    with table:
        schema = table.schema_arrow
        for name in wanted:
            if schema.names.count(name) != 1:
                found = "several columns" if name in schema.names else "no column"
                raise InputError(f"{file} has {found} {name!r}: its columns are {_listed(schema.names)}")
            if not _is_text(schema.field(name).type):
                kind = f"{schema.field(name).type!s:.60}"
                raise InputError(f"{file} has a column {name!r} of type {kind}: it must contain strings")
        size, rows, number = os.path.getsize(file), table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
            for scalars in zip(*(batch.column(name) for name in wanted), strict=True):
                number += 1
                where = f"{file} row {number}"
                try:
                    values = [scalar.as_py() for scalar in scalars]
                    values = [value.decode() if isinstance(value, bytes) else value for value in values]
                except UnicodeDecodeError as error:
                    raise InputError(_not_utf8(where, error)) from None
                texts = _named(where, wanted, values)
                yield Document(f"{file}:{number}", file_bytes=_share(size, number, max(rows, number)), **texts)
        if number != rows:
            raise InputError(f"{file} is damaged: it has {number} rows, but its footer says {rows}")


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are strings, or bytes that can be UTF-8: some writers do not say which."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary")


def _share(size: int, number: int, count: int) -> int:
    """Bytes of the `number`th of `count` documents in a file; they add up to its size."""
    return size * number // count - size * (number - 1) // count


def _decode(where: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(where, error)) from None
    if "\0" in text:  # UTF-16, which can be valid UTF-8, or no text at all
        raise InputError(f"{where} has a NUL byte at offset {data.index(0)}: it must be text in UTF-8")
    return text


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where} is not UTF-8: byte 0x{byte:02x} at offset {error.start}; convert it to UTF-8 first"


def _checked(where: str, field: str, text: Any) -> str:
    if not isinstance(text, str):
        value = f"{reprlib.repr(text):.40}"
        raise InputError(f"{where} has {value} ({type(text).__name__}) in field {field!r}: it must be a string")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # JSON can contain a lone surrogate, which tokenizers do not accept
        raise InputError(f"{where} has a lone surrogate at character {error.start} of field {field!r}") from None
    limits.require(f"{where}: field {field!r} has", size, limits.DOCUMENT)
    return text


def _listed(names: Any) -> str:
    return some([f"{str(name)!r:.40}" for name in names]) or "none"
