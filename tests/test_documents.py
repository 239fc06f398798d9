"""engine/documents.py and markup.py: a folder of documents -> passages.   pytest tests/test_documents.py

Invariants: no word of a document is lost but what is named as left out; no passage is longer than it may be;
an id names file and place, and stays where other files come or go; nothing hangs, whatever stands in a folder.
"""

import json
import os
import random
import re
import time

import pytest

from engine import documents, markup
from engine.documents import heading_pairs, near_equal, read_corpus, read_documents
from engine.files import InputError
from engine.markup import passages_of, size

LONG = "The kettle boils the water in a minute. Then it switches itself off and waits for the next cup of tea."


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def titles(name, text):
    return [row["title"] for row in passages_of(name, text)]


# --------------------------------------------------------------------------------------------------
# Headings, and what is no text


@pytest.mark.parametrize("name, text", [
    ("a.md", f"# Tea\n\n{LONG}\n\n## Milk ##\n{LONG}!\n"),
    ("a.md", f"Tea\n===\n{LONG}\n\nMilk\n---\n\n{LONG}!"),
    ("a.md", f"---\n# of the site\ntitle: \"Tea\"\ndate: 2024\n---\n{LONG}\n# Milk\n{LONG}!"),
    ("a.md", f"---\nTitle: >-\n  Tea\ndate: 2024\n---\n{LONG}\n# Milk\n{LONG}!"),
    ("a.md", f"<h1 align='center'>\nTea</h1>\n\n{LONG}\n# **Milk**\n{LONG}!"),
    ("a.md", f"[![build](b.svg)](https://ci)\n\n# [Tea](https://tea)\n{LONG}\n# `Milk`\n{LONG}!"),
    ("a.rst", f"===\nTea\n===\n\n{LONG}\n\nMilk\n~~~~\n\n{LONG}!"),
    ("a.rst", f".. _tea:\n\nTea\n===\n{LONG}\n\n.. a comment\n   of two lines\n\nMilk\n----\n{LONG}!"),
    ("a.txt", f"Tea\r\n===\r\n{LONG}\r\n\r\nMilk\r\n----\r\n{LONG}!"),
    ("a.txt", f"Tea\n===\n\x0c{LONG}\n\n********\n  Milk\n********\n{LONG}!")])
def test_headings_of_each_kind_cut_and_name_the_passages(name, text):
    rows = passages_of(name, text)
    assert [(r["_id"], r["title"], r["text"]) for r in rows] == [
        (f"{name}#1", "Tea", LONG), (f"{name}#2", "Tea: Milk", LONG + "!")]


@pytest.mark.parametrize("name, text", [
    ("install-guide.md", LONG),                                      # no heading at all
    ("install_guide.txt", f"{LONG}\n\n# a comment\n{LONG}"),         # of a .txt file none
    ("install-guide.md", f"{LONG}\n\n{LONG}!\n\n{LONG}?\n\n# Deep below\n{LONG}.."),
    ("install-guide.rst", f"Name   Value\n===== ======\n{LONG}")])   # a table
def test_without_a_heading_above_the_name_is_the_title(name, text):
    assert titles(name, text)[0] == "install guide"


def test_headings_without_text_and_code_that_looks_like_one():
    code = "```python\n# no heading\n\nx = {'a': [b](c)}  # <!-- stays -->\n```"
    rows = passages_of("a.md", f"# Tea\n## Empty\n## Milk\n{LONG}\n{code}\n\n    # nor this\n    y = 1\n")
    assert [r["title"] for r in rows] == ["Tea: Milk"]
    inside = code.removeprefix("```python\n").removesuffix("\n```")
    assert rows[0]["text"] == f"{LONG}\n{inside}\n\n    # nor this\n    y = 1"


