"""engine/files.py: files, errors and flags.   pytest tests/test_files.py

Invariants: an output is written whole or not at all, and the same rows are the same bytes; what cannot
be read is one line that names the file and the line.
"""

import json
import os
import sys
import threading
import time

import pytest

from engine import files


def test_interrupted_write_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), files.file_beside(tmp_path / "f") as new:
        new.write_text("half")
        raise RuntimeError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_folder_through_a_link_and_never_over_a_file(tmp_path):
    """The link's folder is the new one; a file stays what it was, and nothing is left beside either."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_text("old")
    with files.folder_beside(tmp_path / "link") as new:
        (new / "f").write_text("new")
    with pytest.raises(NotADirectoryError), files.folder_beside(tmp_path / "file"):
        pass
    assert (tmp_path / "real/f").read_text() == "new" and (tmp_path / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "real"]


def test_a_pipe_is_an_input_and_a_device_is_no_output(tmp_path):
    """As <(zcat FILE) gives one; a rename, as root, would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=('{"text": "x"}\n',))
    writer.start()
    assert [row for _, row in files.read_jsonl(tmp_path / "pipe")] == [{"text": "x"}]
    writer.join()
    for wrong, what in (("/dev/null", "device"), (str(tmp_path / "pipe"), "device"), (str(tmp_path), "folder")):
        with pytest.raises(files.InputError, match=f"a {what} stands there; name a file"):
            files.check_outputs([wrong])
    with pytest.raises(files.InputError, match="no such file"):
        list(files.read_jsonl(tmp_path))


def test_a_command_ends_well_without_a_terminal(monkeypatch):
    """A closed standard output is None to Python."""
    monkeypatch.setattr(sys, "stdout", None)
    files.run(lambda: print("to nobody"))


def test_a_damaged_gz_is_one_line(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    files.write_jsonl(path, [{"text": f"{i} {i * i}"} for i in range(2000)])
    raw = bytearray(path.read_bytes())
    raw[200:240] = bytes(40)                                         # not a deflate stream any more
    path.write_bytes(bytes(raw))
    with pytest.raises(files.InputError, match="in.jsonl.gz: unreadable|in.jsonl.gz:[0-9]+: not JSON"):
        list(files.read_jsonl(path))


@pytest.mark.parametrize("line", [r'{"text": "half a pair: \ud83d"}', "[" * 100_000], ids=["half a pair", "deep"])
def test_a_row_that_python_alone_can_hold_is_one_line(line, tmp_path):
    """JSON may write half a surrogate pair, which is no text; a whole pair is one."""
    path = tmp_path / "in.jsonl"
    path.write_text(r'{"text": "a whole pair: \uD83D\ude00"}' + f"\n{line}\n")
    rows = files.read_jsonl(path)
    assert next(rows)[1] == {"text": "a whole pair: 😀"}
    with pytest.raises(files.InputError, match="in.jsonl:2: not JSON .*; one JSON object a line$"):
        next(rows)


def test_a_gz_is_the_same_bytes_whenever_written(tmp_path, monkeypatch):
    for name in ("a", "b"):
        monkeypatch.setattr(time, "time", lambda: 1e9 + ord(name))
        files.write_jsonl(tmp_path / f"{name}.jsonl.gz", [{"text": "x"}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert [row for _, row in files.read_jsonl(tmp_path / "a.jsonl.gz")] == [{"text": "x"}]


# --------------------------------------------------------------------------------------------------
# BEIR's corpus.jsonl


def corpus(tmp_path, *rows, mark=""):
    path = tmp_path / "corpus.jsonl"
    path.write_text(mark + "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_passages_of_public_corpora(tmp_path, capsys):
    """A title alone is a passage; empty ones are left out; a row that stands twice is read once."""
    path = corpus(tmp_path, {"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "title": "T"},
                  {"_id": "c", "title": " ", "text": ""}, {"_id": 4, "text": "y", "metadata": {}},
                  {"_id": "a", "title": "T", "text": "x"}, mark="\ufeff")
    passages = files.read_passages(path)
    assert [p["_id"] for p in passages] == ["a", "b", "4"]
    assert passages[1] == {"_id": "b", "title": "T", "text": ""}
    said = capsys.readouterr().err
    assert "1 of 4 passages have neither title nor text" in said and "1 repeated rows are read once" in said
    files.read_passages(corpus(tmp_path, {"_id": "a", "title": "T", "text": "x"}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rows, message", [
    ([{"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}], "2: .* has another text above"),
    ([{"_id": "1", "text": "x"}, {"_id": 1, "text": "y"}], "has another text above"),
    ([{"text": "x"}], 'no "_id"'), ([{"_id": "", "text": "x"}], 'no "_id"'),
    ([{"_id": 1.5, "text": "x"}], 'no "_id"'),
    ([{"_id": "a", "title": "T", "body": "x"}], 'no "text"'), ([{"_id": "a", "text": None}], 'no "text"'),
    ([{"_id": "a", "text": 7}], 'no "text"'), (['{"_id": "a", "text": NaN}'], 'no "text"'),
    ([{"_id": "a", "title": ["T"], "text": "x"}], "not a string"),
    ([{"_id": "a", "title": 0, "text": "x"}], "not a string"),
    ([{"_id": "a", "text": " "}], 'no passage has a "title" or a "text"')])
def test_a_corpus_that_cannot_be_read_one_way_is_refused(rows, message, tmp_path):
    with pytest.raises(files.InputError, match=message):
        files.read_passages(corpus(tmp_path, *rows))
