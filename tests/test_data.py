"""data.py: records, classification triples, the schedule, converters.   pytest tests/test_data.py

Invariants: one unique id on x, x+ and x- and on no other triple; symmetric targets have the input's
format; every row of a set is drawn once an epoch.
"""

import gzip
import json
import sys
from collections import Counter

import numpy as np
import pytest

import data
from engine import files
from engine.files import InputError

GOOD = {"task": "t", "query": "q", "positive": {"title": "T", "text": "p"}, "negative": None}


def test_formatted_symmetric_and_asymmetric():
    row = data.record("t", "q", {"title": "T", "text": "p"}, {"title": "", "text": "n"})
    assert data.formatted(row) == ("task: t | query: q", "title: T | text: p", "title: none | text: n")
    assert data.formatted({**row, "symmetric": True}) == (
        "task: t | query: q", "task: t | query: p", "task: t | query: n")
    assert data.formatted({**row, "negative": None})[2] is None


@pytest.mark.ex3
def test_classification_triples_share_one_unique_id():
    """x+ has x's label, x- another, the id is on all three texts and on no other triple's."""
    texts, labels = [f"text {i}" for i in range(20)], [i % 3 for i in range(20)]
    rows = data.classification_triples(texts, labels, seed=1)
    assert len(rows) == 20 and all(r["symmetric"] for r in rows)
    label, ids = dict(zip(texts, labels, strict=True)), []
    for row in rows:
        three = [row["query"], row["positive"]["text"], row["negative"]["text"]]
        assert all(" [" in text for text in three), f"the id goes on all three texts, x- too: {three}"
        (x, i), (pos, j), (neg, k) = (text.rsplit(" [", 1) for text in three)
        assert i == j == k, f"x, x+ and x- must share one id: {three}"
        assert pos != x, f"x is its own positive: {three}"
        assert label[pos] == label[x], f"x+ must have x's label: {three}"
        assert label[x] != label[neg], f"x- has x's own label: {three}"
        ids.append(i)
    assert len(set(ids)) == 20, "an id stands on two triples: it then no longer tells the rows of a batch apart"
    assert len({r["positive"]["text"].split(" [")[0] for r in rows}) > 6, "x+ is drawn, not always the first"
    plain = data.classification_triples(texts, labels, seed=1, unique_ids=False)
    assert plain[0]["query"] == "text 0" and rows[0]["query"] == "text 0 [0]"


@pytest.mark.ex3
def test_classification_leaves_out_a_row_that_no_triple_can_be_made_of():
    """The one text of another label is x's or x+'s own: no x-, and no endless search for it."""
    assert data.classification_triples(["a", "b", "a"], [1, 1, 2]) == []
    texts = ["a", "b", *["a"] * 1100, "c"]                           # all but two alone with their label
    for seed in range(20):                                           # chance finds "c" for some, a search for all
        rows = data.classification_triples(texts, [1, 1, *range(2, 1103)], seed)
        assert [(r["query"], r["positive"]["text"], r["negative"]["text"]) for r in rows] == [
            ("a [0]", "b [0]", "c [0]"), ("b [1]", "a [1]", "c [1]")]


@pytest.mark.ex3
def test_classification_needs_two_labels():
    with pytest.raises(InputError, match="two labels"):
        data.classification_triples(["a", "b"], [1, 1])


def test_schedule_draws_each_row_once_an_epoch_and_keeps_sets_apart():
    plan = data.schedule([12, 7], [1, 1], 3, 40, seed=5)
    assert len(plan) == 40 and {s for s, _ in plan} == {0, 1}
    for s, size, per_epoch in ((0, 12, 4), (1, 7, 2)):
        batches = [rows for which, rows in plan if which == s]
        for e in range(len(batches) // per_epoch):
            epoch = np.concatenate(batches[e * per_epoch:(e + 1) * per_epoch])
            assert len(set(epoch.tolist())) == len(epoch) == per_epoch * 3 and epoch.max() < size
    first = [np.concatenate([r for w, r in plan if w == 0][e * 4:e * 4 + 4]).tolist() for e in (0, 1)]
    assert first[0] != first[1], "the second epoch repeats the first one's order"
    again, other = data.schedule([12, 7], [1, 1], 3, 40, seed=5), data.schedule([12, 7], [1, 1], 3, 40, seed=6)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(plan, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(plan, other, strict=True))


def test_schedule_follows_the_weights():
    share = np.mean([s for s, _ in data.schedule([50, 50], [3, 1], 2, 2000, seed=0)])
    assert abs(share - 0.25) < 0.04


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_records_round_trip(tmp_path, ending):
    path = tmp_path / f"r.{ending}"
    files.write_jsonl(path, [GOOD, {**GOOD, "query": "ü 試"}])
    rows = data.read_records(path)
    assert [r["query"] for r in rows] == ["q", "ü 試"] and rows[0]["symmetric"] is False


@pytest.mark.parametrize("line, message", [
    ("{", r":2: not JSON"),
    ("[]", r":2: not a JSON object"),
    (json.dumps({**GOOD, "query": " "}), r':2: no "query"'),
    (json.dumps({**GOOD, "positive": {"title": "x"}}), r':2: "positive" has no text'),
    (json.dumps({**GOOD, "positive": {"text": 5}}), r':2: "positive" has no text'),
    (json.dumps({**GOOD, "negative": {"text": "n", "title": 5}}), r':2: "negative" has no text'),
    (json.dumps({**GOOD, "positive": {"text": "p", "title": 0}}), r':2: "positive" has no text'),
    (json.dumps({**GOOD, "negative": {"text": "p"}}), r":2: positive and negative are the same"),
    (json.dumps({**GOOD, "kind": 3}), r':2: "kind" is no text'),
    (json.dumps({**GOOD, "symmetric": "no"}), r':2: .*"symmetric" neither true nor false'),
    (json.dumps({**GOOD, "symmetric": None}), r':2: .*"symmetric" neither true nor false'),
])
def test_a_wrong_row_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InputError, match=str(path) + message):
        data.read_records(path)


