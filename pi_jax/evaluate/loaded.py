"""A model that is ready to score and continue text, as used by all evaluations and by `generate`."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pi_jax import atomic, log
from pi_jax.config import ComputeConfig, MeshConfig, ModelConfig, RopeConfig
from pi_jax.convert.open import Source, open_model
from pi_jax.data.tokenizer import encode_prompt, load_tokenizer, require_known, special_tokens
from pi_jax.errors import InputError
from pi_jax.evaluate.loglikelihood import score_sequences, sequences_per_batch
from pi_jax.generate import Generator, require_mesh, stop_tokens, warn_beyond_window
from pi_jax.model import Llama
from pi_jax.parallel import placement, sharding

BATCH_TOKENS = 32768
"""Tokens of prompts that are read side by side, where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Selects the model to evaluate and how to compute it."""

    model: str
    """Hugging Face folder, Meta folder, or the folder of a pi_jax run."""
    rope: RopeConfig = RopeConfig()
    """Scaling to apply to a model that has none, to evaluate it with a longer window without fine-tuning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations. bfloat16 halves the memory; results are less precise."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis: sequences are sharded over data and fsdp, heads over tensor."""
    output: str = ""
    """Also write the result to this JSON file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """Which model answers, and how it is computed."""

    batch_tokens: int = BATCH_TOKENS
    """Tokens of prompts that are read side by side; a longer prompt is read alone. Lower it if memory runs out."""

    def __post_init__(self):
        if self.batch_tokens < 1:
            raise InputError(f"batch-tokens is {self.batch_tokens}: it must be at least 1")


class LoadedModel:
    """A model and its tokenizer, on a mesh.

    The folder, the mesh and the tokenizer are checked when the model is opened. Weights are loaded on first use, so
    invalid input is rejected before that.
    """

    def __init__(self, source: Source, compute: ComputeConfig, mesh: jax.sharding.Mesh, tokenizer: Any):
        self.source, self.compute, self.mesh, self.tokenizer = source, compute, mesh, tokenizer

    @classmethod
    def open(
        cls, path: str, *, rope: RopeConfig = RopeConfig(), dtype: str = "float32", mesh: MeshConfig = MeshConfig()
    ) -> "LoadedModel":
        """Opens a model folder.

        Args:
          path: Hugging Face folder, Meta folder, or the folder of a pi_jax run.
          rope: scaling to apply to a model that has none.
          dtype: dtype of weights and activations, "float32" or "bfloat16".
          mesh: devices along each axis; by default, all of them are along fsdp.

        Raises:
          InputError: if the folder is not a model folder, its tokenizer cannot be read, or sizes of the model are not
            divisible by those of the mesh.
        """
        source = open_model(path, rope)
        tokenizer = load_tokenizer(source.files)
        devices = sharding.make_mesh(mesh)
        require_mesh(devices, source.config)
        return cls(source, ComputeConfig(dtype=dtype, param_dtype=dtype, remat="none"), devices, tokenizer)

    @classmethod
    def for_evaluation(cls, options: ModelOptions) -> "LoadedModel":
        """Opens the model for an evaluation command, and checks that its output can be written.

        Raises:
          InputError: as `open`, or if the output cannot be written.
        """
        atomic.require_writable(options.output)
        return cls.open(options.model, rope=options.rope, dtype=options.dtype, mesh=options.mesh)

    @property
    def bos(self) -> int:
        """The tokenizer's BOS token, which `prepare` uses, too.

        Raises:
          InputError: if it has none.
        """
        (token,) = special_tokens(self.tokenizer, "bos", True)
        if self.config.bos_token_id not in (None, token):
            log.note(
                f"{self.source.files}: bos_token_id is {self.config.bos_token_id} in config.json, but the tokenizer's "
                f"BOS is {token}, which is used"
            )
        require_known([token], self.tokenizer, self.config.vocab_size, "a text with BOS")
        return token

    def encode_prompt(self, text: str, chat: bool = False) -> list[int]:
        """Returns the token ids of a prompt, with BOS if the tokenizer prepends it, never with EOS.

        Args:
          text: the prompt.
          chat: whether a chat template made it, which adds the special tokens itself.

        Raises:
          InputError: if the text contains a token that the model lacks.
        """
        if chat:
            ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = encode_prompt(self.tokenizer, text)
        require_known(ids, self.tokenizer, self.config.vocab_size, f"the text {text[:40]!r}")
        return ids

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model, including the applied scaling."""
        return self.source.config

    @functools.cached_property
    def weights(self) -> Llama:
        """The model with its weights on the mesh, loaded on first use."""
        with jax.set_mesh(self.mesh):
            return self.source.load(self.compute, self.mesh)

    @contextlib.contextmanager
    def computing(self) -> Iterator[Llama]:
        """Yields the weights in a context in which the mesh is set and float32 products are exact (no TF32)."""
        weights = self.weights
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("float32"):
            yield weights

    def generator(self, max_length: int, chunk: int = 512) -> Generator:
        """Returns a generator for prompts and continuations of up to `max_length` tokens together."""
        warn_beyond_window(self.config, max_length)
        with jax.set_mesh(self.mesh):
            return Generator(self.weights, self.mesh, max_length=max(max_length, 2), chunk=chunk)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Continues a text, or several as one batch, with greedy decoding by default.

        Args:
          prompts: the text or texts to continue.
          max_new_tokens: maximum number of tokens per continuation.
          temperature: 0 selects the most likely token; otherwise logits are divided by it and a token is sampled.
          top_p: sample from the smallest set of most likely tokens whose total probability reaches this value.
          seed: random seed for sampling.

        Raises:
          InputError: if a prompt is empty or contains a token outside the model's vocabulary.
        """
        if isinstance(prompts, str):
            options = {"temperature": temperature, "top_p": top_p, "seed": seed}
            return self.generate([prompts], max_new_tokens, **options)[0]
        tokens = [self.encode_prompt(text) for text in prompts]
        generator = self.generator(max(map(len, tokens), default=0) + max_new_tokens)
        stops = stop_tokens(self.config, self.tokenizer)
        new = generator(tokens, max_new_tokens, stop_tokens=stops, temperature=temperature, top_p=top_p, seed=seed)
        return [self.tokenizer.decode(continuation, skip_special_tokens=True) for continuation in new]

    def loglikelihood(self, text: str) -> Float[np.ndarray, " S-1"]:
        """Computes the log-probability in nats of each token of a text except the first, given the tokens before it.

        No special tokens are added. The tokens are those of `self.tokenizer(text, add_special_tokens=False)`.

        Raises:
          InputError: if the text has fewer than two tokens, or a token outside the model's vocabulary.
        """
        ids = self._encode(text)
        length = -(-len(ids) // self.mesh.shape["context"]) * self.mesh.shape["context"]
        size = sequences_per_batch(self.mesh, length, length, 1)
        tokens = np.zeros((size, length), np.int32)
        tokens[0, : len(ids)] = ids
        with self.computing() as weights:
            losses, _ = score_sequences(weights, tokens, 1, len(ids), weights.compute.loss_chunk, self.mesh)
        return -losses[0, 1 : len(ids)]

    def logits(self, text: str) -> Float[np.ndarray, "S V"]:
        """Computes the float32 logits after each token of a text.

        They take S x V floats of memory; use `loglikelihood` for long texts.

        Raises:
          InputError: if the text has fewer than two tokens, or a token outside the model's vocabulary.
        """
        ids = self._encode(text)
        length = -(-len(ids) // self.mesh.shape["context"]) * self.mesh.shape["context"]
        tokens = np.zeros((sequences_per_batch(self.mesh, length, length, 1), length), np.int32)
        tokens[:, : len(ids)] = ids
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        with self.computing() as weights:
            placed = placement.put_global(self.mesh, {"tokens": tokens, "positions": positions})
            return placement.fetch(_logits(weights, placed["tokens"], placed["positions"]))[0, : len(ids)]

    def _encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) < 2:
            raise InputError(f"the text {text[:40]!r} has {len(ids)} tokens: it needs at least 2")
        require_known(ids, self.tokenizer, self.config.vocab_size, f"the text {text[:40]!r}")
        return ids


@jax.jit
def _logits(model: Llama, tokens_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
    return model.logits(model(tokens_BS, positions_BS)).astype(jnp.float32)


def answer(
    generator: Generator,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    batch_tokens: int,
    what: str,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answers, as text, in the order of the prompts, greedy by default; a bar on stderr says how far it is."""
    longest = max(len(p) for p in prompts) + new_tokens
    rows = max(1, batch_tokens // longest // generator.batch_shards) * generator.batch_shards
    rows = min(rows, -(-len(prompts) // generator.batch_shards) * generator.batch_shards)
    stops = stop_tokens(generator.config, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    drawing = {"temperature": temperature, "top_p": top_p}
    bar = log.progress(len(prompts), what, "prompt")
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        given = [prompts[i] for i in part]
        given += [given[0]] * (rows - len(part))  # the last batch has the shape of the others: nothing compiles anew
        # With one seed the rows of every batch would draw alike.
        found = generator(given, new_tokens, stop_tokens=stops, seed=seed + at, **drawing)
        for i, tokens in zip(part, found, strict=False):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        bar.update(len(part))
    bar.close()
    return texts
