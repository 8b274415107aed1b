"""Theorem 2.1 with the constant that holds, the extrapolation bound, and the command that shows both."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi_jax import rope, tiny
from pi_jax.cli import main
from pi_jax.config import ComputeConfig
from pi_jax.convert.formats import hf
from pi_jax.model import Llama
from pi_jax.theory import bounds, measured


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_interpolated_scores_stay_within_the_corrected_bound(head_dim):
    rng = np.random.default_rng(head_dim)
    theta_R = bounds.frequencies(head_dim)
    left = rng.integers(0, 32768, 200)
    fraction = rng.random(200)
    phase = rng.random((200, head_dim // 2))
    # Random h, and the worst there is: all pairs turned so that a(s) bends as one in the middle of the gap.
    for h in (rng.random(phase.shape) * np.exp(2j * np.pi * phase), np.exp(-1j * (left[:, None] + 0.5) * theta_R)):
        a_left, a_right = bounds.score(h, left, theta_R), bounds.score(h, left + 1, theta_R)
        chord = (1 - fraction) * a_left + fraction * a_right
        off = np.abs(bounds.score(h, left + fraction, theta_R) - chord)
        bound = 4 * fraction * (1 - fraction) * bounds.interpolation_bound(head_dim) * np.abs(h).max(axis=1)
        assert (off <= bound * (1 + 1e-9) + 1e-10).all()


def test_the_printed_bound_does_not_hold():
    assert bounds.printed_bound(128) == pytest.approx(128 / 294.7309, rel=1e-6)
    assert bounds.counter_example(128) / bounds.printed_bound(128) == pytest.approx(1.14, abs=0.005)
    for head_dim, ratio in ((64, 1.30), (32, 1.66), (8, 4.56)):
        assert bounds.counter_example(head_dim) / bounds.printed_bound(head_dim) == pytest.approx(ratio, abs=0.005)
        assert bounds.counter_example(head_dim) < bounds.interpolation_bound(head_dim)
    assert bounds.interpolation_bound(128) == pytest.approx(0.49979, abs=5e-6)
    assert bounds.interpolation_bound(64) == pytest.approx(0.28561, abs=5e-6)


def test_extrapolation_bound_by_head_size():
    ratios = bounds.extrapolation_bound(np.arange(4096), 128) / 128
    assert ratios[0] == 16.25
    assert ratios.min() == pytest.approx(1.1159, abs=5e-5) and ratios.argmin() == 3643
    assert (bounds.extrapolation_bound(np.arange(4096), 64) / 64 < 1).mean() == pytest.approx(0.073, abs=5e-4)


def test_extrapolation_bound_bounds_scores():
    rng = np.random.default_rng(0)
    h = rng.standard_normal((50, 64)) + 1j * rng.standard_normal((50, 64))
    distances = rng.integers(0, 32768, 50)
    limit = 2 * np.abs(h).max(axis=1) * bounds.extrapolation_bound(distances, 128)
    assert (np.abs(bounds.score(h, distances, bounds.frequencies(128))) <= limit).all()


def test_a_fit_explodes_beyond_its_window_and_is_smooth_within():
    fitted = bounds.fit()
    whole = fitted(np.arange(2048))
    assert np.abs(whole).max() < 2
    assert np.abs(fitted(np.arange(2048, 4096))).max() > 1000 * np.abs(whole).max()
    assert np.abs(fitted(np.arange(2047) + 0.5)).max() < 1.5 * np.abs(whole).max()


def test_products_give_the_scores_of_the_model():
    """a(i - j) from h equals the product of the rotated query and key; with another pairing of channels it does not."""
    q, k = (np.asarray(jax.random.normal(jax.random.key(i), (1, 6, 4 // (i + 1), 16))) for i in (0, 1))
    positions = np.array([9, 5, 7, 3, 8, 6]), np.array([1, 5, 2, 0, 4, 3])
    rotated_q, rotated_k = (
        rope.rotate(jnp.asarray(x), jnp.asarray(p)[None], rope.Default())
        for x, p in zip((q, k), positions, strict=True)
    )
    expected = np.einsum("bsnh,bsnh->bsn", rotated_q, np.repeat(rotated_k, 2, axis=2)).ravel()
    distances = np.repeat(positions[0] - positions[1], 4)
    (h_MR,) = measured._products(q, k)
    np.testing.assert_allclose(bounds.score(h_MR, distances, bounds.frequencies(16)), expected, atol=1e-5)
    (wrong_MR,) = measured._products(q[..., ::-1], k)
    assert np.abs(bounds.score(wrong_MR, distances, bounds.frequencies(16)) - expected).max() > 0.1


def test_command(tmp_path, capsys, mesh):
    tiny.tiny_tokenizer(tmp_path / "tokenizer")
    tiny.tiny_text(tmp_path, documents=1)
    with jax.set_mesh(mesh):
        model = Llama(tiny.tiny_model_config(), ComputeConfig(dtype="float32"), jax.random.key(0))
        hf.save(model, str(tmp_path / "model"), str(tmp_path / "tokenizer"))
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "story-000.txt"), "--tokens", "64"]
    main(["theory", "--output", str(tmp_path / "out"), *arguments])
    printed = capsys.readouterr().out
    assert "1.1159" in printed and "1.14x" in printed and "0.4998" in printed
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "figure2.png",
        "figure5.png",
        "measured.png",
        "theory.json",
    }
    report = json.loads((tmp_path / "out" / "theory.json").read_text())
    assert len(report["measured"]["layers"]) == 2
    assert 0 < report["measured"]["all"]["off_chord_per_h"] < report["measured"]["bound_per_h"]


@pytest.mark.parametrize(
    "arguments, words",
    [(["--model", "x"], ["--model", "--text"]), (["--tokens", "1"], ["tokens", "1"])],
)
def test_bad_arguments_are_named(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["theory", "--output", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words) and "Traceback" not in message


def test_without_matplotlib_one_sentence_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        main(["theory", "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_model_leaves_nothing_behind(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["theory", "--output", str(tmp_path / "out"), "--model", "nowhere", "--text", "x.txt"])
    assert stop.value.code == 2 and "nowhere: there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
