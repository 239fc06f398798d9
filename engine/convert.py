"""Publishers' files -> plain rows, from which data.py makes records.

Nothing is guessed: a text is a JSON string, a label a string, a whole number or a boolean; a table's rows have
the header's width; what cannot be read one way only is refused with file:line, and `left_out` counts, by the
reason, what no row was made of.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.files import InputError, first_line, open_text, read_jsonl

Passage = dict[str, str]                    # {"title", "text"}, of a corpus with "_id"
Cells = Iterator[tuple[str, list[str]]]     # ("file:line", the cells of a table's row)


class Row(NamedTuple):
    """A query, a right answer, and the wrong ones: one of them becomes the hard negative."""

    query: str
    positive: Passage
    wrong: list[Passage]
    symmetric: bool = False
    draw: bool = False                      # any of the wrong ones, not the first


def contrasted(rows: Iterable[Row], left_out: Counter[str], rng: np.random.Generator,
               ) -> Iterator[tuple[str, Passage, Passage | None, bool]]:
    """(query, positive, hard negative or None, symmetric) of each row.

    What is right for a query in any row, whatever its id, is no hard negative of the same query in another.
    """
    rows = list(rows)
    right: dict[str, set[str]] = {}                                  # query -> it and its right answers
    for row in rows:
        right.setdefault(row.query, {row.query}).add(content(row.positive))
    for row in rows:
        if content(row.positive) in ("", row.query):
            left_out["pairs of a text with itself or with nothing"] += 1
            continue
        hard = [p for p in row.wrong if content(p) and content(p) not in right[row.query]]
        negative = None
        if hard:
            negative = hard[int(rng.integers(len(hard)))] if row.draw else hard[0]
        yield row.query, row.positive, negative, row.symmetric


def content(passage: Passage) -> str:
    """What a passage says: a title alone is a passage too."""
    return passage["text"].strip() or (passage.get("title") or "").strip()


def without_title(text: str) -> Passage:
    return {"title": "", "text": text}


# --------------------------------------------------------------------------------------------------
# Tables, and the values in them


def table(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", row) of .jsonl, or of .csv or .tsv with a header; plain or .gz."""
    ending = Path(path.removesuffix(".gz")).suffix.lower()
    if ending not in (".csv", ".tsv"):
        yield from read_jsonl(path)
        return
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        with open_text(path) as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: unreadable ({first_line(error)}); plain or .gz UTF-8 text") from error
    rows = cells(path, text, ",", True) if ending == ".csv" else tsv(path, text)
    _, header = next(rows, ("", []))
    if len(set(header)) < len(header) or not header:
        raise InputError(f"{path}:1: two columns of one name, or none; give each column of the header its own")
    for where, row in rows:
        yield where, dict(zip(header, row, strict=True))


def cells(path: str, text: str, delimiter: str, quoted: bool) -> Cells:
    """The rows of a table, all of the header's width; an InputError names the line where a row begins."""
    csv.field_size_limit(2 ** 31 - 1)                                # a cell may hold a document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True,
                        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    width = line = 0
    try:
        for row in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if row:                                                  # not a blank line
                width = width or len(row)
                if len(row) != width:
                    raise InputError(f"{where}: {len(row)} columns where the header has {width}; put a text "
                                     f"that holds a {'tab' if delimiter != ',' else 'comma'} in double quotes")
                yield where, row
    except csv.Error as error:
        raise InputError(f"{path}:{line + 1}: {error}; close each quote, and double those within a text"
                         ) from error


def tsv(path: str, text: str) -> Cells:
    """TSV as pandas writes it (quoted where needed) or as GLUE does (quotes are part of a text): the file decides.

    subtle: a file that both ways read is quoted if its header is, or if a quoted cell has a doubled quote in it.
    """
    if '"' not in text:
        yield from cells(path, text, "\t", False)
        return
    errors: dict[bool, InputError] = {}
    for quoted in (True, False):
        try:
            for _ in cells(path, text, "\t", quoted):
                pass
        except InputError as error:
            errors[quoted] = error
    if len(errors) == 2:
        raise InputError(f"{errors[True]} (read as unquoted: {errors[False]})")
    doubled = re.search(r'(^|\t)"([^"\t]|"")*""([^"\t]|"")*"(\t|\r?$)', text, re.M)
    quoted = False in errors or True not in errors and (text.startswith('"') or doubled is not None)
    print(f"  {path}: read as {'quoted' if quoted else 'unquoted'} TSV")
    yield from cells(path, text, "\t", quoted)


