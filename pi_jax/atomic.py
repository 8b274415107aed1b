"""Files and folders that commands write: by one process at a time, and completely or not at all.

A file or folder is written under a temporary name, `.NAME.XXXXXXXX.tmp`, and renamed at the end. While a folder is
written, `.NAME.lock` beside it (in the folder of a training run: `.lock`) says who writes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import pathlib
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from pi_jax import log
from pi_jax.errors import InputError

_BEAT = 10.0
"""Seconds after which the holder of a lock touches its file again."""
_SILENCE = 60.0
"""A holder on another machine that does not touch the file for this many seconds is dead."""


def is_remote(path: Any) -> bool:
    """Whether a path is a URL on remote storage."""
    return "://" in str(path)


def require_writable(path: str) -> None:
    """Checks that a result file can be written, before any work is done; an empty path means no file."""
    target = pathlib.Path(path)
    folder = next(p for p in (target.parent, *target.absolute().parents) if p.exists())
    if path and (target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
        raise InputError(f"{path} cannot be written: it must be a file in a folder that can be written")


@contextlib.contextmanager
def new_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file beside `path` that replaces it if the body succeeds, and is removed otherwise."""
    target = pathlib.Path(path)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes `value` as JSON, atomically; what JSON does not know, as text."""
    with new_file(path) as file:
        file.write_text(json.dumps(value, indent=2, default=str) + "\n")


def require_absent(target: str) -> epath.Path:
    """Returns the path of a folder to create after checking that it does not exist."""
    path = epath.Path(target)
    if path.exists():
        raise InputError(f"{target} already exists: remove it or choose another name")
    return path


@contextlib.contextmanager
def new_folder(target: str, overwrite: bool = False) -> Iterator[epath.Path]:
    """Yields a temporary folder beside `target`. It is renamed to `target` on success and removed on failure.

    What a killed process left of the same target is removed first. On remote storage there is no lock.

    Args:
      target: local folder or URL.
      overwrite: replace a folder that exists. At every moment `target` is either the old folder or the new one, if the
        file system can exchange two names.

    Raises:
      InputError: if `target` exists, another process writes it, or it cannot be written.
    """
    path = epath.Path(target)
    if not overwrite or is_remote(target):
        require_absent(target)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{path.parent} is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise InputError(f"{target} cannot be written: {reason}") from None
    try:
        with contextlib.ExitStack() as stack:
            if not is_remote(target):
                stack.enter_context(lock(pathlib.Path(path.parent, f".{path.name}.lock"), target))
                _remove_leftovers(pathlib.Path(path))
            temporary.mkdir()
            yield temporary
            if overwrite and path.exists():
                _exchange(pathlib.Path(temporary), pathlib.Path(path))
            else:
                temporary.rename(path)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY:
            raise InputError(
                f"{target} was created by another process in the meantime: it was not overwritten"
            ) from None
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            if temporary.exists():
                temporary.rmtree()


def _temporary(path: Any) -> Any:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _siblings(path: pathlib.Path, ending: str) -> Iterator[pathlib.Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.????????.{ending}")


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes what a killed process left of a folder; restores the folder if it was killed while replacing it."""
    for former in _siblings(path, "former"):
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(path)
    for leftover in _siblings(path, "tmp"):
        log.note(f"{leftover} was left by a process that was killed: removed")
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(new: pathlib.Path, old: pathlib.Path) -> None:
    """Exchanges the names of two folders."""
    libc = ctypes.CDLL(None, use_errno=True)
    at, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
    first, second = os.fsencode(new), os.fsencode(old)
    if hasattr(libc, "renameat2") and libc.renameat2(at, first, at, second, swap) == 0:
        return
    if hasattr(libc, "renamex_np") and libc.renamex_np(first, second, swap) == 0:
        return
    former = new.with_suffix(".former")
    old.rename(former)
    new.rename(old)
    former.rename(new)