@pytest.mark.parametrize("name, text, seen", [
    ("a.md", "See [the guide](g.md \"t\"), ![x](x.png)<br>a\\_b and <!-- not\nthis --> more.",
     "See the guide,  a_b and  more."),
    ("a.rst", "See :py:func:`os.walk`, :doc:`the guide <g>`, `this <http://x>`_ and `that`_::",
     "See os.walk, the guide, this and that:"),
    ("a.rst", ".. note:: Mind the gap.\n\n   And more.\n\n.. image:: x.png\n   :alt: no\n\n.. |x| replace:: y\n",
     "Mind the gap.\n\n   And more."),
    ("a.md", "<p>One</p>\n<ul>\n<li>two<br>\nthree</li></ul>", "One\n\ntwo\nthree"),
    ("a.md", "The [thing](https://x/Thing_(x)) is `[here](x)`.\n\n<details>", "The thing is `[here](x)`."),
    ("a.rst", ":orphan:\n\n.. code-block:: python\n   :linenos:\n\n   print(1)\n", "   print(1)"),
    ("a.rst", "One.\n\n..\n\n   A quote.\n\n..\n   A comment.\n\n.. image:: x\n\n", "One.\n\n   A quote."),
    ("a.rst", ".. note ::\n\n  Mind it.\n\n.. image :: x.png\n", "  Mind it."),
    ("a.md", "<table><tr><td>tea</td><td>oil<br/>salt</td></table> H<sub>2</sub>O", "  tea  oil salt  H2O"),
    ("a.md", "Words first.\n\n- [One](#one)\n- [Two](#two)\n\n![x](x)\n", "Words first."),
    ("a.md", "Words and\n[a link](x)\nin the middle.", "Words and\na link\nin the middle."),
    ("a.md", "| a | b |\n|---|---|\n| one | two |\n", "| a | b |\n| one | two |"),
    ("a.md", "---\nAll that\nstands here\n---\nis text.", "All that\nstands here\nis text."),
    ("a.md", "A note[^1], `<table>` and [x][1].\n\n[1]: http://x \"t\"\n[^1]: Its text.",
     "A note[^1], `<table>` and x.\n\n[^1]: Its text."),
    ("a.md", "Call <file> or List<T>, a < b.", "Call <file> or List<T>, a < b."),
    ("a.md", "- one\n    - nested\n\n      below\n- two", "- one\n    - nested\n\n      below\n- two")])
def test_what_a_reader_sees_is_the_text(name, text, seen):
    assert [row["text"] for row in passages_of(name, text)] == [seen]


@pytest.mark.parametrize("text", ["", "\n\n", "# Only a heading", "---\ntitle: x\n---\n", "[![a](b)](c)",
                                  "----\n====", "1.5 2.5 3.5\n" * 99, "x" * 99_999])
def test_no_words_are_no_passage(text):
    assert passages_of("a.md", text) == []


@pytest.mark.parametrize("text", ["తెలుగు ఆంధ్ర, తెలంగాణ రాష్ట్రాలలో అధికార భాష.", "בְּרֵאשִׁית בָּרָא", "བོད་ཡིག་ནི་བོད་མིའི།",
                                  "സംസാരിക്കുന്ന ഭാഷയാണ്", "茶", "ชา", "tea"])
def test_words_of_any_script_are_words(text):
    assert [row["text"] for row in passages_of("a.md", text)] == [text]


# --------------------------------------------------------------------------------------------------
# Cutting


def words(text):
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("text", [
    "\n\n".join(f"{LONG} {i}" for i in range(40)),
    " ".join(f"{LONG} {i}." for i in range(40)),                     # one long paragraph
    "word " * 5000, "北京很大。" * 900,
    "\n".join(f"- item {i}: {LONG}" for i in range(50)),
    "```\n" + "\n".join(f"line({i})" for i in range(500)) + "\n```",
    "".join(f"| {i} | {LONG} |\n" for i in range(40))])
