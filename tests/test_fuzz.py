"""Damaged input: it is read as the reference reader of its format reads it, or refused in one sentence.

Hypothesis makes the inputs: good ones with a few changes, the same in every run.
"""

import copy
import json
import struct
import zipfile

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import transformers
from etils import epath
from hypothesis import strategies as st

from pi_jax import tiny
from pi_jax.convert import model_card, param_mapping
from pi_jax.convert.folders import read_json
from pi_jax.convert.formats import hf, meta, pth
from pi_jax.convert.formats import safetensors as ours
from pi_jax.data.documents import read_documents
from pi_jax.errors import InputError
from pi_jax.parallel import cluster

torch = pytest.importorskip("torch")

many = pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])


def check(examples, strategy, test):
    """Runs `test` on inputs from a strategy."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(test))()


REFUSED = object()


def result(read):
    """What is read, or `REFUSED` if the input is refused in one sentence. Any other exception is a failure."""
    try:
        return read()
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return REFUSED


def reference(read):
    """What another reader reads, or `REFUSED`; it may raise anything."""
    try:
        return read()
    except Exception:
        return REFUSED


VALUES = [
    *(None, True, False, -1, 0, 1, 2, 7, 2.5, 1e300, 10**400, float("nan"), float("inf"), "", "x", "16", "linear"),
    *([], [0], [1, 2], [[]], {}, {"a": 1}, {"rope_type": "linear", "factor": 4.0}, "../x.safetensors"),
]


@st.composite
def changed(draw, value, names=()):
    """A copy of a JSON object in which some values are replaced or scaled, left out, or added under `names`."""

    def drawn():
        return copy.deepcopy(draw(st.sampled_from(VALUES)))  # it can be changed itself

    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = None, None
        node = value
        while isinstance(node, (dict, list)) and node and (parent is None or draw(st.booleans())):
            parent, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        if parent is None:
            return drawn()
        actions = ["replace", "remove", *(["scale"] if type(node) is int else []), *(["add"] if names else [])]
        action = draw(st.sampled_from(actions))
        if action == "replace":
            parent[key] = drawn()
        elif action == "remove":
            del parent[key]
        elif action == "scale":
            parent[key] = node * draw(st.sampled_from([-1, 2, 3])) + draw(st.sampled_from([-1, 0, 4]))
        else:
            value[draw(st.sampled_from(names))] = drawn()
    return value


@st.composite
def spoilt(draw, data, pieces=(b"\0", b"\xff", b"{", b'"')):
    """A copy of some bytes in which a few are replaced, removed or inserted."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["replace", "remove", "insert"]))
        if action == "replace":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif action == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = draw(st.sampled_from(pieces) | st.binary(min_size=1, max_size=4))
    return bytes(data)


class Weights:
    """Reads random weights."""

    def __init__(self, config):
        self.order = param_mapping.tensors(config)
        self.dtypes = {tensor.name: np.dtype("float32") for tensor in self.order}

    def read(self, tensor, index=...):
        seed = self.order.index(tensor)
        return np.random.default_rng(seed).normal(size=tensor.shape).astype(np.float32)[index]


CONFIG = tiny.tiny_model_config()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model in several safetensors files, and in Meta's format."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("parts", "meta"):
        (folder / name).mkdir()
    quiet = {"extras": str(folder), "verify": False, "quiet": True}
    hf.write(Weights(CONFIG), CONFIG, epath.Path(folder / "parts"), 100_000, model_card.Facts(), **quiet)
    meta.write(Weights(CONFIG), CONFIG, epath.Path(folder / "meta"), meta.MetaOptions(files=2), **quiet)
    (folder / "meta" / meta.SIDECAR).unlink()  # which would be believed instead of params.json
    return folder


# config.json

SCALINGS = [
    {"rope_scaling": None},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, "rope_theta": None},
]
OPTIONAL = (
    *("sliding_window", "quantization_config", "partial_rotary_factor", "auto_map", "rope_scaling", "rope_parameters"),
    *("max_sequence_length", "original_max_position_embeddings", "num_local_experts"),
)
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"),
)


