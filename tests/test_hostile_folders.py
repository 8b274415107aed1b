"""Model folders made to take something else: files by links, memory by sizes, time by programs."""

import json
import os
import pathlib
import pickle
import shutil
import zipfile

import pytest

from pi_jax import limits, tiny
from pi_jax.convert import __main__ as convert
from pi_jax.convert import model_card
from pi_jax.convert.folders import copy_files
from pi_jax.convert.formats import hf
from pi_jax.convert.open import open_model
from pi_jax.data import prepare
from pi_jax.data.store import TokenStoreWriter
from pi_jax.data.tokenizer import TOKENIZER_FILES, TokenizerInfo, load_tokenizer
from pi_jax.errors import InputError
from pi_jax.evaluate.loaded import LoadedModel
from pi_jax.generate import __main__ as generate

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model in all three forms, with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny.tiny_inputs()["model"], folder / "hf")
    (folder / "hf" / "chat_template.jinja").write_text("{{ bos_token }}[{{ messages[0].content }}]")
    for form, kind in (("meta", "meta"), ("orbax", "run")):
        convert.convert(convert.Convert(str(folder / "hf"), str(folder / kind), form, verify=False), quiet=True)
    return folder


@pytest.fixture
def copied(models, tmp_path):
    def copy(kind):
        return shutil.copytree(models / kind, tmp_path / kind)

    return copy


@pytest.fixture
def folder(copied):
    return copied("hf")


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("{}")
    return tmp_path / "secret"


def edit(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def refused(run, *parts):
    """Checks that the error is one sentence with these parts."""
    with pytest.raises(InputError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message, message


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# Links

LINKED = [
    *(("hf", name) for name in (*TOKENIZER_FILES, "config.json", "generation_config.json", hf._INDEX)),
    *(("meta", name) for name in ("params.json", "hf_config.json", "merges.txt", "tokenizer_config.json")),
    *(("run", f"model/{name}") for name in ("config.json", "merges.txt", "tokenizer.json")),
]


@pytest.mark.parametrize("kind, name", LINKED)
def test_a_link_out_of_the_folder_is_not_read(kind, name, copied, secret, tmp_path):
    link(copied(kind) / name, secret)
    run = convert.Convert(str(tmp_path / kind), str(tmp_path / "out"), verify=False)
    parts = (f"{name} is a link to {secret}, out of its folder: only weights may be such links", "copy the file into")
    refused(lambda: convert.convert(run, quiet=True), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([kind, "secret"])


def test_a_folder_of_files_is_no_link(copied, models):
    folder = copied("run")
    shutil.rmtree(folder / "model")
    (folder / "model").symlink_to(models / "hf")
    refused(lambda: open_model(str(folder)), "run/model is a link to")


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_what_is_copied_is_no_link(name, tmp_path, secret):
    """Whatever was read before."""
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    link(tmp_path / "source" / name, secret)
    refused(lambda: copy_files(tmp_path / "source", tmp_path / "target"), f"{name} is a link to")
    assert not list((tmp_path / "target").iterdir())
    options = {"tokenizer": TokenizerInfo("Toy", 9, "0" * 64), "tokenizer_dir": str(tmp_path / "source")}

    def write():
        with TokenStoreWriter(str(tmp_path / "store"), **options) as writer:
            writer.add([1, 2])

    refused(write, f"{name} is a link to")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "config.json", "additional_chat_templates/more.jinja"])
def test_a_tokenizer_with_a_link_out_of_its_folder(name, folder, secret):
    (folder / name).parent.mkdir(exist_ok=True)
    link(folder / name, secret)
    refused(lambda: load_tokenizer(str(folder)), f"{name} is a link to")


def test_more_templates_elsewhere(folder, tmp_path):
    (folder / "additional_chat_templates").symlink_to(tmp_path)
    refused(lambda: load_tokenizer(str(folder)), "additional_chat_templates is a link to")


@pytest.mark.parametrize("target", ["gone", "merges.txt"])
def test_links_to_nothing(target, folder):
    link(folder / "merges.txt", target)
    refused(lambda: load_tokenizer(str(folder)), f"merges.txt is a link to {target}, which does not exist")


def test_a_link_to_a_file_without_end(folder):
    link(folder / "tokenizer_config.json", "/dev/zero")
    refused(lambda: open_model(str(folder)), "is a link to /dev/zero, out of its folder")
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    refused(lambda: open_model(str(folder)), "tokenizer_config.json is not a regular file")


@pytest.mark.parametrize("kind, name", [("hf", "model.safetensors"), ("meta", "consolidated.00.pth")])
def test_weights_that_are_a_pipe(kind, name, copied):
    folder = copied(kind)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(lambda: open_model(str(folder)), f"{name} is not a regular file: it must be one")


def converts(source, tmp_path):
    convert.convert(convert.Convert(str(source), str(tmp_path / "out"), verify=False), quiet=True)
    prompt = LoadedModel.open(str(tmp_path / "out")).encode_prompt("Ada")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir()) and prompt
    return tmp_path / "out"


