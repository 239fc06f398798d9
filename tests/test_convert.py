"""engine/convert.py: publishers' files -> rows.   pytest tests/test_convert.py

Invariants: a text is a string of the file and a label one of its labels; what cannot be read
one way only is refused with file:line, in one line, and nothing is written; what is left out is counted and
said; a right answer is never the hard negative of the same query.
"""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from toys import outcome

import data
from engine.convert import Convert, Row, contrasted, labelled, labelled_pairs
from gecko import save, tiny


def lines(path, *rows):
    path.write_text("".join((json.dumps(r) if isinstance(r, dict) else r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def command(tmp_path, capsys):
    """data.py convert: exit code, the records that it wrote (None: no file), what it printed."""
    def convert(kind, *arguments):
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        code, said, error = outcome(capsys, data.main, "convert", kind, *arguments, out)
        return code, data.read_records(out) if out.exists() else None, said + error
    return convert


def texts(row):
    return row["query"], row["positive"]["text"], row["negative"] and row["negative"]["text"]


# --------------------------------------------------------------------------------------------------
# Each kind, on files as their publishers write them


@pytest.mark.parametrize("style", ["snli", "numbers"])
def test_nli_sets_entailment_against_contradiction_of_the_same_premise(tmp_path, command, style):
    triples = [("a man eats", "a man is eating", "entailment"), ("a man eats", "he sleeps", "contradiction"),
               ("a man eats", "he is old", "neutral"), ("a dog runs", "an animal runs", "entailment"),
               ("a dog runs", "it is fast", "-"), ("a cat", "no cat", "contradiction")]
    if style == "snli":
        rows = [{"sentence1": a, "sentence2": b, "gold_label": c, "annotator_labels": [c]} for a, b, c in triples]
    else:
        number = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
        rows = [{"premise": a, "hypothesis": b, "label": number[c]} for a, b, c in triples]
    code, out, said = command("nli", lines(tmp_path / "in.jsonl", *rows))
    assert [texts(r) for r in out] == [("a man eats", "a man is eating", "he sleeps"),
                                       ("a dog runs", "an animal runs", None)]
    assert all(r["symmetric"] and r["task"] == "semantic similarity" for r in out)
    assert "left out: 1 rows of the label -" in said and "left out: 1 premises that entail nothing" in said
    assert "left out: 1 rows of the label neutral" in said
    assert ("labels that are numbers are read so: {'0': 'entailment'" in said) == (style == "numbers")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_classification_triples_share_one_id_of_their_own(tmp_path, command, ending):
    pairs = [("card, lost", "card"), ("my card is gone", "card"), ("top up failed", "money"), ("no cash", "money")]
    if ending == "csv":
        path = lines(tmp_path / "in.csv", "text,category", *(f'"{a}",{b}' for a, b in pairs))
    else:
        path = lines(tmp_path / "in.jsonl", *({"text": a, "label": b} for a, b in pairs))
    (_, out, _), label = command("classification", path), dict(pairs)
    assert len(out) == 4 and all(r["symmetric"] and r["task"] == "classification" for r in out)
    for n, row in enumerate(out):
        assert all(t.endswith(f" [{n}]") for t in texts(row))
        x, positive, negative = (t.removesuffix(f" [{n}]") for t in texts(row))
        assert label[x] == label[positive] != label[negative] and x != positive


def test_pairs_of_several_publishers(tmp_path, command):
    path = lines(tmp_path / "in.jsonl", {"query": "a", "positive": "b"}, {"title": "c", "body": "d"},
                 {"query": "e", "pos": ["f", "g"]}, {"question": "same", "answer": "same"},
                 {"query": "h", "pos": []})
    _, out, said = command("pairs", path)
    assert [texts(r) for r in out] == [("a", "b", None), ("c", "d", None), ("e", "f", None), ("e", "g", None)]
    assert "left out: 1 pairs of a text with itself" in said and "left out: 1 queries without a positive" in said
    path = lines(tmp_path / "in.jsonl", {"query": "a", "pos": ["b", "c", "d"], "neg": ["x", "y"]},
                 {"query": "e", "positive": {"title": "T", "text": "f"}, "negative": {"text": "g"}})
    _, out, _ = command("pairs", path)
    assert [texts(r)[:2] for r in out] == [("a", "b"), ("a", "c"), ("a", "d"), ("e", "f")]
    assert {texts(r)[2] for r in out[:3]} <= {"x", "y"} and texts(out[3])[2] == "g"


@pytest.mark.parametrize("kind, row, message", [
    ("nli", {"sentence1": "a", "sentence2": "b", "gold_label": "maybe"}, "in.jsonl:1: label 'maybe'"),
    ("nli", {"sentence1": "a", "label": 0}, "in.jsonl:1: no sentence2 or hypothesis"),
    ("choice", {"id": "a", "question": "a", "cop": "two", "exp": ""}, "in.jsonl:1: cop 'two'"),
    ("choice", {"question": "a", "cop": "two"}, "in.jsonl:1: no cop is 0 or 4"),
    ("choice", {"id": "a", "question": "a", "cop": 7, "exp": ""}, ":1: cop '7'"),
    ("classification", {"text": "a", "label": "b"}, "at least two labels"),
    ("classification", {"text": " ", "label": "b"}, "in.jsonl:1: no text or sentence or utterance"),
    ("pairs", {"query": " ", "positive": "b"}, "in.jsonl:1: no query"),
    ("pairs", {"left": "a", "right": "b"}, "in.jsonl:1: no query"),
    ("pairs", "{", "in.jsonl:1: not JSON")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, command, kind, row, message):
    code, out, said = command(kind, lines(tmp_path / "in.jsonl", row))
    assert (code, out) == (2, None) and message in said and "\n" not in said.strip()


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("kind, row, message", [
    ("pairs", {"query": "q", "pos": [None, "b"]}, "null is no text"),
    ("pairs", {"question": "q", "answer": float("nan")}, "NaN is no text"),
    ("pairs", {"query": "q", "pos": [7187158]}, "7187158 is no text"),
    ("pairs", {"query": "q", "positive": {"title": 3, "text": "b"}}, "the title is not a string"),
    ("pairs", {"query": ["q"], "positive": "b"}, '["q"] is no text'),
    ("pairs", {"query": "q", "positive": "b", "neg": [True]}, "true is no text"),
    ("pairs", {"query": "q", "positive": "b", "negative": False}, "false is no text"),
    ("pairs", {"query": "q", "positive": {"title": 0, "text": "b"}}, "the title is not a string"),
    ("pairs", {"query": "q", "positive": "b", "neg": [{"title": "T", "body": "c"}]}, 'no "text"'),
    ("choice", {"question": "q", "opa": "A", "opb": 0, "opc": "C", "opd": "D", "cop": 0}, "0 is no text"),
    ("classification", {"text": 12, "label": "a"}, "12 is no text"),
    ("classification", {"text": "a", "label": 0.5}, "0.5 is no label"),
    ("classification", {"text": "a", "label": float("nan")}, "NaN is no label"),
    ("classification", {"text": "a", "label": ["x"]}, '["x"] is no label'),
    ("classification", {"text": "a", "label": None}, "no label or category or intent"),
    ("choice", {"question": "q", "opa": 1, "opb": "B", "opc": "C", "opd": "D", "cop": 0}, "1 is no text"),
    ("nli", {"premise": "a", "hypothesis": 3, "label": 0}, "3 is no text")])
def test_a_text_is_a_string_and_a_label_is_no_float(tmp_path, command, kind, row, message):
    code, out, said = command(kind, lines(tmp_path / "in.jsonl", row))
    assert (code, out) == (2, None) and "in.jsonl:1: " in said and message in said


def test_1_and_the_text_1_are_one_label(tmp_path):
    path = lines(tmp_path / "in.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": "1"},
                 {"text": "c", "label": True}, {"text": "d", "label": False})
    assert labelled([path]) == (["a", "b", "c", "d"], ["1", "1", "true", "false"])


# --------------------------------------------------------------------------------------------------
# Labels of pairs


def two_texts(*labels, name="label"):
    return [{"sentence1": f"a{i}", "sentence2": f"b{i}", name: label} for i, label in enumerate(labels)]


def test_what_was_taken_for_the_label_is_said(tmp_path, command):
    for name, said in (("is_duplicate", "what is a pair: is_duplicate, where it is 1\n"),
                       ("something", "what is a pair: none, where all rows are pairs\n")):
        path = lines(tmp_path / "in.jsonl", *two_texts(1, name=name))
        assert said in command("pairs", path)[2]
    path = lines(tmp_path / "in.jsonl", *two_texts(3, 4, name="score"))
    assert "what is a pair: score\n" in command("pairs", path, "--positive-from", 3)[2]
    assert "what is a pair: score\n" in command("pairs", path, "--positive-from", 5)[2]      # none is


def test_columns_that_are_not_read_are_said(tmp_path, command):
    """The title of a passage beside its text, negatives under another name."""
    path = lines(tmp_path / "in.csv", "query,title,text,negatives", "q,T,p,n")
    _, out, said = command("pairs", path)
    assert texts(out[0]) == ("q", "p", None) and "columns that are not read: negatives, title\n" in said
    path = lines(tmp_path / "in.jsonl", {"query": "q", "positive": "p", "negative": "n", "neg": None})
    assert "not read" not in command("pairs", path)[2]


@pytest.mark.parametrize("name, labels", [
    ("label", [1, 0]), ("label", [True, False]), ("label", ["1", "0"]), ("is_duplicate", [1, 0]),
    ("label", ["paraphrase", "not_paraphrase"]), ("label", ["entailment", "not_entailment"])])
def test_a_labelled_pair_is_one_only_where_the_label_says_so(tmp_path, command, name, labels):
    code, out, said = command("pairs", lines(tmp_path / "in.jsonl", *two_texts(*labels, name=name)))
    assert [texts(r) for r in out] == [("a0", "b0", None)] and out[0]["symmetric"]
    assert f"left out: 1 rows whose {name} says that they are no pair" in said


@pytest.mark.parametrize("name, label", [("label", 0.4), ("score", 3.8), ("label", "maybe"), ("score", "4.75"),
                                         ("label", 5), ("similarity_score", 1.0), ("label", None),
                                         ("label", "contradiction"), ("labels", ""), ("quality", -1)])
def test_a_score_or_an_unknown_label_is_refused(tmp_path, command, name, label):
    code, out, said = command("pairs", lines(tmp_path / "in.jsonl", *two_texts(label, name=name)))
    assert (code, out) == (2, None) and f"in.jsonl:1: {name} {json.dumps(label)} says neither" in said
    assert "--positive-from X" in said


def test_a_score_needs_the_threshold_from_which_on_two_texts_are_a_pair(tmp_path, command):
    path = lines(tmp_path / "in.jsonl", *two_texts(5.0, "4.0", 3.99, 0, name="score"))
    code, out, said = command("pairs", path, "--positive-from", "4")
    assert [r["query"] for r in out] == ["a0", "a1"] and "left out: 2 rows whose score says" in said
    for wrong in (float("nan"), True, "high"):
        path = lines(tmp_path / "in.jsonl", *two_texts(wrong, name="score"))
        code, out, said = command("pairs", path, "--positive-from", "4")
        assert (code, out) == (2, None) and "is no number" in said


# --------------------------------------------------------------------------------------------------
# Options and their numbers

OPTIONS = {"opa": "A", "opb": "B", "opc": "C", "opd": "D"}


def questions(*numbers, **more):
    return [{"question": f"q{i}", **OPTIONS, "cop": n, **more} for i, n in enumerate(numbers)]


def hub(*numbers):
    return [{"id": f"i{i}", "question": f"q{i}", **OPTIONS, "cop": n, "choice_type": "single", "exp": None}
            for i, n in enumerate(numbers)]


@pytest.mark.parametrize("rows, first, right", [
    (questions(0, 1, 2, 3), 0, "ABCD"), (questions(1, 2, 3, 4), 1, "ABCD"), (hub(1, 2, 3), 0, "BCD"),
    (hub(1, 4), 1, "AD"), (questions(-1, 0), 0, "A")])
def test_the_numbering_of_options_is_known_by_the_numbers_or_the_columns(tmp_path, command, rows, first, right):
    code, out, said = command("choice", lines(tmp_path / "in.jsonl", *rows))
    assert "".join(r["positive"]["text"] for r in out) == right and f"options are counted from {first}" in said
    assert all(r["negative"]["text"] in set("ABCD") - {r["positive"]["text"]} and not r["symmetric"] for r in out)


@pytest.mark.parametrize("rows", [questions(1, 2, 3), questions(3, exp="x", id="i")])
def test_a_numbering_that_the_file_does_not_tell_is_asked_for(tmp_path, command, rows):
    """The authors' files have the hub's columns in another order."""
    path = lines(tmp_path / "in.jsonl", *rows)
    code, out, said = command("choice", path)
    assert (code, out) == (2, None) and "in.jsonl:1: " in said and "--first 0 or --first 1" in said
    for first in (0, 1):
        _, out, _ = command("choice", path, "--first", first)
        assert [r["positive"]["text"] for r in out] == ["ABCD"[row["cop"] - first] for row in rows]
    header = lines(tmp_path / "header.csv", "id,question,opa,opb,opc,opd,cop,exp")
    code, out, said = command("choice", header)
    assert (code, out) == (2, None) and "header.csv: no rows below the header" in said
    code, out, said = command("choice", path, "--first", 2)
    assert (code, out) == (2, None) and "argument --first: invalid choice: 2 (choose from 0, 1)" in said


def test_numbers_of_both_countings_in_one_file_are_refused(tmp_path, command):
    code, out, said = command("choice", lines(tmp_path / "in.jsonl", *questions(0, 4)))
    assert (code, out) == (2, None) and "in.jsonl:1: cop '0', but options are counted from 1" in said


def test_choice_leaves_out_what_has_no_answer(tmp_path, command):
    rows = [{"question": "a", "opa": "A", "opb": "B", "opc": None, "opd": "", "cop": 1},
            {"question": "b", "opa": "", "opb": "B", "opc": "C", "opd": "D", "cop": 1},
            {"question": "c", **OPTIONS, "cop": -1}]
    _, out, said = command("choice", lines(tmp_path / "in.jsonl", *rows), "--first", 1)
    assert [texts(r) for r in out] == [("a", "A", "B")] and "left out: 2 questions without an answer" in said


# --------------------------------------------------------------------------------------------------
# Hard negatives


def test_a_right_answer_is_no_negative_of_the_same_query_in_any_converter(tmp_path, command):
    """The query's text counts, not its row or id."""
    path = lines(tmp_path / "p.jsonl", {"query": "q", "pos": "a", "neg": ["b", "x"]},
                 {"query": "q ", "pos": "b", "neg": ["a"]}, {"query": "other", "pos": "a", "neg": ["b"]})
    assert [texts(r) for r in command("pairs", path)[1]] == [("q", "a", "x"), ("q", "b", None), ("other", "a", "b")]
    rows = [{"question": "q", **OPTIONS, "cop": n} for n in (0, 1, 2)]
    out = command("choice", lines(tmp_path / "c.jsonl", *rows))[1]
    assert [r["negative"]["text"] for r in out] == ["D", "D", "D"]
    rows = [{"premise": "p", "hypothesis": text, "label": label}
            for text, label in (("e", 0), ("f", 0), ("e", 2), ("p", 2))]
    out = command("nli", lines(tmp_path / "n.jsonl", *rows))[1]
    assert [texts(r) for r in out] == [("p", "e", None), ("p", "f", None)]


def test_one_question_under_two_ids_in_a_beir_folder(tmp_path, monkeypatch, command):
    """Each one's positive is near, and the other's negative without the rule."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    lines(folder / "corpus.jsonl", *({"_id": f"p{i}", "title": "", "text": f"passage {i}"} for i in range(4)),
          {"_id": "q3", "title": "", "text": "itself"}, {"_id": "p9", "title": "", "text": "ceiling"})
    lines(folder / "queries.jsonl", {"_id": "q1", "text": "ceiling"}, {"_id": "q2", "text": "ceiling"},
          {"_id": "q3", "text": "itself"})
    lines(folder / "qrels/train.tsv", "query-id\tcorpus-id\tscore", "q1\tp0\t1", "q2\tp1\t1", "q3\tp2\t1")

    order = ["ceiling", "passage 0", "passage 1", "passage 2", "itself", "passage 3"]    # nearest first

    class Model:
        def encode_passages(self, texts, titles, progress):
            return np.array([[1 - 0.1 * order.index(text), 0] for text in texts], np.float32)

        def encode_queries(self, texts, task, progress):
            return np.array([[1, 0]] * len(texts), np.float32)

    monkeypatch.setattr(data, "load", lambda name: Model())
    for seed in range(5):
        _, out, _ = command("beir", "--model", "m", "--depth", 4, "--seed", seed, folder)
        assert [texts(r)[:2] for r in out] == [("ceiling", "passage 0"), ("ceiling", "passage 1"),
                                               ("itself", "passage 2")]
        assert [texts(r)[2] for r in out[:2]] == ["passage 2", "passage 2"]
        assert texts(out[2])[2] in ("passage 0", "passage 1", "ceiling")
    _, out, _ = command("beir", folder)
    assert [r["negative"] for r in out] == [None] * 3


def test_a_model_finds_hard_negatives_that_nobody_judged_relevant(tmp_path, command):
    """A BEIR folder, plain or packed, and a model folder, as on the command line."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    passages = [f"passage {i} about {word}" for i, word in enumerate("red green blue stone river cloud".split())]
    lines(folder / "corpus.jsonl", *({"_id": f"p{i}", "title": "", "text": p} for i, p in enumerate(passages)))
    lines(folder / "queries.jsonl", *({"_id": f"q{i}", "text": p.split()[-1]} for i, p in enumerate(passages)))
    lines(folder / "qrels/train.tsv", "query-id\tcorpus-id\tscore", *(f"q{i}\tp{i}\t1" for i in range(6)))
    save(tiny(passages * 4, hidden_size=16), tmp_path / "model")
    _, out, _ = command("beir", "--model", tmp_path / "model", "--depth", 3, folder)
    assert len(out) == 6 and all(r["negative"]["text"] in set(passages) - {r["positive"]["text"]} for r in out)
    for path in folder.glob("*.jsonl"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert command("beir", "--model", tmp_path / "model", "--depth", 3, folder)[1] == out


def test_passages_without_any_text_are_left_out_and_a_title_alone_is_a_passage():
    def passage(title, text=""):
        return {"title": title, "text": text}

    left_out = Counter()
    rows = [Row("q", passage("T"), [passage(""), passage("T"), passage("N")]), Row("q", passage(" "), [])]
    assert list(contrasted(rows, left_out, np.random.default_rng(0))) == [(rows[0], passage("N"))]
    assert left_out == {"pairs of a text with itself or with nothing": 1}


def test_negatives_follow_the_seed_and_are_drawn_from_all():
    rows = [Row(f"q{i}", data.text_only("p"), [data.text_only(f"n{j}") for j in range(5)])
            for i in range(60)]
    a, b, other = ([negative["text"] for _, negative in contrasted(rows, Counter(), np.random.default_rng(seed))]
                   for seed in (0, 0, 1))
    assert a == b != other and set(a) == {f"n{j}" for j in range(5)}


def test_nothing_is_written_where_no_record_can_be_made(tmp_path, command):
    """What stood under the output's name still stands; why rows were left out is said."""
    source = lines(tmp_path / "in.csv", "sentence1,sentence2,label", "a,b,-")
    code, out, said = command("nli", source)
    assert (code, out) == (2, None) and "no record could be made of" in said
    assert "left out: 1 rows of the label -" in said


def test_rows_that_are_labelled_as_different_are_counted(tmp_path):
    left_out = Counter()
    path = lines(tmp_path / "in.jsonl", *two_texts(0, 1, 0))
    assert len(list(labelled_pairs([path], left_out, Convert()))) == 1 and left_out.total() == 2
