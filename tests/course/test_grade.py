"""The grader: points for what works, none for what evades.   pytest tests/course/test_grade.py

Invariants: only a body counts, alone, in the solved project; passed tests are counted and no exit code; what could
reach the tests, another solution or the process is flagged and never run; JSON and CSV say the same as the screen.
"""

import csv
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import grade
import likeness
import make_course
import pytest
from running import Grader

ROOT = make_course.ROOT


def with_body(n, new):
    """The solved module of exercise n with this body, at the solution's indentation."""
    text = (ROOT / make_course.exercises()[n][0]).read_text()
    lines = "".join(f"    {line}\n" for line in new.strip("\n").splitlines())
    return grade.transplanted(text, n, lines)


def flags(n, text):
    return grade.flags(text, (ROOT / make_course.exercises()[n][0]).read_text(), n)


@pytest.mark.parametrize("n", make_course.exercises())
def test_a_solution_is_not_flagged(n):
    assert flags(n, (ROOT / make_course.exercises()[n][0]).read_text()) == []


def test_a_function_is_free_whatever_is_imported(monkeypatch):
    """torch.distributed.tensor and torch.onnx.ops.embedding are modules, which other tests import."""
    grade.forbidden.cache_clear()
    for name in ("torch.distributed.tensor", "torch.onnx.embedding", "torch.onnx.evil"):
        monkeypatch.setitem(sys.modules, name, sys)
    try:
        assert {"tensor", "embedding"}.isdisjoint(grade.forbidden()) and "evil" in grade.forbidden()
    finally:
        grade.forbidden.cache_clear()


EVASIONS = {
    "leaves with exit code 0": (4, "import os\nos._exit(0)", "imports os"),
    "leaves by a library's os": (2, "torch.os._exit(0)", "uses os"),
    "leaves by SystemExit": (4, "raise SystemExit(0)", "names SystemExit"),
    "skips the test": (4, "import pytest\npytest.skip()", "imports pytest"),
    "raises SkipTest": (4, "from unittest import SkipTest\nraise SkipTest", "imports unittest"),
    "calls the spec": (2, "from test_train import pre_spec\nreturn pre_spec(q, p, tau)", "imports test_train"),
    "finds the spec in the module table": (2, "import sys\nreturn sys.modules['test_train']", "imports sys"),
    "reaches the caller's frame": (4, "g = (x for x in [])\nreturn g.gi_frame.f_back.f_locals", "uses gi_frame"),
    "reaches globals by a function": (4, "return ranks.__globals__", "uses __globals__"),
    "reaches globals by a pattern": (4, "match ranks:\n    case object(__globals__=g):\n        return g",
                                     "uses __globals__"),
    "calls another loss": (7, "return pre_loss(q, p_pos, tau, q_id, p_id)", "names pre_loss"),
    "reads the solution": (4, "return eval(open('llm.py').read())", "names eval"),
    "changes the comparison": (2, "torch.allclose = lambda *a, **k: True", "sets .allclose"),
    "overrides torch's functions": (2, "class Mode(torch.overrides.TorchFunctionMode):\n    pass",
                                    "uses overrides"),
    "returns what equals all": (4, "class Same:\n    __eq__ = lambda a, b: True\nreturn Same()",
                                "has a class statement"),
    "a file by numpy": (10, "np.save('x', scores)", "uses save"),
    "an attribute by its name": (4, "return getattr(ranks, '__glo' + 'bals__')", "names getattr"),
    "imports by the builtin": (4, "return __import__('os')", "names __import__"),
    "hides a builtin in an inner scope": (4, "def f():\n    open = 1\nreturn open('llm.py')", "names open"),
    "hides another loss in an inner scope": (7, "def f():\n    pre_loss = 1\nreturn pre_loss(q)", "names pre_loss"),
    "C's exit": (4, "import torch\ntorch.ctypes.CDLL(None).exit(0)", "uses ctypes"),
    "a pickle": (4, "import torch\ntorch.cuda.memory.pickle.loads(b'')", "uses pickle"),
    "strings that are run": (4, "@functools.singledispatch\ndef f(x):\n    pass", "uses singledispatch"),
    "a file by torch": (2, "torch.load('x')", "uses load"),
    "attributes by the fields of a format": (4, "raise ValueError('{0.__globals__}'.format(ranks))", "format"),
    "the same in pieces": (4, "raise ValueError(('{0._' + '_globals_' + '_}').format(ranks))", "uses format"),
    "sets torch's functions by a dict": (2, "functools.update_wrapper(torch, torch.nn.ParameterDict())",
                                         "uses update_wrapper"),
    "attributes by operator": (4, "from operator import attrgetter\nreturn attrgetter('f')(ranks)",
                               "uses attrgetter"),
    "a library of C": (2, "torch.ops.load_library('x')", "uses ops"),
    "a library of C by numpy": (4, "np.ctypeslib.load_library('libc.so.6', '/lib').exit(0)", "uses ctypeslib"),
    "what numpy imports when it is named": (4, "from numpy import f2py", "uses f2py"),
    "the tests' inputs by the graph": (2, "x = q.grad_fn.next_functions[0][0].variable", "uses grad_fn"),
    "TorchScript": (2, "torch.CompilationUnit('def f(): return 1')", "uses CompilationUnit"),
    "a helper outside the marks": (4, "return my_rrf(*rankings)", "names my_rrf"),
}


