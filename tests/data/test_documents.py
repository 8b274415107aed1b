"""Documents: every format gives the same texts, files are streamed, every error names its place."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pi_jax.data.documents import Document, find_files, read_documents
from pi_jax.errors import InputError

TEXTS = [
    "plain",
    "",
    "ünïcödé \N{SNOWMAN} 你好",
    "two\r\nlines\n",
    "line\u2028separator",
    '"quoted" \\ tab\t',
    " ",
]


def write(path, texts, field="text"):
    """One file in the format of its ending; .jsonl.zst in two frames, as tools that append make it."""
    lines = [json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts)]
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(texts)), field: texts}), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"".join(lines[:2])) + gzip.compress(b"".join(lines[2:])))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(b"".join(lines[:2])) + zstandard.compress(b"".join(lines[2:])))
    else:
        path.write_bytes(b"".join(lines))
    return str(path)


def texts_of(*args, **kwargs):
    return [document.text for document in read_documents(*args, **kwargs)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".JSONL"])
def test_every_format_gives_the_same_documents(tmp_path, ending):
    file = write(tmp_path / f"a{ending}", TEXTS)
    documents = list(read_documents([file]))
    assert [d.text for d in documents] == TEXTS
    assert [d.name for d in documents] == [f"{file}:{i}" for i in range(1, len(TEXTS) + 1)]
    assert texts_of([write(tmp_path / f"b{ending}", TEXTS, field="body")], text_field="body") == TEXTS


@pytest.mark.parametrize("text", TEXTS)
def test_a_txt_file_is_one_document_as_it_stands(tmp_path, text):
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    assert list(read_documents([str(file)])) == [Document(str(file), text, len(text.encode()))]


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n\n  \n{"text": "three"}')
    documents = list(read_documents([str(tmp_path)]))
    assert [d.text for d in documents] == ["one", "two", "three"]
    assert documents[2].name.endswith("b.jsonl:4")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_file_bytes_add_up_to_the_file(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    write(file, [str(i) * 50 for i in range(3000)])
    sizes = [d.file_bytes for d in read_documents([str(file)])]
    assert sum(sizes) == file.stat().st_size
    assert min(sizes) >= 0


def test_folders_and_globs(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("c.txt", "b/deep/x.jsonl", "b/a.txt", "b/README.md", "weird[1].txt"):
        write(tmp_path / name, ["t"])
    (tmp_path / "b" / "folder.txt").mkdir()  # a folder is no text, whatever its name

    def found(*paths):
        return [file[len(str(tmp_path)) + 1 :] for file in find_files([str(tmp_path / p) for p in paths])]

    assert found(".") == ["b/a.txt", "b/deep/x.jsonl", "c.txt", "weird[1].txt"]
    assert found("c.txt", "b") == ["c.txt", "b/a.txt", "b/deep/x.jsonl"]
    assert found("*.txt") == ["c.txt", "weird[1].txt"]
    assert found("b/**/*.jsonl") == ["b/deep/x.jsonl"]
    assert found("weird[1].txt") == ["weird[1].txt"]


def test_a_parquet_file_of_one_row_group_is_never_held_whole(tmp_path):
    texts = [format(i, "x") * 20000 for i in range(1000, 1400)]  # 24 MB
    as_written = {"compression": "none", "use_dictionary": False, "write_batch_size": 8}
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **as_written)
    before, peak = pa.total_allocated_bytes(), 0
    for document, text in zip(read_documents([str(tmp_path / "a.parquet")]), texts, strict=True):
        assert document.text == text
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 12e6


def test_a_bad_line_does_not_stop_those_before_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnot json\n')
    stream = read_documents([str(tmp_path / "a.jsonl")])
    assert [next(stream).text, next(stream).text] == ["one", "two"]
    with pytest.raises(InputError, match="line 3"):
        next(stream)


ERRORS = {
    "missing": (None, "a.txt", "a.txt: there is no such file or folder"),
    "glob": (None, "*.txt", r"\*.txt: no file matches it"),
    "empty folder": (None, "", "this folder contains no .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file"),
    "ending": (b"", "a.pdf", "a.pdf: the extension must be one of .txt, .jsonl"),
    "latin1": (b"caf\xe9", "a.txt", "a.txt is not UTF-8: byte 0xe9 at offset 3"),
    "latin1 line": (b'{}\n{"text": "caf\xe9"}', "a.jsonl", "a.jsonl line 1 has no field"),
    "latin1 later": (
        b'{"text": ""}\n{"text": "caf\xe9"}',
        "a.jsonl",
        "a.jsonl line 2 is not UTF-8: byte 0xe9",
    ),
    "json": (
        b'{"text": ""}\n{"text": "a}\n',
        "a.jsonl",
        "a.jsonl line 2 is not JSON: Invalid control character at column 13",
    ),
    "list": (b'["text"]', "a.jsonl", "line 1 is a JSON list: it must be an object"),
    "field": (b'{"id": 1, "body": ""}', "a.jsonl", "line 1 has no field 'text': its fields are 'id', 'body'"),
    "number": (b'{"text": 17}', "a.jsonl", r"line 1 has 17 \(int\) in field 'text': it must be a string"),
    "null": (b'{"text": null}', "a.jsonl", r"has None \(NoneType\) in field 'text'"),
    "surrogate": (b'{"text": "ab\\ud800"}', "a.jsonl", "line 1 has a lone surrogate at character 2"),
    "not gzip": (b"hello", "a.jsonl.gz", "a.jsonl.gz cannot be read"),
    "not zstd": (b"hello", "a.jsonl.zst", "a.jsonl.zst cannot be read"),
    "cut gzip": (
        gzip.compress(b'{"text": "a"}\n')[:-9],
        "a.jsonl.gz",
        "a.jsonl.gz cannot be read: Truncated",
    ),
    "cut zstd": (
        zstandard.compress(b'{"text": "a"}\n')[:-2],
        "a.jsonl.zst",
        "a.jsonl.zst cannot be read: Truncated",
    ),
    "not parquet": (b"hello", "a.parquet", "a.parquet is not a Parquet file"),
}


@pytest.mark.parametrize("content, path, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_place_and_what_would_be_right(tmp_path, content, path, message):
    if content is not None:
        (tmp_path / path).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents([str(tmp_path / path)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"id": [1], "body": ["a"]}, "a.parquet has no column 'text': its columns are 'id', 'body'"),
        ({"text": ["a", None]}, r"a.parquet row 2 has None \(NoneType\) in field 'text'"),
        ({"text": [1]}, r"a.parquet row 1 has 1 \(int\) in field 'text'"),
        (
            {"text": pa.array([b"ok", b"caf\xe9"]).view(pa.string())},
            "a.parquet row 2 is not UTF-8: byte 0xe9 at offset 3",
        ),
    ],
)
def test_parquet_errors(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        list(read_documents([str(tmp_path / "a.parquet")]))
