"""Hugging Face folders in and out: bit-exact, verified, and refusing what would be read wrongly."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pi_jax import tiny, trees
from pi_jax.config import ComputeConfig, RopeConfig, extend
from pi_jax.convert import __main__ as command
from pi_jax.convert import param_mapping
from pi_jax.convert.formats import hf
from pi_jax.convert.open import open_model
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.rope import Default, Linear
from pi_jax.tiny import tiny_model_config

COMPUTE = ComputeConfig(dtype="float32")


@pytest.fixture
def folder(tmp_path, mesh):
    """A tiny model in a Hugging Face folder, with its tokenizer."""
    tiny.tiny_tokenizer(tmp_path / "tokenizer")
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), COMPUTE, jax.random.key(0))
        hf.save(model, str(tmp_path / "model"), str(tmp_path / "tokenizer"))
    return tmp_path / "model"


def _load(folder, mesh, config=None):
    with jax.set_mesh(mesh):
        return hf.load(str(folder), config or hf.read_config(str(folder)), COMPUTE, mesh)


def _edit(path: pathlib.Path, **changes):
    value = json.loads(path.read_text())
    value = {k: v for k, v in (value | changes).items() if v is not ...}
    path.write_text(json.dumps(value))


def _edit_weights(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_exact(tied, dtype, tmp_path, mesh):
    config = extend(tiny_model_config(tie_word_embeddings=tied), RopeConfig("linear", 4.0))
    with jax.set_mesh(mesh):
        model = Llama(config, COMPUTE, jax.random.key(0))
        hf.save(model, str(tmp_path / "out"), None, dtype)
    again = _load(tmp_path / "out", mesh)
    assert again.config == config
    for name, leaf in trees.by_name(model).items():
        expected = np.asarray(leaf).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(trees.by_name(again)[name], expected, err_msg=name)
    assert ("lm_head.weight" in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")) != tied


def test_several_files_hold_what_one_holds(folder, tmp_path, mesh):
    model = _load(folder, mesh)
    with jax.set_mesh(mesh):
        hf.save(model, str(tmp_path / "parts"), None, shard_bytes=100_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 140_000 for f in files)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {t.name for t in param_mapping.tensors(model.config)}
    assert index["metadata"]["total_size"] == sum(x.size * 4 for x in jax.tree.leaves(model))
    for name, leaf in trees.by_name(_load(tmp_path / "parts", mesh)).items():
        np.testing.assert_array_equal(leaf, trees.by_name(model)[name])


def test_weights_go_straight_into_shards(folder, mesh):
    """Each device gets its part of what one device reads."""
    from pi_jax.config import MeshConfig
    from pi_jax.parallel import sharding

    eight = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    split, whole = _load(folder, eight), _load(folder, mesh)
    for name, leaf in trees.by_name(split).items():
        np.testing.assert_array_equal(leaf, trees.by_name(whole)[name], err_msg=name)
    assert split.layers.mlp.gate[...].addressable_shards[0].data.shape == (2, 80, 16)


def test_config_is_what_servers_read(folder, mesh, tmp_path):
    """max_position_embeddings is the new window; the old one stands where vLLM and SGLang look for it."""
    command.convert(command.Convert(str(folder), str(tmp_path / "long"), rope=RopeConfig("linear", 4.0)))
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["max_sequence_length"] == 64
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert isinstance(config["rope_scaling"]["factor"], float) and config["rope_theta"] == 10000.0
    assert json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())["model_max_length"] == 256
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (tmp_path / "long" / name).read_bytes() == (folder / name).read_bytes()
    assert open_model(str(tmp_path / "long")).config.rope == Linear(10000.0, 4.0)


def test_transformers_computes_the_same_from_an_export(folder, mesh, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    command.convert(command.Convert(str(folder), str(tmp_path / "long"), rope=RopeConfig("linear", 4.0)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "long", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ours = _load(tmp_path / "long", mesh)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 200)).astype(np.int32)
    with jax.set_mesh(mesh):
        found = ours.logits(ours(tokens, np.arange(200, dtype=np.int32)[None]))
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "long")
    assert tokenizer.decode(tokenizer("Bücher 12")["input_ids"]) == "Bücher 12"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'.*int"),
        ({"vocab_size": 260.5}, "vocab_size is 260.5.*int"),
        ({"rope_scaling": {"factor": 8.0}}, "must name one kind"),
        ({"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"type": "mystery", "factor": 2.0}}, "mystery"),
        ({"num_key_value_heads": 3}, "must divide"),
    ],
)
def test_configs_that_would_be_read_wrongly_are_refused(folder, changes, message):
    _edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        open_model(str(folder))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (_cut, "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}"), "not a complete"),
        (lambda f: _edit_weights(f, lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
        (lambda f: _edit_weights(f, lambda t: t.update(extra=np.ones(3, np.float32))), "contains extra"),
        (
            lambda f: _edit_weights(f, lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)})),
            r"model.norm.weight has shape \(3,\), but config.json requires \(64,\)",
        ),
        (
            lambda f: _edit_weights(f, lambda t: t["model.norm.weight"].fill(np.nan)),
            "model.norm.weight contains values that are not finite",
        ),
        (
            lambda f: _edit_weights(f, lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)})),
            "model.norm.weight has dtype I32",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "it must be the name of",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("[1"), "not readable JSON"),
    ],
)
def test_broken_weights_are_refused(folder, damage, message, mesh):
    damage(folder)
    with pytest.raises(InputError, match=message):
        _load(folder, mesh)


def test_all_end_tokens_survive(folder, tmp_path):
    """Chat models have several; a server that knows only the first does not stop."""
    _edit(folder / "config.json", eos_token_id=[257, 258])
    _edit(folder / "generation_config.json", eos_token_id=[257, 258], temperature=0.6, do_sample=True)
    command.convert(command.Convert(str(folder), str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [257, 258]
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()


def test_old_files_with_inv_freq_and_a_tied_head_load(folder, mesh):
    _edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    _load(folder, mesh)


def test_both_config_layouts_are_read(folder):
    assert open_model(str(folder)).config.rope == Default(10000.0)
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    _edit(folder / "config.json", rope_scaling=..., rope_theta=..., rope_parameters=new)
    assert open_model(str(folder)).config.rope == Linear(5e5, 2.0)
    with pytest.raises(InputError, match="already"):
        open_model(str(folder), RopeConfig("linear", 4.0))


def test_bfloat16_files_are_read(folder, mesh):
    def cast(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    _edit_weights(folder, cast)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(_load(folder, mesh))} == {"float32"}
