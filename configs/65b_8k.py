"""LLaMA 65B from 2,048 to 8,192 tokens by Position Interpolation, as in the paper: 1000 steps.

    python -m pi_jax.prepare --input TEXT --tokenizer models/llama-65b --output data/pile --window 8192
    python -m pi_jax.plan --config configs/65b_8k.py --topology a100-80gb:128
    python -m pi_jax.train --config configs/65b_8k.py

Expected (Chen et al. 2023, Table 1, PG-19 perplexity by evaluation window; the base model has 5.49 at 2,048):
5.42 at 2,048, 5.32 at 4,096, 5.37 at 8,192.
Hardware: 128 A100-80GB, the paper's number (memory: docs/performance.md). `launch/` starts it on a cluster.
"""

from pi_jax.config import Config
from pi_jax.config.recipes import llama


def get_config() -> Config:
    return llama("65b", window=8192)
