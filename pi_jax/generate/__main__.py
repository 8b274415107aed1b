"""`python -m pi_jax.generate`: generates text with a model."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import tyro

from pi_jax import atomic, cli
from pi_jax.data import chat
from pi_jax.errors import InputError
from pi_jax.evaluate import result
from pi_jax.evaluate.loaded import LoadedModel, ModelOptions
from pi_jax.generate.generator import stop_tokens
from pi_jax.generate.streaming import Stream
from pi_jax.parallel import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Generate text from a model and print it as it is produced."""

    prompt: tuple[str, ...] = ()
    """Texts to continue; several texts form one batch."""
    prompt_file: str = ""
    """Read one more prompt from this file."""
    chat: bool = False
    """Format each prompt with the tokenizer's chat template, as a user message."""
    max_new_tokens: int = 128
    """Maximum number of tokens per continuation."""
    temperature: float = 0.0
    """Sampling temperature. 0 always selects the most likely token; higher values give more varied text."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose total probability reaches this value."""
    seed: int = 0
    """Random seed for sampling."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and activations."""
    chunk: int = 512
    """Prefill chunk size in tokens. Lower it if a long prompt runs out of memory."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}: it must be from 0 to {2**63 - 1}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature}: it must be 0 or more")


def generate(args: Generate) -> list[str]:
    """Runs the command and returns the continuations."""
    atomic.require_writable(args.output)
    texts = [*args.prompt, *([_read(args.prompt_file)] if args.prompt_file else [])]
    if not texts:
        raise InputError("nothing to continue: pass --prompt TEXT or --prompt-file FILE")
    loaded = LoadedModel.open(args.model, rope=args.rope, dtype=args.dtype, mesh=args.mesh)
    source, tokenizer = loaded.source, loaded.tokenizer
    given = chat.render(tokenizer, texts) if args.chat else texts
    prompts = [loaded.encode_prompt(text, args.chat) for text in given]
    generator = loaded.generator(max(map(len, prompts)) + args.max_new_tokens, args.chunk)
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
    if args.output:
        found = zip(texts, continuations, map(len, prompts), map(len, new), strict=True)
        names = ("prompt", "continuation", "prompt_tokens", "new_tokens")
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k in ("temperature", "top_p", "seed", "dtype")}
        results = [dict(zip(names, row, strict=True)) for row in found]
        head = {"command": "generate", "model": args.model, "rope": f"{source.config.rope}"}
        result.write(args.output, head | settings | {"results": results})
    return continuations


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt-file {path} cannot be read: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with the arguments of the command line."""

    def command():
        args = tyro.cli(Generate, prog="python -m pi_jax.generate", args=argv)
        processes.initialize()
        generate(args)

    cli.run(command, connect=processes.connect)


if __name__ == "__main__":
    main()