HF_CONFIG = hf.config_dict(CONFIG, "float32") | {"transformers_version": "4.57.6"}


@many
def test_config_json(tmp_path, examples):
    strategy = st.sampled_from(SCALINGS).flatmap(lambda scaling: changed(HF_CONFIG | scaling, OPTIONAL))

    def test(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = result(lambda: hf.read_config(str(tmp_path)))
        wanted = reference(lambda: transformers.AutoConfig.from_pretrained(tmp_path))
        if REFUSED not in (found, wanted):
            assert {name: getattr(found, name) for name in SAME} == {name: getattr(wanted, name) for name in SAME}
            scaling = wanted.rope_parameters
            assert (found.rope.kind, found.rope.theta) == (scaling["rope_type"], scaling["rope_theta"])
            assert getattr(found.rope, "factor", None) in (scaling.get("factor"), None)

    check(examples, strategy, test)


@pytest.mark.parametrize("name", [*OPTIONAL, *SAME[5:], "attention_bias", "mlp_bias", "hidden_act"])
def test_null_means_the_default(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in HF_CONFIG.items() if k != name}))
    absent = hf.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | {name: None}))
    assert hf.read_config(str(tmp_path)) == absent


@many
def test_bytes_of_a_json_file(tmp_path, examples):
    file = tmp_path / "config.json"
    pieces = (b"\xef\xbb\xbf", b"9" * 5000, b"[" * 100_000, b"\0", b"\xff", b"NaN", b"null", b'"')

    def test(data):
        file.write_bytes(data)
        wanted = reference(lambda: json.loads(data.decode()))
        assert result(lambda: repr(read_json(file))) == (repr(wanted) if isinstance(wanted, dict) else REFUSED)

    check(examples, spoilt(json.dumps(HF_CONFIG).encode(), pieces), test)


# Weights


def tensors_of(reader):
    """All tensors of a reader, by name, as float32."""
    return {tensor.name: np.asarray(reader.read(tensor), np.float32) for tensor in reader.order}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name])


@many
def test_index_of_safetensors(models, tmp_path, examples):
    folder = models / "parts"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    wanted = tensors_of(Weights(CONFIG))
    for file in folder.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)

    def test(changed):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(changed))
        found = result(lambda: tensors_of(hf.Reader(str(tmp_path), CONFIG)))
        if found is not REFUSED:
            assert_same(found, wanted)

    check(examples, changed(index, ("weight_map", "metadata")), test)


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.zeros((0, 3), np.float32),
}
"""Without NaN, whose bits mean nothing."""


def read_safetensors(path):
    file = ours.File(epath.Path(path))
    return {name: np.asarray(file.read(name), np.float32) for name in file.entries}


def with_header(header):
    text = json.dumps(header).encode()
    data = safetensors.numpy.save(TENSORS)
    return struct.pack("<Q", len(text)) + text + data[8 + int.from_bytes(data[:8], "little") :]


def header_of(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


GOOD = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})
HEADER = header_of(GOOD)


@many
def test_safetensors(tmp_path, examples):
    file = tmp_path / "model.safetensors"
    start = 8 + int.from_bytes(GOOD[:8], "little")
    header = spoilt(GOOD[:start]).map(lambda head: head + GOOD[start:])

    def test(data):
        file.write_bytes(data)
        found = result(lambda: read_safetensors(file))
        if found is not REFUSED:  # we refuse more: a name twice, values that are not finite
            assert_same(found, safetensors.numpy.load_file(file))

    check(examples, changed(HEADER, ("__metadata__", "z")).map(with_header) | header | spoilt(GOOD), test)


@pytest.mark.parametrize(
    "header",
    [
        *(None, 5, "x", True, [], [["a"]]),
        HEADER | {"__metadata__": {"format": 1}},
        HEADER | {"__metadata__": []},
        HEADER | {"a": None},
        HEADER | {"a": HEADER["a"] | {"shape": [True, 6]}},
        HEADER | {"b": HEADER["b"] | {"data_offsets": [0, 8]}},  # within another tensor
        {name: entry for name, entry in HEADER.items() if name != "a"},  # bytes that belong to no tensor
    ],
    ids=str,
)
def test_headers_that_the_safetensors_library_refuses(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_header(header))
    assert reference(lambda: safetensors.numpy.load_file(file)) is REFUSED
    with pytest.raises(InputError, match="model.safetensors is not a complete safetensors file: "):
        read_safetensors(file)


