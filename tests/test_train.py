"""A whole run in miniature: it learns, resumes to the bit, and says what is wrong before it starts."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from pi_jax import tiny
from pi_jax.config import (
    ComputeConfig,
    EvaluateConfig,
    ProfileConfig,
    smoke,
)
from pi_jax.config.cli import load_config
from pi_jax.convert.__main__ import Convert, convert
from pi_jax.convert.formats import hf
from pi_jax.convert.open import open_model
from pi_jax.data.pipeline import open_pipeline
from pi_jax.data.prepare import Options, prepare
from pi_jax.errors import InputError
from pi_jax.model import Llama
from pi_jax.tiny import tiny_model_config, tiny_text
from pi_jax.train import loop, resolve
from pi_jax.train.__main__ import main as train_main
from tests.changes import with_changes

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_evaluation_inside_a_run_is_logged_and_changes_nothing(config, inputs, tmp_path):
    plain = loop.train(config, config)
    evaluated = dataclasses.replace(
        with_changes(config, train={"output": str(tmp_path / "evaluated")}),
        evaluate=EvaluateConfig(
            every=3,
            data=(inputs["heldout"],),
            windows=(64,),
            stride=32,
            max_tokens=128,
            passkey_lengths=(448,),
            passkey_distances=2,
            passkey_trials=1,
        ),
    )
    result = loop.train(evaluated, evaluated)
    assert _losses(config) == _losses(evaluated) and plain["final"]["loss"] == result["final"]["loss"]
    lines = [json.loads(x) for x in (tmp_path / "evaluated" / "metrics.jsonl").read_text().splitlines()]
    found = {x["step"]: x for x in lines if "perplexity/64" in x}
    assert sorted(found) == [0, 3, 6]
    assert found[6]["perplexity/64"] == result["perplexity"][0]["perplexity"] < found[0]["perplexity/64"]
    assert all(x["passkey/448"] == 0 and x["passkey_success/448"] == 0.0 for x in found.values())
    assert [r["k"] for r in result["passkey"][0]["by_distance"]] == [224, 448]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 2}, "evaluate.every is set: it needs evaluate.data or passkey_lengths"),
        ({"every": -1}, "evaluate.every is -1"),
        ({"passkey_lengths": (0,)}, "passkey_lengths has 0"),
        ({"passkey_lengths": (100,)}, "passkey_lengths is 100: .* at least 435 tokens"),
        ({"passkey_lengths": (448,), "passkey_trials": 0}, "passkey_trials is 0"),
    ],
)
def test_evaluation_that_cannot_be_done_is_said_before_the_first_step(config, changes, message):
    with pytest.raises(InputError, match=message):
        loop.train(dataclasses.replace(config, evaluate=EvaluateConfig(**changes)), config)
    assert not pathlib.Path(config.train.output).exists()


def _losses(config):
    lines = (pathlib.Path(config.train.output) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def test_a_run_learns_evaluates_and_hands_over(config, inputs, tmp_path, capsys):
    config = dataclasses.replace(
        with_changes(config, train={"steps": 30}, logging={"every": 10, "tensorboard": True}),
        evaluate=EvaluateConfig(data=(inputs["heldout"],), windows=(64, 128), stride=32, max_tokens=256),
    )
    result = loop.train(config, config)
    losses = _losses(config)
    assert sorted(losses) == [1, 10, 20, 30] and losses[30] < losses[1] - 1.5
    assert result["perplexity"][1]["window"] == 128 and 1 < result["perplexity"][1]["perplexity"] < 60
    run = pathlib.Path(config.train.output)
    assert json.loads((run / "result.json").read_text())["perplexity"] == result["perplexity"]
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["rope.factor"] == 2.0 and saved["versions"]["jax"] == jax.__version__
    assert any((run / "tensorboard").iterdir())
    assert json.loads((run / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 128
    printed = capsys.readouterr().out
    assert "tok/s" in printed and "left" in printed and "Held-out perplexity" in printed

    convert(Convert(config.train.output, str(tmp_path / "out")))
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["rope_scaling"]["factor"] == 2.0 and exported["max_position_embeddings"] == 128
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert open_model(str(tmp_path / "out")).config == open_model(config.train.output).config


def test_a_resumed_run_continues_to_the_bit(config, tmp_path):
    straight = config
    loop.train(straight, straight)
    halves = with_changes(config, train={"output": str(tmp_path / "halves"), "steps": 4})
    loop.train(halves, halves)
    rest = with_changes(halves, train={"steps": 6}, mesh={"data": 2})  # and on another mesh
    loop.train(rest, rest)
    resumed, whole = _losses(rest), _losses(straight)
    assert sorted(resumed) == sorted(whole) == [1, 2, 3, 4, 5, 6]
    assert [resumed[s] for s in (1, 2, 3, 4)] == [whole[s] for s in (1, 2, 3, 4)]
    np.testing.assert_allclose([resumed[5], resumed[6]], [whole[5], whole[6]], rtol=1e-6)


def test_moments_on_the_host_are_saved_and_restored(config, tmp_path):
    loop.train(config)
    there = with_changes(config, train={"output": str(tmp_path / "offloaded"), "steps": 3}, optimizer={"offload": True})
    loop.train(there)
    loop.train(with_changes(there, train={"steps": 5}))
    loop.train(with_changes(there, train={"steps": 6}, optimizer={"offload": False}))
    offloaded, whole = _losses(there), _losses(config)
    np.testing.assert_allclose([offloaded[s] for s in whole], list(whole.values()), rtol=1e-6)


def test_a_run_resumed_on_the_same_mesh_has_equal_parameters_to_the_bit(config, tmp_path, mesh):
    loop.train(config)
    for steps in (4, 6):
        loop.train(with_changes(config, train={"output": str(tmp_path / "halves"), "steps": steps}))
    with jax.set_mesh(mesh):
        whole, resumed = (
            open_model(str(path)).load(ComputeConfig("float32", "float32"), mesh)
            for path in (config.train.output, tmp_path / "halves")
        )
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_field_that_an_older_version_did_not_record_does_not_stop_a_resume(config, monkeypatch):
    loop.train(with_changes(config, train={"steps": 4}))
    identity = resolve.Experiment.identity.func
    monkeypatch.setattr(resolve.Experiment, "identity", property(lambda self: identity(self) | {"data.new": 1}))
    assert loop.train(config)["steps"] == 6


def test_batches_do_not_depend_on_devices_or_hosts(config):
    whole = open_pipeline(config.data).batch(3)
    parts = [open_pipeline(config.data).batch(3, slice(2 * host, 2 * host + 2)) for host in range(4)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def test_the_logged_values_are_what_they_were(config):
    """All logged values that do not depend on the machine's speed, of three steps and the final evaluation."""
    config = with_changes(config, train={"steps": 3})
    loop.train(config, config)
    lines = [json.loads(line) for line in (pathlib.Path(config.train.output) / "metrics.jsonl").open()]
    logged = [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
    message = f"the training computes other values; if that is intended, set GOLDEN to\n{logged}"
    assert [line.keys() for line in logged] == [line.keys() for line in GOLDEN], message
    for line, golden in zip(logged, GOLDEN, strict=True):
        np.testing.assert_allclose(list(line.values()), list(golden.values()), rtol=1e-3, err_msg=message)


TIMED = ("tokens_per_second", "tflops_per_second", "mfu", "time", "seconds")
GOLDEN = [
    {"step": 1, "grad_norm": 2.40233, "loss": 5.618843, "skipped_steps": 0, "learning_rate": 0.0003, "tokens": 1024},
    {"step": 2, "grad_norm": 2.32665, "loss": 5.546414, "skipped_steps": 0, "learning_rate": 0.00165, "tokens": 2048},
    {"step": 3, "grad_norm": 2.173279, "loss": 5.313234, "skipped_steps": 0, "learning_rate": 0.003, "tokens": 3072},
]


def test_training_starts_from_a_hugging_face_folder(config, inputs, tmp_path, mesh):
    base = tiny_model_config(num_key_value_heads=1)
    with jax.set_mesh(mesh):
        model = Llama(base, config.compute, jax.random.key(7))
        hf.save(model, str(tmp_path / "base"), inputs["tokenizer"])
    config = dataclasses.replace(config, model=None)
    config = with_changes(
        config, train={"init_from": str(tmp_path / "base"), "steps": 1}, optimizer={"learning_rate": 1e-12}
    )
    loop.train(config, config)
    source = open_model(config.train.output)
    assert source.config.rope.factor == 2.0 and source.config.num_key_value_heads == 1
    with jax.set_mesh(mesh):
        tuned = source.load(config.compute, mesh)
    np.testing.assert_allclose(tuned.embedding[...], model.embedding[...], atol=1e-9)


def test_training_starts_from_a_meta_folder_without_a_conversion(config, inputs, tmp_path, mesh):
    """The first loss is that of the same weights in Hugging Face's form; the window is that of the config."""
    pytest.importorskip("torch")
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), ComputeConfig(), jax.random.key(3))
        hf.save(model, str(tmp_path / "base"), inputs["tokenizer"])
    convert(Convert(str(tmp_path / "base"), str(tmp_path / "meta"), "meta", verify=False))
    for name in ("hf_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "meta" / name).unlink()  # as Meta's own are
    config = with_changes(config, train={"steps": 1})
    ours = with_changes(config, train={"init_from": str(tmp_path / "base"), "output": str(tmp_path / "a")})
    theirs = with_changes(config, train={"init_from": str(tmp_path / "meta"), "output": str(tmp_path / "b")})
    theirs = dataclasses.replace(theirs, model=tiny_model_config(bos_token_id=1, eos_token_id=2))
    loop.train(ours, ours)
    loop.train(theirs, theirs)
    assert _losses(ours) == _losses(theirs)
    assert json.loads((tmp_path / "b" / "model" / "config.json").read_text())["max_sequence_length"] == 64
    assert (tmp_path / "b" / "model" / "tokenizer.json").exists()  # that of the data


@pytest.mark.slow
def test_a_run_exports_while_it_trains(config, tmp_path):
    config = with_changes(config, checkpoint={"every": 4, "export_hf_every": 2})
    loop.train(config, config)
    exports = pathlib.Path(config.train.output) / "hf"
    assert sorted(p.name for p in exports.iterdir()) == ["step-2", "step-4", "step-6"]
    last = json.loads((exports / "step-6" / "config.json").read_text())
    assert last["torch_dtype"] == "bfloat16" and last["rope_scaling"]["factor"] == 2.0
    assert "6 steps of 8 sequences" in (exports / "step-6" / "README.md").read_text()
    assert "vllm serve MODEL --max-model-len 128" in (exports / "step-6" / "README.md").read_text()
    convert(Convert(config.train.output, str(tmp_path / "out"), dtype="bfloat16"))
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (exports / "step-6" / name).read_bytes(), name


@pytest.mark.slow
def test_an_export_that_fails_does_not_end_the_run(config, tmp_path, monkeypatch, capsys):
    config = with_changes(config, train={"steps": 2}, checkpoint={"export_hf_every": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hf").write_text("in the way")
    loop.train(config, config)
    assert "Not exported at step 1" in capsys.readouterr().out and len(_losses(config)) == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"sources": ()}}, "data.sources is empty"),
        ({"data": {"sources": ("nowhere",)}}, "nowhere"),
        ({"data": {"window": 128 * 1024}, "rope": {"factor": 2048.0}}, "longest document"),
        ({"data": {"window": 256}}, "the factor must be at least 4"),
        ({"data": {"batch_size": 6}}, "data.batch_size is 6, which does not divide over 8"),
        ({"model": {"vocab_size": 256}}, "model's vocab_size is 256"),
        ({"train": {"init_from": "nowhere"}}, "nowhere: there is no such folder"),
        ({"mesh": {"data": 3}}, "does not fit 8 devices"),
        ({"compute": {"attention": "cudnn"}}, "implementation is 'cudnn', which runs on an NVIDIA GPU"),
        ({"train": {"output": "/proc/none/run"}}, "/proc/none/run cannot be created"),
        ({"logging": {"wandb_project": "x"}}, "pip install wandb"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(config, sections, message):
    config = with_changes(config, **sections)
    if "wandb" not in message:
        with pytest.raises(InputError, match=message):
            loop.train(config, config)
        assert not (pathlib.Path(config.train.output) / "metrics.jsonl").exists()
    elif not _installed("wandb"):
        with pytest.raises(InputError, match=message):
            loop.train(config, config)


def _installed(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_text_of_another_tokenizer_is_refused(config, inputs, tmp_path, mesh):
    """Same size, other meaning: nothing but the vocabulary itself tells them apart."""
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), config.compute, jax.random.key(0))
        hf.save(model, str(tmp_path / "base"), inputs["tokenizer"])
    file = tmp_path / "base" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    config = with_changes(config, train={"init_from": str(tmp_path / "base")})
    with pytest.raises(InputError, match="another tokenizer.*--tokenizer"):
        loop.train(config, config)


