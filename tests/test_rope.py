"""Every scaling kind against transformers' own code, and against what must be true of it.

Tests with `transformers` in their names also run with transformers 4, first on PYTHONPATH, whose LlamaConfig reads the
"v4" layout only.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pi_jax import rope
from pi_jax.config import ComputeConfig, MeshConfig, RopeConfig, extend
from pi_jax.convert.formats import hf
from pi_jax.errors import InputError
from pi_jax.parallel.placement import put_global
from pi_jax.parallel.sharding import make_mesh
from pi_jax.tiny import tiny_model_config

torch.set_num_threads(1)

ORIGINAL = 32
"""Window in tokens before its extension."""
FIXED = ("default", "linear", "yarn", "yarn-deepseek", "llama3")
BY_LENGTH = ("dynamic", "longrope")


def _section(name: str, head_dim: int, factor: float = 4.0, original: int = ORIGINAL) -> dict:
    """`rope_parameters` of a kind, with options that are not its defaults where the name has a suffix."""
    window = {"original_max_position_embeddings": original}
    rng = np.random.default_rng(0)
    options = {
        "default": {},
        "linear": {"factor": factor},
        "dynamic": {"factor": factor},
        "yarn": {"factor": factor, **window},
        "yarn-deepseek": {"factor": factor, **window, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
        | {"mscale": 1.0, "mscale_all_dim": 0.707},
        "llama3": {"factor": factor, **window, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"factor": factor, **window}
        | {"short_factor": (1 + rng.random(head_dim // 2)).tolist()}
        | {"long_factor": (1 + factor * rng.random(head_dim // 2)).tolist()},
    }
    return {"rope_type": name.split("-")[0], "rope_theta": 10000.0, **options[name]}


def _config(name: str, head_dim: int, factor: float = 4.0, original: int = ORIGINAL) -> dict:
    """The rotary part of a `config.json`; readers of 'dynamic' take the original window from outside."""
    window = original if name == "dynamic" else int(original * factor)
    return {"rope_parameters": _section(name, head_dim, factor, original), "max_position_embeddings": window}


def _v4(config: dict) -> dict:
    """The same in the layout that transformers 4 and 5 both read."""
    scaling = rope.from_hf(config)
    return rope.to_hf(scaling) | rope.window_to_hf(scaling, config["max_position_embeddings"], None)


def _theirs(config: dict, head_dim: int) -> LlamaRotaryEmbedding:
    heads = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    return LlamaRotaryEmbedding(LlamaConfig(**heads, **_v4(config)))


@pytest.mark.parametrize("factor", [8.0, 6.0])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", [*FIXED, *BY_LENGTH])
def test_equals_transformers(name, head_dim, factor):
    config = _config(name, head_dim, factor, original=4096)
    ours, theirs = rope.from_hf(config), _theirs(config, head_dim)
    np.testing.assert_array_equal(ours.inverse_frequencies(head_dim), theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling

    positions = np.unique(np.concatenate([np.geomspace(1, 131072, 199).astype(int) - 1, [131071]]))[None]
    cos, sin = theirs(torch.zeros(1), torch.tensor(positions))
    beyond = ours.inverse_frequencies(head_dim, jnp.int32(131072))
    if name == "dynamic":
        # The same but for the last bit of a pair or two, where torch's float32 power is not correctly rounded. At
        # position 131071 a last bit is up to 0.016 rad.
        off = beyond != theirs.inv_freq.numpy()
        np.testing.assert_allclose(beyond, theirs.inv_freq, rtol=1.2e-7)
        assert off.sum() <= 2
        tolerance = np.where(off, 0.02, 1e-5)
    else:
        np.testing.assert_array_equal(beyond, theirs.inv_freq)
        tolerance = np.full(head_dim // 2, 1e-5)  # cos and sin of the same angle
    ours_cos, ours_sin = rope.cos_sin(positions, head_dim, ours)
    assert (np.abs(ours_cos - cos[..., : head_dim // 2].numpy()) <= tolerance).all()
    assert (np.abs(ours_sin - sin[..., : head_dim // 2].numpy()) <= tolerance).all()

    q, k = np.random.default_rng(1).standard_normal((2, 1, positions.size, 2, head_dim), np.float32)
    expected = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin, unsqueeze_dim=2)
    for x, x_theirs in zip((q, k), expected, strict=True):
        assert (np.abs(rope.rotate(x, positions, ours) - x_theirs.numpy()) <= 8 * np.tile(tolerance, 2)).all()


def test_dynamic_is_correctly_rounded_at_every_length():
    """Beyond the window, length traced: the float64 value rounded where transformers rounds, to the last bit."""
    scaling = rope.Dynamic(factor=4.0, original_max_position_embeddings=4096)
    compiled = jax.jit(lambda length: scaling.inverse_frequencies(128, length))
    for length in (4096, 4097, 5000, 8192, 30000, 131072):
        growth = np.float32(4) * np.float32(length) / np.float32(4096) - np.float32(3)
        base = np.float32(1e4) * np.float32(np.float64(growth) ** (128 / 126))
        powers = np.float64(base) ** (np.arange(0, 128, 2) / 128)
        np.testing.assert_array_equal(compiled(jnp.int32(length)), np.float32(1) / powers.astype(np.float32))
    assert compiled._cache_size() == 1


def test_ntk_is_plain_rope_with_another_theta():
    scaling = rope.build_scaling("ntk", 10000.0, 8.0, head_dim=128)
    assert scaling == rope.Default(10000.0 * 8 ** (128 / 126))
    slowest = rope.Default().inverse_frequencies(128)[-1] / scaling.inverse_frequencies(128)[-1]
    assert slowest == pytest.approx(8.0, rel=1e-6)
    assert rope.to_hf(scaling) == {"rope_theta": scaling.theta, "rope_scaling": None}


@pytest.mark.parametrize("name", [*FIXED, *BY_LENGTH])
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_config_round_trip(name, layout):
    config = _config(name, 64)
    scaling = rope.from_hf(config)
    again = json.loads(json.dumps(rope.to_hf(scaling, layout)))
    assert rope.from_hf(again | {"max_position_embeddings": config["max_position_embeddings"]}) == scaling
    assert hash(scaling) == hash(rope.from_hf(config))
    assert isinstance(scaling, rope.Scaling) and jax.tree.leaves(scaling) == []
    if layout == "v4" and name != "default":
        assert again["rope_scaling"]["type"] == again["rope_scaling"]["rope_type"] == scaling.kind
        assert isinstance(again["rope_scaling"]["factor"], float)


def test_theta_in_three_places():
    linear = {"type": "linear", "factor": 2}
    expected = rope.Linear(5e5, 2.0)
    assert rope.from_hf({"rope_theta": 5e5, "rope_scaling": linear}) == expected
    assert rope.from_hf({"rope_scaling": linear | {"rope_theta": 5e5}}) == expected
    assert rope.from_hf({"rope_parameters": linear | {"rope_theta": 5e5}}) == expected
    assert rope.from_hf({"rope_scaling": linear}).theta == rope.from_hf({}).theta == 10000.0
    assert rope.from_hf({"rope_parameters": {"rope_theta": 5e5}}) == rope.Default(5e5)


# --- The whole model


def _build(folder, rotary, tied):
    """A random LLaMA of transformers, in a folder; head_dim is not hidden_size / heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if tied else 4,
        head_dim=16,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **rotary,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def _reload(model, config: dict):
    again = LlamaForCausalLM(LlamaConfig(**config)).eval()
    again.load_state_dict(model.state_dict())
    return again


