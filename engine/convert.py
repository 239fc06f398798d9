"""Publishers' files -> plain rows, from which data.py makes records.

What cannot be read one way only is refused with file:line; `left_out` counts, by the reason, what
no row was made of.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.beir import read_beir
from engine.corpus import Passage, texts_and_titles
from engine.files import InputError, flag
from engine.search import topk
from engine.table import as_text, column, content, label_in, optional_text, read_table, text_in

# What can be converted, and the paper's task for it (section 3.1, Table 9)
KINDS = {"nli": "semantic similarity", "classification": "classification",
         "pairs": "search result", "beir": "question answering", "choice": "question answering"}


@dataclass
class Convert:
    """The settings of `convert`; each is a flag."""

    task: str = flag("", "the records' task; else the paper's for the kind")
    seed: int = flag(0, "of what is drawn")
    ids: bool = flag(True, "classification: a unique id on the three texts of a triple")
    model: str = flag("", "beir: a model folder that finds hard negatives")
    depth: int = flag(50, "beir: a hard negative is one of so many nearest passages")
    split: str = flag("train", "beir: qrels/SPLIT.tsv")
    positive_from: float = flag(math.nan, "pairs with a score: rows of at least this score are kept")
    first: int = flag(-1, "choice: cop of the first option, 0 or 1, where the file does not tell")


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

    What is right for a query in any row is no hard negative of the same query in another, whatever
    their ids.
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
        if row.draw and hard:
            hard = [hard[int(rng.integers(len(hard)))]]
        yield row.query, row.positive, hard[0] if hard else None, row.symmetric


def rows_of(kind: str, paths: Sequence[str], left_out: Counter[str], c: Convert, model: Any,
            task: str) -> Iterable[Row]:
    """The rows of one kind of files, classification apart; `model` finds beir's hard negatives."""
    rows = {
        "nli": nli(paths, left_out),
        "pairs": labelled_pairs(paths, left_out, c.positive_from),
        "choice": choice(paths, left_out, c.first),
        "beir": beir(paths, c.split, model, task, c.depth),
    }
    return rows[kind]                                                # the others never begin to read


def text_only(text: str) -> Passage:
    """A text without a title."""
    return {"title": "", "text": text}


# --------------------------------------------------------------------------------------------------
# The publishers' files


