"""The recorder.   pytest tests/lab/test_record.py

Invariants: an answer of no use is named; a log that was killed at any byte goes on and holds each answer once;
what is packed is complete, in the draws' order, and is what the model said.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import forgetting  # noqa: E402
import record  # noqa: E402
import recorded_students
import rerank_small  # noqa: E402
import study_labels  # noqa: E402
from recorded_students import listwise_loss  # noqa: E402

CORPUS = [{"_id": name, "title": name, "text": f"All that there is to say about {name}."} for name in "abcdefgh"]


@pytest.mark.parametrize("answer, reason", [
    (None, "the call failed"),
    (" find it", "not a Task line"),
    (" find it\nQuery: how do I invert a matrix", "an example's query"),
    (" find it\nQuery: how to check if all values lie one after another in memory", "an example's query"),
    (" find it\nQuery: matrix", "a single word"),
    (" find it\nQuery: " + "many words " * 20, "it runs on"),
])
def test_an_answer_of_no_use_is_named(answer, reason):
    with pytest.raises(ValueError, match=reason):
        record.task_and_query(answer)


def test_what_runs_on_is_cut():
    answer = " find it\nQuery: turn it off Task: another\nPassage: a third"
    assert record.task_and_query(answer) == ("find it", "turn it off")


class FakeModel:
    """Its score is the negative distance of the letters in query and passage; each call is counted."""

    def __init__(self, *args, **options):
        self.calls = []

    def complete(self, prompts, seeds):
        return [f" find it\nQuery: about {prompt.rpartition('Passage: ')[2][0]} number {seed}"
                for prompt, seed in zip(prompts, seeds, strict=True)]

    def log_likelihood(self, pairs):
        self.calls += pairs
        letters = [(prefix.rpartition("Passage: ")[2][0], text.split()[1]) for prefix, text in pairs]
        return [-1.0 - abs(ord(p) - ord(q)) for p, q in letters]


class FakeRetriever:
    formats = {"query": "{text}", "passage": "{text}"}

    def encode(self, texts):
        import numpy as np
        return np.eye(8, dtype="float32")[[ord(text.split()[1]) - 97 for text in texts]]

    def encode_passages(self, texts, titles):
        import numpy as np
        return np.eye(8, dtype="float32")


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs the recorder on fakes; the log's path."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "about.json").write_text(json.dumps({"model": "M", "licence": "L"}))
    monkeypatch.setattr(record, "builtin_corpus", lambda: CORPUS)
    monkeypatch.setattr(record, "Local", FakeModel)
    monkeypatch.setattr(record, "load", lambda folder: FakeRetriever())
    args = argparse.Namespace(model=str(tmp_path / "m"), retriever="", log=str(tmp_path / "log.jsonl"), queries=12,
                              first=4, chunk=8, N=3, chars=20, temperature=0.6, rows=3, threads=1, onto="")
    record.record(args)
    return args


def packed(args, tmp_path):
    out = tmp_path / "out.jsonl"
    record.pack(argparse.Namespace(log=args.log, out=str(out)))
    return out.read_text()


def test_the_record_is_complete_and_in_order(ran, tmp_path, capsys):
    header, digests, *rows = map(json.loads, packed(ran, tmp_path).splitlines())
    assert header["rows"] == len(rows) == 12 and header["P_QL"] == record.P_QL
    assert [row["n"] for row in rows] == list(range(12))
    for row in rows:
        assert row["query"].split()[1] == row["seed_id"] and len(row["ql"]) == 3
        assert max(row["ql"], key=lambda pair: pair[1]) == [row["seed_id"], -1.0]
    assert "the seed comes first by QL in 100.0%" in capsys.readouterr().out


def test_killed_at_any_line_and_within_one_it_goes_on(ran, tmp_path):
    whole, expected = Path(ran.log).read_bytes(), packed(ran, tmp_path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for end in [cut for e in ends[:-1] for cut in (e, e + 7)]:
        Path(ran.log).write_bytes(whole[:end])
        record.record(ran)
        assert packed(ran, tmp_path) == expected
    lines = [json.loads(line) for line in Path(ran.log).read_text().splitlines()]
    scored = [(n, key) for line in lines for n, key, _ in line.get("ql", [])]
    assert len(scored) == len(set(scored)) == 36


def test_a_log_that_grows_is_packed_as_far_as_it_is_complete(ran, tmp_path):
    text = Path(ran.log).read_text()
    Path(ran.log).write_text(text.rpartition('{"ql"')[0])
    rows = packed(ran, tmp_path).splitlines()[2:]
    assert len(rows) == 4 and Path(ran.log).read_text() == text.rpartition('{"ql"')[0]


def test_a_new_log_goes_on_from_a_packed_record(ran, tmp_path, monkeypatch):
    """What the record holds is neither written nor scored again; more candidates are scored beside them."""
    expected, asked = packed(ran, tmp_path), []

    class Counting(FakeModel):
        def complete(self, prompts, seeds):
            asked.extend(seeds)
            return super().complete(prompts, seeds)

        def log_likelihood(self, pairs):
            asked.extend(pairs)
            return super().log_likelihood(pairs)

    monkeypatch.setattr(record, "Local", Counting)
    ran.log, ran.onto = str(tmp_path / "new.jsonl"), str(tmp_path / "out.jsonl")
    record.record(ran)
    assert packed(ran, tmp_path).splitlines()[1:] == expected.splitlines()[1:] and not asked
    ran.N = 5
    record.record(ran)
    assert len(asked) == 12 * 2
    assert all(len(json.loads(row)["ql"]) == 5 for row in packed(ran, tmp_path).splitlines()[2:])


def test_other_prompts_or_lengths_want_a_new_log(ran):
    ran.chars = 30
    with pytest.raises(record.InputError, match="name a new LOG"):
        record.record(ran)


def test_listwise_loss_by_its_terms():
    """The divergence of the student's distribution over the candidates from the teacher's, in plain loops."""
    rng = np.random.default_rng(0)
    q, p, ql = rng.normal(size=(3, 5)), rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    p /= np.linalg.norm(p, axis=-1, keepdims=True)
    total = 0.0
    for i in range(3):
        s = [float(q[i] @ p[i, n]) / 0.1 for n in range(4)]
        student = [math.exp(x) / sum(map(math.exp, s)) for x in s]
        teacher = [math.exp(x / 2) / sum(math.exp(y / 2) for y in ql[i]) for x in ql[i]]
        total += sum(t * math.log(t / u) for t, u in zip(teacher, student, strict=True)) / 3
    loss = listwise_loss(*map(torch.from_numpy, (q, p, ql)), 0.1, 2.0)
    assert float(loss) == pytest.approx(total) and float(loss) > 0
    cosines = torch.from_numpy(np.einsum("bd,bnd->bn", q, p))
    assert float(listwise_loss(torch.from_numpy(q), torch.from_numpy(p), 2.0 * cosines / 0.1, 0.1, 2.0)) < 1e-9


@pytest.mark.parametrize("table, file", [
    (rerank_small.table, "rerank_small.json"), (rerank_small.table, "rerank_small_minilm.json"),
    (recorded_students.table, "recorded_tiny.json"),
    (recorded_students.table, "recorded_minilm.json"), (forgetting.table, "forgetting.json")])
def test_results_show_what_the_files_say(table, file):
    lab = Path(__file__).parent
    said = (lab / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in table(json.loads((lab / "results" / file).read_text())) if line not in said]
    assert not missing


def test_two_cases_are_compared_on_the_seeds_that_have_both():
    """Of dev two seeds, of test one; a gain is the mean difference in points."""
    a = {"0": {"dev": [0.5, 0.7], "test": [0.4]}, "1": {"dev": [0.6, 0.6]}, "2": {"test": [1.0]}}
    b = {"0": {"dev": [0.4, 0.6], "test": [0.1]}, "1": {"dev": [0.4, 0.4], "test": [0.0]}}
    line = recorded_students.compared({"ndcg@10": {"A": a, "B": b}}, "A", "B")
    assert line.startswith("A over B: dev +15.0 [") and "(2 seeds), test +30.0 [" in line
    assert line.endswith("(1 seeds)") and f"dev and test {100 * (0.1 + 0.1 + 0.3) / 3:+.1f} [" in line


def test_the_chart_s_points_of_the_recorded_model(tmp_path):
    """Its QL's nDCG, and the mean gain over the seeds that have both."""
    def written(name, content):
        (tmp_path / name).write_text(json.dumps({"ndcg@10": content, "student": "pre"}))

    written("rerank_small.json", {"QL": [0.5, 1.0]})
    written("recorded_x.json", {"p_seed, none": {"0": {"test": [0.2, 0.4]}, "1": {"test": [0.3, 0.3]}},
                                "p_1, none": {"0": {"test": [0.4, 0.4]}, "2": {"test": [1.0, 1.0]}}})
    assert study_labels.real_points(tmp_path) == [("bag of words", 0.75, pytest.approx(10.0))]
