"""The token store: a folder with the token ids of all documents, concatenated.

    tokens/         zarr 3 array, uint16 if the vocabulary fits, else uint32
    offsets/        zarr 3 array, int64 [D + 1]: start of each document in `tokens`, and the end
    prompts/        zarr 3 array, int64 [D]: number of prompt tokens in each document; only if there are prompts
    tokenizer/      tokenizer files, unchanged
    manifest.json   tokenizer, sources, numbers of documents and tokens, and the size of each file; written last

TensorStore reads it from a local folder or directly from `gs://` or `s3://`. A shard is one file of many compressed
chunks, so reading a sequence touches one or two chunks and the index of the shard. Each chunk has a checksum, and a
missing chunk is an error and never read as zeros. Offsets are kept in memory: 8 bytes per document.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from pi_jax import __version__, limits, remote
from pi_jax.atomic import new_folder
from pi_jax.data.manifest import FORMAT, damaged, parse
from pi_jax.data.tokenizer import TOKENIZER_FILES, TokenizerInfo
from pi_jax.errors import InputError
from pi_jax.files import require_own

SHARD_TOKENS = 2**24
"""Tokens per file. The writer keeps this many tokens in memory."""
CHUNK_TOKENS = 2**15
"""Tokens per chunk, the unit of compression and reading."""
_CACHE_BYTES = 2**26


def length_histogram(lengths: Int[np.ndarray, " D"]) -> dict[str, dict[str, int]]:
    """Counts documents and tokens by document length. The key is the power of two at or below the length."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    return {
        str(2 ** int(e)): {"documents": int((exponents == e).sum()), "tokens": int(lengths[exponents == e].sum())}
        for e in np.unique(exponents)
    }


class TokenStoreWriter:
    """Writes a store. A context manager that creates a complete store at `path`, or nothing if there is an error.

    All files are written to a temporary folder (`atomic.new_folder`). At most one shard is in memory.

    Args:
      path: local folder to create.
      tokenizer: identity of the tokenizer that produced the tokens.
      tokenizer_dir: folder from which to copy `TOKENIZER_FILES`.
      facts: additional entries of the manifest, such as the sources and the BOS and EOS tokens.
      overwrite: replace an existing token store at `path`.
      shard_tokens: see `SHARD_TOKENS`; a multiple of `chunk_tokens`.
      chunk_tokens: see `CHUNK_TOKENS`.

    Raises:
      InputError: if `path` already exists, is a URL, or cannot be written.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: TokenizerInfo,
        tokenizer_dir: str,
        facts: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        shard_tokens: int = SHARD_TOKENS,
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        if "://" in path:
            raise InputError(f"{path} is a URL: write the token store to a local folder and copy it there afterwards")
        self._path = pathlib.Path(path).absolute()
        self._tokenizer, self._tokenizer_dir = tokenizer, pathlib.Path(tokenizer_dir)
        self._facts, self._overwrite, self._chunk = dict(facts or {}), overwrite, chunk_tokens
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self._buffer, self._filled, self._written = np.empty(shard_tokens, dtype), 0, 0
        self._largest = 0
        self._offsets, self._prompts, self._digest = array.array("q", [0]), array.array("q"), hashlib.sha256()

    def __enter__(self) -> "TokenStoreWriter":
        if self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir())):
            if not self._overwrite:
                raise InputError(f"{self._path} already exists: choose another folder, or use --overwrite")
            if not (self._path / "manifest.json").is_file():
                raise InputError(f"{self._path} is not a token store, so it is not overwritten: remove it manually")
        with contextlib.suppress(OSError):
            self._path.rmdir()  # an empty folder is as good as none
        with contextlib.ExitStack() as stack:
            self._temporary = pathlib.Path(stack.enter_context(new_folder(str(self._path), self._overwrite)))
            try:
                self._tokens = _create(self._temporary / "tokens", self._buffer.dtype, len(self._buffer), self._chunk)
            except ValueError as error:
                raise InputError(f"{self._path} cannot be written: {_first_line(error)}") from None
            self._stack = stack.pop_all()
        return self

    def add(self, tokens: Int[np.ndarray, " n"], prompt: int = 0) -> None:
        """Appends a document.

        Args:
          tokens: token ids; at least one.
          prompt: number of tokens at the start that are the prompt; fewer than the length of the document.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"the document has shape {tokens.shape}: it must have one axis and at least one token")
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            raise ValueError(
                f"the document has token ids from {tokens.min()} to {tokens.max()}: they must be ids of "
                f"{self._tokenizer}"
            )
        if not 0 <= prompt < len(tokens):
            raise ValueError(f"the prompt has {prompt} tokens: it must be shorter than the document, {len(tokens)}")
        self._largest = max(self._largest, int(tokens.max()))
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._prompts.append(prompt)
        while len(tokens):
            part = tokens[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == len(self._buffer):
                self._flush()

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if kind is not None:
            self._stack.__exit__(kind, *error)
            return
        with self._stack:
            self._finish()

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    def _flush(self) -> None:
        part = self._buffer[: self._filled]
        _write(self._path, self._tokens[self._written : self._written + len(part)], part)
        self._digest.update(part.tobytes())
        self._written, self._filled = self._written + len(part), 0

    def _finish(self) -> None:
        self._flush()
        self._tokens.resize(exclusive_max=[self._written], resize_metadata_only=True).result()
        offsets = np.asarray(self._offsets, np.int64)
        self._digest.update(offsets.tobytes())
        self._write_whole("offsets", offsets)
        if any(self._prompts):
            prompts = np.asarray(self._prompts, np.int64)
            self._digest.update(prompts.tobytes())
            self._write_whole("prompts", prompts)

        (self._temporary / "tokenizer").mkdir()
        for pattern in TOKENIZER_FILES:
            for file in self._tokenizer_dir.glob(pattern):
                require_own(file, limits.TOKENIZER)
                shutil.copyfile(file, self._temporary / "tokenizer" / file.name)

        files = sorted(f for f in self._temporary.rglob("*") if f.is_file())
        manifest = {
            "format": FORMAT,
            "created_by": f"pi_jax {__version__}",
            "documents": len(offsets) - 1,
            "tokens": self._written,
            "largest_token": self._largest,
            "tokenizer": dataclasses.asdict(self._tokenizer),
            **self._facts,
            "length_histogram": length_histogram(np.diff(offsets)),
            "sha256": self._digest.hexdigest(),
            "files": {f.relative_to(self._temporary).as_posix(): f.stat().st_size for f in files},
        }
        (self._temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    def _write_whole(self, name: str, values: np.ndarray) -> None:
        target = _create(self._temporary / name, values.dtype, SHARD_TOKENS, CHUNK_TOKENS)
        _write(self._path, target[: len(values)], values)
        target.resize(exclusive_max=[len(values)], resize_metadata_only=True).result()


def _create(folder: pathlib.Path, dtype: np.dtype, shard: int, chunk: int) -> ts.TensorStore:
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    metadata = {
        "shape": [2**60],  # resized once the length is known
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [chunk], "codecs": inner}}],
        "fill_value": 0,
    }
    # A chunk that contains only token 0 is stored too, because readers treat a missing chunk as damage.
    spec = {"driver": "zarr3", "kvstore": remote.kvstore(str(folder)), "metadata": metadata}
    return ts.open({**spec, "store_data_equal_to_fill_value": True}, create=True).result()