@pytest.mark.parametrize("case", EVASIONS)
def test_a_body_that_evades_is_flagged(case):
    n, new, reason = EVASIONS[case]
    assert any(reason in flag for flag in flags(n, with_body(n, new)))


def test_a_body_that_ends_its_function_is_refused():
    """Else a second function of its name, which nobody looked at, would take its place."""
    text = (ROOT / "llm.py").read_text()
    evil = grade.transplanted(text, 4, "    return []\n\n\ndef rrf(*rankings):\n    return eval('1')\n")
    with pytest.raises(ValueError, match="ends between the marks"):
        flags(4, evil)


FREE = {
    "another library": (4, "from collections import Counter\nR = Counter()\nreturn list(R)"),
    "a helper of its own": (4, "def place(x, xs):\n    return sorted(xs).index(x) + 1\nreturn [place(1, [1])]"),
    "einsum and a loop": (2, "s = torch.einsum('id,jd->ij', q, p) / tau\nfor i in range(2):\n    s[i, i] += 0\n"
                             "return -s.log_softmax(1).diagonal().mean()"),
    "a method by its name": (5, "return max(range(len(R)), key=R.__getitem__), None"),
    "a formatted number": (3, "x = '[{}]'.format(1)\nreturn [f' {x}']"),
    "numbers of numpy": (11, "import numpy as np\nx = np.random.default_rng(0).normal()"),
    "a way to import": (2, "from torch.nn import functional"),
    "a case that is left open": (5, "if not answers:\n    return 0, None\nraise NotImplementedError(negative)"),
    "an exception": (4, "try:\n    return [1 / 0]\nexcept ZeroDivisionError as e:\n    raise ValueError(str(e))"),
}


