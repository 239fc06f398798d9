"""Retrieval sets as BEIR ships them: a folder of passages, queries and relevance judgements.

    corpus.jsonl {"_id", "title", "text"}    queries.jsonl {"_id", "text"}    qrels/SPLIT.tsv

Both JSONL files may be .gz. What cannot be read one way only is refused with its line; what is left out
is counted and said.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.files import InputError, open_text, path_and_rest, read_passages

Qrels = dict[str, dict[str, int]]           # {query id: {passage id: grade above 0}}


@dataclass
class Beir:
    """A retrieval set. Passages of equal score keep the order of `corpus`."""

    corpus: list[dict[str, str]]
    queries: dict[str, str]                 # those that were judged
    qrels: Qrels


def read_beir(folder: str | Path, split: str = "test") -> Beir:
    """The corpus comes sorted by id, descending, as trec_eval sorts passages of equal score.

    A passage with neither title nor text is left out, so that nothing finds it.
    """
    path = Path(folder, f"qrels/{split}.tsv")
    corpus = read_passages(Path(folder, "corpus.jsonl"))
    questions = read_passages(Path(folder, "queries.jsonl"))
    qrels = read_qrels(path)
    queries = {row["_id"]: row["text"] for row in questions if row["_id"] in qrels}
    for query in qrels:
        if not queries.get(query, "").strip():
            raise InputError(f"{path}: query {query} is not in queries.jsonl, or has no text there; add it")
    judged = set[str]().union(*qrels.values())
    missing = sorted(judged - {p["_id"] for p in corpus})
    if missing:
        what = (f"{path}: {len(missing)} of {len(judged)} judged passages are not in corpus.jsonl, "
                f"first: {missing[0]} (or have no text there)")
        if len(missing) == len(judged):
            raise InputError(f"{what}; take both files of one release")
        print(f"{what}; they count as not found", file=sys.stderr)
    corpus.sort(key=lambda p: p["_id"], reverse=True)
    return Beir(corpus, queries, qrels)


def read_split(name: str) -> Beir:
    """DIR or DIR:SPLIT, of which "test" is the default."""
    return read_beir(*path_and_rest(name, "test"))


HEADER = re.compile("(query|qid|topic).*(score|grade|label|rel|relevance|judge?ment)", re.IGNORECASE)
# a tab between two columns; TREC's second, mostly 0 or Q0, has no meaning; 1.0 is a whole number, 0.5 is none
COLUMNS = re.compile(r"([^\t]+)\t(?:(?:[0-9.]+|Q0)\t)?([^\t]+)\t([+-]?[0-9]{1,9})(?:\.0*)?")


def read_qrels(path: str | Path) -> Qrels:
    """Judgements in BEIR's three columns (query, passage, grade) or TREC's four (query, 0, passage, grade).

    A query whose grades are all 0 stays, with none: trec_eval counts it as 0 in a mean.
    """
    qrels: Qrels = {}
    tabs = 0                                # of the first line: all have its form
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or number == 1 and HEADER.fullmatch(line):
                continue
            # an id may hold blanks where tabs part the columns
            row = re.sub(r"\s*\t\s*" if "\t" in line else r"\s+", "\t", line)
            tabs = tabs or row.count("\t")
            columns = COLUMNS.fullmatch(row)
            if not columns or row.count("\t") != tabs:
                raise InputError(f"{path}:{number}: {line[:60]!r}; want query, passage, grade (BEIR) or query, 0, "
                                 "passage, grade (TREC), one form in all lines, grades whole numbers")
            query, passage, grade = columns.groups()
            if qrels.setdefault(query, {}).setdefault(passage, int(grade)) != int(grade):
                raise InputError(f"{path}:{number}: another grade than in a line above; keep one of the two")
    for query, grades in qrels.items():
        qrels[query] = {passage: grade for passage, grade in grades.items() if grade > 0}
    if not any(qrels.values()):
        raise InputError(f"{path}: no relevant passage; nothing to evaluate")
    return qrels
