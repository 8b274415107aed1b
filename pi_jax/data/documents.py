"""Reads documents from text files, one at a time. JSON lines and Parquet files are never loaded completely.

A .txt or .md file is one document, unchanged. A .jsonl file contains one document per line and a .parquet file one per
row, each in a text field. A .json file contains JSON lines as well, or one object or a list of objects.
"""

import collections
import contextlib
import dataclasses
import glob
import io
import json
import os
import pathlib
import re
import reprlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pi_jax import log
from pi_jax.errors import LFS_BYTES, InputError, require_downloaded, some

ENDINGS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
"""Extensions of supported files."""

_TEXT = (".txt", ".md")
_ABOUT_FOLDER = ("readme", "license", "licence", "copying", "notice", "dataset_info", "dataset_infos")
"""Files that say something of the folder they are in, whatever their extension; no part of its text."""
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_KINDS = 10
"""Kinds of skipped files to list."""
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

    @property
    def empty(self) -> bool:
        """Whether there is no text, or only white space."""
        return not self.text or self.text.isspace()


def find_files(paths: Sequence[str]) -> list[str]:
    """Expands files, folders (searched recursively, in sorted order) and globs to a list of files.

    Links are followed, and a file that is reached twice is listed once. In a folder, hidden files, links to a folder
    around it, and a README or LICENSE are left out; a glob can select them.

    Raises:
      InputError: if a path does not exist, a file has another extension than `ENDINGS`, a folder has no such file, a
        link is broken, or a file is a Git LFS pointer.
    """
    return _search(paths)[0]


def ending(file: str) -> str | None:
    """Returns which of `ENDINGS` a file has."""
    return next((known for known in ENDINGS if file.lower().endswith(known)), None)


