"""Measures of retrieval and similarity, their confidence intervals, and the sets that they are taken on.

A retrieval set is a BEIR folder; a similarity set is JSONL of sentence pairs with human scores. A model is
whatever has encode_queries and encode_passages. BM25 is the lexical baseline.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.corpus import terms
from engine.files import InputError, beir_file, read_jsonl, read_passages
from engine.search import topk

# Q queries, P passages, d the dimension of their vectors, whose rows have length 1.

# --------------------------------------------------------------------------------------------------
# Measures of one query: `ranked` are ids, best first; `relevant` is {id: grade above 0}


def ndcg(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 10) -> float:
    """nDCG@k with linear gains, as trec_eval and BEIR compute it.

    >>> ndcg(["b", "a"], {"a": 1})
    0.6309297535714575
    """
    gains = [relevant.get(x, 0) for x in ranked[:k]]
    best_gains = sorted(relevant.values(), reverse=True)[:k]
    return discounted(gains) / (discounted(best_gains) or 1)


def discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def recall(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 100) -> float:
    """Share of the relevant ones that are among the first k."""
    return len(set(ranked[:k]) & set(relevant)) / max(1, len(relevant))


def mrr(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 10) -> float:
    """1 / rank of the first relevant one; 0 if it is not among the first k."""
    for rank, x in enumerate(ranked[:k], 1):
        if x in relevant:
            return 1 / rank
    return 0.0


def spearman_terms(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """One term a pair, whose mean is the rank correlation; equal values share their mean rank.

    >>> spearman_terms([1, 2, 3], [10, 20, 15]).round(2).tolist()
    [1.5, 0.0, 0.0]
    """
    return standard_ranks(x) * standard_ranks(y)                     # (n)


def standard_ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks with mean 0 and variance 1."""
    _, number, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[number]             # (n)
    return (ranks - ranks.mean()) / ranks.std()


# --------------------------------------------------------------------------------------------------
# Confidence intervals


