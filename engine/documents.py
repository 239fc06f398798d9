"""A folder of .txt, .md and .rst files -> passages, and what of them trains an encoder without labels.

engine/markup.py cuts one document. The id of a passage, `guide/install.md#3`, names file and place, so that it
stays while the file does. Whatever is left out is named or counted, with what would mend it.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.corpus import Corpus, Passage, sentences, terms
from engine.files import InputError, read_passages
from engine.markup import passages_of
from engine.pairs import chunks, title_body_pair

MAX_BYTES = 1_000_000_000    # of all files: their passages are held in memory, in about three times as much

ENDINGS = (".md", ".markdown", ".rst", ".txt")
FOR_PANDOC = ".html .htm .docx .odt .epub .tex .ipynb".split()
CONVERTERS = {".pdf": "pdftotext", ".gz": "gunzip", **dict.fromkeys(FOR_PANDOC, "pandoc -t plain")}
# As is what is hidden: folders and files that no one reads
PASSED_OVER = set("""node_modules __pycache__ venv CMakeLists.txt entry_points.txt requirements.txt robots.txt
    top_level.txt vocab.txt""".split())

# --------------------------------------------------------------------------------------------------
# A folder -> passages


def read_corpus(path: str | Path) -> list[Passage]:
    """A folder of documents, one of them, a BEIR folder or a corpus.jsonl."""
    corpus = Path(path)
    if any(corpus.glob("queries.jsonl*")):
        corpus = corpus / "corpus.jsonl"
    if ".jsonl" in corpus.suffixes:
        return read_passages(corpus)
    return read_documents(corpus)


def read_documents(root: Path) -> list[Passage]:
    """The passages of all documents below a folder, or of one file. What is left out is said, to stderr."""
    paths, notes = documents_below(root)
    rows, unread = list[Passage](), []
    for path in tqdm(paths, desc="documents", unit="file", delay=2):
        name = path.name if path == root else path.relative_to(root).as_posix()
        name = name.encode(errors="replace").decode()                # no file can hold what is not UTF-8
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError):
            text = ""
        before = len(rows)
        if "\0" not in text:                                         # else no text, whatever its name says
            rows += passages_of(name, text)
        if len(rows) == before:
            unread.append(name)
    if unread:
        notes.append(f"left out: {len(unread)} files without a word that is UTF-8, such as "
                     f"{', '.join(unread[:3])}; to convert another encoding: iconv -f LATIN1 -t UTF-8")
    if not rows:
        raise InputError("; ".join([f"{root}: no .txt, .md or .rst file with words in it", *notes,
                                    "name another folder, or convert what is there"]))
    by_words = dict[str, Passage]()
    for row in rows:
        words = " ".join(row["text"].split())
        by_words.setdefault(words, row)
    repeated = len(rows) - len(by_words)
    if repeated:
        notes.append(f"left out: {repeated} of {len(rows)} passages, which repeat another's text")
    for note in notes:
        print(f"{root}: {note}", file=sys.stderr)
    return list(by_words.values())


def documents_below(root: Path) -> tuple[list[Path], list[str]]:
    """The files to read, in the order of their names; what else is there, by its ending, with what converts it."""
    if not root.exists():
        raise InputError(f"{root}: no such folder or file; check the path")
    paths, others = [], Counter[str]()
    for path in sorted(root.rglob("*")) or [root]:                   # no link to a folder is followed
        parts = path.relative_to(root).parts
        ending = path.suffix.lower()
        if path.is_dir() and not os.access(path, os.R_OK):
            others["folders that cannot be opened"] += 1
        elif not path.is_file():
            continue                                                 # a folder, a dead link, a pipe
        elif any(part[0] == "." or part in PASSED_OVER for part in parts):
            others["hidden files or files for programs"] += 1
        elif ending in ENDINGS:
            paths.append(path)
        elif ending in CONVERTERS:
            others[f"{ending} files ({CONVERTERS[ending]} converts them)"] += 1
        else:
            others[f"{ending or 'nameless'} files"] += 1
    total = sum(path.stat().st_size for path in paths)
    if total > MAX_BYTES:
        raise InputError(f"{root}: {len(paths)} documents of {total / 1e9:.1f} GB, and at most "
                         f"{MAX_BYTES / 1e9:.0f} GB is held in memory; name a folder within it")
    kinds = [f"{count} {kind}" for kind, count in others.most_common()]
    return paths, [f"left out: {', '.join(kinds)}"] if kinds else []


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


def near_equal(queries: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Which queries have nearly the words of one of the others, or of an earlier query that has not.

    Their rarest words alone are looked up: two sets of which NEAR is common share one of the rarest few.

    >>> near_equal(["How do I sort a list?", "sort a dict"], ["how do i sort a list"])
    [True, False]
    """
    sets = [frozenset(terms(text)) for text in [*others, *queries]]
    counts = Counter(itertools.chain.from_iterable(sets))
    by_word: dict[str, list[frozenset[str]]] = {word: [] for word in counts}
    answers = []
    for i, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (counts[word], word))
        rarest = rarest[:len(words) - math.ceil(NEAR * len(words)) + 1]
        candidates = itertools.chain.from_iterable(by_word[word] for word in rarest)
        answers.append(any(len(words & other) >= NEAR * len(words | other) for other in candidates))
        if i < len(others) or not answers[i]:
            for word in rarest:
                by_word[word].append(words)
    return answers[len(others):]
