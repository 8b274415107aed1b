"""The FLOP formula, checked against XLA's count, and what survives a resumed log."""

import jax
import jax.numpy as jnp
import pytest

from pi_jax.config import ComputeConfig, LoggingConfig, ModelConfig
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config
from pi_jax.train import metrics
from pi_jax.train.step import batch_loss


def test_flops_of_llama_7b_at_32k():
    """6 N + 6 L D S: 39.6 + 25.8 GFLOP a token, as counted for the paper's largest 7B run."""
    llama = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 2048)
    matrices = 6 * (llama.num_parameters() - 32000 * 4096)
    assert matrices == pytest.approx(39.6e9, rel=0.01)
    assert metrics.flops_per_token(llama, 32768) - matrices == pytest.approx(25.8e9, rel=0.01)


def test_flops_agree_with_what_xla_counts():
    """One layer, without loops (their bodies are counted once) and with dense attention (twice the causal half)."""
    config = tiny_model_config(num_hidden_layers=1, hidden_size=128, intermediate_size=512, head_dim=32)
    compute = ComputeConfig(dtype="float32", remat="none", attention="reference", loss_chunk=256)
    model = Llama(config, compute, jax.random.key(0))
    rows = {name: jnp.zeros((1, 256), jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch = rows | {"loss_weights": jnp.ones((1, 256))}
    counted = jax.jit(jax.grad(batch_loss)).lower(model, batch).compile().cost_analysis()["flops"] / 256
    attention = 6 * config.num_attention_heads * config.head_dim * 256
    expected = metrics.flops_per_token(config, 256) + attention
    assert counted == pytest.approx(expected, rel=0.1)


def test_a_resumed_log_has_each_step_once(tmp_path):
    config = LoggingConfig(tensorboard=False)
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # the first run died after step 3, its checkpoint is of step 2
        with metrics.Metrics(tmp_path, config, {}, first) as log:
            for step in steps:
                log.write(step, {"loss": float(first)})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {s}' for s in (1, 2, 3, 4)]


def test_durations_read_like_clocks():
    assert [metrics.duration(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]