def interval(gains: Sequence[np.ndarray], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95 % interval of a mean gain, by bootstrap: seeds and queries are drawn again, with replacement.

    gains: for each set (S, Q), paired differences of S seeds and Q queries; all sets weigh the same.
    """
    rng, S = np.random.default_rng(seed), len(gains[0])
    # a draw is how often each seed and each query came up: as shares, the weights of a mean
    seed_weights = rng.multinomial(S, np.full(S, 1 / S), draws) / S  # (draws, S)
    means = np.zeros(draws)
    for gain in gains:
        Q = gain.shape[1]
        query_weights = rng.multinomial(Q, np.full(Q, 1 / Q), draws) / Q         # (draws, Q)
        means += ((seed_weights @ gain) * query_weights).sum(1) / len(gains)     # (draws)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(y - x), queries drawn again with replacement."""
    return interval([np.asarray(y)[None] - np.asarray(x)[None]])


# --------------------------------------------------------------------------------------------------
# Retrieval on a BEIR folder


@dataclass
class Beir:
    """A retrieval set: passages, the queries that were judged, {query id: {passage id: grade above 0}}."""

    corpus: list[dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> Beir:
    """BEIR's layout: corpus.jsonl, queries.jsonl (either may be .gz), qrels/SPLIT.tsv."""
    path = Path(folder) / f"qrels/{split}.tsv"
    corpus = read_passages(beir_file(folder, "corpus.jsonl"))
    qrels = read_qrels(path)
    texts = read_queries(beir_file(folder, "queries.jsonl"))
    for query in qrels:
        if query not in texts:
            raise InputError(f"{path}: query {query} is not in queries.jsonl; write its text there")
    ids = {p["_id"] for p in corpus}
    judged = list(dict.fromkeys(itertools.chain.from_iterable(qrels.values())))
    missing = [passage for passage in judged if passage not in ids]
    if missing:
        what = f"{len(missing)} of {len(judged)} judged passages are not in corpus.jsonl, first: {missing[0]}"
        if len(missing) == len(judged):
            raise InputError(f"{path}: {what}; take corpus and judgements of one release")
        tqdm.write(f"{path}: {what}; they count as not found", file=sys.stderr)
    return Beir(corpus, {query: texts[query] for query in texts if query in qrels}, qrels)


def read_queries(path: Path) -> dict[str, str]:
    """BEIR's queries.jsonl: {id: text}."""
    texts: dict[str, str] = {}
    for where, row in read_jsonl(path):
        key, text = str(row.get("_id")), row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'{where}: no "text"; every query needs one')
        if texts.setdefault(key, text) != text:
            raise InputError(f'{where}: "_id" {key!r} has another text in a line above; make it unique')
    return texts


GRADE = re.compile(r"[+-]?[0-9]+(\.0*)?")          # 1.0 is a whole number, 0.5 is not
ITERATION = re.compile(r"[0-9.]+|Q0")                 # TREC's second column
# the first and last column of a header, without case and punctuation
QUERY_NAMES = {"query", "queryid", "qid", "topic", "topicid"}
GRADE_NAMES = {"score", "grade", "label", "rel", "relevance", "judgement", "judgment"}


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance judgements: {query id: {passage id: grade above 0}}.

    Three columns are BEIR's (query, passage, grade), four are TREC's (query, 0, passage, grade), with tabs or
    blanks between. A query whose grades are all 0 stays, with none: trec_eval counts it as 0 in a mean.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; a BEIR folder has qrels/test.tsv")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); write or copy it again") from error
    judged: dict[str, dict[str, int]] = {}
    width = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = [column.strip() for column in line.split("\t" if "\t" in line else None)]
        width = width or len(columns)
        if number == 1 and is_header(columns):
            continue
        if len(columns) != width or not is_judgement(columns):
            raise InputError(f"{path}:{number}: want query, passage, grade (BEIR) or query, 0, passage, grade "
                             "(TREC) in all lines, each grade a whole number")
        query, passage, grade = columns[0], columns[-2], int(float(columns[-1]))
        if judged.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise InputError(f"{path}:{number}: query {query} and passage {passage} have another grade in a "
                             "line above; keep one of the two")
    qrels = {}
    for query, grades in judged.items():
        qrels[query] = {passage: grade for passage, grade in grades.items() if grade > 0}
    if not any(qrels.values()):
        raise InputError(f"{path}: no relevant passage; nothing to evaluate")
    return qrels


def is_judgement(columns: Sequence[str]) -> bool:
    if not all(columns) or not GRADE.fullmatch(columns[-1]):
        return False
    return len(columns) == 3 or len(columns) == 4 and ITERATION.fullmatch(columns[1]) is not None


def is_header(columns: Sequence[str]) -> bool:
    """Its first column is named as a query's id, its last as a grade, which no number is."""
    first, last = (re.sub("[^a-z]", "", column.lower()) for column in (columns[0], columns[-1]))
    return first in QUERY_NAMES and last in GRADE_NAMES


