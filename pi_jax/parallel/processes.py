"""Starts up multiple processes and checks that they agree.

Call `initialize` once, before anything touches a device. `pi_jax.parallel.cluster` lists the variables that it reads.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import socket
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from pi_jax import atomic, log
from pi_jax.errors import InputError
from pi_jax.parallel import ending
from pi_jax.parallel.cluster import Cluster, detect, number
from pi_jax.parallel.xla_options import cache_compiled_programs, set_xla_options

_HEARTBEAT = 60  # seconds after which a process that is silent counts as dead, and all end


def initialize() -> None:
    """Connects to the other processes of the cluster, if there are any.

    Raises:
      InputError: if the variables are inconsistent or the port of the coordinator is taken.
    """
    set_xla_options(os.environ)
    cache_compiled_programs()
    if launcher := connect():
        log.info(f"{launcher}: {jax.process_count()} processes, {jax.local_device_count()} devices each")


def connect() -> str:
    """Connects to the other processes without using a device.

    Returns:
      The launcher and the coordinator; empty if this process is alone.

    Raises:
      InputError: if the variables are inconsistent or the port of the coordinator is taken.
    """
    cluster = detect(os.environ)
    timeout = number(os.environ, "PI_JAX_TIMEOUT", "300")
    limits = {
        "initialization_timeout": timeout + 60,  # we end before
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": _HEARTBEAT,
    }
    if cluster is None:
        if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
            jax.distributed.initialize(**limits)
            _watch_others()
            return "TPU pod"
        return ""
    if cluster.process == 0:
        _require_free(cluster)
    with _no_longer_than(timeout, cluster):
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
            **limits,
        )
    _watch_others()
    return f"{cluster.launcher}, coordinator {cluster.coordinator}"


def _watch_others() -> None:
    """Ends this process when another fails, and the others when this one does."""
    try:  # no public API has the store; without it, the others end after the heartbeat
        from jax._src.distributed import global_state

        store, process, processes = global_state.client, global_state.process_id, global_state.num_processes
    except (ImportError, AttributeError):
        store = None
    if not hasattr(store, "key_value_dir_get"):
        store, process, processes = ending.NoStore(), jax.process_index(), jax.process_count()
    finish = ending.watch(store, process, processes, atomic.release)

    @atexit.register
    def leave():
        jax.distributed.shutdown()  # waits for the others, which may fail meanwhile
        finish()


def _whom(cluster: Cluster) -> str:
    return f"process {cluster.process} of {cluster.processes} ({cluster.launcher})"


def _require_free(cluster: Cluster) -> None:
    """Checks that process 0 can listen on the port of the coordinator; otherwise jaxlib would crash."""
    try:
        socket.create_server(("", int(cluster.coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        raise InputError(
            f"{_whom(cluster)} cannot listen at {cluster.coordinator}: {error.strerror}; choose another port"
        ) from None


@contextlib.contextmanager
def _no_longer_than(seconds: int, cluster: Cluster) -> Iterator[None]:
    """Exits with a message if the processes have not connected in time; JAX itself would abort with a stack trace."""

    def give_up():
        print(
            f"error: {_whom(cluster)} did not find all other processes at {cluster.coordinator} within {seconds} s: "
            "start all of them with the same coordinator, which each must be able to reach",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def require_same(what: str, text: str) -> None:
    """Checks that all processes have the same text, for example their config.

    Raises:
      InputError: if they do not.
    """
    if jax.process_count() == 1:
        return
    number = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.int32)
    numbers = multihost_utils.process_allgather(number).reshape(-1)
    if len(set(numbers)) > 1:
        others = [int(i) for i in np.flatnonzero(numbers != numbers[0])]
        raise InputError(
            f"{what} of processes {others} differs from that of process 0: start all processes with the same command"
        )


def require_shared(folder: pathlib.Path) -> None:
    """Checks that all processes see a folder that process 0 created.

    Raises:
      InputError: naming the processes that do not see it.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".shared"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("folder made")
    os.listdir(folder.parent)  # makes a network file system refresh
    seen = multihost_utils.process_allgather(np.array([mark.exists()])).reshape(-1)
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        missing = [int(i) for i in np.flatnonzero(~seen)]
        raise InputError(f"{folder} is not seen by processes {missing}: it must be on storage that all machines share")


def decided_by_first(value: bool) -> bool:
    """Returns the value that process 0 passes, on all processes."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value
