"""Tokenizers: loading, encoding with special tokens, prompts, and the identity that a token store records."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from pi_jax import limits
from pi_jax.data.manifest import LARGEST_VOCABULARY
from pi_jax.errors import LFS_BYTES, InputError, no_folder, require_downloaded, some
from pi_jax.files import require_own

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Tokenizer files that may exist in a model folder. Those that exist are copied along with a model."""

_MORE_TEMPLATES = "additional_chat_templates"
"""Folder from which transformers reads chat templates, too."""


def load_tokenizer(folder: str) -> Any:
    """Loads the fast tokenizer of a local Hugging Face folder without downloading files or running code from it.

    The tokenizer prepends what the folder says it prepends, but never appends anything: it encodes prompts.

    Raises:
      InputError: if the folder does not exist or contains no tokenizer that transformers can load as a fast one.
    """
    import transformers

    if not os.path.isdir(folder):
        raise no_folder(folder)
    _check_files(pathlib.Path(folder))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # invalid files make transformers and tokenizers raise many types of exception
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        if "untagged enum" in reason:  # what tokenizers says of a file that is newer than itself
            reason = f"tokenizers {tokenizers.__version__} cannot read its tokenizer.json, which may be newer"
        raise InputError(f"tokenizer {folder} cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {folder} is a {type(tokenizer).__name__}: the folder must have a tokenizer.json")
    tokenizer.model_max_length = 1 << 40  # it says nothing of the window once RoPE is scaled, but makes encoding warn
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json can enable truncation and padding
    backend.no_padding()
    with _encoding(folder):
        _append_nothing(backend)
    return tokenizer