def test_no_title_may_be_written_as_null(tmp_path, capsys):
    files.write_jsonl(tmp_path / "r.jsonl", [{**GOOD, "positive": {"title": None, "text": "p"}, "kind": None}])
    data.check(str(tmp_path / "r.jsonl"), None, None)
    assert "first positive: title: none | text: p" in capsys.readouterr().out


def test_a_length_of_nothing_is_one_line():
    for length in (0, -1):
        with pytest.raises(InputError, match=f"--max-length {length}: give 1 or more"):
            data.check("r.jsonl", None, length)


def test_candidates_are_left_out_where_no_one_needs_them(tmp_path):
    files.write_jsonl(tmp_path / "r.jsonl", [{**GOOD, "candidates": [{"id": "a"}]}])
    with_them, without = (data.read_records(tmp_path / "r.jsonl", candidates=c) for c in (True, False))
    assert with_them[0].pop("candidates") == [{"id": "a"}] and with_them == without


def test_empty_missing_and_truncated_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        data.read_records(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        data.read_records(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-9])
    with pytest.raises(InputError, match="unreadable|not JSON"):
        data.read_records(tmp_path / "cut.jsonl.gz")


def test_nothing_is_written_where_no_record_can_be_made(tmp_path, monkeypatch, capsys):
    """What stood under the output's name still stands; why rows were left out is said."""
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("sentence1,sentence2,label\na,b,-\n")
    out.write_text("before")
    monkeypatch.setattr(sys, "argv", ["data.py", "convert", "nli", str(source), str(out)])
    with pytest.raises(InputError, match="no record could be made of"):
        data.main()
    assert out.read_text() == "before" and "1 rows without a gold label" in capsys.readouterr().out


def test_no_row_vanishes_and_no_text_is_its_own_negative(tmp_path):
    """A list of no positives is counted as left out; a premise is never what contradicts it."""
    left_out = Counter()
    rows = [{"query": "q", "pos": [], "neg": ["n"]}, {"query": "q", "pos": ["p"], "neg": ["n"]}]
    files.write_jsonl(tmp_path / "p.jsonl", rows)
    assert [r["positive"]["text"] for r in data.convert_pairs([str(tmp_path / "p.jsonl")], left_out)] == ["p"]
    assert left_out == {"pairs of a text with itself or nothing": 1}
    files.write_jsonl(tmp_path / "n.jsonl", [{"premise": "a", "hypothesis": other, "label": label}
                                            for other, label in (("b", 0), ("a", 2), ("c", 2))])
    row, = data.convert_nli([str(tmp_path / "n.jsonl")], left_out)
    assert row["negative"]["text"] == "c"


def test_tables_of_spreadsheets_and_broken_archives(tmp_path):
    """A byte order mark is no part of the first column's name; a cut or spoiled .gz names the file and line."""
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbflabel,text\r\nx,a\r\n")
    assert [row for _, row in data.table(str(tmp_path / "t.csv"))] == [{"label": "x", "text": "a"}]
    whole = gzip.compress("".join(f"{i * i},some text {i * 7919}\n" for i in range(999)).encode())
    for spoiled in (whole[:200], whole[:90] + bytes([255] * 60) + whole[150:], b"label,text\n"):
        (tmp_path / "t.csv.gz").write_bytes(spoiled)
        with pytest.raises(InputError, match=r"t.csv.gz:\d+: not csv"):
            list(data.table(str(tmp_path / "t.csv.gz")))


def test_a_seed_below_zero_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "convert", "classification", "in", "out", "--seed", "-1"])
    with pytest.raises(InputError, match="--seed -1: give 0 or more"):
        data.main()


def test_builtin_pairs_are_records_of_the_two_tasks():
    corpus = data.builtin_corpus()[:300]
    rows = data.builtin_pairs(corpus, 40, 3, ("numpy",))
    assert len(rows) == 40 and {r["task"] for r in rows} == {"search result", "question answering"}
    assert all(r["negative"] is None and not r["symmetric"] for r in rows)
