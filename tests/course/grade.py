"""Grades hand-ins of the course: points, and reasons that a student can use.

    python tests/course/grade.py HAND-IN...              course folders, or .zip or .tar.gz archives of them
    python tests/course/grade.py HAND-IN... --json       and HAND-IN.results.json, as Gradescope reads it
    python tests/course/grade.py HAND-IN... --csv FILE   and one table, a row a hand-in
    python tests/course/grade.py HAND-IN... --likeness FILE   and how alike bodies are (for an oral check, no grade)

The inputs of the tests are drawn from the environment's GRADE_SEED, any word that students do not know.

Of a hand-in only the bodies between the marks count. Each is put alone into the solved project, and the tests
of its exercise run there, in a process of their own. Points are the share of these tests that passed: exit codes
are not looked at, and a skipped test has not passed. A body that could reach the tests, another solution or the
process (`flags`) is not run: it gets no points, and the instructor is told to look at it.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import csv
import functools
import io
import json
import math
import os
import pkgutil
import random
import re
import symtable
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import likeness  # noqa: E402
import make_course  # noqa: E402
from make_course import BODY, POINTS, InputError, exercises, run  # noqa: E402
from running import Grader  # noqa: E402

LIBRARIES = {"torch", "numpy", "math", "random", "itertools", "functools", "collections", "heapq", "bisect",
             "statistics", "operator", "copy", "fractions", "torch.nn", "torch.nn.functional"}
MODULES = {"torch", "F", "np", "math", "random", "itertools", "functools", "Tensor", "Sequence", "Callable", "Any"}
HELPERS = {"ranks", "duplicate_mask", "truncate_dim", "text_only", "record", "drawn", "log_prob",
           "block", "as_tensor", "norms", "derive_seed", "processes", "all_reduce_sum", "ALL", "ROWS", "InputError",
           "CallFailed"}
NO_BUILTINS = {"eval", "exec", "compile", "open", "input", "globals", "locals", "vars", "dir", "getattr", "setattr",
               "delattr", "breakpoint", "exit", "quit", "help", "type", "object", "super", "copyright", "credits",
               "license", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"}
# Attributes that lead to files, processes, frames and strings that are run, or that change how others work. Beside
# these, every name of a module that torch or numpy has imported, or imports when it is named, but for SUBMODULES.
NO_ATTRIBUTES = {"load", "loads", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "genfromtxt",
                 "fromregex", "fromfile", "tofile", "from_file", "memmap", "open_memmap", "dump", "dumps",
                 "ctypes", "compile", "gi_frame", "gi_code", "cr_frame", "ag_frame", "tb_frame", "f_back",
                 "f_globals", "f_locals", "f_builtins", "register_hook", "singledispatch",
                 "singledispatchmethod", "get_type_hints", "attrgetter", "methodcaller",
                 "update_wrapper", "wraps", "DataSource", "classes", "ops", "format_map", "grad_fn", "test",
                 "fork", "import_ir_module", "import_ir_module_from_buffer", "CompilationUnit",
                 "PyTorchFileReader", "PyTorchFileWriter"}
SUBMODULES = {"nn", "functional", "linalg", "fft", "special", "autograd", "random", "math", "functools",
              "itertools", "collections", "sparse"}
METHODS = {"__getitem__", "__len__", "__contains__"}    # the only names with underscores
UNWRITTEN = re.compile(r"\s*raise NotImplementedError\(")
STORES = {"grad", "requires_grad", "data"}              # the attributes that a body may set


@dataclass
class Grade:
    """One exercise of one hand-in."""

    n: int
    points: float = 0
    passed: int = 0
    tests: int = 0
    flagged: bool = False
    reason: str = ""


# --------------------------------------------------------------------------------------------------
# What a hand-in says


def read_hand_in(path: Path) -> dict[str, str]:
    """{module: its text} of the modules that hold exercises; nothing else of the hand-in is read."""
    wanted = tuple(make_course.modules())
    if path.is_dir():
        files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.py")
                 if str(p).endswith(wanted) and p.is_file()}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if name.endswith(wanted)}
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(wanted)]
            files = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    else:
        raise InputError(f"{path}: no course folder and no archive of one; check the path")
    texts = {}
    for module in make_course.modules():
        found = [name for name in files if f"/{name}".endswith(f"/{module}")]
        if found:
            shallowest = min(found, key=lambda name: (name.count("/"), name))
            texts[module] = files[shallowest].decode("utf-8", "replace").replace("\r\n", "\n")
    return texts


def body(text: str, n: int) -> str | None:
    """What stands between the marks of exercise n."""
    return next((match[4] for match in BODY.finditer(text) if int(match[2]) == n), None)


def transplanted(solved: str, n: int, new: str) -> str:
    """The solved module with another body of exercise n."""
    match = next(match for match in BODY.finditer(solved) if int(match[2]) == n)
    return solved[:match.start(4)] + new + solved[match.end(4):]


# --------------------------------------------------------------------------------------------------
# What a body may name


def inside(text: str, n: int) -> tuple[int, list[ast.AST]]:
    """The first line of the function that holds exercise n, and all nodes of the statements between the marks."""
    match = next(match for match in BODY.finditer(text) if int(match[2]) == n)
    first, last = text.count("\n", 0, match.start(4)) + 1, text.count("\n", 0, match.end(4)) + 1
    module = ast.parse(text, "hand-in")
    if any(first <= statement.lineno < last for statement in module.body):
        raise ValueError("the function ends between the marks; indent all lines")
    functions = [f for f in ast.walk(module) if isinstance(f, ast.FunctionDef)]
    function = min((f for f in functions if f.lineno < first <= (f.end_lineno or 0)), key=lambda f: f.lineno)
    body = [statement for statement in function.body if first <= statement.lineno < last]
    return function.lineno, [node for statement in body for node in ast.walk(statement)]


def global_names(text: str, line: int) -> set[str]:
    """The names that the function at this line, and all functions in it, take from outside."""
    def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        yield table
        for child in table.get_children():
            yield from tables(child)

    function = next(table for table in tables(symtable.symtable(text, "hand-in", "exec"))
                    if table.get_type() == "function" and table.get_lineno() == line)
    return {symbol.get_name() for table in tables(function) for symbol in table.get_symbols() if symbol.is_global()}


@functools.cache
def forbidden() -> set[str]:
    """Attributes that no body may use: what is listed, and modules, less methods and functions of such a name."""
    import numpy as np
    import torch

    theirs = {"torch", "numpy"} | sys.stdlib_module_names
    modules = {part for name in sys.modules if name.split(".")[0] in theirs for part in name.split(".")}
    modules |= {module.name for module in pkgutil.iter_modules([*torch.__path__, *np.__path__])}
    methods = {name for kind in (torch.Tensor, np.ndarray, list, dict, str, random.Random, np.random.Generator)
               for name in dir(kind)}
    # some module of torch has the name of a function; which ones are imported differs from process to process
    functions = {name for library in (torch, np, torch.nn.functional, math) for name in dir(library)
                 if callable(getattr(library, name))}
    return (modules - methods - functions - SUBMODULES) | NO_ATTRIBUTES


def flags(text: str, solved: str, n: int) -> list[str]:
    """What the body of exercise n in this text of its module does that it must not do.

    The libraries and the helpers that the solution itself uses are free.
    """
    function = next(node for node in ast.parse(solved).body if getattr(node, "name", "") == exercises()[n][1])
    free = MODULES | HELPERS | global_names(solved, function.lineno) | {function.name}
    free |= {name for name in dir(builtins) if not name.startswith("_")} - NO_BUILTINS
    line, nodes = inside(text, n)
    found = [f"names {name}, which is not defined between the marks and not among the exercise's helpers"
             for name in sorted(global_names(text, line) - free)]
    for node in nodes:
        names: list[str] = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            libraries = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in libraries if name not in LIBRARIES]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
            plain = isinstance(node.value, ast.Constant) and "_" not in str(node.value.value)
            if node.attr == "format" and not plain:
                found.append("uses format of a string that may reach attributes; take an f-string")
            if not isinstance(node.ctx, ast.Load) and node.attr not in STORES:
                found.append(f"sets .{node.attr}")
        elif isinstance(node, ast.Constant) and "__" in str(node.value):
            found.append(f"has the string {node.value!r}")
        elif isinstance(node, ast.MatchClass):
            names = node.kwd_attrs
        elif isinstance(node, (ast.ClassDef, ast.Global, ast.AsyncFunctionDef)):
            found.append(f"has a {type(node).__name__.removesuffix('Def').lower()} statement")
        found += [f"uses {name}" for name in names
                  if name.startswith("_") and name not in METHODS or name in forbidden() - LIBRARIES]
    return list(dict.fromkeys(found))


# --------------------------------------------------------------------------------------------------
# Points


def grade_exercise(grader: Grader, n: int, texts: dict[str, str], expected: set[str], seconds: float) -> Grade:
    module, solved = exercises()[n][0], grader.solved(n)
    new = body(texts.get(module, ""), n)
    if new is None:
        return Grade(n, tests=len(expected), reason=f"{module} has no marks of exercise {n}")
    if UNWRITTEN.match(new):
        return Grade(n, tests=len(expected), reason="not written yet")
    text = transplanted(solved, n, new)
    try:
        flagged = flags(text, solved, n)
    except (SyntaxError, ValueError) as error:
        return Grade(n, tests=len(expected), reason=f"not Python: {error}")
    if flagged:
        reason = f"for the instructor to look at: it {'; it '.join(flagged)}"
        return Grade(n, tests=len(expected), flagged=True, reason=reason)
    outcome = grader.outcome(n, {module: text}, seconds)
    passed = sum(outcome.tests.get(test, (False,))[0] for test in expected)
    reasons = [line for said in outcome.failed[:2] for line in shortened(said, module)]
    return Grade(n, POINTS[n] * passed / len(expected), passed, len(expected), reason="\n".join(reasons))


def shortened(said: str, module: str) -> list[str]:
    """Of a traceback, the lines of the hand-in's module and the error; of a message, all."""
    lines = said.strip().splitlines()
    if not said.startswith("Traceback"):
        return lines[:8]
    error = max((i for i, line in enumerate(lines) if re.match(r"[A-Za-z_.]+(:|$)", line)), default=0)
    theirs = [i for i, line in enumerate(lines[:error]) if line.startswith(f'  File "{module}"')]
    return [line.strip() for i in theirs[-1:] for line in lines[i:i + 2]] + lines[error:error + 3]


