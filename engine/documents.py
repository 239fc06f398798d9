"""A folder of .txt, .md and .rst files -> passages, and what of them trains an encoder without labels.

A document is cut at its headings, then between paragraphs, list items or lines, and within a paragraph only
where it is too long for an encoder. A passage is {"_id", "title", "text"}: the id `guide/install.md#3` names
file and place, so that it stays while the file does; the title is "document: section".
"""

from __future__ import annotations

import codecs
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from engine.corpus import UNSPACED, Passage, sentences, terms
from engine.files import InputError, beir_file, read_passages
from engine.markup import blocks, visible

# The most words of a passage, as `size` counts them: with its title, 99 of 100 are then within the 256 tokens
# at which all-MiniLM-L6-v2 and `tiny` cut a text.
MAX_WORDS = 160
FEW_WORDS = 20               # a smaller piece joins a neighbour
MAX_BYTES = 1_000_000_000    # of all files: their passages are held in memory, in two to three times as much

ENDINGS = (".md", ".markdown", ".rst", ".txt")
CONVERTERS = {".pdf": "pdftotext", ".html": "pandoc -t plain", ".htm": "pandoc -t plain", ".docx": "pandoc",
              ".odt": "pandoc", ".epub": "pandoc", ".tex": "pandoc", ".doc": "libreoffice --convert-to txt",
              ".ipynb": "jupyter nbconvert --to markdown", ".gz": "gunzip"}
PASSED_OVER = {"node_modules", "__pycache__", "venv"}                # and hidden folders, such as .git
FOR_PROGRAMS = re.compile(r"(CMakeLists|(.*-)?requirements.*|vocab|robots|top_level|entry_points)\.txt")

# --------------------------------------------------------------------------------------------------
# A folder -> passages


def read_corpus(path: str | Path) -> list[Passage]:
    """A folder of documents, a BEIR folder or a corpus.jsonl; what was left out is said, to stderr."""
    corpus = beir_file(path, "corpus.jsonl") if Path(path).is_dir() else Path(path)
    if corpus.is_file() and corpus.name.endswith((".jsonl", ".jsonl.gz")):
        return [row for row in read_passages(corpus) if row["title"] or row["text"]]
    passages, notes = read_documents(path)
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    return passages


def read_documents(folder: str | Path, max_words: int = MAX_WORDS) -> tuple[list[Passage], list[str]]:
    """The passages of all documents below a folder, or of one file; and what was left out, a line each."""
    root = Path(folder)
    paths, notes = documents_below(root)
    passages: dict[str, Passage] = {}                                # by their words
    unreadable, empty, found = [], [], 0
    for path in tqdm(paths, desc="documents", unit="file", delay=2):
        name = path.name if path == root else path.relative_to(root).as_posix()
        text = decoded(path)
        if text is None:
            unreadable.append(name)
            continue
        rows = passages_of(name, text, max_words)
        if not rows:
            empty.append(name)
        found += len(rows)
        for row in rows:
            passages.setdefault(" ".join(row["text"].split()), row)
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
    for folder, inner, names in os.walk(root):
        kept = [name for name in inner if not name.startswith(".") and name not in PASSED_OVER
                and not os.path.islink(os.path.join(folder, name))]
        if len(kept) < len(inner):
            others["folders (hidden, of programs, or links)"] += len(inner) - len(kept)
        inner[:] = sorted(kept)
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not name.startswith("."):          # no dead link, no pipe
                yield path


MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decoded(path: Path) -> str | None:
    """The text of a file in UTF-8, or in UTF-16 where its first bytes say so; None if it is none."""
    try:
        content = path.read_bytes()
        for mark, encoding in MARKS.items():
            if content.startswith(mark):
                return content.decode(encoding)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


# --------------------------------------------------------------------------------------------------
# A document -> passages


def passages_of(name: str, text: str, max_words: int = MAX_WORDS) -> list[Passage]:
    """The passages of one document, numbered in their order.

    >>> passages_of("tea.md", "Boil water.")
    [{'_id': 'tea.md#1', 'title': 'tea', 'text': 'Boil water.'}]
    """
    markdown = Path(name).suffix.lower() in (".md", ".markdown")
    parts = list(blocks(visible(text, markdown), markdown))
    headings = [part for kind, part in parts[:3] if kind == "heading"]
    title = headings[0] if headings else re.sub("[-_]+", " ", Path(name).stem)
    heading, section = "", list[str]()
    pieces = []                                                      # (heading, text)
    for kind, part in [*parts, ("heading", "")]:
        if kind == "heading":
            pieces += [(heading, piece) for piece in packed(section, "\n\n", max_words)]
            heading, section = part, []
        else:
            section += cut(part, CUTS[kind], max_words)
    rows = list[Passage]()
    for heading, piece in joined(pieces, max_words):
        if len(WORD.findall(piece)) < size(piece) / 10:              # a table of numbers, no text
            continue
        full_title = title if heading in ("", title) else f"{title}: {heading}"
        rows.append({"_id": f"{name}#{len(rows) + 1}", "title": full_title, "text": piece})
    return rows


