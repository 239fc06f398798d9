"""engine/results.py: held-out queries, their two truths, the recipe's table.   pytest tests/test_results.py

Invariants: a held-out passage's queries train nothing, nor does one that nearly equals a held-out one; a passage
added later moves no other; the figures are those of the truth that the column names; a run never keeps what
another stage beats on the half that chooses.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from toys import small_model

from engine.beir import Beir, read_beir
from engine.cache import DryRun
from engine.files import InputError, read_jsonl, write_jsonl
from engine.results import (
    cost,
    example,
    found,
    held_apart,
    held_out_results,
    held_passages,
    hold_out,
    mean_of,
    results_table,
    write_questions,
)
from llm import LanguageModel

ROOT = Path(__file__).parent.parent
WORDS = "red green blue pink grey gold teal navy plum rust sand lime mint rose coal snow".split()
CORPUS = [{"_id": f"p{n}", "title": word, "text": f"all about {word}"} for n, word in enumerate(WORDS)]


def rows(count=16, of=2):
    return [{"_id": f"q{n}-{k}", "query": f"where is {WORDS[n]} {'abcd'[k] * 3}", "seed_id": f"p{n}"}
            for n in range(count) for k in range(of)]


def split(queries, share, seed):
    return hold_out(queries, held_passages([row["seed_id"] for row in queries], share, seed))


def test_each_passage_is_on_one_side_and_one_added_later_moves_no_other(capsys):
    train, held = split(rows(), 0.25, 0)
    assert len({row["seed_id"] for row in held}) == 4 and len(train) + len(held) == 32
    assert not {row["seed_id"] for row in train} & {row["seed_id"] for row in held}
    assert "8 queries of 4 passages are held out; 24 train" in capsys.readouterr().out
    fewer_train, fewer_held = split(rows(15), 0.25, 0)            # round(0.25 * 15) is 4 too
    moved = {row["seed_id"] for row in held} ^ {row["seed_id"] for row in fewer_held}
    assert moved <= {"p15"} or len(moved) == 2
    assert [row["_id"] for row in split(rows(), 0.25, 0)[1]] == [row["_id"] for row in held]
    assert split(rows(), 0.25, 1)[1] != held and hold_out(rows(), set()) == (rows(), [])


def test_near_equal_queries_train_nothing(capsys):
    """One that a held-out query nearly equals, and one that stands in training already."""
    all_rows = rows()
    _, held = split(all_rows, 0.25, 0)
    known = {row["seed_id"] for row in held}
    training = [row for row in all_rows if row["seed_id"] not in known]
    training[0]["query"] = held[0]["query"].upper() + "?"
    training[1]["query"] = training[2]["query"] + "!"
    capsys.readouterr()
    train, again = split(all_rows, 0.25, 0)
    assert again == held
    assert "22 train, less 2 that nearly equal a held-out one or one above" in capsys.readouterr().out
    assert training[0] not in train and training[1] in train and training[2] not in train


@pytest.mark.parametrize("share", [0.0, 0.01, 0.99])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(InputError, match="two are needed on each side; give more documents, raise --queries"):
        split(rows(8, 1), share, 0)


def test_no_query_left_to_train_on_is_refused():
    same = [{**row, "query": "where is it"} for row in rows()]
    with pytest.raises(InputError, match="no query is left to train on, or not two to hold out; give more"):
        split(same, 0.25, 0)
    with pytest.raises(InputError, match="not two to hold out"):
        hold_out(rows(), {"a passage that got no query"})


def test_the_fret_file_keeps_what_trains(tmp_path):
    write_jsonl(tmp_path / "fret.jsonl", rows())
    train, asked = held_apart(tmp_path / "fret.jsonl", rows()[:3])
    assert [row for _, row in read_jsonl(tmp_path / "fret.jsonl")] == train == rows()[3:]
    assert [row for _, row in read_jsonl(tmp_path / "held_out.jsonl")] == asked == rows()[:3]


def test_the_example_is_the_first_that_was_relabelled():
    records = [{"query": f"q{n}", "seed_id": "a", "positive_id": "b" if n in (2, 3) else "a", "negative_id": None}
               for n in range(8)]
    assert example(records).startswith('the first: "q2", written for a, has p+ b')
    assert example(records[:2]) == "p+ is p_seed in all records"


class Pointing:
    """A model whose every query finds the passage that `finds` names for it, then the others in order."""

    def __init__(self, finds):
        self.finds = finds

    def lost(self):
        return ""

    def encode_passages(self, texts, titles, **how):
        self.titles = titles
        return np.eye(len(titles), dtype=np.float32)

    def encode_queries(self, texts, task="", **how):
        x = np.zeros((len(texts), len(self.titles)), np.float32)
        for row, text in zip(x, texts, strict=True):
            row[self.titles.index(self.finds(text))] = 1
        return x


def asked_rows():
    """16 held-out rows; p_1 is the next passage."""
    return [{"_id": f"q{n}", "query": f"{word}", "seed_id": f"p{n}", "positive_id": f"p{(n + 1) % 16}"}
            for n, word in enumerate(WORDS)]


def test_each_column_has_its_own_truth_and_the_best_of_one_half_is_kept(tmp_path, capsys):
    of_seed = Pointing(lambda text: text)
    of_p1 = Pointing(lambda text: WORDS[(WORDS.index(text) + 1) % 16])
    lost = Pointing(lambda text: WORDS[WORDS.index(text) - 1])
    best = held_out_results(tmp_path / "r.json", CORPUS, asked_rows(),
                            {"start": lost, "BM25": None, "seed": of_seed, "p_1": of_p1}, None)
    table = json.loads((tmp_path / "r.json").read_text())
    assert table["seed"]["p_seed"]["ndcg@10"] == 1 > table["seed"]["p_1"]["ndcg@10"]
    assert table["p_1"]["p_1"]["ndcg@10"] == 1 > table["p_1"]["p_seed"]["ndcg@10"]
    assert table["BM25"]["p_seed"]["ndcg@10"] == 1 and best in ("seed", "p_1")
    out = capsys.readouterr().out
    assert "held out (8)" in out and f"kept: {best}, best on the other 8 held-out questions" in out
    best = held_out_results(tmp_path / "r.json", CORPUS, asked_rows(), {"start": of_seed, "worse": lost}, None)
    assert best == "start" and "kept: start, best on the other 8" in capsys.readouterr().out


def test_what_is_kept_and_is_worse_on_the_other_half_is_said(tmp_path, capsys):
    order = sorted(asked_rows(), key=lambda row: random.Random(row["seed_id"]).random())
    first_half = {row["query"] for row in order[:8]}
    lucky = Pointing(lambda text: text if text in first_half else WORDS[WORDS.index(text) - 1])
    unlucky = Pointing(lambda text: text if text not in first_half else WORDS[WORDS.index(text) - 1])
    best = held_out_results(tmp_path / "r.json", CORPUS, asked_rows(), {"start": unlucky, "tuned": lucky}, None)
    out = capsys.readouterr().out
    assert best == "tuned" and re.search(r"on the questions of the table it is worse: 0\.\d+, start 0\.\d+\n", out)
    held_out_results(tmp_path / "r.json", CORPUS, asked_rows(), {"start": unlucky, "same": unlucky}, None)
    assert "worse" not in capsys.readouterr().out


def test_labels_stand_beside(tmp_path, capsys):
    labelled = Beir(CORPUS, {"a": "red"}, {"a": {"p1": 1}})
    held_out_results(tmp_path / "r.json", CORPUS, asked_rows(),
                     {"start": Pointing(lambda text: text), "BM25": None}, labelled)
    table = json.loads((tmp_path / "r.json").read_text())
    assert set(table["start"]) == {"p_seed", "p_1", "labels", "gain"} and table["start"]["labels"]["mrr@10"] < 1
    assert "of 1 labelled questions" in capsys.readouterr().out


def test_a_model_is_measured_by_its_first_dimensions():
    model = small_model()
    beir = Beir(CORPUS, {word: word for word in WORDS}, {word: {f"p{n}": 1} for n, word in enumerate(WORDS)})
    ranked = found(model, beir, (8, 4))
    q = model.encode_queries(WORDS, "question answering", dim=4)
    P = model.encode_passages([p["text"] for p in CORPUS], WORDS, dim=4)
    for n, word in enumerate(WORDS):
        order = np.argsort(-(P @ q[n]), kind="stable")
        assert ranked[4][word] == [CORPUS[i]["_id"] for i in order]
    d = model.dims[0]
    assert ranked[8] != ranked[4] and found(model, beir)[None] == found(model, beir, (d,))[d]
    bm25 = found(None, beir, (8, 4))
    assert list(bm25) == [8, 4] and bm25[8] == bm25[4] == found(None, beir)[None]


def test_table_prints_what_it_writes(tmp_path, capsys):
    """The gain is over the stage above, in the first column."""
    def scores(*ndcg_values):
        return {"ndcg@10": list(ndcg_values), "recall@100": [1.0] * 4, "mrr@10": [0.5] * 4}

    results_table(tmp_path / "r.json", "T", {
        "a": {"384": scores(0, 0, 0, 0), "128": scores(1, 1, 1, 1)},
        "BM25": {"384": scores(0.5, 0.5, 0.5, 0.5), "128": scores(0.5, 0.5, 0.5, 0.5)},
        "b": {"384": scores(1, 1, 1, 1), "128": scores(1, 1, 1, 1)}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("T; [95 % interval of the gain over the stage above")
    assert lines[2].split() == ["a", "0.000", "1.000", "1.000", "1.000"]
    assert lines[3].split() == ["BM25", "0.500", "1.000", "0.500", "1.000", "[+0.500,", "+0.500]"]
    table = json.loads((tmp_path / "r.json").read_text())
    assert table["BM25"]["gain"] == [0.5, 0.5] and table["b"]["384"] == table["a"]["128"]


def test_written_questions_are_a_beir_folder(tmp_path):
    questions = [row for _, row in read_jsonl(ROOT / "engine/questions.jsonl")]
    names = {row["split"]: row["answers"][0] for row in questions}   # the last of each split
    corpus = [{"_id": name, "title": name, "text": "About it."} for name in set(names.values())]
    write_questions(tmp_path / "questions", corpus)
    for split, name in names.items():
        beir = read_beir(tmp_path / "questions", split)
        want = {row["query"]: {a: 1 for a in row["answers"] if a in names.values()} for row in questions
                if row["split"] == split and set(row["answers"]) & set(names.values())}
        assert {beir.queries[q]: relevant for q, relevant in beir.qrels.items()} == want and name in str(want)


def test_cost_counts_what_the_recipe_asks_and_asks_nobody():
    counter = DryRun()
    said = cost(LanguageModel(counter, chars=50), CORPUS, list(range(16)), "ql,rc")
    assert counter.calls == 16 + 2 * 16 * 16 and said.startswith("528 calls, about ")
    only_ql = DryRun()
    cost(LanguageModel(only_ql), CORPUS, [0, 1], "ql,retriever")
    assert only_ql.calls == 2 + 2 * 16


def test_mean_of_two_models_is_the_mean_of_their_weights():
    a, b = small_model(seed=0), small_model(seed=1)
    for share in (0.0, 0.25, 1.0):
        mixed = dict(mean_of(a, b, share).encoder.named_parameters())
        for (name, x), (_, y) in zip(a.encoder.named_parameters(), b.encoder.named_parameters(), strict=True):
            np.testing.assert_allclose(mixed[name].detach(), (share * x + (1 - share) * y).detach(), atol=1e-6)
