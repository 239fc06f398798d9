"""Title-body pairs for pre-finetuning (section 3.1), out of documentation and source code.

The paper's were crawled from the web. Ours need no download: a name, a sentence or a span of words
against the rest of its passage, a comment against the code below it, and what people write about code
against the documentation of what that code calls.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.corpus import Corpus, Passage, documentation, paragraphs, passage, sentences, spoken

LIBRARIES = """numpy numpy.linalg numpy.fft numpy.random numpy.ma numpy.char numpy.polynomial torch
    torch.nn torch.nn.functional torch.nn.init torch.linalg torch.fft torch.special torch.optim
    torch.optim.lr_scheduler torch.distributions torch.utils.data torch.autograd""".split()
Texts = tuple[str, str]  # what people write about code, and the code
# Their source is read as text, with all that lies beside or below it: csv's folder is the standard library.
SOURCES = ("csv", "numpy", "torch", "networkx", "sympy")


def builtin_pairs(
    corpus: Corpus,
    count: int,
    seed: int,
    tasks: Sequence[str],
) -> Iterator[tuple[str, str, str, str]]:
    """`count` times (task, query, title, text), of four kinds, each with one of the tasks.

    own, library: a name, sentence or span of words and the rest of its passage. commented: a comment
    and the code below it. calling: what people write about code that calls a function, in everyday
    words, and the documentation of that function. The shares were chosen on the dev questions.
    """
    rng = np.random.default_rng(seed)
    source = source_texts()
    docstrings = [passage(name, text) for name, text in source["docstring"]]
    pieces = {"own": chunks(corpus), "library": chunks(documentation(LIBRARIES) + docstrings)}
    calling = [with_calls(corpus, source[kind]) for kind in ("comment", "function")]
    times_called = Counter(i for _, called in itertools.chain(*calling) for i in called)
    for kind in rng.choice(["own", "library", "commented", "calling"], size=count, p=[0.4, 0.15, 0.15, 0.3]):
        title = ""
        if kind in pieces:
            query, title, text = title_body_pair(pick(pieces[kind], rng), rng)
        elif kind == "commented":
            query, text = pick(source["comment"], rng)
        else:
            query, called = pick(pick(calling, rng), rng)
            rareness = np.array([times_called[i] ** -0.7 for i in called])  # prefer a rare call to len()
            callee = corpus[rng.choice(called, p=rareness / rareness.sum())]
            text = " ".join(callee["text"].split()[:120])
            if rng.random() < 0.7:
                title = callee["title"]
        yield pick(tasks, rng), query, title, text


def pick(items: Sequence[Any], rng: np.random.Generator) -> Any:
    return items[int(rng.integers(len(items)))]


def chunks(corpus: Corpus) -> list[Passage]:
    """Long passages in pieces of whole paragraphs that a small encoder can read, under their titles."""
    found = []
    for row in corpus:
        pieces = [""]
        for paragraph in filter(str.strip, paragraphs(row["text"])):
            if pieces[-1] and len(f"{pieces[-1]} {paragraph}".split()) > 60:  # words
                pieces.append("")
            pieces[-1] += f"\n\n{paragraph}"
        found += [passage(row["title"], piece) for piece in pieces]
    return found


def title_body_pair(row: Passage, rng: np.random.Generator) -> tuple[str, str, str]:
    """(query, title, text): a name, a sentence or a span of words, against the rest of the passage."""
    title, text = row["title"], row["text"]
    words = text.split()
    found = sentences(text)
    kind = rng.random()
    if kind >= 0.7 and len(words) > 3:
        n = rng.integers(3, min(11, len(words)))
        start = rng.integers(len(words) - n + 1)
        query = " ".join(words[start:start + n])
        if rng.random() < 0.5:
            del words[start:start + n]
            text = " ".join(words)
        return query, title, text
    if kind >= 0.4 and len(found) > 1:
        i = 0 if rng.random() < 0.5 else rng.integers(len(found))
        query = found.pop(i)
        return query, title if rng.random() < 0.7 else "", " ".join(found)
    query = spoken(title)
    if rng.random() >= 0.5:
        query = " ".join(query.split()[-2:])
    return query, title if rng.random() < 0.3 else "", text


def source_texts() -> dict[str, list[Texts]]:
    """What people write about code, of every Python file, each once; nothing is imported.

    {"comment": (words, code), "function": (its name or docstring, its body), "docstring": (name, text)}
    """
    found = defaultdict[str, dict[Texts, None]](dict)
    for path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):                        # some tests of the library; a dead link
            continue
        for kind, words, code in itertools.chain(comments(text), functions(text)):
            found[kind][words, code] = None
    return {kind: list(texts) for kind, texts in found.items()}


def source_files() -> Iterator[Path]:
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:                      # torch does not bring it here
            continue
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if "site-packages" not in path.relative_to(root).parts:
                yield path


# Lines of a comment, and up to six lines of code below them
COMMENTED = re.compile(r"((?:^[^\S\n]*#.*\n)+)((?:[^\S\n]*[^\s#].*\n){1,6})", re.MULTILINE)


def comments(text: str) -> Iterator[tuple[str, str, str]]:
    """Of each block, by the kinds of `source_texts`."""
    for block, code in COMMENTED.findall(f"{text}\n"):
        words = " ".join(line.strip().lstrip("#! ") for line in block.strip().split("\n"))
        if 3 <= len(re.findall(r"[a-z]{2,}", words)) <= 60:
            yield "comment", words, " ".join(map(str.strip, code.strip().split("\n")))[:400]


# The indent, kind and name of a function or class, and up to 29 lines below it that are deeper, or blank
DEFINED = re.compile(r"^([^\S\n]*)(async def|def|class) (\w+).*\n(?=((?:(?:\1[^\S\n].*|[^\S\n]*)\n){,29}))", re.M)


def functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Of each function and class, read from its first lines, by the kinds of `source_texts`."""
    for _, keyword, name, body in DEFINED.findall(f"{text}\n"):
        body = body.removesuffix("\n")
        before, _, rest = body.partition('"""')
        doc, _, code = rest.partition('"""')
        if before.strip() not in ("", "r"):                          # a text further down, no docstring
            doc, code = "", body
        first = " ".join(paragraphs(doc.strip())[0].split())
        if keyword != "class":
            yield "function", spoken(name).strip(), code
            if len(first.split()) >= 4:
                yield "function", first, code
        if len(doc.split()) >= 4:
            yield "docstring", name, inspect.cleandoc(doc)