def test_a_model_of_another_shape_than_the_folder_is_refused(config, inputs, tmp_path, mesh):
    with jax.set_mesh(mesh):
        model = Llama(tiny_model_config(), config.compute, jax.random.key(0))
        hf.save(model, str(tmp_path / "base"), inputs["tokenizer"])
    config = with_changes(config, train={"init_from": str(tmp_path / "base")}, model={"hidden_size": 128})
    with pytest.raises(InputError, match="model.hidden_size is 128 but .* has 64"):
        loop.train(config, config)


def test_a_finished_run_stays_as_it_is(config):
    config = with_changes(config, train={"steps": 2})
    first = loop.train(config, config)
    run = pathlib.Path(config.train.output)
    before = {p: p.read_bytes() for p in run.glob("*.json*")}
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert loop.train(config, config) == json.loads((run / "result.json").read_text())
    assert first["final"] == loop.train(config, config)["final"]
    assert {p: p.read_bytes() for p in run.glob("*.json*")} == before


def test_reading_a_run_touches_nothing_in_it(config, mesh):
    """It may be running: a save in flight must survive."""
    config = with_changes(config, train={"steps": 2})
    loop.train(config, config)
    in_flight = pathlib.Path(config.train.output, "checkpoints", "9.orbax-checkpoint-tmp")
    in_flight.mkdir()
    with jax.set_mesh(mesh):
        open_model(config.train.output).load(config.compute, mesh)
    assert in_flight.exists()


