"""Measures of retrieval and similarity, their confidence intervals, and the lexical baseline, BM25.

A retrieval set is a BEIR folder; a similarity set is JSONL of sentence pairs with human scores.
A model is whatever has encode_queries, encode_passages, and `lost` to say which of their texts were cut.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.beir import Beir, Qrels
from engine.corpus import Corpus, terms, texts_and_titles
from engine.files import InputError, is_text, read_jsonl, say_lost
from engine.search import topk

# Q queries, P passages, d the dimension of their vectors, whose rows have length 1.
Ids = Sequence[str]                     # of passages, best first
Relevant = dict[str, int]               # {passage id: grade above 0}, of one query
Rankings = dict[str, list[str]]         # {query id: passage ids, best first}
Scores = dict[str, list[float]]         # {measure: a value for each query}

# --------------------------------------------------------------------------------------------------
# Measures of one query


def ndcg(ranked: Ids, relevant: Relevant, k: int = 10) -> float:
    """nDCG@k with linear gains, as trec_eval and BEIR compute it.

    >>> ndcg(["b", "a"], {"a": 1})
    0.6309297535714575
    """
    grades = [relevant.get(i, 0) for i in ranked[:k]]
    best_grades = sorted(relevant.values(), reverse=True)[:k]
    return discounted(grades) / (discounted(best_grades) or 1)


def discounted(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))


def recall(ranked: Ids, relevant: Relevant, k: int = 100) -> float:
    """Share of the relevant passages that are among the first k."""
    found = set(ranked[:k]) & set(relevant)
    return len(found) / max(1, len(relevant))


def mrr(ranked: Ids, relevant: Relevant, k: int = 10) -> float:
    """1 / rank of the first relevant passage; 0 if none is among the first k."""
    for rank, i in enumerate(ranked[:k], 1):
        if i in relevant:
            return 1 / rank
    return 0.0


# --------------------------------------------------------------------------------------------------
# Rank correlation, and confidence


def standard_ranks(values: Any, what: str) -> np.ndarray:
    """Ranks with mean 0 and variance 1; equal values share their mean rank.

    Spearman's correlation is the mean of the products of two.

    >>> standard_ranks([10, 30, 20, 20], "grades").round(2).tolist()
    [-1.41, 1.41, 0.0, 0.0]
    """
    values = np.asarray(values, float)                               # (n)
    if not np.ptp(values) > 0:                                       # nan is not
        raise InputError(f"{what} are all equal, or no numbers; a rank correlation needs two that differ")
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(size) - (size - 1) / 2)[group]                # (n)
    return (ranks - ranks.mean()) / ranks.std()


def paired_bootstrap(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(y - x), queries drawn again with replacement."""
    gain = np.subtract(y, x)                                         # (Q)
    Q = len(gain)
    # a draw is how often each query came up, (4000, Q)
    draws = np.random.default_rng(0).multinomial(Q, np.full(Q, 1 / Q), 4000)
    low, high = np.percentile(draws @ gain / Q, [2.5, 97.5])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------
# Retrieval: vectors of a set, and what they find


def encode_beir(
    model: Any,
    beir: Beir,
    task: str,                  # of the queries
    symmetric: bool = False,    # passages are formatted as inputs
    progress: str = "",         # the name of a bar; with one, what the tokens lack is said too
    **how: Any,                 # dim and precision, as of the model's encode
) -> tuple[np.ndarray, np.ndarray]:  # (Q, dim) queries, (P, dim) passages
    """Unit vectors of a set."""
    if symmetric:
        inputs = [f"{p['title']} {p['text']}".strip() for p in beir.corpus]
        P = model.encode_queries(inputs, task, progress=progress, **how)
    else:
        P = model.encode_passages(*texts_and_titles(beir.corpus), progress=progress, **how)
    if progress:
        say_lost(model, "passages")
    q = model.encode_queries(list(beir.queries.values()), task, **how)
    if progress:
        say_lost(model, "queries")
    return q, P


def rankings(
    beir: Beir,
    q: np.ndarray,  # (Q, d) vectors of beir.queries
    P: np.ndarray,  # (P, d) vectors of beir.corpus
) -> Rankings:
    """The first 100 passages of each query by cosine."""
    _, nearest = topk(q, P, min(101, len(P)))                        # (Q, 101)
    return first_100(beir, nearest)


