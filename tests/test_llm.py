"""llm.py: generation, fusion, relabelling.   pytest tests/test_llm.py

Invariants: R uses ranks from 1 and nothing else; p+ = p_1; p- is never p+'s text; the seed is among
the candidates; a failed call is never a score; a passage changes nothing but its own record.
"""

import json
import math
import random
import time
import tracemalloc
from collections import Counter

import pytest
from teach import check

import gecko
import llm
from engine import files

CORPUS = [{"_id": name, "title": name, "text": text} for name, text in [
    ("m.ceil", "Return the ceiling of x. This is the smallest integer."),
    ("m.floor", "Return the floor of x. This is the largest integer."),
    ("o.remove", "Remove a file. An error is raised for a directory."),
    ("o.rmdir", "Remove a directory. The directory must be empty."),
    ("l.sort", "Sort the list in place. The sort is stable."),
    ("l.twin", "Sort the list in place. The sort is stable."),
]]


class Fake:
    """An LLM by rule; `broken` passages give no answer."""

    name = "fake"

    def __init__(self, broken=()):
        self.broken, self.seen = set(broken), []

    def generate(self, passages):
        self.seen += [p["_id"] for p in passages]
        return [None if p["_id"] in self.broken else "nonsense" if p["_id"] == "o.rmdir"
                else f"Task: t\nQuery: find {p['title']}" for p in passages]

    def query_likelihood(self, pairs):
        return [None if p["_id"] in self.broken else -float(len(p["text"])) for _, p in pairs]

    def relevance(self, pairs):
        return [-float(len(q) + ord(p["_id"][2])) for q, p in pairs]


@pytest.fixture(scope="module")
def embedder():
    return gecko.tiny([p["title"] + " " + p["text"] for p in CORPUS] * 3, hidden_size=16)


def rrf_spec(ql, rc):
    """1/r_QL + 1/r_RC in loops: the rank is 1 + the number of passages before it."""
    def rank(s, i):
        return 1 + sum(s[j] > s[i] or (s[j] == s[i] and j < i) for j in range(len(s)))
    return [1 / rank(ql, i) + 1 / rank(rc, i) for i in range(len(ql))]


@pytest.mark.ex4
def test_rrf_by_hand_and_equals_loops():
    """Four passages by hand, then random scores with ties against the loops."""
    ql, rc = [-1.0, -2.0, -3.0, -4.0], [-9.0, -7.0, -8.0, -6.0]
    both = list(zip([1, 2, 3, 4], [4, 2, 3, 1], strict=True))        # the ranks, by hand
    check(llm.rrf(ql, rc), [1 + 1 / 4, 1 / 2 + 1 / 2, 1 / 3 + 1 / 3, 1 / 4 + 1], {
        "there is a smoothing constant (60 in other papers); this one's has none":
            [1 / (60 + a) + 1 / (60 + b) for a, b in both],
        "ranks begin at 1; yours begin at 2": [1 / (1 + a) + 1 / (1 + b) for a, b in both],
        "the largest score has rank 1; yours has the last": [1 / (5 - a) + 1 / (5 - b) for a, b in both],
        "scores are added, not ranks": [a + b for a, b in zip(ql, rc, strict=True)],
        "1 / score is not 1 / rank": [1 / a + 1 / b for a, b in zip(ql, rc, strict=True)],
        "RC is left out": [1 / a for a, _ in both],
        "these are mean ranks; add 1 / rank": [(a + b) / 2 for a, b in both],
        "this is 1 / the mean rank; add 1 / rank of each": [2 / (a + b) for a, b in both],
        "this is 1 / the sum of the ranks; add 1 / rank of each": [1 / (a + b) for a, b in both]})
    rng = random.Random(0)
    for _ in range(50):
        ql, rc = ([rng.randint(-4, 0) for _ in range(7)] for _ in range(2))
        shared = [[1 + sum(t > s for t in scores) for s in scores] for scores in (ql, rc)]
        check(llm.rrf(ql, rc), rrf_spec(ql, rc), {
            "equal scores share a rank; the first of them comes first, as in `ranks`":
                [1 / a + 1 / b for a, b in zip(*shared, strict=True)]})


@pytest.mark.ex4
def test_rrf_uses_ranks_only():
    """Any increasing change of one scorer leaves R as it is."""
    ql, rc = [-3.0, -1.5, -7.0, -2.0], [-0.1, -4.0, -0.2, -3.0]
    assert llm.rrf([math.exp(x) * 100 for x in ql], [x ** 3 for x in rc]) == llm.rrf(ql, rc), \
        "R changed with a scorer's scale: it may depend on ranks alone"


