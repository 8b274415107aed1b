"""Hostile and broken input: one sentence, exit status 2, nothing executed, nothing half-written."""

import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pi_jax import tiny
from pi_jax.config import ComputeConfig
from pi_jax.convert import __main__ as command
from pi_jax.convert import pipeline
from pi_jax.convert.formats import hf, meta
from pi_jax.convert.open import open_model
from pi_jax.convert.verify import logits, readback
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.rope import Linear
from pi_jax.tiny import tiny_model_config

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def models(tmp_path_factory, mesh):
    """A tiny model in all three forms."""
    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_tokenizer(folder / "tokenizer")
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), ComputeConfig(dtype="float32"), jax.random.key(0))
        hf.save(model, str(folder / "hf"), str(folder / "tokenizer"))
        hf.save(model, str(folder / "parts"), str(folder / "tokenizer"), shard_bytes=100_000)
    options = meta.MetaOptions(files=2)
    command.convert(command.Convert(str(folder / "hf"), str(folder / "meta"), "meta", meta=options, verify=False))
    command.convert(command.Convert(str(folder / "hf"), str(folder / "run"), "orbax", verify=False))
    return folder


@pytest.fixture
def refused(models, tmp_path, capsys):
    """Runs the command on a damaged copy of a model and checks how it ends; returns what it said."""

    def run(kind, damage, *options):
        shutil.copytree(models / kind, tmp_path / kind)
        damage(tmp_path / kind)
        before = _listing(tmp_path)
        with pytest.raises(SystemExit) as exit:
            command.main(["--source", str(tmp_path / kind), "--target", str(tmp_path / "out"), *options])
        said = capsys.readouterr().err
        said = [
            line for line in said.splitlines() if line.startswith("error: ") or not line.startswith(("writ", "read"))
        ]
        said = [line for line in said if line.strip() and "%|" not in line]
        assert exit.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
        assert _listing(tmp_path) == before
        return said[0]

    return run


