"""One way in for all commands."""

import jax
import pytest

import pi_jax
from pi_jax import cli
from pi_jax.convert.open import open_model
from pi_jax.errors import InputError


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


def test_the_version_is_printed(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith(f"pi_jax {pi_jax.__version__}, jax {jax.__version__}")


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