def column(where: str, row: dict[str, Any], *names: str) -> str:
    """The first of these columns that the row has and that is not blank."""
    for name in names:
        if row.get(name) not in (None, "") and str(row[name]).strip():
            return name
    raise InputError(f"{where}: no {' or '.join(names)} among {', '.join(map(str, row))}; rename the column")


def as_text(where: str, value: Any) -> str:
    """A text of a file is a string: no number, null or list is made one."""
    if isinstance(value, str):
        return value.strip()
    raise InputError(f"{where}: {json.dumps(value)} is no text; give a string")


def optional_text(where: str, row: dict[str, Any], name: str) -> str:
    """The same, where a text may be missing."""
    return "" if row.get(name) is None else as_text(where, row[name])


def as_label(where: str, value: Any) -> str:
    """A label is a string, a whole number or a boolean; 1 and "1" are one label."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return str(value).strip()
    raise InputError(f"{where}: {json.dumps(value)} is no label; give a string or a whole number")


def text_in(where: str, row: dict[str, Any], *names: str) -> str:
    return as_text(where, row[column(where, row, *names)])


def label_in(where: str, row: dict[str, Any], *names: str) -> str:
    return as_label(where, row[column(where, row, *names)])


# --------------------------------------------------------------------------------------------------
# The publishers' files


def labelled(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts and their labels."""
    texts, labels = [], []
    for path in paths:
        for where, row in table(path):
            texts.append(text_in(where, row, "text", "sentence", "utterance"))
            labels.append(label_in(where, row, "label", "category", "intent"))
    return texts, labels


NLI = {"0": "entailment", "1": "neutral", "2": "contradiction"}


def nli(paths: Iterable[str], left_out: Counter[str]) -> Iterator[Row]:
    """SNLI, MNLI and their like: a premise, what it entails, what contradicts it."""
    premises: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        for where, row in table(path):
            label = label_in(where, row, "gold_label", "label").lower()
            label = NLI.get(label, label)
            if label in ("-", "-1"):
                left_out["rows without a gold label"] += 1
                continue
            if label not in NLI.values():
                raise InputError(f"{where}: label {label!r}; want {', '.join(NLI.values())} or 0, 1, 2")
            premise = text_in(where, row, "sentence1", "premise")
            hypothesis = text_in(where, row, "sentence2", "hypothesis")
            premises.setdefault(premise, {}).setdefault(label, []).append(hypothesis)
    for premise, by_label in premises.items():
        against = [without_title(text) for text in by_label.get("contradiction", []) if text != premise]
        if "entailment" not in by_label:
            left_out["premises that entail nothing"] += 1
        for n, entailed in enumerate(dict.fromkeys(by_label.get("entailment", []))):
            yield Row(premise, without_title(entailed), rotated(against, n), symmetric=True)


def rotated(items: list[Passage], n: int) -> list[Passage]:
    """The n-th positive begins with the n-th negative, so that each negative is used."""
    n %= max(1, len(items))
    return items[n:] + items[:n]


def choice(paths: Iterable[str], left_out: Counter[str], first: int = -1) -> Iterator[Row]:
    """MedMCQA: question, options opa to opd, and cop, the number of the right one, counted from `first`."""
    rows, numbers = [], []
    for path in paths:
        for where, row in table(path):
            cop = label_in(where, row, "cop")
            if not re.fullmatch("-1|[0-4]", cop):
                raise InputError(f"{where}: cop {cop!r}; give the number of the right option, or -1 for none")
            rows.append((where, row))
            numbers.append(int(cop))
    if first == -1:
        first = first_option(*rows[0], set(numbers))
    if first not in (0, 1):
        raise InputError(f"--first {first}: give 0 or 1")
    print(f"  options are counted from {first}: cop {first} is opa")
    for (where, row), number in zip(rows, numbers, strict=True):
        if number not in (-1, *range(first, first + 4)):
            raise InputError(f"{where}: cop {number}, but options are counted from {first}; see --first")
        options = [optional_text(where, row, name) for name in ("opa", "opb", "opc", "opd")]
        if number == -1 or not options[number - first]:
            left_out["questions without an answer"] += 1
            continue
        wrong = [without_title(text) for text in options if text != options[number - first]]
        yield Row(text_in(where, row, "question"), without_title(options[number - first]), wrong, draw=True)