@pytest.mark.parametrize("name, tied", [(n, i % 2 == 0) for i, n in enumerate((*FIXED, *BY_LENGTH))])
def test_logits_equal_transformers(name, tied, tmp_path):
    theirs = _build(tmp_path, _v4(_config(name, 16)), tied)
    config = hf.read_config(str(tmp_path))
    assert config.original_window == (ORIGINAL if name not in ("default", "linear") else 4 * ORIGINAL)
    written = hf.config_dict(config, "float32")
    modern = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    modern |= rope.to_hf(config.rope, "v5")
    for layout, keys in (("v4", written), ("v5", modern)):
        (tmp_path / layout).mkdir()
        (tmp_path / layout / "config.json").write_text(json.dumps(keys))
        assert hf.read_config(str(tmp_path / layout)) == config
    readers = [theirs, _reload(theirs, written)]
    if transformers.__version__ >= "5":
        readers.append(_reload(theirs, modern))

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, 97, (1, 3 * ORIGINAL))
    with jax.set_mesh(mesh):
        ours = hf.load(str(tmp_path), config, ComputeConfig(dtype="float32"), mesh)

        @jax.jit
        def logits(model, tokens, positions):
            return model.logits(model(tokens, positions))

        # Attention is causal: a long sequence holds those below and at the window, but for kinds that know the length.
        for length in (ORIGINAL // 2, ORIGINAL, 3 * ORIGINAL) if name in BY_LENGTH else (3 * ORIGINAL,):
            positions = jnp.arange(length)[None]
            found = np.asarray(logits(ours, jnp.asarray(tokens[:, :length]), positions))
            for reader in readers:
                with torch.no_grad():
                    expected = reader(torch.tensor(tokens[:, :length])).logits.numpy()
                np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    if name == "linear":  # the control: a scaling that got lost is seen
        with torch.no_grad():
            lost = _reload(theirs, written | {"rope_scaling": None})(torch.tensor(tokens)).logits
        assert np.abs(found - lost.numpy()).max() > 0.1


# --- What must be true


@pytest.mark.parametrize("factor", [2.0, 16.0])
def test_interpolated_phases_are_plain_ones_at_the_original_position(factor):
    positions = jnp.arange(2048)[None]
    longer = rope.cos_sin(positions * factor, 128, rope.Linear(10000.0, factor))
    for ours, plain in zip(longer, rope.cos_sin(positions, 128, rope.Default()), strict=True):
        np.testing.assert_array_equal(ours, plain)
    fractions = rope.cos_sin(jnp.arange(2048)[None] / factor, 128, rope.Default())
    for ours, linear in zip(fractions, rope.cos_sin(positions, 128, rope.Linear(10000.0, factor)), strict=True):
        np.testing.assert_allclose(ours, linear, atol=2e-4)


@pytest.mark.parametrize("kind", [k for k in rope.CHOICES if k != "default"])
def test_factor_one_is_the_identity(kind):
    scaling = rope.build_scaling(kind, 10000.0, 1.0, window=64, head_dim=64)
    plain = rope.Default().inverse_frequencies(64)
    np.testing.assert_allclose(scaling.inverse_frequencies(64, 64), plain, rtol=1.2e-7)
    assert scaling.attention_scaling == 1.0


def _phase_errors(angles_R, exact_R):
    cos, sin = np.cos(np.asarray(angles_R, np.float64)), np.sin(np.asarray(angles_R, np.float64))
    return np.abs(np.angle((cos + 1j * sin) * np.exp(-1j * exact_R)))


def test_phases_in_float32_are_exact_enough_and_in_bfloat16_are_not():
    for head_dim in (64, 96, 128):
        scaling = rope.Linear(10000.0, 16.0)
        inv_freq = scaling.inverse_frequencies(head_dim)
        cos, sin = rope.cos_sin(jnp.array([[131071]]), head_dim, scaling)
        angles = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))[0, 0]
        # Position times frequency in float64: within 2e-4, where half a unit in the last place of the largest angle is
        # 2.4e-4. With float64 frequencies, too, the last bit of transformers' float32 ones comes on top.
        assert _phase_errors(angles, 131071.0 * inv_freq.astype(np.float64)).max() < 2e-4
        exact = 131071.0 / 16 * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
        assert _phase_errors(angles, exact).max() < (1e-4 if head_dim == 64 else 3.5e-4)
        # Broken on purpose: the position in the dtype of activations.
        broken = jnp.bfloat16(131071) * jnp.asarray(inv_freq).astype(jnp.bfloat16)
        assert _phase_errors(broken, exact).max() > 1.0


