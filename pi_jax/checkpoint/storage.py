"""Layout of checkpoints on disk, and the causes of storage errors."""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import fsspec.config
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.path import step as step_names

from pi_jax import trees
from pi_jax.atomic import is_remote
from pi_jax.errors import InputError
from pi_jax.parallel import ending

# gcsfs would go on listing what it has seen once, whatever other processes have written since.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

STATE = "state"
"""Subfolder of a checkpoint in which Orbax stores the arrays."""
METADATA = "_CHECKPOINT_METADATA"
"""File of a checkpoint in which Orbax stores the metadata."""


def storage_context() -> ocp.Context:
    """Returns the Orbax options of all checkpoints: each layer is a separate chunk, and loading may be partial."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    layers_apart = ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))
    context.array.saving.scoped_storage_options_creator = lambda path, _: (
        layers_apart if ".layers." in f".{trees.path_name(path)}" else None
    )
    return context


class ReadableSteps:
    """Finds the checkpoints in a folder for Orbax, which opens none if the metadata of a single one is damaged.

    Attributes:
      damaged: step of each checkpoint that was left out, and the reason.
    """

    def __init__(self):
        self._all = step_names.standard_name_format()
        self.damaged: dict[int, str] = {}

    def build_name(self, step: int) -> str:
        return self._all.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[step_names.Metadata]:
        for found in self._all.find_all(base_path):
            try:
                _ = found.commit_timestamp  # reads the metadata
            except Exception as error:  # of many types
                self.damaged[found.step] = root_cause(error)
                continue
            yield found

    def find_step(self, base_path: Any, step: int) -> step_names.Metadata:
        return self._all.find_step(base_path, step)


@contextlib.contextmanager
def without_logged_errors() -> Iterator[None]:
    """Keeps Orbax from logging each error, with tracebacks, several times before it raises it."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in pathlib.Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def absolute(folder: str | pathlib.Path) -> epath.Path:
    """Returns the absolute path of a local folder; a URL is returned unchanged.

    Raises:
      InputError: if it is on storage that Orbax does not know: it would write to a local folder named "s3:".
    """
    if "://" in str(folder) and not str(folder).startswith("gs://"):
        raise InputError(f"{folder} cannot hold checkpoints: they are kept in local folders or on gs://")
    return epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))


def is_folder(path: epath.Path) -> bool:
    """Whether there is a folder of checkpoints.

    Raises:
      InputError: if it is a file, or if its storage cannot be reached.
    """
    try:
        if path.is_dir():
            return True
        exists = path.exists()
    except Exception as error:  # of the client of remote storage, or because that is not installed
        if is_remote(path):
            ending.abandon_threads()
        raise InputError(f"{path} cannot be reached: {reason(error)}") from None
    if exists:
        raise InputError(f"{path} is a file: it must be a folder of checkpoints")
    return False


def reason(error: BaseException) -> str:
    """Returns the message of the operating system that caused an error, without the text that libraries add to it."""
    error = _innermost(error)
    found = re.search(r"([^:]+) \[os_error_code=", str(error))
    return found.group(1).strip() if found else root_cause(error)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def root_cause(error: BaseException) -> str:
    """Returns the type and message of the innermost exception."""
    error = _innermost(error)
    return f"{type(error).__name__}: {str(error)[:200]}"


def open_array(folder: epath.Path, step: int, name: str, uncompressed: bool = False) -> ts.TensorStore:
    """Opens a stored array. With `uncompressed`, replaces it by an empty array without compression."""
    base = f"{folder / str(step) / STATE}/"
    kvstore = {"driver": "ocdbt", "base": base if "://" in base else f"file://{base}", "path": f"{name}/"}
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore}
    try:
        array = ts.open(spec, open=True).result()
        if uncompressed:
            metadata = array.spec().to_json()["metadata"]
            for codec in metadata["codecs"]:
                if codec["name"] == "sharding_indexed":
                    inside = codec["configuration"]["codecs"]
                    codec["configuration"]["codecs"] = [c for c in inside if c["name"] != "zstd"]
            array = ts.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
        return array
    except ValueError as error:
        raise InputError(f"{name} cannot be opened ({str(error)[:200]})") from None
