"""Measures, intervals, BEIR folders and BM25.   pytest tests/test_evaluate.py

Invariants: the measures are trec_eval's; a figure is computed from what the files say, or refused with the
line; a query does not find itself; BM25 is its formula.
"""

import math

import numpy as np
import pytest

from engine import evaluate, files

# --------------------------------------------------------------------------------------------------
# Measures, by hand


def test_measures_by_hand():
    relevant = {"a": 2, "b": 1}
    ranked = ["x", "b", "a"]
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert math.isclose(evaluate.ndcg(ranked, relevant), (1 / math.log2(3) + 2 / math.log2(4)) / ideal)
    assert evaluate.ndcg(["a", "b"], relevant) == 1 and evaluate.ndcg(["x"] * 10 + ["a"], relevant) == 0
    assert evaluate.recall(ranked, relevant) == 1 and evaluate.recall(ranked, relevant, 2) == 0.5
    assert evaluate.mrr(ranked, relevant) == 0.5 and evaluate.mrr(["x"], relevant) == 0


def test_a_query_without_a_relevant_passage_counts_as_nothing(tmp_path):
    """As in trec_eval: it stays in the mean, which is half of what it would be without it."""
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n2\ta\t0\n")
    qrels = evaluate.read_qrels(tmp_path / "qrels.tsv")
    ranked = {"1": ["a", "b"], "2": ["a", "b"]}
    ours = evaluate.retrieval_scores(ranked, evaluate.Beir([], {"1": "x", "2": "y"}, qrels))
    assert ours == {"ndcg@10": [1, 0], "recall@100": [1, 0], "mrr@10": [1, 0]}
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="the other side; it comes with mteb")
    theirs = pytrec_eval.RelevanceEvaluator({"1": {"a": 1}, "2": {"a": 0}}, {"ndcg_cut.10", "recall.100"}).evaluate(
        {query: {i: 1 / n for n, i in enumerate(ids, 1)} for query, ids in ranked.items()})
    assert [list(theirs[q].values()) for q in "12"] == [[1, 1], [0, 0]]


def test_a_query_that_stands_in_the_corpus_does_not_find_itself():
    """BEIR leaves out the passage of the query's own id (ArguAna), for vectors and for BM25; 100 others stay."""
    corpus = [{"_id": str(i), "title": "", "text": f"word{i} word{(i + 1) % 150}"} for i in range(150)]
    x = np.eye(150, dtype=np.float32) + 0.5 * np.eye(150, k=1, dtype=np.float32)   # each nearest to itself
    beir = evaluate.Beir(corpus, {str(i): corpus[i]["text"] for i in range(150)}, {str(i): {str(i ^ 1): 1}
                                                                                for i in range(150)})
    for found in (evaluate.rankings(beir, x, x), evaluate.BM25(corpus).rankings(beir)):
        assert all(query not in ids and len(ids) == 100 for query, ids in found.items())
        assert sum(i + 1 == int(ids[0]) or int(ids[0]) == i - 1 for i, ids in enumerate(found.values())) > 140
    beir.qrels["7"]["7"] = 1                                         # judged: a passage like any other
    assert evaluate.rankings(beir, x, x)["7"][0] == "7"


def test_spearman_shares_ranks_of_equal_values():
    """Against the definition: Pearson's correlation of mean ranks."""
    x, y = [1, 2, 2, 3], [4, 1, 1, 0]
    assert math.isclose(evaluate.spearman_terms(x, y).mean(), -1)
    assert math.isclose(evaluate.spearman_terms([1, 2, 2, 4], [1, 3, 2, 4]).mean(), 4.5 / math.sqrt(4.5 * 5))


def test_paired_bootstrap_brackets_the_mean_gain():
    rng = np.random.default_rng(0)
    x = rng.random(200)
    low, high = evaluate.paired_bootstrap(x, x + 0.1 + rng.normal(0, 0.05, 200))
    assert 0.08 < low < 0.1 < high < 0.12
    assert evaluate.paired_bootstrap(x, x) == (0, 0)


def test_bm25_by_hand():
    corpus = [{"_id": str(i), "title": "", "text": t} for i, t in enumerate(["a b b", "b c", "c c c d"])]
    bm25 = evaluate.BM25(corpus)
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    want = [idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * n / 3)) for tf, n in ((2, 3), (1, 2))]
    np.testing.assert_allclose(bm25.scores("b"), [*want, 0])


def test_qrels_errors_name_the_line(tmp_path):
    path = tmp_path / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n2\tb\n")
    with pytest.raises(files.InputError, match=":3: want"):
        evaluate.read_qrels(path)
    path.write_text("query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n")
    assert evaluate.read_qrels(path) == {"1": {"a": 2}}
    path.write_text("1\ta\t0\n1\tb\t-1\n")
    with pytest.raises(files.InputError, match="no relevant passage"):
        evaluate.read_qrels(path)
    path.write_text("video 1\ta\t2\n")                               # no header: this "id" is in a query's
    assert evaluate.read_qrels(path) == {"video 1": {"a": 2}}
    path.write_bytes(b"1\ta\xff\t1\n")
    with pytest.raises(files.InputError, match="not UTF-8 text"):
        evaluate.read_qrels(path)