# What an encoder will read as a token, nearly: a word of common length, a character, a punctuation mark
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]{{1,12}}|[^\w\s]|_")
WORD = re.compile(rf"[{UNSPACED}]|[^\W\d_]{{2,}}")


def size(text: str) -> int:
    return len(TOKEN.findall(text))


# Where to cut what is too long, the best place first: (pattern, what joins the pieces again)
CUTS = {
    "text": [(r"\n(?= *(?:[-*+•]|\d+[.)]) )", "\n"), (r"(?<=[.!?])\s+|(?<=[。！？])", " "),
             (r"\n", "\n"), (r"\s+", " ")],
    "lines": [(r"\n\n+", "\n\n"), (r"\n", "\n"), (r"\s+", " ")],
}


def cut(text: str, cuts: Sequence[tuple[str, str]], max_words: int) -> list[str]:
    """A text in pieces of at most max_words, each as long as the coarsest cuts allow."""
    if size(text) <= max_words:
        return [text]
    if not cuts:                                                     # one endless word
        return [text[i:i + max_words] for i in range(0, len(text), max_words)]
    pattern, joint = cuts[0]
    parts = []
    for part in re.split(pattern, text):
        parts += cut(part, cuts[1:], max_words)
    return packed(parts, joint, max_words)


def packed(parts: Sequence[str], joint: str, max_words: int) -> list[str]:
    """Neighbours joined, to as few pieces of about equal size as max_words allows."""
    sizes = [size(part) for part in parts]
    aim = sum(sizes) / max(1, math.ceil(sum(sizes) / max_words))
    pieces, total = list[list[str]](), 0
    for part, words in zip(parts, sizes, strict=True):
        if not pieces or total >= aim or total + words > max_words:
            pieces.append([])
            total = 0
        pieces[-1].append(part)
        total += words
    return [joint.join(piece) for piece in pieces]


def joined(pieces: Sequence[tuple[str, str]], max_words: int) -> list[tuple[str, str]]:
    """A piece of few words goes to the one below it, the last one to the one above, under its heading."""
    found = list[tuple[str, str]]()
    for i, (heading, text) in enumerate(pieces):
        above_heading, above = found[-1] if found else ("", "")
        small = size(text) < FEW_WORDS and (heading == above_heading or i == len(pieces) - 1)
        inner = text if heading == above_heading else f"{heading}\n{text}"
        if found and (small or size(above) < FEW_WORDS) and size(above) + size(inner) <= max_words:
            found[-1] = above_heading or heading, f"{above}\n\n{inner}"
        else:
            found.append((heading, text))
    return found


# --------------------------------------------------------------------------------------------------
# What trains an encoder, and what it must not have seen


def heading_pairs(passages: Sequence[Passage]) -> list[tuple[str, str, str]]:
    """(query, title, text) for pre-finetuning: a heading, a full title, a first sentence, and the rest."""
    pairs = []
    for row in passages:
        title, text = row["title"], row["text"]
        heading = title.rpartition(": ")[2]
        for query in dict.fromkeys([title, heading]):
            if query.strip():
                pairs.append((query, "", text))
        found = sentences(text)
        if len(found) > 1:
            pairs.append((found[0], title, " ".join(found[1:])))
    return pairs


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
    known: set[frozenset[str]] = set()
    answers = []
    for i, words in enumerate(sets):
        rarest = sorted(words, key=lambda word: (counts[word], word))
        rarest = rarest[:len(words) - math.ceil(NEAR * len(words)) + 1]
        candidates = itertools.chain.from_iterable(by_word.get(word, ()) for word in rarest)
        near = words in known or any(len(words & other) >= NEAR * len(words | other) for other in candidates)
        if i >= len(others):
            answers.append(near)
        if words not in known and (i < len(others) or once and not near):
            known.add(words)
            for word in rarest:
                by_word.setdefault(word, []).append(words)
    return answers
