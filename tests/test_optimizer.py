"""The schedule of the paper, and what the optimizer must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax import trees
from pi_jax.config import ComputeConfig, OptimizerConfig
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config
from pi_jax.train.optimizer import learning_rate, make_optimizer


def test_warm_up_is_linear_from_a_tenth_over_20_steps():
    rate = learning_rate(OptimizerConfig(learning_rate=2e-5), 1000)
    np.testing.assert_allclose([rate(0), rate(10), rate(20), rate(999)], [2e-6, 1.1e-5, 2e-5, 2e-5], rtol=1e-6)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_decay_ends_at_the_last_step(schedule, middle):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule), 1020)
    np.testing.assert_allclose(rate(520), middle, rtol=1e-6)
    np.testing.assert_allclose(rate(1020), 1.0 if schedule == "constant" else 0.0, atol=1e-6)


def _update(config, gradient):
    model = Llama(tiny_model_config(), ComputeConfig(), jax.random.key(0))
    optimizer = make_optimizer(config, 10)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), model)
    updates, state = optimizer.update(gradients, optimizer.init(model), model, finite=True)
    return trees.by_name(model), trees.by_name(updates), trees.by_name(state)


def test_weight_decay_is_off_by_default_and_never_touches_norms():
    assert OptimizerConfig().weight_decay == 0.0
    model, updates, _ = _update(OptimizerConfig(weight_decay=0.1, warmup_steps=0, learning_rate=1.0), 0.0)
    for name, update in updates.items():
        expected = 0.0 if "norm" in name else -0.1 * model[name]
        np.testing.assert_allclose(update, expected * jnp.ones_like(update), rtol=1e-6, err_msg=name)


def test_clipping_bounds_the_gradient_and_moments_move():
    # The first moment after one step is (1 - b1) times the clipped gradient, of norm 1 in all.
    _, _, state = _update(OptimizerConfig(max_grad_norm=1.0), 100.0)
    moments = [x for name, x in state.items() if ".mu." in name]
    np.testing.assert_allclose(sum(float(jnp.sum(m * m)) for m in moments) ** 0.5, 0.1, rtol=1e-4)