# Of an object of unknown type a method is taken for that of the first of these types that has it
TYPES = ("str", "list", "dict", "set", "int", "float", "tuple", "bytes", "bytearray")


def with_calls(corpus: Corpus, pairs: Sequence[Texts]) -> list[tuple[str, list[int]]]:
    """(words, passages of what the code calls), where a name alone tells and there are one to six of them.

    >>> with_calls([passage("os.remove", ""), passage("builtins.str.split", "")], [("w", "os.remove(x.split())")])
    [('w', [0, 1])]
    """
    passages = {}                                                    # of a name, and of ".method"
    for i, row in enumerate(corpus):
        name = row["_id"].removeprefix("builtins.")
        passages[name] = [i]
        passages.setdefault("." + name.rpartition(".")[2], []).append(i)
    modules = {name.partition(".")[0] for name in passages} - set(TYPES)
    found = []
    for words, code in pairs:
        called = {}                                                  # each once, in order
        for call in re.findall(r"([A-Za-z_][\w.]*)\(", code):
            first, dot, _ = call.partition(".")
            if call not in passages and dot and first not in modules:
                method = "." + call.rpartition(".")[2]
                call = next((kind + method for kind in TYPES if kind + method in passages), method)
            same = passages.get(call, [])
            if len(same) <= 2:                                       # else many classes have it
                called.update(dict.fromkeys(same))
        if 0 < len(called) <= 6:
            found.append((words, list(called)))
    return found