@pytest.mark.ex5
def test_relabel_takes_first_and_last():
    R, texts = [0.3, 2.0, 0.1, 0.5, 0.2], ["a", "b", "c", "d", "e"]
    check(llm.relabel(R, texts), (1, 2), {
        "p- is p_2; it is p_N, the last by R": (1, 3), "p- is the last candidate, not the last by R": (1, 4),
        "p+ is the first candidate; it is p_1, the largest R": (0, 2), "p+ is the smallest R": (2, 1)})
    assert llm.relabel(R, texts, "none") == (1, None), 'negative "none" gives none'
    assert llm.relabel(R, texts, positive=0) == (0, 2), "a positive that is given (p_seed) is p+"
    check(llm.relabel(R, texts, positive=2), (2, 4), {
        "p- is p+ itself: the seed among the negatives; take p+ out of P first": (2, 2)})
    check(llm.relabel(R[:4], ["a", "b", "b", "d"]), (1, 0), {
        "p- has the very text of p+; compare texts, not numbers": (1, 2)})
    assert llm.relabel(R, ["b"] * 5) == (1, None), "where all texts are p+'s there is no negative"


@pytest.mark.ex5
def test_relabel_samples_from_the_others_seeded():
    R, texts = [0.4, 0.3, 0.2, 0.1], list("abcd")
    drawn, again = ([llm.relabel(R, texts, "sampled", random.Random(i))[1] for i in range(50)] for _ in range(2))
    assert 0 not in drawn, "p+ was drawn as its own negative: sample from P without p+"
    assert set(drawn) == {1, 2, 3}, "every other candidate must be drawn some time"
    assert drawn == again, "the same rng gives another draw: use the rng that is given"


def test_generate_counts_what_cannot_be_parsed_and_draws_every_passage():
    fake = Fake(broken=["m.floor"])
    rows = list(llm.generate(fake, CORPUS, 12, seed=1, block=5))
    assert Counter(fake.seen) == Counter({p["_id"]: 2 for p in CORPUS})
    failed = [r for r in rows if "failed" in r]
    assert len(failed) == 4 and sum("call failed" in r["failed"] for r in failed) == 2
    good = next(r for r in rows if r.get("seed_id") == "m.ceil")
    assert good["query"] == "find m.ceil" and good["task"] == "t" and good["kind"] == "other"
    assert [r["_id"] for r in rows] == [f"q{n:07d}" for n in range(12)]


@pytest.mark.parametrize("answer", ["", "Query: q", "Task: t", "Task:\nQuery: q", "Task: t\nQuery:", "{}",
                                    "Task: t\nQuery: q\nTask: u\nQuery: r", "Task: t\nQuery: q\n\nThis asks ...",
                                    "Sure!\nTask: t\nQuery: q", "<think>\nQuery?\n</think>\nTask: t\nQuery: q"])
def test_parse_generation_refuses(answer):
    with pytest.raises(ValueError):
        llm.parse_generation(answer)


@pytest.mark.parametrize("answer", [" t\nQuery: q", "Task:t \n\nQuery:q\n\n", "Task: t\r\nQuery: q\r\n"])
def test_parse_generation_takes(answer):
    """The prompt has begun the first line; blanks and the ends of lines are no matter."""
    assert llm.parse_generation(answer) == ("t", "q")


def test_parse_generation_takes_no_time_over_blanks():
    """A model that is caught in blanks does not catch the run: the time grows with the answer, not its square."""
    start = time.process_time()
    with pytest.raises(ValueError):
        llm.parse_generation("Task: t" + " " * 200_000 + "t")
    assert time.process_time() - start < 1


def test_prompts_are_fixed_but_for_the_passage():
    """At least eight tasks are shown, the four frequent ones among them; the passage comes last."""
    tasks = {llm.task_kind(line) for line in llm.P_QG.splitlines() if line.startswith("Task: Given")}
    assert tasks >= set(llm.TASKS)
    assert sum(line.startswith("Task: Given") for line in llm.P_QG.splitlines()) >= 8
    for prompt in (llm.P_QG, llm.P_QL, llm.P_RC):
        assert prompt.index("{passage}") > 0.7 * len(prompt)


