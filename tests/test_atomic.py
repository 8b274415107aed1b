"""Locks, and files and folders that are written completely or not at all."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from pi_jax import atomic
from pi_jax.errors import InputError


def run_python(code, *words):
    """Starts a Python process that prints a line when it is ready."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert process.stdout.readline() == "ready\n"
    return process


HOLD = """
    import pathlib, sys, time
    from pi_jax import atomic
    with atomic.lock(pathlib.Path(sys.argv[1]), "the run"):
        print("ready", flush=True)
        time.sleep(600)
"""


def refused(file, message):
    with pytest.raises(InputError, match=message), atomic.lock(file, "the run"):
        pass


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    with atomic.lock(tmp_path / ".lock", "runs/x"):
        refused(tmp_path / ".lock", rf"the run is being written by process {os.getpid()} on \S+ since 20")
    with atomic.lock(tmp_path / ".lock", "runs/x"):  # released, and the refused one did not release it
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    process = run_python(HOLD, tmp_path / ".lock")
    refused(tmp_path / ".lock", f"written by process {process.pid} ")
    process.kill()  # not yet waited for, it is a zombie: dead too
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with atomic.lock(tmp_path / ".lock", "the run"):
        pass
    process.wait()
    assert not list(tmp_path.iterdir())


def test_a_process_with_the_number_of_a_dead_holder_is_another_one(tmp_path):
    with atomic.lock(tmp_path / ".lock", "the run"):
        change(tmp_path / ".lock", started="1")
        with atomic.lock(tmp_path / ".lock", "the run"):
            pass


def test_a_holder_on_another_machine_is_dead_if_it_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_SILENCE", 1.0)
    file, ended = tmp_path / ".lock", threading.Event()
    file.write_text(json.dumps({"machine": "other", "host": "node7", "process": 1, "started": "1", "since": "then"}))

    def beat():
        while not ended.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match="process 1 on node7 since then"), atomic.lock(file, "the run"):
        pass
    ended.set()
    thread.join()
    with atomic.lock(file, "the run"):
        assert json.loads(file.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"machine": 3}'])
def test_a_damaged_lock_counts_as_that_of_another_machine(tmp_path, monkeypatch, text):
    monkeypatch.setattr(atomic, "_SILENCE", 0.2)
    (tmp_path / ".lock").write_text(text)
    with atomic.lock(tmp_path / ".lock", "the run"):
        pass


def test_a_holder_that_was_taken_for_dead_ends_itself(tmp_path):
    process = run_python(HOLD.replace("    with", "    atomic._BEAT = 0.2\n    with"), tmp_path / ".lock")
    change(tmp_path / ".lock", id="of another")
    assert process.wait(30) == 1


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    file, dead = tmp_path / ".lock", {"machine": atomic._machine(), "process": 2**22 + 1, "started": "1"}
    barrier, inside, most = threading.Barrier(8), [], []

    def take():
        for _ in range(30):
            if barrier.wait() == 0:
                file.write_text(json.dumps(dead))
            barrier.wait()
            with contextlib.suppress(InputError), atomic.lock(file, "the run"):
                inside.append(1)
                time.sleep(0.01)
                most.append(len(inside))
                inside.pop()
            barrier.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 30 and max(most) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with atomic.new_folder(str(tmp_path / "a" / "new")) as folder:
        (folder / "file").write_text("1")
        assert not (tmp_path / "a" / "new").exists()
    assert (tmp_path / "a" / "new" / "file").read_text() == "1"
    with pytest.raises(ZeroDivisionError), atomic.new_folder(str(tmp_path / "b")) as folder:
        (folder / "file").write_text("1")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(InputError, match="created by another process in the meantime"),
        atomic.new_folder(str(tmp_path / "new")) as folder,
    ):
        (folder / "file").write_text("ours")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("theirs")
    assert (tmp_path / "new" / "file").read_text() == "theirs"


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_an_overwritten_folder_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "old").touch()
    with atomic.new_folder(str(tmp_path / "s"), overwrite=True) as folder:
        (folder / "new").touch()
        assert (tmp_path / "s" / "old").exists()
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = """
        import sys, time
        from pi_jax import atomic
        with atomic.new_folder(sys.argv[1]):
            print("ready", flush=True)
            time.sleep(600)
    """
    process = run_python(code, tmp_path / "new")
    with (
        pytest.raises(InputError, match=f"new is being written by process {process.pid}"),
        atomic.new_folder(str(tmp_path / "new")),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.iterdir())) == 2  # the lock and the temporary folder
    (tmp_path / ".other.12345678.tmp").mkdir()  # of another target
    with atomic.new_folder(str(tmp_path / "new")):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.12345678.tmp", "new"]


def test_a_folder_whose_replacement_was_killed_half_way_comes_back(tmp_path):
    (tmp_path / ".s.12345678.former").mkdir()
    (tmp_path / ".s.12345678.former" / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic.new_folder(str(tmp_path / "s"), overwrite=True):
        raise ZeroDivisionError
    assert (tmp_path / "s" / "old").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("before")
    with (
        pytest.raises(InputError, match="file cannot be written: No space left on device"),
        atomic.new_file(tmp_path / "file") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
