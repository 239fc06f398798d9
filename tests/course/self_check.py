"""The longer check of the grader, by hand: every wrong answer is caught, every right one has all points, and in a
course that lacks one exercise alone its tests fail and all others' pass.

    python tests/course/self_check.py           all exercises, in some minutes
    python tests/course/self_check.py 3 9       these alone; GRADE_SEED draws the inputs, as for grade.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import make_course  # noqa: E402
from grade import Grade, InputError, expected_tests, grade_exercise, transplanted  # noqa: E402
from more_answers import MORE_WRONG, RIGHT, Answer  # noqa: E402
from running import Grader  # noqa: E402
from wrong_answers import WRONG, with_mistake  # noqa: E402

SEED = os.environ.get("GRADE_SEED", "")


def text_of(solved: str, n: int, answer: Answer) -> str:
    """The solved module with this answer to exercise n."""
    if isinstance(answer, str):
        return transplanted(solved, n, textwrap.indent(answer.strip("\n") + "\n", "    "))
    return with_mistake(solved, n, answer)


def report(n: int, name: str, grade: Grade, right: bool) -> bool:
    """One line for an answer; true where it was graded as it should be."""
    good = right == (grade.passed == grade.tests)
    reasons = [line for line in grade.reason.splitlines() if line.startswith("why: ")]
    mute = reasons and all("known here" in line for line in reasons)
    if right and not good or not right and (not good or grade.flagged or mute):
        words = " | ".join(grade.reason.splitlines())[:400]
        state = "" if good else "  <<<<<< " + ("REFUSED" if right else "ACCEPTED")
        print(f"{n:3} {name}: {grade.passed} of {grade.tests}{state}\n      {words}", flush=True)
    return good


def stripped_alone(n: int, folder: Path) -> bool:
    """Whether, in a course without the body of n, all tests of n fail for that and those of every other pass."""
    make_course.make(folder, {n})
    grader = Grader(folder, SEED)
    tests = grader.outcome(n, {}, 100).tests.values()
    good = bool(tests) and all(not passed and "NotImplementedError" in said for passed, said in tests)
    for m in make_course.exercises():
        try:
            if m != n:
                expected_tests(grader, m, 100)
        except InputError as error:
            print(f"without the body of {n}: {error}", flush=True)
            good = False
    grader.close()
    return good


def main() -> None:
    numbers = [int(arg) for arg in sys.argv[1:]] or list(make_course.exercises())
    count, bad = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "course"
        make_course.make(folder, set())
        grader = Grader(folder, SEED)
        for n in numbers:
            expected = expected_tests(grader, n, 100)
            wrong: dict[str, Answer] = {mistake: changes for mistake, (changes, _) in WRONG[n].items()}
            for answers, right in ((wrong | MORE_WRONG.get(n, {}), False), (RIGHT.get(n, {}), True)):
                for what, answer in answers.items():
                    texts = {make_course.exercises()[n][0]: text_of(grader.solved(n), n, answer)}
                    count += 1
                    bad += not report(n, what, grade_exercise(grader, n, texts, expected, 60), right)
        grader.close()
        alone = [n for n in numbers if stripped_alone(n, Path(name) / f"without {n}")]
    print(f"{count} answers, {bad} graded wrongly; {len(alone)} of {len(numbers)} exercises are graded alone")
    sys.exit(bad > 0 or alone != numbers)


if __name__ == "__main__":
    main()