def _search(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the files, and for each folder a sentence about what was skipped in it."""
    files: dict[str, str] = {}  # by their real paths
    skipped: dict[str, dict[str, str]] = {}
    for path in paths:
        matches = [path] if os.path.lexists(path) else sorted(_glob(path))
        if not matches:
            kind = "no file matches it" if glob.has_magic(path) else "there is no such file or folder"
            raise InputError(f"{path}: {kind}")
        found = []
        for match in matches:
            if os.path.isdir(match):
                inside, skipped[match] = _files_in(match)
                found += inside
            else:
                found.append(match)
        if not found:
            only = ", ".join(filter(None, (_counted(skipped[match], {}) for match in matches)))
            kinds = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
            raise InputError(f"{path}: there is no {kinds} file in it" + (f", only {only}" if only else ""))
        for file in found:
            files.setdefault(os.path.realpath(file), _checked_file(file))
    counts = {folder: _counted(kinds, files) for folder, kinds in skipped.items()}
    return list(files.values()), [f"skipped in {folder}: {count}" for folder, count in counts.items() if count]


def _glob(pattern: str) -> list[str]:
    """As `glob.glob` with `recursive`, which in effect never ends if links make loops."""
    parts = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if len(parts) == 1:
        return glob.glob(pattern)
    roots = glob.glob(parts[0] or "./")
    if not parts[1]:
        return roots
    folders = [here for root in roots for here, _, _ in _walk(root)]
    return [p.removeprefix("./") for here in folders for p in _glob(os.path.join(glob.escape(here), parts[1]))]


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields each folder in `folder`, itself first, with the names of its files and of the folders not entered.

    These are hidden folders and links to a folder that contains them. No folder is entered twice.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}")

    entered = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        closed = [name for name in folders if name.startswith(".") or _contains(os.path.join(here, name), real)]
        folders[:] = sorted(set(folders) - set(closed)) if real not in entered else []
        if real not in entered:
            yield here, sorted(names), sorted(closed)
        entered.add(real)


def _contains(link: str, folder: str) -> bool:
    target = os.path.realpath(link)
    return os.path.islink(link) and os.path.commonpath([target, folder]) == target


def _files_in(folder: str) -> tuple[list[str], dict[str, str]]:
    """Returns the files to read, and what was skipped: real path -> a word for its kind."""
    found, skipped = [], {}
    for here, names, closed in _walk(folder):
        for name in closed:
            skipped[os.path.join(here, name)] = "hidden" if name.startswith(".") else "link to a folder around it"
        for name in names:
            path = os.path.join(here, name)
            if kind := _reason_to_skip(path):
                skipped[os.path.realpath(path)] = kind
            else:
                found.append(path)
    return sorted(found), skipped


def _reason_to_skip(path: str) -> str:
    """Returns the kind of a file that is not read because it is in a folder; empty if it is read."""
    name, suffixes = os.path.basename(path), pathlib.PurePath(path.lower()).suffixes
    if name.startswith("."):
        return "hidden"
    if os.path.islink(path) and not os.path.exists(path):
        # Without an extension, this could be a folder with text.
        return "" if ending(path) or not suffixes else f"broken link {name}"
    if ending(path):
        about = name.lower().split(".")[0] in _ABOUT_FOLDER and ending(path) in (*_TEXT, ".json")
        return name if about or not os.path.isfile(path) else ""
    if not suffixes:
        return "without extension"
    return "".join(suffixes[-2:] if suffixes[-1] in _COMPRESSED else suffixes[-1:])


def _counted(skipped: dict[str, str], files: dict[str, str]) -> str:
    """'3 .pdf, 1 .csv', without what is read under another name."""
    counts = collections.Counter(kind for real, kind in skipped.items() if real not in files)
    kinds = [f"{count} {kind}" for kind, count in counts.most_common()]
    return ", ".join(kinds[:_KINDS]) + (f" and {len(kinds) - _KINDS} more kinds" if len(kinds) > _KINDS else "")


def _checked_file(file: str) -> str:
    if os.path.islink(file) and not os.path.exists(file):
        raise InputError(
            f"{file} is a link to {os.readlink(file)}, which does not exist: restore it or remove the link"
        )
    if not ending(file):
        raise InputError(f"{file}: the extension must be one of {', '.join(ENDINGS)}")
    with contextlib.suppress(OSError):  # reading it raises the error
        if os.path.isfile(file) and os.path.getsize(file) < LFS_BYTES:
            require_downloaded(file, pathlib.Path(file).read_bytes())
    return file


def read_documents(paths: Sequence[str], text_field: str = "text", prompt_field: str = "") -> Iterator[Document]:
    """Returns all documents of files, folders or globs, in order, including empty ones.

    Finds the files and warns of what it skips in folders at once, and reads them as the documents are asked for.

    Args:
      paths: see `find_files`.
      text_field: field of a JSON object or column of a .parquet file that contains the text.
      prompt_field: field with the prompt of the document; empty if documents have no prompt.

    Raises:
      InputError: as for `find_files`, or if a file cannot be read or is truncated, text is not UTF-8, a line is not a
        JSON object, or a field is missing or not a string. The message names the file, the line or row, and the field.
    """
    files, skipped = _search(paths)
    for what in skipped:
        log.warn(what)
    return _read(files, [text_field, prompt_field] if prompt_field else [text_field])


def _read(files: list[str], wanted: list[str]) -> Iterator[Document]:
    """Yields the documents of files. `wanted` are the names of the field with the text and, if any, the prompt."""
    for file in files:
        kind = ending(file)
        try:
            if kind in _TEXT:
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
        first = next((line for line in _lines(content) if line.strip()), b"")
    try:
        text = _decode(file, first)
        return text.lstrip().startswith("{") and isinstance(_parse(file, text, []), dict)
    except InputError:
        return False


def _lines(content: Any) -> Iterator[bytes]:
    """Yields lines that end in any way: a carriage return alone is never within a line of JSON."""
    for line in content:
        yield from line.splitlines()


def _read_lines(file: str, wanted: list[str]) -> Iterator[Document]:
    with _opened(file) as (raw, content):
        before = 0
        for number, line in enumerate(_lines(content), start=1):
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
        text = _decode(file, content.read())
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
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain a lone surrogate, which tokenizers do not accept
        raise InputError(f"{where} has a lone surrogate at character {error.start} of field {field!r}") from None
    return text


def _listed(names: Any) -> str:
    return some([f"{str(name)!r:.40}" for name in names]) or "none"
