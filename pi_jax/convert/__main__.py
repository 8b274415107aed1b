"""`python -m pi_jax.convert`: a model from one form into another."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import tyro
from etils import epath

from pi_jax import cli
from pi_jax.config import RopeConfig
from pi_jax.convert import pipeline
from pi_jax.convert.folders import has_tokenizer, is_remote, new_folder, require_absent
from pi_jax.convert.formats import hf, meta, native
from pi_jax.convert.formats.meta import MetaOptions
from pi_jax.convert.open import Source, open_model
from pi_jax.convert.verify import logits
from pi_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model in another form: Hugging Face's, which transformers, vLLM, SGLang and llama.cpp read; Meta's; or a
    pi_jax checkpoint.

    Weights pass one tensor at a time, whatever the model's size. The result is read back and compared before it gets
    its name."""

    source: str
    """Hugging Face folder, Meta folder, or the folder of a pi_jax run."""
    target: str
    """Folder to make."""
    format: Literal["hf", "meta", "orbax"] = "hf"
    """Format of the target; 'orbax' is a pi_jax checkpoint."""
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Dtype of the written weights; 'same' keeps that of the source."""
    rope: RopeConfig = RopeConfig()
    """Scaling to apply to a model that has none, to serve it extended without fine-tuning."""
    verify: bool = True
    """Read the target back by other code and compare every tensor; and logits, where torch is installed."""
    step: int | None = None
    """Checkpoint of a run to read, by step; default: the newest."""
    tokenizer: str = ""
    """Folder to take the tokenizer from; that of the source if not given. Meta's own files are not what Hugging Face's
    readers want."""
    shard_gb: float = hf.SHARD_BYTES / 1e9
    """Largest safetensors file, in GB."""
    meta: MetaOptions = MetaOptions()
    """What a Meta folder does not say of itself, or can be written as."""


def convert(args: Convert, quiet: bool = False) -> None:
    """Runs the command."""
    require_absent(args.target)  # before the minutes that the rest may take
    if args.format == "meta" and is_remote(args.target):
        raise InputError(f"{args.target}: .pth files are written to a local folder only: choose one")
    if args.tokenizer and not has_tokenizer(args.tokenizer):
        raise InputError(f"--tokenizer {args.tokenizer} holds neither tokenizer.json nor tokenizer_config.json")
    if args.shard_gb <= 0:
        raise InputError(f"--shard-gb is {args.shard_gb}: it must be positive")
    source = open_model(args.source, args.rope, args.meta.window)
    config, files = source.config, args.tokenizer or source.files
    started = time.monotonic()
    weights = source.reader(args.step)
    reader = pipeline.Cast(weights, args.dtype)
    with new_folder(args.target) as folder:
        if args.format == "hf":
            facts = source.facts(getattr(weights, "step", 0))
            size = int(args.shard_gb * 1e9)
            hf.write(reader, config, folder, size, facts, files, args.verify, quiet)
        elif args.format == "meta":
            meta.write(reader, config, folder, args.meta, files, args.verify, quiet)
        else:
            native.write(reader, config, folder, files, args.verify, quiet)
        compared = _compare_logits(args, source, reader, folder) if args.verify else "not compared (--no-verify)"
    size = sum(math.prod(tensor.shape) * reader.dtypes[tensor.name].itemsize for tensor in reader.order)
    print(
        f"{args.target}: {config.num_parameters():,} parameters, {pipeline.main_dtype(reader.dtypes)}, {config.rope}, "
        f"window {config.max_position_embeddings}; {size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s; "
        f"{compared}"
    )
    for note in _notes(args, source):
        print(f"note: {note}")


def _compare_logits(args: Convert, source: Source, reader: pipeline.Reader, folder: epath.Path) -> str:
    """pi_jax on the one side, transformers on the Hugging Face side, whichever that is."""
    if args.format == "hf":
        told = logits.compare(reader, source.config, folder)
    elif source.kind == "hf" and open_model(args.source).config == source.config:
        target = dataclasses.replace(open_model(str(folder)), config=source.config)
        told = logits.compare(target.reader(), source.config, args.source)
    else:
        return "every tensor compared"
    return f"every tensor compared, {told}"


def _notes(args: Convert, source: Source) -> Iterator[str]:
    config = source.config
    folder = epath.Path(args.target) / (native.MODEL if args.format == "orbax" else "")
    if source.kind == "meta" and not args.meta.window and not (epath.Path(args.source) / meta.SIDECAR).is_file():
        yield (
            f"params.json does not say the window: taken as {config.original_window} by the rules in docs/convert.md "
            "(--meta.window)"
        )
    if args.format == "meta" and config.rope.kind not in ("default", "llama3"):
        yield (
            f"Meta's own code knows no {config.rope.kind!r} scaling and reads this model as unscaled; pi_jax reads the "
            f"scaling from {meta.SIDECAR}"
        )
    if args.format != "meta" and not has_tokenizer(folder):
        yield f"{args.source} has no tokenizer that transformers reads: give its folder by --tokenizer"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: convert(tyro.cli(Convert, prog="python -m pi_jax.convert", args=argv)))


if __name__ == "__main__":
    main()
