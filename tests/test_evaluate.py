"""engine/evaluate.py and engine/beir.py: measures and what they are taken on.   pytest tests/test_evaluate.py

Invariants: the measures are trec_eval's, ties included; a figure is computed from what the files say, or
refused with the line, and what is left out is said; a query does not find itself; BM25 is its formula.
"""

import gzip
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import gecko
import train
from engine import evaluate, files
from engine.beir import Beir, read_beir, read_qrels, read_split

# --------------------------------------------------------------------------------------------------
# Measures


def ndcg_spec(ranked, relevant, k):
    """Sum of grade / log2(rank + 1) over the first k, by that of the best order."""
    def dcg(grades):
        total = 0.0
        for rank in range(1, min(k, len(grades)) + 1):
            total += grades[rank - 1] / math.log2(rank + 1)
        return total

    return dcg([relevant.get(x, 0) for x in ranked]) / dcg(sorted(relevant.values(), reverse=True))


def judged_rankings(count=30):
    """Graded judgements, some of them of passages that nobody found, and a ranking for each query."""
    rng = np.random.default_rng(0)
    qrels, ranked = {}, {}
    for n in range(count):
        relevant = rng.permutation(300)[:rng.integers(1, 20)]
        qrels[f"q{n}"] = {f"p{i}": int(rng.integers(1, 4)) for i in relevant}
        ranked[f"q{n}"] = [f"p{i}" for i in rng.permutation(250)[:100]]
    return qrels, ranked


def test_measures_by_hand():
    relevant = {"a": 2, "b": 1}
    ranked = ["x", "b", "a"]
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert math.isclose(evaluate.ndcg(ranked, relevant), (1 / math.log2(3) + 2 / math.log2(4)) / ideal)
    assert evaluate.ndcg(["a", "b"], relevant) == 1 and evaluate.ndcg(["x"] * 10 + ["a"], relevant) == 0
    assert evaluate.recall(ranked, relevant) == 1 and evaluate.recall(ranked, relevant, 2) == 0.5
    assert evaluate.mrr(ranked, relevant) == 0.5 and evaluate.mrr(["x"], relevant) == 0


def test_ndcg_is_its_loop():
    """With a negative control: exponential gains, as some libraries have them, are another figure."""
    qrels, ranked = judged_rankings()
    for k in (1, 3, 10, 100):
        ours = [evaluate.ndcg(ranked[q], qrels[q], k) for q in qrels]
        np.testing.assert_allclose(ours, [ndcg_spec(ranked[q], qrels[q], k) for q in qrels], atol=1e-12)
    exponential = [ndcg_spec(ranked[q], {p: 2 ** g - 1 for p, g in qrels[q].items()}, 100) for q in qrels]
    assert not np.allclose(ours, exponential, atol=1e-3)


def test_measures_are_trec_evals():
    """BEIR's figures come from it; its reciprocal rank has no cut at 10."""
    trec = pytest.importorskip("pytrec_eval", reason="it comes with mteb")
    qrels, ranked = judged_rankings()
    queries = dict.fromkeys(qrels, "")
    ours = evaluate.retrieval_scores(ranked, qrels)
    runs = {q: {p: -float(rank) for rank, p in enumerate(ids)} for q, ids in ranked.items()}
    theirs = trec.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "recip_rank"}).evaluate(runs)
    for name, their in (("ndcg@10", "ndcg_cut_10"), ("recall@100", "recall_100")):
        np.testing.assert_allclose(ours[name], [theirs[q][their] for q in queries], atol=1e-12)
    whole = [theirs[q]["recip_rank"] for q in queries]
    np.testing.assert_allclose(ours["mrr@10"], [r if r >= 0.1 else 0 for r in whole], atol=1e-12)
    assert 0 < np.mean(ours["ndcg@10"]) < 0.5 and np.mean(ours["mrr@10"]) < np.mean(whole)


def test_a_query_without_a_relevant_passage_counts_as_nothing():
    """As in trec_eval: it stays in the mean, which is half of what it would be without it."""
    qrels = {"1": {"a": 1}, "2": {}}
    ranked = {"1": ["a", "b"], "2": ["a", "b"]}
    ours = evaluate.retrieval_scores(ranked, qrels)
    assert ours == {"ndcg@10": [1, 0], "recall@100": [1, 0], "mrr@10": [1, 0]}
    trec = pytest.importorskip("pytrec_eval", reason="it comes with mteb")
    theirs = trec.RelevanceEvaluator({"1": {"a": 1}, "2": {"a": 0}}, {"ndcg_cut.10", "recall.100"}).evaluate(
        {query: {i: 1 / n for n, i in enumerate(ids, 1)} for query, ids in ranked.items()})
    assert [list(theirs[q].values()) for q in "12"] == [[1, 1], [0, 0]]


