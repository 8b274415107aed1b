"""`python -m pi_jax.convert`: converts a model from one format to another."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import tyro
from etils import epath

from pi_jax import cli
from pi_jax.atomic import is_remote, new_folder, require_absent
from pi_jax.config import RopeConfig
from pi_jax.convert import pipeline
from pi_jax.convert.folders import has_tokenizer
from pi_jax.convert.formats import hf, meta, native
from pi_jax.convert.formats.meta import MetaOptions
from pi_jax.convert.open import Source, open_model
from pi_jax.convert.verify import logits
from pi_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a model to Hugging Face's format (for transformers, vLLM, SGLang and llama.cpp), Meta's format, or a
    pi_jax checkpoint.

    Weights are converted one tensor at a time, whatever the size of the model. The target is read back and compared
    before it gets its final name."""

    source: str
    """Hugging Face folder, Meta folder, or the folder of a pi_jax run."""
    target: str
    """Folder to create; it must not exist."""
    format: Literal["hf", "meta", "orbax"] = "hf"
    """Format of the target; 'orbax' is a pi_jax checkpoint."""
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Dtype of the written weights; 'same' keeps the dtype of the source."""
    rope: RopeConfig = RopeConfig()
    """Scaling to apply to a model that has none, to serve it with a longer window without fine-tuning."""
    verify: bool = True
    """Read the target back with independent code and compare every tensor; with torch installed, also compare
    logits."""
    step: int | None = None
    """Checkpoint to convert if the source is a run, by step; default: the newest."""
    tokenizer: str = ""
    """Folder with the tokenizer; default: the source. Set it if the source has no tokenizer that transformers can
    load, such as Meta's own folders."""
    max_position_embeddings: int = 0
    """Window of the source in tokens, if its files do not state it or are wrong; 0 trusts them (docs/convert.md)."""
    eos: tuple[int, ...] = ()
    """Tokens that end a text, besides those that the files of the source state; a Meta folder states none."""
    shard_gb: float = hf.SHARD_BYTES / 1e9
    """Maximum size of a safetensors file, in GB."""
    meta: MetaOptions = MetaOptions()
    """Options for a target in Meta's format."""


def convert(args: Convert, quiet: bool = False) -> None:
    """Runs the command."""
    require_absent(args.target)  # fail early: the conversion may take minutes
    if args.format == "meta" and is_remote(args.target):
        raise InputError(f"--target is {args.target}: .pth files can be written to a local folder only")
    if args.tokenizer and not has_tokenizer(args.tokenizer):
        raise InputError(f"--tokenizer {args.tokenizer} contains neither tokenizer.json nor tokenizer_config.json")
    if not 0 < args.shard_gb < math.inf:
        raise InputError(f"--shard-gb is {args.shard_gb}: it must be positive and finite")
    if args.max_position_embeddings < 0:
        raise InputError(f"--max-position-embeddings is {args.max_position_embeddings}: it must be positive")
    source = _open(args)
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
        compared = _compare_logits(args, source, weights, folder) if args.verify else "not compared (--no-verify)"
    size = sum(math.prod(tensor.shape) * reader.dtypes[tensor.name].itemsize for tensor in reader.order)
    print(
        f"{args.target}: {config.num_parameters():,} parameters, {pipeline.main_dtype(reader.dtypes)}, {config.rope}, "
        f"window {config.max_position_embeddings}; {size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s; "
        f"{compared}"
    )
    for note in _notes(args, source):
        print(f"note: {note}")


def _open(args: Convert, rope: RopeConfig | None = None) -> Source:
    return open_model(args.source, args.rope if rope is None else rope, args.max_position_embeddings, args.eos)


def _compare_logits(args: Convert, source: Source, weights: pipeline.Reader, folder: epath.Path) -> str:
    """Compares pi_jax's logits with what transformers makes of the source and of the target, each by itself."""
    pairs: list[tuple[pipeline.Reader, Any]] = []
    if source.kind == "hf" and _open(args, RopeConfig()).config.rope == source.config.rope:
        pairs.append((weights, args.source))
    if args.format == "hf":
        pairs.append((pipeline.Cast(weights, args.dtype), folder))
    elif pairs and args.dtype == "same":
        pairs.append((dataclasses.replace(open_model(str(folder)), config=source.config).reader(), args.source))
    return f"every tensor compared, {logits.compare(source.config, pairs)}" if pairs else "every tensor compared"


def _notes(args: Convert, source: Source) -> Iterator[str]:
    config = source.config
    folder = epath.Path(args.target) / (native.MODEL if args.format == "orbax" else "")
    if args.format == "meta" and config.rope.kind not in ("default", "llama3"):
        yield (
            f"Meta's own code does not support {config.rope.kind!r} scaling and reads this model as unscaled; pi_jax "
            f"reads the scaling from {meta.SIDECAR}"
        )
    if args.format != "meta" and not has_tokenizer(folder):
        yield f"{args.source} has no tokenizer that transformers can load: pass its folder with --tokenizer"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""
    cli.run(lambda: convert(tyro.cli(Convert, prog="python -m pi_jax.convert", args=argv)))


if __name__ == "__main__":
    main()
