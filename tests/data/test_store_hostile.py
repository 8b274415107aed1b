"""A token store whose files contradict each other is named as damaged: which field or document, and what it must be."""

import json
import shutil

import numpy as np
import pytest
import tensorstore as ts

from pi_jax import limits
from pi_jax.config import DataConfig
from pi_jax.data.pipeline import open_pipeline
from pi_jax.data.store import TokenStore, TokenStoreWriter
from pi_jax.data.tokenizer import TokenizerInfo
from pi_jax.errors import InputError

LENGTHS = (40, 60, 50)
VOCABULARY = 300
INFO = {"name": "Toy", "vocab_size": VOCABULARY, "vocab_hash": "0" * 64}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    facts = {"bos": [], "eos": [2]}
    (folder / "tokenizer").mkdir()
    with TokenStoreWriter(
        str(folder / "store"), tokenizer=TokenizerInfo(**INFO), tokenizer_dir=str(folder / "tokenizer"), facts=facts
    ) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add(np.arange(length) + 50 * number, prompt=10 * number)
    return folder / "store"


@pytest.fixture
def store(good, tmp_path):
    shutil.copytree(good, tmp_path / "store")
    return tmp_path / "store"


def edit(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def rewrite(store, name, index, value):
    """Changes a value of an array, with its checksums, and the sizes in the manifest."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store / name}/"}}
    array = ts.open(spec, open=True, write=True).result()
    array[index].write(value).result()
    files = {f.relative_to(store).as_posix(): f.stat().st_size for f in store.rglob("*") if f.is_file()}
    edit(store / "manifest.json", files={name: size for name, size in files.items() if name != "manifest.json"})


def refused(store):
    with pytest.raises(InputError) as caught:
        TokenStore.open(str(store))
    message = str(caught.value)
    assert message.startswith(f"{store} is ") and "\n" not in message
    return message


WRONG = ("x", "5", None, -1, [1], 1.5, True, {"a": "b"}, 10**30, ...)
FIELDS = {
    **dict.fromkeys(("documents", "tokens", "tokenizer", "sha256", "files"), ()),
    **dict.fromkeys(("bos", "eos"), ([1], ...)),
    "largest_token": (...,),  # missing in a store of an older version
    "length_histogram": ({"a": "b"},),
}
"""Field -> which of these values it may have."""


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_manifest_that_cannot_be_right(good, store, field):
    for value in WRONG:
        shutil.copy(good / "manifest.json", store)
        edit(store / "manifest.json", **{field: value})
        if value in FIELDS[field]:
            TokenStore.open(str(store))
        else:
            found = "missing" if value is ... else repr(value)
            assert f"is damaged: {field} in its manifest.json is {found}, but must be " in refused(store)


@pytest.mark.parametrize("name", ["vocab_size", "vocab_hash", "name"])
def test_a_field_of_the_tokenizer_that_cannot_be_right(store, name):
    for value in (None, [], -1, 2**31 + 1) if name == "vocab_size" else (None, [], 5):
        edit(store / "manifest.json", tokenizer=INFO | {name: value})
        assert f"is damaged: tokenizer.{name} in its manifest.json is {value!r}, but must be " in refused(store)
    edit(store / "manifest.json", tokenizer={k: v for k, v in INFO.items() if k != name})
    assert "but must be an object with name, vocab_size and vocab_hash" in refused(store)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "tokenizer/../../secret"])
def test_a_file_out_of_the_store(store, name):
    edit(store / "manifest.json", files={name: 0})
    assert "files in its manifest.json is" in refused(store)


@pytest.mark.parametrize(
    "content", [b"[1]", b"\xff{}", b"[" * 200_000, b'{"format": ' + b"9" * 5000 + b"}", b"{}", b""]
)
def test_a_manifest_that_is_none(store, content):
    (store / "manifest.json").write_bytes(content)
    assert "is not a token store: pi_jax.prepare did not write its manifest.json" in refused(store)


@pytest.mark.parametrize("version", ["1", None, True, 1.0, [1], 2])
def test_a_format_that_is_not_ours(store, version):
    edit(store / "manifest.json", format=version)
    assert f"is a token store of format {version!r}, but" in refused(store)


OFFSETS = {
    "does not start at 0": ((0, 5), "its first document starts at token 5, but must start at 0"),
    "falls": ((1, 120), "document 1 goes from token 120 to 100, but must have tokens"),
    "negative": ((1, -5), "document 0 goes from token 0 to -5, but must have tokens"),
    "empty document": ((2, 40), "document 1 goes from token 40 to 40, but must have tokens"),
    "too far": ((3, 10**9), "its last document ends at token 1000000000, but must end at 150"),
    "not far enough": ((3, 140), "its last document ends at token 140, but must end at 150"),
}


@pytest.mark.parametrize("case", OFFSETS.values(), ids=OFFSETS)
def test_boundaries_of_documents(store, case):
    (index, value), message = case
    rewrite(store, "offsets", index, value)
    assert f"is damaged: {message}" in refused(store)


@pytest.mark.parametrize("length", [-1, 60, 10**9])
def test_prompts(store, length):
    rewrite(store, "prompts", 1, length)
    assert f"document 1 has {length} prompt tokens, but must have fewer than its tokens, 60" in refused(store)


SHAPES = {
    "number of documents": (lambda s: edit(s / "manifest.json", documents=4), "offsets is int64[4], but must be"),
    "number of tokens": (lambda s: edit(s / "manifest.json", tokens=151), "tokens is uint16[150], but must be "),
    "terabytes": (lambda s: edit(s / "offsets/zarr.json", shape=[10**13]), "but must be int64[4], by its manifest"),
    "tokens out of nothing": (lambda s: edit(s / "tokens/zarr.json", shape=[10**13]), "tokens is uint16[1000000"),
    "dtype": (lambda s: edit(s / "offsets/zarr.json", data_type="float64"), "offsets is float64[4], but must be int64"),
    "dtype of tokens": (lambda s: edit(s / "tokens/zarr.json", data_type="int64"), "tokens is int64[150]"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_arrays_that_the_manifest_does_not_state(store, case):
    damage, message = case
    damage(store)
    assert message in refused(store)


def test_a_chunk_is_not_decompressed_whatever_its_size(store):
    zarr = json.loads((store / "tokens/zarr.json").read_text())
    zarr["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]
    zarr["codecs"][0]["configuration"]["chunk_shape"] = [2**40]
    (store / "tokens/zarr.json").write_text(json.dumps(zarr))
    edit(store / "manifest.json", files={})
    with pytest.raises(InputError, match=r"a chunk of tokens has 1,099,511,627,776 values.*PI_JAX_LIMITS=65536"):
        TokenStore.open(str(store))


def test_a_token_above_the_largest_is_named_when_it_is_read(store):
    rewrite(store, "tokens", 47, 60000)
    opened = TokenStore.open(str(store))
    np.testing.assert_array_equal(opened.read(0, 40), np.arange(40))
    with pytest.raises(InputError) as caught:
        opened.read(30, 60)
    assert str(caught.value) == (
        f"{store} is damaged: token 7 of document 1 is 60000, but the largest token must be 149, by its manifest.json; "
        "copy or prepare it again"
    )


def test_a_manifest_that_lies_about_its_tokens(store):
    edit(store / "manifest.json", largest_token=5)
    pipeline = open_pipeline(DataConfig(sources=(str(store),), window=16, batch_size=4))
    with pytest.raises(
        InputError, match=r"store is damaged: token \d+ of document \d is \d+, but the largest token must"
    ):
        pipeline.batch(0)
    edit(store / "manifest.json", largest_token=VOCABULARY)
    assert f"largest_token in its manifest.json is {VOCABULARY}, but must be below the vocab_size" in refused(store)


def test_offsets_stay_in_memory_so_documents_are_limited(store, monkeypatch):
    monkeypatch.setattr(limits, "DOCUMENTS", 2)
    with pytest.raises(InputError, match=r"store has 3 documents, more than the 2 allowed: .* set PI_JAX_LIMITS=2 in"):
        TokenStore.open(str(store))


def test_the_limits_can_be_raised(store, monkeypatch):
    monkeypatch.setenv("PI_JAX_LIMITS", "1e-9")
    with pytest.raises(
        InputError, match=r"manifest.json has .* bytes, more than the 0 allowed: .* set PI_JAX_LIMITS=1 in"
    ):
        TokenStore.open(str(store))
    monkeypatch.setenv("PI_JAX_LIMITS", "2")
    TokenStore.open(str(store))
    for text in ("x", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("PI_JAX_LIMITS", text)
        with pytest.raises(InputError, match=f"PI_JAX_LIMITS is '{text}': it must be a positive number"):
            TokenStore.open(str(store))
