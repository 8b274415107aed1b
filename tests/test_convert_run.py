"""pi_jax checkpoints as sources and targets: read and written a layer at a time, checked, taken like any model."""

import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from pi_jax import tiny, trees
from pi_jax.checkpoint import Checkpoints, manager
from pi_jax.checkpoint.fingerprint import fingerprint, fingerprint_of_part
from pi_jax.config import CheckpointConfig, ComputeConfig, MeshConfig
from pi_jax.convert import __main__ as command
from pi_jax.convert import param_mapping
from pi_jax.convert.folders import write_json
from pi_jax.convert.formats import hf, native
from pi_jax.convert.open import open_model
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.parallel import placement, sharding
from pi_jax.tiny import tiny_model_config

COMPUTE = ComputeConfig(dtype="float32")


@pytest.fixture
def model(mesh):
    """A random tiny model."""
    with jax.set_mesh(mesh):
        return Llama(tiny_model_config(), COMPUTE, jax.random.key(0))


@pytest.fixture
def folder(tmp_path, model, mesh):
    """The same in a Hugging Face folder."""
    tiny.tiny_tokenizer(tmp_path / "tokenizer")
    with jax.set_mesh(mesh):
        hf.save(model, str(tmp_path / "hf"), str(tmp_path / "tokenizer"))
    return tmp_path / "hf"


def _convert(source, target, form, **options):
    command.convert(command.Convert(str(source), str(target), format=form, verify=False, **options), quiet=True)
    return target


def _save_run(folder, model, context=None, mesh=None):
    """A run's folder with two checkpoints, as training leaves it: weights beside other state."""
    (folder / native.MODEL).mkdir(parents=True)
    write_json(epath.Path(folder / native.MODEL / "config.json"), hf.config_dict(model.config, "float32"))
    with Checkpoints(folder / native.CHECKPOINTS, CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, {"model": model, "count": jax.numpy.int32(1)}, {}, last=True)
        double = jax.tree.map(lambda x: 2 * x, model)
        checkpoints.save(2, {"model": double, "count": jax.numpy.int32(2)}, {}, last=True)
    return folder


def test_a_converted_checkpoint_is_one_that_training_restores(folder, model, tmp_path, mesh):
    target = _convert(folder, tmp_path / "run", "orbax")
    with Checkpoints(target / native.CHECKPOINTS, CheckpointConfig(), writer=False) as checkpoints:
        assert checkpoints.steps() == [0]
        place = jax.NamedSharding(mesh, jax.P())
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model)
        restored = checkpoints.restore(template, prefix="model.")
    assert restored.skipped == [] and fingerprint(restored.state) == fingerprint(model)
    eight = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(eight):
        split = open_model(str(target)).load(COMPUTE, eight)
    for name, leaf in trees.by_name(model).items():
        np.testing.assert_array_equal(trees.by_name(split)[name], leaf)


def test_another_dtype_than_trained_in_is_cast_after_the_check(folder, model, tmp_path, mesh):
    target = _convert(folder, tmp_path / "run", "orbax", dtype="bfloat16")
    with jax.set_mesh(mesh):
        loaded = open_model(str(target)).load(COMPUTE, mesh)
    for name, leaf in trees.by_name(model).items():
        expected = np.asarray(leaf).astype("bfloat16").astype(np.float32)
        np.testing.assert_array_equal(trees.by_name(loaded)[name], expected)


@pytest.mark.parametrize("shape", [MeshConfig(), MeshConfig(fsdp=2, tensor=2, data=2)], ids=str)
def test_a_run_is_read_a_layer_at_a_time_on_any_mesh(shape, model, tmp_path):
    mesh = sharding.make_mesh(shape)
    from pi_jax.model import parameter_axes

    places = placement.shard_tree(mesh, model, parameter_axes(model))
    with jax.set_mesh(mesh):
        split = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), model, places)
        _save_run(tmp_path / "run", split)
    reader = native.Reader(tmp_path / "run", model.config)
    assert reader.step == 2 and reader._weights.layers_apart
    leaves = trees.by_name(model)
    for tensor in reader.order:
        ours = leaves[tensor.spec.name] if tensor.layer is None else leaves[tensor.spec.name][tensor.layer]
        np.testing.assert_array_equal(reader.read(tensor), 2 * np.asarray(ours).reshape(tensor.shape))


def test_an_older_step_on_request(model, tmp_path, mesh):
    with jax.set_mesh(mesh):
        _save_run(tmp_path / "run", model)
    target = _convert(tmp_path / "run", tmp_path / "out", "hf", step=1)
    with jax.set_mesh(mesh):
        loaded = open_model(str(target)).load(COMPUTE, mesh)
    assert fingerprint(loaded) == fingerprint(model)


