r"""Trains the demo's base model from nothing: a LLaMA of 1.1 M parameters with a window of 256 tokens.

    pip install 'torch>=2.10' && python demo/pretrain.py --output base

It is trained with PyTorch and transformers, like the models that pi_jax is for: nothing of pi_jax made it. `base/`
holds the result; README.md there states its hash, time and quality.

A model this small learns to look things up only if it is taught in this order:

1. windows of 64 tokens of random tokens, parts of which are repeated: after some hundred steps, all at once, an
   induction head forms (Olsson et al. 2022), which finds what followed the last occurrence;
2. windows of 256 tokens, with ledgers (demo/text.py) and novels added: looking up facts by their names;
3. mostly novels and ledgers: language.

Numbers are split into groups of up to three digits, as in Llama 3, and the blank before a number belongs to its first
group: with a token for the blank alone, "a number follows" would be a decision apart from "which". theta is 1,250: 256
is about the same part of it as LLaMA's window of 2,048 is of 10,000, so the slowest wavelengths are as unfinished
within the window as in LLaMA.
"""

import argparse
import copy
import functools
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
import text
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, WINDOW, THETA = 3072, 256, 1250.0
STAGES = (
    # window, sequences per step, steps, learning rate, its share at the end, mixture of repeats, ledgers and novels
    (64, 128, 650, 2e-3, 1.0, (1.0, 0.0, 0.0)),
    (WINDOW, 32, 600, 1.5e-3, 1.0, (0.35, 0.45, 0.2)),
    (WINDOW, 32, 3600, 1.5e-3, 0.03, (0.05, 0.45, 0.5)),
)
WEIGHTS = {text.PLAIN: 0.5, text.VALUE: 0.2, text.ANSWER: 4.0, text.FILLER: 0.4}
"""Loss weights by kind of piece: what a new fact is cannot be known, and answers are what is to be learned."""


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with a token for each three digits after a blank, and for each two digits."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\d{1,3}| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    numbers = "".join(f" {i}{i % 100:02d}" for i in range(100, 1000))  # " 10000 10101 10202": groups of 3 and 2 digits
    tokenizer.train_from_iterator([*texts, *[numbers] * 3000], trainer)
    return tokenizer


class Batches:
    """Batches of sequences, with the weight of each token's loss."""

    def __init__(self, novels: list[str], tokenizer: Tokenizer, seed: int):
        self._tokenizer, self._rng = tokenizer, np.random.default_rng(seed)
        self._novels = np.array(tokenizer.encode("\n".join(novels)).ids)
        self._ledgers = text.Ledgers("\n".join(novels))
        self._encode = functools.lru_cache(2**18)(lambda piece: tuple(tokenizer.encode(piece).ids))

    def __call__(self, size: int, length: int, mixture: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and loss weights, [size, length + 1]; kinds are drawn with the probabilities of `mixture`."""
        makers = (self._repeats, self._ledger, self._novel)
        kinds = self._rng.choice(3, size, p=mixture)
        tokens, weights = zip(*(makers[kind](length + 1) for kind in kinds), strict=True)
        return torch.tensor(np.stack(tokens)), torch.tensor(np.stack(weights), dtype=torch.float32)

    def _repeats(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        rng = self._rng
        pool = rng.integers(1, VOCABULARY, rng.integers(8, 400) if rng.random() < 0.5 else length)
        tokens, weights = np.empty(length, np.int64), np.full(length, 0.02)
        spans, at = [], 0
        while at < length:
            if spans and rng.random() < 0.6:
                start, stop = spans[rng.integers(len(spans))]
                n = min(stop - start, length - at)
                tokens[at : at + n] = tokens[start : start + n]
                weights[at + 1 : at + n] = 1.0
            else:
                n = min(int(rng.integers(2, 40)), length - at)
                tokens[at : at + n] = rng.choice(pool, n)
                spans.append((at, at + n))
            at += n
        return tokens, weights

    def _ledger(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens: list[int] = []
        weights: list[float] = []
        for piece, kind in self._ledgers.pieces(self._rng, 6 * length):
            ids = self._encode(piece)
            tokens += ids
            weights += [WEIGHTS[kind]] * len(ids)
            if len(tokens) >= length:
                break
        return np.array(tokens[:length]), np.array(weights[:length])

    def _novel(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = self._rng.integers(len(self._novels) - length)
        return self._novels[start : start + length], np.ones(length)


def train(model: LlamaForCausalLM, batches: Batches, keep: Callable[[], None], stages=STAGES, log=print) -> None:
    """Runs the stages; AdamW as for LLaMA (0.9, 0.95, weight decay 0.1 on matrices, gradients clipped to norm 1).

    `keep` is called every 400 steps, and at the end.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    began = time.monotonic()
    for window, size, steps, rate, end, mixture in stages:
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
        for step in range(steps):
            decay = end + (1 - end) * 0.5 * (1 + np.cos(np.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * decay * min(1.0, (step + 1) / 50)
            tokens, weights = batches(size, window, mixture)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(tokens[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
            )
            weights = weights[:, 1:].flatten()
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                with torch.no_grad():
                    right = (logits.argmax(-1).flatten() == tokens[:, 1:].flatten()).float()
                answers = weights == WEIGHTS[text.ANSWER]
                found = f", answers {right[answers].mean():.0%}" if answers.any() else ""
                spent = time.monotonic() - began
                log(f"window {window}, step {step + 1}/{steps}: loss {loss.item():.3f}{found}; {spent:.0f} s")
            if step % 400 == 399 or step == steps - 1:
                keep()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes a Hugging Face folder with bfloat16 weights."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "<s>", "model_max_length": WINDOW}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    novels = text.novels()
    tokenizer = make_tokenizer(novels)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_theta=THETA,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters", flush=True)
    keep = functools.partial(save, model, tokenizer, options.output)
    train(model, Batches(novels, tokenizer, options.seed), keep, log=functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