PARAMS = (
    *("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "hidden_dim", "head_dim", "rope_theta"),
    *("use_scaled_rope", "rope_scaling_factor", "max_seq_len", "sliding_window", "moe"),
)


@many
def test_params_json(models, tmp_path, examples):
    folder = models / "meta"
    params = json.loads((folder / "params.json").read_text())
    wanted = tensors_of(Weights(CONFIG))
    for file in folder.glob("*.pth"):
        (tmp_path / file.name).symlink_to(file)

    def read():
        opened = meta.Folder(str(tmp_path))
        return tensors_of(meta.Reader(opened, opened.config()))

    def test(changed):
        (tmp_path / "params.json").write_text(json.dumps(changed))
        found = result(read)
        if found is not REFUSED:
            assert_same(found, wanted)

    check(examples, changed(params, PARAMS), test)


@many
def test_pth(tmp_path, examples):
    file, good = tmp_path / "consolidated.00.pth", tmp_path / "good.pth"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.float16)}, good)

    def read():
        opened = pth.File(file)
        return {name: np.asarray(opened.read(name, slice(None)), np.float32) for name in opened.entries}

    def load():
        state = torch.load(file, weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}

    def test(data):
        file.write_bytes(data)
        found, wanted = result(read), reference(load)
        if REFUSED not in (found, wanted):
            assert_same(found, wanted)

    check(examples, spoilt(good.read_bytes()), test)


def save(tensors, path):
    """Saves tensors with torch; the result is packed again by another program."""
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        records = {record: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, data in records.items():
            archive.writestr(record.filename, data)


PTH = {
    "packed again": (
        save,
        {"a": torch.ones(8), "b": torch.ones(8)},
        "b is not where torch.save puts it: load the file",
    ),
    "sparse": (
        torch.save,
        {"a": torch.eye(3).to_sparse()},
        r"contains more than plain tensors \(torch._utils _rebuild_sparse_tensor\)",
    ),
    "no dict": (torch.save, torch.ones(3), "contains a Tensor: it must contain a dict"),
}


@pytest.mark.parametrize("write, content, message", PTH.values(), ids=PTH)
def test_tensors_of_a_pth_file_that_are_not_where_they_should_be(tmp_path, write, content, message):
    file = tmp_path / "consolidated.00.pth"
    write(content, file)
    with pytest.raises(InputError, match=f"consolidated.00.pth.* {message}"):
        pth.File(file)


def test_an_empty_pickle(tmp_path):
    file = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/version", b"3")
        archive.writestr("a/byteorder", b"little")
    with pytest.raises(InputError, match="consolidated.00.pth is not a complete .pth file: pickle exhausted"):
        pth.File(file)


@pytest.mark.parametrize("open_file", [pth.File, lambda path: ours.File(epath.Path(path))])
def test_weights_that_git_lfs_did_not_download(tmp_path, open_file):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / "weights").write_text(pointer)
    with pytest.raises(InputError, match="weights is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        open_file(tmp_path / "weights")


# Documents

TEXTS = [f"text {i} é\u2028" * (i % 5) for i in range(12)]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS))


def lines_of(data):
    """The texts of JSON lines."""
    lines = [line.decode("utf-8-sig") for line in data.splitlines()]
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    "".join(texts).encode()
    return texts


@many
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path, name, examples):
    file = tmp_path / name
    pieces = (b"\xef\xbb\xbf", b"\r", b"\n", b"\0", b"\\ud800", b"9" * 5000, b"[" * 50_000, b'"text": "x", ', b"\xc3")

    def test(data):
        file.write_bytes(data)
        found, wanted = result(lambda: [d.text for d in read_documents([str(file)])]), reference(lambda: lines_of(data))
        assert found in (wanted, REFUSED) or (name == "a.json" and wanted is REFUSED)  # a single object, in lines

    check(examples, spoilt(LINES.encode(), pieces), test)


