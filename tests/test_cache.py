"""engine/cache.py: what was answered is not asked again.   pytest tests/test_cache.py

Invariants: an answer is the one that was given to this item, by this model, in this mode; each is written as it
comes; a file that was torn at any byte is read as far as it is whole. test_llm.py kills the commands.
"""

from __future__ import annotations

import pytest

from engine import cache
from engine.cache import DryRun, Strings


class Fake(Strings):
    """Strings by rule. `failing` items fail."""

    def __init__(self, path, name="fake", failing=()):
        super().__init__(name)
        self.failing, self.asked = failing, []
        self.keep_in(path)

    def describe(self, call):
        return "a mode"

    def ask_new(self, call, items):
        rules = {"complete": lambda item: f"{item[0]} {item[1]} é\n",
                 "log_likelihood": lambda pair: -float(len(pair[1])), "top_tokens": lambda pair: [(pair[0], -0.5)]}
        for item in items:
            self.asked.append((call, item))
            if item not in self.failing:
                self.keep(call, item, rules[call](item))


PAIRS = [("b", " x"), ("a", " long"), ("b", " x"), ("a", " y")]


def test_each_item_is_asked_for_once_and_prompts_that_begin_alike_together(tmp_path):
    fake = Fake(tmp_path / "c.jsonl")
    assert fake.log_likelihood(PAIRS) == [-2.0, -5.0, -2.0, -2.0]
    assert [item for _, item in fake.asked] == [("a", " long"), ("a", " y"), ("b", " x")]
    assert fake.complete(["p", "p"], [1, 2]) == ["p 1 é\n", "p 2 é\n"]     # another seed, another answer
    assert [list(map(tuple, top)) for top in fake.top_tokens(["p"])] == [[("p", -0.5)]]
    same = Fake(tmp_path / "c.jsonl")
    assert same.log_likelihood(PAIRS) == [-2.0, -5.0, -2.0, -2.0] and same.complete(["p"], [2]) == ["p 2 é\n"]
    assert not same.asked and not Fake(tmp_path / "new.jsonl").path.exists()     # nothing was answered
    assert same.report() == f"4 answers of fake from {tmp_path}/c.jsonl"


@pytest.mark.parametrize("other", ["another model", "fake"])
def test_an_answer_of_another_model_is_no_answer(other, tmp_path):
    """The positive control is the same model."""
    Fake(tmp_path / "c.jsonl").log_likelihood(PAIRS)
    fake = Fake(tmp_path / "c.jsonl", other)
    fake.log_likelihood(PAIRS)
    assert bool(fake.asked) == (other != "fake")


def test_a_failed_call_is_asked_again(tmp_path):
    first = Fake(tmp_path / "c.jsonl", failing=[("a", " y")])
    assert first.log_likelihood(PAIRS) == [-2.0, -5.0, -2.0, None]
    fake = Fake(tmp_path / "c.jsonl")
    assert fake.log_likelihood(PAIRS)[3] == -2.0
    assert fake.asked == [("log_likelihood", ("a", " y"))]


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "c.jsonl"
    Fake(path).complete(["p", "p"], [1, 2])
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        fake = Fake(path)
        assert fake.complete(["p", "p"], [1, 2]) == ["p 1 é\n", "p 2 é\n"]
        assert len(fake.asked) == 2 - whole[:cut].count(b"}")
        last = Fake(path)
        last.complete(["p", "p"], [1, 2])
        assert not last.asked


def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_asked(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    Fake(path).complete(["p"], [1])

    def read_only(path, mode="r", **rest):
        if set(mode) & set("wa+"):
            raise PermissionError(f"Permission denied: {path}")
        return open(path, mode, **rest)

    monkeypatch.setattr(cache, "open", read_only, raising=False)
    with pytest.raises(PermissionError):
        Fake(path)


def test_a_dry_run_counts_calls_bytes_and_what_begins_alike():
    """Four bytes a token; a prefix cache saves what a prompt shares with the one before it."""
    dry = DryRun()
    assert dry.log_likelihood([("abcdefgh", " x"), ("abcdefgh", " y"), ("abcdefgh", " x")]) == [None] * 3
    assert dry.complete(["abcdé" * 8], [1]) == [None]
    assert dry.report() == ("3 calls, about 17 prompt tokens (4 bytes each); a prefix cache saves 3 of them; "
                            "the longest prompt has 12")