@pytest.mark.parametrize("case", FREE)
def test_honest_bodies_are_free(case):
    n, new = FREE[case]
    assert flags(n, with_body(n, new)) == []


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Three hand-ins, of exercises 1, 2 and 4, graded by the command line: an archive and two folders."""
    home = tmp_path_factory.mktemp("class")
    for name in ("honest", "broken", "cheat"):
        make_course.make(home / name, set())
    (home / "broken/train.py").write_text((home / "broken/train.py").read_text().replace("return F.", "return (F."))
    text = (home / "broken/gecko.py").read_text()
    (home / "broken/gecko.py").write_text(text.replace("# EXERCISE 1 (about", "# EXERCISE 1 (abuot"))
    (home / "broken/llm.py").write_text(with_body(4, "while True:\n    pass"))
    (home / "cheat/llm.py").write_text(with_body(4, "import os\nos._exit(0)"))
    (home / "cheat/gecko.py").write_text(with_body(1, "return W.sum(1) / mask.sum(1, keepdim=True)"))
    shutil.rmtree(home / "cheat/tests")
    with zipfile.ZipFile(home / "honest.zip", "w") as archive:
        for path in sorted((home / "honest").glob("*.py")):
            archive.write(path, f"ada/{path.name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grade, "POINTS", {n: grade.POINTS[n] for n in (1, 2, 4)})
        paths = [str(home / name) for name in ("honest.zip", "broken", "cheat")]
        patch.setattr("sys.argv", ["grade.py", *paths, "--json", "--csv", str(home / "all.csv"), "--seconds", "2",
                                   "--likeness", str(home / "alike.csv")])
        grade.main()
    reports = {Path(path).name: json.loads(Path(f"{path}.results.json").read_text()) for path in paths}
    return reports, list(csv.DictReader((home / "all.csv").open())), home / "alike.csv"


def said(report, n):
    return next(test for test in report["tests"] if test["name"].startswith(f"{n} "))


def test_an_honest_archive_has_all_points(graded):
    assert graded[0]["honest.zip"]["score"] == 20
    assert all(test["score"] == test["max_score"] for test in graded[0]["honest.zip"]["tests"])


def test_a_broken_body_costs_its_own_exercise_alone(graded):
    broken = graded[0]["broken"]
    assert "not Python" in said(broken, 2)["output"] and said(broken, 2)["score"] == 0
    assert "gecko.py has no marks of exercise 1" in said(broken, 1)["output"]
    assert "stopped after 2 seconds" in said(broken, 4)["output"] and said(broken, 4)["score"] == 0


def test_an_evasion_earns_nothing_and_a_mistake_its_part(graded):
    cheat = graded[0]["cheat"]
    assert said(cheat, 4)["score"] == 0 and "look at: it imports os" in said(cheat, 4)["output"]
    assert 0 <= said(cheat, 1)["score"] < 5 and "why: " in said(cheat, 1)["output"]
    assert said(cheat, 2)["score"] == 10, "the others' points stand"


def test_the_table_says_what_the_files_say(graded):
    reports, rows, _ = graded
    assert [row["hand-in"].split("/")[-1] for row in rows] == list(reports)
    assert [float(row["total"]) for row in rows] == [report["score"] for report in reports.values()]
    assert [row["flagged"] for row in rows] == ["", "", "4"]


SOLUTION = """
    R = [0.0] * len(rankings[0])
    for scores in rankings:
        for i, r in enumerate(ranks(scores)):
            R[i] += 1 / r
    return R
"""


def test_likeness_is_blind_to_names_and_comments():
    renamed = SOLUTION.replace("scores", "s").replace("R", "total").replace("return", "# mine\n    return")
    other = "    return [sum(1 / r for r in rs) for rs in zip(*map(ranks, rankings))]\n"
    mine, theirs, loops = map(likeness.normal_form, (SOLUTION, renamed, other))
    assert likeness.likeness(mine, theirs) == 1 and likeness.likeness(mine, loops) < 0.7
    bodies = {4: {"ada": other, "ben": renamed, "cy": other.replace("rs", "x"), "dee": "    return (\n"}}
    rows = list(csv.DictReader(io.StringIO(likeness.report(bodies, {4: SOLUTION}))))
    assert {row["hand-in"]: (row["like the solution"] == "1.00", row["like another"] == "1.00", row["which"])
            for row in rows} == {"ada": (False, True, "cy"), "ben": (True, False, "cy"), "cy": (False, True, "ada")}


def test_the_likeness_table_is_written(graded):
    rows = list(csv.DictReader(graded[2].open()))
    assert {(row["exercise"], Path(row["hand-in"]).name) for row in rows if row["like the solution"] == "1.00"} >= {
        ("1", "honest.zip"), ("2", "honest.zip"), ("4", "honest.zip")}


def test_the_same_seed_gives_the_same_grade(tmp_path):
    """And another seed other inputs."""
    make_course.make(tmp_path / "c", set())
    text = with_body(4, "return [sum(1 / (1 + r) for r in rs) for rs in zip(*map(ranks, rankings))]")
    said = []
    for seed, times in (("a", 2), ("b", 1)):
        grader = Grader(tmp_path / "c", seed)
        for _ in range(times):
            lines = "\n".join(grader.outcome(4, {"llm.py": text}).failed).splitlines()
            said.append([line for line in lines if line.startswith("of the scores")])
        grader.close()
    assert said[0] and said[0] == said[1] != said[2]


def test_what_is_no_hand_in_is_refused(tmp_path):
    with pytest.raises(make_course.InputError, match="no course folder and no archive"):
        grade.read_hand_in(tmp_path / "nobody.zip")
