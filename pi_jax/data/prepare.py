"""Tokenizes documents into a token store and summarizes their lengths.

Each document is tokenized as a whole, without special tokens; EOS is appended and BOS prepended as requested. Documents
are passed to the tokenizer in batches, which it processes in parallel threads.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tyro

from pi_jax import atomic, cli, log
from pi_jax.data import documents, find, store
from pi_jax.data.tokenizer import Prompt, encode, load_tokenizer, special_tokens
from pi_jax.errors import InputError

SUMMARIZE = "Read the following article and then summarize it.\n{}\nNow summarize the above article.\nSummary:\n"
"""The paper's prompt template for GovReport (Figure 4). The line break before the summary is our choice."""

_BATCH_CHARACTERS = 2**24
"""Characters per batch. The tokenizer needs a hundred bytes of memory per character and more."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenize text once, into a token store for training.

    A .txt or .md file is one document; .jsonl, .json (both also .gz, .zst) and .parquet files contain one document per
    line, object or row."""

    input: tuple[str, ...]
    """Text files, folders (searched recursively) or globs: .txt .md .jsonl .json (both also .gz or .zst) .parquet"""
    tokenizer: str
    """Local Hugging Face folder with the tokenizer of the model to train."""
    output: str
    """Folder of the token store to create."""
    text_field: str = "text"
    """Field of a JSON object or column of a .parquet file that contains the text."""
    prompt_field: str = ""
    """Field with the prompt: text that precedes the document and that `data.mask_prompts` excludes from the loss.
    Empty: documents have no prompt."""
    prompt_template: str = "{}"
    """Template of the prompt; {} is replaced by the prompt field. 'summarize' is the paper's template for GovReport."""
    max_prompt_tokens: int | None = None
    """Maximum number of tokens of the prompt field; the rest is cut off."""
    max_text_tokens: int | None = None
    """Maximum number of tokens of the text; the rest is cut off."""
    bos: bool = False
    """Prepend the tokenizer's BOS token to each document."""
    eos: bool = True
    """Append the tokenizer's EOS token to each document."""
    window: int = 32768
    """Window to train for, in tokens. The summary states how much of the text is in documents that fill it."""
    overwrite: bool = False
    """Replace an existing token store at the output."""
    report: str = ""
    """Also write the summary to this JSON file."""

    def __post_init__(self):
        if not self.input:
            raise InputError("--input is empty: it needs at least one text file, folder or glob")
        if self.window < 1:
            raise InputError(f"--window is {self.window}: it must be positive")
        if self.max_text_tokens is not None and self.max_text_tokens < 1:
            raise InputError(f"--max-text-tokens is {self.max_text_tokens}: it must be positive")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summary of a prepared token store. Lengths are in tokens, including BOS and EOS."""

    output: str
    """Folder of the token store."""
    files: dict[str, int]
    """Number of files that were read, by extension."""
    documents: int
    empty_documents: int
    """Documents without text other than white space, which are not in the store."""
    tokens: int
    characters_per_token: float
    """Mean, not counting BOS and EOS."""
    median_length: float
    longest: int
    length_histogram: dict[str, dict[str, int]]
    """Documents and tokens by the power of two at or below the length of the document."""
    window: int
    """Window to train for, in tokens."""
    long_documents: int
    """Documents that fill the window."""
    long_tokens_share: float
    """Fraction of all tokens that are in documents that fill the window."""
    seconds: float
    tokens_per_second: float

    def __str__(self) -> str:
        lines = [
            f"Token store {self.output}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.characters_per_token:.2f} characters per token",
            f"Tokenized {_counted(self.files)} in {self.seconds:,.1f} s, {self.tokens_per_second:,.0f} tokens/s",
            f"Document length in tokens: median {self.median_length:,.0f}, longest {self.longest:,}",
            f"{'at least':>12} {'documents':>12} {'tokens':>16} {'share':>7}",
        ]
        for lower, bin in self.length_histogram.items():
            share = bin["tokens"] / self.tokens
            lines.append(f"{int(lower):>12,} {bin['documents']:>12,} {bin['tokens']:>16,} {share:>7.1%}")
        if self.empty_documents:
            lines.append(f"Skipped: {self.empty_documents:,} empty documents")
        if self.long_documents:
            lines.append(
                f"Documents that fill a window of {self.window:,}: {self.long_documents:,}, "
                f"with {self.long_tokens_share:.1%} of the tokens"
            )
        else:
            lines.append(
                f"No document fills a window of {self.window:,} tokens, so training on this text would not teach a "
                "model to use that distance: use longer documents or a shorter window."
            )
        return "\n".join(lines)


def prepare(options: Options) -> Summary:
    """Tokenizes the input into a token store.

    Raises:
      InputError: if the input, tokenizer or output cannot be used, or the input contains no text.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = load_tokenizer(options.tokenizer)
    files = find.find_files(options.input)
    sizes = {path: [os.path.getsize(f) for f in find.find_files([path])] for path in options.input}
    stream = documents.read_documents(options.input, options.text_field, options.prompt_field)
    prompt = Prompt(
        SUMMARIZE if options.prompt_template == "summarize" else options.prompt_template, options.max_prompt_tokens
    )
    facts = {
        "bos": special_tokens(tokenizer, "bos", options.bos),
        "eos": special_tokens(tokenizer, "eos", options.eos),
        "sources": [{"name": path, "files": len(s), "bytes": sum(s)} for path, s in sizes.items()],
    }
    characters = empty = 0
    writer = store.TokenStoreWriter(
        options.output,
        tokenizer=store.TokenizerInfo.of(type(tokenizer).__name__, tokenizer.get_vocab()),
        tokenizer_dir=options.tokenizer,
        facts=facts,
        overwrite=options.overwrite,
    )
    started = time.monotonic()
    with writer, log.progress(sum(map(os.path.getsize, files)), "tokenizing", "B") as bar:
        for batch in _batches(stream):
            bar.update(sum(document.file_bytes for document in batch))
            empty += sum(document.empty for document in batch)
            batch = [document for document in batch if not document.empty]
            texts = [document.text for document in batch]
            before = prompt.encode(tokenizer, [d.prompt for d in batch]) if options.prompt_field else [[]] * len(batch)
            for given, own in zip(before, encode(tokenizer, texts, bos=False, eos=False), strict=True):
                if len(own):
                    parts = [facts["bos"], given, own[: options.max_text_tokens], facts["eos"]]
                    length = len(facts["bos"]) + len(given) if options.prompt_field else 0
                    writer.add(np.concatenate(parts).astype(np.uint32), prompt=length)
                else:
                    empty += 1
            characters += sum(len(d.text) + len(d.prompt) for d in batch)
        if not writer.num_documents:
            only = f", only {empty} empty documents" if empty else ""
            raise InputError(f"--input {' '.join(options.input)} contains no text{only}")
    return _summarize(options, files, characters, empty, time.monotonic() - started)


