"""engine/table.py: one reader of tables, and of the values in them.   pytest tests/test_table.py

Invariants: a row has the header's width or is refused with its line; quotes are read as the file means them,
which is said; a text is a string, a label no float; nothing is made of null.
"""

import gzip
import sys

import pytest

import data
from engine.files import InputError, run
from engine.table import as_text, label_in, read_table


def lines(path, *rows):
    path.write_text("".join(row + "\n" for row in rows))
    return str(path)


def rows(path):
    return [row for _, row in read_table([str(path)])]


def test_tables_of_spreadsheets_and_broken_archives(tmp_path):
    """A byte order mark is no part of the first column's name; a cut or spoiled .gz is named."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbflabel,text\r\nx,a\r\n")
    assert rows(tmp_path / "t.csv") == [{"label": "x", "text": "a"}]
    (tmp_path / "T.CSV.gz").write_bytes(gzip.compress(b"label,text\nx,a\n"))
    assert rows(tmp_path / "T.CSV.gz") == [{"label": "x", "text": "a"}]
    whole = gzip.compress("".join(f"{i * i},some text {i * 7919}\n" for i in range(999)).encode())
    for spoiled in (whole[:200], whole[:90] + bytes([255] * 60) + whole[150:], b"label,text\n"):
        (tmp_path / "t.csv.gz").write_bytes(spoiled)
        with pytest.raises(InputError, match="t.csv.gz: unreadable"):
            rows(tmp_path / "t.csv.gz")


WIDTHS = [
    ("comma.csv", "text,label\nfine,ok\nPaid, but nothing came,money\n", ":3: 3 columns where the header has 2"),
    ("short.csv", "text,label\nfine\n", ":2: 1 columns where the header has 2"),
    ("later.csv", 'text,label\n"two\nlines",ok\nshort\n', ":4: 1 columns where the header has 2"),
    ("open.csv", 'text,label\n"never closed,a\nb,c\nd,e\n', ":2: unexpected end of data"),
    ("swallowed.csv", 'text,label\n"never closed,a\nb,c\n"d",e\n', ":2: ',' expected after '\"'"),
    ("tab.tsv", "text\tlabel\nfine\tok\na\tb\tc\n", ":3: 3 columns where the header has 2"),
    ("both.tsv", 'text\tlabel\n"a\tb"\tc\td\n', ":2: 3 columns where the header has 2"),
    ("twice.csv", "text,text\na,b\n", ":1: two columns of one name"),
    ("empty.csv", "", ":1: two columns of one name, or none")]


@pytest.mark.parametrize("name, content, message", WIDTHS, ids=[name for name, _, _ in WIDTHS])
def test_a_row_that_is_not_as_wide_as_the_header_is_refused(tmp_path, monkeypatch, capsys, name, content, message):
    """By the function, and on the command line: one line, exit code 2, no file."""
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        rows(tmp_path / name)
    assert name + message in str(error.value)
    monkeypatch.setattr(sys, "argv", ["data.py", "convert", "classification", str(tmp_path / name),
                                      str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit) as stop:
        run(data.main)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and name + message in said and "\n" not in said
    assert not (tmp_path / "out.jsonl").exists()


# --------------------------------------------------------------------------------------------------
# TSV: quoted, as pandas writes it, or not, as GLUE has it

HARD = ['say "hi" to him', 'a "quoted" one', "two\nlines", "a\ttab", 'ends with "', "plain", '"whole"', 'x, y']


def test_tsv_as_pandas_writes_it_reads_right(tmp_path, capsys):
    """Quoted where needed, quotes doubled, line breaks and tabs within quotes."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": HARD, "label": [i % 2 for i in range(len(HARD))]})
    frame.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    assert [row["text"] for row in rows(tmp_path / "t.tsv")] == HARD
    assert "t.tsv: read as quoted TSV" in capsys.readouterr().out
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert [row["text"] for row in rows(tmp_path / "t.csv")] == HARD


@pytest.mark.parametrize("kept", [HARD[:2] + HARD[4:], ['"whole"', "plain"], ['"I did."', 'He said "no'], ["x"]])
def test_tsv_as_glue_writes_it_keeps_its_quotes(tmp_path, kept, capsys):
    lines(tmp_path / "t.tsv", "text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(kept)))
    assert [row["text"] for row in rows(tmp_path / "t.tsv")] == kept
    assert ("read as unquoted TSV" in capsys.readouterr().out) == any('"' in text for text in kept)


@pytest.mark.parametrize("file, row", [
    (['"text"\t"label"', '"a"\t"x"'], {"text": "a", "label": "x"}),
    (["text\tlabel", '"say ""hi"""\tx'], {"text": 'say "hi"', "label": "x"})])
def test_quoted_tsv_is_known_by_its_header_or_by_a_doubled_quote(tmp_path, file, row):
    lines(tmp_path / "t.tsv", *file)
    assert rows(tmp_path / "t.tsv") == [row]


def test_tsv_that_reads_both_ways_with_other_rows_is_refused(tmp_path):
    """One text with a tab and a line break, or two rows that begin and end with a quote."""
    lines(tmp_path / "t.tsv", "text\tlabel", '"one\t1', 'two"\t0')
    with pytest.raises(InputError, match="t.tsv: reads as quoted TSV and, with other rows, as unquoted"):
        rows(tmp_path / "t.tsv")


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("value", [None, 3, 0.5, float("nan"), True, ["a"], {"text": "a"}])
def test_a_text_is_a_string(value):
    with pytest.raises(InputError, match="f:1: .* is no text"):
        as_text("f:1", value)
    assert as_text("f:1", " a ") == "a"


@pytest.mark.parametrize("value", [0.5, 1.0, float("nan"), ["a"]])
def test_a_label_is_a_string_a_whole_number_or_a_boolean(value):
    with pytest.raises(InputError, match="f:1: .* is no label"):
        label_in("f:1", {"label": value}, "label")
    labels = [label_in("f:1", {"label": good}, "label") for good in (1, "1", False)]
    assert labels == ["1", "1", "false"]