def first_100(beir: Beir, orders: Iterable[np.ndarray]) -> Rankings:
    """Ids of the first 100 passages of each query's order, without the one that has the query's own id.

    As BEIR does, because queries of ArguAna and Quora stand in their corpus. A passage that is judged
    stays: there two numberings met by chance.
    """
    ranked = {}
    for query, order in zip(beir.queries, orders, strict=True):
        ids = [beir.corpus[i]["_id"] for i in order]
        ranked[query] = [i for i in ids if i != query or i in beir.qrels[query]][:100]
    return ranked


def retrieval_scores(ranked: Rankings, qrels: Qrels) -> Scores:
    """Each measure for each query that is ranked, in that order."""
    scores = {}
    for name, measure in (("ndcg@10", ndcg), ("recall@100", recall), ("mrr@10", mrr)):
        scores[name] = [measure(ids, qrels[query]) for query, ids in ranked.items()]
    return scores


def means(scores: Scores) -> dict[str, float]:
    """The mean of each measure over the queries, with four digits."""
    return {measure: round(float(np.mean(values)), 4) for measure, values in scores.items()}


# --------------------------------------------------------------------------------------------------
# BM25


K1, B = 1.2, 0.75       # Lucene's


def bm25(corpus: Corpus) -> Callable[[str], np.ndarray]:
    """The lexical baseline (Robertson's BM25, Lucene's idf) on title and text: query -> scores, (P)."""
    P = len(corpus)
    counts = [Counter(terms(f"{p['title']} {p['text']}")) for p in corpus]
    length = np.array([count.total() for count in counts])           # (P)
    norm = K1 * (1 - B + B * length / length.mean())                 # (P)
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)   # of a term: passages, and its number in each
    for passage, count in enumerate(counts):
        for term, tf in count.items():
            postings[term].append((passage, tf))
    columns = {term: np.array(rows).T for term, rows in postings.items()}   # (2, n) each

    def scores_of(query: str) -> np.ndarray:
        scores = np.zeros(P)
        for term in filter(columns.__contains__, terms(query)):
            passages, tf = columns[term]                             # (n) twice
            n = len(tf)
            idf = math.log(1 + (P - n + 0.5) / (n + 0.5))
            scores[passages] += idf * (tf * (K1 + 1) / (tf + norm[passages]))
        return scores

    return scores_of


def bm25_rankings(beir: Beir) -> Rankings:
    """The first 100 passages of each query by BM25; one without any of its terms is not found."""
    orders = []
    for scores in map(bm25(beir.corpus), beir.queries.values()):     # (P)
        order = np.argsort(-scores, kind="stable")[:101]
        orders.append(order[scores[order] > 0])
    return first_100(beir, orders)


# --------------------------------------------------------------------------------------------------
# Similarity of sentences


def read_sts(path: str | Path) -> tuple[list[str], np.ndarray]:
    """JSONL rows sentence1, sentence2, score: the sentences, pair after pair, and the scores' standard ranks."""
    sentences, scores = list[str](), []
    for where, row in read_jsonl(path):
        pair: list[Any] = [row.get("sentence1"), row.get("sentence2")]
        score: Any = row.get("score")
        if not all(map(is_text, pair)):
            raise InputError(f"{where}: want sentence1 and sentence2, texts that are not empty")
        if type(score) not in (int, float) or not abs(score) < 1e300:  # nan is not
            raise InputError(f"{where}: score is {score!r}; want a finite number")
        sentences += pair
        scores.append(score)
    return sentences, standard_ranks(scores, f"{path}: the scores")


def sts_terms(
    model: Any,
    path: str | Path,
    dim: int | None = None,
    task: str = "semantic similarity",
) -> np.ndarray:
    """(pairs) terms whose mean is Spearman's correlation of cosine and human score."""
    sentences, ranks = read_sts(path)
    x = model.encode_queries(sentences, task, dim=dim)               # (2 * pairs, dim)
    say_lost(model, "sentences")
    # of one text twice it is 1, whatever the last digits of float32 are: else they would order such pairs
    cosines = (x[::2] * x[1::2]).sum(1).round(6)                     # (pairs)
    return ranks * standard_ranks(cosines, f"{path}: the cosines")


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The paths' last parts; the whole paths where two would be the same.

    >>> short_names(["a/test", "b/dev"]), short_names(["a/test", "b/test"])
    (['test', 'dev'], ['a/test', 'b/test'])
    """
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        return list(map(str, paths))
    return names