def test_weights_may_be_elsewhere(models, copied, tmp_path):
    for kind, name in (("hf", "model.safetensors"), ("meta", "consolidated.00.pth"), ("run", "checkpoints")):
        folder = copied(kind)
        shutil.move(folder / name, tmp_path / "elsewhere")
        link(folder / name, tmp_path / "elsewhere")
        converts(folder, tmp_path)
        for done in ("elsewhere", "out"):
            shutil.rmtree(tmp_path / done, ignore_errors=True)
        (tmp_path / "elsewhere").unlink(missing_ok=True)


def test_links_inside_a_folder_and_to_a_folder(folder, tmp_path):
    (folder / "files").mkdir()
    shutil.move(folder / "tokenizer.json", folder / "files" / "t")
    link(folder / "tokenizer.json", "files/t")
    (tmp_path / "name").symlink_to(folder)
    converts(tmp_path / "name", tmp_path)


@pytest.fixture
def cache(models, tmp_path):
    """The model as huggingface_hub keeps it: links to blobs, named by their hashes."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(p for p in (models / "hf").iterdir() if p.is_file()):
        shutil.copy(file, repository / "blobs" / f"{number:08x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:08x}")
    return snapshot


def test_the_cache_of_the_hub(cache, models, tmp_path):
    out = converts(cache, tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (models / "hf" / name).read_bytes()
    (tmp_path / "name").symlink_to(cache)
    assert open_model(str(tmp_path / "name")).config == open_model(str(models / "hf")).config


def test_links_out_of_the_cache(cache, secret):
    link(cache / "merges.txt", secret)
    refused(lambda: load_tokenizer(str(cache)), "merges.txt is a link to")
    other = cache.parents[2] / "models--someone--else" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(secret, other / "0")
    link(cache / "merges.txt", other / "0")
    refused(lambda: load_tokenizer(str(cache)), "merges.txt is a link to")


# Sizes


def test_json_files(folder, monkeypatch):
    monkeypatch.setattr(limits, "JSON", 1000)
    edit(folder / "generation_config.json", about="x" * 1000)
    refused(
        lambda: open_model(str(folder)), "generation_config.json has 1,", "more than the 1,000", "PI_JAX_LIMITS=2 in"
    )
    monkeypatch.setenv("PI_JAX_LIMITS", "3")
    open_model(str(folder))


def test_a_tokenizer(folder, monkeypatch):
    monkeypatch.setattr(limits, "TOKENIZER", 5000)
    refused(lambda: load_tokenizer(str(folder)), "tokenizer.json has", "more than the 5,000 allowed")
    refused(lambda: copy_files(folder, folder.parent), "tokenizer.json has", "more than the 5,000 allowed")


def test_the_header_of_a_safetensors_file(folder, monkeypatch):
    source = open_model(str(folder))
    monkeypatch.setattr(limits, "JSON", 500)
    refused(source.reader, "the header of", "model.safetensors has 2,", "more than the 500 allowed", "PI_JAX_LIMITS=")


class _Calls:
    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def archive(folder, pickled, **records):
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as file:
        for name, data in ({"data.pkl": pickled, "version": b"3", "byteorder": b"little"} | records).items():
            file.writestr(f"a/{name}", data)


@pytest.mark.parametrize(
    "call, name",
    [
        (_Calls(bytearray, 10**12), r"\w+ bytearray"),
        (_Calls(torch.FloatTensor, 10**12), "torch FloatTensor"),
        (_Calls(torch.UntypedStorage, 10**12), "torch.storage UntypedStorage"),
    ],
    ids=["bytearray", "tensor", "storage"],
)
def test_a_pickle_that_asks_for_memory(call, name, copied):
    """torch's unpickler lets each of these calls happen."""
    folder = copied("meta")
    archive(folder, pickle.dumps({"a": call}, protocol=2))
    with pytest.raises(InputError, match=rf"contains more than plain tensors \({name}\): none of its code was run"):
        open_model(str(folder))