@pytest.mark.parametrize("name", BY_LENGTH)
def test_length_is_an_argument_and_compiles_once(name):
    scaling = rope.from_hf(_config(name, 16))
    compiled = jax.jit(lambda positions: rope.cos_sin(positions, 16, scaling))
    row = np.arange(8)[None]
    within, beyond = compiled(row), compiled(row + 100)
    assert compiled._cache_size() == 1
    plain = rope.cos_sin(row, 16, scaling, length=ORIGINAL)
    np.testing.assert_allclose(within[0], plain[0], atol=1e-6)
    assert np.abs(np.asarray(rope.cos_sin(row + 100, 16, scaling, length=ORIGINAL)[0]) - beyond[0]).max() > 0.1


def test_length_is_that_of_the_whole_batch_on_every_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    scaling = rope.from_hf(_config("dynamic", 16))
    positions = np.arange(4 * 64, dtype=np.int32).reshape(4, 64)
    expected = rope.cos_sin(positions, 16, scaling)
    with jax.set_mesh(mesh):
        batch = put_global(mesh, {"positions": positions})
        for ours, whole in zip(
            jax.jit(rope.cos_sin, static_argnums=(1, 2))(*batch.values(), 16, scaling), expected, strict=True
        ):
            np.testing.assert_allclose(ours, whole, atol=1e-4)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_cached_keys_keep_the_phases_they_came_with(name):
    """As in transformers: a step beyond the window turns the new token only, so a cache is not one pass over all."""
    config = _config(name, 16)
    scaling, theirs = rope.from_hf(config), _theirs(config, 16)
    prompt, step = np.arange(ORIGINAL)[None], np.array([[ORIGINAL + 40]])
    for positions in (prompt, step):
        expected = theirs(torch.zeros(1), torch.tensor(positions))[0][..., :8]
        np.testing.assert_allclose(rope.cos_sin(positions, 16, scaling)[0], expected, atol=1e-4)
    at_once = rope.cos_sin(np.concatenate([prompt, step], axis=1), 16, scaling)[0][:, :ORIGINAL]
    assert np.abs(at_once - rope.cos_sin(prompt, 16, scaling)[0]).max() > 0.1


