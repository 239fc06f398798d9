"""Words of a text, and a corpus that needs no download: the documentation of Python's own library.

The corpus is read from the running interpreter: the same Python gives the same rows. A passage is
{"_id", "title", "text"}.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import pkgutil
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
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
    text = unicodedata.normalize("NFKC", spoken(text).lower())
    text = re.sub(r"[^\w\s]|_", mark_or_space, text)
    words = re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)
    return words + re.findall(f"(?=([{UNSPACED}]{{2}}))", text)      # pairs overlap


def mark_or_space(character: re.Match[str]) -> str:
    """A mark belongs to its word: the vowels of many scripts are marks. Other signs part words."""
    return character[0] if unicodedata.category(character[0]).startswith("M") else " "


def spoken(name: str) -> str:
    """A qualified name as words.

    >>> spoken("csv.DictReader.line_num")
    'csv Dict Reader line num'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[._]", " ", name)


BLANK_LINES = r"\n\s*\n"


def paragraphs(text: str) -> list[str]:
    return re.split(BLANK_LINES, text)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each of at least three words, or four characters of such a script.

    >>> sentences("Return x. This is the smallest\\ninteger. It may be big!")
    ['This is the smallest integer.', 'It may be big!']
    """
    # a sentence begins with no small Latin letter; those of Chinese and Japanese need no space
    ends = rf"{BLANK_LINES}|(?<=[.!?:।؟۔።])\s+(?=[^\W\d_a-z]|[`\"'(])|(?<=[。！？])"
    found = [" ".join(part.split()) for part in re.split(ends, text)]
    long_enough = re.compile(rf"\S+\s+\S+\s+\S|[{UNSPACED}]{{4}}")
    return [sentence for sentence in found if long_enough.search(sentence)]


# --------------------------------------------------------------------------------------------------
# The built-in corpus: documentation, read from the running interpreter

# Importing these does something (prints, opens a browser, patches), or they hold no public names.
NOT_IMPORTED = set("""antigravity distutils encodings ensurepip idlelib lib2to3 nt ntpath pydoc_data
    test tests this turtledemo venv""".split())


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


def stdlib_modules() -> Iterator[str]:
    """Names of the public modules of the standard library that can be imported here."""
    for name in sorted(sys.stdlib_module_names):
        yield from with_submodules(name)
    yield "os.path"


def with_submodules(name: str) -> Iterator[str]:
    last = name.rpartition(".")[2]
    if last.startswith("_") or last in NOT_IMPORTED:
        return
    try:
        module = importlib.import_module(name)
    except ImportError:                                              # another platform's module
        return
    yield name
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        yield from with_submodules(f"{name}.{child.name}")


def documentation(modules: Iterable[str]) -> list[Passage]:
    """What pydoc would show of each public object, once, under its shortest public name."""
    rows = []
    seen = set[object]()                                             # names and texts, and ids of `things`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # deprecated modules and names
        things = list[tuple[str, Any]]()
        # subtle: all are imported first, since a submodule may take the name of a function
        for module in list(modules):
            things += objects(module, importlib.import_module(module))
        for name, thing in sorted(things, key=name_order):
            text = doc_text(name, thing)
            if text and seen.isdisjoint((name, text, id(thing))):
                rows.append(passage(name, text))
                seen.update((name, text))
            seen.add(id(thing))
    return sorted(rows, key=operator.itemgetter("_id"))


def name_order(named: tuple[str, Any]) -> tuple[Any, ...]:
    """Of several names for one object the corpus keeps the first in this order."""
    name = named[0]
    hardly_typed = name.startswith(("posix", "genericpath"))         # but os and os.path
    return hardly_typed, not name.startswith("builtins."), len(name), name


def objects(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """(qualified name, object) of a module or a class and of what is public in it, or of a function."""
    yield name, thing
    if inspect.ismodule(thing):
        inside = module_members(name, thing)
    elif inspect.isclass(thing):
        inside = class_members(thing)
    else:
        return
    for member_name, member in inside:
        member = getattr(member, "__func__", member)                 # a static, class or bound method's function
        documented = callable(member) or inspect.isdatadescriptor(member)
        if documented and not member_name.startswith("_"):
            yield from objects(f"{name}.{member_name}", member)


def module_members(module_name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """`__all__`, or else what the module's own package, or a private module behind it, defines."""
    all_is_own = hasattr(module, "__all__") or module_name == "builtins"
    own = module_name.split(".")[0], "builtins"
    for name in getattr(module, "__all__", list(vars(module))):
        thing = getattr(module, name, None)
        home = (getattr(thing, "__module__", None) or "builtins").split(".")[0]
        if all_is_own or home in own or home.startswith("_"):
            yield name, thing


def class_members(cls: type) -> Iterator[tuple[str, Any]]:
    """What stands in a class, and in private classes behind it; of other classes those made within it."""
    for base in cls.__mro__:
        private = base.__name__.startswith("_") or base.__module__.startswith("_")
        if base is cls or private:
            for name, thing in vars(base).items():
                if not inspect.isclass(thing) or thing.__qualname__.startswith(f"{cls.__qualname__}."):
                    yield name, thing


def doc_text(name: str, thing: Any) -> str:
    """The docstring; a class may have it on __init__; an exported name without one, its signature."""
    doc = getattr(thing, "__doc__", None)
    if inspect.isclass(thing):                                       # its own, not an inherited one
        own = vars(thing)
        doc = own.get("__doc__") or getattr(own.get("__init__"), "__doc__", None)
    text = inspect.cleandoc(doc) if isinstance(doc, str) else ""
    text = text.strip() or signature(name, thing)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)                   # addresses differ from run to run


def signature(name: str, thing: Any) -> str:
    module, _, last = name.rpartition(".")
    if last not in getattr(sys.modules.get(module), "__all__", ()):
        return ""
    try:
        text = f"{last}{inspect.signature(thing)}"
    except (ValueError, TypeError):
        return ""
    return "" if text.endswith(("()", "(*args, **kwargs)")) else text
