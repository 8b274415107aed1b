"""Meta's folders in and out: every layout and number of files, bit for bit, and logits as by Meta's own rotation."""

import json
import math
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pi_jax import tiny
from pi_jax.config import ComputeConfig, RopeConfig
from pi_jax.convert import __main__ as command
from pi_jax.convert import param_mapping
from pi_jax.convert.formats import hf, meta
from pi_jax.convert.open import open_model
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.rope import Default, Linear, Llama3
from pi_jax.tiny import tiny_model_config

torch = pytest.importorskip("torch")

FLOAT32 = ComputeConfig(dtype="float32")
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 264}


def _pairs(rows, heads):
    """The inverse of `permute` in Hugging Face's convert_llama_weights_to_hf.py, as it is written there."""
    out, columns = rows.shape
    return rows.view(heads, 2, out // heads // 2, columns).transpose(1, 2).reshape(out, columns)


def meta_folder(folder, config, files=1, dtype=torch.bfloat16, generation=2, seed=0):
    """A random model as Meta published them, made with torch alone; weights large enough for attention to matter."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes = {"tok_embeddings.weight": ((V, D), 0 if generation == 3 else 1), "norm.weight": ((D,), None)}
    if not config.tie_word_embeddings:
        shapes["output.weight"] = ((V, D), 0)
    for i in range(config.num_hidden_layers):
        for name, shape, split in (
            ("attention.wq", (N * H, D), 0),
            ("attention.wk", (K * H, D), 0),
            ("attention.wv", (K * H, D), 0),
            ("attention.wo", (D, N * H), 1),
            ("feed_forward.w1", (F, D), 0),
            ("feed_forward.w2", (D, F), 1),
            ("feed_forward.w3", (F, D), 0),
            ("attention_norm", (D,), None),
            ("ffn_norm", (D,), None),
        ):
            shapes[f"layers.{i}.{name}.weight"] = (shape, split)
    whole = {
        name: ((1 if len(shape) == 1 else 0) + 0.2 * torch.randn(shape, generator=generator)).to(dtype)
        for name, (shape, _) in shapes.items()
    }
    for number in range(files):
        state = {
            name: (tensor if shapes[name][1] is None else tensor.chunk(files, shapes[name][1])[number]).clone()
            for name, tensor in whole.items()
        }
        state["rope.freqs"] = torch.ones(H // 2)
        if generation == 1:
            for i in range(config.num_hidden_layers):
                state[f"layers.{i}.attention.inner_attention.rope.freqs"] = torch.ones(H // 2)
        torch.save(state, folder / f"consolidated.{number:02d}.pth")
    params = {"dim": D, "n_heads": N, "n_layers": config.num_hidden_layers, "norm_eps": config.rms_norm_eps}
    params |= {"vocab_size": -1 if generation == 1 else V, **_width(D, F)}
    if K != N:
        params["n_kv_heads"] = K
    if generation == 3:
        params["rope_theta"] = 500000.0
    (folder / "params.json").write_text(json.dumps(params))
    return whole


def _width(dim, width):
    found = meta.params_dict(tiny_model_config(hidden_size=dim, intermediate_size=width))
    return {k: v for k, v in found.items() if k in ("multiple_of", "ffn_dim_multiplier")}


def _contents(folder):
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]


def _convert(source, target, form, **options):
    command.convert(command.Convert(str(source), str(target), format=form, **options), quiet=True)


def _same_files(one, other, without=()):
    left, right = _contents(one), _contents(other)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        a = {k: v for k, v in a.items() if not k.endswith("rope.freqs")}
        assert set(a) == set(b)
        for name, tensor in a.items():
            assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


SLOW = pytest.mark.slow
CASES = {
    "1 file, LLaMA 1, fp16": pytest.param((1, torch.float16, 1, {}), marks=SLOW),
    "2 files, LLaMA 2, bf16, GQA": (2, torch.bfloat16, 2, {}),
    "4 files, LLaMA 1, fp16, MHA": (4, torch.float16, 1, {"num_key_value_heads": 4}),
    "8 files, LLaMA 2, bf16, MHA": pytest.param((8, torch.bfloat16, 2, EIGHT), marks=SLOW),
    "8 files, Llama 3, fp32, MHA": (8, torch.float32, 3, EIGHT),
    "2 files, Llama 3, bf16, GQA, tied": (2, torch.bfloat16, 3, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_meta_to_all_forms_and_back_is_bit_exact(case, tmp_path):
    files, dtype, generation, shape = case
    whole = meta_folder(tmp_path / "meta", tiny_model_config(**shape), files, dtype, generation)
    options = meta.MetaOptions(files=files, embedding="rows" if generation == 3 else "columns")
    _convert(tmp_path / "meta", tmp_path / "run", "orbax")
    _convert(tmp_path / "run", tmp_path / "hf", "hf", verify=files == 2)
    _convert(tmp_path / "hf", tmp_path / "run2", "orbax", verify=False)
    _convert(tmp_path / "run2", tmp_path / "back", "meta", meta=options)
    if shape.get("tie_word_embeddings"):  # Meta's own code wants a head in any case
        for state, number in zip(_contents(tmp_path / "back"), range(files), strict=True):
            assert torch.equal(state["output.weight"], whole["tok_embeddings.weight"].chunk(files)[number])
        found = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
        assert "lm_head.weight" not in found
        assert open_model(str(tmp_path / "back")).config == open_model(str(tmp_path / "meta")).config
    else:
        _same_files(tmp_path / "meta", tmp_path / "back")
    theirs, ours = (json.loads((tmp_path / name / "params.json").read_text()) for name in ("meta", "back"))
    assert ours == theirs | {"vocab_size": whole["tok_embeddings.weight"].shape[0]}


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [("float32", True), pytest.param("bfloat16", False, marks=SLOW), pytest.param("float16", False, marks=SLOW)],
)
def test_hugging_face_to_all_forms_and_back_is_bit_exact(tied, dtype, tmp_path, mesh):
    tiny.tiny_tokenizer(tmp_path / "tokenizer")
    config = tiny_model_config(tie_word_embeddings=tied, rope=Linear(10000.0, 4.0), max_position_embeddings=256,
                               original_max_position_embeddings=64)  # fmt: skip
    with jax.set_mesh(mesh):
        hf.save(Llama(config, FLOAT32, jax.random.key(0)), str(tmp_path / "a"), str(tmp_path / "tokenizer"), dtype)
    _convert(tmp_path / "a", tmp_path / "run", "orbax", verify=tied)
    _convert(tmp_path / "run", tmp_path / "meta", "meta", meta=meta.MetaOptions(files=2))
    _convert(tmp_path / "meta", tmp_path / "b", "hf", verify=False)
    for path in sorted((tmp_path / "a").iterdir()):
        if path.name != "README.md":  # names the folder it was made from
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def _meta_logits(whole, config, tokens):
    """LLaMA as Meta computes it: rotation of neighbouring pairs by complex multiplication."""
    w = {name: tensor.float() for name, tensor in whole.items()}
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = len(tokens)
    frequencies = 1.0 / config.rope.theta ** (torch.arange(0, H, 2).float() / H)
    turns = torch.polar(torch.ones(length, H // 2), torch.outer(torch.arange(length).float(), frequencies))

    def norm(x, scale):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * scale

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(length, -1, H // 2, 2)) * turns[:, None]).flatten(2)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(config.num_hidden_layers):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}
        h = norm(x, layer["attention_norm.weight"])
        q = rotate((h @ layer["attention.wq.weight"].T).view(length, N, H))
        k = rotate((h @ layer["attention.wk.weight"].T).view(length, K, H)).repeat_interleave(N // K, 1)
        v = (h @ layer["attention.wv.weight"].T).view(length, K, H).repeat_interleave(N // K, 1)
        scores = torch.einsum("snh,tnh->nst", q, k) / math.sqrt(H)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum("nst,tnh->snh", scores, v).reshape(length, -1) @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ layer["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return (norm(x, w["norm.weight"]) @ w["output.weight"].T).numpy()


def test_logits_are_those_of_metas_own_rotation(tmp_path, mesh, monkeypatch):
    config = tiny_model_config()
    whole = meta_folder(tmp_path / "meta", config, files=2)
    tokens = np.random.default_rng(0).integers(0, 256, 100)
    expected = _meta_logits(whole, config, torch.tensor(tokens))

    def ours():
        with jax.set_mesh(mesh):
            model = open_model(str(tmp_path / "meta")).load(FLOAT32, mesh)
            batch = tokens.astype(np.int32)[None], np.arange(100, dtype=np.int32)[None]
            return np.asarray(model.logits(model(*batch)))[0]

    np.testing.assert_allclose(ours(), expected, atol=1e-3)
    monkeypatch.setattr(meta, "halves", lambda rows, _: rows)  # the most repeated mistake
    assert np.abs(ours() - expected).max() > 0.1


def test_weights_go_straight_into_shards(tmp_path):
    """Each device gets its part, whole heads of q and k among them, and no tensor is read twice."""
    from pi_jax import trees
    from pi_jax.config import MeshConfig
    from pi_jax.parallel import sharding

    meta_folder(tmp_path / "meta", tiny_model_config(), files=2)
    eight, one = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    source = open_model(str(tmp_path / "meta"))
    with jax.set_mesh(eight):
        split = trees.by_name(source.load(FLOAT32, eight))
    with jax.set_mesh(one):
        whole = trees.by_name(source.load(FLOAT32, one))
    for name, leaf in split.items():
        np.testing.assert_array_equal(leaf, whole[name], err_msg=name)
    assert split["layers.attention.q"].addressable_shards[0].data.shape == (2, 2, 16, 16)


def test_a_part_of_the_rows_is_read_alone(tmp_path):
    """What another host holds is not read here."""
    whole = meta_folder(tmp_path / "meta", tiny_model_config(), files=2)
    folder = meta.Folder(str(tmp_path / "meta"))
    reader = meta.Reader(folder, folder.config())
    q = next(t for t in reader.order if t.name == "model.layers.1.self_attn.q_proj.weight")
    full = reader.read(q)
    np.testing.assert_array_equal(reader.read(q, (slice(16, 48), slice(8, 24))), full[16:48, 8:24])
    back = meta.pairs(full, 16).view(np.uint16)
    np.testing.assert_array_equal(back, whole["layers.1.attention.wq.weight"].view(torch.uint16).numpy())
    theirs = _pairs(torch.from_numpy(full.astype(np.float32)), 4).numpy()
    np.testing.assert_array_equal(theirs, meta.pairs(full, 16).astype(np.float32))


def llama3(factor):
    return Llama3(
        theta=500000.0,
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


@pytest.mark.parametrize(
    ("generation", "changes", "window", "rope"),
    [
        (1, {}, 2048, Default(10000.0)),
        (2, {}, 4096, Default(10000.0)),
        (2, {"rope_theta": 1e6}, 16384, Default(1e6)),
        (3, {"use_scaled_rope": True}, 131072, llama3(32.0)),
        (3, {"use_scaled_rope": True, "rope_scaling_factor": 8}, 131072, llama3(8.0)),
    ],
)
def test_windows_and_scalings_that_params_do_not_say(generation, changes, window, rope, tmp_path, capsys):
    meta_folder(tmp_path / "meta", tiny_model_config(), generation=generation)
    _edit(tmp_path / "meta" / "params.json", **changes)
    config = open_model(str(tmp_path / "meta")).config
    assert (config.max_position_embeddings, config.rope) == (window, rope)
    assert open_model(str(tmp_path / "meta"), window=32768).config.max_position_embeddings == 32768
    _convert(tmp_path / "meta", tmp_path / "hf", "hf", verify=window == 131072)
    printed = capsys.readouterr()
    assert f"{window} tokens are assumed by the rules" in printed.err and "no tokenizer" in printed.out
    assert open_model(str(tmp_path / "hf")).config == config


def test_llama3_keeps_its_vocabulary_and_split(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "head_dim": 4, "intermediate_size": 32}
    config = tiny_model_config(vocab_size=100_352, **sizes)
    meta_folder(tmp_path / "meta", config, files=2, generation=3)
    _convert(tmp_path / "meta", tmp_path / "back", "meta", meta=meta.MetaOptions(files=2))
    _same_files(tmp_path / "meta", tmp_path / "back")
    found = open_model(str(tmp_path / "back")).config
    assert (found.max_position_embeddings, found.bos_token_id, found.eos_token_id) == (8192, 128000, 128001)


def test_a_scaling_survives_though_params_cannot_say_it(tmp_path, capsys):
    meta_folder(tmp_path / "meta", tiny_model_config())
    _convert(tmp_path / "meta", tmp_path / "long", "meta", rope=RopeConfig("linear", 4.0))
    assert "does not support 'linear' scaling" in capsys.readouterr().out
    config = open_model(str(tmp_path / "long")).config
    assert config.rope == Linear(10000.0, 4.0) and config.max_position_embeddings == 16384
    _edit(tmp_path / "long" / "params.json", rope_theta=20000.0)
    with pytest.raises(InputError, match=r"theta is 10000.0, but params.json says 20000.0"):
        open_model(str(tmp_path / "long"))


@pytest.mark.parametrize(
    ("dim", "width", "expected"),
    [
        (4096, 11008, {"multiple_of": 256}),
        (5120, 13824, {"multiple_of": 256}),
        (6656, 17920, {"multiple_of": 256}),
        (8192, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        (4096, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),
        (2048, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),
        (576, 1536, {"multiple_of": 256}),
        (64, 161, {"multiple_of": 1}),
    ],
)
def test_feed_forward_widths_are_said_as_meta_did(dim, width, expected):
    params = meta.params_dict(tiny_model_config(hidden_size=dim, intermediate_size=width))
    assert meta.feed_forward(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == width
    assert expected.items() <= params.items()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ({"head_dim": 32}, {}, "head_dim is 32.*64 / 4"),
        ({}, {"files": 4}, "meta.files is 4: it must divide num_key_value_heads, 2"),
        ({"num_key_value_heads": 4, "vocab_size": 262}, {"files": 4}, "vocab_size, 262"),
    ],
)
def test_what_metas_form_cannot_say_is_refused(shape, options, message, tmp_path, mesh):
    with jax.set_mesh(mesh):
        hf.save(Llama(tiny_model_config(**shape), FLOAT32, jax.random.key(0)), str(tmp_path / "a"), None)
    with pytest.raises(InputError, match=message):
        _convert(tmp_path / "a", tmp_path / "b", "meta", meta=meta.MetaOptions(**options))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_torch_and_unzip_read_what_was_written(tmp_path):
    """The archive is whole: checksums hold, and tensors lie where a map of the file wants them."""
    import zipfile

    meta_folder(tmp_path / "meta", tiny_model_config())
    _convert(tmp_path / "meta", tmp_path / "back", "meta")
    path = tmp_path / "back" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    mapped = torch.load(path, mmap=True, weights_only=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())
    _same_files(tmp_path / "meta", tmp_path / "back")


def test_the_table_agrees_with_the_model():
    from pi_jax.model import abstract, parameter_axes
    from pi_jax.trees import by_name

    config = tiny_model_config()
    model = abstract(config, FLOAT32)
    axes, leaves = parameter_axes(model), by_name(model)
    assert {spec.name for spec in param_mapping.PARAM_SPECS} == set(axes)
    for spec in param_mapping.PARAM_SPECS:
        lead = ("layers",) if spec.stacked else ()
        assert axes[spec.name] == lead + spec.axes, spec.name
        assert leaves[spec.name].shape[len(lead) :] == spec.shape(config), spec.name


def _edit(path: pathlib.Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bfloat16_is_not_rounded_twice(tmp_path):
    """Values at the edge of rounding come through as they are."""
    whole = meta_folder(tmp_path / "meta", tiny_model_config(), dtype=torch.float32)
    _convert(tmp_path / "meta", tmp_path / "hf", "hf", dtype="bfloat16")
    found = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    expected = whole["layers.0.feed_forward.w3.weight"].bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(found.view(np.uint16), expected)
    assert found.dtype == ml_dtypes.bfloat16
