"""The pipeline: a batch depends on the step alone, and every epoch is a new permutation of all rows."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from pi_jax.config import DataConfig
from pi_jax.data.pipeline import Pipeline, Sequences, Source, open_pipeline, parse_source
from pi_jax.data.store import TokenStore, TokenStoreWriter
from pi_jax.data.tokenizer import TokenizerInfo
from pi_jax.errors import InputError

WINDOW, BATCH = 8, 4


def make_store(path, lengths, first=0, vocab_hash="0" * 64):
    """A store whose stream is first, first + 1, first + 2, ..., so that a row is known by its first token."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]) + first
    info = TokenizerInfo("Toy", 60000, vocab_hash)
    with TokenStoreWriter(
        str(path), tokenizer=info, tokenizer_dir=str(path.parent), shard_tokens=256, chunk_tokens=64
    ) as w:
        for start, stop in itertools.pairwise(offsets):
            w.add(np.arange(start, stop))
    return str(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores: 37 rows of tokens below 10000, and 12 rows above."""
    folder = tmp_path_factory.mktemp("stores")
    return make_store(folder / "a", [50, 3, 200, 47]), make_store(folder / "b", [100], first=10000)


def config_of(*sources, **kwargs):
    return DataConfig(**{"sources": sources, "window": WINDOW, "batch_size": BATCH, "prefetch": 3, **kwargs})


def first_tokens(pipeline, steps):
    return [int(row[0]) for step in steps for row in pipeline.batch(step)["tokens"]]


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "targets", "positions", "segment_ids", "loss_weights"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


def test_every_epoch_is_another_permutation_of_all_rows(stores):
    pipeline = open_pipeline(config_of(stores[0]))
    assert pipeline.num_sequences == 299 // WINDOW == 37
    assert pipeline.steps_per_epoch == 37 / BATCH
    order = first_tokens(pipeline, range(37))  # 37 steps are 4 epochs
    epochs = [order[37 * e : 37 * (e + 1)] for e in range(4)]
    in_order = [WINDOW * i for i in range(37)]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, in_order]}) == 5


def test_neighbouring_seeds_share_no_epoch(stores):
    epochs = set()
    for seed in range(6):
        order = first_tokens(open_pipeline(config_of(stores[0], seed=seed)), range(37))
        epochs |= {tuple(order[37 * e : 37 * (e + 1)]) for e in range(4)}
    assert len(epochs) == 24


def test_stores_of_equal_size_are_not_walked_in_step(tmp_path):
    a, b = make_store(tmp_path / "a", [300]), make_store(tmp_path / "b", [300], first=10000)
    order = np.array(first_tokens(open_pipeline(config_of(a, b)), range(18)))
    assert not np.array_equal(order[order < 10000], order[order >= 10000] - 10000)


@pytest.mark.parametrize("prefetch", [0, 1, 8])
@pytest.mark.parametrize("packing", ["joined", "document"])
def test_iterating_is_the_same_as_asking_for_each_step(stores, packing, prefetch):
    pipeline = open_pipeline(config_of(stores[0], f"{stores[1]}@2", packing=packing, prefetch=prefetch))
    for start in (0, 1, 17, 10**9):
        batches = pipeline.iterate(start)
        for step in range(start, start + 15):
            assert_same(next(batches), pipeline.batch(step))
        batches.close()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_their_rows_of_the_same_batch(stores, hosts):
    config = config_of(*stores, segment_masking=True)
    share = BATCH // hosts
    slices = [slice(h * share, (h + 1) * share) for h in range(hosts)]
    parts = [open_pipeline(config).iterate(5, rows) for rows in slices]  # a pipeline of its own for each host
    for step in range(5, 20):
        got = [next(part) for part in parts]
        whole = open_pipeline(config).batch(step)
        assert_same({name: np.concatenate([g[name] for g in got]) for name in whole}, whole)
        for rows, part in zip(slices, got, strict=True):
            assert_same(part, open_pipeline(config).batch(step, rows))


def test_a_run_with_another_batch_size_sees_the_same_sequence_of_rows(stores):
    small, large = (open_pipeline(config_of(*stores, batch_size=n)) for n in (2, 6))
    assert first_tokens(small, range(30)) == first_tokens(large, range(10))


def test_sources_are_mixed_by_weight_and_evenly(stores):
    pipeline = open_pipeline(config_of(stores[0], f"{stores[1]}@3"))
    order = np.array(first_tokens(pipeline, range(100)))
    for window in range(0, 400, 40):
        assert (order[window : window + 40] >= 10000).sum() == 30
    second = order[order >= 10000]  # goes round its 12 rows again and again
    for epoch in range(25):
        assert sorted(second[12 * epoch : 12 * (epoch + 1)]) == [10000 + WINDOW * i for i in range(12)]


def test_rows_of_a_source_stand_in_its_order(stores):
    rows = Sequences(TokenStore.open(stores[0]), config_of(stores[0]))
    assert [int(rows[i]["tokens"][0]) for i in range(len(rows))] == [WINDOW * i for i in range(37)]
    for i in (-1, 37):
        with pytest.raises(IndexError):
            rows[i]


def test_switches_reach_the_rows(stores):
    def fields(**kwargs):
        pipeline = open_pipeline(config_of(stores[0], window=100, batch_size=2, **kwargs))
        batch = pipeline.batch(0)
        return {name: batch[name][np.argmin(batch["tokens"][:, 0])] for name in batch}  # the row of 0, 1, ...

    plain, masked, reset = fields(), fields(segment_masking=True), fields(reset_positions=True)
    assert set(plain["segment_ids"]) == {1}
    assert plain["loss_weights"].sum() == 100
    assert np.flatnonzero(np.diff(masked["segment_ids"])).tolist() == [49, 52]
    assert np.flatnonzero(masked["loss_weights"] == 0).tolist() == [49, 52]
    assert np.flatnonzero(reset["positions"] == 0).tolist() == [0, 50, 53]
    assert plain["positions"].tolist() == list(range(100))


def test_what_training_asks_for(stores):
    pipeline = open_pipeline(config_of(*stores))
    assert pipeline.largest_token == 10099
    assert pipeline.vocab_hash == "0" * 64
    assert pipeline.tokenizer_dir == f"{stores[0]}/tokenizer"
    assert pipeline.num_sequences == 49
    with pytest.raises(ValueError):
        pipeline.batch(-1)


def test_the_identity_changes_with_the_batches_and_only_with_them(stores, tmp_path):
    base = config_of(*stores)
    copy = make_store(tmp_path / "copy of a", [50, 3, 200, 47])
    identity = open_pipeline(base).identity
    for other in (
        config_of(copy, f"{stores[1]}@1.0"),
        dataclasses.replace(base, prefetch=9),
        dataclasses.replace(base, require_long_documents=False),
    ):
        assert open_pipeline(other).identity == identity
        assert_same(open_pipeline(other).batch(7), open_pipeline(base).batch(7))
    others = [
        config_of(*reversed(stores)),
        config_of(stores[0], f"{stores[1]}@2"),
        config_of(make_store(tmp_path / "b", [50, 4, 200, 46]), stores[1]),
        *(
            dataclasses.replace(base, **change)
            for change in (
                {"seed": 1},
                {"batch_size": 2},
                {"window": 9},
                {"packing": "document"},
                {"segment_masking": True},
                {"reset_positions": True},
            )
        ),
    ]
    found = [identity, *(open_pipeline(other).identity for other in others)]
    assert len({json.dumps(x, sort_keys=True) for x in found}) == 1 + len(others)


@pytest.mark.parametrize(
    "text, source",
    [
        ("a/b", Source("a/b", 1.0)),
        ("a/b@2.5", Source("a/b", 2.5)),
        ("gs://bucket/a@1e-3", Source("gs://bucket/a", 0.001)),
        ("home/me@work/a", Source("home/me@work/a", 1.0)),
        ("home/me@work/a@3", Source("home/me@work/a", 3.0)),
        ("a@b@3", Source("a@b", 3.0)),
    ],
)
def test_sources_and_weights(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize("weight", ["", "0", "-1", "nan", "inf", "x"])
def test_bad_weights(weight):
    with pytest.raises(InputError, match=f"data source 'a/b@{weight}' has the weight '{weight}': write STORE@WEIGHT"):
        open_pipeline(config_of(f"a/b@{weight}"))


def test_error_sentences(stores, tmp_path):
    def error(*sources, **kwargs):
        with pytest.raises(InputError) as caught:
            open_pipeline(config_of(*sources, **kwargs))
        return str(caught.value)

    assert "data.sources is empty" in error()
    assert f"{tmp_path}/no is not a complete token store" in error(f"{tmp_path}/no")
    assert "data.seed is -1: it must be 0 or more" in error(stores[0], seed=-1)
    other = make_store(tmp_path / "other", [300], vocab_hash="1" * 64)
    assert f"{stores[0]} and {other} were made with different tokenizers" in error(stores[0], stores[1], other)
    assert error(*stores, window=150) == (
        f"data.window is 150, but the longest document of {stores[1]} has 100 tokens, so no long distances would be "
        "trained: use a shorter --data.window, or --data.no-require-long-documents"
    )
    assert "has 100 tokens: one sequence needs data.window + 1, 101" in error(stores[1], window=100)
    single = make_store(tmp_path / "single", [1, 1, 1])
    assert "has 3 tokens" in error(single, window=1, packing="document")
    open_pipeline(config_of(stores[0], window=250, require_long_documents=False))
    open_pipeline(config_of(stores[0], window=200))


def test_a_store_that_breaks_during_a_run_stops_it(tmp_path):
    path = make_store(tmp_path / "a", [2000])
    pipeline = Pipeline(config_of(path), [TokenStore.open(path)])
    for shard in (tmp_path / "a/tokens/c").iterdir():
        shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(InputError, match=f"{path}: tokens .* cannot be read"):
        next(pipeline.iterate(0))


def test_pose_changes_positions_and_nothing_else(stores):
    plain, posed = (open_pipeline(config_of(stores[0], pose_window=reach)) for reach in (0, 4 * WINDOW))
    for step in (0, 3, 11):
        a, b = plain.batch(step), posed.batch(step)
        assert all((a[name] == b[name]).all() for name in a if name != "positions")
        assert b["positions"].dtype == np.int32 and b["positions"].max() < 4 * WINDOW
        assert_same(b, next(iter(posed.iterate(step))))
        np.testing.assert_array_equal(posed.batch(step, slice(1, 3))["positions"], b["positions"][1:3])
    rows = np.concatenate([posed.batch(step)["positions"] for step in range(30)])
    assert rows.max() > 3 * WINDOW and len({tuple(row) for row in rows}) > 60


@pytest.mark.parametrize("wrong", [{"pose_window": WINDOW}, {"pose_window": 64, "reset_positions": True}])
def test_pose_settings_that_make_no_sense(stores, wrong):
    with pytest.raises(InputError, match="data.pose_window is"):
        config_of(stores[0], **wrong)
