"""Files of folders that come from elsewhere: where their links may lead, and how large they may be."""

import os
import pathlib
import stat
from typing import Any

from etils import epath

from pi_jax import limits
from pi_jax.errors import InputError


def require_own(path: Any, limit: int) -> None:
    """Checks a file of a folder before it is read or copied; weights need no check, because they are proved otherwise.

    A link that leads out of the folder would let a downloaded folder take any file of this machine along into what is
    made from it. The links in the cache of the Hugging Face Hub stay within one model and are allowed. A file that does
    not exist passes.

    Args:
      path: local file or URL.
      limit: bound on its size, see `pi_jax.limits`.

    Raises:
      InputError: if the file is a link that is broken or leads out of the folder, is larger than the bound, or is
        something else than a file, such as a pipe.
    """
    if "://" in str(path):
        if epath.Path(path).is_file():
            limits.require(f"{path} has", epath.Path(path).stat().length, limit)
        return
    if os.path.islink(path):
        _check_link(pathlib.Path(path))
    if not os.path.exists(path) or os.path.isdir(path):
        return
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a regular file: it must be one")
    limits.require(f"{path} has", found.st_size, limit)


def _check_link(path: pathlib.Path) -> None:
    there = os.readlink(path)
    if not path.exists():
        raise InputError(f"{path} is a link to {there}, which does not exist: restore it or remove the link")
    if not pathlib.Path(os.path.realpath(path)).is_relative_to(_home(path.parent)):
        raise InputError(
            f"{path} is a link to {there}, out of its folder: only weights may be such links; copy the file into the "
            "folder if it belongs to the model"
        )


def _home(folder: pathlib.Path) -> pathlib.Path:
    """Where links of a folder may lead: inside it, or inside its model in the cache of the Hugging Face Hub."""
    folder = pathlib.Path(os.path.realpath(folder))
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return parent.parent.parent
    return folder
