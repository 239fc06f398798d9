"""The rules of the house, read off the files.   pytest tests/test_house.py

Invariants: pages import gecko <- data <- llm <- train and any engine file; an engine file imports no page,
and of engine/ only what stands above it; private operators of torch are called in two files alone; the
examples in docstrings run; nothing that trains reads the test questions, which have an answer in the corpus.
"""

import ast
import doctest
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from weigh import weigh

import data

ROOT = Path(__file__).parent.parent
ORDER = ["gecko", "data", "llm", "train"]
ENGINE = ["files", "search", "tokens", "packed", "dropout", "vectors", "folder", "corpus", "pairs", "markup",
          "documents", "beir", "table", "convert", "transport", "commandline", "replies", "cache", "kept",
          "offline", "recorded", "endpoint", "local", "show", "scale", "runs", "evaluate", "results", "mteb"]
ALLOWED = {"torch", "numpy", "tqdm", "tokenizers", "safetensors"}
OPTIONAL = {"matplotlib", "mteb", "huggingface_hub"}


def imported(path, top_level):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    """A module imports only those before it, and five packages; optional ones inside functions."""
    before = set(ORDER[:ORDER.index(name)]) | {"engine"}
    top, everywhere = (set(imported(ROOT / f"{name}.py", t)) - sys.stdlib_module_names for t in (True, False))
    assert top <= before | ALLOWED
    assert everywhere <= before | ALLOWED | OPTIONAL | {"pydoc_data"}


def test_four_modules_and_no_pickle():
    assert {p.stem for p in ROOT.glob("*.py")} == set(ORDER)
    for name in ORDER:
        text = (ROOT / f"{name}.py").read_text()
        assert "pickle" not in set(imported(ROOT / f"{name}.py", False)) and "torch.load" not in text
        calls = {n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)
                 and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec"}


@pytest.mark.parametrize("name", [*ORDER, *(f"engine.{p.stem}" for p in sorted((ROOT / "engine").glob("*.py")))])
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_questions_are_answerable_and_split_in_half():
    rows = [json.loads(line) for line in (ROOT / "engine/questions.jsonl").read_text().splitlines()]
    names = {p["title"] for p in data.builtin_corpus()}
    answerable = [r for r in rows if set(r["answers"]) & names]
    assert len(answerable) >= 240 and len(answerable) >= len(rows) - 6
    dev, test = ([r for r in answerable if r["split"] == s] for s in ("dev", "test"))
    assert abs(len(dev) - len(test)) <= 6
    assert not {r["query"] for r in dev} & {r["query"] for r in test}


def test_only_the_results_read_the_questions():
    """The file is named in one function, which writes them out; the recipe calls it after all training."""
    readers = []
    for path in [*PAGES, *ENGINE_FILES]:
        for f in ast.walk(ast.parse(path.read_text())):
            if isinstance(f, ast.FunctionDef) and "questions.jsonl" in ast.unparse(f):
                readers.append(f.name)
    assert readers == ["write_questions"]
    calls = [path.stem for path in [*PAGES, *ENGINE_FILES] if "write_questions(" in path.read_text()]
    results = (ROOT / "engine/results.py").read_text().partition("def results(")[2]
    assert calls == ["results"] and results.count("write_questions(") == 1
    recipe = next(f for f in ast.walk(ast.parse((ROOT / "train.py").read_text()))
                  if isinstance(f, ast.FunctionDef) and f.name == "recipe")
    called = [c.func.id for c in ast.walk(recipe) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)]
    lines = {c.func.id: c.lineno for c in ast.walk(recipe) if isinstance(c, ast.Call)
             and isinstance(c.func, ast.Name)}
    assert called.count("trained") == 2 and lines["trained"] < lines["results"]


PAGES = [ROOT / f"{name}.py" for name in ORDER]
ENGINE_FILES = sorted(p for p in (ROOT / "engine").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.name)
def test_an_engine_file_imports_no_page_and_nothing_below_it(path):
    """The rule that carries the house: an engine file takes what it needs as arguments."""
    assert not set(imported(path, False)) & set(ORDER)
    assert set(imported(path, True)) - sys.stdlib_module_names <= ALLOWED | {"engine"}
    of_engine = {node.module.removeprefix("engine.") for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.ImportFrom) and node.module.startswith("engine")}
    assert of_engine <= set(ENGINE[:ENGINE.index(path.stem)])


@pytest.mark.parametrize("path", [*PAGES, *ENGINE_FILES], ids=lambda path: path.name)
def test_private_operators_of_torch_are_called_in_two_files(path):
    """They may change with any release of torch, so packed and search alone depend on them, and look before."""
    private = re.findall(r"torch\.ops\.|torch(?:\.\w+)*\._\w+", path.read_text())
    assert not private or path.stem in ("packed", "search")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_reads_without_stumbling(path):
    """No walrus, no comprehension in a comprehension, no function that does not fit on a screen.

    But for two: the loop, and the recipe, which is the paper's section 3 from top to bottom.
    """
    weight = weigh(path)
    assert not weight.walruses and not weight.nested and weight.words_a_line <= 10.8
    assert weight.longest <= (55 if path.stem == "train" else 45)


def test_the_pages_read_in_an_hour():
    weights = [weigh(path) for path in PAGES]
    words = sum(weight.words for weight in weights)
    assert sum(weight.lines for weight in weights) <= 1_900 and words <= 12_500
    assert words / sum(weight.code for weight in weights) <= 10.5


def test_the_house_does_not_grow():
    weights = [weigh(path) for path in (*PAGES, *ENGINE_FILES)]
    assert sum(weight.lines for weight in weights) <= 7_020
    assert sum(weight.words for weight in weights) <= 48_360


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.name)
def test_an_engine_file_is_small(path):
    assert weigh(path).lines <= 320
