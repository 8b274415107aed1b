"""The mesh changes where things are computed, never what."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pi_jax import trees
from pi_jax.config import ComputeConfig, MeshConfig, OptimizerConfig, RopeConfig, extend
from pi_jax.errors import InputError
from pi_jax.model import Llama, abstract, parameter_axes
from pi_jax.parallel import placement, sharding
from pi_jax.tiny import tiny_model_config
from pi_jax.train import step
from pi_jax.train.optimizer import make_optimizer

COMPUTE = ComputeConfig(dtype="float32", loss_chunk=16)
MESHES = {
    "fsdp 8": MeshConfig(),
    "data 8": MeshConfig(data=8, fsdp=1),
    "context 2": MeshConfig(data=2, fsdp=2, context=2),
    "context 4, tensor 2": MeshConfig(data=1, fsdp=1, context=4, tensor=2),
    "all but data": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
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


def _run(mesh, steps=2, packed=True, moments=None, **compute):
    compute = dataclasses.replace(COMPUTE, **compute)
    batch = _batch()
    if not packed:
        del batch["segment_ids"]
    model_config = extend(tiny_model_config(tie_word_embeddings=True), RopeConfig("linear", 4.0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, **(moments or {})), 10)
    with jax.set_mesh(mesh):
        template = abstract(model_config, compute)
        shardings = placement.shard_tree(mesh, template, parameter_axes(template))
        make = jax.jit(functools.partial(Llama, model_config, compute), out_shardings=shardings)
        state = step.init_train_state(make(jax.random.key(0)), optimizer)
        update = step.make_step(optimizer)
        values = []
        for index in range(steps):
            state, value = update(state, placement.put_batch(mesh, batch))
            values.append([float(value["loss"]), float(value["grad_norm"])])
            if index == 0:
                moments = jax.device_get(trees.by_name(state.opt_state))
    return state, values, moments


@functools.cache
def _one_device(packed):
    """One device, everything kept, the batch in one part: what all others must equal."""
    return _run(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), packed=packed, remat="none")


def _require_equal(got, packed):
    (_, values, moments), (_, want_values, want_moments) = got, _one_device(packed)
    np.testing.assert_allclose(values, want_values, rtol=1e-5)
    # The first moments after one step are its gradients, to a factor; the second ones their squares.
    for (name, want), ours in zip(want_moments.items(), moments.values(), strict=True):
        assert np.linalg.norm(ours - want) <= 1e-5 * np.linalg.norm(want), name


@pytest.mark.parametrize("config", MESHES.values(), ids=MESHES)
def test_every_mesh_trains_as_one_device(config):
    _require_equal(_run(sharding.make_mesh(config)), packed=True)


def test_a_split_row_of_one_document_trains_as_on_one_device():
    _require_equal(_run(sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2)), packed=False), packed=False)


REMATS = ("none", "layer", "attention", "offload")
# Each mesh with one policy in turn, the mesh with most axes with all of them.
COMBINATIONS = sorted(
    {(name, REMATS[(i + i // 2) % 4]) for i, name in enumerate(MESHES)} | {("all but data", remat) for remat in REMATS}
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), COMBINATIONS)
def test_meshes_and_remat_policies_train_as_one_device(name, remat):
    """Packed or not, in 1 or 4 parts, in turn."""
    mesh = sharding.make_mesh(MESHES[name])
    index = list(MESHES).index(name) + REMATS.index(remat)
    packed, parts = bool(index % 2), 4 if index % 4 > 1 and sharding.batch_shards(mesh) <= 2 else 1
    _require_equal(_run(mesh, packed=packed, remat=remat, gradient_accumulation_steps=parts), packed)


def test_rows_in_a_wrong_order_are_noticed(monkeypatch):
    """The control of the tests above: tokens not in zigzag order, read as if they were."""
    monkeypatch.setattr(placement, "zigzag", lambda length, shards: np.arange(length))
    values = _run(sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2)))[1]
    assert abs(values[0][1] / _one_device(True)[1][0][1] - 1) > 1e-3


def test_zigzag_gives_every_device_the_same_number_of_keys_to_visit():
    order = placement.zigzag(64, 4)
    assert sorted(order) == list(range(64))
    assert set(np.sum(1 + order.reshape(4, 16), axis=1)) == {16 * 65 // 2}
    np.testing.assert_array_equal(order[:16], [*range(8), *range(56, 64)])


@pytest.mark.slow
def test_moments_are_stored_as_asked():
    """On the host, and in half the bytes; training goes on as before, to the rounding of the moments."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    want = _one_device(True)[1]
    state, values, _ = _run(mesh, moments={"offload": True})
    np.testing.assert_allclose(values, want, rtol=1e-5)
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.sharding.memory_kind for x in arrays} == {"pinned_host"}
    state, values, _ = _run(mesh, steps=3, moments={"moment_dtype": "bfloat16"})
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"bfloat16"}
    exact = _run(mesh, steps=3)[1]
    np.testing.assert_allclose(values[2], exact[2], rtol=2e-2)
    assert values[2] != exact[2]


def test_parameters_gradients_and_moments_are_split():
    """Each device holds an eighth of all that grows with the model; norms are whole."""
    state, *_ = _run(sharding.make_mesh(MeshConfig()), steps=1)
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
    with pytest.raises(
        InputError, match="data.batch_size is 12, which does not divide over 8 devices.*: 1, 2, 3, 4, 6 would do"
    ):
        sharding.require_divisible(sharding.make_mesh(MeshConfig()), {"data.batch_size": (12, "batch")})
    with pytest.raises(ValueError, match="one dimension only"):
        sharding.ShardingRules(mlp="fsdp").spec(("embed", "mlp"))
