"""Publishers' files -> plain rows, from which data.py makes records.

What cannot be read one way only is refused with file:line; `left_out` counts, by the reason, what
no row was made of.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.beir import read_beir
from engine.corpus import Passage, texts_and_titles
from engine.files import InputError, flag, passage_texts
from engine.search import topk
from engine.table import as_text, column, content, label_in, read_table, text_in


@dataclass
class Convert:
    """The settings of `convert`; each is a flag."""

    task: str = flag("", "the records' task; else the paper's for the kind")
    seed: int = flag(0, "of what is drawn")
    model: str = flag("", "beir: a model folder that finds hard negatives")
    depth: int = flag(50, "beir: a hard negative is one of so many nearest passages")
    split: str = flag("train", "beir: qrels/SPLIT.tsv")
    positive_from: float = flag(math.nan, "pairs with a score: rows of at least this score are kept")
    first: int = flag(-1, "choice: cop of the first option where the file does not tell", (0, 1))


class Row(NamedTuple):
    """A query, a right answer, and the wrong ones: one of them becomes the hard negative."""

    query: str
    positive: Passage
    wrong: list[Passage]
    symmetric: bool = False


def contrasted(rows: Iterable[Row], left_out: Counter[str], rng: np.random.Generator,
               ) -> Iterator[tuple[Row, Passage | None]]:
    """Each row with its hard negative, if there is one.

    What is right for a query in any row is no hard negative of the same query in another, whatever
    their ids.
    """
    rows = list(rows)
    right = {(row.query, content(row.positive)) for row in rows}
    for row in rows:
        nothing = ("", row.query)
        if content(row.positive) in nothing:
            left_out["pairs of a text with itself or with nothing"] += 1
            continue
        wrong = [p for p in row.wrong if content(p) not in nothing and (row.query, content(p)) not in right]
        yield row, wrong[int(rng.integers(len(wrong)))] if wrong else None


def text_only(text: str) -> Passage:
    """A text without a title."""
    return {"title": "", "text": text}


# --------------------------------------------------------------------------------------------------
# The publishers' files


def labelled(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Texts and their labels."""
    texts, labels = [], []
    for where, row in read_table(paths):
        texts.append(text_in(where, row, "text", "sentence", "utterance"))
        labels.append(label_in(where, row, "label", "category", "intent"))
    return texts, labels


NLI = {"0": "entailment", "1": "neutral", "2": "contradiction", "-1": "-"}   # the last: people disagreed


def nli(paths: Iterable[str], left_out: Counter[str], *_: Any) -> Iterator[Row]:
    """SNLI, MNLI and their like: a premise, what it entails, what contradicts it."""
    entailed: dict[tuple[str, str], None] = {}                       # each once
    against = defaultdict[str, list[Passage]](list)
    for where, row in read_table(paths):
        stated = label_in(where, row, "gold_label", "label").lower()
        label = NLI.get(stated, stated)
        if label not in NLI.values():
            raise InputError(f"{where}: label {label!r}; want {', '.join(NLI.values())} or {', '.join(NLI)}")
        if label in ("neutral", "-"):
            left_out[f"rows of the label {label}"] += 1
            continue
        premise = text_in(where, row, "sentence1", "premise")
        hypothesis = text_in(where, row, "sentence2", "hypothesis")
        if label == "entailment":
            entailed[premise, hypothesis] = None
        else:
            against[premise].append(text_only(hypothesis))
    if stated in NLI:
        print(f"  labels that are numbers are read so: {NLI}")
    left_out["premises that entail nothing"] += len(against.keys() - {premise for premise, _ in entailed})
    for premise, hypothesis in entailed:
        yield Row(premise, text_only(hypothesis), against[premise], symmetric=True)


def choice(paths: Iterable[str], left_out: Counter[str], c: Convert, *_: Any) -> Iterator[Row]:
    """MedMCQA: question, options opa to opd, and cop, the right one's number, or -1."""
    rows = [(where, row, label_in(where, row, "cop")) for where, row in read_table(paths)]
    numbers = {cop for _, _, cop in rows}
    first = c.first
    if first == -1:
        where, row = rows[0][:2]
        # 1 in the authors' files, 0 in the hub's: their rows have id before the question, and exp
        if "4" in numbers:
            first = 1
        elif "0" in numbers or list(row)[0] == "id" and "exp" in row:
            first = 0
        else:
            raise InputError(f"{where}: no cop is 0 or 4; say with --first 0 or --first 1 which one opa is")
    for where, row, cop in rows:
        if cop not in ("-1", *map(str, range(first, first + 4))):
            raise InputError(f"{where}: cop {cop!r}, but options are counted from {first}; "
                             "give --first, or convert files of two countings apart")
        texts = [row.get(name) for name in ("opa", "opb", "opc", "opd")]
        options = ["" if text is None else as_text(where, text) for text in texts]
        right = options[int(cop) - first]
        if cop == "-1" or not right:
            left_out["questions without an answer"] += 1
            continue
        yield Row(text_in(where, row, "question"), text_only(right), list(map(text_only, options)))
    print(f"  options are counted from {first}: cop {first} is opa")


