"""Words of a text, and a corpus that needs no download: the documentation of Python's own library.

The corpus is read from the running interpreter: the same Python gives the same rows. A passage is
{"_id", "title", "text"}.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import itertools
import pkgutil
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

Passage = dict[str, str]
Corpus = Sequence[Passage]


def texts_and_titles(corpus: Corpus) -> tuple[list[str], list[str]]:
    """As a model's `encode_passages` takes them."""
    return [p["text"] for p in corpus], [p["title"] for p in corpus]


# --------------------------------------------------------------------------------------------------
# Words and sentences


# Thai, Lao, Burmese, Khmer, kana and Chinese characters: written without spaces between words
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
            "\U00020000-\U0003ffff")


def shown(p: Passage, chars: int) -> str:
    """A passage as prompts show it, in one line. Uncut, one too long would fail every query that retrieves it."""
    return " ".join(f"{p['title']}\n{p['text']}".split())[:chars]


def terms(text: str) -> list[str]:
    """Lower-cased words of any script, identifiers in parts; of scripts without spaces between words
    each character and each pair.

    >>> terms("csv.DictReader reads"), terms("Größe 北京")
    (['csv', 'dict', 'reader', 'reads'], ['größe', '北', '京', '北京'])
    """
    text = spoken(text).lower()
    if text.isascii():
        return re.findall("[a-z0-9]+", text)
    found = []
    # letters, digits, and marks on them: the vowels of many scripts are marks
    characters = unicodedata.normalize("NFKC", text)
    letters = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in characters)
    for word in re.findall(f"[{UNSPACED}]+|[^{UNSPACED} ]+", letters):
        if re.match(f"[{UNSPACED}]", word):
            found += [*word, *(a + b for a, b in itertools.pairwise(word))]
        else:
            found.append(word)
    return found


def spoken(name: str) -> str:
    """A qualified name as words.

    >>> spoken("csv.DictReader.line_num")
    'csv Dict Reader line num'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace(".", " ").replace("_", " ")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each of at least three words, or four characters of such a script.

    >>> sentences("Return x. This is the smallest\\ninteger. It may be big!")
    ['This is the smallest integer.', 'It may be big!']
    """
    found = []
    for paragraph in paragraphs(text):
        line = " ".join(paragraph.split())
        # a sentence begins with no small Latin letter; those of Chinese and Japanese need no space
        found += re.split(r"(?<=[.!?:])\s+(?=[^\W\d_a-z]|[`\"'(])|(?<=[。！？])", line)
    long_enough = re.compile(rf"\S+\s+\S+\s+\S|[{UNSPACED}]{{4}}")
    return [sentence for sentence in found if long_enough.search(sentence)]


def paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


# --------------------------------------------------------------------------------------------------
# The built-in corpus: documentation, read from the running interpreter

# Importing these does something (prints, opens a browser, patches), or they hold no public names.
NOT_IMPORTED = set("""antigravity distutils encodings ensurepip idlelib lib2to3 nt ntpath pydoc_data
    test this turtledemo venv""".split())
# The same objects under names that nobody types: os and os.path are preferred.
LAST = ("posix", "posixpath", "genericpath")


def builtin_corpus() -> list[Passage]:
    """The standard library's documentation: modules, classes, functions, methods, language topics.

    _id = title = the qualified name; one row an object and a text.
    """
    from pydoc_data.topics import topics

    rows = {row["text"]: row for row in documentation(stdlib_modules())}
    for name, text in sorted(topics.items()):
        rows.setdefault(text.strip(), passage(f"topics.{name}", text))
    return list(rows.values())


def passage(name: str, text: str) -> Passage:
    return {"_id": name, "title": name, "text": text.strip()}


def stdlib_modules() -> dict[str, ModuleType]:
    """Every public module of the standard library that can be imported here, by name."""
    found: dict[str, ModuleType] = {}
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") and name not in NOT_IMPORTED:
            found.update(with_submodules(name))
    found["os.path"] = quiet_import("os.path")
    return found