@contextlib.contextmanager
def lock(file: pathlib.Path, what: str) -> Iterator[None]:
    """Holds a lock file while the body runs, so that one process at a time writes something.

    The file names its holder. On the same machine its process is looked up: what a killed process left is taken over at
    once. The holder on another machine touches the file every 10 seconds, and is dead if it does not for a minute; no
    clocks are compared, so taking over what it left takes this minute. Works on local file systems, NFS, Lustre
    and GPFS.

    Args:
      file: the lock file, in an existing folder.
      what: what it protects, for messages.

    Raises:
      InputError: if another process holds it, or it cannot be created.
    """
    about = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "id": secrets.token_hex(8),
    }
    own = json.dumps(about)
    while not _created(file, own):
        holder = _read(file)
        if holder is not None and not _is_dead(file, holder):
            told = _holder(holder)
            who = f"process {told.get('process', '?')} on {told.get('host', '?')} since {told.get('since', '?')}"
            raise InputError(
                f"{what} is being written by {who} ({file}): wait until it has ended, or choose another folder"
            )
        if holder is not None:
            _take_away(file, holder)
    ended = threading.Event()
    beat = threading.Thread(target=_touch, args=(file, own, what, ended), daemon=True)
    beat.start()
    _held.add((file, own))
    try:
        yield
    finally:
        ended.set()
        beat.join()
        _release(file, own)


_held: set[tuple[pathlib.Path, str]] = set()


def _release(file: pathlib.Path, own: str) -> None:
    _held.discard((file, own))
    if _read(file) == own:
        file.unlink(missing_ok=True)


def release() -> None:
    """Releases all locks of this process, which then must end by `os._exit`."""
    for file, own in list(_held):
        with contextlib.suppress(OSError, InputError):
            _release(file, own)


def _created(file: pathlib.Path, text: str) -> bool:
    """Creates a lock file with its content at once; returns False if there is one."""
    temporary = _temporary(file)
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, file)
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            with file.open("x") as opened:  # a file system without hard links: for a moment the file is empty
                opened.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"{file.parent} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def _read(file: pathlib.Path) -> str | None:
    """Content of a lock file; None if there is none."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def _holder(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_dead(file: pathlib.Path, text: str) -> bool:
    """Whether the holder of a lock has ended. Takes up to a minute if it was on another machine."""
    holder = _holder(text)
    if holder.get("machine") == _machine():
        return _started(holder.get("process")) != holder.get("started")
    before = _touched(file)
    log.note(
        f"{file} was left or is held by a process on {holder.get('host', 'an unknown machine')}: waiting up to "
        f"{_SILENCE:.0f} s for a sign of life"
    )
    until = time.monotonic() + _SILENCE
    while time.monotonic() < until:
        time.sleep(min(1.0, _SILENCE / 10))
        if (now := _read(file)) is None:  # released
            return True
        if now != text or _touched(file) != before:
            return False
    return True


def _touched(file: pathlib.Path) -> float:
    try:
        with file.open() as opened:  # a network file system answers from its cache unless the file is opened
            return os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _take_away(file: pathlib.Path, text: str) -> None:
    """Removes the lock of a dead holder, unless another process has just done so."""
    with contextlib.suppress(FileNotFoundError), file.open() as opened:
        # Whoever waits here sees afterwards that the name has gone or is another file.
        with contextlib.suppress(OSError):  # a file system without flock
            fcntl.flock(opened, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(opened.fileno()), file.stat()) and opened.read() == text:
            file.unlink()


def _touch(file: pathlib.Path, own: str, what: str, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError, InputError):
            if _read(file) == own:
                os.utime(file)
                continue
            if ended.is_set():
                return
            print(
                f"error: another process took over {what} while this one did not run for a while: ended here, so that "
                "only one writes it",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _machine() -> str:
    """Identifies this machine since it was started, and on Linux the process numbers in use here (containers)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(process: Any) -> str | None:
    """When a process of this machine was started, in the system's own units; None if it has ended."""
    if not isinstance(process, int) or process <= 0:
        return None
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
