"""engine/offline.py: statistics in the place of a language model.   pytest tests/test_offline.py

Invariants: query likelihood is the Dirichlet-smoothed sum of the docstring; relevance is the cosine of the embedder
that was given; generation follows from the seed, and a passage drawn twice gets another query.
"""

import math
import random
import sys
from collections import Counter

import pytest
from toys import small_model

import llm
from engine import offline
from engine.corpus import terms
from engine.files import read_jsonl, write_jsonl
from engine.offline import Offline

TASKS = ["question answering", "search result", "fact checking", "sentence similarity"]
CORPUS = [{"_id": name, "title": name, "text": text} for name, text in [
    ("m.ceil", "Return the ceiling of x. This is the smallest integer."),
    ("m.floor", "Return the floor of x. This is the largest integer."),
    ("o.remove", "Remove a file. An error is raised for a directory."),
    ("o.rmdir", "Remove a directory. The directory must be empty."),
]]
ARTICLE = {"_id": "7", "title": "Sleep and the heart: a cohort study", "text":
           "BACKGROUND Sleep varies. CONCLUSIONS Taken together, our data show that short sleep (6 h) raises "
           "blood pressure in the men of this cohort, whereas the women of the same cohort who slept "
           "little had no higher blood pressure than those who slept long."}


def likelihood_spec(llm, query, passage, corpus):
    """sum over w of log (tf(w) + lam * tf(words that w paraphrases) + mu p(w | C)) / (|p| + mu), in loops."""
    collection = [w for p in corpus for w in terms(f"{p['title']} {p['text']}")]
    words = terms(f"{passage['title']} {passage['text']}")
    total = 0.0
    for w in terms(query):
        tf = words.count(w) + llm.lam * sum(words.count(u) for u in llm.paraphrased.get(w, ()))
        p_collection = (collection.count(w) + 0.5) / len(collection)
        total += math.log((tf + llm.mu * p_collection) / (len(words) + llm.mu))
    return total


def test_query_likelihood_is_the_dirichlet_sum():
    llm = Offline(CORPUS, None, TASKS)
    for query in ("delete file", "smallest integer", "words that no passage has"):
        for passage in CORPUS:
            assert math.isclose(llm.query_likelihood([(query, passage)])[0],
                                likelihood_spec(llm, query, passage, CORPUS))


def test_a_paraphrase_finds_the_passage():
    """"delete" is everyday for "remove"; without the thesaurus the passages of "remove" are no nearer."""
    llm = Offline(CORPUS, None, TASKS)
    assert "remove" in llm.paraphrased["delete"]
    scores = llm.query_likelihood([("delete a file", p) for p in CORPUS])
    assert scores.index(max(scores)) == 2
    llm.paraphrased = {}                                             # negative control
    without = llm.query_likelihood([("delete", p) for p in CORPUS])
    assert max(without) - min(without) < 0.05 < scores[2] - min(scores)


def test_an_empty_corpus_of_words_gives_equal_scores_and_no_division_by_zero():
    """`mine` refuses scores that are all equal."""
    llm = Offline([{"_id": "1", "title": "", "text": "!?"}], None, TASKS)
    assert llm.query_likelihood([("?", {"_id": "1"})]) == [0.0]
    assert math.isfinite(llm.query_likelihood([("tea", {"_id": "1"})])[0])


RUSSIAN = ["Коты пьют молоко каждый день в 14 часов.", "Собаки едят мясо утром в 8 часов.", "Рыбы плавают в реке."]
CHINESE = ["茶在热水里泡开，需要三分钟。", "咖啡豆要先磨成粉，再用开水冲。", "鱼在河里游来游去，很快乐。"]


@pytest.mark.parametrize("texts, query, best", [
    (RUSSIAN, "когда едят собаки", 1), (RUSSIAN, "коты", 0), (CHINESE, "咖啡怎么冲", 1),
    (CHINESE, "河里的鱼", 2), (CHINESE, "茶", 0)])
def test_query_likelihood_reads_any_script(texts, query, best):
    corpus = [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]
    scores = Offline(corpus, None, TASKS).query_likelihood([(query, p) for p in corpus])
    assert scores.index(max(scores)) == best and sorted(scores)[-2] < max(scores)


@pytest.mark.parametrize("texts", [RUSSIAN, CHINESE])
def test_generated_queries_keep_their_script(texts, tmp_path, monkeypatch, capsys):
    """On the command line: all are kept, and each is made of the passage's own words."""
    write_jsonl(tmp_path / "c.jsonl", [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(texts)])
    out = tmp_path / "q.jsonl"
    monkeypatch.setattr(sys, "argv", ["llm.py", "generate", str(tmp_path / "c.jsonl"), str(out), "--llm", "offline",
                                      "--limit", "30"])
    llm.main()
    assert "kept 30 of 30" in capsys.readouterr().out
    for _, row in read_jsonl(out):
        passage = texts[int(row["seed_id"])]
        assert set(terms(row["query"])) <= set(terms(passage)) and not row["query"].isascii()


