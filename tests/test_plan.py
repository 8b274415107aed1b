"""The plan of a step: parts, collectives, what is refused. Compiled here for 8 virtual CPU devices; see also
test_plan_compiled.py for the real targets."""

import dataclasses
import json
import pathlib
import runpy

import jax
import pytest

from pi_jax.cli import main as pi_jax_main
from pi_jax.config import ComputeConfig, Config, DataConfig, MeshConfig, RopeConfig, extend, load_config
from pi_jax.errors import InputError
from pi_jax.parallel import sharding
from pi_jax.plan import __main__ as plan_command
from pi_jax.plan import hlo, memory, topology
from pi_jax.plan.__main__ import main as plan_main
from pi_jax.tiny import tiny_model_config

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def _plan(layers=2, mesh=MeshConfig(), window=256, **compute):
    model = extend(dataclasses.replace(tiny_model_config(), num_hidden_layers=layers), RopeConfig("linear", 4.0))
    compute = ComputeConfig(dtype="float32", loss_chunk=64, **compute)
    config = Config(compute=compute, data=DataConfig(window=window, batch_size=16), mesh=mesh)
    return memory.plan(config, model, sharding.make_mesh(mesh), 2**30)


def test_parameters_moments_and_gradients_are_those_of_one_of_eight_devices():
    found = _plan()
    model = tiny_model_config()
    each = 4 * model.num_parameters() / 8
    for part, times in (("parameters", 1), ("gradients", 1), ("moments", 2)):
        assert each * times <= found.parts[part] < 1.01 * each * times + 4096, part  # norms are whole everywhere
    assert found.parts["kept activations"] == 2 * 2 * 256 * model.hidden_size * 4
    assert sum(found.parts.values()) == found.peak and found.fits


def test_collectives_count_every_turn_of_a_loop():
    two, four = (_plan(layers=n).collectives["all-gather"]["count"] for n in (2, 4))
    eight = _plan(layers=8).collectives["all-gather"]["count"]
    assert four > two and eight - four == 2 * (four - two)
    text = """HloModule m
%body (p: f32[8]) -> f32[8] {
  %g = (bf16[2,4], bf16[2,32]) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %r = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}
  %s = ((f32[16], f32[32]), (f32[4], f32[8])) reduce-scatter-start(%p), replica_groups={{0,1,2,3}}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""
    assert hlo.collectives(text) == {
        "all-gather": {"count": 3, "bytes": 3 * 2 * 32 * 2},
        "reduce-scatter": {"count": 6, "bytes": 3 * 4 * 4 * 4 + 3 * 48 * 4},
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("a100", "unknown kind 'a100'"),
        ("h100", "write h100:COUNT"),
        ("h100:12", "or a multiple of it"),
        ("v5p:48", "slices of v5p have"),
        ("h100:-8", "write h100:COUNT"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        topology.parse(text)


@pytest.mark.parametrize("name", ["h100:8", "v5p:8"])
def test_a_missing_compiler_is_said_before_anything_else(name, monkeypatch, capsys):
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    with pytest.raises(InputError, match=r"pip install 'pi_jax\[compilers\]'"):
        topology.parse(name).devices()
    with pytest.raises(SystemExit) as stop:
        plan_main(["--config", "configs/smollm2_16k.py", "--topology", name])  # its base model is not there, either
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith(f"error: --topology {name}: the compiler for ") and printed.err.count("\n") == 1


def test_a_step_that_the_compiler_refuses_as_too_large_does_not_fit(monkeypatch):
    """As libtpu does."""
    message = "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (29.16G) exceeds available HBM"

    class Step:
        def trace(self, *_):
            return self

        def lower(self, **_):
            return self

        def compile(self, **_):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(memory.step, "make_step", lambda _: Step())
    found = _plan()
    assert found.peak == int(29.16 * 2**30) and not found.fits and found.collectives is None
    assert found.alone["loss"] > 0
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        _plan()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_to_run_it(path):
    config = load_config(str(path))
    assert f"--config configs/{path.name}" in runpy.run_path(str(path))["__doc__"]
    if config.model and config.rope.kind == "linear":
        assert extend(config.model, config.rope).max_position_embeddings == config.data.window


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    here = topology.Chip("cpu", 2**30)
    monkeypatch.setitem(topology.CHIPS, "v5e", here)
    monkeypatch.setattr(topology.Topology, "require_compiler", lambda self: None)
    monkeypatch.setattr(topology.Topology, "devices", lambda self: jax.devices()[: self.count])
    output = tmp_path / "plan.json"
    config = str(CONFIGS[0].parent / "tiny.py")
    plan_main(["--config", config, "--topology", "v5e:8", "--output", str(output), "--data.batch-size", "16"])
    written = json.loads(output.read_text())
    assert f"{written['peak'] / 2**30:8.2f}" in capsys.readouterr().out
    few = ["--data.batch-size", "2"]
    plan_main(["--config", config, "--topology", "v5e:8", "--search", "--output", str(output), *few])
    tried = json.loads(output.read_text())["tried"]
    attempts = [(t["topology"], t["rows"], t["gradient_accumulation_steps"]) for t in tried]
    assert attempts == [("v5e:1", 1, 2), ("v5e:1", 2, 1)]
    monkeypatch.setitem(topology.CHIPS, "v5e", dataclasses.replace(here, memory=2**20))
    with pytest.raises(SystemExit) as stop:
        plan_main(["--config", config, "--topology", "v5e:1", *few])
    assert stop.value.code == 1


def test_bad_topology_is_one_sentence_from_every_entry_point(capsys):
    for entry in (plan_main, lambda words: pi_jax_main(["plan", *words])):
        with pytest.raises(SystemExit) as stop:
            entry(["--config", "configs/tiny.py", "--topology", "nonsense:8"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_smoke_plans_a_config_that_starts_from_a_folder(tmp_path, monkeypatch):
    planned = {}

    def run(config, model, *_):
        planned["model"] = model
        raise InputError("stop here")

    monkeypatch.setattr(plan_command, "plan", run)
    monkeypatch.setattr(plan_command.sharding, "make_mesh", lambda *_: None)
    monkeypatch.setattr(plan_command.topology.Topology, "devices", lambda _: [])
    monkeypatch.setattr(plan_command.topology.Topology, "require_compiler", lambda _: None)
    with pytest.raises(SystemExit):
        plan_main(["--config", "configs/llama2_7b_32k.py", "--smoke", "--topology", "v5e:8"])
    assert planned["model"].hidden_size == 64
