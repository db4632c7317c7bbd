"""Records from files of every kind, and what is said about files that are not as they should be."""

import itertools
import json
import re

import numpy as np
import pytest

from flaxmodels.data import reading, text_files
from flaxmodels.data.reading import Record, inputs, read
from flaxmodels.registry import UserError

ROWS = [("Größe, 3 µm", "b"), ('he said "no"', "a"), ("日本 🎉", "b")]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def csv_of(rows):
    return "text,label\n" + "".join('"' + t.replace('"', '""') + f'",{c}\n' for t, c in rows)


def tsv_of(rows):
    return "text\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in rows)


def jsonl_of(rows):
    return "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows)


def write_table(tmp_path, kind, rows, name="a"):
    if kind != "parquet":
        return write(tmp_path, name, {"csv": csv_of, "tsv": tsv_of, "jsonl": jsonl_of}[kind](rows))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": [t for t, _ in rows], "label": [c for _, c in rows]})
    parquet.write_table(table, tmp_path / name, row_group_size=2)
    return str(tmp_path / name)


TABLES = pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])


@TABLES
def test_tables_hold_the_same_records(tmp_path, kind):
    found = list(read(kind, write_table(tmp_path, kind, ROWS), text="text", label="label"))
    assert [(r.text, r.label) for r in found] == ROWS
    first = {"csv": 2, "tsv": 2, "jsonl": 1, "parquet": 1}[kind]
    assert [r.where for r in found] == [f"{tmp_path / 'a'}:{first + i}" for i in range(3)]
    assert all(r.last and r.completion is None for r in found)


@TABLES
def test_prompts_and_completions(tmp_path, kind):
    found = list(read(kind, write_table(tmp_path, kind, ROWS), prompt="text", completion="label"))
    assert [(r.text, r.completion, r.label) for r in found] == [(t, c, None) for t, c in ROWS]


@TABLES
def test_columns_are_found_by_name(tmp_path, kind):
    path = write_table(tmp_path, kind, ROWS)
    assert [r.text for r in read(kind, path, text="label")] == ["b", "a", "b"]
    with pytest.raises(
        UserError, match=r"no column 'txt' \(data\.text\)\. Did you mean 'text'\? There are: label, text"
    ):
        list(read(kind, path, text="txt"))
    with pytest.raises(UserError, match=r"data\.text is not set.*There are: label, text"):
        list(read(kind, path))
    with pytest.raises(UserError, match=r"data\.completion is not set"):
        list(read(kind, path, prompt="text"))
    with pytest.raises(UserError, match="are both set"):
        read(kind, path, text="text", prompt="text", completion="label")
    with pytest.raises(UserError, match=r"data\.label='label' means nothing"):
        read(kind, path, prompt="text", completion="label", label="label")


def test_csv_is_rfc_4180(tmp_path):
    path = write(tmp_path, "a", '\ufeffid,text\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n2,plain\r\n3,"last"')
    found = list(read("csv", path, text="text", label="id"))
    assert [(r.label, r.text) for r in found] == [("1", 'two\r\nlines, "quoted"'), ("2", "plain"), ("3", "last")]
    assert [r.where.rsplit(":")[-1] for r in found] == ["2", "5", "6"], "where each row begins"


def test_long_fields_are_read(tmp_path):
    path = write(tmp_path, "a", "text\n" + "x" * 200_000 + "\n")
    assert len(next(read("csv", path, text="text")).text) == 200_000


def test_tsv_knows_no_quotes(tmp_path):
    path = write(tmp_path, "a", 'text\tlabel\r\n"half\t1\r\nit \'s "\t0\r\n')
    assert [(r.text, r.label) for r in read("tsv", path, text="text", label="label")] == [
        ('"half', "1"),
        ("it 's \"", "0"),
    ]


def test_labels_keep_their_type(tmp_path):
    path = write(tmp_path, "a", '{"t": "x", "l": 3}\n{"t": "y", "l": true}\n{"t": "z", "l": "3"}\n')
    labels = [r.label for r in read("jsonl", path, text="t", label="l")]
    assert labels == [3, 1, "3"] and [type(x) for x in labels] == [int, int, str]