def test_spearman_shares_ranks_of_equal_values():
    """Against the definition: Pearson's correlation of mean ranks."""
    def spearman(x, y):
        return (evaluate.standard_ranks(x, "x") * evaluate.standard_ranks(y, "y")).mean()

    assert math.isclose(spearman([1, 2, 2, 3], [4, 1, 1, 0]), -1)
    assert math.isclose(spearman([1, 2, 2, 4], [1, 3, 2, 4]), 4.5 / math.sqrt(4.5 * 5))
    for no_order in ([1, 1, 1, 1], [1, 2, 3, math.nan]):
        with pytest.raises(files.InputError, match="^x are all equal, or no numbers"):
            spearman(no_order, [1, 2, 2, 3])


# --------------------------------------------------------------------------------------------------
# Intervals


def test_paired_bootstrap_brackets_the_mean_gain():
    rng = np.random.default_rng(0)
    x = rng.random(200)
    low, high = evaluate.paired_bootstrap(x, x + 0.1 + rng.normal(0, 0.05, 200))
    assert 0.08 < low < 0.1 < high < 0.12
    assert evaluate.paired_bootstrap(x, x) == (0, 0)


# --------------------------------------------------------------------------------------------------
# Judgements


def read(text, tmp_path):
    path = tmp_path / "test.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_qrels(path)


@pytest.mark.parametrize("text", [
    "query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n2\tc\t1\n",
    "1\ta\t2\r\n1\tb\t0\r\n2\tc\t1\r\n",                             # no header, a file of Windows
    "\ufeffqid\tpid\tlabel\n1\ta\t2.0\n1\tb\t-1\n\n2\tc\t1.0\n",     # a byte order mark, whole grades
    "1\t0\ta\t2\n1\t0\tb\t0\n2\t0\tc\t1\n",                          # TREC, as MS MARCO ships it
    "topic iteration docno relevance\n1 Q0 a 2\n1 Q0 b 0\n2 Q0 c 1",
    "1 0.5  a 2\n1 4.5 b 0\n2 5  c 1\n",                             # as TREC-COVID ships it
    "1\t0 \ta\t2\n1\t0\t b\t0\n2\t0\tc \t1\n",                   # blanks beside the tabs
])
def test_judgements_of_beir_and_of_trec(text, tmp_path):
    """Three columns are query, passage, grade; four have one without a meaning in the second place."""
    assert read(text, tmp_path) == {"1": {"a": 2}, "2": {"c": 1}}


def test_an_id_with_a_blank_stands_between_tabs(tmp_path):
    assert read("video 1\ta 2\t3\n", tmp_path) == {"video 1": {"a 2": 3}}


def test_a_query_whose_grades_are_all_0_stays(tmp_path):
    assert read("1\ta\t1\n2\ta\t0\n", tmp_path) == {"1": {"a": 1}, "2": {}}


@pytest.mark.parametrize("text, message", [
    ("1\ta\t1\n2\tb\n", ":2: .*want query, passage, grade"),
    ("1\ta\t0.5\n", ":1: .*whole numbers"),
    ("1\ta\tnan\n", ":1: .*whole numbers"),
    ("1\ta\thigh\n", ":1: .*want"),                                    # no header: it names no columns
    ("query-id\tcorpus-id\tscore\nquery-id\tcorpus-id\tscore\n", ":2: .*want"),
    ("1\t0\ta\t1\n1\ta\t1\t0.9\n", ":2: .*want"),                      # the passage in the second place
    ("1\ta\t1\n1\t0\tb\t1\n", ":2: .*want"),                           # two forms in one file
    ("1\t0\ta\t1\n1\tb\t1\n", ":2: .*want"),
    (f"1\ta\t{'9' * 5000}\n", ":1: .*want"),
    ("1,a,1\n", ":1: .*want"),
    ("1\ta\t1\textra\t1\n", ":1: .*want"),
    ("1\ta\t1\n1\ta\t2\n", ":2: another grade"),
    ("1\ta\t0\n1\tb\t-1\n", "no relevant passage"),
    (b"1\ta\xff\t1\n", "UTF-8 text"),
])
def test_judgements_that_cannot_be_read_one_way_only_are_refused(text, message, tmp_path):
    with pytest.raises(files.InputError, match="test.tsv.*" + message):
        read(text, tmp_path)
    with pytest.raises(files.InputError, match="none.tsv: no such file"):
        read_qrels(tmp_path / "none.tsv")


