"""Losses, training loop, evaluation and the whole recipe (Gecko, arXiv 2403.20327, sections 3.1-3.3).

Eq. 2 pre-finetunes on pairs with in-batch negatives. Eq. 3 fine-tunes on records with the row's own
hard negative and same-tower negatives, repeated on the first dimensions (Matryoshka). Each equation
is one pure function; one loop trains both stages.

    python train.py                                       the whole recipe in small -> runs/demo/
    python train.py prefinetune|finetune DATA[:WEIGHT]... --init DIR|tiny --out DIR
    python train.py evaluate --model DIR --beir DIR

Where we differ from the paper, or fill a gap in it:
1. tau, optimiser, learning rate, batch size, steps, weight of the Matryoshka terms (3.3, silent):
   the fields of TrainConfig; AdamW, linear warm-up and decay; all dimensions weigh the same.
2. Duplicates in a batch (silent): a text equal to a row's input or positive is never its negative.
3. A row without a hard negative leaves that term of eq. 3 out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import llm as fret
from data import (Record, builtin_corpus, builtin_pairs, formatted, read_qrels, read_records,
                  record, schedule)
from gecko import (Gecko, InputError, add_flags, file_beside, flag, format_query, from_flags, load,
                   normalise, read_jsonl, read_passages, run, save, say, tiny, topk, write_jsonl)

# B rows in a batch, d the model's dimension, D the Matryoshka dimensions, tau the temperature.
# q, p_pos, p_neg: (B, d), rows of length 1; sim is then the inner product.

# --------------------------------------------------------------------------------------------------
# Pre-finetuning (eq. 2)


def pre_loss(
    q: Tensor,      # (B, d) queries, unit rows
    p: Tensor,      # (B, d) passages, unit rows
    tau: float,
    q_id: Tensor,   # (B) integer ids of the query texts
    p_id: Tensor,   # (B) integer ids of the passage texts
) -> Tensor:        # scalar
    """Eq. 2: L_pre = mean_i -log  e^{s(q_i, p_i)} / sum_j e^{s(q_i, p_j)},  s = cos / tau.

    The other rows' passages are the negatives; there are no hard ones. A passage whose text is
    row i's own, or that answers the same query text, is masked out of row i.
    """
    s = q @ p.T / tau                                                # (B, B)
    s = s.masked_fill(not_negative(q_id, p_id, p_id, q_id), -math.inf)
    return F.cross_entropy(s, torch.arange(len(q), device=q.device))


def not_negative(q_id: Tensor, p_id: Tensor, other: Tensor, other_q: Tensor) -> Tensor:
    """(B, B) true where text j must not be a negative of row i: duplicates, off the diagonal.

    other: ids of the candidate texts, other_q: ids of the queries they came with, all (B).
    """
    same = (other[None] == p_id[:, None]) | (other[None] == q_id[:, None]) \
        | (other_q[None] == q_id[:, None])                           # (B, B)
    return same & ~torch.eye(len(q_id), dtype=torch.bool, device=q_id.device)


# --------------------------------------------------------------------------------------------------
# Fine-tuning (eq. 3)


def main_loss(
    q: Tensor,      # (B, d) inputs, unit rows
    p_pos: Tensor,  # (B, d) positive targets, unit rows
    p_neg: Tensor,  # (B, d) hard negative targets, unit rows (any row where has_neg is false)
    tau: float,
    q_id: Tensor,   # (B) integer ids of the input texts
    p_id: Tensor,   # (B) integer ids of the positive texts
    has_neg: Tensor,  # (B) true where the row has a hard negative
) -> Tensor:        # scalar
    """Eq. 3, with s = cos / tau:

    L_main = mean_i -log e^{s(q_i,p_i+)} / ( sum_j [e^{s(q_i,p_j+)} + 1[j!=i] e^{s(q_i,q_j)}]
                                             + e^{s(q_i,p_i-)} )
    """
    B, _ = q.shape
    positives = q @ p_pos.T / tau                                    # (B, B) s(q_i, p_j+)
    positives = positives.masked_fill(not_negative(q_id, p_id, p_id, q_id), -math.inf)
    queries = q @ q.T / tau                                          # (B, B) s(q_i, q_j)
    itself = torch.eye(B, dtype=torch.bool, device=q.device)         # (B, B) 1[j != i] is its inverse
    queries = queries.masked_fill(itself | not_negative(q_id, p_id, q_id, q_id), -math.inf)
    own = (q * p_neg).sum(1, keepdim=True) / tau                     # (B, 1) s(q_i, p_i-), no other row's
    own = own.masked_fill(~has_neg[:, None], -math.inf)
    s = torch.cat([positives, queries, own], dim=1)                  # (B, 2B + 1)
    return F.cross_entropy(s, torch.arange(B, device=q.device))


# --------------------------------------------------------------------------------------------------
# Matryoshka (section 3.3, MRL)


def mrl_loss(loss: Callable[..., Tensor], dims: Sequence[int], *vectors: Tensor) -> Tensor:
    """sum over dims of the loss on the first dim dimensions, normalised again after the cut.

    loss takes as many tensors as there are `vectors`, each (B, d) and not yet of length 1.
    """
    terms = [loss(*(normalise(x, dim) for x in vectors)) for dim in dims]
    return torch.stack(terms).sum()


# --------------------------------------------------------------------------------------------------
# The loop, for both stages


@dataclass
class TrainConfig:
    """A field is a flag of `prefinetune` and `finetune`; the paper states none of these values."""

    batch_size: int = flag(256, "rows a step; their texts are each other's negatives")
    epochs: float = flag(1.0, "times through the data")
    steps: int = flag(0, "number of steps; 0: as many as the epochs hold")
    lr: float = flag(0.0, "peak learning rate; 0: 1e-2 for a bag of words, 3e-5 for layers")
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's")
    clip: float = flag(1.0, "largest norm of the gradient")
    tau: float = flag(0.05, "temperature: similarities are cosine / tau")
    dims: str = flag("", "Matryoshka dimensions, such as 384,128; empty: the full one alone")
    max_length: int = flag(64, "tokens of a text in training; the rest is cut")
    seed: int = flag(0, "of the order of the data and of dropout")
    precision: str = flag("float32", "float32 or bf16 (autocast)")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over warmup * steps, then linear decay to 0."""
    rise = max(1.0, warmup * steps)
    return peak * min((step + 1) / rise, (steps - step) / max(1.0, steps - rise), 1.0)


