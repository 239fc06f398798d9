"""The paper's tables in small.   pytest tests/lab/test_tables.py

Invariants: a row is trained and encoded in the way that its name says; finished rows are not run again
and rows of other data or settings are not mixed in; a claim holds only where an interval says so;
RESULTS.md shows what the result files say.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tables
import torch

import data
import gecko
import llm
import train
from engine import evaluate, files
from engine.beir import read_beir
from engine.offline import Offline
from engine.transport import LLMError

LAB = Path(__file__).parent
RESULTS = LAB / "results"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A BEIR folder of one's own: functions of `math`, each asked for by its first words, and a model folder."""
    folder = tmp_path_factory.mktemp("own")
    corpus = [p for p in data.builtin_corpus() if p["title"].split(".")[0] in ("math", "statistics")]
    files.write_jsonl(folder / "corpus.jsonl", corpus)
    asked = [f"{p['title'].split('.')[-1]} {' '.join(p['text'].split()[:4])}" for p in corpus]
    files.write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(asked)])
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(
        f"q{n}\t{p['_id']}\t1\n" for n, p in enumerate(corpus)))
    gecko.save(gecko.tiny([p["text"] for p in corpus], hidden_size=24), folder / "model")
    return folder


def run(home, out, table, *more, seeds=1):
    """The command in this process."""
    sys.argv = ["tables.py", table, *f"--corpus {home} --init {home}/model --out {out} --steps 3 "
                f"--batch-size 16 --dims 24,8 --queries 150 --seeds {seeds}".split(), *map(str, more)]
    tables.main()
    return [json.loads(line) for line in (out / f"{table}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lab(home, tmp_path_factory):
    """What the rows are made from, and the `out` that its FRet file stands in."""
    out = tmp_path_factory.mktemp("out")
    run(home, out, "labels")
    mined = next(out.glob("fret-*"))
    corpus = files.read_passages(mined / "corpus.jsonl")
    c = train.TrainConfig(batch_size=16, steps=2, dims="24,8", lr=1e-3)
    return tables.Lab(c, corpus, data.read_records(mined / "fret.jsonl"), gecko.load(home / "model"), [], [],
                     {"own": read_beir(home)}, "question answering"), out


@pytest.fixture(autouse=True)
def restore_argv():
    before = sys.argv
    yield
    sys.argv = before


# --------------------------------------------------------------------------------------------------
# What the rows are


def test_six_rows_come_from_one_mined_file(lab, monkeypatch):
    """p_seed rows keep the seed, p_1 rows have the file's positive, p_20 its last; no LLM is asked."""
    lab, _ = lab
    monkeypatch.setattr(Offline, "query_likelihood", None)
    text = {p["_id"]: p["text"] for p in lab.corpus}
    made = {row: case.sets(0)[0] for row, case in tables.cases("labels", lab).items()}
    assert list(made) == list(tables.TABLES["labels"].paper) and len({len(rows) for rows in made.values()}) == 1
    for row, rows in made.items():
        for ours, mined in zip(rows, lab.rows, strict=True):
            assert ours["positive"]["text"] == text[mined["seed_id" if "seed" in row else "positive_id"]]
            assert (ours["negative"] is None) == ("none" in row)
            if row == "p_1, p_20":
                assert ours["negative"]["text"] == text[mined["negative_id"]]
    assert made["p_1, sampled"] != made["p_1, p_20"] and made["p_seed, none"] != made["p_1, none"]


def test_tasks_have_as_many_rows_each(lab):
    made = {row: case.sets(0)[0] for row, case in tables.cases("tasks", lab[0]).items()}
    assert list(made) == list(tables.TABLES["tasks"].paper)
    sizes = {row: len(rows) for row, rows in made.items()}
    assert max(sizes.values()) - min(sizes.values()) < 4
    for kind in llm.FREQUENT_TASKS:
        assert {r["kind"] for r in made[kind]} == {kind}
        assert sum(r["kind"] == kind for r in made["all, uniformly"]) == sizes["all, uniformly"] // 4
    assert {r["kind"] for r in made["all"]} == set(llm.FREQUENT_TASKS)


def test_formats_are_trained_and_encoded_with(lab, monkeypatch):
    """Every text that a row's training or measuring tokenises has the row's format."""
    lab, seen = lab[0], []
    tokens = gecko.Gecko.tokens
    monkeypatch.setattr(gecko.Gecko, "tokens",
                        lambda self, texts, *a: (seen.extend(texts), tokens(self, texts, *a))[1])
    starts = {"unified": ("task: ", "title: "), "sentence": ("The task is ", "The title is ")}
    for row, case in tables.cases("formats", lab).items():
        seen.clear()
        tables.case_scores(lab, case, row, (24,), 0)
        queries = len(lab.rows) + len(lab.beir["own"].queries)
        if row in starts:
            assert all(t.startswith(starts[row]) for t in seen)
        elif row == "concatenation":
            assert sum(t.startswith(("question answering ", *llm.FREQUENT_TASKS)) for t in seen) > queries / 2
        else:
            assert not any(t.startswith(("task", "The task", "question answering")) for t in seen)


def test_mixture_adds_a_set_a_row(lab):
    four = replace(lab[0], data=[[{"n": n}] for n in range(4)])
    made = {row: case.sets(0) for row, case in tables.cases("mixture", four).items()}
    assert list(made) == list(tables.TABLES["mixture"].paper)
    assert [[rows[0]["n"] for rows in sets] for sets in made.values()] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def made_cases(home, out, lab, table, *more):
    """What the command makes of the recipe's own files: `training_cases` without a run."""
    args = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "table_command", args.append)
        patch.setattr(sys, "argv", ["tables.py", table, "--out", str(out), *map(str, more)])
        tables.main()
    mined = next(out.glob("fret-*"))
    return tables.training_cases(args[0], lab.c, gecko.load(home / "model"), mined, False, lab.beir)


def test_pairs_without_words_are_left_to_no_format(home, lab, monkeypatch):
    """Of the built-in pairs some have a query without a letter, which PLAIN would make a text of no tokens."""
    blank = data.record("search result", " ", {"title": "math.ceil", "text": "the ceiling of x"})
    other = data.record("search result", "open a file", {"title": "os.open", "text": "open the file path"})
    monkeypatch.setattr(tables, "builtin_pairs", lambda *a: [blank, {**blank, "query": "round up"}, other] * 8)
    for run in made_cases(home, lab[1], lab[0], "formats").values():
        assert run(0)


def test_classes_of_ones_own_stand_beside_the_modules(home, lab, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "builtin_pairs", lambda *a: lab[0].rows)         # not 50,000 of them
    path = tmp_path / "mine/a.jsonl"
    files.write_jsonl(path, [{"text": "the sine of x", "label": "sine"}, {"text": "the mean", "label": "mean"}])
    run = next(iter(made_cases(home, lab[1], lab[0], "mixture", "--classes", path, path).values()))
    assert {"accuracy modules", "accuracy mine"} <= set(run(0))


def test_dims_are_cut_and_normalised_again(lab, monkeypatch):
    """With MRL the loss has two dimensions, without one; both are measured at all cuts of unit vectors."""
    trained, lengths = [], []
    monkeypatch.setattr(train, "train", lambda model, stage, sets, c, **k: trained.append(c.dims))
    find = evaluate.topk
    monkeypatch.setattr(evaluate, "topk", lambda q, P, k: lengths.append(
        (P.shape[1], np.abs(np.linalg.norm(P, axis=1) - 1).max())) or find(q, P, k))
    for row, case in tables.cases("dims", lab[0]).items():
        scores = tables.case_scores(lab[0], case, row, (24, 8, 4), 0)
        assert list(scores) == ["nDCG@10 own", "nDCG@10 own at 8", "nDCG@10 own at 4"]
    assert trained == ["", "24,8"] and [d for d, _ in lengths] == [24, 8, 4] * 2
    assert max(off for _, off in lengths) < 1e-5


def test_no_cut_has_no_dimension(home, tmp_path):
    """The table divides d by up to 24; a small model has fewer cuts."""
    gecko.save(gecko.tiny(["the sine of x"], hidden_size=12), tmp_path / "small")
    rows = run(home, tmp_path, "dims", "--init", tmp_path / "small", "--dims", "12")
    assert [column.partition(" at ")[2] for column in rows[0]["scores"]] == ["", "4", "2", "1"]


def test_rerank_rows_by_hand(home, monkeypatch):
    """A ranker that knows the answer puts it first by QL; a relevance that is its reverse puts it last."""
    beir, first = read_beir(home), gecko.load(home / "model")
    answer = {beir.queries[q]: next(iter(judged)) for q, judged in beir.qrels.items()}

    class Knows:
        name = "knows"

        def query_likelihood(self, pairs):
            return [float(answer[q] == p["_id"]) for q, p in pairs]

        def relevance(self, pairs):
            return [-float(answer[q] == p["_id"]) for q, p in pairs]

    scores = tables.rerank_scores(Knows(), first, beir, 4, "question answering")
    ranked = evaluate.rankings(beir, *evaluate.encode_beir(first, beir, "question answering"))
    found = [q for q, near in ranked.items() if set(near[:4]) & set(beir.qrels[q])]
    assert 0 < len(found) < len(beir.queries)
    assert np.isclose(np.mean(scores["QL"]), len(found) / len(beir.queries))
    assert np.isclose(np.mean(scores["RC"]) * len(beir.queries), len(found) / np.log2(5))
    # ranks 1 and 4: R = 1 + 1/4; the next has ranks 2 and 1: R = 1/2 + 1, unless the answer was itself first
    assert np.mean(scores["RC"]) < np.mean(scores["QL + RC"]) < np.mean(scores["QL"])

    corpus = files.read_passages(home / "corpus.jsonl")[:12]
    few = replace(beir, corpus=[{**p, "_id": "q1" if n == 9 else p["_id"]} for n, p in enumerate(corpus)],
                  queries={f"q{n}": beir.queries[f"q{n}"] for n in range(4)})
    # q1 has 11 candidates, the others 12: each is still judged by its own scores
    assert tables.rerank_scores(Knows(), first, few, 12, "question answering")["QL"] == [1.0] * 4

    monkeypatch.setattr(Knows, "relevance", lambda self, pairs: [None] * len(pairs))
    with pytest.raises(LLMError, match="call failed"):
        tables.rerank_scores(Knows(), first, beir, 4, "question answering")


# --------------------------------------------------------------------------------------------------
# Running, stopping, going on


def test_finished_rows_are_not_run_again(home, lab, monkeypatch, capsys):
    """The same command prints the same table and trains nothing; another step count or seed runs its rows."""
    out = lab[1]
    before = (out / "labels.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(llm, "generate", None)
    assert len(run(home, out, "labels")) == 6 and (out / "labels.jsonl").read_bytes() == before
    assert (out / "labels.md").read_text() in capsys.readouterr().out
    with pytest.raises(TypeError):                                   # train is None: this one it would run
        run(home, out, "labels", seeds=2)
    with pytest.raises(TypeError):
        run(home, out, "labels", "--tau", "0.2")


def test_a_stopped_table_goes_on(tmp_path):
    """Rows run once, whatever the stop left at the end of the file; rows of another key stay, unused."""
    ran = []

    def row(name, stop=False):
        def scores(seed):
            if stop:
                raise KeyboardInterrupt
            ran.append((name, seed))
            return {"nDCG@10 own": [0.5, seed]}
        return scores

    with pytest.raises(KeyboardInterrupt):
        tables.run_table("labels", tmp_path, "a", "offline", range(2), {"p": row("p"), "q": row("q", True)})
    with open(tmp_path / "labels.jsonl", "a") as file:
        file.write('{"table": "labels", "row": "q", "se')
    rows = tables.run_table("labels", tmp_path, "a", "offline", range(2), {"p": row("p"), "q": row("q")})
    assert ran == [("p", 0), ("q", 0), ("p", 1), ("q", 1)] and len(rows) == 4
    other = tables.run_table("labels", tmp_path, "b", "offline", range(1), {"p": row("p")})
    assert len(other) == 1 and other[0]["key"] == "b" and len(tables.whole_rows(tmp_path / "labels.jsonl")) == 5


def test_a_key_is_of_bytes_and_settings(tmp_path):
    (tmp_path / "x").write_text("1")
    key = tables.files_key([tmp_path], 1)
    assert key == tables.files_key([tmp_path], 1) != tables.files_key([tmp_path], 2)
    (tmp_path / "x").write_text("2")
    assert tables.files_key([tmp_path], 1) != key


@pytest.mark.parametrize("table", ["labels", "rerank"])
def test_bf16_is_for_the_row_and_not_around_it(table, home, tmp_path, monkeypatch):
    """An autocast around the rows would keep the first step's weights, as cast, for all the steps after it."""
    around, precisions = [], set()
    monkeypatch.setattr(train, "train", lambda *a, f=train.train, **k: (
        around.append(torch.is_autocast_enabled("cpu")), f(*a, **k))[1])
    monkeypatch.setattr(gecko, "fast_embed", lambda *a, f=gecko.fast_embed: (
        precisions.add(a[2]), f(*a))[1])
    run(home, tmp_path, table, "--precision", "bf16", "--micro-batch", "8")
    assert around == [False] * (7 if table == "labels" else 0) and "bf16" in precisions


@pytest.mark.parametrize("more", [
    ["mixture", "--data", *"abcd"], ["rerank", "--init", "no"],
    ["labels", "--init", "no"], ["rerank", "--beir", "no"], ["labels", "--mix", "set"], ["labels", "--tau", "0"],
    ["labels", "--precision", "half"], ["labels", "--seed", "-1"],
    ["labels", "--seeds", "0"], ["labels", "--queries", "-1"], ["labels", "--dims", "99"],
    ["labels", "--sts", "no"], ["labels", "--sts", "IN/sts.jsonl"], ["labels", "--sts", "IN/empty.jsonl"],
    ["labels", "--sts", "IN/alike.jsonl"], ["labels", "--classes", "no", "no"],
    ["labels", "--classes", "IN/text.jsonl", "IN/text.jsonl"], ["labels", "--beir", "no"]])
def test_a_mistake_is_one_line(home, tmp_path, more, capsys, monkeypatch):
    """And it shows before anything is generated or trained."""
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(llm, "generate", None)
    two = {"sentence1": "a", "sentence2": "b", "score": 1}
    wrong = {"sts": {**two, "score": "high"}, "empty": {**two, "sentence1": ""}, "alike": two,
             "text": {"text": "a"}}
    for name, row in wrong.items():
        files.write_jsonl(tmp_path / f"in/{name}.jsonl", [row, row])
    more = [x.replace("IN", str(tmp_path / "in")) for x in more]
    with pytest.raises(files.InputError, match=".{25}"):
        run(home, tmp_path, *more)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# --------------------------------------------------------------------------------------------------
# What a table says


def results(**rows):
    """Rows of a table: {name: [scores of the queries, a list a seed]}."""
    return [{"table": "labels", "row": name, "seed": seed, "by": "offline", "seconds": 1.0, "cores": 2,
             "scores": {"nDCG@10 own": list(values)}}
            for name, lists in rows.items() for seed, values in enumerate(lists)]


def test_a_claim_holds_only_where_an_interval_says_so(monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.random(300)
    rows = results(**{"p_seed, none": [base], "p_seed, sampled": [base], "p_seed, p_20": [base],
                      "p_1, none": [base + 0.1], "p_1, sampled": [base - 0.1],
                      "p_1, p_20": [base + rng.normal(0, 0.3, 300)]})
    text = tables.table_text("labels", rows)
    assert "- p_1, none over p_seed, none (nDCG): yes +10.0 [+10.0, +10.0]" in text
    assert "- p_1, sampled over p_seed, sampled (nDCG): no, the reverse -10.0" in text
    assert "- p_1, p_20 over p_seed, p_20 (nDCG): not decided" in text
    assert "| p_1, p_20 | 53.39 | 83.14 |" in text
    missing = tables.table_text("labels", [r for r in rows if r["row"] != "p_1, none"])
    assert "- p_1, none over p_seed, none (nDCG): not measured" in missing


def test_interval_is_the_bootstrap_of_the_mean():
    """Against the normal interval of a mean over two sets of different sizes."""
    rng = np.random.default_rng(0)
    sets = [rng.normal(1, 1, (1, 400)), rng.normal(0, 2, (1, 900))]
    low, high = tables.interval(sets)
    error = np.sqrt(sum(g.var() / g.size for g in sets)) / 2
    mean = np.mean([g.mean() for g in sets])
    np.testing.assert_allclose([low, high], [mean - 1.96 * error, mean + 1.96 * error], atol=0.1 * error)


def test_seeds_that_disagree_widen_the_interval():
    """Three seeds, two of which gain and one of which loses, decide nothing, however many queries there are."""
    zero = np.zeros(5000)
    apart = results(**{"p_seed, none": [zero] * 3, "p_1, none": [zero + 0.1, zero + 0.1, zero - 0.1]})
    mean, low, high = tables.gain(apart, "p_1, none", "p_seed, none", "nDCG")
    assert np.isclose(mean, 10 / 3) and low < 0 < high
    alike = results(**{"p_seed, none": [zero] * 3, "p_1, none": [zero + 0.1, zero + 0.1, zero + 0.09]})
    assert tables.gain(alike, "p_1, none", "p_seed, none", "nDCG")[1] > 8


def test_a_column_that_begins_as_another_is_not_the_mean_of_both():
    cut = [{"row": row, "seed": 0, "scores": {"nDCG@10 q": [full] * 9, "nDCG@10 q at 8": [half] * 9}}
           for row, full, half in (("with", 0.5, 0.4), ("without", 0.5, 0.2))]
    assert tables.gain(cut, "with", "without", "nDCG@10 q")[0] == 0
    assert np.isclose(tables.gain(cut, "with", "without", "nDCG")[0], 10)


def test_accuracy_is_of_the_nearest_texts(home, tmp_path):
    known, unknown = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    texts = [f"return the {w} of x" for w in ("sine", "cosine", "median", "mean")] * 5
    files.write_jsonl(known, [{"text": t, "label": t.split()[2]} for t in texts])
    files.write_jsonl(unknown, [{"text": "return the sine of x", "label": "sine"},
                                {"text": "return the mean of x", "label": "sine"}])
    model = gecko.load(home / "model")
    assert tables.class_hits(model, str(known), str(unknown)).tolist() == [1, 0]
    (tmp_path / "test.csv").write_text("text,category\nreturn the sine of x,sine\n")   # as `convert classification`
    assert tables.class_hits(model, str(known), str(tmp_path / "test.csv")).tolist() == [1]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_results_show_what_their_files_say(path):
    """RESULTS.md's tables are made of the committed files: the same text, line for line."""
    rows = tables.whole_rows(path)
    text = tables.table_text(rows[0]["table"], rows) if "table" in rows[0] else None
    if text is None:
        from study_labels import study_text
        text = study_text(rows)
    assert text in (LAB / "RESULTS.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Curves of training runs


def test_plot_writes_a_png_or_names_the_package(tmp_path, monkeypatch):
    losses = [{"step": n, "loss": 1 / n} for n in (1, 2)]
    files.write_jsonl(tmp_path / "run/metrics.jsonl", [*losses, {"step": 2, "dev": {"ndcg@10": 0.5}}])
    out = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["tables.py", "plot", str(tmp_path / "run"), "--out", str(out)])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(files.InputError, match="pip install matplotlib"):
            tables.main()
    pytest.importorskip("matplotlib", reason="plot needs matplotlib")
    tables.main()
    assert out.read_bytes().startswith(b"\x89PNG")
