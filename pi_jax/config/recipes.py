"""What the experiments in `configs/` share: architectures, and the recipe of Chen et al. 2023, section 3.1."""

import dataclasses

from pi_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
from pi_jax.rope import Default


def _llama_1(hidden: int, feed_forward: int, layers: int, heads: int, eps: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        max_position_embeddings=2048,
        rms_norm_eps=eps,
    )


_7B = _llama_1(4096, 11008, 32, 32, 1e-6)
MODELS = {
    "7b": _7B,
    "13b": _llama_1(5120, 13824, 40, 40, 1e-6),
    "33b": _llama_1(6656, 17920, 60, 52, 1e-6),
    "65b": _llama_1(8192, 22016, 80, 64, 1e-5),
    "llama-2-7b": dataclasses.replace(_7B, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-3-8b": dataclasses.replace(
        _7B,
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=Default(500000.0),
    ),
}
"""Sizes of the published models."""


def llama(name: str, window: int, interpolate: bool = True) -> Config:
    """The paper's run for a model of `MODELS` and an extended window in tokens.

    Batch 64 for 7B, 13B and 33B to 8,192 tokens (the paper: on 32 A100), else 128 (on 128 A100); learning rate 2e-5 for
    7B and 13B, 1e-5 for 33B and 65B; 1000 steps, or 10,000 of direct fine-tuning without interpolation. The base model
    is read from `models/`, the token store from `data/`.
    """
    model = MODELS[name]
    folder = name if name.startswith("llama") else f"llama-{name}"
    small = window == 8192 and name != "65b"
    kind = f"{window // 1024}k" if interpolate else f"{window // 1024}k-direct"
    return Config(
        model=model,
        rope=RopeConfig("linear", window / model.max_position_embeddings) if interpolate else RopeConfig(),
        # One sequence at a time on each of the paper's devices.
        compute=ComputeConfig(gradient_accumulation_steps=2 if small else 1),
        data=DataConfig(
            sources=("data/long" if window > 32768 else "data/pile",), window=window, batch_size=64 if small else 128
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5 if name in ("33b", "65b") else 2e-5),
        train=TrainConfig(
            init_from=f"models/{folder}", output=f"runs/{folder}-{kind}", steps=1000 if interpolate else 10000
        ),
        evaluate=EvaluateConfig(windows=(model.max_position_embeddings, window)),
    )
