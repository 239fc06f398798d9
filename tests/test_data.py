"""data.py: records, classification triples, the mixture, files of records.   pytest tests/test_data.py

Invariants: one unique id on x, x+ and x- and on no other triple; symmetric targets have the input's format;
every row of a set is drawn once an epoch; a wrong row of a file names its line.
"""

import gzip
import json
import sys

import numpy as np
import pytest
from toys import outcome

import data
import gecko
from engine import files
from engine.files import InputError

GOOD = {"task": "t", "query": "q", "positive": {"title": "T", "text": "p"}, "negative": None}


def test_formatted_symmetric_and_asymmetric():
    row = data.record("t", "q", {"title": "T", "text": "p"}, {"title": "", "text": "n"})
    assert data.formatted(row) == ("task: t | query: q", "title: T | text: p", "title: none | text: n")
    assert data.formatted({**row, "symmetric": True}) == (
        "task: t | query: q", "task: t | query: p", "task: t | query: n")
    assert data.formatted({**row, "negative": None})[2] is None


# --------------------------------------------------------------------------------------------------
# Classification triples (section 3.3)

TEXTS, LABELS = [f"text {i}" for i in range(20)], [i % 3 for i in range(20)]


def three(row):
    return row["query"], row["positive"]["text"], row["negative"]["text"]


@pytest.mark.ex3
def test_classification_triples_share_one_unique_id():
    """x+ has x's label, x- another, the id is on all three texts and on no other triple's."""
    rows = data.classification_triples(TEXTS, LABELS, seed=1)
    assert len(rows) == 20 and all(r["symmetric"] for r in rows)
    label, ids = dict(zip(TEXTS, LABELS, strict=True)), []
    for row in rows:
        assert all(" [" in text for text in three(row)), f"the id goes on all three texts, x- too: {three(row)}"
        (x, i), (pos, j), (neg, k) = (text.rsplit(" [", 1) for text in three(row))
        assert i == j == k, f"x, x+ and x- must share one id: {three(row)}"
        assert pos != x, f"x is its own positive: {three(row)}"
        assert label[pos] == label[x], f"x+ must have x's label: {three(row)}"
        assert label[x] != label[neg], f"x- has x's own label: {three(row)}"
        ids.append(i)
    assert len(set(ids)) == 20, "an id stands on two triples: it then no longer tells the rows of a batch apart"


@pytest.mark.ex3
def test_classification_draws_by_the_seed_alone_and_from_all():
    """Equal seeds give equal triples, others others; every text of the label is drawn as x+, every other as x-."""
    def drawn(seed):
        return [three(row) for row in data.classification_triples(TEXTS, LABELS, seed, unique_ids=False)]

    assert drawn(5) == drawn(5), "equal seeds must give equal triples: draw from the seed alone"
    assert drawn(5) != drawn(6), "the seed has no effect"
    many = [drawn(seed) for seed in range(150)]
    for i in (0, 10, 19):
        same = {text for text, label in zip(TEXTS, LABELS, strict=True) if label == LABELS[i]}
        assert {rows[i][0] for rows in many} == {TEXTS[i]}
        assert {rows[i][1] for rows in many} == same - {TEXTS[i]}, "x+ is drawn among all other texts of x's label"
        assert {rows[i][2] for rows in many} == set(TEXTS) - same, "x- is drawn among all other labels' texts"


@pytest.mark.ex3
def test_classification_honours_its_arguments():
    rows = data.classification_triples(TEXTS, LABELS, 1, task="topics", unique_ids=False)
    assert {r["task"] for r in rows} == {"topics"}, "the task is the one that is given"
    assert all(set(three(r)) <= set(TEXTS) for r in rows), "without unique_ids no text gets an id, x- neither"
    assert {r["task"] for r in data.classification_triples(TEXTS, LABELS)} == {"classification"}
    assert all(r["positive"]["title"] == r["negative"]["title"] == "" for r in rows)


