"""The course: each exercise is graded, by its own tests alone, and they catch well-known mistakes.

    python -m pytest tests/course/test_course.py

Invariants: without the body of n, exactly the tests marked exn fail, of all that grade, with
NotImplementedError; each wrong answer fails its own tests alone, with a message that says why.
"""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import make_course
import pytest
import torch
from processes import START
from wrong_answers import WRONG

ROOT = make_course.ROOT
EXERCISES = make_course.exercises()
GRADERS = make_course.graders()


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


FOLDER = Path()                                                      # a child's own course folder


def start_grading(folders):
    """In a child: a course folder of its own, before any module that stands elsewhere."""
    global FOLDER
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    FOLDER = folders / str(os.getpid())
    make_course.make(FOLDER, set())
    os.chdir(FOLDER)
    sys.path[:0] = [str(FOLDER), str(FOLDER / "tests")]
    sys.dont_write_bytecode, sys.pycache_prefix = False, None        # the tests' asserts are rewritten once
    torch.set_num_threads(1)


def end_with_the_tests():
    """Also where these are killed: a pool's child then waits for work without end."""
    multiprocessing.parent_process().join()
    os._exit(1)


def grade(n, mistake):
    """In a child: all graded tests, on n without its body where n is given; or n's own, on n with a mistake."""
    module = EXERCISES[n][0] if n else ""
    before = (ROOT / module).read_text() if n else ""
    ours = {path.stem for path in FOLDER.rglob("*.py")} | {"engine"}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]                                        # and read again, as it is now
    if n:
        (FOLDER / module).write_text(with_mistake(before, n, mistake) if mistake else
                                     make_course.stripped(before, {n}))
    results, numbers = Results(), [n] if mistake else EXERCISES
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        files = sorted({GRADERS[k] for k in numbers})
        pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", "-m",
                     " or ".join(f"ex{k}" for k in numbers), *files], plugins=[results])
    shutil.rmtree((FOLDER / module).parent / "__pycache__", ignore_errors=True)   # its next text may be as long
    if n:
        (FOLDER / module).write_text(before)
    import gecko
    assert gecko.__file__ == str(FOLDER / "gecko.py"), "the tests graded another folder's modules"
    return results.found


def with_mistake(text, n, mistake):
    body = next(m[0] for m in make_course.BODY.finditer(text) if int(m[2]) == n)
    wrong = body
    for old, new in WRONG[n][mistake][0]:
        assert wrong.count(old) == 1, f"exercise {n} has no {old!r}, or several; wrong_answers.py is behind"
        wrong = wrong.replace(old, new)
    return text.replace(body, wrong)


def order(item):
    """What a test wants graded: (n, mistake), each None where the test has none."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("n"), parameters.get("mistake")


@pytest.fixture(scope="module")
def orders(request, tmp_path_factory):
    """What the selected tests want graded, by two children at a time: {(n, mistake): what will be found}."""
    with ProcessPoolExecutor(2, START, start_grading, (tmp_path_factory.mktemp("course"),)) as children:
        yield {order(item): children.submit(grade, *order(item)) for item in request.session.items
               if "orders" in getattr(item, "fixturenames", ())}
        children.shutdown(cancel_futures=True)


@pytest.fixture
def found(request, orders):
    return orders[order(request.node)].result(120)


def test_solutions_pass(found):
    """All graded tests pass, and every exercise has some."""
    assert not {name: said for name, (_, said) in found.items() if said}
    assert {n for marks, _ in found.values() for n in marks} == set(EXERCISES)


@pytest.mark.parametrize("n", EXERCISES)
def test_without_a_body_exactly_its_tests_fail(n, found):
    assert {name for name, (_, said) in found.items() if said} == {
        name for name, (marks, _) in found.items() if n in marks}
    assert all("NotImplementedError" in said and make_course.command(n) in said
               for marks, said in found.values() if n in marks)


@pytest.mark.parametrize("n,mistake", [(n, mistake) for n, of in WRONG.items() for mistake in of])
def test_a_wrong_answer_is_caught_and_explained(n, mistake, found):
    message, said = WRONG[n][mistake][1], [said for _, said in found.values() if said]
    assert said, "nothing failed"
    assert any(message in s for s in said), said[0]


def test_the_stated_number_of_lines_is_about_right():
    for module in make_course.modules():
        for _, n, about, body in make_course.BODY.findall((ROOT / module).read_text()):
            lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
            assert abs(len(lines) - int(about.split()[1])) <= 2, f"exercise {n} has {len(lines)} lines"


def test_every_exercise_has_three_wrong_answers():
    assert set(WRONG) == set(EXERCISES) and all(len(of) >= 3 for of in WRONG.values())


def test_a_course_folder_is_whole_and_holds_no_solution(tmp_path):
    make_course.make(tmp_path / "c", {4, 7})
    names = {p.name for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert {"gecko.py", "pyproject.toml", "README.md", "AGENTS.md", "thesaurus.txt", "test_llm.py"} <= names
    assert not {"wrong_answers.py", "test_course.py", "COURSE.md", "make_course.py", "RESULTS.md"} & names
    for n, (module, *_) in EXERCISES.items():
        solution = next(m[4] for m in make_course.BODY.finditer((ROOT / module).read_text()) if int(m[2]) == n)
        assert (solution in (tmp_path / "c" / module).read_text()) == (n not in {4, 7})
    page = (tmp_path / "c/EXERCISES.md").read_text()
    assert "| 4 | `rrf` | `llm.py` |" in page and make_course.command(7) in page and "| 2 |" not in page
    with pytest.raises(make_course.InputError, match="something stands there"):
        make_course.make(tmp_path / "c", {4})
    with pytest.raises(make_course.InputError, match="exercise 99: give numbers from 1"):
        make_course.make(tmp_path / "d", {99})


def test_the_instructors_page_names_the_exercises():
    """Function, minutes and points of each."""
    page = (ROOT / "tests/course/COURSE.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    stated = {int(row[1]): (row[2], int(row[4]), int(row[5])) for row in rows if len(row) > 5 and row[1].isdigit()}
    assert stated == {n: (f"`{function}`", make_course.MINUTES[n], make_course.POINTS[n])
                      for n, (_, function, *_) in EXERCISES.items()}
    assert sum(make_course.POINTS.values()) == 100
