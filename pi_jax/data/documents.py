"""Documents from text files, one at a time: no .jsonl or .parquet file is ever held whole.

A .txt file is one document, exactly as it stands in the file. A .jsonl file (plain, .gz or .zst) holds one
document a line and a .parquet file one a row, each in a text field.
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

_PARQUET_ROWS = 64
"""Rows decoded at a time; a row of long text is megabytes."""
_PARQUET_BUFFER = 2**20


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    """The file, and the line or row where there is one: 'book.txt', 'corpus.jsonl:17' (from 1)."""
    text: str
    file_bytes: int
    """Bytes of the file that were read for this document: they add up to about the file's size."""
    prompt: str = ""
    """What stands before the text and is given, not predicted; from the prompt field, where one is asked for."""


def find_files(paths: Sequence[str]) -> list[str]:
    """The files behind files, folders (searched recursively, sorted) and globs.

    Raises:
      InputError: for a path that is not there, an ending not in `ENDINGS`, or a folder without any such file.
    """
    files = []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            kind = "no file matches it" if glob.has_magic(path) else "there is no such file or folder"
            raise InputError(f"{path}: {kind}")
        for match in matches:
            files += _files_in(match) if os.path.isdir(match) else [_supported(match)]
    return list(dict.fromkeys(files))  # a file named twice, by itself and by its folder, is read once


def _files_in(folder: str) -> list[str]:
    found = sorted(str(f) for f in pathlib.Path(folder).rglob("*") if _ending(str(f)) and f.is_file())
    if not found:
        raise InputError(f"{folder}: this folder holds no {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file")
    return found


def _ending(file: str) -> str | None:
    return next((ending for ending in ENDINGS if file.lower().endswith(ending)), None)


def _supported(file: str) -> str:
    if not _ending(file):
        raise InputError(f"{file}: the ending must be one of {', '.join(ENDINGS)}")
    return file


def read_documents(paths: Sequence[str], text_field: str = "text", prompt_field: str = "") -> Iterator[Document]:
    """Every document of some files, folders or globs, in order.

    Args:
      paths: see `find_files`.
      text_field: field of a .jsonl line or column of a .parquet file that holds the text.
      prompt_field: field with the document's prompt; empty: there is none.

    Yields:
      Documents, empty ones too.

    Raises:
      InputError: naming file, line or row, and field: what `find_files` refuses, a file that cannot be read
        or is truncated, text that is not UTF-8, a line that is not a JSON object, a missing field, no string.
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
        # Arrow's stream notices a file that is cut short; the zstandard package's reader just ends.
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
        # The defaults hold the column of the whole file in memory; this way it is a page and a buffer.
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
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise InputError(f"{where} has half a surrogate pair at character {error.start} of field {field!r}") from None
    return text


def _listed(names: Any) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"
