"""LLaMA 13B from 2,048 to 8,192 tokens by Position Interpolation, as in the paper: 1000 steps.

    python -m pi_jax.prepare --input TEXT --tokenizer models/llama-13b --output data/pile --window 8192
    python -m pi_jax.plan --config configs/13b_8k.py --topology a100-80gb:32
    python -m pi_jax.train --config configs/13b_8k.py

Expected (Chen et al. 2023, Table 1, PG-19 perplexity by evaluation window; the base model has 6.59 at 2,048):
6.55 at 2,048, 6.42 at 4,096, 6.42 at 8,192.
Hardware: 32 A100-80GB, the paper's number (memory: docs/performance.md). `launch/` starts it on a cluster.
"""

from pi_jax.config import Config
from pi_jax.config.recipes import llama


def get_config() -> Config:
    return llama("13b", window=8192)