def test_checkpoints_with_all_layers_in_one_piece_are_read_too(model, tmp_path, mesh, monkeypatch):
    """As stored before layers were kept apart: an array is read once, and held until its layers are out."""

    def whole():
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        return context

    with monkeypatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(manager, "storage_context", whole)
        _save_run(tmp_path / "run", model)
    reader = native.Reader(tmp_path / "run", model.config)
    assert not reader._weights.layers_apart
    names = [tensor.spec.name for tensor in reader.order]
    assert names == sorted(names, key=names.index)  # a parameter's layers one after the other
    target = _convert(tmp_path / "run", tmp_path / "out", "hf", step=1)
    with jax.set_mesh(mesh):
        assert fingerprint(open_model(str(target)).load(COMPUTE, mesh)) == fingerprint(model)


def test_the_fingerprint_of_parts_adds_up():
    for shape in ((40,), (5, 300), (5, 3, 4), (3, 4, 5, 60)):
        for dtype in ("float32", "bfloat16"):
            x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
            whole = fingerprint({"x": jax.numpy.asarray(x)})["x"]
            assert fingerprint_of_part(x) == whole
            parts = [fingerprint_of_part(x[i : i + 1], i) for i in range(shape[0])]
            assert sum(parts) % 2**32 == whole
            moved = [fingerprint_of_part(x[i : i + 1], shape[0] - 1 - i) for i in range(shape[0])]
            assert sum(moved) % 2**32 != whole


def test_a_step_for_a_folder_that_has_none_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="is not a run, so it has no step 3"):
        _convert(folder, tmp_path / "out", "hf", step=3)


def test_layers_of_different_dtypes_need_one(folder, tmp_path):
    import safetensors.numpy

    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = param_mapping.HF_NAMES["layers.mlp.up"].format(1)
    tensors[name] = tensors[name].astype(np.float16)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(InputError, match="layers.mlp.up is float16 and float32 in different layers"):
        _convert(folder, tmp_path / "run", "orbax")
    _convert(folder, tmp_path / "run", "orbax", dtype="float32")
    _convert(folder, tmp_path / "hf2", "hf")  # where tensors are apart each keeps its own
    assert safetensors.numpy.load_file(tmp_path / "hf2" / "model.safetensors")[name].dtype == np.float16


def test_remote_storage_is_a_folder_like_any(folder, tmp_path, monkeypatch):
    """Stands for gs:// and s3://: a store in memory, by the same library that reaches them."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        protocol = "s3"
        store: dict = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

    fsspec.register_implementation("s3", Store, clobber=True)
    target = command.Convert(str(folder), "s3://bucket/models/tiny", format="hf", shard_gb=1e-4)
    command.convert(target, quiet=True)  # with its verification
    names = {path.rsplit("/", 1)[1] for path in Store.store}
    assert "config.json" in names and "model.safetensors.index.json" in names and "README.md" in names
    assert not any("/.tiny-" in path for path in Store.store)  # renamed when whole
    command.convert(command.Convert("s3://bucket/models/tiny", str(tmp_path / "back")), quiet=True)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        _convert(folder, "s3://bucket/models/tiny", "hf")
    with pytest.raises(InputError, match="local folder only"):
        _convert(folder, "s3://bucket/models/meta", "meta")


def test_a_broken_layer_is_named(model, tmp_path, mesh):
    with jax.set_mesh(mesh):
        _save_run(tmp_path / "run", model)
    largest = max(pathlib.Path(tmp_path / "run" / "checkpoints" / "2").rglob("*"), key=lambda p: p.stat().st_size)
    shutil.copyfile(largest, tmp_path / "kept")
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(InputError, match="at step 2: .* (differs from what was saved|cannot be read)"):
        _convert(tmp_path / "run", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    _convert(tmp_path / "run", tmp_path / "out", "hf", step=1)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["meta", "orbax"])
def test_memory_does_not_grow_with_the_model(form, tmp_path):
    """A model larger than the bound: three of its largest tensors, or two of its largest stored arrays, and 1 GiB."""
    script, layers = pathlib.Path(__file__).parents[1] / "benchmarks" / "convert.py", 8
    subprocess.run([sys.executable, str(script), "make", str(tmp_path / "hf"), str(layers)], check=True)
    size = sum(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    code = """
import re, runpy
runpy.run_module("pi_jax.convert", run_name="__main__")
print(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    command = [sys.executable, "-c", code, "--source", tmp_path / "hf", "--target", tmp_path / "out", "--format", form]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    peak = 1024 * int(done.stdout.splitlines()[-1])
    table, stack = 2 * 32000 * 4096, 2 * layers * 11008 * 4096
    bound = (3 * table if form == "meta" else 2 * stack) + 2**30
    assert 0 < peak < bound < size, (peak, bound, size)
