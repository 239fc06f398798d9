"""The course: each exercise is graded, by its own tests alone, and they catch well-known mistakes.

    python -m pytest tests/course/test_course.py

Invariants: where one exercise alone is stripped, all its tests fail, with NotImplementedError, and the tests of all
others pass, since they pass with every other body stripped; so do right answers; each wrong one is caught by the
tests of its own exercise, with a message that says why.
"""

import ast
import doctest
import io
import re

import make_course
import pytest
import variants
from more_answers import RIGHT
from running import Grader
from self_check import text_of
from variants import VARIANTS
from wrong_answers import WRONG, with_mistake

ROOT = make_course.ROOT
EXERCISES = make_course.exercises()


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "solved"
    make_course.make(folder, set())
    grader = Grader(folder)
    yield grader
    grader.close()


def without(numbers):
    return {module: make_course.stripped((ROOT / module).read_text(), numbers) for module in make_course.modules()}


@pytest.mark.parametrize("n", EXERCISES)
def test_right_answers_pass_without_the_others(grader, n):
    """So no exercise needs another to be solved first, none is graded by another's tests, and any style will do."""
    texts, module = without(set(EXERCISES) - {n}), EXERCISES[n][0]
    answers = [("the reference", texts[module])]
    answers += [(style, text_of(texts[module], n, answer)) for style, answer in list(RIGHT[n].items())[-2:]]
    for style, text in answers:
        outcome = grader.outcome(n, texts | {module: text})
        assert outcome.tests and not outcome.failed, (style, outcome.failed)


@pytest.mark.parametrize("n", EXERCISES)
def test_without_its_body_all_its_tests_fail(grader, n):
    outcome = grader.outcome(n, without({n}))
    assert outcome.tests and not any(passed for passed, _ in outcome.tests.values())
    assert all("NotImplementedError" in said and make_course.command(n) in said for said in outcome.failed)


@pytest.mark.parametrize("n,mistake", [(n, mistake) for n, of in WRONG.items() for mistake in of])
def test_a_wrong_answer_is_caught_and_explained(grader, n, mistake):
    message, module = WRONG[n][mistake][1], EXERCISES[n][0]
    text = with_mistake((ROOT / module).read_text(), n, WRONG[n][mistake][0])
    outcome = grader.outcome(n, {module: text}, until=message)
    assert outcome.failed, "nothing failed"
    assert any(message in said for said in outcome.failed), outcome.failed[0]


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """A grader of a course with other constants."""
    folder = tmp_path_factory.mktemp("course") / "variant"
    make_course.make(folder, set(), "a secret")
    grader = Grader(folder)
    yield grader
    grader.close()


@pytest.mark.parametrize("n", [*VARIANTS, 11])
def test_a_variant_has_its_own_solution(variant, n):
    """The varied solution passes, and the public one does not; its docstring says the other constant."""
    assert not variant.outcome(n, {}).failed
    module, function = EXERCISES[n][:2]
    public = (ROOT / module).read_text()
    assert variant.outcome(n, {module: public}).failed
    if n in VARIANTS:
        tree = next(node for node in ast.parse(variant.solved(n)).body if getattr(node, "name", "") == function)
        assert str(variants.drawn("a secret")[n]) in ast.get_docstring(tree)


def test_a_variant_is_its_seed_s():
    assert variants.drawn("a") == variants.drawn("a") != variants.drawn("b")
    for seed in map(str, range(30)):
        for file in {file for of in VARIANTS.values() for file in of.changes}:
            text = (ROOT / file).read_text()
            assert variants.varied(file, text, seed) != text == variants.varied(file, text, "")


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


class Roughly(doctest.OutputChecker):
    """The same words, and numbers that differ by a tenth at most: versions of torch keep different tensors."""

    def check_output(self, want, got, flags):
        number = r"\d+\.?\d*"
        have, wanted = ([float(x) for x in re.findall(number, text)] for text in (got, want))
        words = [re.sub(number, "", text) for text in (got, want)]
        return words[0] == words[1] and have == pytest.approx(wanted, rel=0.1, abs=0.02)


def test_the_written_questions_print_what_their_page_says(tmp_path):
    text = (ROOT / "tests/course/QUESTIONS.md").read_text()
    examples = doctest.DocTestParser().get_doctest(text, {}, "QUESTIONS.md", None, 0)
    said = io.StringIO()
    result = doctest.DocTestRunner(Roughly()).run(examples, out=said.write)
    assert result.attempted > 20 and result.failed == 0, said.getvalue()
    page = make_course.without_answers(text)
    assert page.count("\n## ") == text.count("\n## ") and "python train.py" in page and ">>> llm.ranks(" in page
    assert "Answer" not in page and "    1.0 0.02" not in page and "[2.0, 0.833" not in page


def test_the_instructors_page_names_the_exercises():
    """Function, minutes and points of each."""
    page = (ROOT / "tests/course/COURSE.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    stated = {int(row[1]): (row[2], int(row[4]), int(row[5])) for row in rows if len(row) > 5 and row[1].isdigit()}
    assert stated == {n: (f"`{function}`", make_course.MINUTES[n], make_course.POINTS[n])
                      for n, (_, function, *_) in EXERCISES.items()}
    assert sum(make_course.POINTS.values()) == 100