def first_option(where: str, row: dict[str, Any], numbers: set[int]) -> int:
    """1 in the authors' files, 0 in the hub's, whose rows begin with id and have exp after the options."""
    if 0 in numbers:
        return 0
    if 4 in numbers:
        return 1
    if list(row)[0] == "id" and "exp" in row:
        return 0
    raise InputError(f"{where}: cop is never 0 and never 4; say with --first 0 or --first 1 what opa is")


def beir(folder: Any, near: dict[str, list[Passage]]) -> Iterator[Row]:
    """A BEIR folder that is read, and passages near to its queries by their ids: each query with each relevant
    passage; what is near and not judged relevant is wrong.
    """
    passages = {p["_id"]: p for p in folder.corpus}
    for query, judged in folder.qrels.items():
        # the queries of ArguAna stand in its corpus, under the same id
        wrong = [p for p in near.get(query, []) if p["_id"] not in (query, *judged)]
        for passage in judged:
            if passage in passages:
                yield Row(folder.queries[query].strip(), passages[passage], wrong, draw=True)


# --------------------------------------------------------------------------------------------------
# Pairs

SAME = {"1", "true", "yes", "duplicate", "paraphrase", "equivalent", "entailment"}
DIFFERENT = {"0", "false", "no", "not_duplicate", "not_paraphrase", "not_equivalent", "not_entailment"}
LABELS = ("label", "labels", "gold_label", "is_duplicate", "is_paraphrase", "quality", "score", "gold_score",
          "similarity", "similarity_score", "relatedness_score", "relevance", "grade", "rating")
QUERIES = ("query", "question", "title", "sentence1", "question1")
POSITIVES = ("positive", "pos", "answer", "body", "text", "passage", "sentence2", "question2")


def labelled_pairs(paths: Iterable[str], left_out: Counter[str], positive_from: float = math.nan) -> Iterator[Row]:
    """Question and answer, title and body, query and passages, or two texts of one meaning (symmetric).

    Negatives are kept where a file has them; of rows with a label only those are pairs whose label says so.
    """
    for path in paths:
        found: dict[str, None] = {}                                  # names of the columns with the label
        for where, row in table(path):
            label = next((name for name in LABELS if name in row), "no column")
            found[label] = None
            if label in row and not is_pair(where, label, row[label], positive_from):
                left_out[f"rows whose {label} says that they are no pair"] += 1
                continue
            query, name = text_in(where, row, *QUERIES), column(where, row, *POSITIVES)
            positives = sides(where, row[name])
            against = sides(where, next((row[key] for key in ("negative", "neg") if row.get(key) is not None), []))
            if not positives:
                left_out["queries without a positive"] += 1
            for n, positive in enumerate(positives):
                yield Row(query, positive, rotated(against, n), symmetric=name in ("sentence2", "question2"))
        print(f"  {path}: {', '.join(found)} says which rows are pairs")


def is_pair(where: str, name: str, value: Any, positive_from: float) -> bool:
    """Whether the label of a row, or its score with `positive_from`, says that its texts belong together."""
    if math.isnan(positive_from):
        label = str(value).strip().lower()
        if label in SAME | DIFFERENT and not isinstance(value, float):
            return label in SAME
        raise InputError(f"{where}: {name} {json.dumps(value)} says neither yes nor no; where it is a score, "
                         "give --positive-from X, the score from which on rows are pairs")
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where}: {name} {json.dumps(value)} is no number, which --positive-from needs")
    return score >= positive_from


def sides(where: str, value: Any) -> list[Passage]:
    """One side of a pair or a list of them, each a text or {"title", "text"}."""
    passages = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict):
            passages.append({key: optional_text(where, part, key) for key in ("title", "text")})
        else:
            passages.append(without_title(as_text(where, part)))
    return passages
