"""How the processes of a run end when one of them fails: all, within seconds, with its status and its sentence.

Left to itself, JAX ends the others after a minute without heartbeats, by an abort that does not say why. Here the
process that fails writes to the key-value store that JAX keeps on process 0, and every process looks there each second.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

_FOLDER = "pi_jax/ended/"
"""In the store: the index of each process that ends -> `[status, message]` if it failed, else ""."""
_EVERY = 1.0  # seconds between two looks
_PATIENCE = 5.0  # seconds that the store may take, and that process 0 waits for the others
_REACH = 30.0  # seconds for reaching the others, if the failure comes before they are connected


class NoStore:
    """Stands for the store of a JAX that has none: others are not told."""

    def key_value_set(self, key: str, value: str) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return []


class _Failure(NamedTuple):
    """What another process wrote."""

    process: int
    status: int
    message: str

    def show(self) -> None:
        _say(f"process {self.process}: {self.message}")


class _Run:
    """This process among the others."""

    def __init__(self, store: Any, process: int, processes: int, release: Callable[[], None]):
        self._store, self._process, self._processes, self.release = store, process, processes, release
        self._ending, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures of other processes", daemon=True)
        self._thread.start()

    def fail(self, status: int, message: str, show: Callable[[], None] | None) -> NoReturn:
        """Tells the others and ends. If another failed before, that is the cause, and is shown instead."""
        self._ending.acquire()  # for good: the other thread must not end the process meanwhile
        timer = _exit_after(_PATIENCE, status, show)
        cause = None
        with contextlib.suppress(RuntimeError):
            cause = show and self._failure()
        timer.cancel()
        if cause:
            cause.show()
            self._leave(cause.status)
        if show:
            show()
        self._leave(status, json.dumps([status, message]))

    def _watch(self) -> None:
        while not self._over.wait(_EVERY):
            try:
                cause = self._failure()
            except RuntimeError:  # process 0 has gone, or all have finished
                return
            if cause and self._ending.acquire(blocking=False):
                cause.show()
                self._leave(cause.status)

    def _failure(self) -> _Failure | None:
        """Returns the failure of another process, if there is one."""
        notes = self._store.key_value_dir_get(_FOLDER)
        return next((_Failure(_process(key), *json.loads(note)) for key, note in notes if note), None)

    def _leave(self, status: int, note: str = "") -> NoReturn:
        """Exits; process 0 last, because JAX aborts the others when its store is gone."""
        timer = _exit_after(2 * _PATIENCE, status)
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{_FOLDER}{self._process}", note)
            if self._process == 0:
                self._wait_for_others()
        timer.cancel()
        _exit(status)

    def _wait_for_others(self) -> None:
        others, end = set(range(1, self._processes)), time.monotonic() + _PATIENCE
        while others and time.monotonic() < end:
            time.sleep(0.1)
            others -= {_process(key) for key, _ in self._store.key_value_dir_get(_FOLDER)}
        if others:
            _say(f"processes {sorted(others)} do not answer: they ended or stopped before, see their own output")
        time.sleep(0.5)  # the others have taken note; now they exit

    def finish(self) -> None:
        """Ends the thread, so that Python's exit does not meet it in the middle of a call."""
        self._over.set()
        self._thread.join(_PATIENCE)


_run: _Run | None = None
_abandoned = False


def abandon_threads() -> None:
    """Lets an error end this process at once, because a thread waits for storage that has gone, for many minutes."""
    global _abandoned
    _abandoned = True


def watch(store: Any, process: int, processes: int, release: Callable[[], None]) -> Callable[[], None]:
    """Looks out for failures of other processes from now on, and tells them of exceptions that nothing here catches.

    Args:
      store: has `key_value_set` and `key_value_dir_get`, as JAX's distributed client.
      process: the index of this process.
      processes: how many there are.
      release: releases what this process holds, before it exits without leaving its context managers.

    Returns:
      What stops it.
    """
    global _run
    _run = _Run(store, process, processes, release)
    show = sys.excepthook

    def uncaught(kind, error, trace):
        end(1, f"{kind.__name__}: {error}".partition("\n")[0][:300], lambda: show(kind, error, trace))

    sys.excepthook = uncaught
    return _run.finish


def end(
    status: int, message: str, show: Callable[[], None] | None = None, connect: Callable[[], Any] | None = None
) -> NoReturn:
    """Ends this process with an error, and all others of its run with the same status and sentence.

    Args:
      status: exit status.
      message: one sentence.
      show: shows the error here; by default, prints the sentence.
      connect: connects to the other processes, if there are any. It is called if the error came before that.
    """
    show = show or (lambda: _say(message))
    if _run is None:
        show()
        if connect:
            timer = _exit_after(_REACH, status)
            with contextlib.suppress(Exception):  # their launcher or their own time limit ends them
                connect()
            timer.cancel()
        if _run is None and _abandoned:
            _exit(status)
        if _run is None:
            sys.exit(status)
        show = None
    _run.fail(status, message, show)


def _process(key: str) -> int:
    return int(key.removeprefix(_FOLDER))


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _exit_after(seconds: float, status: int, show: Callable[[], None] | None = None) -> threading.Timer:
    def leave():
        if show:
            show()
        _exit(status)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    return timer


def _exit(status: int) -> NoReturn:
    """Exits at once. Python's own exit would wait for processes that wait for this one."""
    if _run is not None:
        _run.release()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