def _counted(files: dict[str, int]) -> str:
    return " and ".join(f"{count:,} {ending}" for ending, count in files.items())


def _batches(stream: Iterable[documents.Document]) -> Iterator[list[documents.Document]]:
    batch, size = [], 0
    for document in stream:
        batch.append(document)
        size += len(document.text) + 100  # limits the number of empty documents in a batch too
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _summarize(options: Options, files: list[str], characters: int, empty: int, seconds: float) -> Summary:
    written = store.TokenStore.open(options.output)
    lengths = np.diff(written.offsets)
    long = lengths >= options.window
    added = written.num_documents * (options.bos + options.eos)
    return Summary(
        output=options.output,
        files=dict(collections.Counter(map(find.ending, files)).most_common()),
        documents=written.num_documents,
        empty_documents=empty,
        tokens=written.num_tokens,
        characters_per_token=characters / (written.num_tokens - added),
        median_length=float(np.median(lengths)),
        longest=int(lengths.max()),
        length_histogram=written.manifest["length_histogram"],
        window=options.window,
        long_documents=int(long.sum()),
        long_tokens_share=float(lengths[long].sum() / written.num_tokens),
        seconds=seconds,
        tokens_per_second=written.num_tokens / seconds,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `python -m pi_jax.prepare`."""

    def command() -> None:
        options = tyro.cli(Options, prog="python -m pi_jax.prepare", args=argv)
        summary = prepare(options)
        print(summary)
        if options.report:
            atomic.write_json(options.report, dataclasses.asdict(summary))

    cli.run(command)
