"""engine/mteb.py: the real mteb package on made-up data.   pytest tests/test_mteb.py

Invariants: mteb sees the formats of appendix B with Table 9's task of the set; its retrieval figure is
ours; results are its own JSON, float32, and of one model alone; a set that cannot be had is one line.
"""

import json
import re
import sys

import numpy as np
import pytest

import gecko
import train
from engine import evaluate, files
from engine.beir import Beir
from engine.mteb import TABLE_9, ForMteb, bare, mteb_scores, mteb_tasks, table_9

pytest.importorskip("mteb", reason="pip install mteb")
import mteb  # noqa: E402
import mteb_local as local  # noqa: E402

ANIMALS, TOOLS = "cat dog horse mouse tiger".split(), "saw drill hammer wrench chisel".split()
ROWS = [{"text": f"a {w} {v}", "label": kind} for kind, words in (("animal", ANIMALS), ("tool", TOOLS))
        for w in words for v in ("here", "there", "again")]
CORPUS = [{"_id": f"p{i}", "title": w.title() if i % 2 else "", "text": f"all about the {w} and its kind"}
          for i, w in enumerate(ANIMALS + TOOLS)]
QUERIES = {f"q{i}": f"what is a {w}" for i, w in enumerate(ANIMALS + TOOLS)}
QRELS = {f"q{i}": {f"p{i}": 1} for i in range(10)}
PAIRS = [{"sentence1": f"the {a} is here", "sentence2": f"here is the {b}", "score": 5.0 * (a == b),
          "label": int(a == b)} for a, b in zip(ANIMALS * 2, [*ANIMALS, *TOOLS], strict=True)]


@pytest.fixture(scope="module")
def model():
    return gecko.tiny([r["text"] for r in ROWS] + [p["text"] for p in CORPUS] + list(QUERIES.values())
                      + ["task: question answering | query: title: none | text:"] * 3, hidden_size=32)


def seen(model, made, **how):
    """The texts that the encoder gets from mteb, and the scores."""
    texts, encode = [], model.encode

    def noted(batch, **settings):
        texts.extend(batch)
        return encode(batch, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "encode", noted)
        return texts, mteb_scores(ForMteb(model, "m", gecko.format_query, **how), [made])


