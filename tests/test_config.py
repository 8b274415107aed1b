"""Configs: every file loads, overrides reach their field, and what is wrong is said."""

import dataclasses
import pathlib

import pytest

from pi_jax import config as configs
from pi_jax.config import BUILTIN, ModelConfig, RopeConfig, extend, smoke
from pi_jax.errors import InputError
from pi_jax.rope import Default, Linear
from pi_jax.tiny import tiny_model_config

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
TINY = str(next(f for f in FILES if f.name == "tiny.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_config_loads_and_shrinks(file):
    config = configs.load_config(str(file))
    small = smoke(config)
    assert small.rope == config.rope and small.data.packing == config.data.packing
    assert small.data.sources == (BUILTIN,)
    if config.train.init_from:
        assert small.train.init_from == BUILTIN and small.model is None
    else:
        assert small.model.num_parameters() < 10**6
    assert small.data.window == 64 * config.rope.factor
    assert file.name in (pathlib.Path(file).read_text())  # the docstring says how to run it


def test_overrides_reach_their_fields_and_are_reported():
    config, base = configs.parse(
        ["--config", TINY, "--optimizer.learning-rate", "1e-5", "--data.sources", "a@2", "b", "--data.segment-masking"]
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.data.sources == ("a@2", "b") and config.data.segment_masking
    text = configs.describe(config, base)
    changed = text.split("Config:")[0]
    assert "optimizer.learning_rate = 1e-05  (was 0.003)" in changed and "train.steps" not in changed
    assert f"train.steps = {base.train.steps}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer.learning-rat", "1"], ["learning-rat", "learning-rate"]),  # with a hint
        (["--train.steps", "many"], ["train.steps", "many"]),
        (["--train.steps", "0"], ["train.steps", "0"]),
        (["--rope.factor", "0.5"], ["factor", "0.5"]),
        (["--rope.factor", "nan"], ["factor", "nan"]),
        (["--rope.kind", "liner"], ["rope.kind", "liner", "linear"]),
        (["--compute.dtype", "float8"], ["dtype", "float8", "bfloat16"]),
        (["--mesh.data", "-1"], ["mesh", "-1"]),
        (["--optimizer.b2", "2"], ["b2", "2"]),
        (["--model.num-key-value-heads", "3"], ["num_key_value_heads", "3"]),
    ],
)
def test_a_bad_override_exits_with_2_and_names_the_field(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        configs.parse(["--config", TINY, *arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.py", None, "there is no such file"),
        ("config.yaml", "a: 1", "a Python file"),
        ("a.py", "x = 1", "get_config"),
        ("b.py", "def get_config(): return 3", "returned int"),
        ("c.py", "import nothing_like_it", "nothing_like_it"),
        (
            "e.py",
            "from pi_jax.config import *\ndef get_config(): return TrainConfig(steps=2.5)",
            "train.steps is 2.5.*int",
        ),
        (
            "f.py",
            "from pi_jax.config import *\ndef get_config(): return DataConfig(sources='x')",
            "data.sources is 'x'",
        ),
        ("d.py", "from pi_jax.config import *\ndef get_config(): return TrainConfig(steps=-1)", "train.steps is -1"),
    ],
)
def test_a_bad_config_file_is_one_sentence(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        configs.load_config(str(path))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_extension_scales_rope_and_window_once():
    base = tiny_model_config()
    longer = extend(base, RopeConfig("linear", 4.0))
    assert longer.rope == Linear(10000.0, 4.0)
    assert (longer.max_position_embeddings, longer.original_window) == (256, 64)
    assert extend(base, RopeConfig()) == base
    assert extend(longer, RopeConfig("linear", 4.0)) == longer
    with pytest.raises(InputError, match="already"):
        extend(longer, RopeConfig("linear", 2.0))


def test_parameter_count_is_that_of_llama_7b():
    llama = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 2048)
    assert llama.num_parameters() == 6_738_415_616
    tied = dataclasses.replace(llama, tie_word_embeddings=True)
    assert llama.num_parameters() - tied.num_parameters() == 32000 * 4096


def test_configs_are_values():
    assert tiny_model_config() == tiny_model_config(rope=Default())
    assert hash(tiny_model_config()) == hash(tiny_model_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_model_config().hidden_size = 3
