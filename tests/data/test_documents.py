"""Documents: every format gives the same texts, files are streamed, every error names its place."""

import gzip
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pi_jax import limits
from pi_jax.data.documents import Document, read_documents
from pi_jax.data.find import find_files
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
        pq.write_table(pa.table({"id": range(len(texts)), field: texts}), path, write_page_checksum=True)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"".join(lines[:2])) + gzip.compress(b"".join(lines[2:])))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(b"".join(lines[:2])) + zstandard.compress(b"".join(lines[2:])))
    else:
        path.write_bytes(b"".join(lines))
    return str(path)


def texts_of(*args, **kwargs):
    return [document.text for document in read_documents(*args, **kwargs)]


LINES = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst"]


@pytest.mark.parametrize("ending", [*LINES, ".parquet", ".JSONL"])
def test_every_format_gives_the_same_documents(tmp_path, ending):
    file = write(tmp_path / f"a{ending}", TEXTS)
    documents = list(read_documents([file]))
    assert [d.text for d in documents] == TEXTS
    assert [d.name for d in documents] == [f"{file}:{i}" for i in range(1, len(TEXTS) + 1)]
    assert texts_of([write(tmp_path / f"b{ending}", TEXTS, field="body")], text_field="body") == TEXTS


@pytest.mark.parametrize("ending", [".txt", ".md"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_file_is_one_document_as_it_stands(tmp_path, text, ending):
    file = tmp_path / f"a{ending}"
    file.write_bytes(text.encode())
    assert list(read_documents([str(file)])) == [Document(str(file), text, len(text.encode()))]


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path):
    """Joined files have a mark within."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "two"}\n\n  \n' + mark + b'{"text": "three"}\n' + mark)
    (tmp_path / "c.json").write_bytes(mark + b'\n[{"text": "four"}]')
    documents = list(read_documents([str(tmp_path)]))
    assert [d.text for d in documents] == ["one", "two", "three", "four"]
    assert documents[2].name.endswith("b.jsonl:4")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way(tmp_path, ending, end):
    file = tmp_path / f"a{ending}"
    file.write_bytes((json.dumps({"text": "one"}) + end + json.dumps({"text": "two\x0b\x0c\x1c\x85"}) + end).encode())
    found = list(read_documents([str(file)]))
    assert [(d.name, d.text) for d in found] == [(f"{file}:1", "one"), (f"{file}:2", "two\x0b\x0c\x1c\x85")]


RECORDS = [{"text": "one", "n": 1}, {"text": "two", "score": float("nan")}]
JSON = {
    "lines": ("".join(json.dumps(r) + "\n" for r in RECORDS), ["a.json:1", "a.json:2"]),
    "spaces before the first line": (
        "\n  " + json.dumps(RECORDS[0]) + "\n" + json.dumps(RECORDS[1]),
        ["a.json:2", "a.json:3"],
    ),
    "list": (json.dumps(RECORDS), ["a.json:1", "a.json:2"]),
    "indented list": (json.dumps(RECORDS, indent=2), ["a.json:1", "a.json:2"]),
    "list with one object in each line": (
        "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
        ["a.json:1", "a.json:2"],
    ),
    "object": (json.dumps(RECORDS[0]), ["a.json:1"]),
    "indented object": (json.dumps(RECORDS[0], indent=2), ["a.json"]),
    "empty list": ("[]", []),
    "empty": ("", []),
}


@pytest.mark.parametrize("content, names", JSON.values(), ids=JSON)
def test_the_content_of_a_json_file_tells_lines_from_a_list(tmp_path, content, names):
    (tmp_path / "a.json").write_text(content)
    found = list(read_documents([str(tmp_path / "a.json")]))
    assert [d.text for d in found] == ["one", "two"][: len(names)]
    assert [os.path.basename(d.name) for d in found] == names
    assert sum(d.file_bytes for d in found) == (len(content) if names else 0)


def test_c4_as_it_is_named(tmp_path):
    file = tmp_path / "c4-train.00000-of-01024.json.gz"
    file.write_bytes(gzip.compress(b'{"text": "a page", "url": "u"}\n{"text": "another", "url": "v"}\n'))
    assert texts_of([str(tmp_path)]) == ["a page", "another"]


@pytest.mark.parametrize("ending", [*LINES, ".parquet"])
def test_file_bytes_add_up_to_the_file(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    write(file, [str(i) * 50 for i in range(3000)])
    sizes = [d.file_bytes for d in read_documents([str(file)])]
    assert sum(sizes) == file.stat().st_size
    assert min(sizes) >= 0


@pytest.fixture
def found(tmp_path):
    """What `find_files` finds, relative to the folder."""

    def find(*paths):
        return [file[len(str(tmp_path)) + 1 :] for file in find_files([str(tmp_path / p) for p in paths])]

    return find


def test_folders_and_globs(tmp_path, found, monkeypatch):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("c.txt", "b/deep/x.jsonl", "b/a.txt", "weird[1].txt"):
        write(tmp_path / name, ["t"])
    (tmp_path / "b" / "folder.txt").mkdir()  # a folder is no text, whatever its name
    assert found(".") == ["b/a.txt", "b/deep/x.jsonl", "c.txt", "weird[1].txt"]
    assert found("c.txt", "b") == ["c.txt", "b/a.txt", "b/deep/x.jsonl"]
    assert found("*.txt") == ["c.txt", "weird[1].txt"]
    assert found("b/**/*.jsonl") == ["b/deep/x.jsonl"]
    assert found("**/*.txt") == ["b/a.txt", "c.txt", "weird[1].txt"]
    assert found("**/deep/**/x.*") == ["b/deep/x.jsonl"]
    assert found("**") == ["b/a.txt", "b/deep/x.jsonl", "c.txt", "weird[1].txt"]
    assert found("weird[1].txt") == ["weird[1].txt"]
    monkeypatch.chdir(tmp_path)
    assert find_files(["**/*.txt"]) == ["b/a.txt", "c.txt", "weird[1].txt"]


def test_linked_files_and_folders_are_followed_once(tmp_path, found):
    """A download cache consists of links, and datasets are linked into folders."""
    for name in ("in/own.jsonl", "elsewhere/books/b1.jsonl", "elsewhere/books/b2.jsonl", "blobs/0123abcd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}')
    (tmp_path / "in/linked.jsonl").symlink_to("../blobs/0123abcd")
    (tmp_path / "in/twice.jsonl").symlink_to("linked.jsonl")
    (tmp_path / "in/books").symlink_to(tmp_path / "elsewhere/books")
    (tmp_path / "in/same").symlink_to("books")
    (tmp_path / "link").symlink_to("in")
    inside = ["books/b1.jsonl", "books/b2.jsonl", "linked.jsonl", "own.jsonl"]
    assert found("in") == [f"in/{name}" for name in inside]
    assert found("link") == [f"link/{name}" for name in inside]
    assert found("in/own.jsonl", "elsewhere", "link") == [
        *("in/own.jsonl", "elsewhere/books/b1.jsonl", "elsewhere/books/b2.jsonl", "link/linked.jsonl")
    ]
    assert found("in/**/b?.jsonl") == ["in/books/b1.jsonl", "in/books/b2.jsonl"]


@pytest.mark.parametrize("target", [".", "..", "../other"])
def test_links_in_a_circle_end(tmp_path, found, capsys, target):
    for folder in ("in", "other"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", ["t"])
    (tmp_path / "in/one").symlink_to(target)
    (tmp_path / "in/two").symlink_to(target)
    (tmp_path / "other/back").symlink_to("../in")
    wanted = ["in/a.jsonl", "in/one/a.jsonl"] if target == "../other" else ["in/a.jsonl"]
    assert found("in") == found("in/**") == found("in/**/*.jsonl") == wanted
    read_documents([str(tmp_path / "in")])
    warned = "" if target == "../other" else f"warning: skipped in {tmp_path}/in: 2 link to a folder around it\n"
    assert capsys.readouterr().err == warned


def test_a_broken_link_is_named(tmp_path, found, capsys):
    write(tmp_path / "a.jsonl", ["t"])
    (tmp_path / "notes.pdf").symlink_to("gone.pdf")
    assert texts_of([str(tmp_path)]) == ["t"]
    assert f"skipped in {tmp_path}: 1 broken link notes.pdf\n" in capsys.readouterr().err
    for name in ("lost.jsonl", "books"):  # without an extension, it could be a folder of text
        (tmp_path / name).symlink_to("../blobs/gone")
        for path in (".", name, "*o*"):
            with pytest.raises(
                InputError, match=f"{name} is a link to ../blobs/gone, which does not exist: restore it"
            ):
                found(path)
        (tmp_path / name).unlink()


def test_what_is_skipped_in_a_folder_is_counted(tmp_path, capsys):
    names = [
        "a.pdf",
        "b/b.PDF",
        "b/c.pdf",
        "d.csv",
        "e.tar.gz",
        "f",
        ".hidden.txt",
        ".git/x.txt",
        "b/README.md",
        "LICENSE.txt",
    ]
    for name in ("b/text.md", *names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/blob").write_text("linked")
    (tmp_path / "linked.md").symlink_to("b/blob")  # so the blob itself is not skipped
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts_of([str(tmp_path)]) == ["b/text.md", "linked"]
    warned = capsys.readouterr().err.removeprefix(f"warning: skipped in {tmp_path}: ").strip()
    assert sorted(warned.split(", ")) == [
        *("1 .csv", "1 .tar.gz", "1 LICENSE.txt", "1 README.md", "1 pipe.txt", "1 without extension", "2 hidden"),
        "3 .pdf",
    ]
    assert warned.startswith("3 .pdf, 2 hidden, ")
    (tmp_path / "b/text.md").rename(tmp_path / "text.md")
    with pytest.raises(InputError, match="there is no .* or .parquet file in it, only 2 .pdf, "):
        read_documents([str(tmp_path / "b")])
    assert texts_of([str(tmp_path / "[bt]*")]) == ["b/text.md"]
    assert f"warning: skipped in {tmp_path}/b: 2 .pdf, " in capsys.readouterr().err
    assert texts_of([str(tmp_path / "LICENSE.txt"), str(tmp_path / "**/*.md")]) == [
        *("LICENSE.txt", "b/README.md", "linked", "b/text.md")
    ]
    assert capsys.readouterr().err == ""
    for i in range(20):
        (tmp_path / f"x.e{i}").touch()
    read_documents([str(tmp_path)])
    assert capsys.readouterr().err.endswith(" and 18 more kinds\n")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", ["t"])

    def scandir(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        find_files([str(tmp_path)])


POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl.gz", "a.json", "a.parquet"])
def test_git_lfs_pointers_are_refused(tmp_path, found, name):
    (tmp_path / "b.txt").write_text("Git LFS files begin with\n" + POINTER)
    (tmp_path / name).write_bytes(POINTER.replace("\n", "\r\n" if name == "a.md" else "\n").encode())
    for path in (".", name, "a.*"):
        with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
            found(path)
    assert found("b.txt") == ["b.txt"]


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
    "empty folder": (None, "", "there is no .txt, .md, .jsonl, .* or .parquet file in it$"),
    "ending": (b"", "a.pdf", "a.pdf: the extension must be one of .txt, .md, .jsonl"),
    "latin1": (b"caf\xe9", "a.txt", "a.txt is not UTF-8: byte 0xe9 at offset 3"),
    "latin1 line": (b'{}\n{"text": "caf\xe9"}', "a.jsonl", "a.jsonl line 1 has no field"),
    "latin1 later": (
        b'{"text": ""}\n{"text": "caf\xe9"}',
        "a.jsonl",
        "a.jsonl line 2 is not UTF-8: byte 0xe9",
    ),
    "json": (
        b'{"text": ""}\n{"text": "a\tb}\n',
        "a.jsonl",
        "a.jsonl line 2 is not JSON: Invalid control character at column 12; each line must be one complete object",
    ),
    "cut": (b'{"text": ""}\n{"text": "a', "a.jsonl", "line 2 is not JSON: Unterminated string starting at column 10"),
    "two in a line": (
        b'{"text": "a"} {"text": "b"}',
        "a.jsonl",
        "line 1 is not JSON: Extra data at column 15; each line",
    ),
    "indented": (b'{\n"text": ""\n}', "a.jsonl", "line 1 is not JSON: .*; each line must be one complete object"),
    "indented twice": (b'{\n"text": ""\n}\n{\n}', "a.json", "a.json is not JSON: Extra data at line 4 column 1"),
    "no JSON": (b"text", "a.json", "a.json is not JSON: Expecting value at column 1"),
    "string": (b'"text"', "a.json", "a.json is a JSON str: it must be an object with the text in a field"),
    "list of strings": (b'[{"text": ""}, "text"]', "a.json", "a.json item 2 is a JSON str: it must be an object"),
    "field of an item": (b'[{"text": ""}, {}]', "a.json", "a.json item 2 has no field 'text': its fields are none"),
    "field of an object": (b'{\n"data": []}', "a.json", "a.json has no field 'text': its fields are 'data'"),
    "many fields": (b'{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}', "a.jsonl", "its fields are 'a', 'b', 'c' and 2 more"),
    "field twice": (b'{"text": "first", "text": "second"}', "a.jsonl", "line 1 has the field 'text' twice"),
    "long number": (
        b'{"text": "a", "id": ' + b"9" * 5000 + b"}",
        "a.jsonl",
        "line 1 has a number of more than 4300 digits: it must be a string",
    ),
    "deep": (
        b'{"text": "a", "m": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "a.jsonl",
        "line 1 is nested too deeply: it must be an object with the text in a field",
    ),
    "NUL": (b'{"text": "a"}\n' + bytes(64), "a.jsonl", "line 2 has a NUL byte at offset 0: it must be text in UTF-8"),
    "UTF-16": ("text".encode("utf-16"), "a.txt", "a.txt is not UTF-8: byte 0xff at offset 0; convert it to UTF-8"),
    "UTF-16 without a mark": ("text".encode("utf-16-le"), "a.txt", "a.txt has a NUL byte at offset 1: it must be text"),
    "UTF-16 lines": ('{"text": "a"}\n'.encode("utf-16"), "a.jsonl", "line 1 is not UTF-8: byte 0xff at offset 0"),
    "list": (b'["text"]', "a.jsonl", "line 1 is a JSON list: it must be an object"),
    "field": (b'{"id": 1, "body": ""}', "a.jsonl", "line 1 has no field 'text': its fields are 'id', 'body'"),
    "number": (b'{"text": 17}', "a.jsonl", r"line 1 has 17 \(int\) in field 'text': it must be a string"),
    "null": (b'{"text": null}', "a.jsonl", r"has None \(NoneType\) in field 'text'"),
    "surrogate": (b'{"text": "ab\\ud800"}', "a.jsonl", "line 1 has a lone surrogate at character 2"),
    "deep value": (b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", "a.jsonl", r"line 1 has \[\[\[.* \(list\) in field"),
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


def test_fields_that_are_not_read_may_be_there_twice_and_hold_anything(tmp_path):
    line = b'{"text": "a\\u0000b", "m": 1, "m": [2, {"m": NaN, "m": null}]}'
    (tmp_path / "a.jsonl").write_bytes(line)
    assert texts_of([str(tmp_path / "a.jsonl")]) == ["a\0b"]


def test_a_field_without_a_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"": "unnamed"}')
    assert texts_of([str(tmp_path / "a.jsonl")], text_field="") == ["unnamed"]
    with pytest.raises(InputError, match="line 1 has no field ''"):
        texts_of([write(tmp_path / "b.jsonl", ["t"])], text_field="")


PARQUET_ERRORS = {
    "no column": ({"id": [1], "body": ["a"]}, "a.parquet has no column 'text': its columns are 'id', 'body'"),
    "null": ({"text": ["a", None]}, r"a.parquet row 2 has None \(NoneType\) in field 'text'"),
    "numbers": ({"text": [1]}, "a.parquet has a column 'text' of type int64: it must contain strings"),
    "lists": ({"text": [["a"]]}, "a.parquet has a column 'text' of type list<.*>: it must contain strings"),
    "structs": ({"text": [{"a": "b"}]}, "a.parquet has a column 'text' of type struct<a: string>: it must contain"),
    "UTF-8": (
        {"text": pa.array([b"ok", b"caf\xe9"]).view(pa.string())},
        "a.parquet row 2 is not UTF-8: byte 0xe9 at offset 3",
    ),
    "binary": ({"text": [b"ok", b"caf\xe9"]}, "a.parquet row 2 is not UTF-8: byte 0xe9 at offset 3"),
    "column twice": (
        pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]),
        "a.parquet has several columns 'text': its columns are 'text', 'text'",
    ),
}


@pytest.mark.parametrize("table, message", PARQUET_ERRORS.values(), ids=PARQUET_ERRORS)
def test_parquet_errors(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        list(read_documents([str(tmp_path / "a.parquet")]))


STRINGS = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "binary": pa.array([text.encode() for text in TEXTS]),
    "binary_view": pa.array([text.encode() for text in TEXTS], pa.binary_view()),
    "json": pa.array(TEXTS, pa.json_()),
    "no rows": pa.array([], pa.string()),
}


@pytest.mark.parametrize("column", STRINGS.values(), ids=STRINGS)
@pytest.mark.parametrize("field", ["text", "meta.text"])
def test_every_kind_of_string_column(tmp_path, column, field):
    other = pa.array([{"text": "inside"}] * len(column), pa.struct({"text": pa.string()}))
    pq.write_table(pa.table({"meta": other, field: column}), tmp_path / "a.parquet", compression="none")
    assert texts_of([str(tmp_path / "a.parquet")], text_field=field) == TEXTS[: len(column)]


def test_a_spoilt_page_is_found_by_its_checksum(tmp_path):
    file, texts = tmp_path / "a.parquet", [f"document {i} " * 9 for i in range(100)]
    pq.write_table(pa.table({"text": texts}), file, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    data[2000] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="a.parquet cannot be read: .*CRC checksum"):
        texts_of([str(file)])


def test_rows_that_are_lost_are_missed(tmp_path):
    """The footer states the number of rows in all, and in each row group."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(100)]}), file)
    data = file.read_bytes()
    at = data.rindex(b"\x16\xc8\x01", 0, len(data) - 8)  # 100 in the row group, as Thrift writes it
    file.write_bytes(data[:at] + b"\x16\x92\x01" + data[at + 3 :])
    with pytest.raises(InputError, match="a.parquet is damaged: it has 73 rows, but its footer says 100"):
        texts_of([str(file)])


@pytest.mark.parametrize("text, empty", [("", True), (" \n\t\u3000", True), (" a ", False)])
def test_white_space_is_no_text(text, empty):
    assert Document("a.txt", text, 0).empty == empty


def compressed(path, *parts):
    """Writes a gzip file of bytes, each many times: a bomb."""
    with gzip.open(path, "wb", 1) as file:
        for part, times in parts:
            for _ in range(times):
                file.write(part)
    return path


def lines_too_long(folder):
    return compressed(folder / "a.jsonl.gz", (b'{"text": "', 1), (b"a" * 10**6, 300), (b'"}\n', 1))


def list_too_long(folder):
    return compressed(folder / "a.json.gz", (b"[", 1), (b"[]," * 10**6, 100), (b"[]]", 1))


def object_too_long(folder):
    return compressed(folder / "a.json.gz", (b'{"text": "', 1), (b"a" * 10**6, 300), (b'"}', 1))


def text_too_long(folder):
    path = folder / "a.txt"
    path.touch()
    os.truncate(path, 10**12)
    return path


TOO_LONG = {
    "line": (lines_too_long, r"a.jsonl.gz has a line of more than 1,000,000 bytes: .* set PI_JAX_LIMITS=2 in"),
    "list": (list_too_long, "a.json.gz is not JSON lines, so it is loaded completely, and has more than 2,000,000 "),
    "object": (object_too_long, "a.json.gz is not JSON lines, so it is loaded completely, and has more than 2,000,000"),
    "text": (text_too_long, r"a.txt is one document, and has 1,000,000,000,000 bytes, .* set PI_JAX_LIMITS=1000000 in"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LONG.values(), ids=TOO_LONG)
def test_a_file_that_would_fill_the_memory(tmp_path, monkeypatch, case):
    make, message = case
    monkeypatch.setattr(limits, "DOCUMENT", 10**6)
    monkeypatch.setattr(limits, "JSON_LIST", 2 * 10**6)
    path = make(tmp_path)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        list(read_documents([str(path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 10**7


def test_a_long_list_of_documents_is_read(tmp_path, monkeypatch):
    """Also where its only line is longer than a line of JSON lines may be."""
    monkeypatch.setattr(limits, "DOCUMENT", 1000)
    texts = [f"text {i}" for i in range(500)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert [d.text for d in read_documents([str(tmp_path)])] == texts


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_a_text_that_is_too_long(tmp_path, monkeypatch, ending):
    texts = ["short", "é" * 600]
    if ending == ".json":
        (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    else:
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    monkeypatch.setattr(limits, "DOCUMENT", 1000)
    with pytest.raises(InputError, match=r"a.* 2: field 'text' has 1,200 bytes, more than the 1,000 allowed: if that"):
        list(read_documents([str(tmp_path)]))
    monkeypatch.setenv("PI_JAX_LIMITS", "2")
    assert [d.text for d in read_documents([str(tmp_path)])] == texts