def beir(
    folders: Iterable[str],
    left_out: Counter[str],
    c: Convert,
    model: Any,                # None: no hard negatives
) -> Iterator[Row]:
    """BEIR folders: each query with each relevant passage, the model's other nearest ones as wrong.

    The very nearest are the likeliest to be relevant and unjudged (false negatives): let `depth` be
    large.
    """
    for folder in folders:
        known = read_beir(folder, c.split)
        nearest: Any = [()] * len(known.queries)                     # (Q, depth) places in the corpus
        if model is not None:
            P = model.encode_passages(*texts_and_titles(known.corpus), progress="passages")     # (P, d)
            q = model.encode_queries(list(known.queries.values()), c.task, progress="queries")  # (Q, d)
            nearest = topk(q, P, min(c.depth, len(P)))[1]
        passages = {p["_id"]: p for p in known.corpus}
        for (query, text), near in zip(known.queries.items(), nearest, strict=True):
            wrong = [known.corpus[i] for i in near]
            for passage in known.qrels[query]:
                if passage in passages:
                    yield Row(text.strip(), passages[passage], wrong)


# --------------------------------------------------------------------------------------------------
# Pairs

SAME = {"1", "true", "yes", "duplicate", "paraphrase", "equivalent", "entailment"}
DIFFERENT = {"0", "false", "no", *(f"not_{word}" for word in SAME)}
LABELS = """label labels gold_label is_duplicate is_paraphrase quality score gold_score similarity
    similarity_score relatedness_score relevance grade rating""".split()
QUERIES = "query question title sentence1 question1".split()
POSITIVES = "positive pos answer body text passage sentence2 question2".split()


def labelled_pairs(paths: Iterable[str], left_out: Counter[str], c: Convert, *_: Any) -> Iterator[Row]:
    """Question and answer, title and body, query and passages, or two texts of one meaning (symmetric).

    Negatives are kept where a file has them; a row with a label is a pair only if its label says so.
    """
    labels, unread = set(), set()                                    # columns
    for where, row in read_table(paths):
        label = next((name for name in LABELS if name in row), "")
        if label and not is_pair(where, label, row[label], c.positive_from):
            left_out[f"rows whose {label} says that they are no pair"] += 1
            continue
        said = label or "none, where all rows are pairs"
        if label and math.isnan(c.positive_from):
            said += f", where it is {row[label]}"                    # some publishers mean the opposite
        labels.add(said)
        query = column(where, row, *QUERIES)
        name = column(where, row, *POSITIVES)
        unread |= row.keys() - {"", label, query, name, "negative", "neg"}
        positives = sides(where, row[name])
        negatives = sides(where, row.get("negative")) + sides(where, row.get("neg"))
        if not positives:
            left_out["queries without a positive"] += 1
        for positive in positives:
            yield Row(as_text(where, row[query]), positive, negatives, symmetric=name in ("sentence2", "question2"))
    print(f"  the column that says what is a pair: {'; '.join(sorted(labels)) or label}")
    if unread:
        print(f"  columns that are not read: {', '.join(sorted(unread))}")


def is_pair(where: str, name: str, value: Any, positive_from: float) -> bool:
    """Whether a row's label, or with `positive_from` its score, says that its texts belong together."""
    label = str(value).strip().lower()
    if math.isnan(positive_from):
        if label in SAME | DIFFERENT:
            return label in SAME
        raise InputError(f"{where}: {name} {json.dumps(value)} says neither yes nor no; if it is a "
                         "score, give --positive-from X: rows with at least X are pairs")
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where}: {name} {json.dumps(value)} is no number, as --positive-from needs")
    return score >= positive_from


def sides(where: str, value: Any) -> list[Passage]:
    """One side of a pair or a list of them, each a text or {"title", "text"}; null is none."""
    if value is None:
        return []
    passages = []
    for text in value if isinstance(value, list) else [value]:
        title = ""
        if isinstance(text, dict):
            title, text = passage_texts(where, text)
        passages.append({"title": title.strip(), "text": as_text(where, text)})
    return passages


# What can be converted: the paper's task for it (section 3.1, Table 9), and what reads it, which gets the
# paths, the counter of what is left out, the settings, and beir's model
KINDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "nli": ("semantic similarity", nli),
    "classification": ("classification", labelled),
    "pairs": ("search result", labelled_pairs),
    "beir": ("question answering", beir),
    "choice": ("question answering", choice),
}
