"""The chunked loss against logits in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax.model.loss import score_tokens, weighted_loss


def _dense(hidden, weights, targets, loss_weights):
    log_probabilities = jax.nn.log_softmax(jnp.einsum("BSD,VD->BSV", hidden, weights))
    return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0] * loss_weights)


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, weights = jax.random.normal(keys[0], (2, 37, 16)), jax.random.normal(keys[1], (50, 16))
    targets = jax.random.randint(keys[2], (2, 37), 0, 50)
    return hidden, weights, targets, jax.random.uniform(keys[3], (2, 37))


@pytest.mark.parametrize("chunk", [1, 8, 37, 1024])
def test_value_and_gradients_do_not_depend_on_the_chunk(inputs, chunk):
    expected = jax.value_and_grad(_dense, (0, 1))(*inputs)
    found = jax.value_and_grad(lambda *x: weighted_loss(*x, chunk), (0, 1))(*inputs)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    by_token, _ = score_tokens(*inputs[:3], chunk, 0, 37)
    np.testing.assert_allclose(jnp.sum(by_token * inputs[3]), expected[0], rtol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(0, 37), (11, 19), (36, 37), (8, 8)])
def test_only_what_is_scored_is_computed(inputs, start, stop):
    hidden, weights, targets, _ = inputs
    logits = jnp.einsum("BSD,VD->BSV", hidden, weights)
    targets = jnp.where(jnp.arange(37) % 3 == 0, jnp.argmax(logits, -1), targets)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    low, high = start // 8 * 8, -(-stop // 8) * 8
    outside = (jnp.arange(37) < low) | (jnp.arange(37) >= high)
    poisoned = jnp.where(outside[:, None], jnp.nan, hidden)
    losses, greedy = score_tokens(poisoned, weights, targets, 8, start, stop)
    np.testing.assert_allclose(losses[:, start:stop], expected[:, start:stop], atol=1e-5)
    np.testing.assert_array_equal(greedy[:, start:stop], (jnp.argmax(logits, -1) == targets)[:, start:stop])
    assert not np.any(losses[:, outside]) and not np.any(greedy[:, outside])


def test_the_gradient_is_scaled_by_what_comes_after(inputs):
    hidden, weights, targets, loss_weights = inputs
    plain = jax.grad(lambda h: weighted_loss(h, weights, targets, loss_weights, 8))(hidden)
    scaled = jax.grad(lambda h: 3 * weighted_loss(h, weights, targets, loss_weights, 8))(hidden)
    np.testing.assert_allclose(3 * plain, scaled, rtol=1e-6)


def test_tokens_of_weight_0_have_no_part(inputs):
    hidden, weights, targets, loss_weights = inputs
    loss_weights = loss_weights.at[:, 20:].set(0.0)
    gradient = jax.grad(lambda h: weighted_loss(h, weights, targets, loss_weights, 8))(hidden)
    assert float(jnp.abs(gradient[:, 20:]).max()) == 0.0 < float(jnp.abs(gradient[:, :20]).min(-1).max())


def test_logits_of_a_whole_row_never_exist():
    """32k tokens with a vocabulary of 32k: 4 GiB of logits. What XLA plans for is a fraction."""
    shapes = [((1, 32768, 64), "float32"), ((32000, 64), "float32"), ((1, 32768), "int32"), ((1, 32768), "float32")]
    arrays = [jax.ShapeDtypeStruct(*s) for s in shapes]
    gradient = jax.jit(jax.grad(lambda *x: weighted_loss(*x, 256), (0, 1)))
    memory = gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.2 * 32768 * 32000 * 4 / 4
