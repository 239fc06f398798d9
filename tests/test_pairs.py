"""engine/pairs.py: title-body pairs out of documentation and source code.   pytest tests/test_pairs.py

Invariants: pairs follow from the seed; a query is almost never its own answer; a comment, a function and a call
each find the text that belongs to them, and only where a name alone is safe.
"""

import doctest

import pytest

from engine import pairs
from engine.corpus import builtin_corpus, passage

TASKS = ("search result", "question answering")


@pytest.fixture(scope="module")
def small():
    return builtin_corpus()[:300]


def test_docstring_examples_run():
    result = doctest.testmod(pairs)
    assert result.attempted > 0 and result.failed == 0


def test_pairs_are_seeded_and_never_their_own_answer(small, monkeypatch):
    monkeypatch.setattr(pairs, "SOURCES", ("numpy",))
    a, b, other = (list(pairs.builtin_pairs(small, 400, seed, TASKS)) for seed in (3, 3, 4))
    assert a == b != other and len(a) == 400
    assert {task for task, _, _, _ in a} == set(TASKS)
    assert sum(query == text for _, query, _, text in a) <= 8
    assert all(query.strip() and text.strip() for _, query, _, text in a)


def test_functions_pair_with_their_bodies():
    lines = ["class A:", "    def tear_down(self):", '        """Delete the whole folder.', "", '        Slow."""',
             "        shutil.rmtree(self.folder)", "x = 1"]
    found = list(pairs.functions("\n".join(lines)))
    assert [pair[:2] for pair in found] == [
        ("function", "tear down"), ("function", "Delete the whole folder."), ("docstring", "tear_down")]
    assert "shutil.rmtree" in found[1][2] and "x = 1" not in found[1][2]
    assert found[2][2] == "Delete the whole folder.\n\nSlow."


def test_comments_pair_with_the_code_below():
    lines = ["x = 1", "# round the number up to a whole one", "y = math.ceil(x)", "", "# no code follows here"]
    assert list(pairs.comments("\n".join(lines))) == [
        ("comment", "round the number up to a whole one", "y = math.ceil(x)")]


@pytest.mark.parametrize("code, called", [
    ("os.remove(p)", ["os.remove"]), ("len(x)", ["builtins.len"]), ("q.get()", []),
    ("x.split(y)", ["builtins.str.split"]), ("box.clean()", ["mailbox.Maildir.clean"]),
    ("os.clean()", []), ("rmtree(p)", [])])
def test_calls_are_found_by_name_alone_and_only_where_that_is_safe(code, called):
    names = ["os.remove", "builtins.len", "builtins.str.split", "re.Pattern.split", "queue.Queue.get",
             "asyncio.Queue.get", "contextvars.ContextVar.get", "shutil.rmtree", "mailbox.Maildir.clean"]
    found = pairs.with_calls([passage(name, "") for name in names], [("words", code)])
    assert found == ([("words", [names.index(name) for name in called])] if called else [])


def test_chunks_keep_every_paragraph():
    text = "\n\n".join(f"paragraph {i} " + "word " * 30 for i in range(5))
    chunks = pairs.chunks([passage("t", text)])
    assert len(chunks) > 1 and "\n\n".join(p["text"] for p in chunks).split() == text.split()