def train(model: Gecko, stage: str, sets: Sequence[Sequence[Record]], c: TrainConfig,
          weights: Sequence[float] | None = None, title: str = "") -> list[float]:
    """Train in place; stage "prefinetune" (eq. 2) or "finetune" (eq. 3). Returns each step's loss."""
    d = model.encoder.config.hidden_size
    dims = read_dims(c.dims, d)
    tokens, sides = tokenised(model, sets, c.max_length)
    sizes = [len(rows) for rows in sets]
    steps = c.steps or max(1, int(c.epochs * sum(sizes) / c.batch_size))
    plan = schedule(sizes, weights or [1.0] * len(sizes), c.batch_size, steps, c.seed)
    peak = c.lr or (1e-2 if model.encoder.config.num_hidden_layers == 0 else 3e-5)
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=peak, weight_decay=c.weight_decay, fused=True)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=c.precision == "bf16")
    torch.manual_seed(c.seed)
    model.encoder.train()
    losses: list[float] = []
    bar = tqdm(plan, desc=title or stage, unit="step")
    for step, (which, rows) in enumerate(bar):
        q_id, p_id, n_id = torch.from_numpy(sides[which][rows]).T.to(model.device)  # 3 of (B)
        has_neg = n_id >= 0                                          # (B)
        with autocast:
            q = model.embed([tokens[i] for i in q_id.tolist()])      # (B, d)
            p_pos = model.embed([tokens[i] for i in p_id.tolist()])  # (B, d)
            p_neg = torch.zeros_like(q)                              # (B, d)
            if stage == "finetune" and has_neg.any():
                p_neg[has_neg] = model.embed([tokens[i] for i in n_id[has_neg].tolist()]).to(q.dtype)
        if stage == "prefinetune":
            loss = mrl_loss(lambda q, p: pre_loss(q, p, c.tau, q_id, p_id), dims, q, p_pos)
        else:
            loss = mrl_loss(lambda q, p, n: main_loss(q, p, n, c.tau, q_id, p_id, has_neg),
                            dims, q, p_pos, p_neg)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, c.clip)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak, c.warmup)
        optimiser.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InputError(f"the loss is {losses[-1]} at step {step} (set {which}, rows "
                             f"{rows[:5].tolist()} ...); lower --lr or raise --tau")
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
    model.encoder.eval()
    model.dims = tuple(dims)
    return losses