def _listing(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def _edit(path: pathlib.Path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def _weights(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _index(**changes):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] |= changes
        path.write_text(json.dumps(index))

    return damage


def _cut(name):
    def damage(folder):
        path = max(folder.glob(name), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1000])

    return damage


def _header(change):
    """A safetensors file with another header, its length right."""

    def damage(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = change(json.loads(data[8 : 8 + length]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


NORM = "model.norm.weight"


def _norm(**changes):
    return _header(lambda header: header | {NORM: header[NORM] | changes})


SAFETENSORS = {
    "index out of the folder": ("parts", _index(**{NORM: "../secret.safetensors"}), "it must be the name of"),
    "index to an absolute path": ("parts", _index(**{NORM: "/etc/passwd"}), "it must be the name of"),
    "index to a lost file": ("parts", _index(**{NORM: "x.safetensors"}), "x.safetensors, which does not exist"),
    "index of a tensor elsewhere": (
        "parts",
        lambda f: _index(**{NORM: min(p.name for p in f.glob("model-*"))})(f),
        "lacks model.norm.weight, although",
    ),
    "index without names": (
        "parts",
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
    "header of 10^12 bytes": (
        "hf",
        lambda f: (f / "model.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}"),
        "header has 1000000000000 bytes",
    ),
    "truncated": ("hf", _cut("model.safetensors"), "not a complete safetensors file"),
    "truncated shard": ("parts", _cut("model-*.safetensors"), "not a complete safetensors file"),
    "emptied": ("hf", lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
    "trailing bytes": (
        "hf",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x"),
        "not a complete safetensors file",
    ),
    "header is no JSON": ("hf", _header(lambda _: b"{" * 300), "not a complete safetensors file"),
    "header nested deep": ("hf", _header(lambda _: b'{"a":' * 3_000), "not a complete safetensors file"),
    "name twice": ("hf", _header(lambda _: b'{"a":1,"a":2}'), "contains a name twice"),
    "offsets beyond the file": ("hf", _norm(data_offsets=[0, 10**12]), "the header gives model.norm.weight bytes"),
    "offsets backwards": ("hf", _norm(data_offsets=[256, 0]), "the header gives model.norm.weight bytes"),
    "negative shape": ("hf", _norm(shape=[-64]), "not a complete safetensors file"),
    "offsets that are no numbers": ("hf", _norm(data_offsets=["0", "256"]), "not a complete safetensors file"),
    "shape that does not fit": ("hf", _norm(shape=[10**9]), "which is not the size of"),
    "unknown dtype": ("hf", _norm(dtype="F8_E4M3"), "F8_E4M3: weights must be"),
    "missing tensor": ("hf", _weights(lambda t: t.pop(NORM)), "lacks model.norm.weight"),
    "extra tensor": ("hf", _weights(lambda t: t.update(extra=np.ones(3, np.float32))), "contains extra, which"),
    "bias": (
        "hf",
        _weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)})),
        "q_proj.bias",
    ),
    "wrong shape": ("hf", _weights(lambda t: t.update({NORM: np.ones(3, np.float32)})), r"shape (3,), but config.json"),
    "integers": ("hf", _weights(lambda t: t.update({NORM: np.ones(64, np.int32)})), "I32: weights must be"),
    "NaN": ("hf", _weights(lambda t: t[NORM].__setitem__(5, np.nan)), "model.norm.weight contains values that are not"),
    "infinity": ("hf", _weights(lambda t: t[NORM].__setitem__(5, -np.inf)), "not finite"),
    "NaN in bfloat16": (
        "hf",
        _weights(lambda t: t.update({NORM: np.full(64, np.nan, ml_dtypes.bfloat16)})),
        "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAFETENSORS.values(), ids=SAFETENSORS)
def test_broken_safetensors(case, refused):
    kind, damage, message = case
    assert message in refused(kind, damage, "--no-verify")


CONFIG = {
    "no rope_theta": ({"rope_theta": ..., "transformers_version": "4.57.6"}, "has no rope_theta"),
    "no rope_theta in either layout": (
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "has no rope_theta",
    ),
    "layouts that disagree": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "rope_parameters is",
    ),
    "thetas that disagree": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5.0}},
        "remove the one that is wrong",
    ),
    "code to load": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is"),
    "mixture of experts": ({"num_local_experts": 8}, "num_local_experts is 8"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window is 4096"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config is"),
}


@pytest.mark.parametrize("case", CONFIG.values(), ids=CONFIG)
def test_broken_configs(case, refused):
    changes, message = case
    said = refused("hf", lambda folder: _edit(folder / "config.json", **changes))
    assert message in said and "config.json" in said


def test_files_older_than_rope_theta_mean_10000(models, tmp_path):
    shutil.copytree(models / "hf", tmp_path / "old")
    _edit(tmp_path / "old" / "config.json", rope_theta=..., transformers_version="4.28.1")
    assert open_model(str(tmp_path / "old")).config.rope.theta == 10000.0


class _Evil:
    """Leaves a trace wherever it is unpickled."""

    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self._trace),))


def _evil_archive(folder):
    """Beside real tensors, code: what torch.load would run if it were let."""
    path = folder / "consolidated.01.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"norm.weight": _Evil(folder / "run-by-torch")}, path)


def _evil_pickle(folder):
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(_Evil(folder / "run-by-torch")))


def _compressed(folder):
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def _state(change, number=0):
    def damage(folder):
        path = folder / f"consolidated.{number:02d}.pth"
        state = torch.load(path, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, path)

    return damage


def _params(**changes):
    return lambda folder: _edit(folder / "params.json", **changes)


