"""Model and tokenizer folders as people have them: ambiguous, incomplete, or with more than one end."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

from pi_jax import log, tiny
from pi_jax.config import ComputeConfig, MeshConfig
from pi_jax.convert import __main__ as convert
from pi_jax.convert.formats import hf
from pi_jax.convert.open import open_model
from pi_jax.convert.verify import logits
from pi_jax.data import prepare
from pi_jax.data.store import TokenStore
from pi_jax.data.tokenizer import encode_prompt, load_tokenizer, special_tokens
from pi_jax.errors import InputError
from pi_jax.evaluate import passkey
from pi_jax.evaluate.loaded import LoadedModel
from pi_jax.evaluate.perplexity import command as perplexity
from pi_jax.generate import stop_tokens
from pi_jax.parallel import placement, sharding
from pi_jax.rope import Default, Linear

TOKENS = list(range(3, 60))


def make(folder, **changes):
    """A model made by transformers, with the tiny tokenizer."""
    sizes = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    torch.manual_seed(changes.pop("seed", 0))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)  # logits far from zero
    model.save_pretrained(folder)
    tiny.tiny_tokenizer(folder)
    return folder


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if v is not ...}))


def edit_weights(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def ours(folder):
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    compute = ComputeConfig(dtype="float32", remat="none", attention="reference")
    tokens = np.asarray(TOKENS, np.int32)[None]
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        model = open_model(str(folder)).load(compute, mesh)
        placed = placement.put_batch(
            mesh, {"tokens": tokens, "positions": np.arange(len(TOKENS), dtype=np.int32)[None]}
        )
        return np.asarray(model.logits(model(placed["tokens"], placed["positions"])))[0]


def theirs(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)[None]).logits[0].numpy()


@pytest.fixture(autouse=True)
def every_note():
    """Prints notes again that an earlier test has caused."""
    log.note.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "model")


@pytest.mark.parametrize("own", [True, False], ids=["own head", "copy"])
def test_a_head_beside_a_tied_embedding(own, folder, tmp_path, capsys):
    edit(folder / "config.json", tie_word_embeddings=True)
    if not own:
        edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert open_model(str(folder)).config.tie_word_embeddings is not own
    assert ("lm_head.weight differs" in capsys.readouterr().err) is own
    assert np.abs(ours(folder) - theirs(folder)).max() < 1e-3
    convert.convert(convert.Convert(str(folder), str(tmp_path / "out")), quiet=True)
    assert "of source and target" in capsys.readouterr().out
    assert np.abs(theirs(tmp_path / "out") - theirs(folder)).max() < 1e-3


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_a_reader_that_drops_the_head_is_caught(whole, folder, tmp_path, monkeypatch):
    """The control of the proof: it compares with what transformers makes of the source, not with our own reading."""
    edit(folder / "config.json", tie_word_embeddings=True)
    monkeypatch.setattr(hf, "open_config", lambda folder, window=0: hf.read_config(folder))
    if not whole:
        monkeypatch.setattr(logits, "_WHOLE", 0)
    with pytest.raises(InputError, match="the logits of transformers and pi_jax differ"):
        convert.convert(convert.Convert(str(folder), str(tmp_path / "out")), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["meta", "orbax"])
def test_the_proof_of_other_formats_reads_the_source_by_itself(format, folder, tmp_path, monkeypatch):
    edit(folder / "config.json", tie_word_embeddings=True)
    monkeypatch.setattr(hf, "open_config", lambda folder, window=0: hf.read_config(folder))
    with pytest.raises(InputError, match="the logits of transformers and pi_jax differ"):
        convert.convert(convert.Convert(str(folder), str(tmp_path / "out"), format=format), quiet=True)


def test_one_file_and_an_index_of_others(folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(make(tmp_path / "new", seed=1))
    model.save_pretrained(folder, max_shard_size="100KB")
    shutil.copy(tmp_path / "new" / "model.safetensors", folder)
    with pytest.raises(InputError, match=r"contains model.safetensors and model.safetensors.index.json"):
        open_model(str(folder))
    (folder / "model.safetensors").unlink()
    assert np.abs(ours(folder) - theirs(tmp_path / "new")).max() < 1e-3


def test_an_index_of_the_one_file_is_not_ambiguous(folder):
    names = safetensors.numpy.load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.abs(ours(folder) - theirs(folder)).max() < 1e-3


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter_config.json, an adapter beside the weights: merge it"):
        open_model(str(folder))


def test_end_tokens_of_generation_config(folder, tmp_path, capsys):
    edit(folder / "generation_config.json", eos_token_id=[257, 65])
    loaded = LoadedModel.open(str(folder))
    assert stop_tokens(loaded.config, loaded.tokenizer) == (65, 257)
    assert "generation_config.json [257, 65]" in capsys.readouterr().err.replace("(257, 65)", "[257, 65]")
    convert.convert(convert.Convert(str(folder), str(tmp_path / "out")), quiet=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [257, 65]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [257, 65]


def test_generation_stops_where_transformers_does(folder):
    prompt = encode_prompt(load_tokenizer(str(folder)), "Who are you?")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 20, "do_sample": False}
    free = model.generate(torch.tensor([prompt]), eos_token_id=None, **options)[0, len(prompt) :].tolist()
    end = next(t for i, t in enumerate(free) if i >= 4 and free.index(t) == i)
    edit(folder / "generation_config.json", eos_token_id=[257, end])
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    loaded = LoadedModel.open(str(folder))
    stops = stop_tokens(loaded.config, loaded.tokenizer)
    (found,) = loaded.generator(64)([prompt], 20, stop_tokens=stops)
    assert expected[-1] == end and list(found) in (expected, expected[:-1])


def test_the_tokenizers_bos_counts(folder, capsys):
    edit(folder / "config.json", bos_token_id=1)
    assert LoadedModel.open(str(folder)).bos == 256
    assert "bos_token_id is 1 in config.json, but the tokenizer's BOS is 256" in capsys.readouterr().err
    edit(folder / "tokenizer_config.json", bos_token=...)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no BOS token"):
        _ = LoadedModel.open(str(folder)).bos


@pytest.fixture
def padded(folder):
    """Llama 2: the tokenizer has a <pad> for which the model has no embedding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_beyond_the_vocabulary(padded, tmp_path):
    loaded = LoadedModel.open(str(padded))
    assert len(loaded.tokenizer) == 261 and loaded.generate("Ada keeps", 2) is not None
    with pytest.raises(InputError, match=r"the text 'a<PAD>' contains token 260 \('<PAD>'\)"):
        loaded.generate("a<PAD>", 2)
    (tmp_path / "good.txt").write_text("Ada keeps the keys. " * 20)
    (tmp_path / "bad.txt").write_text("Ada <PAD> keys")
    perplexity.read_tokens([str(tmp_path / "good.txt")], str(padded), 260, None)
    with pytest.raises(InputError, match=r"bad.txt contains token 260 \('<PAD>'\)"):
        perplexity.read_tokens([str(tmp_path / "bad.txt")], str(padded), 260, None)
    for name, largest in (("good", 259), ("bad", 260)):
        options = prepare.Options((str(tmp_path / f"{name}.txt"),), str(padded), str(tmp_path / name))
        prepare.prepare(options)
        store = TokenStore.open(str(tmp_path / name))
        assert store.tokenizer.vocab_size == 261
        assert (store.largest_token >= 260) is (name == "bad") and store.largest_token <= largest


