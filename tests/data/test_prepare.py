"""Preparing: what stands in the store is each document's own tokens, however they were batched or stored."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

from pi_jax.data import prepare as prepare_module
from pi_jax.data.prepare import Options, main, prepare
from pi_jax.data.store import TokenStore
from pi_jax.data.tokenizer import TokenizerInfo, encode, load_tokenizer
from pi_jax.errors import InputError

TEXTS = [f"Document {i}: " + "long text, naïve café. " * (7 * i % 23) for i in range(40)]


def save_tokenizer(folder, special=True, truncate=False):
    """A byte-level BPE tokenizer; it has merges, so cutting a text in two would change its tokens."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
        special_tokens=["<s>", "</s>"],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # as LLaMA's: BOS comes by itself where special tokens are not turned off
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    if truncate:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=4)
    names = {"bos_token": "<s>", "eos_token": "</s>"} if special else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **names).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents_of(path):
    store = TokenStore.open(str(path))
    return [store.read(*span).tolist() for span in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


@pytest.mark.parametrize("batch_characters", [1, 3000, 2**24])
def test_tokenizing_in_batches_equals_one_by_one(tmp_path, tokenizer_dir, monkeypatch, batch_characters):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", batch_characters)
    prepare(Options((write_jsonl(tmp_path / "a.jsonl"),), tokenizer_dir, str(tmp_path / "s")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    want = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in TEXTS]
    assert documents_of(tmp_path / "s") == want


def test_white_space_is_not_in_the_store(tmp_path, tokenizer_dir):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", " ", "", "\n\t\u3000\n", " two "])
    summary = prepare(Options((source,), tokenizer_dir, str(tmp_path / "s")))
    assert (summary.documents, summary.empty_documents) == (2, 3)
    assert [load_tokenizer(tokenizer_dir).decode(d) for d in documents_of(tmp_path / "s")] == ["one</s>", " two </s>"]
    assert summary.characters_per_token == pytest.approx(8 / (summary.tokens - 2))


def test_what_was_read_and_what_was_skipped_is_said(tmp_path, tokenizer_dir, capsys):
    """A folder as it was downloaded: nothing in it is left out or taken in silently."""
    folder, file = tmp_path / "in", tmp_path / "in/c4-train.00000-of-01024.json.gz"
    folder.mkdir()
    file.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (folder / "a.txt").write_text("three")
    (folder / "again.txt").symlink_to("a.txt")
    for name in ("LICENSE.txt", "paper.pdf"):
        (folder / name).write_text(name)
    main(["--input", str(folder), str(file), "--tokenizer", tokenizer_dir, "--output", str(tmp_path / "s")])
    said = capsys.readouterr()
    assert documents_of(tmp_path / "s") == [[*encode_one(tokenizer_dir, text), 1] for text in ("three", "one", "two")]
    assert "Tokenized 1 .txt and 1 .json.gz in " in said.out
    assert said.err.startswith(f"warning: skipped in {folder}: 1 LICENSE.txt, 1 .pdf\n")
    assert said.err.count("warning") == 1


def encode_one(tokenizer_dir, text):
    return load_tokenizer(tokenizer_dir)(text, add_special_tokens=False)["input_ids"]


def test_every_format_makes_the_same_store(tmp_path, tokenizer_dir):
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{i:03}.txt").write_text(text)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    digests = set()
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    for source in (tmp_path / "txt", tmp_path / "a.parquet", write_jsonl(tmp_path / "a.jsonl"), tmp_path / "a.json"):
        prepare(Options((str(source),), tokenizer_dir, str(tmp_path / "s"), overwrite=True))
        digests.add(TokenStore.open(str(tmp_path / "s")).manifest["sha256"])
    assert len(digests) == 1


@pytest.mark.parametrize("bos, eos", [(False, False), (False, True), (True, False), (True, True)])
def test_bos_and_eos(tmp_path, tokenizer_dir, bos, eos):
    options = Options((write_jsonl(tmp_path / "a.jsonl"),), tokenizer_dir, str(tmp_path / "s"), bos=bos, eos=eos)
    prepare(options)
    tokenizer = load_tokenizer(tokenizer_dir)
    for text, tokens in zip(TEXTS, documents_of(tmp_path / "s"), strict=True):
        assert tokenizer.decode(tokens) == "<s>" * bos + text + "</s>" * eos
    manifest = TokenStore.open(str(tmp_path / "s")).manifest
    assert (manifest["bos"], manifest["eos"]) == ([0] * bos, [1] * eos)


def test_long_text_is_neither_cut_nor_warned_about(tmp_path, caplog):
    """model_max_length is 8, and this tokenizer.json asks for truncation and padding to 4."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "t", truncate=True))
    long, empty, short = encode(tokenizer, ["word " * 500, "", "a"], bos=False, eos=True)
    assert tokenizer.decode(long) == "word " * 500 + "</s>"
    assert len(empty) == 0
    assert len(short) == 2
    assert not caplog.records


def test_store_facts_and_summary(tmp_path, tokenizer_dir, capsys):
    texts = ["a" * 10, "", "bcd", "é" * 40]
    source, report = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out/report.json"
    argv = [
        "--input",
        source,
        "--tokenizer",
        tokenizer_dir,
        "--output",
        str(tmp_path / "s"),
        "--report",
        str(report),
    ]
    main([*argv, "--window", "40"])
    lengths = [len(tokens) for tokens in documents_of(tmp_path / "s")]
    summary = json.loads(report.read_text())
    assert len(lengths) == summary["documents"] == 3
    assert summary["files"] == {".jsonl": 1}
    assert summary["empty_documents"] == 1
    assert summary["tokens"] == sum(lengths)
    assert summary["characters_per_token"] == pytest.approx(53 / (sum(lengths) - 3))
    assert summary["median_length"] == np.median(lengths)
    assert summary["longest"] == max(lengths) >= 40
    assert summary["long_documents"] == 1
    assert summary["long_tokens_share"] == pytest.approx(max(lengths) / sum(lengths))
    assert sum(entry["documents"] for entry in summary["length_histogram"].values()) == 3
    printed = capsys.readouterr().out
    assert "3 documents" in printed
    assert "Skipped: 1 empty documents" in printed
    assert "Documents that fill a window of 40: 1, with" in printed

    manifest = TokenStore.open(str(tmp_path / "s")).manifest
    assert manifest["sources"] == [{"name": source, "files": 1, "bytes": len((tmp_path / "a.jsonl").read_bytes())}]
    vocab = load_tokenizer(tokenizer_dir).get_vocab()
    assert manifest["tokenizer"]["vocab_hash"] == TokenizerInfo.of("", vocab).vocab_hash
    assert manifest["tokenizer"]["vocab_size"] == 300
    copy = load_tokenizer(TokenStore.open(str(tmp_path / "s")).tokenizer_dir)
    assert copy.get_vocab() == vocab
    assert copy.eos_token_id == 1

    main([*argv, "--overwrite", "--window", str(max(lengths))])
    assert f"Documents that fill a window of {max(lengths)}: 1, with" in capsys.readouterr().out
    main([*argv, "--overwrite", "--window", str(max(lengths) + 1)])
    assert f"No document fills a window of {max(lengths) + 1} tokens" in capsys.readouterr().out


def failing(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return " ".join(shown.replace("│", " ").split())


def test_error_sentences(tmp_path, tokenizer_dir, capsys):
    good = write_jsonl(tmp_path / "a.jsonl")
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    plain = save_tokenizer(tmp_path / "plain", special=False)
    before = sorted(p.name for p in tmp_path.iterdir())

    def error(source=good, tokenizer=tokenizer_dir, *more):
        words = ["--input", *source.split(), "--tokenizer", tokenizer, "--output", str(tmp_path / "s"), *more]
        return failing(words, capsys)

    assert "--input is empty: it needs at least one" in error("")
    assert "no.txt: there is no such file" in error(f"{good} {tmp_path}/no.txt")
    assert "has no field 'body': its fields are 'text'" in error(good, tokenizer_dir, "--text-field", "body")
    assert f"--input {empty} contains no text, only 2 empty documents" in error(empty)
    assert error(str(tmp_path / "nothing.jsonl")).endswith("nothing.jsonl contains no text")
    assert "--window is 0: it must be positive" in error(good, tokenizer_dir, "--window", "0")
    assert "no/such: there is no such folder" in error(good, "no/such")
    assert "broken cannot be loaded" in error(good, str(tmp_path / "broken"))
    assert "plain has no EOS token: use --no-eos" in error(good, plain)
    assert "plain has no BOS token: use --no-bos" in error(good, plain, "--no-eos", "--bos")
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "a failure left something behind"


def test_half_way_through_a_bad_line_the_store_is_not_there(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 1)
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(InputError, match="line 2"):
        prepare(Options((str(tmp_path / "a.jsonl"),), tokenizer_dir, str(tmp_path / "s")))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_cut_wrapped_and_left_out_of_the_loss(tmp_path, tokenizer_dir, ending, bos):
    """Rows of a run that masks prompts weigh exactly the summaries' tokens and their EOS."""
    from pi_jax.config import DataConfig
    from pi_jax.data.pipeline import open_pipeline

    records = [{"report": "long report. " * (9 + i), "summary": f"short {i}. " * (1 + 3 * i)} for i in range(5)]
    file = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), file)
    prepare(
        Options(
            input=(str(file),),
            tokenizer=tokenizer_dir,
            output=str(tmp_path / "store"),
            text_field="summary",
            prompt_field="report",
            prompt_template="Read: {} Sum up:",
            max_prompt_tokens=12,
            max_text_tokens=7,
            bos=bos,
        )
    )
    tokenizer = load_tokenizer(tokenizer_dir)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [[0] * bos + ids("Read: ") + ids(r["report"])[:12] + ids(" Sum up:") for r in records]
    summaries = [ids(r["summary"])[:7] + [1] for r in records]
    store = TokenStore.open(str(tmp_path / "store"))
    assert documents_of(tmp_path / "store") == [p + s for p, s in zip(prompts, summaries, strict=True)]
    assert store.prompts.tolist() == [len(p) for p in prompts]
    for packing in ("document", "joined"):
        config = DataConfig(
            sources=(store.path,),
            window=32,
            batch_size=1,
            packing=packing,
            mask_prompts=True,
            require_long_documents=False,
        )
        pipeline = open_pipeline(config)
        batches = [pipeline.batch(step) for step in range(pipeline.num_sequences)]
        weighed = [int(t) for b in batches for t, w in zip(b["targets"][0], b["loss_weights"][0], strict=True) if w]
        expected = [t for s in summaries for t in s]
        if packing == "joined":  # the last, incomplete row is dropped
            stream = []
            for p, own in zip(prompts, summaries, strict=True):
                stream += [(t, False) for t in p] + [(t, True) for t in own]
            expected = [t for t, kept in stream[1 : 32 * pipeline.num_sequences + 1] if kept]
        assert sorted(weighed) == sorted(expected)
        assert {float(w) for b in batches for w in b["loss_weights"][0]} == {0.0, 1.0}


def test_what_prompts_need(tmp_path, tokenizer_dir, capsys):
    from pi_jax.config import DataConfig
    from pi_jax.data.pipeline import open_pipeline

    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("text")
    base = ["--tokenizer", tokenizer_dir, "--output", str(tmp_path / "store"), "--prompt-field", "report"]
    assert "line 1 has no field 'report'" in failing(["--input", str(tmp_path / "a.jsonl"), *base], capsys)
    assert "a .txt file has no field 'report'" in failing(["--input", str(tmp_path / "a.txt"), *base], capsys)
    told = failing(["--input", str(tmp_path / "a.jsonl"), *base, "--prompt-template", "none"], capsys)
    assert "the prompt template is 'none': it must contain {} once" in told
    prepare(Options(input=(str(tmp_path / "a.jsonl"),), tokenizer=tokenizer_dir, output=str(tmp_path / "store")))
    config = DataConfig(sources=(str(tmp_path / "store"),), window=32, mask_prompts=True, require_long_documents=False)
    with pytest.raises(InputError, match="has a prompt: prepare it with --prompt-field"):
        open_pipeline(config)
