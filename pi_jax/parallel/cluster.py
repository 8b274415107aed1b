"""Finds out from a launcher's environment variables which process this is; the only module that reads them.

`detect` looks, in this order, for our own variables, torchrun's, Open MPI's and SLURM's. The first launcher found wins:
`mpirun` inside `sbatch` sets both Open MPI's and SLURM's, and only Open MPI's describe its processes. An empty variable
counts as unset. TPU pods are left to JAX's own detection. Without a launcher, one process drives all local devices.

| variables | |
| --- | --- |
| `PI_JAX_COORDINATOR`, `PI_JAX_NUM_PROCESSES`, `PI_JAX_PROCESS_ID` | HOST:PORT of process 0, how many, which one |
| `PI_JAX_LOCAL_DEVICE_IDS` | "0,1": only these devices of the machine; for every launcher |
| `PI_JAX_TIMEOUT` | seconds to wait for the others at the start (300) |
| `PI_JAX_XLA` | "off": leave XLA's settings alone |
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from pi_jax.errors import InputError

_NUMBER = r"[0-9]{1,18}"


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
    env = {name: value for name, value in env.items() if value}
    for ask in (_explicit, _torchrun, _open_mpi, _slurm):
        if (cluster := ask(env)) is not None:
            if not 0 <= cluster.process < cluster.processes:
                raise InputError(
                    f"{cluster.launcher} says this is process {cluster.process} of {cluster.processes}: processes are "
                    f"numbered 0 to {cluster.processes - 1}"
                )
            host, _, port = cluster.coordinator.rpartition(":")
            if cluster.processes > 1 and not (host and re.fullmatch(_NUMBER, port) and 0 < int(port) < 2**16):
                raise InputError(
                    f"{cluster.launcher} says that process 0 is at {cluster.coordinator!r:.80}: it must be HOST:PORT "
                    "with a port from 1 to 65535"
                )
            if chosen := env.get("PI_JAX_LOCAL_DEVICE_IDS"):
                if not re.fullmatch(rf"{_NUMBER}(,{_NUMBER})*", chosen):
                    raise InputError(f"PI_JAX_LOCAL_DEVICE_IDS is {chosen!r:.80}: it must be numbers, such as 0,1")
                ids = tuple(map(int, chosen.split(",")))
                cluster = cluster._replace(local_devices=ids)
            return cluster if cluster.processes > 1 else None
    return None


def number(env: Mapping[str, str], name: str, default: str = "") -> int:
    value = env.get(name, default)
    if not re.fullmatch(_NUMBER, value):
        raise InputError(f"{name} is {value!r:.80}: it must be a number" if value else f"{name} is not set: it must be")
    return int(value)


def _explicit(env):
    if not any(f"PI_JAX_{name}" in env for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")):
        return None
    processes = number(env, "PI_JAX_NUM_PROCESSES")
    coordinator = env.get("PI_JAX_COORDINATOR", "")
    if processes > 1 and not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(
            f"PI_JAX_NUM_PROCESSES is {processes} but PI_JAX_COORDINATOR is {coordinator!r}: it must be HOST:PORT of "
            "process 0, the same for all processes"
        )
    return Cluster("PI_JAX_*", coordinator, processes, number(env, "PI_JAX_PROCESS_ID"))


def _torchrun(env):
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    processes = number(env, "WORLD_SIZE")
    if processes > 1 and "MASTER_ADDR" not in env:
        raise InputError(f"WORLD_SIZE is {processes} but MASTER_ADDR is not set: it must be the host of process 0")
    coordinator = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT', '29400')}"
    one_each = number(env, "LOCAL_WORLD_SIZE", "1") > 1
    return Cluster("torchrun", coordinator, processes, number(env, "RANK"), _own(env, "LOCAL_RANK", one_each))


def _slurm(env):
    if "SLURM_JOB_ID" not in env:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    processes = number(env, tasks, "1")
    if processes == 1:  # a shell of salloc or srun --pty
        return Cluster("SLURM", "", 1, 0)
    if "SLURM_STEP_NODELIST" not in env:
        raise InputError(f"{tasks} is {processes}, but this is no step of the job: start pi_jax by `srun`")
    host = _first_host(env["SLURM_STEP_NODELIST"])
    port = 61440 + number(env, "SLURM_JOB_ID") % 4096
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in env else "SLURM_TASKS_PER_NODE"
    per_node = re.match(_NUMBER, env.get(name, "1"))
    if not per_node:
        raise InputError(f"{name} is {env[name]!r}: it must begin with a number, such as 2(x3)")
    own = _own(env, "SLURM_LOCALID", int(per_node[0]) > 1)
    return Cluster("SLURM", f"{host}:{port}", processes, number(env, "SLURM_PROCID"), own)


def _first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `rack[0-1]node[01-04]-ib,login` begins with `rack0node01-ib`.

    Raises:
      InputError: if the list does not begin with the name of a host.
    """
    bracket = r"\[(\d+)[\d,-]*\]"
    first = re.match(rf"(?:[\w.-]|{bracket})+(?=,|$)", nodes)
    if not first or nodes.startswith("["):
        raise InputError(f"SLURM_STEP_NODELIST is {nodes!r}: it must be a list of hosts, such as node[01-04]")
    return re.sub(bracket, r"\1", first[0])


def _open_mpi(env):
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    processes = number(env, "OMPI_COMM_WORLD_SIZE")
    # Open MPI 4 says where mpirun is; 5 does not.
    uri = re.search(r"tcp://([^,:;]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = env.get("MASTER_ADDR") or (uri[1] if uri else "")
    if processes > 1 and not host:
        raise InputError(
            f"OMPI_COMM_WORLD_SIZE is {processes}, but this Open MPI does not say where process 0 is: pass it on, "
            "mpirun -x MASTER_ADDR=HOST"
        )
    own = _own(env, "OMPI_COMM_WORLD_LOCAL_RANK", number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "1") > 1)
    coordinator = f"{host}:{env.get('MASTER_PORT', '29400')}"
    return Cluster("Open MPI", coordinator, processes, number(env, "OMPI_COMM_WORLD_RANK"), own)


def _own(env, name: str, several: bool) -> tuple[int, ...] | None:
    """The one GPU of a process that shares its machine with others; None: all that it sees."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    hidden = bool(visible) and "," not in visible  # the launcher shows each process its own GPU alone
    return (number(env, name),) if several and not hidden else None