def test_a_pickle_of_many_operations(copied, monkeypatch):
    folder = copied("meta")
    archive(folder, b"\x80\x02](" + b"]" * 100_000 + b"e.")
    monkeypatch.setattr(limits, "PICKLE", 50_000)
    refused(
        lambda: open_model(str(folder)), "its pickle has 60,000 operations, more than the 50,000", "PI_JAX_LIMITS=2"
    )


@pytest.mark.parametrize("name", ["data.pkl", "byteorder"])
def test_records_that_torch_loads_at_once(name, copied, monkeypatch):
    folder = copied("meta")
    archive(folder, pickle.dumps({}, protocol=2), **{name: b"x" * 2000})
    monkeypatch.setattr(limits, "JSON", 1000)
    refused(lambda: open_model(str(folder)), f"the record a/{name} has 2,000 bytes, more than the 1,000 allowed")


CONFIG = {
    "num_attention_heads": (0, -1, True, 4.0, "4", None),
    "num_key_value_heads": (0, -2, True, 2.0, "2"),
    "hidden_size": (0, [64], 10**400 * -1),
    "head_dim": (0, "16"),
    "num_hidden_layers": (0, 10**9, 10_001),
    "vocab_size": (0, {"a": 1}),
    "max_position_embeddings": (0, 2**31, 10**30),
    "original_max_position_embeddings": (-1,),
    "rms_norm_eps": (0, "x", float("nan")),
    "eos_token_id": ({"a": 1}, "x", [[1]], [1.5], True),
    "bos_token_id": ({"a": 1}, "x", [[1]]),
}


@pytest.mark.parametrize("key", CONFIG)
def test_values_of_config_json(key, folder):
    for value in CONFIG[key]:
        edit(folder / "config.json", **{key: value})
        refused(lambda: open_model(str(folder)), "config.json", key)


def test_no_heads_to_divide_by(folder):
    edit(folder / "config.json", num_attention_heads=0, head_dim=...)
    refused(lambda: open_model(str(folder)), "config.json: num_attention_heads is 0: it must be a positive integer")


PARAMS = {
    "n_heads": (0, -1, 4.0, "4", True),
    "dim": (0, 64.0),
    "multiple_of": (0, -256),
    "ffn_dim_multiplier": (float("inf"), "x"),
    "rope_theta": (float("nan"),),
    "n_layers": (0, 10**9, None),
}


@pytest.mark.parametrize("key", PARAMS)
def test_values_of_params_json(key, copied):
    folder = copied("meta")
    (folder / "hf_config.json").unlink()
    for value in PARAMS[key]:
        edit(folder / "params.json", **{key: value})
        part = {None: "lacks n_layers", 10**9: "num_hidden_layers"}.get(value, key)
        refused(lambda: open_model(str(folder)), "params.json", part)