def test_every_passage_fits_and_no_word_is_lost(text, monkeypatch):
    monkeypatch.setattr(markup, "MAX_WORDS", 60)
    rows = passages_of("a.md", text)
    assert all(0 < size(row["text"]) <= 60 for row in rows)
    assert "".join(words("".join(row["text"] for row in rows))) == "".join(words(text))
    sizes = [size(row["text"]) for row in rows]
    assert len(rows) <= 2 * size(text) / 60 + 1 and min(sizes) > 15, "as few as may be, and no crumbs"


def test_a_paragraph_is_cut_between_sentences_and_a_list_between_items(monkeypatch):
    monkeypatch.setattr(markup, "MAX_WORDS", 80)
    text = " ".join(f"{LONG} Number {i}." for i in range(9))
    assert all(row["text"].endswith(".") for row in passages_of("a.txt", text))
    items = "\n".join(f"* item {i}: {LONG}\n  and a second line" for i in range(9))
    assert all(row["text"].startswith("* item") for row in passages_of("a.txt", items))


def test_what_a_colon_announces_stays_with_it(monkeypatch):
    monkeypatch.setattr(markup, "MAX_WORDS", 80)
    code = "\n".join(f"    call(number, {i})" for i in range(5))
    rows = passages_of("a.rst", f"{LONG}\n\n{LONG}!\n\n{LONG} For example::\n\n{code}")
    assert len(rows) == 2 and rows[1]["text"] == f"{LONG} For example:\n\n{code}"


def test_small_sections_join_and_keep_their_headings():
    rows = passages_of("a.md", f"# FAQ\n## Why\nBecause.\n## When\n{LONG}\n## Where\n{LONG}\n## End\nNo.\n")
    assert [(r["title"], r["text"]) for r in rows] == [
        ("FAQ: Why", f"Because.\n\nWhen\n{LONG}"), ("FAQ: Where", f"{LONG}\n\nEnd\nNo.")]
    separate = "".join(f"## Question {i}\n{LONG} {i}\n" for i in range(3))
    assert len(passages_of("a.md", "# FAQ\n" + separate)) == 3, "an answer that can stand alone does"


def test_random_markup_gives_passages_that_fit(monkeypatch):
    monkeypatch.setattr(markup, "MAX_WORDS", 30)
    rng = random.Random(0)
    parts = ["# H\n", "===\n", "---\n", "```\n", "~~~\n", "<!--", "-->", ".. note::", ".. x\n", "    ", "\n",
             "\n\n", "| a ", "- b ", "[c](d)", "`e`_", "![f](g)", "word ", "::\n", "<p>", "\t", "\r\n", ":h:`i`",
             "* ", "1. "]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=40))
        for name in ("a.md", "a.rst", "a.txt"):
            assert all(0 < size(row["text"]) <= 30 for row in passages_of(name, text))


@pytest.mark.parametrize("part", ["<a ", "![", "[x", "`a", "```\nx\n", " ", "<!--x", "x " * 50 + "\n", ".. x\n",
                                  ":", "a:", "`", "title: \n", "a\n===\n"])