UP = "layers.0.feed_forward.w3.weight"
PTH = {
    "code in the archive": (_evil_archive, "contains more than plain tensors"),
    "a pickle alone": (_evil_pickle, "not a complete .pth file"),
    "compressed": (_compressed, "contains compressed records"),
    "truncated": (_cut("consolidated.01.pth"), "not a complete .pth file"),
    "not a table": (_state(lambda s: list(s.values())), "contains a list"),
    "a whole module": (lambda f: torch.save(torch.nn.Linear(2, 2), f / "consolidated.00.pth"), "more than plain"),
    "terabytes in a kilobyte": (
        _state(lambda s: s.update({UP: torch.zeros(1).expand(10**6, 10**6)})),
        "not stored row by row",
    ),
    "transposed": (_state(lambda s: s.update({UP: s[UP].T})), "not stored row by row"),
    "missing tensor": (_state(lambda s: s.__delitem__(UP), 1), f"consolidated.01.pth lacks {UP}"),
    "extra tensor": (_state(lambda s: s.update(extra=torch.ones(3))), "contains extra"),
    "wrong shape": (_state(lambda s: s.update({UP: torch.ones(8, 8)})), f"consolidated.01.pth: {UP} is"),
    "another dtype in one file": (_state(lambda s: s.update({UP: s[UP].half()})), f"{UP} is"),
    "complex": (_state(lambda s: s.update({UP: s[UP].to(torch.complex64)})), "complex64"),
    "NaN": (_state(lambda s: s[UP].view(-1).__setitem__(7, float("nan")), 1), f"{UP} contains values that are"),
    "a lost file": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth and so on without gaps"),
    "too few files": (lambda f: (f / "consolidated.01.pth").unlink(), "has shape"),
    "experts": (_params(moe={"num_experts": 8}), "moe is"),
    "sliding window": (_params(sliding_window=4096), "sliding_window is 4096"),
    "no width": (_params(dim=...), "lacks dim"),
    "width of another type": (_params(dim="64"), "params.json"),
    "another number of layers": (_params(n_layers=3), "hf_config.json: num_hidden_layers is 2, but params.json says 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", PTH.values(), ids=PTH)
def test_broken_meta_folders(case, refused):
    damage, message = case
    said = refused("meta", damage, "--no-verify")
    assert message in said


def test_code_would_run_if_it_were_let(models, tmp_path):
    """The control of the test above: the file is dangerous."""
    shutil.copytree(models / "meta", tmp_path / "meta")
    _evil_archive(tmp_path / "meta")
    torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=False)
    assert (tmp_path / "meta" / "run-by-torch").is_dir()