def encode_beir(model: Any, beir: Beir, task: str, dim: int | None = None, symmetric: bool = False,
                precision: str = "float32", progress: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the queries (Q, dim) and of the passages (P, dim)."""
    texts = [p["text"] for p in beir.corpus]
    titles = [p["title"] for p in beir.corpus]
    if symmetric:                                                    # passages are formatted as inputs
        inputs = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
        P = model.encode_queries(inputs, task, dim=dim, precision=precision, progress=progress)
    else:
        P = model.encode_passages(texts, titles, dim=dim, precision=precision, progress=progress)
    return model.encode_queries(list(beir.queries.values()), task, dim=dim, precision=precision), P


def rankings(
    beir: Beir,
    q: np.ndarray,  # (Q, d) vectors of beir.queries
    P: np.ndarray,  # (P, d) vectors of beir.corpus
) -> dict[str, list[str]]:
    """The first 100 passages of each query by cosine: ids, best first."""
    _, nearest = topk(q, P, min(101, len(P)))                        # (Q, 101) one may be left out
    return {query: first_100(beir, query, row) for query, row in zip(beir.queries, nearest, strict=True)}


def first_100(beir: Beir, query: str, order: Iterable[int]) -> list[str]:
    """Ids of the first 100 passages of an order, without the one that has the query's own id, as BEIR does.

    Queries of ArguAna and Quora stand in their corpus. A passage that is judged stays: there two
    numberings met by chance.
    """
    ids: list[str] = []
    for i in order:
        passage = beir.corpus[i]["_id"]
        if passage != query or passage in beir.qrels[query]:
            ids.append(passage)
        if len(ids) == 100:
            break
    return ids


def retrieval_scores(ranked: dict[str, list[str]], beir: Beir) -> dict[str, list[float]]:
    """Each measure for each query, in the order of beir.queries."""
    scores = {}
    for name, measure in (("ndcg@10", ndcg), ("recall@100", recall), ("mrr@10", mrr)):
        scores[name] = [measure(ranked[query], beir.qrels[query]) for query in beir.queries]
    return scores


def means(scores: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each measure over the queries, with four digits."""
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


class BM25:
    """The lexical baseline (Robertson's BM25, Lucene's idf) on title and text."""

    def __init__(self, corpus: Sequence[dict[str, str]], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(terms(f"{p['title']} {p['text']}")) for p in corpus]
        length = np.array([sum(count.values()) for count in counts])  # (P)
        norm = k1 * (1 - b + b * length / length.mean())             # (P)
        postings: dict[str, list[tuple[int, float]]] = {}            # term -> its passages, each with a weight
        for i, count in enumerate(counts):
            for term, tf in count.items():
                postings.setdefault(term, []).append((i, tf * (k1 + 1) / (tf + norm[i])))
        self.size = len(corpus)
        self.postings = {}
        for term, pairs in postings.items():
            passages, weights = map(np.array, zip(*pairs, strict=True))
            idf = math.log(1 + (self.size - len(passages) + 0.5) / (len(passages) + 0.5))
            self.postings[term] = passages, weights * idf

    def scores(self, query: str) -> np.ndarray:
        """One score a passage, (P)."""
        scores = np.zeros(self.size)
        for term in terms(query):
            if term in self.postings:
                passages, weights = self.postings[term]
                scores[passages] += weights
        return scores

    def rankings(self, beir: Beir) -> dict[str, list[str]]:
        """The first 100 passages of each query, by id, best first."""
        ranked = {}
        for query, text in beir.queries.items():
            order = np.argsort(-self.scores(text), kind="stable")    # (P)
            ranked[query] = first_100(beir, query, order)
        return ranked


# --------------------------------------------------------------------------------------------------
# Similarity of sentences


def read_sts(path: str | Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and human scores of JSONL rows sentence1, sentence2, score."""
    first, second, scores = [], [], []
    for where, row in read_jsonl(path):
        a, b, score = (row.get(key) for key in ("sentence1", "sentence2", "score"))
        if not isinstance(a, str) or not isinstance(b, str) or not a.strip() or not b.strip():
            raise InputError(f"{where}: want sentence1 and sentence2, two texts that are not empty")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InputError(f"{where}: score is {score!r}; want a finite number")
        first.append(a)
        second.append(b)
        scores.append(float(score))
    if min(scores) == max(scores):
        raise InputError(f"{path}: all scores are {scores[0]}; a rank correlation needs two that differ")
    return first, second, scores


def sts_terms(model: Any, path: str | Path, dim: int | None = None,
              task: str = "semantic similarity") -> np.ndarray:
    """(pairs) terms whose mean is Spearman's correlation of cosine and human score."""
    first, second, scores = read_sts(path)
    x = model.encode_queries(first, task, dim=dim)                   # (pairs, dim)
    y = model.encode_queries(second, task, dim=dim)                  # (pairs, dim)
    return spearman_terms((x * y).sum(1), scores)


def short_names(paths: Sequence[str | Path], folder: bool = False) -> list[str]:
    """The paths' last parts, or their folders'; the whole path where two would be the same.

    >>> short_names(["a/test", "b/test", "b/dev"]), short_names(["a/test", "b/test"], folder=True)
    (['a/test', 'b/test', 'dev'], ['a', 'b'])
    """
    full = [Path(path).resolve() for path in paths]
    short = [path.parent.name if folder else path.name for path in full]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
