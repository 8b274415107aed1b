"""Cluster start-up; the only module that reads cluster variables."""

import os

from pi_jax.errors import InputError

_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "JAX_NUM_PROCESSES")


def require_one_process() -> None:
    """Refuses to be one of several tasks: each would be a whole run of its own, all writing to one folder.

    One process drives all devices of one machine; runs over several machines are not built yet.

    Raises:
      InputError: if a launcher's variable says that it started more than one task.
    """
    for name in _TASKS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise InputError(
                f"{name} is {count}: pi_jax runs as one process that drives all devices of one machine; start one task"
            )