def expected_tests(grader: Grader, n: int, seconds: float) -> set[str]:
    """The tests of exercise n that the solution passes: all but those that are skipped on this machine."""
    outcome = grader.outcome(n, {}, seconds)
    failed = [said for said in outcome.failed if "skip" not in said.lower()]
    if failed or not outcome.tests:
        raise InputError(f"exercise {n}: the solution itself does not pass: {failed or 'it has no tests'}")
    return {test for test, (passed, _) in outcome.tests.items() if passed}


# --------------------------------------------------------------------------------------------------
# What is written


def gradescope(grades: list[Grade], seconds: float) -> dict[str, Any]:
    tests = []
    for grade in grades:
        tests.append({"name": f"{grade.n} {exercises()[grade.n][1]}", "score": round(grade.points, 2),
                      "max_score": POINTS[grade.n], "visibility": "visible",
                      "output": f"{grade.passed} of {grade.tests} tests passed\n{grade.reason}".strip()})
    return {"score": round(sum(grade.points for grade in grades), 2), "execution_time": round(seconds, 1),
            "tests": tests}


def written(hand_ins: dict[Path, dict[str, str]]) -> dict[int, dict[str, str]]:
    """{exercise: {hand-in: its body}}, of those that are written."""
    found: dict[int, dict[str, str]] = {n: {} for n in POINTS}
    for n, bodies in found.items():
        for path, texts in hand_ins.items():
            text = body(texts.get(exercises()[n][0], ""), n)
            if text and not UNWRITTEN.match(text):
                bodies[str(path)] = text
    return found


