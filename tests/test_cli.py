"""One way in for all commands."""

import pytest

from pi_jax import cli
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


def test_bad_input_is_one_sentence(capsys):
    def command():
        raise InputError("a.txt: there is no such file")

    with pytest.raises(SystemExit) as stop:
        cli.run(command)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a.txt: there is no such file\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