def test_a_passage_too_long_for_a_context_is_cut_in_prompts():
    """One endless passage does not lose the queries that it is a candidate of; others are shown whole."""
    endless = {"_id": "x", "title": "T", "text": "word " * 10 ** 5}
    for prompt in (llm.ql_prompt("q", endless)[0], llm.rc_prompt("q", endless)):
        assert llm.LONGEST < len(prompt) < llm.LONGEST + 1000
    assert all(llm.shown(p) == llm.as_text(p) for p in CORPUS)


def queries(n=6):
    return [{"_id": f"q{i}", "task": "t", "kind": "other", "query": f"query {i} sort the list",
             "seed_id": CORPUS[i % len(CORPUS)]["_id"]} for i in range(n)]


def test_mine_makes_records_with_all_candidates(embedder):
    rows = list(llm.mine(Fake(), embedder, CORPUS, queries(), N=4, block=4))
    assert len(rows) == 6
    for row, query in zip(rows, queries(), strict=True):
        ids = [c["id"] for c in row["candidates"]]
        assert query["seed_id"] in ids and len(set(ids)) == 4
        R = rrf_spec([c["ql"] for c in row["candidates"]], [c["rc"] for c in row["candidates"]])
        assert [c["R"] for c in row["candidates"]] == R
        assert ids.index(row["positive_id"]) == R.index(max(R))
        assert row["positive"]["text"] != row["negative"]["text"]
        json.dumps(row)


def test_a_missing_score_is_a_failure_not_a_score(embedder):
    rows = list(llm.mine(Fake(broken=["l.sort"]), embedder, CORPUS, queries(), N=len(CORPUS)))
    assert all("failed" in r for r in rows)
    alone = list(llm.mine(Fake(broken=["l.sort"]), embedder, CORPUS, queries(), N=len(CORPUS), rank="rc"))
    assert not any("failed" in r for r in alone) and all(r["rank"] == "rc" for r in alone)
    assert all(c["ql"] is None for r in alone for c in r["candidates"])


def test_labelled_gives_the_rows_of_table_3(embedder):
    rows = list(llm.mine(Fake(), embedder, CORPUS, queries(), N=5))
    title = {p["_id"]: p["title"] for p in CORPUS}
    assert [r["positive"]["title"] for r in llm.labelled(rows, CORPUS, "seed", "none")] == [
        title[r["seed_id"]] for r in rows]
    again = llm.labelled(rows, CORPUS, "p1", "last")
    assert [(r["positive"], r["negative"]) for r in again] == [(r["positive"], r["negative"]) for r in rows]
    assert all(r["negative"] is None for r in llm.labelled(rows, CORPUS, "p1", "none"))


def test_write_kept_says_how_many_and_refuses_equal_scores(tmp_path, capsys, embedder):
    rows = list(llm.generate(Fake(), CORPUS, 6, 0))
    llm.write_kept(tmp_path / "q.jsonl", iter(rows), 6, "generate")
    assert "kept 5 of 6; a failure" in capsys.readouterr().out
    flat = [{**r, "candidates": [{**c, "ql": -1.0} for c in r["candidates"]]}
            for r in llm.mine(Fake(), embedder, CORPUS, queries(), N=3)]
    with pytest.raises(llm.LLMError, match="all ql scores equal"):
        llm.write_kept(tmp_path / "f.jsonl", iter(flat), 6, "mine")
    assert not (tmp_path / "f.jsonl").exists()


def test_write_kept_holds_no_rows_and_gives_up_early(tmp_path):
    """Rows go to the file as they come; when the first ones all fail, no more are asked for."""
    rows = ({"_id": str(i), "seed_id": "s", "query": "x" * 10_000} for i in range(2000))
    tracemalloc.start()
    count = llm.write_kept(tmp_path / "q.jsonl", rows, 2000, "generate")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count["kept"] == 2000 and peak < 4e6 < 2e7 < (tmp_path / "q.jsonl").stat().st_size + 1e6
    asked = []
    hopeless = ({"_id": str(i), "failed": f"reason {i}"} for i in range(5000) if asked.append(i) is None)
    with pytest.raises(llm.LLMError, match="none of the first 200 rows succeeded; one: reason 0"):
        llm.write_kept(tmp_path / "f.jsonl", hopeless, 5000, "mine")
    assert len(asked) == 200 and not (tmp_path / "f.jsonl").exists()


def test_queries_must_belong_to_the_corpus(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"_id": "1", "task": "t", "query": "q", "seed_id": "nowhere"}) + "\n")
    with pytest.raises(files.InputError, match=":1: seed_id 'nowhere' is not in the corpus"):
        llm.read_queries(path, CORPUS)
