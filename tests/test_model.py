"""The transformer against Hugging Face's, value by value and gradient by gradient, and its properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax import trees
from pi_jax.config import ComputeConfig
from pi_jax.convert import param_mapping
from pi_jax.convert.formats import hf
from pi_jax.model import Llama, parameter_axes
from pi_jax.rope import Default, Linear
from pi_jax.tiny import tiny_model_config
from pi_jax.train.step import batch_loss

FLOAT32 = ComputeConfig(dtype="float32", remat="layer", loss_chunk=16)
SHAPES = {
    "MHA, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "GQA, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "explicit head size": {"head_dim": 24, "num_key_value_heads": 1, "tie_word_embeddings": False},
}


def _batch(length=48, rows=2, vocabulary=260):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "loss_weights": jnp.ones((rows, length), jnp.float32),
    }


def _torch_model(config, folder):
    """A random LlamaForCausalLM, saved to a folder. Its weights are large enough for attention to matter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = hf.config_dict(config, "float32") | {"initializer_range": 0.2, "use_cache": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return torch, model


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_transformers(shape, factor, tmp_path, mesh):
    config = tiny_model_config(Linear(10000.0, factor) if factor > 1 else Default(), **shape)
    torch, theirs = _torch_model(config, tmp_path)
    batch = _batch()
    positions = batch["positions"] + 40  # at, and beyond, the end of the 64-token window
    with jax.set_mesh(mesh):
        ours = hf.load(str(tmp_path), config, FLOAT32, mesh)
        logits = ours.logits(ours(batch["tokens"], positions, batch["segment_ids"]))
        loss, gradients = jax.value_and_grad(batch_loss)(ours, batch | {"positions": positions})

    def as_torch(x):
        return torch.tensor(np.asarray(x), dtype=torch.long)

    tokens = as_torch(batch["tokens"])
    expected = theirs(tokens, position_ids=as_torch(positions), attention_mask=torch.ones_like(tokens)).logits
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)

    their_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), as_torch(batch["targets"]).flatten())
    their_loss.backward()
    np.testing.assert_allclose(float(loss), their_loss.item(), rtol=1e-5)
    found = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, gradient in trees.by_name(gradients).items():
        gradient = np.asarray(gradient)
        layers = enumerate(gradient) if name.startswith("layers.") else [(0, gradient)]
        for i, layer in layers:
            reference = found[param_mapping.HF_NAMES[name].format(i)]
            error = np.linalg.norm(layer.reshape(reference.shape) - reference) / np.linalg.norm(reference)
            assert error < 1e-4, (name, i, error)


def test_the_factor_matters(tmp_path, mesh):
    """The control of the parity test: with the scaling lost, the logits are far off."""
    config = tiny_model_config(Linear(10000.0, 4.0))
    _torch_model(config, tmp_path)
    batch = _batch()
    with jax.set_mesh(mesh):
        right = hf.load(str(tmp_path), config, FLOAT32, mesh)
        wrong = hf.load(str(tmp_path), dataclasses.replace(config, rope=Default()), FLOAT32, mesh)
        a, b = (m.logits(m(batch["tokens"], batch["positions"])) for m in (right, wrong))
    assert float(jnp.abs(a - b).max()) > 0.1


def test_interpolation_is_plain_rope_at_scaled_positions():
    plain = Llama(tiny_model_config(), FLOAT32, jax.random.key(0))
    scaled = Llama(tiny_model_config(Linear(10000.0, 4.0)), FLOAT32, jax.random.key(0))
    batch = _batch()
    a = plain(batch["tokens"], batch["positions"])
    b = scaled(batch["tokens"], 4 * batch["positions"])
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_token_sees_its_own_document_up_to_itself():
    """By gradients of every output with respect to every embedding."""
    length = 12
    model = Llama(tiny_model_config(vocab_size=length), FLOAT32, jax.random.key(0))
    tokens = jnp.arange(length)[None]  # each token once: a row of the embedding is a position of the sequence
    ids = jnp.asarray([[1] * 5 + [2] * 7])

    def outputs(model):
        return model(tokens, jnp.arange(length)[None], ids)[0].sum(-1)

    reach = np.abs(np.asarray(jax.jacobian(outputs)(model).embedding[...])).sum(-1)
    order, document = np.arange(length), np.asarray(ids[0])
    may = (order[None] <= order[:, None]) & (document[None] == document[:, None])
    np.testing.assert_array_equal(reach != 0, may)


def test_recomputation_changes_nothing():
    batch = _batch()
    results = []
    for remat in ("none", "layer"):
        model = Llama(tiny_model_config(), dataclasses.replace(FLOAT32, remat=remat), jax.random.key(0))
        results.append(trees.by_name(jax.jit(jax.value_and_grad(batch_loss))(model, batch)))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_mixed_precision_keeps_master_weights_and_float32_where_it_matters():
    compute = ComputeConfig(dtype="bfloat16", loss_chunk=16)
    batch = _batch()
    model = Llama(tiny_model_config(), compute, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float32"}
    assert model(batch["tokens"], batch["positions"]).dtype == jnp.bfloat16
    loss, gradients = jax.value_and_grad(batch_loss)(model, batch)
    assert loss.dtype == jnp.float32 and {g.dtype.name for g in jax.tree.leaves(gradients)} == {"float32"}
    exact = batch_loss(Llama(tiny_model_config(), FLOAT32, jax.random.key(0)), batch)
    np.testing.assert_allclose(loss, exact, rtol=5e-3)
    # Positions 256 and 257 are one number in bfloat16: the phases must not be.
    far = [model(batch["tokens"], batch["positions"] * 0 + p + batch["positions"] * 3) for p in (4096, 4099)]
    near = [model(batch["tokens"], batch["positions"] * 3)]
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (far[0], near[0])), atol=0.15)


def test_every_parameter_has_a_name_elsewhere_and_axes():
    model = Llama(tiny_model_config(), FLOAT32, jax.random.key(0))
    axes = parameter_axes(model)
    assert set(axes) == set(param_mapping.HF_NAMES)
    for name, leaf in trees.by_name(model).items():
        assert len(axes[name]) == leaf.ndim
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count == model.config.num_parameters()
