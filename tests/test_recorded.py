"""engine/recorded.py: recorded answers of a language model.   pytest tests/test_recorded.py

Invariants: the three calls give what the file holds and None for all else; a passage that reads otherwise, or is
not there, takes its scores and its own queries with it, counted; the record that we ship holds no passage's text.
"""

import gzip
import json

import pytest

from engine.corpus import builtin_corpus, shown
from engine.files import write_jsonl
from engine.recorded import RECORD, Recorded, digest

CORPUS = [{"_id": name, "title": name, "text": f"This is about {name}.\nIt is long."} for name in "abcd"]
HEADER = {"model": "M", "licence": "L", "date": "2026-11-28", "python": "3.11.7", "characters": 12}
ROWS = [{"seed_id": "a", "task": "find it", "query": "what is a", "ql": [["b", -3.0], ["a", -1.0], ["c", -9.0]]},
        {"seed_id": "a", "task": "find it", "query": "and a", "ql": [["a", -2.0], ["d", -4.0]]},
        {"seed_id": "b", "task": "check it", "query": "b is so", "ql": [["b", -2.5], ["c", -2.0]]}]


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    write_jsonl(path, [HEADER, {"digests": {p["_id"]: digest(shown(p, 12)) for p in CORPUS}}, *ROWS])
    return path


def test_the_three_calls_answer_from_the_file(record):
    a, b, c, d = CORPUS
    llm = Recorded(CORPUS, record)
    assert llm.generate([a, b]) == ["Task: find it\nQuery: what is a", "Task: check it\nQuery: b is so"]
    assert llm.generate([a, a, c]) == ["Task: find it\nQuery: and a", None, None]
    assert llm.query_likelihood([("what is a", a), ("what is a", d), ("who", a)]) == [-1.0, None, None]
    assert llm.relevance([("what is a", a)]) == [None]
    assert llm.draws() == [0, 0, 1]
    row = {"seed_id": "a", "query": "what is a"}
    assert llm.candidates(row, ["a", "d", "c"]) == ["b", "a", "c"]
    assert "67% of their candidates are found here too" in llm.report()


@pytest.mark.parametrize("other", ["reads otherwise", "is missing"])
def test_a_passage_of_another_python_is_left_out_and_counted(record, other):
    """Its scores go; a query that was written for it goes too, and one that keeps a single candidate."""
    a, b, c, d = CORPUS
    changed = [] if other == "is missing" else [{**b, "text": "Other words."}]
    llm = Recorded([a, c, d, *changed], record)
    assert [row["query"] for row in llm.rows] == ["what is a", "and a"]
    assert llm.candidates({"seed_id": "a", "query": "what is a"}, []) == ["a", "c"]
    assert llm.query_likelihood([("what is a", b)]) == [None]
    assert llm.report().startswith("2 queries")
    assert "1 of its passages" in llm.report() and "left out with 1 queries" in llm.report()


def test_only_the_characters_that_the_model_was_shown_count(record):
    llm = Recorded([{**p, "text": p["text"] + " Newly said."} for p in CORPUS], record)
    assert len(llm.rows) == 3 and llm.missing == llm.lost == 0


@pytest.mark.skipif(not RECORD.exists(), reason="no record yet: tests/lab/record.py makes it")
def test_the_shipped_record_is_small_names_its_model_and_holds_no_passage():
    assert RECORD.stat().st_size < 3e6
    corpus = builtin_corpus()
    llm = Recorded(corpus)
    assert {"model", "licence", "weights", "prompts", "P_QG", "P_QL", "date", "command"} <= set(llm.header)
    assert len(llm.rows) > 0.8 * llm.header["rows"]                  # another Python keeps most of them
    with gzip.open(RECORD, "rt") as lines:
        header, digests, *rows = map(json.loads, lines)
    assert all(len(value) == 8 for value in digests["digests"].values())
    for row in rows:
        assert set(row) == {"n", "seed_id", "task", "query", "ql"}
        assert len({key for key, _ in row["ql"]}) == len(row["ql"]) and row["seed_id"] in dict(row["ql"])
        assert all(isinstance(key, str) and score < 0 for key, score in row["ql"])
