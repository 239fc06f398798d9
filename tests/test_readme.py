"""README: its map, its commands.   pytest tests/test_readme.py

Invariants: every function and test of the map exists; every command of the page is one that the programs
take; those that need nothing but the recipe's folder run, in the order of the page.
"""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_newcomer import MAIN, project  # noqa: F401 a fixture

from engine import files

ROOT = Path(__file__).parent.parent
PAGE = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text())      # a line that goes on after a backslash
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTIONS["The map"].splitlines()
        if line.startswith("| ") and "`" in line]
COMMANDS = [shlex.split(re.split(r"\s{2,}", found)[0], comments=True) for found in re.findall(
    r"(?:^    |`)(?:\w+=\S+ )*python ((?:gecko|data|llm|train)\.py[^`\n]*)", PAGE, re.M) if "..." not in found]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_map_names_what_exists(row):
    for module, name in re.findall(r"`(\w+)\.(\w+)`", row[1]):
        place = module if (ROOT / f"{module}.py").exists() else f"engine.{module}"
        assert callable(getattr(importlib.import_module(place), name))
    tests = re.findall(r"`(\w+\.py)::(\w+)`", row[2])
    assert tests and row[1].count("`") >= 2
    for file, name in tests:
        tree = ast.parse(next((ROOT / "tests").rglob(file)).read_text())
        assert name in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, f"{file} has no {name}"


def test_the_map_has_every_equation_and_exercise():
    text = SECTIONS["The map"]
    assert all(f"eq. {n}" in text for n in (1, 2, 3))
    make_course = pytest.importorskip("make_course", reason="a course folder has no course maker")
    missing = [f"{Path(module).stem}.{function}" for module, function, *_ in make_course.exercises().values()
               if not module.startswith("tests/") and f"`{Path(module).stem}.{function}`" not in text]
    assert not missing


def test_the_reading_order_has_every_file():
    text = SECTIONS["Reading order"]
    files = [*ROOT.glob("*.py"), *(ROOT / "engine").glob("[!_]*.py")]
    assert {path.name for path in files} == set(re.findall(r"`(\w+\.py)`", text))


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"\b(?:tests|engine)/[\w/]+(?:\.\w+)+", PAGE))
    assert len(named) > 8 and not [path for path in named if not (ROOT / path).is_file()]


def refuse(self, message):
    raise AssertionError(f"{self.prog}: {message}")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_page_is_taken(words, monkeypatch):
    """Parsed by the program itself: an unknown flag or a missing argument fails here."""
    original = argparse.ArgumentParser.parse_args

    def stop(self, *args, **how):
        original(self, *args, **how)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(sys, "argv", ["8" if word == "N" else word for word in words])
    with pytest.raises(Parsed):
        MAIN[words[0]]()


def test_commands_that_need_the_recipe_alone_run(project, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Those whose files are there, in the page's order, in a folder where the recipe has run (in small)."""
    demo = tmp_path / "runs/demo"
    shutil.copytree(project, demo)
    shutil.copytree(demo / "retriever", demo / "gecko")
    shutil.copytree(demo / "beir", demo / "questions")
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in COMMANDS:
        named = [w for w in words[1:] if w.startswith("runs/")]
        others = [w for w in words[1:] if "/" in w and w not in named]   # a URL, a name at the hub
        if not named or others or not Path(named[0]).exists():
            continue
        monkeypatch.setattr(sys, "argv", words)
        files.run(MAIN[words[0]])
        ran.append(" ".join(words[:2]))
    assert set(ran) == {"gecko.py search", "gecko.py encode", "llm.py show", "train.py evaluate"}
    assert (demo / "corpus.npy").is_file() and "ndcg@10" in capsys.readouterr().out
