"""Files of folders that come from elsewhere: where their links may lead, and how large they may be."""

import os
import pathlib
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
    require_regular(path)
    if os.path.isfile(path):
        limits.require(f"{path} has", os.path.getsize(path), limit)


def require_regular(path: Any) -> None:
    """Checks that a local file is not a pipe or a device, of which reading might never end. Folders and URLs pass."""
    if "://" not in str(path) and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path} is not a regular file: it must be one")


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