def test_resuming_with_other_data_or_model_is_refused(config):
    config = with_changes(config, train={"steps": 2})
    loop.train(config)
    recorded = pathlib.Path(config.train.output, "config.json").read_bytes()
    for sections, changed in (
        ({"data": {"seed": 5}, "rope": {"factor": 4.0}}, "data.seed: 0 -> 5, rope.factor: 2 -> 4"),
        ({"rope": {"kind": "ntk"}}, "rope.kind: linear -> ntk"),
        ({"model": {"rms_norm_eps": 1e-6, "hidden_size": 32}}, "hidden_size: 64 -> 32, model.rms_norm_eps: 1e-05 -> "),
        ({"optimizer": {"moment_dtype": "bfloat16"}}, "optimizer.moment_dtype: float32 -> bfloat16"),
    ):
        with pytest.raises(InputError, match=f"holds checkpoints of a run with other settings .*{changed}.*: restore"):
            loop.train(with_changes(config, **sections))
    with pytest.raises(InputError, match=r"train.steps is 1, but .* is at 2"):
        loop.train(with_changes(config, train={"steps": 1}))
    assert pathlib.Path(config.train.output, "config.json").read_bytes() == recorded


def test_a_resume_with_other_text_or_without_config_json_is_refused_by_its_digest(config, inputs, tmp_path):
    config = with_changes(config, train={"steps": 2})
    loop.train(config)
    pathlib.Path(config.train.output, "config.json").unlink()
    with pytest.raises(InputError, match=r"rope: Linear\(.*factor=2.0\) -> Linear\(.*factor=4.0\)\)"):
        loop.train(with_changes(config, rope={"factor": 4.0}))
    text = str(tmp_path / "other")
    tiny_text(text, first_seed=500)
    store = str(tmp_path / "tokens")
    prepare(Options(input=(text,), tokenizer=inputs["tokenizer"], output=store))
    with pytest.raises(InputError, match=r"data.sources: \[\['\w{12}', 1.0\]\] -> \[\['\w{12}', 1.0\]\]\)"):
        loop.train(with_changes(config, data={"sources": (store,)}))