def test_space_around_labels_is_none_of_them(tmp_path):
    path = write(tmp_path, "a", "text,label\n x,neg\ny, neg\nz,neg \n")
    assert [(r.text, r.label) for r in read("csv", path, text="text", label="label")] == [
        (" x", "neg"), ("y", "neg"), ("z", "neg"),
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["", "   ", "\n  \n\n", "  \r\n"])
def test_blank_lines_of_tables_are_left_out(tmp_path, end):
    files = (("csv", "t,l\nx,1\n"), ("tsv", "t\tl\nx\t1\n"), ("csv", "t\n   \nx\n"), ("jsonl", '{"t": "x"}\n'))
    for kind, content in files:
        assert [r.text for r in read(kind, write(tmp_path, "a", content + end), text="t")] == ["x"]


def test_lines(tmp_path):
    path = write(tmp_path, "a", "one \n\n  \ntwo\r\n\u2028three\x85 ")
    assert [(r.text, r.where) for r in read("lines", path)] == [
        ("one ", f"{path}:1"), ("two", f"{path}:4"), ("\u2028three\x85 ", f"{path}:5"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "labels"), [(("r.neg", "r.pos"), ["neg", "pos"]), (("bad.txt", "good.txt"), ["bad", "good"])]
)
def test_the_label_of_a_line_is_its_file(tmp_path, names, labels):
    for name in names:
        write(tmp_path, name, "x\n")
    assert [r.label for r in read("lines", str(tmp_path / "*"), label="file")] == labels


def test_one_name_is_no_label(tmp_path):
    with pytest.raises(UserError, match="all labels would be equal"):
        list(read("lines", write(tmp_path, "a", "x"), label="file"))
    with pytest.raises(UserError, match="lines have no columns"):
        read("lines", write(tmp_path, "a", "x"), label="b")


# Texts in pieces