def test_a_large_file_takes_no_time_of_its_square(part):
    begin = time.process_time()
    passages_of("a.md", "word " + part * (60_000 // len(part)))
    passages_of("a.rst", "---\na: b\n" + part * (60_000 // len(part)))
    assert time.process_time() - begin < 2


# --------------------------------------------------------------------------------------------------
# A folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "docs"
    write(root, "guide/install.md", f"# Install\n{LONG}\n## Linux\n{LONG} Linux.\n")
    write(root, "b.txt", f"{LONG} b")
    write(root, "A.RST", f"{LONG} a")
    return root


def ids(rows):
    return [row["_id"] for row in rows]


def test_ids_name_file_and_place_and_stay(folder, capsys):
    rows = read_documents(folder)
    assert ids(rows) == ["A.RST#1", "b.txt#1", "guide/install.md#1", "guide/install.md#2"]
    assert capsys.readouterr().err == ""
    write(folder, "aaa/new.md", "New words stand here.")
    write(folder, "guide/copy.md", f"# Copy\n{LONG}\n\nOther.")
    more = read_documents(folder)
    assert {row["_id"]: row for row in more}.items() >= {row["_id"]: row for row in rows}.items()
    assert len(more) == len(rows) + 2


def test_one_file_is_a_folder_of_one(folder):
    assert ids(read_documents(folder / "b.txt")) == ["b.txt#1"]
    write(folder, "x.pdf", b"%PDF")
    with pytest.raises(InputError, match=r"left out: 1 .pdf files \(pdftotext converts them\)"):
        read_documents(folder / "x.pdf")


def test_what_is_left_out_is_said(folder, capsys):
    write(folder, "latin.txt", "Grüße aus Köln".encode("latin-1"))
    write(folder, "binary.md", b"words\0words")
    write(folder, "empty.md", "")
    write(folder, "utf16.txt", "Grüße aus Köln, sechzehn.".encode("utf-16"))
    for name in ("x.pdf", "y.PDF", "z.docx", "p.py", "Makefile", "requirements.txt", ".hidden.md"):
        write(folder, name, "text")
    for name in (".git", "node_modules", "__pycache__"):
        write(folder, f"{name}/readme.md", "Nobody wrote this here.")
    write(folder, "bom.md", b"\xef\xbb\xbf# Heading\nText of it with a mark.")
    write(folder, "twice.md", f"# Other title\n{LONG} b")
    rows = read_documents(folder)
    by_id = {row["_id"]: row for row in rows}
    assert by_id["bom.md#1"]["title"] == "Heading" and len(rows) == 5 and "twice.md#1" not in by_id
    assert capsys.readouterr().err == (
        f"{folder}: left out: 5 hidden files or files for programs, 4 files without a word that is UTF-8, such as "
        "binary.md, empty.md, latin.txt (iconv -f LATIN1 -t UTF-8 converts another encoding), 2 .pdf files "
        "(pdftotext converts them), 1 nameless files, 1 .py files, 1 .docx files (pandoc -t plain converts them), "
        "1 passages that repeat another's text\n")


def test_what_cannot_be_opened_is_left_out(folder, monkeypatch, capsys):
    monkeypatch.setattr(documents.os, "access", lambda path, how: path.name != "guide")
    (folder / "b.txt").unlink()
    (folder / "b.txt").mkdir()                                       # no file
    assert len(read_documents(folder)) == 3
    assert "left out: 1 links to folders, or what cannot be opened\n" in capsys.readouterr().err


def test_links_and_pipes_do_not_hang_and_are_counted(folder, capsys):
    os.symlink(folder, folder / "guide/loop")
    os.symlink(folder / "nowhere.md", folder / "dead.md")
    os.symlink(folder / "link.md", folder / "link.md")
    os.mkfifo(folder / "pipe.md")
    os.symlink("/dev/zero", folder / "zero.txt")
    os.symlink(folder / "b.txt", folder / "c.txt")
    os.symlink(folder / "b.txt", folder / "d.txt")
    assert len(read_documents(folder)) == 4
    assert capsys.readouterr().err.endswith("left out: 5 links to folders, or what cannot be opened, "
                                            "2 passages that repeat another's text\n")


def test_names_that_no_terminal_takes(folder, capsys):
    """Two that are no UTF-8 are two ids; a line break in one is neither in a title nor in what is said."""
    for name in (b"\xe8.txt", b"\xe9.txt", b"two\nlines.txt", b"no\nwords.txt"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(b"" if name.startswith(b"no") else b"Words of " + name.hex().encode())
    rows = read_documents(folder)
    assert len(set(ids(rows))) == len(rows) == 7 and json.dumps(rows, ensure_ascii=False).encode()
    assert "two lines" in [row["title"] for row in rows]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("make, message", [
    (lambda root: None, "no such folder or file; check the path"),
    (lambda root: root.mkdir(), "no .txt, .md or .rst file with words in it; name another folder"),
    (lambda root: write(root, "a.md", "# x"), "left out: 1 files without a word that is UTF-8, such as a.md"),
    (lambda root: write(root, "a.html", "x"), "left out: 1 .html files (pandoc -t plain converts them)")])
def test_nothing_to_read_is_one_line(tmp_path, make, message):
    make(tmp_path / "docs")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_documents(tmp_path / "docs")
    assert "\n" not in str(error.value) and str(tmp_path / "docs") in str(error.value)


def test_read_corpus_takes_documents_beir_and_jsonl(folder, tmp_path, capsys):
    write(folder, "x.pdf", b"%PDF")
    assert ids(read_corpus(folder)) == ids(read_documents(folder))
    assert capsys.readouterr().err.startswith(f"{folder}: left out: 1 .pdf files (pdftotext ")
    rows = [{"_id": "1", "title": "T", "text": "x"}, {"_id": "2", "title": "", "text": ""}]
    write(tmp_path, "beir/queries.jsonl", "")
    write(tmp_path, "beir/corpus.jsonl", "\n".join(map(json.dumps, rows)))
    for path in (tmp_path / "beir", tmp_path / "beir/corpus.jsonl"):
        assert read_corpus(path) == rows[:1]
    write(folder, "corpus.jsonl", json.dumps(rows[0]))               # its own, written there before
    assert ids(read_corpus(folder)) == ids(read_documents(folder))
    with pytest.raises(InputError, match="no such file"):
        read_corpus(tmp_path / "none.jsonl")


# --------------------------------------------------------------------------------------------------
# Pairs, and queries that nearly equal others


def test_heading_pairs_are_of_the_passage_itself():
    """A heading, a title, a sentence or some words, against the text or what is left of it; seeded, none twice."""
    rows = passages_of("a.md", f"# Tea\n## Milk\n{LONG}\n## Salt\n{LONG} Never salt it.\n")
    pairs = heading_pairs(rows)
    assert pairs == heading_pairs(rows) and len(set(pairs)) == len(pairs) > 8
    assert pairs[:2] == [("Tea: Milk", "", LONG), ("Milk", "", LONG)]
    assert (LONG[:39], "Tea: Milk", LONG[40:]) in pairs
    for query, title, text in pairs:
        assert any(set(words(text)) <= set(words(row["text"])) and title in ("", row["title"])
                   and set(words(query)) <= set(words(row["title"] + " " + row["text"])) for row in rows)
    assert {query in LONG for query, _, _ in pairs} == {text == LONG for _, _, text in pairs} == {True, False}
    assert heading_pairs([{"_id": "x", "title": "", "text": "One."}]) == []


def test_near_equal_is_its_loop():
    """Jaccard of the sets of words, with each other and each query above that was kept; both answers occur."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(360)]
    queries, others = texts[:300], texts[300:]

    def near(a, b):
        a, b = set(a.split()), set(b.split())
        return len(a & b) / len(a | b) >= 0.8

    kept, spec = [], []
    for q in queries:
        spec.append(any(near(q, o) for o in [*others, *kept]))
        if not spec[-1]:
            kept.append(q)
    of_others = sum(any(near(q, o) for o in others) for q in queries)
    assert near_equal(queries, others) == spec and 50 < of_others < sum(spec) < 250


def test_near_equal_by_hand():
    queries = ["Sort a list?", "a LIST, sort", "sort a dict", "???", "dict a sort"]
    assert near_equal(queries, ["sort a list"]) == [True, True, False, False, True]
    assert near_equal(["a b", "b a", "c"], []) == [False, True, False]
    assert near_equal(["a"], []) == [False] and near_equal([], ["a"]) == []


def test_near_equal_compares_no_query_with_all_others():
    """64 million pairs, one by one, take a minute."""
    texts = [f"how do i word{i} the thing{i} of name{i // 2}" for i in range(8_000)]
    begin = time.process_time()
    assert not any(near_equal(texts, [f"{text} at most now" for text in texts]))
    assert time.process_time() - begin < 8
