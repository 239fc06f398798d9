"""Statistics in the place of a language model, for where there is none.

    generate: templates over a passage's own sentences, with words exchanged for everyday ones
    query_likelihood: a unigram model of the passage, Dirichlet-smoothed (Ponte and Croft 1998; Zhai and
        Lafferty 2001), which may translate a passage's words into everyday ones (Berger and Lafferty 1999):
        p(w | p) = (tf(w) + lam * tf(words that w paraphrases) + mu * p(w | C)) / (|p| + mu)
    relevance: the cosine of an embedder that it is given, which errs differently from word counts

The everyday words stand in thesaurus.txt. A passage is {"_id", "title", "text"}.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.corpus import Corpus, Passage, sentences, terms, texts_and_titles
from engine.replies import Answers, LogProbs
from engine.search import exact_dot

Pairs = Sequence[tuple[str, Passage]]                                # of a query and a passage

STOP = set("a an the of to is in it if and or for this that with be are by on as at from not which "
           "when can will has its one into than".split())
ASKED = ("how do i {}", "how to {}", "{}", "what can i use to {}", "i want to {}",
         "is there a way to {}?", "{} in python")


class Offline:
    """The three calls of llm.py's LLM."""

    mu, lam = 100.0, 0.3  # pseudo-counts of the collection; weight of a paraphrase (dev questions)

    def __init__(
        self,
        corpus: Corpus,
        embedder: Any,                       # for relevance; None where nobody asks for it
        tasks: Sequence[str],
        seed: int = 0,
    ) -> None:
        self.embedder, self.tasks, self.seed = embedder, tasks, seed
        self.vectors: dict[str, np.ndarray] = {}                     # of passages, by their ids
        self.drawn = Counter[str]()                                  # queries so far, by the passage's id
        self.counts = {p["_id"]: Counter(terms(f"{p['title']}\n{p['text']}")) for p in corpus}
        self.collection = Counter[str]()
        for counts in self.counts.values():
            self.collection.update(counts)
        self.total = max(1, self.collection.total())
        self.paraphrased = defaultdict[str, set[str]](set)           # everyday word -> words it says
        for word, phrases in thesaurus().items():
            for everyday_word in set(terms(" ".join(phrases))) - STOP:
                self.paraphrased[everyday_word].update(terms(word))

    def generate(self, passages: Corpus) -> Answers:
        answers: Answers = []
        for p in passages:
            self.drawn[p["_id"]] += 1
            rng = random.Random(f"{self.seed} {p['_id']} {self.drawn[p['_id']]}")
            task, query = templated_query(p, self.tasks, rng)
            answers.append(f"Task: {task}\nQuery: {query}")
        return answers

    def query_likelihood(self, pairs: Pairs) -> LogProbs:
        """sum over the query's words of log p(w | passage), for each pair."""
        sums: LogProbs = []
        for query, passage in pairs:
            counts = self.counts[passage["_id"]]
            length = counts.total()
            total = 0.0
            for w in terms(query):
                paraphrased = sum(counts[u] for u in self.paraphrased.get(w, ()))
                tf = counts[w] + self.lam * paraphrased
                p_collection = (self.collection[w] + 0.5) / self.total   # 0.5: a word never seen
                total += math.log((tf + self.mu * p_collection) / (length + self.mu))
            sums.append(total)
        return sums

    def relevance(self, pairs: Pairs) -> LogProbs:
        """The cosine of each query and its passage, which is encoded once."""
        new = {p["_id"]: p for _, p in pairs if p["_id"] not in self.vectors}
        P = self.embedder.encode_passages(*texts_and_titles(list(new.values())))  # (new, d)
        self.vectors.update(zip(new, P, strict=True))
        queries = list(dict.fromkeys(q for q, _ in pairs))
        vectors = dict(zip(queries, self.embedder.encode_queries(queries), strict=True))
        q = np.stack([vectors[query] for query, _ in pairs])         # (pairs, d)
        p = np.stack([self.vectors[passage["_id"]] for _, passage in pairs])  # (pairs, d)
        scores = exact_dot(torch.from_numpy(q), torch.from_numpy(p))  # (pairs)
        return scores.tolist()


# --------------------------------------------------------------------------------------------------
# Everyday words


@functools.cache
def thesaurus() -> dict[str, list[str]]:
    """{"directory": ["folder"], ...}: what an LLM knows of everyday words, in very small."""
    text = Path(__file__).with_name("thesaurus.txt").read_text(encoding="utf-8")
    rows = dict(re.findall("^([^#:]+): (.+)$", text, re.MULTILINE))
    longest_first = sorted(rows, key=len, reverse=True)              # `everyday` takes the first that fits
    return {term: rows[term].split(", ") for term in longest_first}


def everyday(text: str, rng: random.Random, p: float) -> str:
    """Each term of the thesaurus exchanged for everyday words with probability p."""
    known = rf"\b({'|'.join(thesaurus())})\b"
    return re.sub(known, lambda term: rng.choice(thesaurus()[term[0]]) if rng.random() < p else term[0], text)


# --------------------------------------------------------------------------------------------------
# Templates: (task, query) from one sentence of the passage


def templated_query(p: Passage, tasks: Sequence[str], rng: random.Random) -> tuple[str, str]:
    if p["title"] == p["_id"]:                                       # a qualified name: documentation
        return api_query(p, tasks, rng)
    return prose_query(p, rng)


def api_query(p: Passage, tasks: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """One of the tasks and a query for it, from the documentation of a function or class."""
    found = sentences(p["text"][:1500]) or [p["text"][:200]]
    sentence = found[0] if rng.random() < 0.6 else rng.choice(found)
    sentence = re.split("-+>", sentence)[-1]                         # "f(x) -> what it returns"
    sentence = re.sub(r"\([^()]*\)|[`*'\"]", " ", sentence).lower()
    words = sentence.strip(" .:").split() or terms(p["title"])
    text = " ".join(words)
    task = rng.choice(tasks)
    if task == "question answering":
        text = re.sub("^returns? (true|false)( if| iff| when)", "check whether", text)
        text = re.sub("^returns? ", "get ", text)
    elif task == "search result":
        content = [w for w in words if w not in STOP] or words
        n = rng.randint(2, 5)
        start = rng.randrange(max(1, len(content) - n + 1))
        text = " ".join(content[start:start + n])
    elif task == "sentence similarity":
        text = " ".join(w for w in words if rng.random() > 0.25)
    query = everyday(text, rng, 0.3 if task == "fact checking" else 0.6)
    if task == "question answering":
        query = " ".join(query.split()[:14])
        query = rng.choice(ASKED).format(query)
    return task, query.strip() or " ".join(words)


def prose_query(p: Passage, rng: random.Random) -> tuple[str, str]:
    """A query for an article: its title or a sentence, without brackets, cut short."""
    title, text = p["title"], p["text"] or p["title"]
    statements = sentences(text) or [text]
    if title.count(" ") > 2:
        statements.append(title)
    statement = rng.choice(statements)
    statement = re.sub(r"\s*[(\[][^()\[\]]*[)\]]", "", statement)
    words = statement.strip(" .;:,").split() or text.split()
    words = words[:18]
    # a question would need grammar; a statement is said twice as often as the others
    task = rng.choice(("fact checking", "fact checking", "sentence similarity", "search result"))
    if task == "sentence similarity":
        words = [w for w in words if rng.random() > 0.2] or words
    elif task == "search result":
        words = [w for w in words if w.lower() not in STOP] or words
        start = rng.randrange(max(1, len(words) - 4))
        stop = start + rng.randint(3, 6)
        words = words[start:stop]
    return task, " ".join(words)