@pytest.mark.ex3
@pytest.mark.parametrize("seed", range(6))
def test_classification_compares_texts_and_not_their_places(seed):
    """A text that stands in two rows is one text: the three of a triple differ."""
    assert data.classification_triples(["a", "a", "b"], [1, 1, 2], seed) == [], "x+ is x's own text again"
    assert data.classification_triples(["a", "b", "a"], [1, 1, 2], seed) == [], "x- is the text of x or of x+"
    assert len(data.classification_triples(["a", "b", "A"], [1, 1, 2], seed)) == 2, '"A" is another text than "a"'
    texts = ["a", "a", "b", "b", "c", "a", "c"]
    rows = data.classification_triples(texts, [1, 1, 1, 2, 2, 2, 2], seed, unique_ids=False)
    assert len(rows) == 7 and all(len(set(three(row))) == 3 for row in rows), "the three texts of a triple differ"


@pytest.mark.ex3
@pytest.mark.parametrize("seed", range(8))
def test_classification_draws_an_x_plus_that_leaves_an_x_minus(seed):
    """x- can only be "b": x+ of "a" is then "d", and that of "d" is "a"; for the "b" in front nothing is left."""
    rows = data.classification_triples(["a", "b", "d", "b"], [1, 1, 1, 2], seed, unique_ids=False)
    assert [three(r) for r in rows] == [("a", "d", "b"), ("d", "a", "b")]


@pytest.mark.ex3
def test_classification_leaves_out_a_row_that_no_triple_can_be_made_of():
    """x alone with its label, and no endless search for an x-."""
    texts = ["a", "b", *["a"] * 1100, "c"]                           # all but two alone with their label
    for seed in range(4):                                            # chance finds "c" for some, a search for all
        rows = data.classification_triples(texts, [1, 1, *range(2, 1103)], seed, unique_ids=False)
        assert [three(r) for r in rows] == [("a", "b", "c"), ("b", "a", "c")]


@pytest.mark.ex3
def test_classification_needs_two_labels():
    with pytest.raises(InputError, match="two labels"):
        data.classification_triples(["a", "b"], [1, 1])


# --------------------------------------------------------------------------------------------------
# The mixture (section 3.3)


def records(count):
    return [data.record("search result", f"q{i}", data.text_only(f"p{i}")) for i in range(count)]


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


def test_schedule_takes_all_rows_of_a_set_that_is_smaller_than_a_batch():
    plan = data.schedule([3, 9], [1, 1], 5, 30, seed=0)
    assert all(sorted(rows) == [0, 1, 2] for s, rows in plan if s == 0)
    assert all(len(rows) == 5 for s, rows in plan if s == 1)


@pytest.mark.parametrize("mix", ["sets", "mixed", "tasks"])
def test_batches_hold_rows_of_the_mixture(mix):
    sets = [records(30), records(20)]
    for row in sets[0][:3]:
        row["task"] = "rare"
    plan = data.batches(sets, [1, 1], mix, 10, 60, seed=0)
    from_first = [np.mean(rows < 30) for rows in plan]
    assert all(len(rows) == 10 and rows.min() >= 0 and rows.max() < 50 for rows in plan)
    if mix == "sets":
        assert set(from_first) == {0.0, 1.0}
    else:
        assert 0.3 < np.mean(from_first) < 0.9 and not {0.0, 1.0} >= set(from_first)
    rare = np.mean([np.mean(rows < 3) for rows in plan])
    assert (0.4 < rare < 0.6) if mix == "tasks" else rare < 0.15


def test_uniform_tasks_are_counted_by_their_kind_where_rows_have_one():
    """FRet's tasks are free text: by the text, ten kinds of wording would weigh more than one."""
    rows = [{**row, "task": f"wording {i}", "kind": "rare" if i < 4 else "common"}
            for i, row in enumerate(records(40))]
    plan = np.concatenate(data.batches([rows], None, "tasks", 10, 60, seed=0))
    assert 0.4 < np.mean(plan < 4) < 0.6
    by_text = np.concatenate(data.batches([[{**r, "kind": ""} for r in rows]], None, "tasks", 10, 60, seed=0))
    assert np.mean(by_text < 4) < 0.2


def test_mixed_batches_go_through_each_group_before_any_row_again():
    plan = np.concatenate(data.mixed_schedule([np.arange(10), np.arange(10, 40)], [1, 1], 8, 40, seed=3))
    first = plan[plan < 10]
    assert all(sorted(first[k:k + 10]) == list(range(10)) for k in range(0, len(first) - 10, 10))