def test_what_changes_at_a_resume_is_printed_and_earlier_configs_are_kept(config, capsys):
    run = pathlib.Path(config.train.output)
    loop.train(with_changes(config, train={"steps": 2}))
    first = (run / "config.json").read_bytes()
    assert json.loads(first)["first_step"] == 1 and not (run / "configs").exists()
    capsys.readouterr()
    loop.train(with_changes(config, train={"steps": 4}, optimizer={"learning_rate": 1e-3, "max_grad_norm": 0.0}))
    printed = capsys.readouterr().out.split("Changed since the run was last started:\n")[1].splitlines()
    assert printed[:3] == [
        "  optimizer.learning_rate: 0.003 -> 0.001",
        "  optimizer.max_grad_norm: 1 -> 0",
        "  train.steps: 2 -> 4",
    ]
    assert not printed[3].startswith("  ")
    second = (run / "config.json").read_bytes()
    assert json.loads(second)["first_step"] == 3
    for _ in range(2):  # the second time, nothing changed: the run had been interrupted
        loop.train(config)
        (run / "result.json").unlink()
    assert json.loads((run / "config.json").read_bytes())["first_step"] == 5
    assert {p.name: p.read_bytes() for p in (run / "configs").iterdir()} == {"1.json": first, "2.json": second}