# --------------------------------------------------------------------------------------------------
# A BEIR folder


WORDS = "cat dog horse mouse tiger saw drill hammer wrench chisel".split()


def beir_folder(path, corpus=None, queries=None, qrels=None):
    """Passages p0 to p9, each about one word, and a query for each; rows and lines may be replaced."""
    files.write_jsonl(path / "corpus.jsonl", corpus or [
        {"_id": f"p{i}", "title": word.title(), "text": f"all about the {word}"} for i, word in enumerate(WORDS)])
    files.write_jsonl(path / "queries.jsonl", queries or [
        {"_id": f"q{i}", "text": f"what is a {word}"} for i, word in enumerate(WORDS)])
    (path / "qrels").mkdir(exist_ok=True)
    (path / "qrels/test.tsv").write_text(qrels or "".join(f"q{i}\tp{i}\t1\n" for i in range(len(WORDS))))
    return path


def test_a_folder_holds_what_its_files_say_also_packed(tmp_path):
    beir = read_beir(beir_folder(tmp_path))
    assert {p["_id"] for p in beir.corpus} == set().union(*beir.qrels.values()) and len(beir.queries) == 10
    for path in tmp_path.glob("*.jsonl"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_beir(tmp_path) == beir
    with pytest.raises(files.InputError, match="none/corpus.jsonl: no such file"):
        read_beir(tmp_path / "none")


def test_judged_passages_that_the_corpus_has_not_are_counted(tmp_path, capsys):
    """They stay in the judgements, so that recall is what it would be if nobody found them."""
    beir = read_beir(beir_folder(tmp_path, qrels="q0\tp0\t1\nq0\t7\t1\nq1\t8\t1\n"))
    assert "2 of 3 judged passages are not in corpus.jsonl, first: 7" in capsys.readouterr().err
    assert evaluate.retrieval_scores({"q0": ["p0"], "q1": ["p1"]}, beir.qrels)["recall@100"] == [0.5, 0]
    with pytest.raises(files.InputError, match="2 of 2 judged passages are not in corpus.jsonl, first: 0007"):
        read_beir(beir_folder(tmp_path, qrels="q0\t0007\t1\nq1\t0008\t1\n"))


@pytest.mark.parametrize("queries, message", [
    ([{"_id": "1", "text": "a cat"}, {"_id": 1, "text": "a dog"}], "jsonl:2: \"_id\" '1' has another text above"),
    ([{"_id": "1", "text": " "}, {"_id": "2", "text": "a cat"}], "query 1 .*has no text"),
    ([{"_id": "1", "text": " ", "title": "T"}], "query 1 .*has no text"),
    ([{"_id": None, "text": "a cat"}], "queries.jsonl:1: no \"_id\""),
    ([{"_id": "2", "text": "a cat"}], "query 1 is not in queries.jsonl")])
def test_queries_that_are_not_one_text_each_are_refused(queries, message, tmp_path):
    with pytest.raises(files.InputError, match=message):
        read_beir(beir_folder(tmp_path, queries=queries, qrels="1\tp0\t1\n"))
    same = [{"_id": "1", "text": "a cat"}] * 2
    assert read_beir(beir_folder(tmp_path, queries=same, qrels="1\tp0\t1\n")).queries == {"1": "a cat"}


# --------------------------------------------------------------------------------------------------
# Rankings


def test_equal_scores_are_ordered_as_trec_eval_orders_them(tmp_path):
    """By id, descending, for vectors and for BM25, wherever the passages stand in the file."""
    rows = [{"_id": i, "title": "", "text": "the cat"} for i in ("10", "9", "b", "2", "a")]
    trec = pytest.importorskip("pytrec_eval", reason="it comes with mteb")
    relevant = {"2": 1, "9": 1}
    theirs = trec.RelevanceEvaluator({"q": relevant}, {"ndcg_cut.10", "recip_rank"}).evaluate(
        {"q": {row["_id"]: 1.0 for row in rows}})["q"]
    for order in (rows, rows[::-1]):
        beir = read_beir(beir_folder(tmp_path, order, [{"_id": "q", "text": "cat"}], "q\t2\t1\nq\t9\t1\n"))
        alike = np.ones((5, 1), np.float32)
        for ranked in (evaluate.rankings(beir, alike[:1], alike), evaluate.bm25_rankings(beir)):
            assert ranked == {"q": ["b", "a", "9", "2", "10"]}
            assert math.isclose(evaluate.ndcg(ranked["q"], relevant), theirs["ndcg_cut_10"])
            assert math.isclose(evaluate.mrr(ranked["q"], relevant), theirs["recip_rank"])


def test_a_query_that_stands_in_the_corpus_does_not_find_itself():
    """BEIR leaves out the passage of the query's own id (ArguAna), for vectors and for BM25; 100 others stay."""
    corpus = [{"_id": str(i), "title": "", "text": f"word word{i} word{(i + 1) % 150}"} for i in range(150)]
    x = np.eye(150, dtype=np.float32) + 0.5 * np.eye(150, k=1, dtype=np.float32)   # each nearest to itself
    queries = {p["_id"]: p["text"] for p in corpus}
    beir = Beir(corpus, queries, {str(i): {str(i ^ 1): 1} for i in range(150)})
    for found in (evaluate.rankings(beir, x, x), evaluate.bm25_rankings(beir)):
        assert all(query not in ids and len(ids) == 100 for query, ids in found.items())
        assert sum(i + 1 == int(ids[0]) or int(ids[0]) == i - 1 for i, ids in enumerate(found.values())) > 140
    beir.qrels["7"]["7"] = 1                                         # judged: a passage like any other
    assert evaluate.rankings(beir, x, x)["7"][0] == "7"


def test_bm25_by_hand():
    corpus = [{"_id": str(i), "title": "", "text": t} for i, t in enumerate(["a b b", "b c", "c c c d"])]
    bm25 = evaluate.bm25(corpus)
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    want = [idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * n / 3)) for tf, n in ((2, 3), (1, 2))]
    np.testing.assert_allclose(bm25("b"), [*want, 0])
    beir = Beir(corpus, {"q": "b"}, {"q": {"2": 1}})
    assert evaluate.bm25_rankings(beir) == {"q": ["0", "1"]}, "a passage without a term of the query is not found"


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of an encoder that cuts at 64 tokens."""
    folder = tmp_path_factory.mktemp("model") / "m"
    made = gecko.tiny([f"title: {word} text: all about the {word}" for word in WORDS] * 3, hidden_size=64)
    made.max_length = 64
    gecko.save(made, folder)
    return folder


def command(model, monkeypatch, *arguments):
    """`train.py evaluate` in this process; exits as the command line does."""
    monkeypatch.setattr(sys, "argv", ["train.py", "evaluate", "--model", str(model), *map(str, arguments)])
    files.run(train.main)


def test_the_command_writes_fractions_of_1(model, tmp_path, monkeypatch, capsys):
    pairs = [{"sentence1": f"the {a}", "sentence2": f"the {b}", "score": int(a == b)}
             for a, b in zip(WORDS, [*WORDS[:5], *WORDS[:5]], strict=True)]
    files.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    command(model, monkeypatch, "--beir", beir_folder(tmp_path), "--sts", tmp_path / "pairs.jsonl",
            "--out", tmp_path / "scores.json", "--dim", "16")
    scores = json.loads((tmp_path / "scores.json").read_text())
    retrieval, similarity = scores[tmp_path.name], scores["pairs.jsonl"]
    assert list(retrieval) == ["ndcg@10", "recall@100", "mrr@10"] and retrieval["recall@100"] == 1
    assert 0 < retrieval["mrr@10"] <= retrieval["ndcg@10"] <= 1 and -1 <= similarity["spearman"] <= 1
    printed = capsys.readouterr().out
    assert f"{tmp_path.name} ndcg@10 {retrieval['ndcg@10']:.4f}" in printed


def test_sets_of_one_name_keep_all_their_figures(model, tmp_path, monkeypatch):
    """A BEIR folder and a similarity file of one name: neither's figures take the place of the other's."""
    pairs = [{"sentence1": f"the {a}", "sentence2": f"the {b}", "score": i}
             for i, (a, b) in enumerate(zip(WORDS, WORDS[1:], strict=False))]
    (tmp_path / "sts").mkdir()
    files.write_jsonl(tmp_path / "sts" / tmp_path.name, pairs)
    command(model, monkeypatch, "--beir", beir_folder(tmp_path), "--sts", tmp_path / "sts" / tmp_path.name,
            "--out", tmp_path / "scores.json")
    (figures,) = json.loads((tmp_path / "scores.json").read_text()).values()
    assert list(figures) == ["ndcg@10", "recall@100", "mrr@10", "spearman"]


def test_the_cosine_of_a_text_with_itself_is_a_tie(model, tmp_path):
    """Its last digits differ from text to text; no correlation is taken of them."""
    texts = [" ".join(WORDS[:n]) for n in range(1, 10)]
    rows = [{"sentence1": text, "sentence2": text, "score": i} for i, text in enumerate(texts)]
    files.write_jsonl(tmp_path / "in.jsonl", rows)
    loaded = gecko.load(model)
    x = loaded.encode_queries(texts, "semantic similarity")
    assert len(set((x * x).sum(1).tolist())) > 1
    with pytest.raises(files.InputError, match="the cosines are all equal"):
        evaluate.sts_terms(loaded, tmp_path / "in.jsonl")


def test_no_figures_are_written_over_what_they_are_of(model, tmp_path, monkeypatch, capsys):
    files.write_jsonl(tmp_path / "pairs.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    before = (tmp_path / "pairs.jsonl").read_bytes()
    for out, said in ((tmp_path / "pairs.jsonl", "it is an input too"), (tmp_path, "a folder stands there")):
        with pytest.raises(SystemExit):
            command(model, monkeypatch, "--sts", tmp_path / "pairs.jsonl", "--out", out)
        assert said in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_a_split_stands_behind_the_folder(tmp_path):
    (tmp_path / "set").mkdir()
    folder = beir_folder(tmp_path / "set")
    assert read_split(str(folder)) == read_split(f"{folder}:test") == read_beir(folder)
    with pytest.raises(files.InputError, match="typo/corpus.jsonl: no such file"):
        read_split("typo")
    with pytest.raises(files.InputError, match="dev.tsv: no such file"):
        read_split(f"{folder}:dev")


def test_the_command_says_what_is_cut_and_what_is_missing(model, tmp_path, monkeypatch, capsys):
    rows = [{"_id": f"p{i}", "title": "", "text": word * (1 if i else 60)} for i, word in enumerate(WORDS)]
    command(model, monkeypatch, "--beir", beir_folder(tmp_path, rows, qrels="q0\tp0\t1\nq1\tgone\t1\n"))
    said = capsys.readouterr()
    assert "passages=1 of 10 texts were cut at 64 tokens" in said.err and "queries=" not in said.err
    assert "1 of 2 judged passages are not in corpus.jsonl, first: gone" in said.err
    assert "ndcg@10 0." in said.out


def test_passages_without_a_text_are_never_found(model, tmp_path, monkeypatch, capsys):
    """As FiQA and HotpotQA ship them; a judged one counts as not found. A title alone is a passage."""
    rows = [{"_id": "p0", "title": "Cat", "text": ""}, {"_id": "p1", "title": "", "text": " "},
            *({"_id": f"empty{n}", "title": "", "text": ""} for n in range(200)),
            {"_id": "p2", "title": "", "text": "all about the horse"}]
    beir = read_beir(beir_folder(tmp_path, rows, qrels="q0\tp0\t1\nq1\tp1\t1\nq2\tp2\t1\n"))
    assert evaluate.bm25_rankings(beir) == {"q0": ["p0"], "q1": [], "q2": ["p2"]}
    capsys.readouterr()
    command(model, monkeypatch, "--beir", tmp_path)
    said = capsys.readouterr()
    assert "201 of 203 passages have neither title nor text" in said.err
    assert "recall@100 0.6667" in said.out and "not in corpus.jsonl, first: p1 (or have no text" in said.err


def test_repeated_rows_and_a_byte_order_mark_change_no_figure(model, tmp_path, monkeypatch, capsys):
    command(model, monkeypatch, "--beir", beir_folder(tmp_path))
    figures = capsys.readouterr().out
    for name in ("corpus", "queries"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\ufeff" + path.read_text() + path.read_text().splitlines()[0] + "\n", encoding="utf-8")
    command(model, monkeypatch, "--beir", tmp_path)
    said = capsys.readouterr()
    assert said.out == figures and "corpus.jsonl: 1 repeated rows are read once" in said.err


def test_judgements_in_trecs_form_give_the_figure_of_beirs(model, tmp_path, monkeypatch, capsys):
    figures = []
    for form in ("q{0}\tp{0}\t1\n", "q{0}\t0\tp{0}\t1\n", "q{0} 0 p{0} 1\n"):
        command(model, monkeypatch, "--beir", beir_folder(tmp_path, qrels="".join(map(form.format, range(10)))))
        figures.append(capsys.readouterr().out)
    assert len(set(figures)) == 1 and "mrr@10" in figures[0]


@pytest.mark.parametrize("change, message", [
    ({"qrels": "q0\tp0\t0.5\n"}, "want query, passage, grade (BEIR)"),
    ({"qrels": "q0\tgone\t1\n"}, "1 of 1 judged passages are not in corpus.jsonl"),
    ({"queries": [{"_id": "q0", "text": "a"}, {"_id": "q0", "text": "b"}]}, "queries.jsonl:2: \"_id\" 'q0'")])
def test_a_fault_is_one_line_and_exit_2(change, message, model, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        command(model, monkeypatch, "--beir", beir_folder(tmp_path, **change), "--out", tmp_path / "scores.json")
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not said.out and not (tmp_path / "scores.json").exists()


def test_the_command_says_the_share_of_unknown_tokens(tmp_path, monkeypatch, capsys):
    """A tokenizer that has no bytes to fall back on gives all letters that it does not know one vector."""
    made = gecko.tiny(["cat dog"] * 3, hidden_size=64)
    rules = json.loads(made.tokenizer.to_str())
    rules["model"]["byte_fallback"] = False
    made.tokenizer = made.tokenizer.from_str(json.dumps(rules))
    made.unknown_id = made.tokenizer.token_to_id("[UNK]")
    gecko.save(made, tmp_path / "m")
    queries = [{"_id": "q0", "text": "猫 cat"}]
    command(tmp_path / "m", monkeypatch, "--beir", beir_folder(tmp_path, queries=queries, qrels="q0\tp0\t1\n"))
    assert "of the tokens are unknown to this model's tokenizer" in capsys.readouterr().err


def test_a_vector_that_is_no_number_is_refused_by_its_text(model, tmp_path, monkeypatch, capsys):
    """In retrieval and in similarity; Spearman's correlation of three pairs with one NaN would be 1."""
    made = gecko.load(model)
    word = made.tokenizer.encode("cat", add_special_tokens=False).ids[0]
    with torch.no_grad():
        made.encoder.embeddings.word_embeddings.weight[word] = math.nan
    gecko.save(made, tmp_path / "m")
    pairs = [{"sentence1": word, "sentence2": "a dog", "score": n} for n, word in enumerate(WORDS[:3])]
    files.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for arguments in (("--beir", beir_folder(tmp_path)), ("--sts", tmp_path / "pairs.jsonl")):
        with pytest.raises(SystemExit) as stop:
            command(tmp_path / "m", monkeypatch, *arguments)
        said = capsys.readouterr()
        assert stop.value.code == 2 and not said.out and re.search("no finite vector.*cat", said.err)