# --- Bad configs, and stacking

_LONG = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, ["factor", "nan"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, ["factor", "'8'"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, ["factor", "True"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "'factor'"]),
        ({"rope_scaling": {"factor": 8.0}}, ["rope_scaling", "rope_type"]),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 8.0}}, ["rope_scaling", "rope_type"]),
        ({"rope_scaling": {"rope_type": "liner", "factor": 8.0}}, ["rope_type", "liner", "linear"]),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 8.0}}, ["rope_type", "['linear']"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, ["original_max_position_embeddings"]),
        ({"rope_parameters": {"rope_type": "longrope", **_LONG, "factor": 0.1}}, ["factor", "0.1"]),
        ({"rope_parameters": {"rope_type": "longrope", **_LONG, "long_factor": 2.0}}, ["long_factor", "2.0"]),
        ({"rope_parameters": {"rope_type": "longrope", **_LONG, "short_factor": ["x"]}}, ["short_factor[0]", "'x'"]),
        (
            {"rope_parameters": _section("llama3", 64) | {"original_max_position_embeddings": "64"}},
            ["original_max_position_embeddings", "'64'"],
        ),
        ({"rope_parameters": _section("llama3", 64) | {"high_freq_factor": None}}, ["high_freq_factor"]),
        ({"rope_parameters": _section("llama3", 64) | {"high_freq_factor": 1}}, ["high_freq_factor", "1.0"]),
        ({"rope_parameters": _section("yarn", 64) | {"truncate": "no"}}, ["truncate", "'no'"]),
        ({"rope_parameters": _section("yarn", 64) | {"beta_fast": 0.5}}, ["beta_fast", "0.5"]),
        ({"rope_parameters": _section("linear", 64) | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_theta": -1}, ["theta", "-1"]),
        ({"rope_theta": 1e4, "rope_parameters": _section("linear", 64) | {"rope_theta": 5e5}}, ["rope_theta"]),
        (
            {"rope_parameters": _section("linear", 64), "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            ["rope_parameters", "rope_scaling"],
        ),
        (
            {"rope_parameters": _section("yarn", 64), "original_max_position_embeddings": 999},
            ["original_max_position_embeddings", "999"],
        ),
    ],
)
def test_bad_configs_name_the_key(config, words):
    with pytest.raises(InputError) as error:
        rope.from_hf(config)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("head_dim", [0, 15])
def test_odd_head_size_is_refused(head_dim):
    with pytest.raises(InputError, match=f"head_dim is {head_dim}"):
        rope.Default().inverse_frequencies(head_dim)


def test_longrope_needs_a_factor_for_each_pair():
    with pytest.raises(InputError, match="short_factor has 8 numbers: head_dim 64 requires 32"):
        rope.from_hf(_config("longrope", 16)).inverse_frequencies(64)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_extension_survives_config_json(kind, tmp_path):
    base = tiny_model_config()
    longer = extend(base, RopeConfig(kind, 4.0))
    assert (longer.max_position_embeddings, longer.original_window)[:2] == (256, 64)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_dict(longer, "float32")))
    assert hf.read_config(str(tmp_path)) == longer
    with pytest.raises(InputError, match=r"already scaled.*rope\.stacking"):
        extend(longer, RopeConfig("linear", 2.0))
    if kind != "ntk":
        assert extend(longer, RopeConfig(kind, 4.0)) == longer
        assert extend(longer, RopeConfig("yarn", 2.0, "replace")) == extend(base, RopeConfig("yarn", 2.0))
    else:  # the theta it had is not in the file
        for stacking in ("refuse", "compose", "replace"):
            with pytest.raises(InputError):
                extend(longer, RopeConfig("ntk", 4.0, stacking))