def labelled(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts and their labels."""
    texts, labels = [], []
    for path in paths:
        for where, row in read_table(path):
            texts.append(text_in(where, row, "text", "sentence", "utterance"))
            labels.append(label_in(where, row, "label", "category", "intent"))
    return texts, labels


NLI = {"0": "entailment", "1": "neutral", "2": "contradiction"}


def nli(paths: Iterable[str], left_out: Counter[str]) -> Iterator[Row]:
    """SNLI, MNLI and their like: a premise, what it entails, what contradicts it."""
    premises: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for where, row in read_table(path):
            label = label_in(where, row, "gold_label", "label").lower()
            label = NLI.get(label, label)
            if label in ("-", "-1"):
                left_out["rows without a gold label"] += 1
                continue
            if label not in NLI.values():
                raise InputError(f"{where}: label {label!r}; want {', '.join(NLI.values())} or 0, 1, 2")
            premise = text_in(where, row, "sentence1", "premise")
            hypothesis = text_in(where, row, "sentence2", "hypothesis")
            premises[premise][label].append(hypothesis)
            if label == "neutral":
                left_out["rows that neither entail nor contradict"] += 1
    for premise, by_label in premises.items():
        against = [text_only(text) for text in by_label["contradiction"]]
        if not by_label["entailment"]:
            left_out["premises that entail nothing"] += 1
        for n, entailed in enumerate(dict.fromkeys(by_label["entailment"])):
            yield Row(premise, text_only(entailed), rotated(against, n), symmetric=True)


def rotated(items: list[Passage], n: int) -> list[Passage]:
    """The n-th positive begins with the n-th negative, so that each negative is used."""
    n %= max(1, len(items))
    return items[n:] + items[:n]


def choice(paths: Iterable[str], left_out: Counter[str], first: int) -> Iterator[Row]:
    """MedMCQA: question, options opa to opd, and cop, the right one's number, counted from `first`."""
    rows = []
    for path in paths:
        for where, row in read_table(path):
            cop = label_in(where, row, "cop")
            if not re.fullmatch("-1|[0-4]", cop):
                raise InputError(f"{where}: cop {cop!r}; give the right option's number, or -1")
            rows.append((where, row, int(cop)))
    if not rows:
        return
    if first == -1:
        where, row, _ = rows[0]
        numbers = {number for _, _, number in rows}
        # 1 in the authors' files, 0 in the hub's: their rows have id before the question, and exp
        if 0 in numbers or 4 not in numbers and list(row)[0] == "id" and "exp" in row:
            first = 0
        elif 4 in numbers:
            first = 1
        else:
            raise InputError(f"{where}: no cop is 0 or 4; say with --first 0 or --first 1 which one opa is")
    if first not in (0, 1):
        raise InputError(f"--first {first}: give 0 or 1")
    print(f"  options are counted from {first}: cop {first} is opa")
    for where, row, number in rows:
        if number not in (-1, *range(first, first + 4)):
            raise InputError(f"{where}: cop {number}, but options are counted from {first}; "
                             "give --first, or convert files of two countings apart")
        options = [optional_text(where, row, name) for name in ("opa", "opb", "opc", "opd")]
        if number == -1 or not options[number - first]:
            left_out["questions without an answer"] += 1
            continue
        answers = [text_only(text) for text in options]
        yield Row(text_in(where, row, "question"), answers[number - first], answers, draw=True)


def beir(
    folders: Iterable[str],
    split: str,
    model: Any,                # None: no hard negatives
    task: str,
    depth: int,                # how many nearest passages to draw from
) -> Iterator[Row]:
    """BEIR folders: each query with each relevant passage, the model's other nearest ones as wrong.

    The very nearest are the likeliest to be relevant and unjudged (false negatives): let `depth` be
    large.
    """
    for folder in folders:
        known = read_beir(folder, split)
        nearest = np.empty((len(known.queries), 0), int)             # (Q, depth) places in the corpus
        if model is not None:
            P = model.encode_passages(*texts_and_titles(known.corpus), progress="passages")     # (P, d)
            q = model.encode_queries(list(known.queries.values()), task, progress="queries")    # (Q, d)
            _, nearest = topk(q, P, min(depth, len(P)))
        passages = {p["_id"]: p for p in known.corpus}
        near = dict(zip(known.queries, nearest, strict=True))
        for query, judged in known.qrels.items():
            # the queries of ArguAna stand in its corpus, under the same id
            wrong = [known.corpus[i] for i in near[query] if known.corpus[i]["_id"] not in (query, *judged)]
            for passage in judged:
                if passage in passages:
                    yield Row(known.queries[query].strip(), passages[passage], wrong, draw=True)


# --------------------------------------------------------------------------------------------------
# Pairs

SAME = {"1", "true", "yes", "duplicate", "paraphrase", "equivalent", "entailment"}
DIFFERENT = {"0", "false", "no", *(f"not_{word}" for word in SAME)}
LABELS = """label labels gold_label is_duplicate is_paraphrase quality score gold_score similarity
    similarity_score relatedness_score relevance grade rating""".split()
QUERIES = "query question title sentence1 question1".split()
POSITIVES = "positive pos answer body text passage sentence2 question2".split()


def labelled_pairs(paths: Iterable[str], left_out: Counter[str],
                   positive_from: float = math.nan) -> Iterator[Row]:
    """Question and answer, title and body, query and passages, or two texts of one meaning (symmetric).

    Negatives are kept where a file has them; a row with a label is a pair only if its label says so.
    """
    for path in paths:
        labels: dict[str, None] = {}                                 # columns
        for where, row in read_table(path):
            label = next((name for name in LABELS if name in row), None)
            if label is not None:
                labels[label] = None
                if not is_pair(where, label, row[label], positive_from):
                    left_out[f"rows whose {label} says that they are no pair"] += 1
                    continue
            query, name = text_in(where, row, *QUERIES), column(where, row, *POSITIVES)
            positives, negatives = sides(where, row[name]), []
            for key in ("negative", "neg"):
                if row.get(key) is not None:
                    negatives += sides(where, row[key])
            if not positives:
                left_out["queries without a positive"] += 1
            for n, positive in enumerate(positives):
                symmetric = name in ("sentence2", "question2")
                yield Row(query, positive, rotated(negatives, n), symmetric)
        if labels:
            print(f"  {path}: pairs by the column {', '.join(labels)}")
        else:
            print(f"  {path}: no column with a label, so all rows are pairs")


def is_pair(where: str, name: str, value: Any, positive_from: float) -> bool:
    """Whether a row's label, or with `positive_from` its score, says that its texts belong together."""
    if math.isnan(positive_from):
        label = str(value).strip().lower()
        if label in SAME | DIFFERENT:
            return label in SAME
        raise InputError(f"{where}: {name} {json.dumps(value)} says neither yes nor no; if it is a "
                         "score, give --positive-from X: rows with at least X are pairs")
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value) >= positive_from
    raise InputError(f"{where}: {name} {json.dumps(value)} is no number, as --positive-from needs")


def sides(where: str, value: Any) -> list[Passage]:
    """One side of a pair or a list of them, each a text or {"title", "text"}."""
    passages = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict):
            passages.append({key: optional_text(where, part, key) for key in ("title", "text")})
        else:
            passages.append(text_only(as_text(where, part)))
    return passages