def test_a_model_of_another_similarity_is_refused_by_name(model, tmp_path, monkeypatch, capsys):
    """Rankings are by cosine; the dot product of vectors of any length is another order."""
    shutil.copytree(model, tmp_path / "m")
    for path in (tmp_path / "m").rglob("*Normalize*"):
        shutil.rmtree(path)
    modules = json.loads((tmp_path / "m/modules.json").read_text())
    modules = [part for part in modules if "Normalize" not in part["type"]]
    (tmp_path / "m/modules.json").write_text(json.dumps(modules))
    config = tmp_path / "m/config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"similarity_fn_name": "dot"}))
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "m", monkeypatch, "--beir", beir_folder(tmp_path))
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out and "similarity_fn_name 'dot'" in said.err


@pytest.mark.parametrize("change, message", [
    ({"score": "high"}, ":2: score is 'high'"), ({"score": float("nan")}, ":2: score is nan"),
    ({"score": True}, ":2: score is True"), ({"sentence1": ""}, ":2: want sentence1 and sentence2"),
    ({"sentence2": 7}, ":2: want sentence1 and sentence2"), ({"score": 1}, "in.jsonl: the scores are all equal")])
def test_sentence_pairs_are_two_texts_and_a_number(change, message, tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "score": 1}
    files.write_jsonl(tmp_path / "in.jsonl", [row, {**row, "score": 0, **change}])
    with pytest.raises(files.InputError, match=message):
        evaluate.read_sts(tmp_path / "in.jsonl")


def test_short_names_are_whole_paths_where_two_would_be_the_same():
    assert evaluate.short_names(["a/x", "b/x", "b/y"]) == ["a/x", "b/x", "b/y"]
    assert evaluate.short_names(["a/x", "b/y"]) == ["x", "y"]
