"""The mesh changes where things are computed, never what."""

import functools

import jax
import numpy as np
import pytest

from pi_jax import sharding, train, trees
from pi_jax.config import ComputeConfig, MeshConfig, OptimizerConfig, RopeConfig, extend
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.optimizer import make_optimizer
from pi_jax.testing import tiny_model_config

COMPUTE = ComputeConfig(dtype="float32", loss_chunk=16)
MESHES = {
    "fsdp 8": MeshConfig(),
    "data 2, fsdp 4": MeshConfig(data=2),
    "tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "context 2": MeshConfig(data=2, fsdp=2, context=2),
    "all four": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}


def _batch(rows=8, length=64):
    rng = np.random.default_rng(0)
    starts = rng.integers(1, length, (rows, 2))
    return {
        "tokens": rng.integers(0, 260, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, 260, (rows, length)).astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": 1 + (np.arange(length)[None, :, None] >= starts[:, None]).sum(-1).astype(np.int32),
        "loss_weights": rng.uniform(0, 1, (rows, length)).astype(np.float32),
    }


def _run(mesh, steps=2):
    model_config = extend(tiny_model_config(tie_word_embeddings=True), RopeConfig("linear", 4.0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), 10)
    with jax.set_mesh(mesh):
        template = abstract(model_config, COMPUTE)
        shardings = sharding.shard_tree(mesh, template, parameter_axes(template))
        make = jax.jit(functools.partial(Llama, model_config, COMPUTE), out_shardings=shardings)
        state = train.first_state(make(jax.random.key(0)), optimizer)
        step = train.make_step(optimizer)
        values = []
        for _ in range(steps):
            state, value = step(state, sharding.put_batch(mesh, _batch()))
            values.append([float(value["loss"]), float(value["grad_norm"])])
    return state, values


@pytest.fixture(scope="module")
def one_device():
    return _run(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("config", MESHES.values(), ids=MESHES)
def test_every_mesh_trains_as_one_device(config, one_device):
    mesh = sharding.make_mesh(config)
    state, values = _run(mesh)
    np.testing.assert_allclose(values, one_device[1], rtol=1e-5)
    for name, leaf in trees.by_name(one_device[0].model).items():
        np.testing.assert_allclose(trees.by_name(state.model)[name], leaf, atol=2e-5, err_msg=name)


def test_parameters_gradients_and_moments_are_split():
    """Each device holds an eighth of all that grows with the model; norms are whole."""
    state, _ = _run(sharding.make_mesh(MeshConfig()), steps=1)
    for name, leaf in trees.by_name(state).items():
        if leaf.ndim < 2 or "norm" in name:
            continue
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size, name
    model, moments = trees.by_name(state.model), trees.by_name(state.opt_state)
    for name, leaf in model.items():
        same = [m for key, m in moments.items() if key.endswith("." + name)]
        assert len(same) == 2 and all(m.sharding == leaf.sharding for m in same), name


def test_bad_meshes_are_refused():
    with pytest.raises(InputError, match="data=3.*does not fit 8 devices"):
        sharding.make_mesh(MeshConfig(data=3))
    with pytest.raises(InputError, match="data.batch_size is 12, which does not divide over 8"):
        sharding.require_divisible(sharding.make_mesh(MeshConfig()), {"data.batch_size": (12, "batch")})
    with pytest.raises(ValueError, match="one dimension only"):
        sharding.ShardingRules(mlp="fsdp").spec(("embed", "mlp"))
