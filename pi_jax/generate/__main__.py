import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import tyro

from pi_jax import cli
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig
from pi_jax.errors import InputError
from pi_jax.generate.generator import Generator, require_mesh, stop_tokens, warn_beyond_window
from pi_jax.generate.streaming import Stream
from pi_jax.parallel import processes, sharding


@dataclasses.dataclass(frozen=True)
class Generate:
    """Text from a model, as it comes."""

    model: str
    """Hugging Face folder, or the folder of a pi_jax run."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; several are continued side by side."""
    prompt_file: str = ""
    """A file whose text is one more prompt."""
    chat: bool = False
    """Put each prompt into the tokenizer's chat template, as a message of the user."""
    max_new_tokens: int = 128
    """Of each continuation."""
    temperature: float = 0.0
    """0: the likeliest token always."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that has this probability."""
    seed: int = 0
    """Of the draws."""
    rope: RopeConfig = RopeConfig()
    """Scaling to stamp on a model that has none: interpolation without fine-tuning."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation."""
    chunk: int = 512
    """Tokens of a prompt that are read at once."""
    mesh: MeshConfig = MeshConfig()
    """Devices: prompts are split over data, fsdp and context, heads over tensor."""
    output: str = ""
    """Also write prompts and continuations to this JSON file."""


def generate(args: Generate) -> list[str]:
    """Runs the command; returns the continuations."""
    from pi_jax.convert.open import open_model
    from pi_jax.data.tokenizer import load_tokenizer

    cli.require_writable(args.output)
    texts = [*args.prompt, *([_read(args.prompt_file)] if args.prompt_file else [])]
    if not texts:
        raise InputError("nothing to continue: give --prompt TEXT or --prompt-file FILE")
    source = open_model(args.model, args.rope)
    tokenizer = load_tokenizer(source.files)
    prompts = [_tokens(tokenizer, text, args.chat) for text in texts]
    highest = max((max(p, default=0) for p in prompts), default=0)
    if highest >= source.config.vocab_size:
        raise InputError(
            f"{source.files}: the tokenizer has token {highest}, the model's vocab_size is {source.config.vocab_size}: "
            "they do not belong together"
        )
    length = max(map(len, prompts)) + args.max_new_tokens
    warn_beyond_window(source.config, length)
    mesh = sharding.make_mesh(args.mesh)
    require_mesh(mesh, source.config)
    with jax.set_mesh(mesh):
        compute = ComputeConfig(dtype=args.dtype, param_dtype=args.dtype, remat="none")
        generator = Generator(source.load(compute, mesh), mesh, max_length=max(length, 2), chunk=args.chunk)
    stream = Stream(tokenizer) if len(prompts) == 1 and jax.process_index() == 0 else None
    new = generator(
        prompts,
        args.max_new_tokens,
        stop_tokens=stop_tokens(source.config, tokenizer),
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        on_token=stream,
    )
    continuations = [tokenizer.decode(tokens) for tokens in new]
    if stream:
        stream.close()
    elif jax.process_index() == 0:
        for text, continuation in zip(texts, continuations, strict=True):
            print(f"--- {text[:60]!r}\n{continuation}")
    if args.output and jax.process_index() == 0:
        rows = zip(texts, continuations, map(len, prompts), map(len, new), strict=True)
        names = ("prompt", "continuation", "prompt_tokens", "new_tokens")
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k in ("temperature", "top_p", "seed", "dtype")}
        results = [dict(zip(names, row, strict=True)) for row in rows]
        head = {"command": "generate", "model": args.model, "rope": f"{source.config.rope}"}
        cli.write_json(args.output, head | settings | {"results": results})
    return continuations


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt-file {path} cannot be read: {error}") from None


def _tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise InputError(f"--chat: {tokenizer.name_or_path} has no chat template")
    message = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(whole, add_special_tokens=False)["input_ids"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""

    def command():
        args = tyro.cli(Generate, prog="python -m pi_jax.generate", args=argv)
        processes.initialize()
        generate(args)

    cli.run(command)


if __name__ == "__main__":
    main()
