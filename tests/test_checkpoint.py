"""Checkpoints come back bit for bit, on any mesh, and damage is noticed."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax.checkpoint import Checkpoints
from pi_jax.checkpoint.fingerprint import fingerprint
from pi_jax.config import CheckpointConfig, MeshConfig
from pi_jax.errors import InputError
from pi_jax.parallel import sharding

AXES = ("embed", "mlp")


def _state(seed, mesh):
    keys = jax.random.split(jax.random.key(seed), 2)
    place = sharding.named(mesh, AXES)
    return {
        "w": jax.device_put(jax.random.normal(keys[0], (64, 32)), place),
        "half": jax.device_put(jax.random.normal(keys[1], (64, 32), jnp.bfloat16), place),
        "step": jax.device_put(jnp.int32(seed), jax.NamedSharding(mesh, jax.P())),
    }


def _template(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which two are kept."""
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh), Checkpoints(tmp_path, CheckpointConfig(every=1, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(step, mesh), {"data": "x"}, last=step == 3)
    return tmp_path


def _restore(folder, config=MeshConfig(), **changes):
    mesh = sharding.make_mesh(config)
    template = _template(_state(0, mesh)) | changes
    with jax.set_mesh(mesh), Checkpoints(folder, CheckpointConfig()) as checkpoints:
        return checkpoints.restore(template)


def _same(state, seed):
    for name, leaf in _state(seed, sharding.make_mesh(MeshConfig())).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(state[name]))


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(fsdp=2, tensor=4)], ids=str)
def test_the_newest_comes_back_on_any_mesh(saved, config):
    restored = _restore(saved, config)
    assert (restored.step, restored.metadata["data"], restored.skipped) == (3, "x", [])
    _same(restored.state, 3)
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["2", "3"]


def _largest(folder):
    return max((p for p in pathlib.Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(folder):
    data = bytearray(_largest(folder / "3").read_bytes())
    data[len(data) // 2] ^= 4
    _largest(folder / "3").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda f: _largest(f / "3").write_bytes(b""),
        lambda f: _largest(f / "3").unlink(),
        lambda f: (f / "9").mkdir(),
    ],
    ids=["one bit", "emptied file", "lost file", "empty folder of a later step"],
)
def test_a_damaged_newest_is_left_out_and_said(saved, damage):
    damage(saved)
    restored = _restore(saved)
    assert restored.step == (3 if (saved / "9").exists() else 2)
    assert len(restored.skipped) == 1
    _same(restored.state, restored.step)


@pytest.mark.slow
def test_whatever_file_is_damaged_the_content_is_right_or_of_the_step_before(saved, tmp_path_factory):
    files = sorted(p.relative_to(saved / "3") for p in (saved / "3").rglob("*") if p.is_file())
    for file in files:
        for name, damage in (
            ("truncated", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
            (
                "flipped",
                lambda path: path.write_bytes(bytes(b ^ 1 for b in path.read_bytes()[:1]) + path.read_bytes()[1:]),
            ),
            ("flipped in the middle", _flip_middle),
            ("emptied", lambda path: path.write_bytes(b"")),
            ("deleted", lambda path: path.unlink()),
        ):
            copy = tmp_path_factory.mktemp("copy") / "checkpoints"
            shutil.copytree(saved, copy)
            damage(copy / "3" / file)
            restored = _restore(copy)
            assert restored.step == (2 if restored.skipped else 3), (file, name)
            _same(restored.state, restored.step)


def _flip_middle(path):
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_metadata_is_that_of_the_newest_that_has_any(saved):
    (saved / "9").mkdir()
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        assert checkpoints.metadata()["data"] == "x"
    for folder in saved.iterdir():
        shutil.rmtree(folder)
    with Checkpoints(saved, CheckpointConfig()) as checkpoints:
        assert checkpoints.metadata() == {}


def test_never_from_scratch_when_all_are_damaged(saved):
    for step in ("2", "3"):
        _largest(saved / step).write_bytes(b"")
    with pytest.raises(InputError, match="no usable checkpoint.*not starting from scratch"):
        _restore(saved)


def test_none_at_all_is_none(tmp_path):
    assert _restore(tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"w": ((64, 32), "bfloat16")},  # Orbax would cast
        {"w": ((32, 64), "float32")},
        {"more": ((2,), "float32")},
    ],
)
def test_another_state_is_refused(saved, wrong):
    mesh = sharding.make_mesh(MeshConfig())
    place = jax.NamedSharding(mesh, jax.P())
    changes = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for k, (shape, dtype) in wrong.items()}
    with pytest.raises(InputError, match=next(iter(wrong))):
        _restore(saved, **changes)


def test_a_state_with_nan_does_not_push_out_a_good_one(saved):
    mesh = sharding.make_mesh(MeshConfig())
    state = _state(4, mesh)
    broken = np.array(state["w"])
    broken[3, 3] = np.nan
    state["w"] = jax.device_put(broken, state["w"].sharding)
    with jax.set_mesh(mesh), Checkpoints(saved, CheckpointConfig(every=1, keep=1)) as checkpoints:
        with pytest.raises(FloatingPointError, match="w"):
            checkpoints.save(4, state, {}, last=True)
        assert checkpoints.steps() == [3, 2]


def test_the_fingerprint_sees_values_and_places():
    x = jnp.arange(12.0).reshape(3, 4)
    assert fingerprint({"x": x}) == fingerprint({"x": x + 0})
    assert fingerprint({"x": x}) != fingerprint({"x": x[::-1]})
    assert fingerprint({"x": x}) != fingerprint({"x": x.at[0, 0].set(-0.0)})