def test_a_passage_without_any_text_is_left_out_of_generation(tmp_path, monkeypatch, capsys):
    """It is said how many there are, none is drawn, and a title alone gives a query."""
    write_jsonl(tmp_path / "c.jsonl", [*CORPUS, {"_id": "e", "title": "", "text": " "},
                                      {"_id": "t", "title": "How tea is made", "text": ""}])
    out = tmp_path / "q.jsonl"
    monkeypatch.setattr(sys, "argv", ["llm.py", "generate", str(tmp_path / "c.jsonl"), str(out), "--llm", "offline",
                                      "--limit", "50"])
    llm.main()
    printed = capsys.readouterr()
    assert "kept 50 of 50" in printed.out and "1 of 6 passages have neither title nor text" in printed.err
    assert {row["seed_id"] for _, row in read_jsonl(out)} == {"m.ceil", "m.floor", "o.remove", "o.rmdir", "t"}


def test_a_title_alone_is_asked_for():
    for title in ("m.ceil", "How tea is made in Japan", "Чай"):
        answer, = Offline([], None, TASKS).generate([{"_id": "1", "title": title, "text": ""}])
        assert len(answer.split("Query: ")[1]) >= 3


def test_relevance_is_the_cosine_of_the_embedder_that_it_is_given(monkeypatch):
    """Of each pair its own, and no passage is encoded twice."""
    model, encoded = small_model(), []
    encode = model.encode_passages

    def counted(texts, titles):
        encoded.extend(titles)
        return encode(texts, titles)

    monkeypatch.setattr(model, "encode_passages", counted)
    offline_llm = Offline(CORPUS, model, TASKS)
    pairs = [("red", CORPUS[0]), ("blue river", CORPUS[2]), ("red", CORPUS[2]), ("red", CORPUS[0])]
    q = model.encode_queries([query for query, _ in pairs])
    p = encode([p["text"] for _, p in pairs], [p["title"] for _, p in pairs])
    assert offline_llm.relevance(pairs) == pytest.approx((q * p).sum(1).tolist(), abs=1e-6)
    assert len(set(offline_llm.relevance(pairs[:3]))) == 3 and encoded == ["m.ceil", "o.remove"]


def test_generation_is_seeded_and_varies():
    drawn = CORPUS * 15
    a, b, other = (Offline(CORPUS, None, TASKS, seed).generate(drawn) for seed in (0, 0, 1))
    assert a == b != other
    assert len(set(a)) > len(drawn) / 3, "a passage drawn again should get another query"
    kinds = Counter(answer.split("\n")[0].removeprefix("Task: ") for answer in a)
    assert set(kinds) == set(TASKS) and all("\nQuery: " in answer for answer in a)


def test_queries_for_prose_are_made_of_the_article():
    """Its title or a sentence, brackets go, long ones are cut, and no template for an API is used."""
    queries = {offline.prose_query(ARTICLE, random.Random(n))[1] for n in range(60)}
    assert {ARTICLE["title"], "BACKGROUND Sleep varies"} < queries
    assert "CONCLUSIONS Taken together, our data show that short sleep raises blood pressure in the men of this " \
           "cohort," in queries
    words = set(terms(ARTICLE["title"] + ARTICLE["text"]))
    assert all(len(q.split()) <= 18 and "(" not in q and set(terms(q)) <= words for q in queries)
    drawn = [offline.templated_query(ARTICLE, TASKS, random.Random(n)) for n in range(60)]
    assert "python" not in " ".join(query for _, query in drawn)
    assert {task for task, _ in drawn} == {"fact checking", "sentence similarity", "search result"}
    assert all(offline.templated_query(CORPUS[0], TASKS, random.Random(n))[0] in TASKS for n in range(9))
    word = {**ARTICLE, "title": "Sleep"}                              # no qualified name, though one word
    queries = [offline.templated_query(word, TASKS, random.Random(n))[1] for n in range(60)]
    assert "python" not in " ".join(queries)


def test_everyday_words_come_from_the_thesaurus_with_probability_p():
    entries = offline.thesaurus()
    assert offline.everyday("append the argument", random.Random(0), 0.0) == "append the argument"
    exchanged = offline.everyday("append the argument", random.Random(0), 1.0)
    assert exchanged in {f"{a} the {b}" for a in entries["append"] for b in entries["argument"]}
