"""A folder of .txt, .md and .rst files -> passages, and what of them trains an encoder without labels.

engine/markup.py cuts one document. The id of a passage, `guide/install.md#3`, names file and place, so that it
stays while the file does. Whatever is left out is named or counted, with what would mend it.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.corpus import Corpus, Passage, sentences, terms
from engine.files import InputError, beir_file, read_filled
from engine.markup import passages_of
from engine.pairs import chunks, title_body_pair

MAX_BYTES = 1_000_000_000    # of all files: their passages are held in memory, in about twice as much

ENDINGS = (".md", ".markdown", ".rst", ".txt")
CONVERTERS = {".pdf": "pdftotext", ".html": "pandoc -t plain", ".htm": "pandoc -t plain", ".docx": "pandoc",
              ".odt": "pandoc", ".epub": "pandoc", ".tex": "pandoc", ".doc": "libreoffice --convert-to txt",
              ".ipynb": "jupyter nbconvert --to markdown", ".gz": "gunzip"}
PASSED_OVER = {"node_modules", "__pycache__", "venv"}                # and hidden folders, such as .git
FOR_PROGRAMS = re.compile(r"(CMakeLists|requirements([-_]\w+)?|vocab|robots|top_level|entry_points)\.txt")

# --------------------------------------------------------------------------------------------------
# A folder -> passages


def read_corpus(path: str | Path) -> list[Passage]:
    """A folder of documents, a BEIR folder or a corpus.jsonl; what was left out is said, to stderr."""
    corpus = Path(path)
    if beir_file(path, "queries.jsonl").is_file():
        corpus = beir_file(path, "corpus.jsonl")
    if corpus.is_file() and ".jsonl" in corpus.suffixes:
        return read_filled(corpus)
    passages, notes = read_documents(path)
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    return passages


def read_documents(folder: str | Path) -> tuple[list[Passage], list[str]]:
    """The passages of all documents below a folder, or of one file; and what was left out, a line each."""
    root = Path(folder)
    paths, notes = documents_below(root)
    passages: dict[bytes, Passage] = {}                              # by a digest of their words
    unreadable, empty, found = [], [], 0
    for path in tqdm(paths, desc="documents", unit="file", delay=2):
        name = path.relative_to(path.parent if path == root else root).as_posix()
        name = name.encode(errors="replace").decode()                # no file can hold what is not UTF-8
        text = decoded(path)
        if text is None:
            unreadable.append(name)
            continue
        rows = passages_of(name, text)
        if not rows:
            empty.append(name)
        found += len(rows)
        for row in rows:
            words = " ".join(row["text"].split()).encode()
            passages.setdefault(hashlib.blake2b(words).digest(), row)
    if unreadable:
        notes.append(f"left out: {first(unreadable)}: not UTF-8 or UTF-16, or not readable; to convert a text: "
                     "iconv -f LATIN1 -t UTF-8")
    if empty:
        notes.append(f"left out: {first(empty)}: no words in it")
    if len(passages) < found:
        notes.append(f"{found - len(passages)} of {found} passages repeat another's text and are left out")
    if not passages:
        raise InputError("; ".join([f"{folder}: no .txt, .md or .rst file with words in it; name another folder, "
                                    "or convert what is there", *notes]))
    return list(passages.values()), notes


def first(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are beside them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def documents_below(root: Path) -> tuple[list[Path], list[str]]:
    """The files to read, and what is not read: by its ending, with what converts it."""
    if not root.exists():
        raise InputError(f"{root}: no such folder or file; check the path")
    paths, others = [], Counter[str]()
    for path in [root] if root.is_file() else files_below(root, others):
        ending = path.suffix.lower()
        if FOR_PROGRAMS.fullmatch(path.name):
            others["lists for programs, such as requirements.txt"] += 1
        elif ending in ENDINGS:
            paths.append(path)
        else:
            others[f"{ending or 'nameless'} files"] += 1
    total = sum(path.stat().st_size for path in paths)
    if total > MAX_BYTES:
        raise InputError(f"{root}: {len(paths)} documents of {total / 1e9:.1f} GB, and at most "
                         f"{MAX_BYTES / 1e9:.0f} GB is held in memory; name a folder within it")
    notes = []
    for ending, program in CONVERTERS.items():
        kind = f"{ending} files"
        if kind in others:
            notes.append(f"left out: {others.pop(kind)} {kind}; to read them, convert them first: {program}")
    if others:
        kinds = [f"{count} {kind}" for kind, count in others.most_common()]
        notes.append(f"left out: {first(kinds)}")
    return paths, notes


def files_below(root: Path, others: Counter[str]) -> Iterator[Path]:
    """In the order of their names. A link to a folder is not followed: it may lead back up."""
    def count_unreadable(error: OSError) -> None:
        others["folders that cannot be opened"] += 1

    for folder, inner, names in os.walk(root, onerror=count_unreadable):
        kept = [name for name in inner if not name.startswith(".") and name not in PASSED_OVER
                and not os.path.islink(os.path.join(folder, name))]
        if len(kept) < len(inner):
            others["folders (hidden, of programs, or links)"] += len(inner) - len(kept)
        inner[:] = sorted(kept)
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not name.startswith("."):          # no dead link, no pipe
                yield path


def decoded(path: Path) -> str | None:
    """The text of a file in UTF-8, or in UTF-16 where its first bytes say so; None if it is none."""
    try:
        content = path.read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


# --------------------------------------------------------------------------------------------------
# What trains an encoder, and what it must not have seen


DRAWS = 4                    # of sentences, spans of words and names, from each piece that a small encoder reads


def heading_pairs(passages: Corpus) -> list[tuple[str, str, str]]:
    """(query, title, text) for pre-finetuning: a heading, a first sentence, parts that are drawn, and the rest."""
    rng = np.random.default_rng(0)
    pairs = []
    for piece in chunks(passages):
        title, text = piece["title"], piece["text"]
        heading = title.rpartition(": ")[2]
        pairs += [(title, "", text), (heading, "", text)]
        first_sentence, *rest = sentences(text) or [""]
        pairs.append((first_sentence, title, " ".join(rest)))
        pairs += [title_body_pair(piece, rng) for _ in range(DRAWS)]
    return [pair for pair in dict.fromkeys(pairs) if pair[0].strip() and pair[2].strip()]


NEAR = 0.8                   # the share of their words, taken together, that two near-equal queries have in common


def near_equal(queries: Sequence[str], others: Sequence[str], once: bool = False) -> list[bool]:
    """Which queries have nearly the words of one of the others, or, with `once`, of an earlier query.

    Their rarest words alone are looked up: two sets of which NEAR is common share one of the rarest few.

    >>> near_equal(["How do I sort a list?", "sort a dict"], ["how do i sort a list"])
    [True, False]
    """
    sets = [frozenset(terms(text)) for text in [*others, *queries]]
    counts = Counter(itertools.chain.from_iterable(sets))
    by_word: dict[str, list[frozenset[str]]] = {}
    answers = []
    for i, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (counts[word], word))
        rarest = rarest[:len(words) - math.ceil(NEAR * len(words)) + 1]
        candidates = itertools.chain.from_iterable(by_word.get(word, ()) for word in rarest)
        near = any(len(words & other) >= NEAR * len(words | other) for other in candidates)
        if i >= len(others):
            answers.append(near)
        if i < len(others) or once and not near:
            for word in rarest:
                by_word.setdefault(word, []).append(words)
    return answers