def test_builtin_pairs_are_records_of_the_two_tasks(monkeypatch):
    monkeypatch.setattr(data.pairs, "SOURCES", ("numpy",))
    corpus = data.builtin_corpus()[:300]
    rows = data.builtin_pairs(corpus, 40, 3)
    assert len(rows) == 40 and {r["task"] for r in rows} == {"search result", "question answering"}
    assert all(r["negative"] is None and not r["symmetric"] for r in rows)


# --------------------------------------------------------------------------------------------------
# Files of records


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
    (json.dumps({**GOOD, "query": 5}), r':2: no "query"'),
    (json.dumps({**GOOD, "positive": {"title": " "}}), r':2: "positive" has no text'),
    (json.dumps({**GOOD, "positive": {"title": "T", "text": ""}, "symmetric": True}), r':2: "positive" has no'),
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


def test_a_title_alone_is_a_passage(tmp_path):
    files.write_jsonl(tmp_path / "r.jsonl", [{**GOOD, "positive": {"title": "T", "text": ""},
                                              "negative": {"title": "N", "text": ""}}])
    row, = data.read_records(tmp_path / "r.jsonl")
    assert data.formatted(row)[1:] == ("title: T | text:", "title: N | text:")


def test_no_title_may_be_written_as_null(tmp_path, capsys):
    files.write_jsonl(tmp_path / "r.jsonl", [{**GOOD, "positive": {"title": None, "text": "p"}, "kind": None}])
    data.check(str(tmp_path / "r.jsonl"), None, None)
    assert "first positive: title: none | text: p" in capsys.readouterr().out


@pytest.mark.parametrize("unknown, said", [(0.38, "38% of the tokens are unknown"), (0.01, "")])
def test_check_says_what_the_model_loses_of_the_texts(tmp_path, monkeypatch, capsys, unknown, said):
    class Model:
        formats, max_length, lost = data.FORMATS, 32, gecko.Gecko.lost

        def tokens(self, texts, max_length):
            self.texts, self.truncated, self.unknown, self.length = len(texts), 1, unknown, 32

    files.write_jsonl(tmp_path / "r.jsonl", [GOOD, GOOD])
    monkeypatch.setattr(data, "load", lambda folder: Model())
    data.check(str(tmp_path / "r.jsonl"), "model", None)
    printed = capsys.readouterr().out
    assert "1 of 4 texts were cut at 32 tokens" in printed and said in printed
    assert ("unknown" in printed) == bool(said)


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


def test_corpus_writes_documents_and_those_that_are_added(tmp_path, capsys):
    """Passages, what was left out and the next command; what was there stays as it was, id and text."""
    docs, out = tmp_path / "docs", tmp_path / "corpus.jsonl"
    docs.mkdir()
    (docs / "b.md").write_text("# Tea\nBoil the water.")
    (docs / "c.pdf").write_text("")
    code, said, error = outcome(capsys, data.main, "corpus", out, docs)
    assert code == 0 and "left out: 1 .pdf files (pdftotext converts them)" in error
    assert said.startswith(f"wrote {out}: 1 passages\nnext: python train.py --corpus {out} --init MODEL --llm URL ")
    first = files.read_passages(out)
    (docs / "a.txt").write_text("Added later.")
    assert outcome(capsys, data.main, "corpus", out, docs)[0] == 0
    assert [p["_id"] for p in files.read_passages(out)] == ["a.txt#1", "b.md#1"]
    assert files.read_passages(out)[1:] == first == [{"_id": "b.md#1", "title": "Tea", "text": "Boil the water."}]
    before = out.read_bytes()
    (docs / "a.txt").unlink()
    (docs / "b.md").unlink()
    code, said, error = outcome(capsys, data.main, "corpus", out, docs)
    assert code == 2 and error.count("\n") == 1 and out.read_bytes() == before
    assert "it is an input too" in outcome(capsys, data.main, "corpus", out, out)[2]


@pytest.mark.parametrize("words, message", [
    (["check", "r.jsonl", "--max-length", "0"], "--max-length 0: give a number above 0"),
    (["check", "r.jsonl", "--max-length", "-1"], "--max-length -1: give a number above 0"),
    (["convert", "beir", "in", "out", "--depth", "0"], "--depth 0: give a number above 0"),
    (["convert", "classification", "in", "out", "--seed", "-1"], "--seed -1: give a number of 0 or more")])
def test_a_flag_that_makes_no_sense_is_one_line(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", *words])
    with pytest.raises(InputError, match=message):
        data.main()