def _write(path: pathlib.Path, target: ts.TensorStore, values: np.ndarray) -> None:
    try:
        target.write(values).result()
    except ValueError as error:
        raise InputError(f"{path} cannot be written: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


class TokenStore:
    """A store, open for reading. Threads can share it. Unpickling it reopens the store from its path.

    A process that was forked after TensorStore was used cannot read: start worker processes with 'spawn'.

    Attributes:
      path: local folder or URL.
      manifest: content of manifest.json.
      offsets: int64 of shape [D + 1], read-only: start of each document in the token stream, and its end.
      prompts: int64 of shape [D], number of prompt tokens at the start of each document; None: there are no prompts.
    """

    def __init__(
        self,
        path: str,
        manifest: dict[str, Any],
        tokens: ts.TensorStore,
        offsets: np.ndarray,
        prompts: np.ndarray | None = None,
    ):
        self.path, self.manifest, self._tokens = path, manifest, tokens
        self.offsets, self.prompts = offsets, prompts

    @classmethod
    def open(cls, path: str) -> "TokenStore":
        """Opens a store. Checks the manifest, that each file has at least the size stated there, and the boundaries of
        documents; token ids are checked when they are read.

        Raises:
          InputError: if `path` is not a token store, or has another format version, is incomplete or damaged.
        """
        try:
            files = ts.KvStore.open(remote.kvstore(path)).result()
            found = remote.answer(path, files.read("manifest.json"))
            if found.state != "value":
                raise InputError(
                    f"{path} is not a complete token store, because it has no manifest.json: create one with python -m "
                    "pi_jax.prepare"
                )
            limits.require(f"{path}/manifest.json has", len(found.value), limits.JSON)
            manifest = parse(path, found.value)
            last_bytes = {
                name: files.read(name, byte_range=slice(max(size - 1, 0), size))
                for name, size in manifest["files"].items()
            }
            for name, byte in last_bytes.items():
                try:
                    found = remote.answer(path, byte).state
                except InputError:
                    raise
                except ValueError:  # it has fewer bytes
                    found = "missing"
                if found != "value":
                    raise damaged(path, f"{name} is missing or truncated")
            tokens = _open(path, "tokens", manifest["tokens"], np.uint16, np.uint32)
            documents = manifest["documents"]
            limits.require(f"{path} has", documents, limits.DOCUMENTS, "documents")
            offsets = remote.answer(path, _open(path, "offsets", documents + 1, np.int64).read())
            _check_offsets(path, offsets, manifest["tokens"])
            has_prompts = any(name.startswith("prompts/") for name in manifest["files"])
            prompts = remote.answer(path, _open(path, "prompts", documents, np.int64).read()) if has_prompts else None
            if prompts is not None:
                _check_prompts(path, prompts, offsets)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} cannot be opened as a token store: {_first_line(error)}") from None
        offsets.flags.writeable = False
        if prompts is not None:
            prompts.flags.writeable = False
        return cls(path, manifest, tokens, offsets, prompts)

    def __reduce__(self):
        return TokenStore.open, (self.path,)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Identity of the tokenizer that produced the tokens."""
        return TokenizerInfo(**self.manifest["tokenizer"])

    @property
    def largest_token(self) -> int:
        """Largest token id in the store; in a store of an older version, that of the tokenizer."""
        return self.manifest["largest_token"]

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        """Reads tokens start:stop of the concatenated documents, int32.

        Raises:
          IndexError: if the range is not within the store.
          InputError: if a file cannot be read, also not after a while; if a checksum is wrong, or a token id is above
            `largest_token`.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} are out of range: the store has {self.num_tokens} tokens")
        try:
            tokens = remote.answer(self.path, self._tokens[start:stop].read(), running=True)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{self.path}: tokens {start}:{stop} cannot be read: {_first_line(error)}") from None
        if tokens.size and tokens.max() > self.largest_token:
            at = start + int(np.argmax(tokens > self.largest_token))
            document = int(np.searchsorted(self.offsets, at, side="right")) - 1
            raise damaged(
                self.path,
                f"token {at - self.offsets[document]} of document {document} is {tokens[at - start]}, but the largest "
                f"token must be {self.largest_token}, by its manifest.json",
            )
        return tokens.astype(np.int32)

    @functools.cached_property
    def tokenizer_dir(self) -> str:
        """Local folder with the tokenizer files. The files of a remote store are downloaded on first use."""
        if "://" not in self.path:
            return os.path.join(self.path, "tokenizer")
        self._fetched = tempfile.TemporaryDirectory(prefix="pi_jax-tokenizer-")  # deleted with the store
        files = ts.KvStore.open(remote.kvstore(self.path)).result()
        for name in self.manifest["files"]:
            if name.startswith("tokenizer/"):
                found = remote.answer(self.path, files.read(name))
                pathlib.Path(self._fetched.name, os.path.basename(name)).write_bytes(found.value)
        return self._fetched.name


