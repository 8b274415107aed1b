"""Cluster start-up, preemption and XLA's settings; the only module that reads cluster variables.

`initialize` is called once, before anything else touches a device. It asks, in this order, and the first that answers
wins: our own variables, torchrun-like ones, SLURM, Open MPI, JAX's own detection (TPU pods). Without an answer there is
one process, which drives all devices of its machine.

| variables | |
| --- | --- |
| `PI_JAX_COORDINATOR`, `PI_JAX_NUM_PROCESSES`, `PI_JAX_PROCESS_ID` | HOST:PORT of process 0, how many, which one |
| `PI_JAX_LOCAL_DEVICE_IDS` | "0,1": only these devices of the machine; for every launcher |
| `PI_JAX_TIMEOUT` | seconds to wait for the others at the start (300) |
| `PI_JAX_XLA` | "off": leave XLA's settings alone |
"""

import contextlib
import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from pi_jax.errors import InputError

REQUEUE = 75
"""Exit status of a run that was told to stop and has saved itself (EX_TEMPFAIL): start it again and it goes on."""
_HEARTBEAT = 60  # seconds after which a process that is silent counts as dead, and all end


class Cluster(NamedTuple):
    """What a launcher says of this process."""

    launcher: str
    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None
    """Devices of this machine that are this process's; None: all."""


def detect(env: Mapping[str, str]) -> Cluster | None:
    """What the variables of a launcher say; None: one process, or a TPU pod that JAX asks itself.

    Raises:
      InputError: if a launcher's variables are incomplete or contradict each other.
    """
    for ask in (_explicit, _torchrun, _slurm, _open_mpi):
        if (cluster := ask(env)) is not None:
            if not 0 <= cluster.process < cluster.processes:
                raise InputError(
                    f"{cluster.launcher} says this is process {cluster.process} of {cluster.processes}: processes are "
                    f"numbered 0 to {cluster.processes - 1}"
                )
            if chosen := env.get("PI_JAX_LOCAL_DEVICE_IDS"):
                if not re.fullmatch(r"\d+(,\d+)*", chosen):
                    raise InputError(f"PI_JAX_LOCAL_DEVICE_IDS is {chosen!r}: it must be numbers, such as 0,1")
                ids = tuple(map(int, chosen.split(",")))
                cluster = cluster._replace(local_devices=ids)
            return cluster if cluster.processes > 1 else None
    return None


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    value = env.get(name, default)
    if not value.isdecimal():
        raise InputError(f"{name} is {value!r}: it must be a number" if value else f"{name} is not set: it must be")
    return int(value)


