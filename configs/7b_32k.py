"""LLaMA 7B from 2,048 to 32,768 tokens by Position Interpolation, as in the paper: 1000 steps.

    python -m pi_jax.prepare --input TEXT --tokenizer models/llama-7b --output data/pile --window 32768
    python -m pi_jax.plan --config configs/7b_32k.py --topology a100-80gb:128
    python -m pi_jax.train --config configs/7b_32k.py

Expected (Chen et al. 2023, Table 1, PG-19 perplexity by evaluation window; the base model has 7.20 at 2,048):
7.23 at 2,048, 7.04 at 4,096, 6.91 at 8,192, 6.80 at 16,384, 6.77 at 32,768.
Hardware: 128 A100-80GB, the paper's number (memory: docs/performance.md). `launch/` starts it on a cluster.
"""

from pi_jax.config import Config
from pi_jax.config.recipes import llama


def get_config() -> Config:
    return llama("7b", window=32768)
