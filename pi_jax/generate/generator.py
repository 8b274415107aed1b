"""Text from a model: prefill in chunks, then one token at a time over a static KV cache.

    python -m pi_jax.generate --model PATH --prompt TEXT

A prompt is read in chunks through the attention hot path: only the last token's logits are ever computed, so that a
prompt of 32k tokens never meets 32k x vocabulary numbers. Prompts of unequal length end together in the cache
(`pi_jax.generate.kv_cache`), and a sequence's tokens do not depend on what it shares a batch with.

Shapes: B rows, S tokens of a chunk, D hidden, V vocabulary, L layers; a row is a prompt with what is generated for it.
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
from pi_jax.parallel import placement, sharding

_SMALLEST = 16
"""Tokens of the smallest chunk: a prompt's first chunk is a power of two from here on, so that few shapes compile."""


class _Weights(NamedTuple):
    """A model taken apart for generation: a layer is a tree of its own, so that no step slices a stacked weight."""

    embedding: nnx.Param
    layers: list[Block]
    norm: RMSNorm
    head: nnx.Param


class Generator:
    """Generates continuations of token sequences.

    Compiles once for each number of rows, each chunk length (powers of two up to `chunk`) and each cache length
    (powers of two times `chunk`), and reuses that in later calls.
    """

    def __init__(self, model: Llama, mesh: jax.sharding.Mesh, *, max_length: int, chunk: int = 512):
        """Takes the weights, in the model's compute dtype.

        Args:
          model: with parameters on `mesh`.
          mesh: rows are split over its data, fsdp and context axes, heads over its tensor axis.
          max_length: tokens of a prompt and its continuation, at most.
          chunk: tokens of a prompt that are read at once.
        """
        if max_length < 2 or chunk < 1:
            raise InputError(f"max_length is {max_length} and chunk is {chunk}: need at least 2 and 1")
        self.config, self.compute = model.config, model.compute
        self.max_length = max_length
        self.batch_shards = sharding.batch_shards(sharding.for_generation(mesh))
        """Batches of a multiple of this many prompts leave no device idle."""
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
          prompts: token ids; lengths may differ.
          max_new_tokens: of each continuation.
          stop_tokens: end a continuation; not part of it.
          temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
          top_p: draw from the smallest set of likeliest tokens that has this probability.
          seed: of the draws.
          on_token: called with (index of the prompt, token) as each token comes.

        Returns:
          The new tokens of each prompt.

        Raises:
          InputError: for an empty prompt, a token that the model has not, or a length beyond `max_length`.
        """
        self._check(prompts, max_new_tokens, temperature, top_p)
        if not prompts:
            return []
        rows = -(-len(prompts) // self.batch_shards) * self.batch_shards
        filled = [list(p) for p in prompts] + [[0]] * (rows - len(prompts))  # rows that only fill the mesh
        stop_tokens = frozenset(stop_tokens)
        new: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("float32"):
            draw = (jax.random.key(seed), jnp.float32(temperature or 1.0), jnp.float32(top_p))
            tokens_B, state = self._prefill(filled, max_new_tokens, draw, temperature > 0)
            for step in range(max_new_tokens):
                ahead = None
                if step + 1 < max_new_tokens:  # begun before this one is read, so that the device never waits
                    ahead = _decode(self._weights, self.config, tokens_B, state, draw, temperature > 0)
                for row, token in enumerate(placement.fetch(tokens_B)[: len(prompts)].tolist()):
                    if row not in going:
                        continue
                    if token in stop_tokens:
                        going.remove(row)
                        continue
                    new[row].append(token)
                    if on_token:
                        on_token(row, token)
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
            raise InputError(f"top_p is {top_p}: it must be above 0 and at most 1")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {i} is empty: it needs at least one token")
            if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
                raise InputError(
                    f"prompt {i} has token {max(prompt, key=abs)}, the model's vocab_size is {self.config.vocab_size}"
                )
            if len(prompt) + max_new_tokens > self.max_length:
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens, with {max_new_tokens} new ones that is more than "
                    f"max_length, {self.max_length}"
                )

    def _prefill(self, prompts, max_new_tokens, draw, sample):
        """Reads all prompts; the first new token of each row, and the state to go on from."""
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
        tokens_B = _choose(self._weights.norm, self._weights.head, x_BSD, draw, jnp.int32(0), sample)
        return tokens_B, _State(caches, jnp.int32(total), start_B, jnp.int32(1))


class _State(NamedTuple):
    """Where a generation is: what a step changes."""

    caches: list[kv_cache.LayerCache]
    slot: Int[Array, ""]
    """Cache slot of the next token."""
    start_B: Int[Array, " B"]
    """First slot of each row."""
    count: Int[Array, ""]
    """Tokens drawn so far."""


@jax.jit
def _unstack_layers(model: Llama) -> _Weights:
    model = jax.tree.map(lambda x: x.astype(model.compute.dtype), model)
    layers = [jax.tree.map(lambda x, i=i: x[i], model.layers) for i in range(model.config.num_hidden_layers)]
    head = model.embedding if model.config.tie_word_embeddings else model.head
    return _Weights(model.embedding, layers, model.norm, head)


@functools.partial(jax.jit, static_argnums=1)
def _embed(embedding, config, tokens_BS, slot, start_B, length):
    """Embeddings of new tokens, and the phases of their positions; `length` is that of the longest row."""
    positions_BS = jnp.maximum(slot + jnp.arange(tokens_BS.shape[1]) - start_B[:, None], 0)
    cos_sin_BSR = rope.cos_sin(positions_BS, config.head_dim, config.rope, length)
    return sharding.take(sharding.gather(embedding[...], embedding.axes), tokens_BS), cos_sin_BSR


@functools.partial(jax.jit, donate_argnums=1)
def _block(layer, kept, x_BSD, cos_sin_BSR, slot, start_B):
    """One layer for new tokens: all layers are one compiled program."""

    def attend(q_BSNH, k_BSKH, v_BSKH):
        nonlocal kept
        out_BSNH, kept = kv_cache.extend(kept, q_BSNH, k_BSKH, v_BSKH, slot, start_B, layer.attention.compute.attention)
        return out_BSNH

    return layer(x_BSD, cos_sin_BSR, attend=attend), kept


@functools.partial(jax.jit, static_argnums=(1, 5), donate_argnums=3)
def _decode(weights: _Weights, config, tokens_B, state: _State, draw, sample):
    """One step: the token after `tokens_B` in each row."""
    caches, slot, start_B, count = state
    length = slot + 1 - jnp.min(start_B)
    x_BSD, cos_sin_BSR = _embed(weights.embedding, config, tokens_B[:, None], slot, start_B, length)
    new = []
    for layer, kept in zip(weights.layers, caches, strict=True):
        x_BSD, kept = _block(layer, kept, x_BSD, cos_sin_BSR, slot, start_B)
        new.append(kept)
    chosen = _choose(weights.norm, weights.head, x_BSD, draw, count, sample)
    return chosen, _State(new, slot + 1, start_B, count + 1)


@functools.partial(jax.jit, static_argnums=5)
def _choose(norm: RMSNorm, head: nnx.Param, x_BSD, draw, count, sample) -> Int[Array, " B"]:
    """A token for each row, from its last hidden state."""
    logits_BV = _last_logits(norm, head, x_BSD)
    if not sample:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key, temperature, top_p = draw
    return sampling.draw(jax.random.fold_in(key, count), logits_BV, temperature, top_p)


def _last_logits(norm: RMSNorm, head: nnx.Param, x_BSD) -> Float[Array, "B V"]:
    last_B1D = norm(x_BSD[:, -1:])
    head_VD = sharding.gather(head[...], head.axes)
    logits_B1V = sharding.einsum("BSD,VD->BSV", last_B1D, head_VD, axes=("batch", None, "vocab"), dtype=jnp.float32)
    return sharding.gather_sequence(logits_B1V)[:, 0]


def require_mesh(mesh: jax.sharding.Mesh, config: ModelConfig) -> None:
    """Checks, before weights are read, that the model divides over the mesh.

    Raises:
      InputError: naming the size and the devices.
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
    """What ends a text: the model's end tokens and the tokenizer's."""
    eos = config.eos_token_id
    found = {*(eos if isinstance(eos, tuple) else (eos,)), tokenizer.eos_token_id}
    return tuple(sorted(found - {None}))


def warn_beyond_window(config: ModelConfig, length: int) -> None:
    """Says so on stderr if a length is beyond the window that the model is scaled to."""
    if length > config.max_position_embeddings:
        log.warn(
            f"a length of {length} tokens is beyond the {config.max_position_embeddings} that the model is "
            f"scaled to ({config.rope})"
        )
