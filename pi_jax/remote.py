"""Remote storage as TensorStore reaches it, with the environment variables that other clients of the storage read."""

import os
from typing import Any

import tensorstore as ts

from pi_jax.errors import InputError

_SECONDS_TO_ANSWER = 60
"""How long a command waits for storage when it starts."""
_SECONDS_TO_RETURN = 240
"""How long it waits afterwards: less than the least `train.stall_timeout`, so that a run says why it ends."""
_RETRIES = {"max_retries": 10**6, "initial_delay": "1s", "max_delay": "8s"}
"""A request that fails is repeated until whoever waits for it gives up; a server that is back is found in 8 s."""


def kvstore(path: str, name: str = "") -> str | dict[str, Any]:
    """Returns TensorStore's spec of a folder.

    By itself, TensorStore sends `s3://` to Amazon, whatever AWS_ENDPOINT_URL says.

    Args:
      path: local folder or URL; an `s3://` or `gs://` URL is taken literally, without escapes.
      name: subfolder.
    """
    if "://" not in path:
        return {"driver": "file", "path": os.path.join(os.path.abspath(path), name, "")}
    url = f"{path.rstrip('/')}/{name}".rstrip("/") + "/"  # the trailing slash marks a folder
    scheme, _, place = url.partition("://")
    bucket, _, inside = place.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": inside, "gcs_request_retries": _RETRIES}
    if scheme == "s3":
        return {"driver": "s3", "bucket": bucket, "path": inside, "s3_request_retries": _RETRIES, **_s3_options()}
    return url


def answer(path: str, future: ts.Future, running: bool = False) -> Any:
    """Returns the result of an operation, while which TensorStore repeats what fails.

    Args:
      path: what is read, for the message.
      future: the operation.
      running: whether the path has been read before.

    Raises:
      InputError: if there is no result in time.
    """
    seconds = _SECONDS_TO_RETURN if running else _SECONDS_TO_ANSWER
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if running:
            raise InputError(f"{path} has not responded for {seconds} s: run the same command when it does") from None
        raise InputError(f"{path} did not respond within {seconds} s: check the URL and your access") from None


def _s3_options() -> dict[str, Any]:
    options: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint"] = endpoint.rstrip("/")
        options["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # the chain of other sources complains on stderr of each that there is not
        options["aws_credentials"] = {"type": "environment"}
    return options