def test_an_unsafe_torch_is_not_used(models, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(InputError, match="torch 2.5.1.* does not open .pth files safely"):
        open_model(str(models / "meta"))


def _flip(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


RUN = {
    "one bit": (_flip, "differs from what was saved"),
    "lost data": (lambda f: shutil.rmtree(f / "checkpoints" / "0" / "state"), "no usable checkpoint"),
    "no checkpoint": (lambda f: shutil.rmtree(f / "checkpoints"), "has no checkpoint yet"),
    "another model": (lambda f: _edit(f / "model" / "config.json", num_hidden_layers=3), "has shape"),
}


@pytest.mark.parametrize("case", RUN.values(), ids=RUN)
def test_broken_checkpoints(case, refused):
    damage, message = case
    assert message in refused("run", damage)


def test_a_step_that_is_not_there(refused):
    assert "no usable checkpoint" in refused("run", lambda f: None, "--step", "7")


@pytest.mark.parametrize("form", ["hf", "meta", "orbax"])
def test_a_full_disk_leaves_nothing(form, refused):
    """The kernel refuses to write: a limit on the size of files stands for a disk without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        said = refused("hf", lambda f: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard)), "--format", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "out cannot be written: " in said and "large" in said


@pytest.mark.parametrize("form", ["hf", "meta", "orbax"])
def test_a_target_that_exists_is_left_alone(form, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert "already exists" in refused("hf", lambda f: None, "--format", form)


def test_a_target_that_appears_meanwhile_is_left_alone(refused, tmp_path, monkeypatch):
    copy = pipeline.copy

    def slow(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        return copy(*args)

    monkeypatch.setattr(pipeline, "copy", slow)
    with pytest.raises(AssertionError):  # the listing has the new file in it, and only that
        refused("hf", lambda f: None)
    assert _listing(tmp_path).keys() - {f"hf/{p.name}" for p in (tmp_path / "hf").iterdir()} == {"out/precious"}


def test_a_folder_that_cannot_be_made(refused, tmp_path, models, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as exit:
        command.main(["--source", str(models / "hf"), "--target", str(tmp_path / "file" / "out")])
    assert exit.value.code == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["hf", "meta", "orbax"])
def test_a_wrong_value_is_found_by_reading_back(form, refused, monkeypatch):
    read = {"hf": readback.hf, "meta": readback.meta, "orbax": readback.run}[form]

    def wrong(*args):
        inner = read(*args)

        def one(tensor):
            array = np.array(inner(tensor))
            if tensor.name.endswith("layers.1.mlp.down_proj.weight"):
                array[3, 5] = np.nextafter(array[3, 5], np.float32(1))
            return array

        return one

    monkeypatch.setattr(readback, read.__name__, wrong)
    assert "model.layers.1.mlp.down_proj.weight differs from the source when it is read back" in refused(
        "hf", lambda f: None, "--format", form
    )


def test_a_write_that_goes_wrong_is_found(refused, monkeypatch):
    write = hf.safetensors.Writer.write

    def zeroed(self, tensor, array):
        write(self, tensor, array * 0 if tensor.name == NORM else array)

    monkeypatch.setattr(hf.safetensors.Writer, "write", zeroed)
    assert f"{NORM} differs from the source when it is read back" in refused("hf", lambda f: None)


def test_rows_in_metas_order_are_found_by_the_logits(refused, monkeypatch):
    """Every tensor would come back as it was written, and the model would be noise."""
    monkeypatch.setattr(meta, "halves", lambda rows, _: rows)
    from pi_jax.convert import sharded_load

    load = sharded_load.load
    monkeypatch.setattr(sharded_load, "load", lambda reader, *args: load(_Right(reader), *args))

    class _Right:
        def __init__(self, reader):
            self._reader, self.order, self.dtypes = reader, reader.order, reader.dtypes

        def read(self, tensor, index=(...,)):
            array = self._reader.read(tensor, index)
            if not tensor.spec.meta_pairs:
                return array
            return array.reshape(-1, 8, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)

    assert "the logits of transformers and pi_jax differ" in refused("meta", lambda f: None)


def test_a_scaling_lost_on_the_way_is_found_by_the_logits(models, tmp_path):
    """The commonest damage of all: the weights are right and the config has forgotten the factor."""
    shutil.copytree(models / "hf", tmp_path / "long")
    window = {"max_position_embeddings": 256, "max_sequence_length": 64}
    _edit(tmp_path / "long" / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0}, **window)
    source = open_model(str(tmp_path / "long"))
    assert source.config.rope == Linear(10000.0, 4.0)
    assert "beyond it to 255" in logits.compare(source.config, [(source.reader(), tmp_path / "long")])
    _edit(tmp_path / "long" / "config.json", rope_scaling=None)
    with pytest.raises(InputError, match="the logits of transformers and pi_jax differ"):
        logits.compare(source.config, [(source.reader(), tmp_path / "long")])


def test_a_value_too_large_for_float16_is_refused(refused):
    damage = _weights(lambda t: t[NORM].__setitem__(5, 1e6))
    assert "too large for float16" in refused("hf", damage, "--dtype", "float16")


def test_struct_of_a_header_is_what_the_library_writes(models):
    """Ours is read by the library, and theirs by us."""
    data = (models / "hf" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"} and (8 + length) % 64 == 0