@pytest.mark.parametrize(
    ("changes", "limit", "expected", "assumed"),
    [
        ({"max_position_embeddings": 512}, 2048, (2048, 512), False),  # LongLoRA: left at the base window
        ({"max_position_embeddings": 512}, 1 << 70, (2048, 512), True),
        ({"max_position_embeddings": 512, "max_sequence_length": 2048}, None, (2048, 512), False),  # Vicuna
        ({"max_position_embeddings": 2048}, 2048, (2048, 512), False),
        ({"max_position_embeddings": 16384}, None, (16384, 4096), True),  # Together: Llama 2, already extended
        ({"max_position_embeddings": 8192}, None, (8192, 2048), True),
        ({"max_position_embeddings": 4096}, None, (16384, 4096), True),
        ({"max_position_embeddings": 8192, "rope_theta": 5e5}, None, (32768, 8192), True),  # Llama 3
        ({"max_position_embeddings": 2048, "original_max_position_embeddings": 512}, None, (2048, 512), False),
        ({"max_position_embeddings": 512, "original_max_position_embeddings": 512}, None, (2048, 512), False),
    ],
)
def test_the_window_of_linear_scaling(changes, limit, expected, assumed, folder, capsys):
    scaling = {"type": "linear", "factor": 4.0}
    edit(folder / "config.json", **({"rope_theta": 1e4} | changes), rope_scaling=scaling, rope_parameters=...)
    edit(folder / "tokenizer_config.json", model_max_length=limit)
    config = open_model(str(folder)).config
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == expected
    assert ("tokens are assumed" in capsys.readouterr().err) is assumed


def test_a_window_can_be_stated(folder, tmp_path):
    def window(source, **options):
        convert.convert(convert.Convert(str(source), str(tmp_path / "out"), **options), quiet=True)
        config = open_model(str(tmp_path / "out")).config
        settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        shutil.rmtree(tmp_path / "out")
        return config.max_position_embeddings, config.original_max_position_embeddings, settings["model_max_length"]

    assert window(folder, max_position_embeddings=512) == (512, None, 512)
    edit(folder / "config.json", rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=..., rope_theta=1e4)
    assert window(folder, max_position_embeddings=128) == (128, 32, 128)
    with pytest.raises(InputError, match="--max-position-embeddings is -1"):
        window(folder, max_position_embeddings=-1)


