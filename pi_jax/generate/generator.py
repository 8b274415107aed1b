"""Generates text: prefills the prompts in chunks, then decodes one token at a time with a static KV cache.

    python -m pi_jax.generate --model PATH --prompt TEXT

Prompts are processed in chunks with the attention backends of training. Logits are computed only for the last token,
so a prompt of 32k tokens never needs 32k x vocabulary logits. Prompts of unequal length are aligned at their ends in
the cache (`pi_jax.generate.kv_cache`), and the tokens of a sequence do not depend on the other sequences of its batch.

Shapes: B batch, S tokens in a chunk, D hidden, V vocabulary, L layers. A sequence of the batch is a prompt and its
continuation.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pi_jax import log, rope
from pi_jax.config import ModelConfig
from pi_jax.errors import InputError
from pi_jax.generate import kv_cache, sampling
from pi_jax.model import Block, Llama, RMSNorm, parameter_axes
from pi_jax.parallel import placement, sharding, supervisor

_SMALLEST = 16
"""Smallest chunk in tokens. The first chunk is a power of two from this on, so that few shapes compile."""


class _Weights(NamedTuple):
    """The weights of a model for generation. Each layer is a separate pytree, so no step slices a stacked weight."""

    embedding: nnx.Param
    layers: list[Block]
    norm: RMSNorm
    head: nnx.Param


class Generator:
    """Generates continuations of token sequences.

    Compiles once for each batch size, chunk length (powers of two up to `chunk`) and cache length (powers of two times
    `chunk`), and reuses the compiled programs in later calls.
    """

    def __init__(self, model: Llama, mesh: jax.sharding.Mesh, *, max_length: int, chunk: int = 512):
        """Copies the weights, cast to the model's compute dtype.

        Args:
          model: model with its parameters on `mesh`.
          mesh: sequences are sharded over its data, fsdp and context axes, heads over its tensor axis.
          max_length: maximum number of tokens of a prompt and its continuation.
          chunk: prefill chunk size in tokens.
        """
        if max_length < 2 or chunk < 1:
            raise InputError(f"max_length is {max_length} and chunk is {chunk}: they must be at least 2 and 1")
        self.config, self.compute = model.config, model.compute
        self.max_length = max_length
        self.batch_shards = sharding.batch_shards(sharding.for_generation(mesh))
        """Number of shards of the batch. Batches of a multiple of this many prompts leave no device idle."""
        self._chunk = chunk
        self._mesh = sharding.for_generation(mesh)
        with jax.set_mesh(self._mesh):
            self._weights = _unstack_layers(placement.put_params(self._mesh, model, parameter_axes(model)))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_tokens: Collection[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continues each prompt until a stop token or `max_new_tokens`.

        Args:
          prompts: token ids of each prompt; lengths may differ.
          max_new_tokens: maximum number of tokens of each continuation.
          stop_tokens: tokens that end a continuation; they are not part of it.
          temperature: 0 selects the most likely token; otherwise logits are divided by it and a token is sampled.
          top_p: sample from the smallest set of most likely tokens whose total probability reaches this value.
          seed: random seed for sampling.
          on_token: called with (index of the prompt, token) for each new token.

        Returns:
          The new tokens of each prompt.

        Raises:
          InputError: if a prompt is empty, contains a token outside the vocabulary, or is too long for `max_length`.
        """
        self._check(prompts, max_new_tokens, temperature, top_p)
        if not prompts:
            return []
        batch = -(-len(prompts) // self.batch_shards) * self.batch_shards
        filled = [list(p) for p in prompts] + [[0]] * (batch - len(prompts))  # pad the batch to fill the mesh
        stop_tokens = frozenset(stop_tokens)
        new: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("float32"):
            sampler = (jax.random.key(seed), jnp.float32(temperature or 1.0), jnp.float32(top_p))
            tokens_B, state = self._prefill(filled, max_new_tokens, sampler, temperature > 0)
            for step in range(max_new_tokens):
                supervisor.tick()
                ahead = None
                if step + 1 < max_new_tokens:  # dispatch the next step before reading this one: the device never waits
                    ahead = _decode(self._weights, self.config, tokens_B, state, sampler, temperature > 0)
                for index, token in enumerate(placement.fetch(tokens_B)[: len(prompts)].tolist()):
                    if index not in going:
                        continue
                    if token in stop_tokens:
                        going.remove(index)
                        continue
                    new[index].append(token)
                    if on_token:
                        on_token(index, token)
                if not going or ahead is None:
                    break
                tokens_B, state = ahead
        return new

    def _check(self, prompts, max_new_tokens, temperature, top_p) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        if temperature < 0:
            raise InputError(f"temperature is {temperature}: it must be 0 or more")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}: it must be greater than 0 and at most 1")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {i} is empty: it needs at least one token")
            if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
                raise InputError(
                    f"prompt {i} has token {max(prompt, key=abs)}: tokens must be 0 or more and less than vocab_size, "
                    f"{self.config.vocab_size}"
                )
            if len(prompt) + max_new_tokens > self.max_length:
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new tokens it exceeds max_length, "
                    f"{self.max_length}"
                )

    def _prefill(self, prompts, max_new_tokens, sampler, sample):
        """Processes all prompts; returns the first new token of each sequence and the state for decoding."""
        lengths = np.array([len(p) for p in prompts])
        longest = int(lengths.max())
        chunks = [self._chunk] * ((longest - 1) // self._chunk)
        first = longest - sum(chunks)
        chunks = [min(max(_SMALLEST, 1 << (first - 1).bit_length()), self._chunk), *chunks]
        total = sum(chunks)
        tokens = np.zeros((len(prompts), total), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[total - len(prompt) :] = prompt
        slots = self._chunk
        while slots < total + max_new_tokens:
            slots *= 2
        slots = min(slots, max(self.max_length, total + max_new_tokens))
        shape = (len(prompts), slots, self.config.num_key_value_heads, self.config.head_dim)
        caches = [kv_cache.empty(self._mesh, shape, self.compute.dtype) for _ in self._weights.layers]
        start_B = placement.put_global(self._mesh, {"start": (total - lengths).astype(np.int32)})["start"]
        slot = 0
        for size in chunks:
            part = placement.put_global(self._mesh, {"tokens": tokens[:, slot : slot + size]})["tokens"]
            place = (jnp.int32(slot), start_B, jnp.int32(longest))
            x_BSD, cos_sin = _embed(self._weights.embedding, self.config, part, *place)
            for i, layer in enumerate(self._weights.layers):
                x_BSD, caches[i] = _block(layer, caches[i], x_BSD, cos_sin, *place[:2])
            slot += size
        tokens_B = _choose(self._weights.norm, self._weights.head, x_BSD, sampler, jnp.int32(0), sample)
        return tokens_B, _State(caches, jnp.int32(total), start_B, jnp.int32(1))


class _State(NamedTuple):
    """State of a generation, which each decoding step updates."""

    caches: list[kv_cache.LayerCache]
    slot: Int[Array, ""]
    """Cache slot of the next token."""
    start_B: Int[Array, " B"]
    """First slot of each sequence."""
    count: Int[Array, ""]
    """Number of tokens generated so far."""


@jax.jit
def _unstack_layers(model: Llama) -> _Weights:
    model = jax.tree.map(lambda x: x.astype(model.compute.dtype), model)
    layers = [jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(model.config.num_hidden_layers)]
    head = model.embedding if model.config.tie_word_embeddings else model.head
    return _Weights(model.embedding, layers, model.norm, head)


@functools.partial(jax.jit, static_argnums=1)
def _embed(embedding, config, tokens_BS, slot, start_B, length):
    """Returns the embeddings of new tokens and the cos and sin of their positions.

    `length` is the length of the longest sequence.
    """
    positions_BS = jnp.maximum(slot + jnp.arange(tokens_BS.shape[1]) - start_B[:, None], 0)
    cos_sin_BSR = rope.cos_sin(positions_BS, config.head_dim, config.rope, length)
    return sharding.take(sharding.gather(embedding[...], embedding.axes), tokens_BS), cos_sin_BSR


@functools.partial(jax.jit, donate_argnums=1)
def _block(layer, kept, x_BSD, cos_sin_BSR, slot, start_B):
    """Applies one layer to new tokens. All layers share one compiled program."""

    def attend(q_BSNH, k_BSKH, v_BSKH):
        nonlocal kept
        out_BSNH, kept = kv_cache.extend(kept, q_BSNH, k_BSKH, v_BSKH, slot, start_B, layer.attention.compute.attention)
        return out_BSNH

    return layer(x_BSD, cos_sin_BSR, attend=attend), kept


@functools.partial(jax.jit, static_argnums=(1, 5), donate_argnums=3)
def _decode(weights: _Weights, config, tokens_B, state: _State, sampler, sample):
    """Runs one decoding step; returns the token after `tokens_B` in each sequence, and the new state."""
    caches, slot, start_B, count = state
    length = slot + 1 - jnp.min(start_B)
    x_BSD, cos_sin_BSR = _embed(weights.embedding, config, tokens_B[:, None], slot, start_B, length)
    new = []
    for layer, kept in zip(weights.layers, caches, strict=True):
        x_BSD, kept = _block(layer, kept, x_BSD, cos_sin_BSR, slot, start_B)
        new.append(kept)
    chosen = _choose(weights.norm, weights.head, x_BSD, sampler, count, sample)
    return chosen, _State(new, slot + 1, start_B, count + 1)


@functools.partial(jax.jit, static_argnums=5)
def _choose(norm: RMSNorm, head: nnx.Param, x_BSD, sampler, count, sample) -> Int[Array, " B"]:
    """Selects or samples a token for each sequence from its last hidden state."""
    logits_BV = _last_logits(norm, head, x_BSD)
    if not sample:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key, temperature, top_p = sampler
    return sampling.sample(jax.random.fold_in(key, count), logits_BV, temperature, top_p)


def _last_logits(norm: RMSNorm, head: nnx.Param, x_BSD) -> Float[Array, "B V"]:
    last_B1D = norm(x_BSD[:, -1:])
    head_VD = sharding.gather(head[...], head.axes)
    logits_B1V = sharding.einsum("BSD,VD->BSV", last_B1D, head_VD, axes=("batch", None, "vocab"), dtype=jnp.float32)
    return sharding.gather_sequence(logits_B1V)[:, 0]


def require_mesh(mesh: jax.sharding.Mesh, config: ModelConfig) -> None:
    """Checks that the sizes of the model are divisible by those of the mesh, before weights are loaded.

    Raises:
      InputError: if not; the message names the size and the number of devices.
    """
    sizes = {
        "hidden_size": (config.hidden_size, "embed"),
        "num_attention_heads": (config.num_attention_heads, "heads"),
        "num_key_value_heads": (config.num_key_value_heads, "kv_heads"),
        "intermediate_size": (config.intermediate_size, "mlp"),
        "vocab_size": (config.vocab_size, "vocab"),
    }
    sharding.require_divisible(mesh, {f"the model's {name}": size for name, size in sizes.items()})


def stop_tokens(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text: those of the model's config and of the tokenizer."""
    eos = config.eos_token_id
    found = {*(eos if isinstance(eos, tuple) else (eos,)), tokenizer.eos_token_id}
    return tuple(sorted(found - {None}))


def warn_beyond_window(config: ModelConfig, length: int) -> None:
    """Prints a warning on stderr if a length exceeds the window of the model."""
    if length > config.max_position_embeddings:
        log.warn(
            f"a length of {length} tokens exceeds the window of the model, {config.max_position_embeddings} tokens "
            f"({config.rope})"
        )
