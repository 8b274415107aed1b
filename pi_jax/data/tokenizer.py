"""Tokenizers: loading, encoding with special tokens, prompts, and the identity that a token store records."""

import dataclasses
import hashlib
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pi_jax.errors import InputError, no_folder

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


def load_tokenizer(folder: str) -> Any:
    """Loads the fast tokenizer of a local Hugging Face folder without downloading files or running code from it.

    Raises:
      InputError: if the folder does not exist or contains no tokenizer that transformers can load as a fast one.
    """
    import transformers

    if not os.path.isdir(folder):
        raise no_folder(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # invalid files make transformers and tokenizers raise many types of exception
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise InputError(f"tokenizer {folder} cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {folder} is a {type(tokenizer).__name__}: the folder must have a tokenizer.json")
    tokenizer.model_max_length = 1 << 40  # it says nothing of the window once RoPE is scaled, but makes encoding warn
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], *, bos: bool, eos: bool) -> list[np.ndarray]:
    """Returns the token ids of each text, uint32 [n]. An empty text has no tokens, not even BOS or EOS.

    Raises:
      InputError: if BOS or EOS is requested and the tokenizer does not have it.
    """
    before, after = special_tokens(tokenizer, "bos", bos), special_tokens(tokenizer, "eos", eos)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json can enable truncation and padding
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
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
        """Returns the identity of a tokenizer whose `get_vocab()` is `vocab`."""
        canonical = json.dumps(sorted(vocab.items()), separators=(",", ":"))
        return cls(name, max(vocab.values()) + 1, hashlib.sha256(canonical.encode()).hexdigest())
