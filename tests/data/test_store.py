"""The token store: what is written is read back, in bounded memory, and damage never passes for data."""

import concurrent.futures
import json
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
import tensorstore as ts

from pi_jax.data.store import TokenStore, TokenStoreWriter, length_histogram
from pi_jax.data.tokenizer import TokenizerInfo
from pi_jax.errors import InputError

SHARD, CHUNK = 1024, 64
INFO = TokenizerInfo("Toy", 1000, "0" * 64)


@pytest.fixture
def tokenizer_dir(tmp_path):
    folder = tmp_path / "tokenizer source"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors", "config.json"):
        (folder / name).write_text(name)
    (folder / "merges.txt").write_text("")
    return folder


def write(path, documents, tokenizer_dir, info=INFO, **kwargs):
    kwargs = {"shard_tokens": SHARD, "chunk_tokens": CHUNK, **kwargs}
    with TokenStoreWriter(str(path), tokenizer=info, tokenizer_dir=str(tokenizer_dir), **kwargs) as writer:
        for document in documents:
            writer.add(document)
    return TokenStore.open(str(path))


def random_documents(count=50, longest=300, vocab=1000):
    random = np.random.default_rng(0)
    return [random.integers(0, vocab, size=random.integers(1, longest)) for _ in range(count)]