@pytest.mark.parametrize(
    ("sections", "reaches"),
    [
        ({"rope": {"factor": 4.0}}, "128 of the window of 256 tokens"),
        ({"rope": {"factor": 32.0}, "data": {"pose_window": 1024}}, "1,024 of the window of 2,048 tokens"),
        ({"rope": {"factor": 4.0}, "data": {"pose_window": 256}}, ""),
        ({}, ""),
    ],
)
def test_a_window_that_is_trained_in_part_is_said(config, sections, reaches, capsys):
    loop.train(with_changes(config, train={"steps": 1}, **sections))
    warnings = capsys.readouterr().err
    assert ("warning: Training sequences reach" in warnings) == bool(reaches) and reaches in warnings


def test_a_hidden_transfer_in_the_loop_is_an_error(config, monkeypatch):
    """A step that reads host memory would wait for it every time."""
    make_step = loop.make_step

    def leaky(optimizer):
        step = make_step(optimizer)
        return lambda state, batch: step(state, batch | {"loss_weights": np.asarray(batch["loss_weights"])})

    monkeypatch.setattr(loop, "make_step", leaky)
    with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
        loop.train(config)


def test_steps_are_profiled_on_request(config, tmp_path, capsys):
    loop.train(with_changes(config, profile={"steps": "2:3"}))
    folder = pathlib.Path(config.train.output) / "profile"
    assert len(list(folder.rglob("*.xplane.pb"))) == 1
    assert f"Profile of steps 2 to 3: {folder}" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"profile.steps is '3:2': it must be FIRST:LAST"):
        ProfileConfig(steps="3:2")


@pytest.mark.parametrize(("steps", "warned"), [("1:2", True), ("2:4", True), ("5:9", True), ("3:3", False)])
def test_a_profile_of_steps_that_the_run_does_not_have_is_a_warning(config, steps, warned, capsys):
    loop.train(with_changes(config, train={"steps": 2}))
    loop.train(with_changes(config, train={"steps": 4}, profile={"steps": steps}))
    message = f"profile.steps is '{steps}', but this run has the steps 3 to 4: nothing is traced"
    assert (message in capsys.readouterr().err) == warned
    assert pathlib.Path(config.train.output, "profile").exists() == (not warned)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    config = with_changes(config, optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0})
    with pytest.raises(FloatingPointError):
        loop.train(config, config)


def test_bad_input_on_the_command_line_is_one_sentence_and_status_2(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pi_jax.train", "--config", str(ROOT / "configs" / "smollm2_16k.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: smollm2/model: there is no such folder")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_every_config_can_be_smoked(file, tmp_path, monkeypatch):
    """On any number of local devices, whatever cluster the config is for."""
    monkeypatch.chdir(tmp_path)
    resolve.resolve(smoke(load_config(str(file))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "7b_32k", "7b_8k_direct", "llama3_8b_128k"])  # one of each kind
def test_configs_run_in_miniature(name, tmp_path, monkeypatch):
    file = ROOT / "configs" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    train_main(["--config", str(file), "--smoke"])
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["steps"] == 8


def test_runs_that_start_at_once_share_the_built_in_inputs(tmp_path, monkeypatch):
    """Another process finishes while this one is making its own."""
    make, folder = tiny._make_inputs, tmp_path / "inputs"

    def make_with_company(ours):
        make(ours)
        make(folder)

    monkeypatch.setattr(tiny, "_make_inputs", make_with_company)
    assert pathlib.Path(tiny.tiny_inputs(folder)["model"], "config.json").exists()
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.setattr(tiny, "_make_inputs", lambda ours: ours.mkdir())
    (folder / "model").rename(folder / "lost")
    with pytest.raises(InputError, match="inputs is not empty, but has no tiny model: remove the folder"):
        tiny.tiny_inputs(folder)


def test_smoke_runs_every_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_main(
        ["--config", str(ROOT / "configs" / "smollm2_16k.py"), "--smoke", "--mesh.context", "2", "--mesh.tensor", "2"]
    )
    (file,) = tmp_path.glob("runs/smollm2-16k-smoke-*/result.json")
    result = json.loads(file.read_text())
    assert [r["window"] for r in result["perplexity"]] == [64, 128]