def read_dims(text: str, d: int) -> list[int]:
    """"384,128" -> [384, 128]; each at most d, the model's dimension."""
    dims = [int(part) for part in text.split(",") if part.strip().isdigit()] or [d]
    if text and (len(dims) != len(text.split(",")) or not all(1 <= x <= d for x in dims)):
        raise InputError(f"--dims {text}: give numbers from 1 to {d} with commas between")
    return dims


def tokenised(model: Gecko, sets: Sequence[Sequence[Record]], max_length: int,
              ) -> tuple[list[list[int]], list[np.ndarray]]:
    """Every distinct text tokenised once, and for each set the ids of its texts, (rows, 3).

    A row of ids is input, positive, hard negative (-1: none). Equal texts have equal ids, which is
    what the losses mask duplicates by.
    """
    ids: dict[str, int] = {}
    sides = [np.array([[-1 if text is None else ids.setdefault(text, len(ids))
                        for text in formatted(row, model.formats)] for row in rows]) for rows in sets]
    return model.tokens(list(ids), max_length), sides


# --------------------------------------------------------------------------------------------------
# The recipe: the paper's section 3, top to bottom


SMALL = TrainConfig(batch_size=512, tau=0.1, dims="384,128")         # chosen on the dev questions


@dataclass
class Sizes:
    """How much of everything the recipe does; the defaults take minutes on two cores."""

    pairs: int = 100_000        # title-body pairs
    pre_steps: int = 400        # of pre-finetuning
    queries: int = 8            # generated queries a passage (the paper: 6.6M in all)
    steps: int = 400            # of each training on generated queries
    lr: float = 2e-3            # of the same


