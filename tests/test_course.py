"""The course: each exercise is graded, by its own tests alone, and they catch well-known mistakes.

    python -m pytest tests/test_course.py

Invariants: without the body of n, exactly the tests marked exn fail, of all that grade, with
NotImplementedError; each wrong answer fails its own tests alone, with a message that says why.
"""

import contextlib
import io
import multiprocessing
import os
import re
import sys
from pathlib import Path

import make_course
import pytest
import torch
from wrong_answers import WRONG

ROOT = make_course.ROOT
# a fresh interpreter with the packages imported and no module of ours: a child of it starts in no time
START = multiprocessing.get_context("forkserver")
EXERCISES = make_course.exercises()
TESTS = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path.stem != "test_course"}
GRADERS = {n: [name for name, text in TESTS.items() if f"@pytest.mark.ex{n}\n" in text] for n in EXERCISES}


class Results:
    """What each test did: {test's name: (its exercises, what it failed with or "")}."""

    def __init__(self):
        self.found, self.marks = {}, {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.marks[item.nodeid] = {int(m.name[2:]) for m in item.iter_markers() if re.match(r"ex\d", m.name)}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            said = str(report.longrepr) if report.failed else ""
            self.found[report.nodeid] = (self.marks[report.nodeid], said)


def grade(folder, connection):
    """In a child: for each order (exercises, module, its text) run their tests on the course folder's modules."""
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    torch.set_num_threads(1)
    while (order := connection.recv()) is not None:
        numbers, module, text = order
        for name in [name for name, m in sys.modules.items() if Path(getattr(m, "__file__", None) or "/").parent in
                     (ROOT, ROOT / "tests", folder, folder / "tests")]:
            del sys.modules[name]
        if module:
            (folder / module).write_text(text)
        results = Results()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            files = sorted({f"tests/{name}.py" for n in numbers for name in GRADERS[n]})
            pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", "-m",
                         " or ".join(f"ex{n}" for n in numbers), *files], plugins=[results])
        import gecko
        assert gecko.__file__ == str(folder / "gecko.py"), "the tests graded another folder's modules"
        connection.send(results.found)


class Grader:
    """A course folder and a child that grades it."""

    def __init__(self, folder: Path) -> None:
        make_course.make(folder, set())
        self.folder, (self.ours, theirs) = folder, multiprocessing.Pipe()
        self.child = START.Process(target=grade, args=(folder, theirs), daemon=True)
        self.child.start()

    def run(self, numbers, module: str = "", text: str = ""):
        """The results with this text in the module's place, which is then put back."""
        before = (self.folder / module).read_text() if module else ""
        self.ours.send((tuple(numbers), module, text))
        assert self.ours.poll(120), "the grading child does not answer"
        found = self.ours.recv()
        if module:
            (self.folder / module).write_text(before)
        return found


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    grader = Grader(tmp_path_factory.mktemp("course") / "c")
    yield grader
    grader.ours.send(None)
    grader.child.join(20)


def test_solutions_pass(grader):
    """All graded tests pass, and every exercise has some."""
    found = grader.run(EXERCISES)
    assert not {name: said for name, (_, said) in found.items() if said}
    assert {n for marks, _ in found.values() for n in marks} == set(EXERCISES)


@pytest.mark.parametrize("n", EXERCISES)
def test_without_a_body_exactly_its_tests_fail(n, grader):
    module = EXERCISES[n][0]
    text = make_course.stripped((ROOT / module).read_text(), {n})
    found = grader.run(EXERCISES, module, text)
    assert {name for name, (_, said) in found.items() if said} == {
        name for name, (marks, _) in found.items() if n in marks}
    assert all("NotImplementedError" in said and f"pytest -m ex{n}" in said
               for marks, said in found.values() if n in marks)


@pytest.mark.parametrize("n,mistake", [(n, mistake) for n, of in WRONG.items() for mistake in of])
def test_a_wrong_answer_is_caught_and_explained(n, mistake, grader):
    module, (edits, message) = EXERCISES[n][0], WRONG[n][mistake]
    text = (ROOT / module).read_text()
    body = next(m[0] for m in make_course.BODY.finditer(text) if int(m[2]) == n)
    wrong = body
    for old, new in edits:
        assert wrong.count(old) == 1, f"exercise {n} has no {old!r}, or several; tests/wrong_answers.py is behind"
        wrong = wrong.replace(old, new)
    said = [said for _, said in grader.run([n], module, text.replace(body, wrong)).values() if said]
    assert said, "nothing failed"
    assert any(message in s for s in said), said[0]


def test_the_stated_number_of_lines_is_about_right():
    for module in make_course.MODULES:
        for _, n, about, body in make_course.BODY.findall((ROOT / module).read_text()):
            lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
            assert abs(len(lines) - int(about.split()[1])) <= 2, f"exercise {n} has {len(lines)} lines"


def test_every_exercise_has_three_wrong_answers():
    assert set(WRONG) == set(EXERCISES) and all(len(of) >= 3 for of in WRONG.values())


def test_a_course_folder_is_whole_and_holds_no_solution(tmp_path):
    make_course.make(tmp_path / "c", {4, 7})
    names = {p.name for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert {"gecko.py", "pyproject.toml", "README.md", "thesaurus.txt", "questions.jsonl", "test_llm.py"} <= names
    assert not {"wrong_answers.py", "test_course.py", "COURSE.md", "make_course.py"} & names
    assert "1 / r_ql" not in (tmp_path / "c/llm.py").read_text() and "normalise(x, dim)" in (
        tmp_path / "c/train.py").read_text()
    with pytest.raises(make_course.InputError, match="something stands there"):
        make_course.make(tmp_path / "c", {4})
    with pytest.raises(make_course.InputError, match="exercise 99: give numbers from 1"):
        make_course.make(tmp_path / "d", {99})