def _check_files(folder: pathlib.Path) -> None:
    """Rejects files that are not the folder's own or too large, and the folders for which transformers gives a
    misleading reason, asks a question or guesses a class."""
    for name in (*TOKENIZER_FILES, "config.json", _MORE_TEMPLATES):
        require_own(folder / name, limits.TOKENIZER)
    for file in (folder / _MORE_TEMPLATES).glob("*"):
        require_own(file, limits.TOKENIZER)
    complete, sentencepiece = folder / "tokenizer.json", folder / "tokenizer.model"
    for file in (complete, sentencepiece):
        if file.is_file() and file.stat().st_size < LFS_BYTES:
            require_downloaded(file, file.read_bytes())
    settings = _settings(folder / "tokenizer_config.json")
    if "AutoTokenizer" in (settings.get("auto_map") or {}):
        raise InputError(
            f"{folder}/tokenizer_config.json names Python code of its own (auto_map), which is never run: use a folder "
            "whose tokenizer is a class of transformers"
        )
    if empty := [name for name in ("bos_token", "eos_token", "unk_token") if settings.get(name) == ""]:
        raise InputError(
            f"{folder}/tokenizer_config.json has an empty {some(empty)}: name the token, such as '<s>' for bos_token, "
            "'</s>' for eos_token and '<unk>' for unk_token of LLaMA"
        )
    if complete.is_file() or not sentencepiece.is_file():
        return
    if not sentencepiece.read_bytes()[:64].startswith(b"\n"):  # protocol buffers begin with a field number
        raise InputError(
            f"{sentencepiece} is not a sentencepiece model: if it is Meta's file of Llama 3, use the tokenizer.json of "
            "the model's Hugging Face folder"
        )
    if not settings.get("tokenizer_class"):
        raise InputError(
            f"{folder} has a tokenizer.model, but neither tokenizer.json nor a tokenizer_config.json with its "
            'tokenizer_class, which decides how spaces are read: add {"tokenizer_class": "LlamaTokenizer", "legacy": '
            "...} as the model's Hugging Face folder has it"
        )
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]:
        packages = " ".join(name.replace("google.", "") for name in missing)
        raise InputError(
            f"{folder} has a tokenizer.model and no tokenizer.json: install what reads it, pip install {packages}"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _settings(file: pathlib.Path) -> dict[str, Any]:
    """A tokenizer_config.json; empty if there is none, or if transformers is to say what is wrong with it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _append_nothing(backend: Any) -> None:
    """Makes a tokenizer that appends EOS to each text stop doing so; what it prepends stays."""
    probe = "a"
    own, whole = backend.encode(probe, add_special_tokens=False).ids, backend.encode(probe).ids
    before = next((i for i in range(len(whole) - len(own) + 1) if whole[i : i + len(own)] == own), None)
    if before is None or before + len(own) == len(whole):
        return
    tokens = [(backend.id_to_token(i), i) for i in whole[:before]]
    single = [*(token for token, _ in tokens), "$A"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=tokens
    )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a prompt: with BOS if the tokenizer prepends it and the text does not begin with it."""
    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    with _encoding(tokenizer.name_or_path):
        ids = backend.encode(text).ids
    return backend.encode(text, add_special_tokens=False).ids if ids[:2] == [bos, bos] else ids


@contextlib.contextmanager
def _encoding(folder: str) -> Iterator[None]:
    """Makes an error of the tokenizers library one sentence: a rule in tokenizer.json can fail, or a text be none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is no Exception
            raise
        raise InputError(f"tokenizer {folder} cannot encode a text: {textwrap.shorten(str(error), 200)}") from None


def require_known(ids: Sequence[int] | np.ndarray, tokenizer: Any, vocab_size: int, what: str) -> None:
    """Checks that a model has all tokens of a text. A tokenizer may have more of them than the model: Llama 2 folders
    have a <pad> without an embedding.

    Raises:
      InputError: if a token is missing; the message names it and `what`, the text.
    """
    largest = int(np.max(ids, initial=0))
    if largest >= vocab_size:
        raise InputError(
            f"{what} contains token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's "
            f"vocab_size is {vocab_size}: use the tokenizer of the model, or remove the token from the text"
        )


def encode(tokenizer: Any, texts: Sequence[str], *, bos: bool, eos: bool) -> list[np.ndarray]:
    """Returns the token ids of each text, uint32 [n]. An empty text has no tokens, not even BOS or EOS.

    Raises:
      InputError: if BOS or EOS is requested and the tokenizer does not have it.
    """
    before, after = special_tokens(tokenizer, "bos", bos), special_tokens(tokenizer, "eos", eos)
    with _encoding(tokenizer.name_or_path):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = (encoding.ids for encoding in encodings)
    return [np.array([*before, *own, *after] if own else [], np.uint32) for own in ids]


def special_tokens(tokenizer: Any, name: str, wanted: bool) -> list[int]:
    """Returns the id of a special token ("bos" or "eos") as a list, which is empty if the token is not wanted.

    Raises:
      InputError: if the token is wanted and the tokenizer does not have it.
    """
    token = getattr(tokenizer, f"{name}_token_id") if wanted else None
    if wanted and token is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path} has no {name.upper()} token: use --no-{name}")
    file = pathlib.Path(tokenizer.name_or_path) / "tokenizer.json"
    if wanted and token >= tokenizer.vocab_size and file.is_file():
        added = {entry.get("content") for entry in _settings(file).get("added_tokens") or ()}
        if (text := tokenizer.convert_ids_to_tokens(token)) not in added:  # transformers invents an id for it
            raise InputError(f"{name}_token is {text!r}, which {file} does not contain: correct tokenizer_config.json")
    return [token] if wanted else []


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: text that precedes a document and that the model reads but does not predict.

    A prompt is a template with a text inserted. Both training and evaluation truncate and tokenize prompts with this
    class. The template before the text, the text, and the template after it are tokenized separately, so that their
    tokens do not depend on where the text is truncated.
    """

    template: str = "{}"
    """Template with one {}, which is replaced by the text."""
    max_tokens: int | None = None
    """Maximum number of tokens of the text; the rest is cut off. None: no limit."""

    def __post_init__(self):
        if self.template.count("{}") != 1:
            raise InputError(f"the prompt template is {self.template!r}: it must contain {{}} once, for the text")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"the number of prompt tokens to keep is {self.max_tokens}: it must be positive")

    def encode(self, tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each prompt, uint32 [n], without special tokens."""
        before, after = encode(tokenizer, self.template.split("{}"), bos=False, eos=False)
        inside = encode(tokenizer, texts, bos=False, eos=False)
        return [np.concatenate([before, text[: self.max_tokens], after]) for text in inside]


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """Identity of a tokenizer. Token stores can be mixed, and used with a model, only if `vocab_hash` agrees."""

    name: str
    """Class of the tokenizer."""
    vocab_size: int
    """Largest token id + 1: the minimum vocabulary size of a model."""
    vocab_hash: str
    """SHA-256 of the sorted pairs of token and id."""

    @classmethod
    def of(cls, name: str, vocab: Mapping[str, int]) -> "TokenizerInfo":
        """Returns the identity of a tokenizer whose `get_vocab()` is `vocab`.

        Raises:
          InputError: if it has no tokens, or ids that an int32 cannot hold.
        """
        largest = max(vocab, key=vocab.get, default=None)
        if largest is None:
            raise InputError(f"the tokenizer, a {name}, has no tokens")
        if vocab[largest] >= LARGEST_VOCABULARY:
            raise InputError(
                f"the tokenizer, a {name}, has the token {largest!r:.80} with id {vocab[largest]}: ids must be below "
                f"{LARGEST_VOCABULARY}"
            )
        canonical = json.dumps(sorted(vocab.items()), separators=(",", ":"))
        return cls(name, vocab[largest] + 1, hashlib.sha256(canonical.encode()).hexdigest())