def test_stacking_multiplies_only_when_asked():
    longer = extend(tiny_model_config(), RopeConfig("linear", 4.0))
    twice = extend(longer, RopeConfig("linear", 2.0, "compose"))
    assert twice == extend(tiny_model_config(), RopeConfig("linear", 8.0))
    with pytest.raises(InputError, match="compose"):
        extend(longer, RopeConfig("yarn", 2.0, "compose"))
    unrecorded = dataclasses.replace(longer, original_max_position_embeddings=None)
    assert extend(unrecorded, RopeConfig("linear", 4.0)) == unrecorded
    with pytest.raises(InputError, match="replace"):
        extend(unrecorded, RopeConfig("linear", 2.0, "replace"))


@pytest.mark.parametrize("window, other", [(256, 64), (64, 256)])
def test_either_window_may_be_the_longer_one(window, other):
    config = {"max_position_embeddings": window, "max_sequence_length": other}
    assert rope.window_from_hf(config, rope.Linear(10000.0, 4.0))[:2] == (256, 64)


def test_yarn_with_its_original_window_only():
    section = _section("yarn", 64, factor=4.0, original=64)
    config = {"rope_parameters": section, "max_position_embeddings": 64}
    assert rope.window_from_hf(config, rope.from_hf(config))[:2] == (256, 64)