@pytest.mark.parametrize("vocab_size, dtype", [(1000, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip_over_several_shards(tmp_path, tokenizer_dir, vocab_size, dtype):
    documents = random_documents(vocab=vocab_size)
    documents[3][0] = vocab_size - 1
    store = write(tmp_path / "s", documents, tokenizer_dir, TokenizerInfo("Toy", vocab_size, "0" * 64))
    stream = np.concatenate(documents)
    assert len(list((tmp_path / "s/tokens/c").iterdir())) == -(-len(stream) // SHARD) > 3
    assert json.loads((tmp_path / "s/tokens/zarr.json").read_text())["data_type"] == dtype

    assert (store.num_documents, store.num_tokens) == (len(documents), len(stream))
    assert store.offsets.dtype == np.int64
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(store.read(store.offsets[i], store.offsets[i + 1]), document)
    for start, stop in [
        (0, len(stream)),
        (0, 0),
        (SHARD - 1, SHARD + 1),
        (len(stream), len(stream)),
        (70, 3000),
    ]:
        got = store.read(start, stop)
        np.testing.assert_array_equal(got, stream[start:stop])
        assert got.dtype == np.int32
    for start, stop in [(-1, 3), (5, 4), (0, len(stream) + 1)]:
        with pytest.raises(IndexError):
            store.read(start, stop)
    with pytest.raises(ValueError):
        store.offsets[0] = 1


def test_a_stream_that_ends_with_a_shard(tmp_path, tokenizer_dir):
    store = write(tmp_path / "s", [np.arange(SHARD) % 9, np.arange(SHARD) % 7], tokenizer_dir)
    np.testing.assert_array_equal(store.read(SHARD, 2 * SHARD), np.arange(SHARD) % 7)


def test_chunks_of_nothing_but_token_0_are_data(tmp_path, tokenizer_dir):
    store = write(tmp_path / "s", [np.zeros(3 * SHARD, int)], tokenizer_dir)
    np.testing.assert_array_equal(store.read(0, 3 * SHARD), 0)


def test_manifest(tmp_path, tokenizer_dir):
    documents = [np.full(n, 5) for n in (1, 2, 3, 4, 100)]
    store = write(tmp_path / "s", documents, tokenizer_dir, facts={"eos": [2], "sources": ["a"]})
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert store.manifest == manifest
    assert (manifest["documents"], manifest["tokens"], manifest["eos"]) == (5, 110, [2])
    assert manifest["created_by"].startswith("pi_jax ")
    assert manifest["length_histogram"] == {
        "1": {"documents": 1, "tokens": 1},
        "2": {"documents": 2, "tokens": 5},
        "4": {"documents": 1, "tokens": 4},
        "64": {"documents": 1, "tokens": 100},
    }
    assert store.tokenizer == INFO
    for name, size in manifest["files"].items():
        assert (tmp_path / "s" / name).stat().st_size == size
    copied = sorted(file.name for file in (tmp_path / "s/tokenizer").iterdir())
    assert copied == ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
    assert store.tokenizer_dir == str(tmp_path / "s/tokenizer")


def test_histogram_edges_are_exact():
    lengths = np.array([2**k + d for k in range(2, 40) for d in (-1, 0)])
    assert set(length_histogram(lengths)) == {str(2**k) for k in range(1, 40)}
    assert length_histogram(lengths)["4"] == {"documents": 2, "tokens": 4 + 7}


def test_the_digest_follows_tokens_and_boundaries_only(tmp_path, tokenizer_dir):
    def digest(name, documents, **kwargs):
        return write(tmp_path / name, documents, tokenizer_dir, **kwargs).manifest["sha256"]

    same = digest("a", [np.arange(9), np.arange(3)])
    assert digest("b", [np.arange(9), np.arange(3)], shard_tokens=CHUNK, facts={"sources": ["z"]}) == same
    assert digest("c", [np.arange(9), np.array([0, 1, 3])]) != same
    assert digest("d", [np.arange(9)[:5], np.concatenate([np.arange(5, 9), np.arange(3)])]) != same


def test_vocab_hash_is_of_the_set_of_pairs():
    a = TokenizerInfo.of("A", {"a": 0, "b": 1, "é": 7})
    assert a == TokenizerInfo.of("A", {"é": 7, "b": 1, "a": 0})
    assert a.vocab_size == 8
    assert a.vocab_hash != TokenizerInfo.of("A", {"a": 1, "b": 0, "é": 7}).vocab_hash


def test_writing_holds_one_shard_at_most(tmp_path, tokenizer_dir):
    shard, shards = 2**16, 40
    document = np.zeros(shard // 4, np.uint16)
    finished = []
    tracemalloc.start()
    kwargs = {"tokenizer": INFO, "tokenizer_dir": str(tokenizer_dir)}
    with TokenStoreWriter(str(tmp_path / "s"), **kwargs, shard_tokens=shard, chunk_tokens=2**12) as writer:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(4 * shards):
            writer.add(document)
            if i % 4 == 3:
                finished.append(len(list(tmp_path.glob(".s.*/tokens/c/*"))))
        peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert finished == list(range(1, shards + 1)), "a full shard is on disk at once"
    assert peak < 4 * shard * 2, f"{peak} bytes beyond the buffer of {2 * shard}"


def test_a_row_reads_little_of_a_shard(tmp_path, tokenizer_dir):
    tokens = np.random.default_rng(0).integers(0, 1000, size=2**18)
    store = write(tmp_path / "s", [tokens], tokenizer_dir, shard_tokens=2**18, chunk_tokens=2**10)

    def bytes_read():
        (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric["values"][0]["value"]

    shard_bytes = (tmp_path / "s/tokens/c/0").stat().st_size
    store.read(0, 10)  # loads the shard's index
    before = bytes_read()
    store.read(100_000, 100_000 + 2**10)
    assert 0 < bytes_read() - before < shard_bytes / 50


def test_a_failure_leaves_nothing(tmp_path, tokenizer_dir):
    inside = sorted(p.name for p in tmp_path.iterdir())
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write(tmp_path / "s", failing(error), tokenizer_dir)
    assert sorted(p.name for p in tmp_path.iterdir()) == inside


def failing(error):
    yield np.arange(5000) % 9
    raise error


def test_an_existing_target_is_kept_unless_overwritten(tmp_path, tokenizer_dir):
    target = tmp_path / "s"
    write(target, [np.array([1])], tokenizer_dir)
    with pytest.raises(InputError, match="already exists: choose another folder, or use --overwrite"):
        write(target, [np.array([2])], tokenizer_dir)
    with pytest.raises(RuntimeError):
        write(target, failing(RuntimeError), tokenizer_dir, overwrite=True)
    assert TokenStore.open(str(target)).read(0, 1) == [1]
    assert write(target, [np.array([2])], tokenizer_dir, overwrite=True).read(0, 1) == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "tokenizer source"]


def test_overwrite_never_removes_what_is_no_token_store(tmp_path, tokenizer_dir):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a token store, so it is not overwritten"):
        write(tmp_path / "home", [np.array([1])], tokenizer_dir, overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists()


def test_targets_that_cannot_be_written(tmp_path, tokenizer_dir):
    (tmp_path / "file").write_text("")
    for path, message in [
        ("gs://bucket/s", "gs://bucket/s is a URL: write the token store to a local folder"),
        (tmp_path / "file/s", "file/s cannot be written"),
        (tmp_path / "file", "already exists"),
    ]:
        with pytest.raises(InputError, match=message):
            write(path, [np.array([1])], tokenizer_dir)


@pytest.mark.parametrize("document", [[], [[1, 2]], [1000], [-1]])
def test_documents_that_are_none(tmp_path, tokenizer_dir, document):
    with pytest.raises(ValueError):
        write(tmp_path / "s", [np.array(document, int)], tokenizer_dir)


def damage_missing(folder):
    (folder / "tokens/c/1").unlink()


def damage_cut(folder):
    file = folder / "tokens/c/1"
    file.write_bytes(file.read_bytes()[:-1])


def damage_offsets(folder):
    (folder / "offsets/c/0").unlink()


def damage_half_written(folder):
    (folder / "manifest.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))


def damage_all(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_missing, "is damaged: tokens/c/1 is missing or truncated"),
        (damage_cut, "is damaged: tokens/c/1 is missing or truncated"),
        (damage_offsets, "is damaged: offsets/c/0 is missing or truncated"),
        (damage_half_written, "not a complete token store, because it has no manifest.json"),
        (damage_manifest, "not a token store: pi_jax.prepare did not write its manifest.json"),
        (damage_format, "of format 2, but this version of pi_jax reads format 1"),
        (damage_all, "not a complete token store, because it has no manifest.json"),
    ],
)
def test_a_damaged_store_is_not_opened(tmp_path, tokenizer_dir, damage, message, scheme):
    write(tmp_path / "s", random_documents(), tokenizer_dir)
    damage(tmp_path / "s")
    with pytest.raises(InputError, match=message) as caught:
        TokenStore.open(f"{scheme}{tmp_path}/s")
    assert str(tmp_path / "s") in str(caught.value)


def test_a_flipped_bit_and_a_lost_shard_are_errors_when_read(tmp_path, tokenizer_dir):
    store = write(tmp_path / "s", random_documents(), tokenizer_dir)
    file = tmp_path / "s/tokens/c/1"
    whole = file.read_bytes()
    for at in range(100):  # each byte of the first chunk
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=f"tokens {SHARD}:{SHARD + 9} cannot be read"):
            TokenStore.open(store.path).read(SHARD, SHARD + 9)
    (tmp_path / "s/tokens/c/2").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        store.read(2 * SHARD, 2 * SHARD + 9)


def test_a_remote_store_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("pi_jax.remote._SECONDS_TO_ANSWER", 0)
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/s did not respond within 0 s"):
        TokenStore.open("http://127.0.0.1:9/s")


def test_urls_pickles_and_threads(tmp_path, tokenizer_dir):
    documents = random_documents()
    stream = np.concatenate(documents)
    store = write(tmp_path / "s", documents, tokenizer_dir)
    remote = TokenStore.open(f"file://{tmp_path}/s")
    for other in (remote, TokenStore.open(f"file://{tmp_path}/s/"), pickle.loads(pickle.dumps(store))):
        np.testing.assert_array_equal(other.read(900, 3000), stream[900:3000])
    assert len(pickle.dumps(store)) < 1000, "a pickle names the store, it does not hold the offsets"
    with open(f"{remote.tokenizer_dir}/tokenizer.json") as file:
        assert file.read() == "tokenizer.json"

    starts = np.random.default_rng(1).integers(0, len(stream) - 99, size=400)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for start, got in zip(starts, pool.map(lambda s: store.read(s, s + 99), starts), strict=True):
            np.testing.assert_array_equal(got, stream[start : start + 99])


def test_names_that_look_like_urls_or_escapes(tmp_path, tokenizer_dir):
    folder = tmp_path / "a b%20c#d?e@1"
    folder.mkdir()
    assert write(folder / "s", [np.array([7])], tokenizer_dir).read(0, 1) == [7]