def test_a_small_text_is_one_record_as_it_is(tmp_path):
    content = "one\r\ntwo\n\nthree\ufeff"
    for written in (content, "\ufeff" + content):  # but for the mark that some editors write
        assert list(read("text", write(tmp_path, "a", written))) == [Record(content, where=f"{tmp_path / 'a'}:1")]
    with pytest.raises(UserError, match="is empty"):
        list(read("text", write(tmp_path, "a", "\ufeff")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_pieces_are_the_text_and_end_at_line_ends(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(reading, "PIECE", 50)
    monkeypatch.setattr(text_files, "PIECE", 50)
    content = "".join(f"line é{i}\n{'' if i % 3 else chr(10)}" for i in range(100))
    path = write(tmp_path, "a", content.encode(encoding))
    found = list(read("text", path, encoding=encoding))
    assert "".join(r.text for r in found) == content
    assert [r.last for r in found] == [False] * (len(found) - 1) + [True] and len(found) > 5
    for before, after in itertools.pairwise(found):
        assert re.search(r"\S\n\Z", before.text) and after.text[0] == "l" and len(before.text) < 200
        assert after.where == f"{path}:{int(before.where.rsplit(':')[1]) + before.text.count(chr(10))}"


@pytest.mark.parametrize("content", ["x" * 999, "word " * 200, "\n" * 999, "\r\n" * 500, "é" * 333 + "\n" * 300])
def test_texts_without_lines_are_cut_all_the_same(tmp_path, monkeypatch, content):
    monkeypatch.setattr(reading, "PIECE", 100)
    monkeypatch.setattr(text_files, "PIECE", 100)
    found = list(read("text", write(tmp_path, "a", content)))
    assert "".join(r.text for r in found) == content and all(0 < len(r.text) <= 200 for r in found) and len(found) > 4


def test_files_come_in_order_and_empty_texts_are_left_out(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.md"):
        write(tmp_path, name, name)
    write(tmp_path, "b/3.txt", "")
    found = read("text", (str(tmp_path / "c.md"), str(tmp_path / "**/*.txt")))
    assert [r.text for r in found] == ["c.md", "a.txt", "b/10.txt", "b/2.txt"]
    assert [(file.name, size) for file, size in inputs(str(tmp_path / "b/*"))] == [
        ("10.txt", 8),
        ("2.txt", 7),
        ("3.txt", 0),
    ]


def test_reading_is_lazy(tmp_path):
    """A broken line is not seen before those above it are used."""
    records = read("jsonl", write(tmp_path, "a", '{"t": "x"}\n{"t": \n'), text="t")
    assert next(records).text == "x"
    with pytest.raises(UserError, match="a:2 is no JSON"):
        next(records)


# Errors


@pytest.mark.parametrize("path", ["nowhere.csv", "nowhere/*.csv", "", "/", ()])
def test_missing_files_are_named(path):
    with pytest.raises(UserError, match=r"data\.test_path"):
        read("csv", path, text="a", key="data.test_path")


TEXT, LABELLED, PAIR = {"text": "t"}, {"text": "t", "label": "l"}, {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("kind", "content", "options", "message"),
    [
        ("csv", "", TEXT, "a is empty: expected a header"),
        ("csv", "t,l\n", TEXT, "a has no rows"),
        ("csv", "t,l\nx,1\nx\n", LABELLED, "a:3: the number of fields is 1: expected 2"),
        ("csv", 't,l\n"x\ny",1\nx,y,1\n', LABELLED, "a:4: the number of fields is 3: expected 2"),
        ("csv", 't,l\nx,1\n"x,1\ny,0\n', LABELLED, "a:3: the row that begins here is no CSV: unexpected end of data"),
        ("csv", 't,l\n"x"y,1\n', LABELLED, "a:2: the row that begins here is no CSV.*use tsv"),
        ("csv", "t,l\nx,\n", LABELLED, "a:2 has no label: 'l' is empty there"),
        ("csv", "t,l\nx,1\n,1\n", LABELLED, "a:3: 't' is empty: expected a text"),
        ("csv", "t,t\nx,1\n", TEXT, r"a has 2 columns 't' \(data\.text\): expected one\. Rename some\.$"),
        ("csv", "t;l\nx, y;1\n", LABELLED, "no column 't'.* Its header is one column, with ';' in it. Convert it"),
        ("csv", "t\tl\nx\t1\n", LABELLED, r"with '\\t' in it\. Read it with data\.name='tsv'"),
        ("tsv", "t,l\nx,1\n", LABELLED, r"with ',' in it\. Read it with data\.name='csv'"),
        ("csv", "t,l\rx,1\r", LABELLED, "a has no line end but the carriage return alone.*tr "),
        ("lines", "x\ry", {}, "a has no line end but the carriage return alone"),
        ("csv", "t,l\nx\ry,1\n", LABELLED, "a:2: .* is no CSV: it has a carriage return .* outside of quotes"),
        ("csv", "t,l\nx, \n", LABELLED, "a:2 has no label: 'l' is empty there"),
        ("csv", 't\n""\n', TEXT, "a:2: 't' is empty"),
        ("csv", "p,c\nx,\n", PAIR, "a:2: 'c' is empty"),
        ("tsv", "", TEXT, "a is empty: expected a header"),
        ("tsv", "t\tl\nx\t1\ty\n", LABELLED, "a:2: the number of fields is 3: expected 2.*tab"),
        ("jsonl", "\n\n", TEXT, "a has no rows"),
        ("jsonl", '{"t": "x"}\n\n{"t": "x"\n', TEXT, r"a:3 is no JSON: .*delimiter"),
        ("jsonl", "[1]\n", TEXT, "a:1 is list: expected a JSON object"),
        ("jsonl", "[" * 100_000 + "\n", TEXT, "a:1 is no JSON"),
        ("jsonl", '{"t": "x", "l": 1}\n{"t": "x", "k": 1}\n', LABELLED, r"a:2 has no column 'l'.*There are: k, t"),
        ("jsonl", '{"t": null}\n', TEXT, "a:1: 't' is null: expected a text. Take the row out"),
        ("jsonl", '{"t": [{"role": "user"}]}\n', TEXT, r"'t' is \[.*\], of type list: expected a text.*data\.text"),
        ("jsonl", '{"a": {"t": "x"}}\n', {"text": "a.t"}, "no column 'a.t'.* Keys are looked up at the top level"),
        ("jsonl", '{"t": 3}\n', TEXT, "a:1: 't' is 3, of type int: expected a text. Name a column"),
        ("jsonl", '{"t": "x", "l": 0.5}\n', LABELLED, r"the label 'l' is 0\.5: .*Name a column of classes"),
        ("jsonl", '{"t": "x", "l": null}\n', LABELLED, "a:1 has no label"),
        ("parquet", "t,l\nx,1\n", TEXT, "a can't be read as parquet, after row 0"),
        ("parquet", "", TEXT, "a can't be read as parquet"),
        ("lines", "\n \n", {}, "a is empty: expected an example on each line"),
        ("text", "", {}, r"data\.path: .*a is empty: expected text"),
        ("csv", b"t,l\nx,1\nna\xefve,1\n", TEXT, r'a:3 is not utf-8: byte 0xef at offset 10.*data\.encoding="latin-1"'),
        (
            "lines",
            "x\n".encode("utf-16"),
            {},
            r'a:1 is not utf-8: byte 0xff at offset 0\..*data\.encoding="utf-16".*-f utf',
        ),
        ("text", b"\xfe\xff\0x", {}, r'byte 0xfe.*data\.encoding="utf-16"'),
        ("text", "x".encode("utf-32"), {"encoding": "ascii"}, r'byte 0xff.*data\.encoding="utf-32"'),
        ("text", b"fine\nfine\nna\xc3", {}, "a:3 is not utf-8: byte 0xc3 at offset 12"),
        ("text", b"x", {"encoding": "utf8ish"}, r"data\.encoding='utf8ish' is not known\. Did you mean 'utf-8'"),
        ("text", b"x", {"encoding": "base64"}, r"data\.encoding='base64' is not known"),
        ("text", b"a\nb\xfe", {"encoding": "ascii"}, "a:2 is not ascii: byte 0xfe at offset 3"),
        ("xml", "", TEXT, "'xml' is not a kind of file"),
    ],
)
def test_errors_name_file_and_line(tmp_path, kind, content, options, message):
    with pytest.raises(UserError, match=message):
        list(read(kind, write(tmp_path, "a", content), **options))


@pytest.mark.parametrize("at", [49, 50, 51, 99, 100, 160])
def test_a_wrong_byte_is_found_in_any_piece(tmp_path, monkeypatch, at):
    monkeypatch.setattr(text_files, "PIECE", 50)
    content = bytearray(("é\n" * 60).encode())
    content[at] = 0xFF
    with pytest.raises(UserError) as error:
        list(read("lines", write(tmp_path, "a", bytes(content))))
    with pytest.raises(UnicodeDecodeError) as expected:
        bytes(content).decode()
    start = expected.value.start
    line = content[:start].count(b"\n") + 1
    assert f"a:{line} is not utf-8: byte 0x{content[start]:02x} at offset {start}" in str(error.value)


def test_damaged_parquet_is_named(tmp_path):
    rows = [(f"text {i} " * 20, str(i % 2)) for i in range(5000)]
    path = write_table(tmp_path, "parquet", rows)
    content = bytearray((tmp_path / "a").read_bytes())
    content[100 : len(content) // 2] = np.random.default_rng(0).bytes(len(content) // 2 - 100)
    (tmp_path / "a").write_bytes(bytes(content))
    with pytest.raises(UserError, match="a can't be read as parquet, after row"):
        list(read("parquet", path, text="text"))


def test_parquet_columns_that_are_no_texts_are_named(tmp_path):
    path = write_table(tmp_path, "parquet", [(1, "a"), (2, "b")])
    with pytest.raises(UserError, match="a:1: 'text' is 1, of type int: expected a text"):
        list(read("parquet", path, text="text"))
