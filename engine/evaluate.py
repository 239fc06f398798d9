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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.corpus import terms
from engine.files import InputError, beir_file, first_line, read_jsonl, read_passages
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
    if not np.isfinite(values).all() or min(values) == max(values):
        raise InputError(f"{len(values)} values that are all equal, or not numbers, have no rank correlation")
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
# Retrieval: a set, and what is found in it


@dataclass
class Beir:
    """A retrieval set. Equal scores keep the order of `corpus`."""

    corpus: list[dict[str, str]]
    queries: dict[str, str]                 # those that were judged
    qrels: dict[str, dict[str, int]]        # {query id: {passage id: grade above 0}}


def read_beir(folder: str | Path, split: str = "test") -> Beir:
    """BEIR's layout: corpus.jsonl, queries.jsonl (either may be .gz), qrels/SPLIT.tsv.

    The corpus is sorted by id, descending: trec_eval's order of equal scores. A passage without title and
    text cannot be found.
    """
    path = Path(folder) / f"qrels/{split}.tsv"
    passages = read_passages(beir_file(folder, "corpus.jsonl"))
    queries = read_queries(beir_file(folder, "queries.jsonl"))
    qrels = read_qrels(path)
    nameless = sorted(set(qrels) - set(queries))
    if nameless:
        raise InputError(f"{path}: query {nameless[0]} is not in queries.jsonl; write its text there")
    judged = set(itertools.chain.from_iterable(qrels.values()))
    missing = sorted(judged - {p["_id"] for p in passages})
    if missing:
        what = f"{len(missing)} of {len(judged)} judged passages are not in corpus.jsonl, first: {missing[0]}"
        if len(missing) == len(judged):
            raise InputError(f"{path}: {what}; take corpus and judgements of one release")
        tqdm.write(f"{path}: {what}; they count as not found", file=sys.stderr)
    corpus = [p for p in passages if p["title"].strip() or p["text"].strip()]
    corpus.sort(key=lambda p: p["_id"], reverse=True)
    return Beir(corpus, {query: text for query, text in queries.items() if query in qrels}, qrels)


def read_queries(path: Path) -> dict[str, str]:
    """BEIR's queries.jsonl: {id: text}."""
    queries: dict[str, str] = {}
    for where, row in read_jsonl(path):
        key, text = str(row.get("_id")), row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'{where}: no "text"; every query needs one')
        if queries.setdefault(key, text) != text:
            raise InputError(f'{where}: "_id" {key!r} has another text in a line above; make it unique')
    return queries


HEADER = re.compile(r"(query|qid|topic).*(score|grade|label|rel|relevance|judge?ment)", re.IGNORECASE)
GRADE = r"([+-]?[0-9]+)(?:\.0*)?"                                    # 1.0 is a whole number
BEIR_LINE = re.compile(rf"([^\t]+)\t([^\t]+)\t{GRADE}")
TREC_LINE = re.compile(rf"(\S+)\s+(?:(?:[0-9.]+|Q0)\s+)?(\S+)\s+{GRADE}")   # its second column has no meaning


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance judgements, {query id: {passage id: grade above 0}}: BEIR's three columns or TREC's four.

    A query whose grades are all 0 stays, with none: trec_eval counts it as 0 in a mean.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {first_line(error)}; want qrels/SPLIT.tsv, UTF-8 text") from error
    qrels: dict[str, dict[str, int]] = {}
    grades: dict[tuple[str, str], int] = {}
    form = None                                                      # that of the first line holds for all
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or number == 1 and HEADER.fullmatch(line):
            continue
        form = form or (BEIR_LINE if BEIR_LINE.fullmatch(line) else TREC_LINE)
        columns = form.fullmatch(line)
        if not columns:
            raise InputError(f"{path}:{number}: want query, passage, grade (BEIR, with tabs) or query, 0, passage, "
                             "grade (TREC), the same in all lines, each grade a whole number")
        query, passage, grade = columns[1], columns[2], int(columns[3])
        if grades.setdefault((query, passage), grade) != grade:
            raise InputError(f"{path}:{number}: another grade than in a line above; keep one of the two")
        relevant = qrels.setdefault(query, {})
        if grade > 0:
            relevant[passage] = grade
    if not any(qrels.values()):
        raise InputError(f"{path}: no relevant passage; nothing to evaluate")
    return qrels


