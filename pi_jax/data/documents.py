"""Reads documents from text files, one at a time. A .jsonl or .parquet file is never loaded completely.

A .txt file is one document, unchanged. A .jsonl file (plain, .gz or .zst) contains one document per line and a .parquet
file one per row, each in a text field.
"""

import dataclasses
import glob
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pi_jax.errors import InputError

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Extensions of supported files."""

_PARQUET_ROWS = 64
"""Parquet rows decoded at a time. A row with a long text takes megabytes."""
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


def find_files(paths: Sequence[str]) -> list[str]:
    """Expands files, folders (searched recursively, in sorted order) and globs to a list of files.

    Raises:
      InputError: if a path does not exist, a file has another extension than `ENDINGS`, or a folder has no such file.
    """
    files = []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            kind = "no file matches it" if glob.has_magic(path) else "there is no such file or folder"
            raise InputError(f"{path}: {kind}")
        for match in matches:
            files += _files_in(match) if os.path.isdir(match) else [_supported(match)]
    return list(dict.fromkeys(files))  # a file that is given twice, such as by itself and by its folder, is read once


def _files_in(folder: str) -> list[str]:
    found = sorted(str(f) for f in pathlib.Path(folder).rglob("*") if _ending(str(f)) and f.is_file())
    if not found:
        raise InputError(f"{folder}: this folder contains no {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file")
    return found


def _ending(file: str) -> str | None:
    return next((ending for ending in ENDINGS if file.lower().endswith(ending)), None)


def _supported(file: str) -> str:
    if not _ending(file):
        raise InputError(f"{file}: the extension must be one of {', '.join(ENDINGS)}")
    return file


def read_documents(paths: Sequence[str], text_field: str = "text", prompt_field: str = "") -> Iterator[Document]:
    """Yields all documents of files, folders or globs, in order, including empty ones.

    Args:
      paths: see `find_files`.
      text_field: field of a .jsonl line or column of a .parquet file that contains the text.
      prompt_field: field with the prompt of the document; empty if documents have no prompt.

    Raises:
      InputError: as for `find_files`, or if a file cannot be read or is truncated, text is not UTF-8, a line is not a
        JSON object, or a field is missing or not a string. The message names the file, the line or row, and the field.
    """
    for file in find_files(paths):
        try:
            if file.lower().endswith(".txt"):
                if prompt_field:
                    raise InputError(f"{file}: a .txt file has no field {prompt_field!r}: use .jsonl or .parquet")
                yield _read_text(file)
            elif file.lower().endswith(".parquet"):
                yield from _read_parquet(file, text_field, prompt_field)
            else:
                yield from _read_jsonl(file, text_field, prompt_field)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def _read_text(file: str) -> Document:
    data = pathlib.Path(file).read_bytes()
    return Document(file, _decode(file, data, "utf-8-sig"), len(data))


def _read_jsonl(file: str, field: str, prompt_field: str) -> Iterator[Document]:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(file)[1].lower())
    with open(file, "rb") as raw:
        # Arrow's stream detects a truncated file; the reader of the zstandard package just ends.
        lines = io.BufferedReader(pa.CompressedInputStream(raw, codec)) if codec else raw
        before = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            record = _parse(where, _decode(where, line, "utf-8-sig" if number == 1 else "utf-8"))
            for name in filter(None, (field, prompt_field)):
                if name not in record:
                    raise InputError(f"{where} has no field {name!r}: its fields are {_listed(record)}")
            text = _checked(where, field, record[field])
            prompt = _checked(where, prompt_field, record[prompt_field]) if prompt_field else ""
            now = raw.tell()
            yield Document(f"{file}:{number}", text, now - before, prompt)
            before = now


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise InputError(f"{where} is not JSON: {reason} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} is a JSON {type(record).__name__}: it must be an object with the text in a field")
    return record


def _read_parquet(file: str, field: str, prompt_field: str) -> Iterator[Document]:
    try:
        # By default, pyarrow loads the column of the complete file; with these options, one page and a buffer.
        table = pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}") from None
    with table:
        names, wanted = table.schema_arrow.names, [name for name in (field, prompt_field) if name]
        for name in wanted:
            if name not in names:
                raise InputError(f"{file} has no column {name!r}: its columns are {_listed(names)}")
        size, rows, number = os.path.getsize(file), table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
            for scalars in zip(*(batch.column(name) for name in wanted), strict=True):
                number += 1
                where = f"{file} row {number}"
                try:
                    values = [scalar.as_py() for scalar in scalars]
                except UnicodeDecodeError as error:
                    raise InputError(_not_utf8(where, error)) from None
                text, *prompt = (_checked(where, *pair) for pair in zip(wanted, values, strict=True))
                share = size * number // rows - size * (number - 1) // rows
                yield Document(f"{file}:{number}", text, share, *prompt)


def _decode(where: str, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(where, error)) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where} is not UTF-8: byte 0x{byte:02x} at offset {error.start}; convert it to UTF-8 first"


def _checked(where: str, field: str, text: Any) -> str:
    if not isinstance(text, str):
        value = f"{text!r:.40}"
        raise InputError(f"{where} has {value} ({type(text).__name__}) in field {field!r}: it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain a lone surrogate, which tokenizers do not accept
        raise InputError(f"{where} has a lone surrogate at character {error.start} of field {field!r}") from None
    return text


def _listed(names: Any) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"