def recipe(out: Path, seed: int = 0, sizes: Sizes | None = None,
           corpus: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """Pre-finetune, generate, mine, fine-tune, evaluate: on the built-in corpus, with `offline`."""
    start, n = time.time(), sizes or Sizes()
    c = replace(SMALL, seed=seed)

    print("3.1  Pre-finetuning on title-body pairs (eq. 2)")
    corpus = corpus or builtin_corpus()
    write_jsonl(out / "corpus.jsonl", corpus)
    pairs = builtin_pairs(corpus, n.pairs, seed)
    untrained = tiny([f"{p['title']} {p['text']}" for p in corpus]
                     + [f"{r['query']} {r['positive']['text']}" for r in pairs], seed)
    pre = copy.deepcopy(untrained)
    train(pre, "prefinetune", [pairs], replace(c, steps=n.pre_steps), title="pre-finetune")

    print("3.2  FRet, step 1: a task and a query for passages, then the first embedder on (q, p_seed)")
    drawn = n.queries * len(corpus)
    queries = fret.write_kept(out / "queries.jsonl", fret.generate(
        fret.Offline(corpus, seed=seed), corpus, drawn, seed), drawn, "generate")
    by_id = {p["_id"]: p for p in corpus}
    seeds = [record(row["task"], row["query"], by_id[row["seed_id"]]) for row in queries]
    first = copy.deepcopy(pre)
    train(first, "prefinetune", [seeds], replace(c, steps=n.steps, lr=n.lr), title="first embedder")
    save(first, out / "seed")

    print("3.2  FRet, step 2: the top 20, ranked twice, fused, relabelled")
    judge = fret.Offline(corpus, first, seed)
    rows = fret.write_kept(out / "fret.jsonl", fret.mine(judge, first, corpus, queries, seed=seed),
                           len(queries), "mine")

    print("3.3  Fine-tuning on FRet (eq. 3, Matryoshka)")
    gecko = copy.deepcopy(pre)
    train(gecko, "finetune", [rows], replace(c, steps=n.steps, lr=n.lr), title="fine-tune")
    save(gecko, out / "gecko")

    show_relabelled(rows, corpus)
    table = ladder(out, corpus, judge, {"untrained": untrained, "pre-finetuned": pre,
                                "+ (q, p_seed)": first, "+ FRet (p_1, p_20)": gecko})
    print(f"{time.time() - start:.0f} s in all; {out}/ holds corpus, queries, fret, seed, gecko, ladder")
    print(f'next: python gecko.py search "how do I round a number up" --model {out}/gecko')
    return table


# ==================================================================================================
# In practice: what the recipe prints, evaluation, the command line.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Measures


def ndcg(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 10) -> float:
    """nDCG@k with linear gains, as BEIR computes it; relevant: {id: grade}.

    >>> ndcg(["b", "a"], {"a": 1})
    0.6309297535714575
    """
    gains = [relevant.get(x, 0) / math.log2(r + 1) for r, x in enumerate(ranked[:k], 1)]
    ideal = [g / math.log2(r + 1) for r, g in enumerate(sorted(relevant.values(), reverse=True)[:k], 1)]
    return sum(gains) / sum(ideal)


def recall(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 100) -> float:
    """Share of the relevant ones among the first k."""
    return len(set(ranked[:k]) & set(relevant)) / len(relevant)


def mrr(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 10) -> float:
    """1 / rank of the first relevant one, 0 if it is not among the first k."""
    return next((1 / r for r, x in enumerate(ranked[:k], 1) if x in relevant), 0.0)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank.

    >>> spearman([1, 2, 3], [10, 20, 15])
    0.5
    """
    def mean_ranks(values: Sequence[float]) -> np.ndarray:
        v = np.asarray(values, float)
        _, inverse, count = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[inverse]

    return float(np.corrcoef(mean_ranks(x), mean_ranks(y))[0, 1])


def paired_bootstrap(x: Sequence[float], y: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of mean(y - x), queries drawn again with replacement."""
    difference = np.asarray(y) - np.asarray(x)
    draws = np.random.default_rng(seed).integers(len(difference), size=(10_000, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class Beir:
    """A retrieval set: passages, queries that have an answer, {query id: {passage id: grade}}."""

    corpus: list[dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> Beir:
    """BEIR's layout: corpus.jsonl, queries.jsonl (either may be .gz), qrels/SPLIT.tsv."""
    def existing(name: str) -> Path:
        path = Path(folder) / name
        return path if path.is_file() else path.with_name(name + ".gz")

    corpus, qrels = read_passages(existing("corpus.jsonl")), read_qrels(Path(folder) / f"qrels/{split}.tsv")
    queries: dict[str, str] = {}
    for where, row in read_jsonl(existing("queries.jsonl")):
        if str(row.get("_id")) in qrels:
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                raise InputError(f'{where}: no "text"; every query needs one')
            queries[str(row["_id"])] = row["text"]
    if missing := sorted(set(qrels) - set(queries)):
        raise InputError(f"{folder}/qrels/{split}.tsv: query {missing[0]} is not in queries.jsonl")
    return Beir(corpus, queries, qrels)


def rankings(model: Gecko, beir: Beir, task: str, dim: int | None = None,
             progress: str = "") -> dict[str, list[str]]:
    """The first 100 passages of each query, by id, best first."""
    P = model.encode_passages([p["text"] for p in beir.corpus], [p["title"] for p in beir.corpus],
                              dim=dim, progress=progress)
    q = model.encode_queries(list(beir.queries.values()), task, dim=dim)
    _, nearest = topk(q, P, min(100, len(P)))
    return {query: [beir.corpus[i]["_id"] for i in near]
            for query, near in zip(beir.queries, nearest, strict=True)}


def retrieval_scores(ranked: dict[str, list[str]], beir: Beir) -> dict[str, list[float]]:
    """Each measure for each query, in the order of beir.queries."""
    return {name: [measure(ranked[query], beir.qrels[query]) for query in beir.queries]
            for name, measure in (("ndcg@10", ndcg), ("recall@100", recall), ("mrr@10", mrr))}


def sts_score(model: Gecko, path: str | Path, dim: int | None = None) -> float:
    """Spearman between cosine and the human score; rows of sentence1, sentence2, score."""
    a, b, gold = [], [], []
    for where, row in read_jsonl(path):
        try:
            a.append(str(row["sentence1"]))
            b.append(str(row["sentence2"]))
            gold.append(float(row["score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: want sentence1, sentence2 and a number score") from error
    x, y = (model.encode_queries(s, "semantic similarity", dim=dim) for s in (a, b))
    return spearman((x * y).sum(1).tolist(), gold)


class BM25:
    """The lexical baseline (Robertson's BM25, Lucene's idf) on title and text."""

    def __init__(self, corpus: Sequence[dict[str, str]], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(fret.terms(f"{p['title']} {p['text']}")) for p in corpus]
        length = np.array([sum(c.values()) for c in counts])
        self.rows: dict[str, list[int]] = {}
        values: dict[str, list[float]] = {}
        norm = k1 * (1 - b + b * length / length.mean())
        for i, c in enumerate(counts):
            for w, tf in c.items():
                self.rows.setdefault(w, []).append(i)
                values.setdefault(w, []).append(tf * (k1 + 1) / (tf + norm[i]))
        P = self.size = len(corpus)
        self.values = {w: np.array(v) * math.log(1 + (P - len(v) + 0.5) / (len(v) + 0.5))
                       for w, v in values.items()}

    def scores(self, query: str) -> np.ndarray:
        """One score a passage, (P)."""
        out = np.zeros(self.size)
        for w in fret.terms(query):
            if w in self.rows:
                out[self.rows[w]] += self.values[w]
        return out

    def rankings(self, beir: Beir) -> dict[str, list[str]]:
        return {i: [beir.corpus[j]["_id"] for j in np.argsort(-self.scores(text), kind="stable")[:100]]
                for i, text in beir.queries.items()}


# --------------------------------------------------------------------------------------------------
# What the recipe prints


def questions_beir(out: Path, corpus: Sequence[dict[str, str]]) -> Path:
    """The hand-written test questions as a BEIR folder beside the models; nothing trains on it."""
    folder, names = out / "questions", {p["_id"] for p in corpus}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "corpus.jsonl", folder / "corpus.jsonl")
    queries, qrels = [], {"dev": ["query-id\tcorpus-id\tscore"], "test": ["query-id\tcorpus-id\tscore"]}
    for n, (_, row) in enumerate(read_jsonl(Path(__file__).parent / "tests/questions.jsonl")):
        answers = [name for name in row["answers"] if name in names]
        qrels[row["split"]] += [f"{n}\t{name}\t1" for name in answers]
        queries += [{"_id": str(n), "text": row["query"]}] if answers else []
    write_jsonl(folder / "queries.jsonl", queries)
    for split, lines in qrels.items():
        (folder / f"qrels/{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def show_relabelled(rows: Sequence[Record], corpus: Sequence[dict[str, str]]) -> None:
    """One record where p+ differs from p_seed, and the share of such records."""
    changed = [r for r in rows if r["positive_id"] != r["seed_id"]]
    print(f"\np+ differs from p_seed in {len(changed) / len(rows):.1%} of {len(rows)} records "
          "(paper: about 15%)")
    if not changed:
        return
    row = max(changed, key=lambda r: max(c["R"] for c in r["candidates"]))
    text = {p["_id"]: " ".join(p["text"].split())[:70] for p in corpus}
    ql = fret.ranks([c["ql"] for c in row["candidates"]])
    rc = fret.ranks([c["rc"] for c in row["candidates"]])
    print(f"  task      {row['task']}\n  query     {row['query']}")
    for name in ("seed", "positive", "negative"):
        i = [c["id"] for c in row["candidates"]].index(row[f"{name}_id"])
        print(f"  {name:9} {row[f'{name}_id']}: {text[row[f'{name}_id']]}\n"
              f"            rank {ql[i]} by QL, {rc[i]} by RC, R = {row['candidates'][i]['R']:.3f}")


def ladder(out: Path, corpus: list[dict[str, str]], judge: fret.Offline,
           models: dict[str, Gecko]) -> dict[str, dict[str, Any]]:
    """Each rung on the test questions; the judge on the dev questions. Writes ladder.json."""
    folder = questions_beir(out, corpus)
    test, dev = read_beir(folder, "test"), read_beir(folder, "dev")
    d, short = read_dims(SMALL.dims, models["untrained"].encoder.config.hidden_size)
    rungs = {"untrained": models["untrained"], "BM25": None, **models}
    full: dict[str, list[float]] = {}
    table: dict[str, dict[str, Any]] = {}
    print(f"\nTest questions ({len(test.queries)}), nDCG@10 and recall@100 at d = {d} and d = {short}; "
          "[95 % interval of the gain over the rung above, paired bootstrap]")
    for name, model in rungs.items():
        shown = []
        for dim in (d, short):
            ranked = rankings(model, test, "question answering", dim) if model else BM25(corpus).rankings(test)
            scores = retrieval_scores(ranked, test)
            table.setdefault(name, {})[str(dim)] = {k: round(float(np.mean(v)), 4) for k, v in scores.items()}
            shown.append(f"{np.mean(scores['ndcg@10']):.3f} {np.mean(scores['recall@100']):.3f}")
            full.setdefault(name, scores["ndcg@10"])
            if model is None:
                break
        above = list(full)[-2:]
        low, high = paired_bootstrap(full[above[0]], full[name])
        table[name]["gain"] = [round(low, 4), round(high, 4)]
        print(f"  {name:20} {shown[0]}   {shown[1] if model else '-':11}   "
              + (f"[{low:+.3f}, {high:+.3f}]" if len(full) > 1 else ""))
    print("The judge on the dev questions, nDCG@10 of the first embedder's top 20, ranked again by")
    table["judge (dev)"] = judge_quality(judge, models["+ (q, p_seed)"], dev)
    print("  " + "   ".join(f"{k} {v:.3f}" for k, v in table["judge (dev)"].items()))
    with file_beside(out / "ladder.json") as new:
        new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def judge_quality(judge: fret.LLM, first: Gecko, beir: Beir, N: int = 20) -> dict[str, float]:
    """Table 6 in small: nDCG@10 of the retriever, of QL, of RC and of their fusion."""
    by_id = {p["_id"]: p for p in beir.corpus}
    nearest = {q: ids[:N] for q, ids in rankings(first, beir, "question answering").items()}
    totals: dict[str, list[float]] = {"retriever": [], "QL": [], "RC": [], "QL + RC": []}
    for query, ids in nearest.items():
        pairs = [(beir.queries[query], by_id[i]) for i in ids]
        ql, rc = judge.query_likelihood(pairs), judge.relevance(pairs)
        scored = {"retriever": [-i for i in range(len(ids))], "QL": ql, "RC": rc,
                  "QL + RC": fret.rrf(ql, rc)}                       # type: ignore[arg-type]
        for name, scores in scored.items():
            order = sorted(range(len(ids)), key=lambda i: -scores[i])  # type: ignore[operator]
            totals[name].append(ndcg([ids[i] for i in order], beir.qrels[query]))
    return {name: round(float(np.mean(values)), 4) for name, values in totals.items()}


# --------------------------------------------------------------------------------------------------
# Command line


def train_command(args: argparse.Namespace) -> None:
    c, sets, weights = from_flags(TrainConfig, args), [], []
    if c.precision not in ("float32", "bf16"):
        raise InputError(f"--precision {c.precision}: give float32 or bf16")
    if c.tau <= 0 or c.batch_size < 1:
        raise InputError("--tau and --batch-size must be above 0")
    for item in args.data:
        path, _, weight = item.rpartition(":") if not Path(item).exists() else (item, "", "1")
        try:
            weights.append(float(weight))
        except ValueError as error:
            raise InputError(f"{item}: no such file; give DATA or DATA:WEIGHT") from error
        sets.append(read_records(path or item))
    say(stage=args.command, init=args.init, out=args.out, rows=[len(s) for s in sets], **vars(c))
    if args.init == "tiny":
        model = tiny([f"{r['query']} {r['positive'].get('title', '')} {r['positive']['text']}"
                      for rows in sets for r in rows], c.seed)
    else:
        model = load(args.init)
    losses = train(model, args.command, sets, c, weights)
    save(model, args.out)
    print(f"wrote {args.out}: {len(losses)} steps, loss {losses[0]:.3f} -> {np.mean(losses[-20:]):.3f}")
    print(f"next: python train.py evaluate --model {args.out} --beir DIR")


def evaluate_command(args: argparse.Namespace) -> None:
    if not args.beir and not args.sts:
        raise InputError("nothing to evaluate on; give --beir DIR or --sts FILE")
    model = load(args.model)
    say(model=args.model, dim=args.dim or model.encoder.config.hidden_size, task=args.task, split=args.split)
    results: dict[str, dict[str, float]] = {}
    for folder in args.beir:
        beir = read_beir(folder, args.split)
        scores = retrieval_scores(rankings(model, beir, args.task, args.dim, "passages"), beir)
        results[Path(folder).resolve().name] = {k: float(np.mean(v)) for k, v in scores.items()}
    for path in args.sts:
        results[Path(path).name] = {"spearman": sts_score(model, path, args.dim)}
    for name, values in results.items():
        print(name, "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
    if args.out:
        with file_beside(args.out) as new:
            new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0],
                                     epilog="Without a command: the whole recipe in small.")
    parser.add_argument("--seed", type=int, default=0, help="of the recipe (%(default)s)")
    parser.add_argument("--out", default="runs/demo", help="the recipe's folder (%(default)s)")
    commands = parser.add_subparsers(dest="command")
    for stage, what in (("prefinetune", "pairs, in-batch negatives (eq. 2)"),
                        ("finetune", "records with hard negatives (eq. 3)")):
        command = commands.add_parser(stage, help=what)
        command.add_argument("data", nargs="+", help="JSONL records, DATA or DATA:WEIGHT")
        command.add_argument("--init", required=True, help="a model folder, or tiny")
        command.add_argument("--out", required=True, help="the folder to write")
        add_flags(command, TrainConfig)
    evaluate = commands.add_parser("evaluate", help="retrieval and similarity figures of a model")
    evaluate.add_argument("--model", required=True, help="a model folder")
    evaluate.add_argument("--beir", action="append", default=[], help="a BEIR folder; may be repeated")
    evaluate.add_argument("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
    evaluate.add_argument("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
    evaluate.add_argument("--task", default="question answering", help="the queries' task (%(default)s)")
    evaluate.add_argument("--dim", type=int, help="cut to this many dimensions (default: all)")
    evaluate.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.command is None:
        recipe(Path(args.out), args.seed)
    elif args.command == "evaluate":
        evaluate_command(args)
    else:
        train_command(args)


if __name__ == "__main__":
    run(main)