RUNS = [
    ("config.json", {"config": []}),
    ("config.json", {"config": {"data.sources": 7}}),
    ("config.json", {"config": {"data.window": "y"}}),
    ("config.json", {"config": {"optimizer.learning_rate": "x"}}),
    ("result.json", {"steps": 3, "perplexity": 5}),
    ("result.json", {"steps": 3, "perplexity": [5]}),
    ("result.json", {"steps": 3, "perplexity": [{}]}),
    ("result.json", {"steps": 3, "perplexity": [{"window": "x", "perplexity": 1.0}]}),
]


@pytest.mark.parametrize("name, content", RUNS)
def test_what_a_run_says_of_itself(name, content, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}}')
    (tmp_path / name).write_text(json.dumps(content))
    refused(lambda: model_card.facts_of_run(tmp_path, 3), f"{name} has ")


# Tokenizers


def written(folder, **changes):
    edit(folder / "tokenizer.json", **changes)
    return str(folder)


def prepared(folder, text):
    (folder.parent / "text.txt").write_text(text)
    prepare.prepare(prepare.Options((str(folder.parent / "text.txt"),), str(folder), str(folder.parent / "store")))


def test_a_pattern_that_takes_too_many_steps(folder):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = load_tokenizer(written(folder, pre_tokenizer=pattern))
    refused(lambda: prepared(folder, "a" * 40 + "b"), "cannot encode a text: ", "retry-limit")
    refused(lambda: LoadedModel.open(str(folder)).encode_prompt("a" * 40 + "b"), "cannot encode a text: ")
    assert not (folder.parent / "store").exists() and tokenizer


def test_a_text_that_cannot_be_encoded(folder):
    """Such as an argument of the command line that is not UTF-8."""
    refused(lambda: LoadedModel.open(str(folder)).encode_prompt("a\udcffb"), "cannot encode a text: ")
    pieces = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"b": 0}}
    written(folder, model=pieces | {"max_input_chars_per_word": 100})
    refused(lambda: load_tokenizer(str(folder)), "cannot encode a text: WordPiece error")


def test_token_ids_that_do_not_fit(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    written(folder, model=model | {"vocab": model["vocab"] | {"zz": 2**32 - 1}})
    refused(lambda: prepared(folder, "text"), "has the token 'zz' with id 4294967295: ids must be below 2147483648")
    refused(lambda: TokenizerInfo.of("Toy", {}), "the tokenizer, a Toy, has no tokens")


# Options


@pytest.mark.parametrize("field, value", [("seed", 2**63), ("seed", -1), ("temperature", float("nan"))])
def test_numbers_that_cannot_be_used(field, value):
    refused(lambda: generate.Generate(model="x", **{field: value}), f"--{field} is {value}: it must be ")


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 0.0])
def test_sizes_of_files(size, folder, tmp_path):
    run = convert.Convert(str(folder), str(tmp_path / "out"), shard_gb=size)
    refused(lambda: convert.convert(run, quiet=True), f"--shard-gb is {size}: it must be positive")


def test_generate_renders_chats(folder, monkeypatch, capsys):
    args = generate.Generate(model=str(folder), prompt=("Hi",), chat=True, max_new_tokens=2, dtype="float32")
    seen = []
    encode = LoadedModel.encode_prompt
    monkeypatch.setattr(LoadedModel, "encode_prompt", lambda self, *given: seen.append(given) or encode(self, *given))
    generate.generate(args)
    assert seen == [("<s>[Hi]", True)]
    (folder / "chat_template.jinja").unlink()
    refused(lambda: generate.generate(args), "--chat is set, but", "has no chat template")
    pathlib.Path(folder, "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(SystemExit) as exit:
        generate.main(["--model", str(folder), "--prompt", "Hi", "--chat"])
    assert exit.value.code == 2 and "error: the chat template of" in capsys.readouterr().err
