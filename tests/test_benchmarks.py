"""Benchmarks run at a small size, so that they still do when somebody has the hardware."""

import json

import pytest

from benchmarks import attention


@pytest.mark.slow
def test_attention(tmp_path, capsys):
    output = tmp_path / "attention.json"
    sizes = {"lengths": (64,), "head_dims": (32,), "groups": (2,), "heads": 4, "repeats": 1}
    attention.main(attention.Benchmark(**sizes, output=str(output)))
    result = json.loads(output.read_text())
    assert {r["implementation"] for r in result["rows"]} == {"chunked", "reference", "torch"}
    assert {r["document"] for r in result["rows"]} == {64, 16}
    assert all(r["forward_tflops"] > 0 and r["both_tflops"] > 0 for r in result["rows"])
    assert max(result["errors"]["chunked"]) < 1e-5
    assert "TFLOP/s" in capsys.readouterr().out


def test_visible_pairs_are_what_is_counted():
    case = attention.Case(64, 4, 2, 32, 16, "float32")
    assert case.forward_flops() == 4 * 4 * 32 * 4 * (16 * 17 / 2)
