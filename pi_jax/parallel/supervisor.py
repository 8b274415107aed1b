"""Stops a run when it is asked to, and ends it when it is stuck.

SIGTERM and Ctrl-C ask a run to stop. It does so at its next call of `tick`, which every step, every batch of an
evaluation and every tensor of an export makes. While a run starts there is nothing to save, so it ends at once, even
inside the compiler. A second Ctrl-C ends it at once at any time.

A run that makes no progress for too long is stuck, for example in a collective whose other side is gone: no exception
can reach it there. A thread then prints the stacks of all threads and ends the process. The processes of a cluster wait
for each other, so each of them ends this way.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from pi_jax import atomic
from pi_jax.parallel import ending

REQUEUE = 75
"""Exit status of a run that was stopped by a signal and saved (EX_TEMPFAIL): the same command resumes it."""
STALLED = 70
"""Exit status of a run that made no progress (EX_SOFTWARE): the same command resumes it from its last checkpoint."""

_SHORTEST, _STEPS = 300.0, 20
"""Automatic limit of a step: 20 times the longest step so far, but at least 300 seconds."""
_PAUSE = 5.0
"""The watching thread runs every second. If it did not for so long, the whole process was suspended."""


class Stop(BaseException):
    """Raised by `tick` in a run that was asked to stop. No `except Exception` catches it."""


def tick() -> None:
    """Reports progress. Outside a supervised run it does nothing.

    All processes of a cluster must call it at the same places, except inside `Supervisor.alone`.

    Raises:
      Stop: if the run was asked to stop; once, on all processes at the same call.
    """
    if _current is not None:
        _current.tick()


_current: "Supervisor | None" = None


class Supervisor:
    """Supervises one run; use `supervise`."""

    def __init__(self, stall_timeout: float, startup_timeout: float):
        self._stall, self._startup = stall_timeout, startup_timeout
        self._doing, self._limit, self._starting = "start-up", startup_timeout, True
        self._beat, self._longest = time.monotonic(), 0.0
        self._cluster, self._alone, self._count = jax.process_count() > 1, False, 0
        self._asked = self._stopped = False
        self._interrupts = 0
        self._ended = threading.Event()

    def tick(self) -> None:
        """See the function `tick`."""
        self._beat = time.monotonic()
        if self._stopped or (self._alone and self._cluster):
            return
        self._count += 1
        self._stopped = multihost_utils.reached_preemption_sync_point(self._count) if self._cluster else self._asked
        if self._stopped:
            raise Stop

    def step(self, step: int) -> None:
        """Reports a step that the device has finished, which ends the start-up; otherwise the same as `tick`."""
        if not self._starting:
            self._longest = max(self._longest, time.monotonic() - self._beat)
        self._starting, self._doing = False, f"step {step + 1}"
        automatic = max(_SHORTEST, _STEPS * self._longest) if self._longest else self._startup
        self._limit = self._stall or automatic
        self.tick()

    @contextlib.contextmanager
    def phase(self, what: str, alone: bool = False) -> Iterator[None]:
        """Gives the time of a start-up to each tick of something other than a step, such as an evaluation or a save.

        Args:
          what: what is done, for the message.
          alone: whether only this process does it, so that `tick` does not agree with the others on a stop.
        """
        before = self._doing, self._limit, self._alone
        self._doing, self._limit, self._alone = what, self._startup, alone
        self._beat = time.monotonic()
        try:
            yield
        finally:
            self._doing, self._limit, self._alone = before
            self._beat = time.monotonic()

    def watch(self, signals: int) -> None:
        """Reads the signals that arrive at a pipe and watches the progress, until `end`."""
        last = time.monotonic()
        while not self._ended.is_set():
            if select.select([signals], [], [], 1.0)[0]:
                for number in os.read(signals, 64):
                    self._signalled(number)
            now = time.monotonic()
            if now - last > _PAUSE:
                self._beat += now - last
            last = now
            if now - self._beat > self._limit and not self._ended.is_set():
                self._stalled(now - self._beat)

    def end(self) -> None:
        """Ends `watch`."""
        self._ended.set()

    def ask(self, number: int, _frame: object) -> None:
        """Handles SIGTERM and SIGINT."""
        if number == signal.SIGINT and self._cluster:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it, and tells the other processes
        self._asked = True

    def _signalled(self, number: int) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM) or self._ended.is_set():
            return
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _end(f"{name} again: ended at once; the last checkpoint stays", 130)
        if self._starting and not self._cluster:
            _end(f"{name} before the first step: ended, there was nothing to save", REQUEUE)
        again = "; again: end at once without saving" if number == signal.SIGINT else ""
        print(f"{name}: saving after {self._doing}{again}", file=sys.stderr, flush=True)

    def _stalled(self, seconds: float) -> None:
        print(f"Stacks of all threads of process {jax.process_index()}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        message = (
            f"no progress for {seconds:.0f} s in {self._doing}: ended; the same command resumes from the last "
            "checkpoint (limits: train.stall_timeout, train.startup_timeout)"
        )
        if self._cluster:
            ending.end(STALLED, message)
        _end(f"error: {message}", STALLED)


def _end(message: str, status: int) -> None:
    """Ends the process at once, whatever its threads wait for."""
    print(message, file=sys.stderr, flush=True)
    atomic.release()
    os._exit(status)


@contextlib.contextmanager
def supervise(stall_timeout: float = 0.0, startup_timeout: float = 3600.0) -> Iterator[Supervisor]:
    """Supervises the body; see the module docstring. Signals are handled only in the main thread.

    Args:
      stall_timeout: longest time of a step in seconds; 0: 20 times the longest step so far, at least 300.
      startup_timeout: longest time in seconds until the first step is finished, and of what is not a step.
    """
    global _current
    supervisor, before = Supervisor(stall_timeout, startup_timeout), _current
    read, write = os.pipe()
    os.set_blocking(write, False)
    watch = threading.Thread(target=supervisor.watch, args=(read,), daemon=True)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        stack.callback(watch.join)
        stack.callback(os.write, write, b"\0")
        watch.start()
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
            # With several processes SIGTERM is JAX's: a handler of ours would keep the notice from the others.
            for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, supervisor.ask))
        _current = supervisor
        try:
            yield supervisor
        finally:
            _current = before
            supervisor.end()