@many
@pytest.mark.parametrize("checksums", [False, True])
def test_parquet(tmp_path, checksums, examples):
    file = tmp_path / "a.parquet"
    columns = [pa.array(TEXTS), pa.array(TEXTS).dictionary_encode(), pa.array([text.encode() for text in TEXTS])]
    files = []
    for column, codec in zip(columns, ("none", "zstd", "gzip"), strict=True):
        options = {"compression": codec, "row_group_size": 7, "write_page_checksum": checksums}
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": column}), file, **options)
        files.append(file.read_bytes())

    def read():
        column = pq.read_table(file, columns=["text"], partitioning=None, page_checksum_verification=checksums)["text"]
        return [value.decode() if isinstance(value, bytes) else value for value in column.to_pylist()]

    def test(data):
        file.write_bytes(data)
        found = result(lambda: [d.text for d in read_documents([str(file)])])
        if found is not REFUSED:
            assert found == read()

    check(examples, st.sampled_from(files).flatmap(spoilt), test)


# Launchers

NAMES = (
    *("PI_JAX_COORDINATOR", "PI_JAX_NUM_PROCESSES", "PI_JAX_PROCESS_ID", "PI_JAX_LOCAL_DEVICE_IDS"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("OMPI_MCA_orte_hnp_uri", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
)
LAUNCHERS = [
    {"PI_JAX_COORDINATOR": "host:1234", "PI_JAX_NUM_PROCESSES": "4", "PI_JAX_PROCESS_ID": "3"},
    {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "9",
    },
    {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1,10.0.0.2:5",
    },
    {"SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "node[01-04]"},
]
SETTINGS = (
    "",
    "0",
    "1",
    "4",
    "-1",
    "x",
    "1.5",
    "²",
    "٣",
    "9" * 5000,
    "h:1",
    "h:99999",
    ":",
    "a[",
    "0,1",
    "0,",
    "node[01-04],b",
)


@many
def test_launcher_variables(examples):
    settings = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(SETTINGS) | st.text(max_size=9), max_size=3)

    def test(launcher, settings):
        found = result(lambda: cluster.detect(launcher | settings))
        if found not in (None, REFUSED):
            host, _, port = found.coordinator.rpartition(":")
            assert host and 0 < int(port) < 2**16
            assert 0 <= found.process < found.processes > 1

    check(examples, st.tuples(st.sampled_from(LAUNCHERS), settings), lambda pair: test(*pair))


@pytest.mark.parametrize(
    "launcher, changes, message",
    [
        (0, {"PI_JAX_COORDINATOR": "host:99999"}, "says that process 0 is at 'host:99999': it must be HOST:PORT"),
        (0, {"PI_JAX_NUM_PROCESSES": "9" * 5000}, "PI_JAX_NUM_PROCESSES is '999.*9: it must be a number"),
        (0, {"PI_JAX_PROCESS_ID": "²"}, "PI_JAX_PROCESS_ID is '²': it must be a number"),
        (0, {"PI_JAX_LOCAL_DEVICE_IDS": "9" * 5000}, "PI_JAX_LOCAL_DEVICE_IDS is '999.*9: it must be numbers, such as"),
        (
            1,
            {"MASTER_PORT": "x"},
            "torchrun says that process 0 is at 'h:x': it must be HOST:PORT with a port from 1 to",
        ),
        (
            1,
            {"MASTER_PORT": "0"},
            "torchrun says that process 0 is at 'h:0': it must be HOST:PORT with a port from 1 to",
        ),
        (2, {"MASTER_PORT": "9" * 5000}, "Open MPI says that process 0 is at '10.0.0.1:999"),
    ],
)
def test_launcher_variables_that_are_out_of_range(launcher, changes, message):
    with pytest.raises(InputError, match=message):
        cluster.detect(LAUNCHERS[launcher] | changes)