def test_end_tokens_can_be_stated(folder, tmp_path):
    convert.convert(convert.Convert(str(folder), str(tmp_path / "out"), eos=(65, 66)), quiet=True)
    assert open_model(str(tmp_path / "out")).config.eos_token_id == (257, 65, 66)
    with pytest.raises(InputError, match="eos is 999: tokens must be below vocab_size, 260"):
        convert.convert(convert.Convert(str(folder), str(tmp_path / "no"), eos=(999,)), quiet=True)
    convert.convert(convert.Convert(str(folder), str(tmp_path / "meta"), format="meta"), quiet=True)
    (tmp_path / "meta" / "hf_config.json").unlink()
    assert open_model(str(tmp_path / "meta"), eos=(65,)).config.eos_token_id == 65


@pytest.mark.parametrize(
    "name",
    ["attention_bias", "mlp_bias", "sliding_window", "rope_scaling", "head_dim", "num_key_value_heads"]
    + ["tie_word_embeddings", "partial_rotary_factor", "quantization_config"],
)
def test_null_means_the_default(name, folder):
    before = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **{name: None})
    config = open_model(str(folder)).config
    expected = hf.read_config(str(make(folder.parent / "same")))
    if name == "num_key_value_heads":
        expected = dataclasses.replace(expected, num_key_value_heads=before["num_attention_heads"])
    assert config == expected


def template(folder):
    """A tokenizer that puts BOS before and EOS behind each text, and truncates and pads."""
    tiny.tiny_tokenizer(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [("<s>", 256), ("</s>", 257)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_a_tokenizer_that_appends_eos(tmp_path):
    tokenizer = template(tmp_path)
    text = "Twelve bytes"
    own = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_prompt(tokenizer, text) == [256, *own] == encode_prompt(tokenizer, "<s>" + text)
    assert tokenizer(text)["input_ids"] == [256, *own]
    prompt = passkey.PromptMaker(tokenizer)(600, 12345, distance=300)
    assert len(prompt.tokens) == 600 and prompt.tokens[0] == 256 and 257 not in prompt.tokens
    assert tokenizer.decode(prompt.tokens[600 - prompt.distance :]).startswith("12345")


def _setting(**changes):
    return lambda folder: edit(folder / "tokenizer_config.json", **changes)


def _only_model(content, **changes):
    def change(folder):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(content)
        edit(folder / "tokenizer_config.json", **changes)

    return change


def _custom_code(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\n")


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
ODDITIES = {
    "code of its own": (_custom_code, "names Python code of its own"),
    "empty special tokens": (_setting(bos_token="", unk_token=""), "has an empty bos_token, unk_token"),
    "git lfs": (
        lambda f: (f / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        "tokenizer.json is a Git LFS pointer",
    ),
    "newer kind": (
        lambda f: edit(f / "tokenizer.json", model={"type": "NewModel"}),
        "cannot read its tokenizer.json, which may be newer",
    ),
    "sentencepiece without a class": (_only_model(SENTENCEPIECE, tokenizer_class=...), "decides how spaces are read"),
    "tiktoken": (_only_model(b"IQ== 0\nIg== 1\n"), "is not a sentencepiece model"),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_tokenizers_that_are_refused(case, tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    change, message = ODDITIES[case]
    change(tmp_path)
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


def test_a_sentencepiece_file_needs_its_packages(tmp_path, monkeypatch):
    tiny.tiny_tokenizer(tmp_path)
    _only_model(SENTENCEPIECE, tokenizer_class="LlamaTokenizer")(tmp_path)
    monkeypatch.setattr("pi_jax.data.tokenizer._installed", lambda name: name != "sentencepiece")
    with pytest.raises(InputError, match="install what reads it, pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_an_end_token_outside_the_vocabulary(tmp_path):
    tiny.tiny_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    edit(tmp_path / "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(InputError, match=r"eos_token is '<\|im_end\|>', which .*tokenizer.json does not contain"):
        special_tokens(load_tokenizer(str(tmp_path)), "eos", True)


def test_scalings_stay_what_they_were(folder):
    assert open_model(str(folder)).config.rope == Default(10000.0)
    edit(folder / "config.json", rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=..., rope_theta=1e4)
    assert open_model(str(folder)).config.rope == Linear(10000.0, 4.0)


def test_mistrals_defaults_are_not_ours(folder):
    edit(folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(InputError, match="lacks sliding_window"):
        open_model(str(folder))
    edit(folder / "config.json", sliding_window=None)
    assert open_model(str(folder)).config.num_key_value_heads == 2


def test_special_tokens_of_config(folder):
    (folder / "generation_config.json").unlink()
    for stated, expected in ((..., 2), (None, None), ([], None), (0, 0), ([5], (5,)), ([5, 6], (5, 6))):
        edit(folder / "config.json", eos_token_id=stated)
        assert open_model(str(folder)).config.eos_token_id == expected


def test_a_chat_template_adds_its_own_special_tokens(folder):
    """As in transformers: what the tokenizer would prepend to other prompts is not added to a chat."""
    tokenizer = template(folder)
    loaded = LoadedModel.open(str(folder))
    own = tokenizer.backend_tokenizer.encode("Hi", add_special_tokens=False).ids
    assert loaded.encode_prompt("Hi", chat=True) == own and loaded.encode_prompt("Hi") == [256, *own]