def _explicit(env):
    if not any(f"PI_JAX_{name}" in env for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")):
        return None
    processes = _number(env, "PI_JAX_NUM_PROCESSES")
    coordinator = env.get("PI_JAX_COORDINATOR", "")
    if processes > 1 and not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(
            f"PI_JAX_NUM_PROCESSES is {processes} but PI_JAX_COORDINATOR is {coordinator!r}: it must be HOST:PORT of "
            "process 0, the same for all processes"
        )
    return Cluster("PI_JAX_*", coordinator, processes, _number(env, "PI_JAX_PROCESS_ID"))


def _torchrun(env):
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    processes = _number(env, "WORLD_SIZE")
    if processes > 1 and "MASTER_ADDR" not in env:
        raise InputError(f"WORLD_SIZE is {processes} but MASTER_ADDR is not set: it must be the host of process 0")
    coordinator = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT', '29400')}"
    one_each = _number(env, "LOCAL_WORLD_SIZE", "1") > 1
    return Cluster("torchrun", coordinator, processes, _number(env, "RANK"), _own(env, "LOCAL_RANK", one_each))


def _slurm(env):
    if "SLURM_JOB_ID" not in env:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    processes = _number(env, tasks, "1")
    if processes == 1:  # a shell of salloc or srun --pty
        return Cluster("SLURM", "", 1, 0)
    if "SLURM_STEP_NODELIST" not in env:
        raise InputError(f"{tasks} is {processes}, but this is no step of the job: start pi_jax by `srun`")
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
    port = 61440 + _number(env, "SLURM_JOB_ID") % 4096
    each = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1")))
    own = _own(env, "SLURM_LOCALID", int(each[0]) > 1)
    return Cluster("SLURM", f"{first[1]}{first[2] or ''}:{port}", processes, _number(env, "SLURM_PROCID"), own)


def _open_mpi(env):
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    processes = _number(env, "OMPI_COMM_WORLD_SIZE")
    # Open MPI 4 says where mpirun is; 5 does not.
    uri = re.search(r"tcp://([^,:;]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = env.get("MASTER_ADDR") or (uri[1] if uri else "")
    if processes > 1 and not host:
        raise InputError(
            f"OMPI_COMM_WORLD_SIZE is {processes}, but this Open MPI does not say where process 0 is: pass it on, "
            "mpirun -x MASTER_ADDR=HOST"
        )
    own = _own(env, "OMPI_COMM_WORLD_LOCAL_RANK", _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "1") > 1)
    coordinator = f"{host}:{env.get('MASTER_PORT', '29400')}"
    return Cluster("Open MPI", coordinator, processes, _number(env, "OMPI_COMM_WORLD_RANK"), own)


def _own(env, name: str, several: bool) -> tuple[int, ...] | None:
    """The one GPU of a process that shares its machine with others; None: all that it sees."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    hidden = bool(visible) and "," not in visible  # the launcher shows each process its own GPU alone
    return (_number(env, name),) if several and not hidden else None


def initialize() -> None:
    """Joins the other processes of the cluster, if there are any.

    Raises:
      InputError: if the variables contradict each other, or the coordinator does not answer in time.
    """
    _set_xla(os.environ)
    cluster = detect(os.environ)
    timeout = _number(os.environ, "PI_JAX_TIMEOUT", "300")
    limits = {
        "initialization_timeout": timeout + 60,  # we end before
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": _HEARTBEAT,
    }
    if cluster is None:
        if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
            jax.distributed.initialize(**limits)
            _report("TPU pod", "")
        return
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
    _end_all_on_error()
    _report(cluster.launcher, cluster.coordinator)


def _whom(cluster: Cluster) -> str:
    return f"process {cluster.process} of {cluster.processes} ({cluster.launcher})"


def _require_free(cluster: Cluster) -> None:
    """Process 0 listens there; jaxlib would crash if it cannot."""
    try:
        socket.create_server(("", int(cluster.coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        raise InputError(
            f"{_whom(cluster)} cannot listen at {cluster.coordinator}: {error.strerror}; choose another port"
        ) from None


@contextlib.contextmanager
def _no_longer_than(seconds: int, cluster: Cluster) -> Iterator[None]:
    """Ends the program with a sentence when the others have not come by then; JAX itself would abort with a trace."""

    def give_up():
        print(
            f"error: {_whom(cluster)} found not all others at {cluster.coordinator} within {seconds} s: all must be "
            "started, with the same coordinator, and reach it",
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


def _report(launcher: str, coordinator: str) -> None:
    from pi_jax import log

    where = f", coordinator {coordinator}" if coordinator else ""
    log.info(f"{launcher}: {jax.process_count()} processes{where}, {jax.local_device_count()} devices each")


def _end_all_on_error() -> None:
    """An exception ends this process at once: the way out would wait for processes that wait for this one."""
    show = sys.excepthook

    def end(kind, error, trace):
        show(kind, error, trace)
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = end


def require_same(what: str, text: str) -> None:
    """Checks that all processes have the same text, such as their config.

    Raises:
      InputError: if they do not.
    """
    if jax.process_count() == 1:
        return
    number = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.int32)
    numbers = multihost_utils.process_allgather(number).reshape(-1)
    if len(set(numbers)) > 1:
        others = [int(i) for i in np.flatnonzero(numbers != numbers[0])]
        raise InputError(f"{what} of processes {others} is another than that of process 0: start all of them alike")


def require_shared(folder: pathlib.Path) -> None:
    """Checks that a folder made by process 0 is seen by all.

    Raises:
      InputError: naming the processes that do not see it.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".shared"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("folder made")
    os.listdir(folder.parent)  # a network file system looks again
    seen = multihost_utils.process_allgather(np.array([mark.exists()])).reshape(-1)
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        missing = [int(i) for i in np.flatnonzero(~seen)]
        raise InputError(f"{folder} is not seen by processes {missing}: it must lie on storage that all machines share")


@contextlib.contextmanager
def preemption_requested() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step: has a SIGTERM come? True on all processes at the same step.

    Call it every step on every process. With several processes JAX owns SIGTERM and brings all to one step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    except ValueError:  # not in the main thread: nobody can be told
        yield lambda step: False
        return
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


# What is worth setting, by compute capability; from NVIDIA's JAX-Toolbox, docs/GPU_performance.md. Not measured here.
_SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"  # gathers weights of a layer during the one before
_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"}  # JAX's 75 % would waste 13 GiB of 80
_ORDER = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # kernels start in the order the scheduler chose; harmful on Blackwell
XLA_SETTINGS = {
    8: ((_SCHEDULER,), _MEMORY | _ORDER),
    9: ((_SCHEDULER,), _MEMORY | _ORDER),
    10: ((_SCHEDULER,), _MEMORY),
}
"""GPU generation -> (XLA flags, environment variables)."""


def _set_xla(env) -> None:
    """Sets what `XLA_SETTINGS` has for the GPUs here, but for what the user has set."""
    if env.get("PI_JAX_XLA") == "off" or env.get("JAX_PLATFORMS", "cuda") == "cpu":
        return
    flags, variables = XLA_SETTINGS.get(_gpu_generation(), ((), {}))
    for name, value in variables.items():
        env.setdefault(name, value)
    given = env.get("XLA_FLAGS", "")
    wanted = [flag for flag in flags if flag.split("=")[0] not in given and known(flag)]
    if wanted:
        env["XLA_FLAGS"] = " ".join([given, *wanted]).strip()


def known(flag: str) -> bool:
    """Whether this XLA takes a flag; tried in a process of its own, because one that it does not know aborts."""
    child = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=child, capture_output=True
    ).returncode


def _gpu_generation() -> int:
    """Major compute capability of the first GPU; 0: none."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.match(r"\s*(\d+)\.", found)
    return int(match[1]) if match else 0