def with_submodules(name: str) -> Iterator[tuple[str, ModuleType]]:
    try:
        module = quiet_import(name)
    except ImportError:                                              # another platform's module
        return
    yield name, module
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not child.name.startswith("_") and child.name not in ("test", "tests"):
            yield from with_submodules(f"{name}.{child.name}")


def quiet_import(name: str) -> ModuleType:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def documentation(modules: dict[str, ModuleType]) -> list[Passage]:
    """What pydoc would show of each public object, once, under its shortest public name."""
    rows: dict[str, Passage] = {}                                    # name -> row
    texts: set[str] = set()
    seen: dict[int, Any] = {}                                        # keeps objects alive, so that ids stay unique
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # deprecated names, on access
        for name, thing in sorted(objects(modules), key=lambda pair: name_order(pair[0])):
            thing = getattr(thing, "__func__", thing)                # a bound method's function
            text = doc_text(name, thing, modules)
            if text and text not in texts and name not in rows and id(thing) not in seen:
                rows[name] = passage(name, text)
                texts.add(text)
            seen[id(thing)] = thing
    return [rows[name] for name in sorted(rows)]


def name_order(name: str) -> tuple[Any, ...]:
    """Of several names for one object the corpus keeps the first in this order."""
    last, builtin = name.split(".")[0] in LAST, name.startswith("builtins.")
    return last, name.count("."), not builtin, len(name), name


def objects(modules: dict[str, ModuleType]) -> Iterator[tuple[str, Any]]:
    """(qualified name, object) of modules, their public functions and classes, and methods."""
    for module_name, module in modules.items():
        yield module_name, module
        for name in public_names(module_name, module):
            thing = getattr(module, name, None)
            if callable(thing):
                yield f"{module_name}.{name}", thing
            if inspect.isclass(thing):
                yield from members(f"{module_name}.{name}", thing)


def public_names(module_name: str, module: ModuleType) -> list[str]:
    """`__all__`, or else what the module (or a private one behind it) defines itself."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, thing in vars(module).items() if defined_in(module_name, thing)]
    return sorted(name for name in names if not name.startswith("_"))


def defined_in(module_name: str, thing: Any) -> bool:
    """Whether the object was made in the module's own package, or in a private module behind it."""
    home = getattr(thing, "__module__", None)
    if not isinstance(home, str) or module_name == "builtins":
        return True
    package, own_package = home.split(".")[0], module_name.split(".")[0]
    return package in (own_package, "builtins") or package.startswith("_")


def members(class_name: str, cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods, properties and nested classes of a class, and of private classes behind it."""
    for base in cls.__mro__:
        private = base.__name__.startswith("_") or str(base.__module__).startswith("_")
        if base is not cls and not private:
            continue
        for name, thing in sorted(vars(base).items()):
            thing = getattr(thing, "__func__", thing)                # static and class methods
            if name.startswith("_"):
                continue
            if not inspect.isclass(thing):
                if callable(thing) or inspect.isdatadescriptor(thing):
                    yield f"{class_name}.{name}", thing
            elif thing.__qualname__.startswith(cls.__qualname__ + "."):
                yield f"{class_name}.{name}", thing
                yield from members(f"{class_name}.{name}", thing)


def doc_text(name: str, thing: Any, modules: dict[str, ModuleType]) -> str:
    """The docstring; a class may have it on __init__; an exported name without one, its signature."""
    doc = getattr(thing, "__doc__", None)
    if inspect.isclass(thing):                                       # its own, not an inherited one
        own = vars(thing)
        doc = own.get("__doc__") or getattr(own.get("__init__"), "__doc__", None)
    text = inspect.cleandoc(doc) if isinstance(doc, str) else ""
    if not text.strip():
        text = signature(name, thing, modules)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text).strip()           # addresses differ from run to run


def signature(name: str, thing: Any, modules: dict[str, ModuleType]) -> str:
    module, _, last = name.rpartition(".")
    if last not in getattr(modules.get(module), "__all__", ()):
        return ""
    try:
        text = f"{last}{inspect.signature(thing)}"
    except (ValueError, TypeError):
        return ""
    return "" if text.endswith(("()", "(*args, **kwargs)")) else text
