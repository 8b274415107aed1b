"""One way in for all commands."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest

import pi_jax
from pi_jax import cli, dependencies
from pi_jax.convert.open import open_model
from pi_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = str(pathlib.Path(sys.executable).with_name("pi-jax"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    arguments = {"train": ["--config", "configs/tiny.py"]}.get(command, [])
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *arguments, "--help"])
        raise SystemExit(0)
    assert stop.value.code in (0, None) and "usage" in capsys.readouterr().out


def test_an_unknown_command_names_those_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2 and "train" in capsys.readouterr().err


@pytest.mark.parametrize("command", [(sys.executable, "-m", "pi_jax"), (SCRIPT,)], ids=["module", "script"])
def test_the_version_is_printed(command):
    done = subprocess.run([*command, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"pi_jax {pi_jax.__version__}, jax {jax.__version__}\n"


@pytest.mark.parametrize("module", ["pi_jax", "pi_jax.train", "pi_jax.evaluate", "pi_jax.prepare"])
def test_outside_the_environment_a_command_is_one_sentence(module):
    """-S leaves out site-packages."""
    command = [sys.executable, "-S", "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    wanted = f"error: pi_jax's dependency jax is not installed in {sys.executable}: activate the environment"
    assert done.stderr.startswith(wanted) and done.stderr.count("\n") == 1


def test_any_missing_dependency_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "grain" else found(name))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == 2 and "dependency grain is not installed" in capsys.readouterr().err


def test_every_dependency_is_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    assert [name.removesuffix("-checkpoint") for name in names] == list(dependencies.MODULES)


def test_a_name_on_the_hub_gets_its_download_command():
    with pytest.raises(InputError, match="hf download meta-llama/Llama-2-7b-hf --local-dir models/Llama-2-7b-hf"):
        open_model("meta-llama/Llama-2-7b-hf")
    with pytest.raises(InputError, match="there is no such folder$"):
        open_model("tests/no-such-model")


def test_bad_input_is_one_sentence(capsys):
    def command():
        raise InputError("a.txt: there is no such file")

    with pytest.raises(SystemExit) as stop:
        cli.run(command)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a.txt: there is no such file\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
