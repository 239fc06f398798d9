"""engine/corpus.py: words, sentences, the built-in corpus.   pytest tests/test_corpus.py

Invariants: the built-in corpus has every name and every text once; an alias gives way to the name that people
type; nothing with a side effect is imported; the same interpreter gives the same rows.
"""

import doctest
import re

import pytest

from engine import corpus
from engine.corpus import builtin_corpus


@pytest.mark.parametrize("text, words", [
    ("Коты пьют 14 литров", ["коты", "пьют", "14", "литров"]), ("naïve Größe", ["naïve", "größe"]),
    ("हिन्दी में", ["हिन्दी", "में"]), ("العربية", ["العربية"]), ("집에 간다", ["집에", "간다"]),
    ("Python3で書く", ["python3", "で", "書", "く", "で書", "書く"]), ("茶", ["茶"]), ("ＡＢ１", ["ab1"]),
    ("«?!» _", [])])
def test_words_of_any_script(text, words):
    """No letter is lost, nor the marks that are vowels; pairs of characters where no spaces are written."""
    assert corpus.terms(text) == words


def test_ascii_words_are_runs_of_letters_and_digits(rows):
    for row in rows[::50]:
        if row["text"].isascii():
            assert corpus.terms(row["text"]) == re.findall("[a-z0-9]+", corpus.spoken(row["text"]).lower())


@pytest.mark.parametrize("text, count", [
    ("Коты пьют молоко. Собаки едят мясо утром!", 2),
    ("भारत एक देश है। इसकी राजधानी नई दिल्ली है।", 2), ("هل هذا كتاب؟ نعم هو كتاب.", 2),
    ("茶在热水里泡开。咖啡在冷水里也可以！", 2), ("短。也短。", 0)])
def test_sentences_of_other_scripts(text, count):
    assert len(corpus.sentences(text)) == count


@pytest.fixture(scope="module")
def rows():
    return builtin_corpus()


def test_docstring_examples_run():
    result = doctest.testmod(corpus)
    assert result.attempted > 0 and result.failed == 0


def test_names_and_texts_stand_once(rows):
    assert len(rows) > 5000
    assert len({p["_id"] for p in rows}) == len({p["text"] for p in rows}) == len(rows)
    assert all(p["_id"] == p["title"] and p["text"].strip() for p in rows)


def test_names_are_those_that_people_type(rows):
    names = {p["title"] for p in rows}
    assert {"math.ceil", "os.remove", "builtins.dict.get", "builtins.round", "os.path.join",
            "builtins.open", "random.shuffle", "topics.with", "asyncio.sleep", "json"} <= names
    assert not {"posix.remove", "asyncio.tasks.sleep", "io.open"} & names, "an alias stands twice"
    assert not any(part.startswith("_") for name in names for part in name.split("."))


def test_the_same_rows_again(rows):
    assert not any(" at 0x" in p["text"] for p in rows), "an address differs from run to run"
    assert builtin_corpus() == rows


def test_nothing_with_side_effects_is_imported(rows):
    tops = {p["title"].split(".")[0] for p in rows}
    assert not tops & {"antigravity", "this", "turtledemo", "idlelib", "test", "lib2to3"}