def test_table_9_holds_the_papers_sets():
    """The 56 sets of mteb's first English benchmark, each with the task of its kind or its own."""
    tasks = {t.metadata.name: t.metadata.type for t in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    kinds = "Classification MultilabelClassification STS PairClassification BitextMining Clustering Summarization"
    assert {bare(name) for name in (*tasks, *kinds.split())} == set(TABLE_9) and len(tasks) == 56
    for name, kind in tasks.items():
        assert table_9(name, kind) == table_9(name) == TABLE_9[bare(name)]
        if kind in kinds.split():
            assert table_9(name) == table_9("another", kind)
    assert table_9("another") == table_9("another", "Reranking") == ("question answering", False)
    assert table_9("scifact") == ("fact checking", False)
    assert table_9("quora") == ("search result", True)
    assert table_9("CQADupstackGamingRetrieval") == ("question answering", False)


@pytest.mark.parametrize("name, task, symmetric", [
    ("SciFact", "fact checking", False), ("QuoraRetrieval", "search result", True),
    ("mine", "question answering", False)])
def test_mteb_sees_the_formats_and_gives_our_figure(model, name, task, symmetric):
    """Queries with their task; passages with their title, or as queries where the set is symmetric."""
    texts, scores = seen(model, local.retrieval(name, CORPUS, QUERIES, QRELS))
    assert f"task: {task} | query: what is a cat" in texts
    passages = ["task: search result | query: Dog all about the dog and its kind",
                "title: Dog | text: all about the dog", "title: none | text: all about the cat"]
    assert [any(t.startswith(p) for t in texts) for p in passages] == [symmetric, not symmetric, not symmetric]
    beir = Beir(CORPUS, QUERIES, QRELS)
    q, P = evaluate.encode_beir(model, beir, task, symmetric=symmetric)
    ours = evaluate.retrieval_scores(evaluate.rankings(beir, q, P), beir.qrels)["ndcg@10"]
    assert abs(scores[name]["ndcg_at_10"] - np.mean(ours)) < 1e-5


@pytest.mark.parametrize("made, task", [
    (local.sts("s", PAIRS), "semantic similarity"), (local.pairs("p", PAIRS), "semantic similarity"),
    (local.clustering("c", ROWS, 2, 20), "search result"),
    (local.classification("b", ROWS, ROWS), "classification"),
    (local.reranking("r", [{"query": "cat", "positive": ["the cat"], "negative": ["the saw"]}]),
     "question answering")],
    ids=lambda x: x if isinstance(x, str) else x.metadata.type)
def test_every_kind_runs(model, made, task):
    """Each kind's task is Table 9's, all texts of a symmetric one are inputs; --task has the last word."""
    texts, scores = seen(model, made)
    inputs = [t.startswith(f"task: {task} | query: ") for t in texts]
    assert texts and (all(inputs) or made.metadata.type == "Reranking" and any(inputs))
    (name, score), = scores.items()
    assert 0 <= next(iter(score.values())) <= 1 and name == made.metadata.name
    texts, _ = seen(model, made, task="mine")
    assert any(t.startswith("task: mine | query: ") for t in texts)


def test_results_are_mtebs_own_and_of_one_model(model, tmp_path, monkeypatch):
    """Its JSON, in float32; a second run reads it; another dimension or weight is another revision."""
    made, full = local.sts("s", PAIRS), ForMteb(model, "m", gecko.format_query)
    scores = mteb_scores(full, [made], str(tmp_path))
    path = tmp_path / f"results/gecko__m/{full.mteb_model_meta.revision}/s.json"
    stored = json.loads(path.read_text())
    assert stored["task_name"] == "s"
    assert abs(stored["scores"]["test"][0]["main_score"] - scores["s"]["cosine_spearman"]) < 1e-5
    assert str(tmp_path) not in path.with_name("model_meta.json").read_text()
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("encoded again"))
    again = mteb_scores(full, [made], str(tmp_path))
    assert abs(again["s"]["cosine_spearman"] - scores["s"]["cosine_spearman"]) < 1e-5
    monkeypatch.undo()
    cut = ForMteb(model, "m", gecko.format_query, dim=8)
    assert cut.mteb_model_meta.revision != full.mteb_model_meta.revision
    x = cut.encode([{"text": ["a cat", ""]}], task_metadata=made.metadata)  # some sets have empty texts
    assert x.shape == (2, 8) and x.dtype == np.float32
    np.testing.assert_allclose(np.diag(cut.similarity(x, x)), cut.similarity_pairwise(x, x), atol=1e-6)


def test_command_line_and_its_mistakes(model, tmp_path, monkeypatch, capsys):
    """--mteb writes its folder; an unknown set, or no network, is one line and exit code 2."""
    gecko.save(model, tmp_path / "m")
    monkeypatch.setattr("engine.mteb.mteb_tasks", lambda names: [local.sts(names[0], PAIRS)])
    argv = ["train.py", "evaluate", "--model", str(tmp_path / "m"), "--mteb", "STS12", "--dim", "8",
            "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    assert "STS12 cosine_spearman" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/scores.json").read_text())["STS12"].keys() == {"cosine_spearman"}
    assert list(tmp_path.glob("out/results/gecko__m/*/STS12.json"))
    monkeypatch.undo()
    monkeypatch.setattr(mteb, "evaluate", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no hub\nmore")))
    for name, message in (("STS12", "no hub$"), ("Nonsense", "Nonsense.*not found")):
        monkeypatch.setattr(sys, "argv", [name if a == "STS12" else a for a in argv])
        with pytest.raises(SystemExit) as stop:
            files.run(train.main)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(errors) == 1
        assert re.search(message, errors[0])
    assert [t.metadata.name for t in mteb_tasks(["STS17"])] == ["STS17"]
    assert mteb_tasks(["STS17"])[0].hf_subsets == ["en-en"], "the benchmark's own, English"
