"""A folder of .txt, .md and .rst files -> passages, and what of them trains an encoder without labels.

engine/markup.py cuts one document. The id of a passage, `guide/install.md#3`, names file and place, so that it
stays while the file does. Whatever is left out is named or counted, with what would mend it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.corpus import Corpus, Passage, terms
from engine.files import InputError, one_line, read_passages
from engine.markup import passages_of
from engine.pairs import chunks, title_body_pair

ENDINGS = (".md", ".markdown", ".rst", ".txt")
FOR_PANDOC = ".html .htm .docx .odt .epub .tex .ipynb".split()
CONVERTERS = {".pdf": " (pdftotext converts them)", ".gz": " (gunzip converts them)",
              **dict.fromkeys(FOR_PANDOC, " (pandoc -t plain converts them)")}
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
    left_out = Counter[str]()                                        # how many of what
    by_words = dict[str, Passage]()
    unread = []
    for path in tqdm(list(documents_below(root, left_out)), desc="documents", unit="file", delay=2):
        name = path.name if path == root else path.relative_to(root).as_posix()
        name = name.encode(errors="backslashreplace").decode()       # no file can hold what is not UTF-8
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError):
            text = ""
        rows = [] if "\0" in text else passages_of(name, text)       # no text, whatever its name says
        if not rows:
            unread.append(name)
        for row in rows:
            if by_words.setdefault(" ".join(row["text"].split()), row) is not row:
                left_out["passages that repeat another's text"] += 1
    if unread:
        left_out[f"files without a word that is UTF-8, such as {', '.join(unread[:3])} (iconv -f LATIN1 -t UTF-8 "
                 "converts another encoding)"] = len(unread)
    counts = ", ".join(f"{count} {what}" for what, count in left_out.most_common())
    said = one_line(f"left out: {counts or 'nothing'}", 5000)        # a file's name may hold a line break
    if not by_words:
        raise InputError(f"{root}: no .txt, .md or .rst file with words in it; name another folder, or convert "
                         f"what is there ({said})")
    if left_out:
        print(f"{root}: {said}", file=sys.stderr)
    return list(by_words.values())


def documents_below(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The files to read, in the order of their names; what else is there is counted, with what converts it."""
    if not root.exists():
        raise InputError(f"{root}: no such folder or file; check the path")
    for path in sorted(root.rglob("*")) or [root]:                   # no link to a folder is followed
        parts = path.relative_to(root).parts
        ending = path.suffix.lower()
        if path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK):
            continue                                                 # what is in it follows
        if any(part[0] == "." or part in PASSED_OVER for part in parts):
            left_out["hidden files or files for programs"] += 1
        elif not path.is_file():
            left_out["links to folders, or what cannot be opened"] += 1  # a dead link, a pipe
        elif ending in ENDINGS:
            yield path
        else:
            left_out[f"{ending or 'nameless'} files{CONVERTERS.get(ending, '')}"] += 1


# --------------------------------------------------------------------------------------------------
# What trains an encoder, and what it must not have seen


DRAWS = 5                    # of sentences, spans of words and names, from each piece that a small encoder reads


def heading_pairs(passages: Corpus) -> list[tuple[str, str, str]]:
    """(query, title, text) for pre-finetuning: a title, its heading, and parts that are drawn, against the rest."""
    rng = np.random.default_rng(0)
    pairs = []
    for piece in chunks(passages):
        title, text = piece["title"], piece["text"]
        pairs += [(title, "", text), (title.rpartition(": ")[2], "", text)]
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
    by_word = defaultdict[str, list[frozenset[str]]](list)
    answers = []
    for i, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (counts[word], word))
        rarest = rarest[:len(words) - int(NEAR * len(words)) + 1]    # one more than those that may differ
        candidates = itertools.chain.from_iterable(by_word[word] for word in rarest)
        near = i >= len(others) and any(len(words & other) >= NEAR * len(words | other) for other in candidates)
        if not near:
            for word in rarest:
                by_word[word].append(words)
        answers.append(near)
    return answers[len(others):]
