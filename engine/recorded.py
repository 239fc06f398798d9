"""Answers that a real language model gave once for the built-in corpus: the three calls, read from a file.

engine/recorded.jsonl.gz holds a header (model, licence, prompts), a digest of each passage as the model was shown
it, and rows: the passage that a query was written for, its task, the query, and query likelihoods of the passages
that the recipe's initial retriever found. No passage's text: those are this Python's own, and one that reads
otherwise than it did is left out. tests/lab/record.py makes the file.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from engine.corpus import Corpus, shown
from engine.files import read_jsonl
from engine.offline import Pairs
from engine.replies import Answers, LogProbs

RECORD = Path(__file__).with_name("recorded.jsonl.gz")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Recorded:
    """The three calls of llm.py's LLM; None where the record holds no answer."""

    def __init__(self, corpus: Corpus, path: str | Path = RECORD) -> None:
        self.header, named, *rows = [row for _, row in read_jsonl(path)]
        digests = named["digests"]
        same = {}                                                    # places in the corpus, by id
        for place, p in enumerate(corpus):
            if digests.get(p["_id"]) == digest(shown(p, self.header["characters"])):
                same[p["_id"]] = place
        self.places = same
        self.missing = len(digests) - len(same)                      # passages
        self.rows: list[dict[str, Any]] = []                         # seed_id, task, query, ql
        self.written: dict[str, list[str]] = defaultdict(list)       # answers that are still to come, by seed
        self.ranked: dict[tuple[str, str], list[str]] = {}           # candidates by (seed, query)
        self.scores: dict[tuple[str, str], float] = {}               # QL by (query, passage's id)
        for row in rows:
            seed, query = row["seed_id"], row["query"]
            row["ql"] = [pair for pair in row["ql"] if pair[0] in same]
            if seed in same and len(row["ql"]) > 1:
                self.rows.append(row)
                self.written[seed].append(f"Task: {row['task']}\nQuery: {query}")
                self.ranked[seed, query] = [key for key, _ in row["ql"]]
                self.scores |= {(query, key): score for key, score in row["ql"]}
        self.lost = len(rows) - len(self.rows)
        self.asked = self.common = 0                                 # candidates; those found here too

    def report(self) -> str:
        """Whose answers these are, and what of them is of no use here."""
        about = self.header
        overlap = ""
        if self.asked:
            overlap = f"; {self.common / self.asked:.0%} of their candidates are found here too"
        return (f"{len(self.rows):,} queries written and ranked by {about['model']} ({about['licence']}), recorded "
                f"{about['date']} with Python {about['python']} and prompts of its own (in the file's header); "
                f"{self.missing:,} of its passages are not in this corpus or read otherwise, and are left out with "
                f"{self.lost:,} queries{overlap}")

    def draws(self) -> list[int]:
        """Where the seeds of the recorded queries stand in the corpus."""
        return [self.places[row["seed_id"]] for row in self.rows]

    def candidates(self, query: dict[str, Any], found: list[str]) -> list[str]:
        """A recorded query's candidates, nearest first, in place of those found now; what both hold is counted."""
        ids = self.ranked[query["seed_id"], query["query"]]
        self.asked += len(ids)
        self.common += len(set(ids) & set(found))
        return ids

    def generate(self, passages: Corpus) -> Answers:
        answers: Answers = []
        for p in passages:
            written = self.written[p["_id"]]
            answers.append(written.pop(0) if written else None)      # drawn again: its next query
        return answers

    def query_likelihood(self, pairs: Pairs) -> LogProbs:
        return [self.scores.get((query, p["_id"])) for query, p in pairs]

    def relevance(self, pairs: Pairs) -> LogProbs:
        """No label is recorded (see tests/lab/RESULTS.md)."""
        return [None] * len(pairs)