def _open(path: str, name: str, length: int, *dtypes: type) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": remote.kvstore(path, name),
        "fill_missing_data_reads": False,
        # A store never changes, so shard indices are cached permanently instead of being checked at each read.
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
        "context": {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}},
    }
    opened = remote.answer(path, ts.open(spec, read=True))
    dtype = opened.dtype.numpy_dtype
    if opened.shape != (length,) or dtype not in dtypes:
        wanted = " or ".join(np.dtype(known).name for known in dtypes)
        raise damaged(
            path, f"{name} is {dtype}{list(opened.shape)}, but must be {wanted}{[length]}, by its manifest.json"
        )
    chunk = opened.chunk_layout.read_chunk.shape[0]
    limits.require(f"{path}: a chunk of {name} has", chunk, limits.CHUNK, "values")
    return opened


def _check_offsets(path: str, offsets: np.ndarray, tokens: int) -> None:
    """Checks that documents follow each other without gaps, have tokens, and contain all of them."""
    if offsets[0] != 0:
        raise damaged(path, f"its first document starts at token {offsets[0]}, but must start at 0")
    if (wrong := offsets[1:] <= offsets[:-1]).any():
        i = int(np.argmax(wrong))
        raise damaged(path, f"document {i} goes from token {offsets[i]} to {offsets[i + 1]}, but must have tokens")
    if offsets[-1] != tokens:
        raise damaged(
            path, f"its last document ends at token {offsets[-1]}, but must end at {tokens}, the number of tokens"
        )


def _check_prompts(path: str, prompts: np.ndarray, offsets: np.ndarray) -> None:
    if (wrong := (prompts < 0) | (prompts >= np.diff(offsets))).any():
        i = int(np.argmax(wrong))
        raise damaged(
            path,
            f"document {i} has {prompts[i]} prompt tokens, but must have fewer than its tokens, "
            f"{offsets[i + 1] - offsets[i]}",
        )