def encode_beir(model: Any, beir: Beir, task: str, dim: int | None = None, symmetric: bool = False,
                precision: str = "float32", progress: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the queries (Q, dim) and of the passages (P, dim); `symmetric`: formatted as inputs too.

    `progress`: the name of a bar, under which texts that are cut are counted.
    """
    titles = [p["title"] for p in beir.corpus]
    texts = [p["text"] for p in beir.corpus]
    if symmetric:
        inputs = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
        P = model.encode_queries(inputs, task, dim=dim, precision=precision, progress=progress)
    else:
        P = model.encode_passages(texts, titles, dim=dim, precision=precision, progress=progress)
    if progress:
        say_truncated(model, len(P), "passages")
    q = model.encode_queries(list(beir.queries.values()), task, dim=dim, precision=precision)
    if progress:
        say_truncated(model, len(q), "queries")
    return q, P


def say_truncated(model: Any, count: int, what: str) -> None:
    if model.cut:
        tqdm.write(f"{model.cut} of {count} {what} are cut at {model.max_length} tokens", file=sys.stderr)


def rankings(
    beir: Beir,
    q: np.ndarray,  # (Q, d) vectors of beir.queries
    P: np.ndarray,  # (P, d) vectors of beir.corpus
) -> dict[str, list[str]]:
    """The first 100 passages of each query by cosine: ids, best first."""
    _, nearest = topk(q, P, min(101, len(P)))                        # (Q, 101)
    return {query: first_100(beir, query, row) for query, row in zip(beir.queries, nearest, strict=True)}


def first_100(beir: Beir, query: str, order: np.ndarray) -> list[str]:
    """Ids of the first 100 passages of an order, without the one that has the query's own id, as BEIR does.

    Queries of ArguAna and Quora stand in their corpus. A passage that is judged stays: there two
    numberings met by chance.
    """
    ids = [beir.corpus[i]["_id"] for i in order[:101]]
    return [i for i in ids if i != query or i in beir.qrels[query]][:100]


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
        length = np.array([count.total() for count in counts])       # (P)
        self.k1, self.norm = k1, k1 * (1 - b + b * length / length.mean())
        rows: dict[str, list[tuple[int, int]]] = {}                  # term -> passages and how often each has it
        for passage, count in enumerate(counts):
            for term, tf in count.items():
                rows.setdefault(term, []).append((passage, tf))
        self.postings = {term: np.array(pairs).T for term, pairs in rows.items()}    # each (2, n)

    def scores(self, query: str) -> np.ndarray:
        """One score a passage, (P)."""
        scores = np.zeros(len(self.norm))
        for term in terms(query):
            if term in self.postings:
                passages, tf = self.postings[term]                   # (n) twice
                idf = math.log(1 + (len(scores) - len(tf) + 0.5) / (len(tf) + 0.5))
                scores[passages] += tf * (self.k1 + 1) / (tf + self.norm[passages]) * idf
        return scores


def bm25_rankings(beir: Beir) -> dict[str, list[str]]:
    """The first 100 passages of each query by BM25. One that has none of the query's terms is not found."""
    bm25, ranked = BM25(beir.corpus), {}
    for query, text in beir.queries.items():
        scores = bm25.scores(text)                                   # (P)
        order = np.argsort(-scores, kind="stable")
        ranked[query] = first_100(beir, query, order[scores[order] > 0])
    return ranked


# --------------------------------------------------------------------------------------------------
# Similarity of sentences


def read_sts(path: str | Path) -> list[tuple[str, str, float]]:
    """Pairs of sentences, each with its human score, of JSONL rows sentence1, sentence2, score."""
    pairs: list[tuple[str, str, float]] = []
    for where, row in read_jsonl(path):
        sentences = [row.get("sentence1"), row.get("sentence2")]
        if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise InputError(f"{where}: want sentence1 and sentence2, two texts that are not empty")
        score: Any = row.get("score")
        if type(score) not in (int, float) or not math.isfinite(score):  # a bool is no score
            raise InputError(f"{where}: score is {score!r}; want a finite number")
        pairs.append((row["sentence1"], row["sentence2"], float(score)))
    if len({score for _, _, score in pairs}) == 1:
        raise InputError(f"{path}: all scores are {pairs[0][2]}; a rank correlation needs two that differ")
    return pairs


def sts_terms(model: Any, path: str | Path, dim: int | None = None,
              task: str = "semantic similarity") -> np.ndarray:
    """(pairs) terms whose mean is Spearman's correlation of cosine and human score."""
    first, second, scores = zip(*read_sts(path), strict=True)
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
