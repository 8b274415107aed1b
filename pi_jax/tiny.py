"""A tiny model, tokenizer and text, made on the spot: for tests, docs and `--smoke`, with nothing to download."""

import getpass
import json
import pathlib
import random
import tempfile

from pi_jax import __version__
from pi_jax.config import ModelConfig
from pi_jax.errors import InputError
from pi_jax.rope import Default, Scaling

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
VOCABULARY = 256 + len(SPECIAL)


def tiny_model_config(scaling: Scaling = Default(), **changes) -> ModelConfig:
    """A LLaMA of some hundred thousand parameters with a 64-token window, for `tiny_tokenizer`."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope": scaling,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return ModelConfig(**(sizes | changes))


def tiny_tokenizer(folder: str | pathlib.Path) -> None:
    """Saves a tokenizer whose tokens are the 256 bytes and four special tokens, in Hugging Face files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")


def story(seed: int, sentences: int = 120) -> str:
    """A long text whose names come back far apart: later sentences repeat what earlier ones said."""
    rng = random.Random(seed)
    names = rng.sample("Ada Ben Cleo Dora Emil Fay Gus Hana Ivo Jana Kurt Lea Max Nora Otto Pia".split(), 4)
    things = {name: rng.choice("lamp key map drum boat ring book coin".split()) for name in names}
    places = {name: rng.choice("hill lake barn mill cave inn dock well".split()) for name in names}
    lines = [f"{name} keeps the {things[name]} at the {places[name]}." for name in names]
    for _ in range(sentences):
        name, other = rng.sample(names, 2)
        lines.append(
            rng.choice(
                (
                    f"{name} takes the {things[name]} from the {places[name]}.",
                    f"{other} asks {name} for the {things[name]}.",
                    f"At the {places[other]} {other} looks for the {things[other]}.",
                    f"{name} and {other} walk from the {places[name]} to the {places[other]}.",
                )
            )
        )
    return "\n".join(lines) + "\n"


def tiny_text(folder: str | pathlib.Path, documents: int = 24, first_seed: int = 0) -> None:
    """Writes `documents` stories as .txt files."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + documents):
        (folder / f"story-{seed:03d}.txt").write_text(story(seed))


def tiny_inputs(folder: str | pathlib.Path | None = None) -> dict[str, str]:
    """Makes what `builtin:tiny` stands for: a random model, its tokenizer, text and its token store, held-out text.

    Args:
      folder: where; None: a folder of this user's among the temporary ones, made once.

    Returns:
      The paths, by "model", "tokenizer", "tokens" and "heldout".

    Raises:
      InputError: if there are other files in the folder.
    """
    folder = pathlib.Path(folder or f"{tempfile.gettempdir()}/pi_jax-{__version__}-{getpass.getuser()}")
    paths = _paths(folder)
    if not paths["model"].exists():
        # Several runs may start at once, so each makes its own and only the first to finish keeps them.
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as new:
            _make_inputs(pathlib.Path(new, "inputs"))
            try:
                pathlib.Path(new, "inputs").rename(folder)
            except OSError:
                if not paths["model"].exists():
                    raise InputError(f"{folder} is not empty, but has no tiny model: remove the folder") from None
    return {name: str(path) for name, path in paths.items()}


def _paths(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {name: folder / name for name in ("model", "tokenizer", "tokens", "heldout")}


def _make_inputs(folder: pathlib.Path) -> None:
    import jax

    from pi_jax.config import ComputeConfig, MeshConfig
    from pi_jax.convert.formats import hf
    from pi_jax.data.prepare import Options, prepare
    from pi_jax.model import Llama
    from pi_jax.parallel import sharding

    paths = _paths(folder)
    tiny_tokenizer(paths["tokenizer"])
    tiny_text(folder / "text", documents=64)
    tiny_text(paths["heldout"], documents=3, first_seed=1000)
    text, tokenizer, tokens = str(folder / "text"), str(paths["tokenizer"]), str(paths["tokens"])
    prepare(Options(input=(text,), tokenizer=tokenizer, output=tokens))
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        hf.save(Llama(tiny_model_config(), ComputeConfig(), jax.random.key(0)), str(paths["model"]), tokenizer)