def table(rows: dict[str, list[Grade]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["hand-in", *(f"ex{n}" for n in POINTS), "total", "flagged"])
    for name, grades in rows.items():
        points = [round(grade.points, 2) for grade in grades]
        flagged = " ".join(str(grade.n) for grade in grades if grade.flagged)
        writer.writerow([name, *points, round(sum(points), 2), flagged])
    return out.getvalue()


def show(name: str, grades: list[Grade]) -> None:
    print(f"{name}: {sum(grade.points for grade in grades):.1f} of {sum(POINTS.values())} points")
    for grade in grades:
        _, function, *_ = exercises()[grade.n]
        first, *rest = grade.reason.splitlines() or [""]
        print(f"  {grade.n:2} {function:26} {grade.points:4.1f} of {POINTS[grade.n]:2}  "
              f"{grade.passed} of {grade.tests} tests  {first}".rstrip())
        for line in rest:
            print(f"       {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("hand_in", nargs="+", type=Path, help="a course folder, or an archive of one")
    parser.add_argument("--json", action="store_true", help="write HAND-IN.results.json beside each")
    parser.add_argument("--csv", type=Path, help="write one table of all")
    parser.add_argument("--likeness", type=Path, help="write how alike each body is to the solution and to others")
    parser.add_argument("--seconds", type=float, default=20, help="of processor time an exercise (%(default)s)")
    parser.add_argument("--variant", default="", metavar="SEED", help="as it was given to make_course.py")
    args = parser.parse_args()
    hand_ins = {path: read_hand_in(path) for path in args.hand_in}
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "course"
        make_course.make(folder, set(), args.variant)
        grader = Grader(folder, os.environ.get("GRADE_SEED", ""))
        expected = {n: expected_tests(grader, n, 10 * args.seconds) for n in POINTS}
        for path, texts in hand_ins.items():
            start = time.monotonic()
            grades = [grade_exercise(grader, n, texts, expected[n], args.seconds) for n in POINTS]
            rows[str(path)] = grades
            show(str(path), grades)
            if args.json:
                report = gradescope(grades, time.monotonic() - start)
                path.with_name(path.name + ".results.json").write_text(json.dumps(report, indent=1) + "\n")
        solutions = {n: body(grader.solved(n), n) or "" for n in POINTS}
        grader.close()
    if args.csv:
        args.csv.write_text(table(rows), encoding="utf-8")
    if args.likeness:
        args.likeness.write_text(likeness.report(written(hand_ins), solutions), encoding="utf-8")


if __name__ == "__main__":
    run(main)
