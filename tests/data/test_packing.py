"""Packing: rows tile the stream, and every array says what it should around document boundaries."""

import itertools

import numpy as np
import pytest

from pi_jax.data.packing import Spans, pack, skip_positions


def rows_of(lengths, window, packing, segment_masking=False, reset_positions=False):
    """All rows of documents with these lengths, whose tokens are 100, 101, 102, ..."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    spans = Spans(offsets, window, packing)
    stream = 100 + np.arange(offsets[-1])
    return [
        pack(
            stream[slice(*spans[i])],
            spans.boundaries(i),
            window,
            segment_masking=segment_masking,
            reset_positions=reset_positions,
        )
        for i in range(len(spans))
    ]


def as_lists(row):
    return {name: values.tolist() for name, values in row.items()}


def test_joined_by_hand():
    # documents: 100 101 102 | 103 | 104 105 106 107 108; row 0 is 100..104, row 1 is 104..108
    first, second = rows_of([3, 1, 5], 4, "joined", segment_masking=True, reset_positions=True)
    assert as_lists(first) == {
        "tokens": [100, 101, 102, 103],
        "targets": [101, 102, 103, 104],
        "positions": [0, 1, 2, 0],
        "segment_ids": [1, 1, 1, 2],
        "loss_weights": [1, 1, 0, 0],  # 102 -> 103 and 103 -> 104 cross into another document
    }
    assert as_lists(second) == {
        "tokens": [104, 105, 106, 107],
        "targets": [105, 106, 107, 108],
        "positions": [0, 1, 2, 3],
        "segment_ids": [1, 1, 1, 1],
        "loss_weights": [1, 1, 1, 1],
    }


def test_a_document_that_began_in_an_earlier_row_counts_from_the_start_of_the_row():
    row = rows_of([6, 6], 4, "joined", segment_masking=True, reset_positions=True)[1]
    assert row["tokens"].tolist() == [104, 105, 106, 107]
    assert row["positions"].tolist() == [0, 1, 0, 1]
    assert row["segment_ids"].tolist() == [1, 1, 2, 2]
    assert row["loss_weights"].tolist() == [1, 0, 1, 1]


def test_the_switches_are_independent():
    def last_of(masking, reset):
        row = rows_of([3, 6], 4, "joined", masking, reset)[0]
        return [row[name].tolist() for name in ("positions", "segment_ids", "loss_weights")]

    plain, masked = [[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 2], [1, 1, 0, 1]]
    assert last_of(False, False) == [[0, 1, 2, 3], *plain]
    assert last_of(False, True) == [[0, 1, 2, 0], *plain]
    assert last_of(True, False) == [[0, 1, 2, 3], *masked]
    assert last_of(True, True) == [[0, 1, 2, 0], *masked]


def test_document_by_hand():
    # documents: 100..106, cut into 100..104 and 104..106; 107, which has no target; 108 109
    rows = [as_lists(row) for row in rows_of([7, 1, 2], 4, "document")]
    assert [row["tokens"] for row in rows] == [[100, 101, 102, 103], [104, 105, 0, 0], [108, 0, 0, 0]]
    assert [row["targets"] for row in rows] == [[101, 102, 103, 104], [105, 106, 0, 0], [109, 0, 0, 0]]
    assert [row["segment_ids"] for row in rows] == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert [row["loss_weights"] for row in rows] == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert [row["positions"] for row in rows] == [[0, 1, 2, 3]] * 3


def test_a_piece_of_one_token_makes_no_row():
    assert len(rows_of([5], 4, "document")) == 1  # 100..104 is whole; 104 alone would have no target
    assert len(rows_of([6], 4, "document")) == 2


@pytest.mark.parametrize("total, rows", [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_number_of_joined_rows(total, rows):
    spans = Spans(np.array([0, total]), 4, "joined")
    assert len(spans) == rows
    with pytest.raises(IndexError):
        spans[rows]
    with pytest.raises(IndexError):
        spans[-1]


RANDOM = [np.random.default_rng(seed).integers(1, 40, size=60).tolist() for seed in range(3)]


@pytest.mark.parametrize("lengths", RANDOM)
@pytest.mark.parametrize("window", [1, 7, 16, 64])
def test_joined_rows_tile_the_stream(lengths, window):
    rows = rows_of(lengths, window, "joined")
    tokens = np.concatenate([row["tokens"] for row in rows])
    targets = np.concatenate([row["targets"] for row in rows])
    np.testing.assert_array_equal(tokens, 100 + np.arange(len(rows) * window))
    np.testing.assert_array_equal(targets, tokens + 1)
    assert sum(lengths) - 1 - len(tokens) < window, "a whole row was dropped"


@pytest.mark.parametrize("lengths", RANDOM)
@pytest.mark.parametrize("window", [1, 7, 16, 64])
def test_document_rows_hold_every_pair_of_neighbours_once_and_no_other(lengths, window):
    rows = rows_of(lengths, window, "document")
    got = [
        pair
        for row in rows
        for pair, real in zip(zip(row["tokens"], row["targets"], strict=True), row["segment_ids"], strict=True)
        if real
    ]
    starts = 100 + np.cumsum([0, *lengths])
    want = [(t, t + 1) for i, n in enumerate(lengths) for t in range(starts[i], starts[i] + n - 1)]
    assert got == want
    for row in rows:
        np.testing.assert_array_equal(row["loss_weights"], row["segment_ids"] > 0)
        np.testing.assert_array_equal(row["tokens"][row["segment_ids"] == 0], 0)


@pytest.mark.parametrize("lengths", RANDOM)
@pytest.mark.parametrize("masking, reset", list(itertools.product([False, True], repeat=2)))
def test_joined_against_a_token_by_token_reading_of_the_rules(lengths, masking, reset):
    window = 32
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for number, row in enumerate(rows_of(lengths, window, "joined", masking, reset)):
        segment, position = 1, -1
        for i in range(window):
            at = number * window + i
            new = i > 0 and document_of[at] != document_of[at - 1]
            segment += new
            position = 0 if reset and new else position + 1
            crosses = document_of[at] != document_of[at + 1]
            assert row["segment_ids"][i] == (segment if masking else 1)
            assert row["positions"][i] == position
            assert row["loss_weights"][i] == (0 if masking and crosses else 1)


@pytest.mark.parametrize("packing", ["joined", "document"])
def test_dtypes_and_shapes(packing):
    for row in rows_of([9, 3], 4, packing):
        assert {name: values.dtype.name for name, values in row.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "positions": "int32",
            "segment_ids": "int32",
            "loss_weights": "float32",
        }
        assert {values.shape for values in row.values()} == {(4,)}


def test_skipped_positions_jump_once_and_cover_the_target():
    """One jump, at any place, of any length: every distance below the target window comes up."""
    window, reach = 16, 64
    rows = [skip_positions(np.arange(window, dtype=np.int32), reach, (0, i)) for i in range(3000)]
    steps = [np.diff(row) for row in rows]
    assert all(((step == 1) | (step == step.max())).all() and (step > 1).sum() <= 1 for step in steps)
    assert all(row[0] == 0 and row[-1] < reach for row in rows)
    assert {int(np.argmax(step)) + 1 for step in steps if step.max() > 1} == set(range(1, window))
    distances = np.concatenate([np.abs(row[:, None] - row[None]).ravel() for row in rows])
    assert set(distances) == set(range(reach))
    shifts = np.bincount([row[-1] - (window - 1) for row in rows], minlength=reach - window + 1)
    assert shifts.min() > 30 and shifts.max() < 95  # uniform: 61 expected of each


def test_skipping_by_nothing_is_the_row_itself():
    row = np.arange(16, dtype=np.int32)
    np.testing.assert_array_equal(skip_positions(row, 16, (0, 1)), row)
