"""`python -m pi_jax.convert`: a model from one form into another."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tyro

from pi_jax import cli, sharding
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig
from pi_jax.convert import hf
from pi_jax.convert.sources import open_model


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as a Hugging Face folder that transformers, vLLM, SGLang and llama.cpp read.

    The result is read back and compared before it gets its name."""

    source: str
    """Hugging Face folder, or the folder of a pi_jax run."""
    target: str
    """Folder to make."""
    format: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the written weights."""
    rope: RopeConfig = RopeConfig()
    """Scaling to stamp on a model that has none, to serve it extended without fine-tuning."""


def convert(args: Convert) -> None:
    """Runs the command."""
    import jax

    source = open_model(args.source, args.rope)
    hf.require_absent(args.target)  # before the minutes that loading may take
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        hf.save(source.load(ComputeConfig(), mesh), args.target, source.files, args.dtype)
    scaling = source.config.rope
    print(
        f"{args.target}: {source.config.num_parameters():,} parameters, {args.dtype}, {scaling}, "
        f"window {source.config.max_position_embeddings}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: convert(tyro.cli(Convert, prog="python -m pi_jax.convert", args=argv)))


if __name__ == "__main__":
    main()
