"""A course folder: the modules with the bodies of exercises taken out, and the tests that grade them.

    python tests/course/make_course.py DIR            all exercises
    python tests/course/make_course.py DIR 1 4 7      these alone; the others stay solved
    python tests/course/make_course.py DIR --variant SEED     some with another constant or term (variants.py)

One source: a body stands between `# EXERCISE n (about k lines)` and `# END EXERCISE`; signature,
docstring and shapes stay. The tests that grade exercise n are those of the ordinary tests that are marked exn.
Notes for the instructor are in tests/course/COURSE.md.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from variants import VARIANTS, drawn, varied  # noqa: E402

from engine.files import InputError, run  # noqa: E402

MINUTES = {1: 15, 2: 30, 3: 45, 4: 10, 5: 20, 6: 45, 7: 60, 8: 15, 9: 90, 10: 60, 11: 45}
POINTS = {1: 5, 2: 10, 3: 10, 4: 5, 5: 10, 6: 10, 7: 15, 8: 5, 9: 15, 10: 10, 11: 5}
BESIDE = ("*.py", "pyproject.toml", "requirements.txt", "LICENSE", ".gitignore")
BODY = re.compile(r"^( *)# EXERCISE (\d+) \((about \d+ lines?)\)\n(.*?)^ *# END EXERCISE\n", re.M | re.S)


@functools.cache
def modules() -> list[str]:
    """The files that hold exercises: pages, engine files, and the test that is one."""
    patterns = "*.py", "engine/*.py", "tests/test_course*.py"
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))
            if BODY.search(path.read_text(encoding="utf-8"))]


@functools.cache
def exercises() -> dict[int, tuple[str, str, str]]:
    """{n: (module, function, about how many lines)}."""
    found = {}
    for module in modules():
        text = (ROOT / module).read_text(encoding="utf-8")
        for match in BODY.finditer(text):
            found[int(match[2])] = (module, function_of(text, match).name, match[3])
    return dict(sorted(found.items()))


def function_of(text: str, match: re.Match[str]) -> ast.FunctionDef:
    """The function that holds this body."""
    line = text.count("\n", 0, match.start()) + 1
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return max((f for f in functions if f.lineno < line <= (f.end_lineno or 0)), key=lambda f: f.lineno)


@functools.cache
def graders() -> dict[int, list[str]]:
    """{n: the test files that grade it}."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: path.name.startswith("test_course")):
        for n in sorted({int(n) for n in re.findall(r"^@pytest\.mark\.ex(\d+)$", path.read_text("utf-8"), re.M)}):
            found.setdefault(n, []).append(f"tests/{path.name}")
    return found


def command(n: int) -> str:
    return f"python -m pytest {' '.join(graders()[n])} -m ex{n}"


def stripped(text: str, numbers: set[int]) -> str:
    """A module's text without the bodies of these exercises."""
    def without(match: re.Match[str]) -> str:
        n = int(match[2])
        if n not in numbers:
            return match[0]
        parts = (ast.get_docstring(function_of(text, match)) or "").split("\n\n")
        said = " ".join(" ".join(parts[:1 + parts[0].endswith(":")]).split())     # the equation stands below
        message = f"exercise {n} is not written yet: {said.rstrip('.')}. Grade it with: {command(n)}"
        pieces = textwrap.wrap(message, 90, drop_whitespace=False)
        lines = "\n".join(f"{match[1]}    {piece!r}" for piece in pieces)
        return f"{match[1]}# EXERCISE {n} ({match[3]})\n{match[1]}raise NotImplementedError(\n" \
               f"{lines})\n{match[1]}# END EXERCISE\n"

    return BODY.sub(without, text)


def make(folder: Path, numbers: set[int], variant: str = "") -> None:
    """Write the course folder; it must not hold anything yet. A variant is a seed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: something stands there; give a folder that is new or empty")
    if unknown := numbers - set(exercises()):
        raise InputError(f"exercise {min(unknown)}: give numbers from {min(exercises())} to {max(exercises())}")
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in BESIDE:
        for path in ROOT.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    shutil.copytree(ROOT / "engine", folder / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        if not path.name.startswith("test_") or f"tests/{path.name}" in sum(graders().values(), []):
            text = varied(f"tests/{path.name}", path.read_text(encoding="utf-8"), variant)
            (folder / "tests" / path.name).write_text(text, encoding="utf-8")
    for module in modules():
        text = varied(module, (ROOT / module).read_text(encoding="utf-8"), variant)
        (folder / module).write_text(stripped(text, numbers), encoding="utf-8")
    for page in (ROOT / "tests/course/student").glob("*.md"):
        text = page.read_text(encoding="utf-8").replace("{table}", table(numbers))
        (folder / page.name).write_text(text, encoding="utf-8")
    text = (ROOT / "tests/course/QUESTIONS.md").read_text(encoding="utf-8")
    (folder / "QUESTIONS.md").write_text(without_answers(text), encoding="utf-8")


def without_answers(text: str) -> str:
    """The written questions for students: neither what a run prints nor what an answer must say."""
    before, *questions = text.split("\n## ")
    code = [line for line in before.splitlines() if line.startswith("    ")]
    pages = ["# Written questions\n\n"
             "Write down what you expect, run it, explain (exercise 1 is needed for question 4, 3 "
             "for 5, 4 for 3 and 7). In `python`, in this folder:\n\n"
             + "\n".join(code) + "\n"]
    for question in questions:
        asked = question.split("**Answer.**")[0]
        asked = re.sub(r"^    (?!>>>|\.\.\.|python).*\n", "", asked, flags=re.M)     # what a run prints
        pages.append(asked.rstrip() + "\n")
    return "\n## ".join(pages)


def table(numbers: set[int]) -> str:
    rows = ["| n | function | file | lines | minutes | points | how to grade yourself |", "|---" * 7 + "|"]
    for n in sorted(numbers):
        module, function, lines = exercises()[n]
        rows.append(f"| {n} | `{function}` | `{module}` | {lines.removesuffix('s').removesuffix(' line')} | "
                    f"{MINUTES[n]} | {POINTS[n]} | `{command(n)}` |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("exercises", type=int, nargs="*", help="their numbers (default: all)")
    parser.add_argument("--variant", default="", metavar="SEED", help="other constants, drawn by this seed")
    args = parser.parse_args()
    numbers = set(args.exercises or exercises())
    make(args.folder, numbers, args.variant)
    for n in sorted(numbers):
        module, function, lines = exercises()[n]
        print(f"  {n:2}  {Path(module).stem + '.' + function:32} {lines:15} {command(n)}")
    for n, number in drawn(args.variant).items() if args.variant else ():
        print(f"  variant: {VARIANTS[n].says.format(k=number)}")
    print(f"wrote {args.folder}\nnext: cd {args.folder} && {command(min(numbers))}")


if __name__ == "__main__":
    run(main)
