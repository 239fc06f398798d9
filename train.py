"""Losses, the training loop and the whole recipe (Gecko, arXiv 2403.20327, sections 3.1 to 3.3).

Eq. 2 pre-finetunes on pairs with in-batch negatives. Eq. 3 fine-tunes on records with the row's own hard
negative and same-tower negatives, and is repeated on the first dimensions (Matryoshka).

    python train.py                                       the whole recipe in small -> runs/demo/
    python train.py prefinetune|finetune DATA[:WEIGHT]... --init DIR|HUB-ID|tiny --out DIR
    torchrun --nproc-per-node N train.py finetune ...     the same gradient on N processes
    python train.py evaluate --model DIR --beir DIR

Where we differ from the paper, or fill a gap in it:
1. tau, optimiser, learning rate, batch size, steps, weight of the Matryoshka terms (3.3, silent): the
   fields of TrainConfig; AdamW, linear warm-up and decay; all dimensions weigh the same.
2. Duplicates (silent): no text is a negative of its equal; `duplicate_mask` and `tokenised` see to it.
3. A row without a hard negative leaves that term of eq. 3 out.
4. Batches (3.3, silent): from one set at a time; `--mix` has the other choices, see data.py.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import llm
from data import Record, batches, builtin_corpus, builtin_pairs, formatted, read_records
from engine.beir import Beir, read_beir
from engine.evaluate import (
    bm25_rankings,
    encode_beir,
    means,
    paired_bootstrap,
    rankings,
    retrieval_scores,
    short_names,
    sts_terms,
)
from engine.files import (
    InputError,
    add_flags,
    file_beside,
    flag,
    from_flags,
    read_jsonl,
    run,
    say,
    write_jsonl,
)
from engine.mteb import ForMteb, mteb_scores, mteb_tasks, table_9
from engine.offline import Offline
from engine.runs import Run, digest, save_into
from engine.scale import blockwise_loss, cached_backward, derive_seed, processes
from gecko import FORMATS, Gecko, format_query, is_bag, load, save, tiny, truncate_dim

# B rows in a batch, d the model's dimension, tau the temperature, s = cos / tau. The vectors of a loss,
# q, p_pos and p_neg, are (B, d) with rows of length 1, so that a cosine is an inner product.
# `rows` are those whose loss is taken, r of the B; each is scored against the texts of all B.

ALL = slice(None)

# --------------------------------------------------------------------------------------------------
# Equal texts are no negatives of each other (gap 2)


def duplicate_mask(
    q_id: Tensor,       # (r) integer ids of the rows' query texts
    p_id: Tensor,       # (r) integer ids of the rows' positive texts
    text_id: Tensor,    # (B) integer ids of the candidate negatives
    asked_id: Tensor,   # (B) integer ids of the queries that they belong to
) -> Tensor:            # (r, B)
    """True where candidate j is row i's own query or positive, or belongs to the same query.

    That includes j = i. Below, rows 0 and 1 ask 5 and 6 and share the positive 8, row 2 asks 7 and has 9; the
    candidates are the rows' positives (for the rows' queries text_id would be q_id):

    >>> q_id, p_id = torch.tensor([5, 6, 7]), torch.tensor([8, 8, 9])
    >>> duplicate_mask(q_id, p_id, text_id=p_id, asked_id=q_id).tolist()
    [[True, True, False], [True, True, False], [False, False, True]]
    """
    own_positive = text_id == p_id[:, None]                          # (r, B)
    own_query = text_id == q_id[:, None]                             # (r, B)
    same_query = asked_id == q_id[:, None]                           # (r, B)
    return own_positive | own_query | same_query


# --------------------------------------------------------------------------------------------------
# Pre-finetuning (section 3.1, eq. 2)


def pre_loss(
    q: Tensor,      # (B, d) queries, unit rows
    p: Tensor,      # (B, d) passages, unit rows
    tau: float,
    q_id: Tensor,   # (B) integer ids of the query texts
    p_id: Tensor,   # (B) integer ids of the passage texts
    rows: slice = ALL,
) -> Tensor:        # scalar
    """Eq. 2: L_pre = mean_i -log  e^{s(q_i, p_i)} / sum_j e^{s(q_i, p_j)},  s = cos / tau.

    The other rows' passages are the negatives, less the duplicates; there are no hard ones. The mean is
    over the rows i of `rows`; j runs over all B.
    """
    # EXERCISE 2 (about 6 lines)
    j = torch.arange(len(q), device=q.device)                        # (B)
    i = j[rows]                                                      # (r)
    s = q[rows] @ p.T / tau                                          # (r, B)
    duplicates = duplicate_mask(q_id[rows], p_id[rows], p_id, q_id)  # (r, B)
    s = s.masked_fill(duplicates & (j != i[:, None]), -math.inf)     # (r, B) the positive itself stays
    return F.cross_entropy(s, i)
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# Fine-tuning (section 3.3, eq. 3)


def main_loss(
    q: Tensor,      # (B, d) inputs, unit rows
    p_pos: Tensor,  # (B, d) positive targets, unit rows
    p_neg: Tensor,  # (B, d) hard negative targets, unit rows (any row where n_id is -1)
    tau: float,
    q_id: Tensor,   # (B) integer ids of the input texts
    p_id: Tensor,   # (B) integer ids of the positive texts
    n_id: Tensor,   # (B) integer ids of the hard negative texts, -1 where the row has none
    rows: slice = ALL,
) -> Tensor:        # scalar
    """Eq. 3, with s = cos / tau:

    L_main = mean_i -log e^{s(q_i,p_i+)} / ( sum_j [e^{s(q_i,p_j+)} + 1[j!=i] e^{s(q_i,q_j)}]
                                             + e^{s(q_i,p_i-)} )

    The negatives: other rows' positives and queries (same-tower), less the duplicates, and the row's own
    hard negative, if it has one (gap 3). s(q_i, q_i) is left out: it is 1 / tau whatever is learned. The
    mean is over the rows i of `rows`; j runs over all B.
    """
    # EXERCISE 7 (about 15 lines)
    j = torch.arange(len(q), device=q.device)                        # (B)
    i = j[rows]                                                      # (r)
    others = j != i[:, None]                                         # (r, B) 1[j != i]
    q_i, q_i_id, p_i_id = q[rows], q_id[rows], p_id[rows]            # (r, d), (r), (r)

    positives = q_i @ p_pos.T / tau                                  # (r, B) s(q_i, p_j+)
    duplicates = duplicate_mask(q_i_id, p_i_id, p_id, q_id)          # (r, B)
    positives = positives.masked_fill(duplicates & others, -math.inf)

    queries = q_i @ q.T / tau                                        # (r, B) s(q_i, q_j)
    duplicates = duplicate_mask(q_i_id, p_i_id, q_id, q_id)          # (r, B)
    queries = queries.masked_fill(duplicates | ~others, -math.inf)

    own = (q_i * p_neg[rows]).sum(1, keepdim=True) / tau             # (r, 1) s(q_i, p_i-), no other row's
    own = own.masked_fill(n_id[rows, None] < 0, -math.inf)

    s = torch.cat([positives, queries, own], dim=1)                  # (r, 2B + 1)
    return F.cross_entropy(s, i)
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# Matryoshka (section 3.3, MRL)


def mrl_loss(
    loss: Callable[..., Tensor],  # of as many tensors as there are `vectors`, unit rows
    dims: Sequence[int],          # such as 768, 256
    *vectors: Tensor,             # each (B, d), not yet of length 1
) -> Tensor:                      # scalar
    """The sum over dims of the loss on the first dim dimensions, normalised again after the cut."""
    # EXERCISE 8 (about 5 lines)
    total = torch.zeros((), device=vectors[0].device)
    for dim in dims:
        short = [truncate_dim(x, dim) for x in vectors]              # each (B, dim)
        total = total + loss(*short)
    return total
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# The loop, for both stages


@dataclass
class TrainConfig:
    """A field is a flag of `prefinetune` and `finetune`; the paper states no value but dims, 768 and 256."""

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
    micro_batch: int = flag(0, "texts of mean length in memory at a time (gradient caching); 0: all")
    mix: str = flag("sets", "a batch holds rows of one of the sets, or mixed ones, or of all tasks alike: "
                            "sets, mixed or tasks")
    unified: bool = flag(False, "appendix B's formats also for an --init that has its makers' (see README)")
    eval: str = flag("", "BEIR folder: nDCG@10 of its dev split at each save, the best kept in OUT/best")
    save_every: int = flag(0, "steps from one checkpoint to the next; 0: one at the end")
    resume: bool = flag(False, "continue from OUT's last checkpoint: the same bytes as without a stop")


def learning_rate(step: int, steps: int, max_lr: float, warmup: float) -> float:
    """Linear warm-up to max_lr over the share `warmup` of the steps, then linear decay to 0."""
    warmup_steps = max(1.0, warmup * steps)
    rising = (step + 1) / warmup_steps
    falling = (steps - step) / max(1.0, steps - warmup_steps)
    return max_lr * min(rising, falling, 1.0)


def batch_loss(
    stage: str,     # "prefinetune" (eq. 2) or "finetune" (eq. 3)
    tau: float,
    ids: Tensor,    # (3, B) ids of the rows' inputs, positives and hard negatives (-1: none)
) -> Callable[..., Tensor]:
    """The stage's loss of one batch, as a function of its vectors."""
    q_id, p_id, n_id = ids
    if stage == "prefinetune":
        return functools.partial(pre_loss, tau=tau, q_id=q_id, p_id=p_id)
    return functools.partial(main_loss, tau=tau, q_id=q_id, p_id=p_id, n_id=n_id)


def train(
    model: Gecko,                            # changed in place
    stage: str,                              # "prefinetune" (eq. 2) or "finetune" (eq. 3)
    sets: Sequence[Sequence[Record]],        # the mixture of section 3.3
    c: TrainConfig,
    weights: Sequence[float] | None = None,  # of the sets; None: all alike
    title: str = "",                         # of the progress bar
    out: Path | None = None,                 # the folder for metrics.jsonl and checkpoints
) -> list[float]:                            # the loss of each step
    """Train on batches of the mixture. A loss or gradient that is not finite is an InputError."""
    # the data: tokens, text ids, and which rows each step has
    d = model.encoder.config.hidden_size
    dims = read_dims(c.dims, d)
    S = 2 if stage == "prefinetune" else 3                           # sides of a row: eq. 2 has no hard negative
    tokens, text_ids = tokenised(model, sets, c.max_length)          # text_ids: (rows, 3)
    steps = c.steps or max(1, int(c.epochs * len(text_ids) / c.batch_size))
    plan = batches(sets, weights, c.mix, c.batch_size, steps, c.seed)  # row numbers of every step
    check_negatives(stage, text_ids, plan)

    # the optimiser, and the run's folder; `key` holds all that decides the result, so that nothing else resumes it
    max_lr = c.lr or (1e-2 if is_bag(model.encoder) else 3e-5)
    parameters = [p for p in model.encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=max_lr, weight_decay=c.weight_decay, fused=True)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=c.precision == "bf16")
    model.dims = tuple(dims)
    settings = f"{stage} {replace(c, eval='', save_every=0, resume=False)} {model.encoder.config}"
    key = digest(settings, itertools.chain([text_ids], plan, model.encoder.parameters(), tokens))
    dev = read_beir(c.eval, "dev") if c.eval else None
    measure = (lambda: means(beir_scores(model, dev))) if dev else None
    this_run = Run(out, model.encoder, optimiser, steps, key, functools.partial(save, model), measure)
    losses = this_run.resume(c.resume)                               # of the steps that are done already
    bar = tqdm(range(len(losses), steps), desc=title or stage, unit="step", initial=len(losses),
               total=steps, disable=processes()[0] > 0)

    def embed(ids: Tensor) -> Tensor:                                # (n) -> (n, d), 0 where there is no text
        x = torch.zeros(len(ids), d, dtype=parameters[0].dtype, device=model.device)
        there = ids >= 0                                             # (n)
        if there.any():
            with autocast:
                vectors = model.embed([tokens[i] for i in ids[there].tolist()])
            x[there] = vectors.to(x.dtype)
        return x

    for step in bar:
        model.encoder.train()
        torch.manual_seed(derive_seed(c.seed, step))                 # the same dropout in a resumed run
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, max_lr, c.warmup)
        ids = torch.from_numpy(text_ids[plan[step]]).T.to(model.device)   # (3, B)
        loss_of = batch_loss(stage, c.tau, ids)
        optimiser.zero_grad(set_to_none=True)
        if c.micro_batch == 0 and processes()[1] == 1:
            vectors = [embed(side) for side in ids[:S]]              # q, p_pos and p_neg, each (B, d)
            loss = mrl_loss(loss_of, dims, *vectors)
            loss.backward()
        else:                                                        # a batch larger than memory, or processes
            in_blocks = functools.partial(blockwise_loss, loss_of, truncate_dim, dims)
            loss = cached_backward(embed, in_blocks, ids[:S], tokens, c.micro_batch, d, parameters, (c.seed, step))
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.clip)
        this_run.check_finite(step + 1, loss.item(), norm.item())
        optimiser.step()
        losses.append(loss.item())
        this_run.log(step=step + 1, loss=losses[-1], lr=optimiser.param_groups[0]["lr"])
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
        if step + 1 == steps or c.save_every and (step + 1) % c.save_every == 0:
            this_run.checkpoint(losses)
    model.encoder.eval()
    return losses


def read_dims(text: str, d: int) -> list[int]:
    """"384,128" -> [384, 128]; each at most d, the model's dimension, which alone is what "" gives."""
    parts = text.split(",") if text else [str(d)]
    for part in parts:
        if not part.strip().isdecimal() or not 1 <= int(part) <= d:
            raise InputError(f"--dims {text}: give numbers from 1 to {d} with commas between")
    return [int(part) for part in parts]


def tokenised(model: Gecko, sets: Sequence[Sequence[Record]], max_length: int,
              ) -> tuple[list[array[int]], np.ndarray]:
    """The tokens of every distinct text, and the ids of the texts of all sets' rows, (rows, 3).

    A row of ids is input, positive, hard negative (-1: none). Equal texts have equal ids, their places
    among the tokens, which is what the losses mask duplicates by. A hard negative that is its row's own
    query, or a positive of the same query in any row, is left out here: eq. 3 never meets one.
    """
    ids: dict[str, int] = {}                                         # of formatted texts
    queries: dict[str, int] = {}                                     # of queries alone, whatever their task
    rows = []
    for row in itertools.chain(*sets):
        texts = [-1 if text is None else ids.setdefault(text, len(ids)) for text in formatted(row, model.formats)]
        rows.append([*texts, queries.setdefault(row["query"], len(queries))])
    q_id, p_id, n_id, query = np.array(rows).T                       # 4 of (rows)
    pair = query * len(ids)                                          # pair + id: one number for query and text
    answers = np.isin(pair + n_id, pair + p_id)                      # (rows) p_i- is a positive of q_i somewhere
    hard = n_id >= 0                                                 # (rows) what `answers` says of -1 is void
    left_out = hard & (answers | (n_id == q_id))                     # (rows)
    if left_out.any():
        say_first(f"{left_out.sum()} of {hard.sum()} hard negatives are left out: each answers its query or is it")
    n_id = np.where(left_out, -1, n_id)                              # (rows)
    tokens = model.tokens(list(ids), max_length)
    if model.truncated:
        say_first(f"{model.truncated} of {len(tokens)} texts are cut at {max_length} tokens")
    return tokens, np.stack([q_id, p_id, n_id], axis=1)


def say_first(line: str) -> None:
    """To stderr, once for all processes."""
    if processes()[0] == 0:
        tqdm.write(line, file=sys.stderr)


def check_negatives(stage: str, text_ids: np.ndarray, plan: Sequence[np.ndarray]) -> None:
    """Where no row of a batch has a negative, its loss is 0: an InputError if no batch has one, else a warning.

    With all vectors equal, a row's loss is log(1 + its negatives), and so 0 exactly where it has none.
    """
    idle = 0
    for rows in plan:
        loss = batch_loss(stage, 1.0, torch.from_numpy(text_ids[rows]).T)
        ones = [torch.ones(len(rows), 1)] * (2 if stage == "prefinetune" else 3)   # each (B, 1)
        starts = range(0, len(rows), 64)                             # the first rows decide, as a rule
        idle += all(loss(*ones, rows=slice(start, start + 64)) == 0 for start in starts)
    what = (f"in {idle} of {len(plan)} steps no row has a negative, so nothing is learned: give rows of other "
            "queries and positives, a larger --batch-size, or --mix mixed")
    if idle == len(plan):
        raise InputError(what)
    if idle:
        say_first(what)


def beir_scores(model: Gecko, beir: Beir, dim: int | None = None) -> dict[str, list[float]]:
    q, P = encode_beir(model, beir, "question answering", dim)       # (Q, dim) and (P, dim)
    return retrieval_scores(rankings(beir, q, P), beir)


# --------------------------------------------------------------------------------------------------
# The recipe: the paper's section 3, top to bottom


SMALL = TrainConfig(batch_size=512, tau=0.1, dims="384,128")         # chosen on the dev questions


@dataclass
class Sizes:
    """How much of everything the recipe does; the defaults take minutes on two cores."""

    pairs: int = 600_000        # title-body pairs
    pre_steps: int = 1000       # of pre-finetuning
    queries: int = 8            # generated queries a passage (the paper: 6.6M in all)
    steps: int = 800            # of each training on generated queries
    lr: float = 2e-3            # of the same
    pair_weight: float = 0.5    # title-body pairs in the mixture for each generated query (section 3.3)


def recipe(out: Path, seed: int = 0, sizes: Sizes | None = None,
           corpus: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """Pre-finetune, generate, mine, fine-tune, evaluate, on the built-in corpus if none is given."""
    sizes = sizes or Sizes()
    c = replace(SMALL, seed=seed, mix="mixed")
    corpus = corpus or builtin_corpus()
    write_jsonl(out / "corpus.jsonl", corpus)

    print("3.1  Pre-finetuning on title-body pairs (eq. 2)")
    pairs = builtin_pairs(corpus, sizes.pairs, seed)
    start = untrained(corpus, pairs, seed)
    pre = copy.deepcopy(start)
    train(pre, "prefinetune", [pairs], replace(c, steps=sizes.pre_steps), title="pre-finetune")
    save(pre, out / "pre")

    print("3.2  FRet, step 1: the LLM gives a task and a query for passages")
    author = Offline(corpus, None, list(llm.FREQUENT_TASKS), seed)
    count = sizes.queries * len(corpus)
    drawn = llm.generate(author, corpus, count, seed)
    llm.write_kept(out / "queries.jsonl", drawn, count, "generate")
    queries = llm.read_queries(out / "queries.jsonl", corpus)

    print("3.2  The initial retriever, trained on (q, p_seed)")
    c = replace(c, steps=sizes.steps, lr=sizes.lr)
    mixture = [1.0, sizes.pair_weight]                               # generated queries, pairs
    retriever = copy.deepcopy(pre)
    train(retriever, "prefinetune", [queries, pairs], c, mixture, "initial retriever")
    save(retriever, out / "retriever")

    print("3.2  FRet, step 2: the retriever's top 20, ranked twice by the same LLM, fused, relabelled")
    # the author again, with the retriever's cosine to rank by
    ranker = Offline(corpus, llm.similarity(retriever), list(llm.FREQUENT_TASKS), seed)
    mined = llm.mine(ranker, retriever, corpus, queries, seed=seed)
    llm.write_kept(out / "fret.jsonl", mined, len(queries), "mine")
    rows = [row for _, row in read_jsonl(out / "fret.jsonl")]

    print("3.3  Fine-tuning on the mixture of FRet and pairs (eq. 3, Matryoshka)")
    gecko = copy.deepcopy(pre)                                       # not the retriever: both start from pre
    train(gecko, "finetune", [rows, pairs], c, mixture, "fine-tune")
    save(gecko, out / "gecko")

    moved = np.mean([row["positive_id"] != row["seed_id"] for row in rows])
    print(f"p+ differs from p_seed in {moved:.1%} of {len(rows)} records (paper: about 15%)")
    stages = {"untrained": start, "BM25": None, "pre-finetuned": pre, "+ (q, p_seed)": retriever,
              "+ FRet (p_1, p_20)": gecko}
    return results_table(out, stages, read_beir(questions_beir(out, corpus)))


def untrained(corpus: Sequence[dict[str, str]], pairs: Sequence[Record], seed: int = 0) -> Gecko:
    """The smallest encoder, with a tokenizer of all that it will read."""
    return tiny([f"{p['title']} {p['text']}" for p in corpus]
                + [f"{r['query']} {r['positive']['text']}" for r in pairs], seed)


# --------------------------------------------------------------------------------------------------
# What the recipe prints


def questions_beir(out: Path, corpus: Sequence[dict[str, str]]) -> Path:
    """The hand-written test questions as a BEIR folder beside the models; nothing trains on it."""
    folder, names = out / "questions", {p["_id"] for p in corpus}
    queries = []
    qrels = {split: ["query-id\tcorpus-id\tscore"] for split in ("dev", "test")}
    for n, (_, row) in enumerate(read_jsonl(Path(__file__).parent / "engine/questions.jsonl")):
        answers = [name for name in row["answers"] if name in names]
        if answers:
            queries.append({"_id": str(n), "text": row["query"]})
            qrels[row["split"]] += [f"{n}\t{name}\t1" for name in answers]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    for split, lines in qrels.items():
        with file_beside(folder / f"qrels/{split}.tsv") as new:
            new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def results_table(out: Path, models: dict[str, Gecko | None], test: Beir) -> dict[str, dict[str, Any]]:
    """Each stage on the test questions, printed and in results.json; None stands for BM25."""
    dims = SMALL.dims.split(",")
    print(f"\nTest questions ({len(test.queries)}), nDCG@10 and recall@100 at d = {' and d = '.join(dims)}; "
          "[95 % interval of the gain over the stage above, paired bootstrap]")
    table: dict[str, dict[str, Any]] = {}
    above: list[float] = []
    for stage, model in models.items():
        if model:
            scores = {dim: beir_scores(model, test, int(dim)) for dim in dims}
        else:
            scores = {dims[0]: retrieval_scores(bm25_rankings(test), test)}
        ndcg = scores[dims[0]]["ndcg@10"]
        low, high = paired_bootstrap(above or ndcg, ndcg)
        table[stage] = {dim: means(values) for dim, values in scores.items()}
        table[stage]["gain"] = [round(low, 4), round(high, 4)]
        columns = [f"{np.mean(x['ndcg@10']):.3f} {np.mean(x['recall@100']):.3f}" for x in scores.values()]
        if model is None:
            columns.append("-")                                      # BM25 has no dimensions
        print(f"  {stage:20} {'   '.join(columns):26}   " + (f"[{low:+.3f}, {high:+.3f}]" if above else ""))
        above = ndcg
    write_json(out / "results.json", table)
    return table


def write_json(path: Path, content: Any) -> None:
    with file_beside(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Command line


CHOICES = {"precision": ("float32", "bf16"), "mix": ("sets", "mixed", "tasks")}
POSITIVE = ("tau", "batch_size", "clip", "max_length")


def checked(c: TrainConfig) -> TrainConfig:
    """The same configuration; what cannot be run is one line, before anything is read or written."""
    for name, value in vars(c).items():
        given = f"--{name.replace('_', '-')} {value}"
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{given}: give " + " or ".join(CHOICES[name]))
        if name in POSITIVE and not 0 < value < math.inf:
            raise InputError(f"{given}: give a number above 0")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise InputError(f"{given}: give 0 or a number above it")
    return c


def read_sets(items: Sequence[str]) -> tuple[list[list[Record]], list[float]]:
    """DATA or DATA:WEIGHT, each a file of records -> the sets and their weights."""
    sets, weights = [], []
    for item in items:
        path, _, weight = item.rpartition(":")
        if not path or Path(item).exists():
            path, weight = item, "1"
        if not weight.replace(".", "", 1).isdecimal() or float(weight) == 0:
            raise InputError(f"{item}: give DATA or DATA:WEIGHT; a weight is a number above 0")
        sets.append(read_records(path, candidates=False))
        weights.append(float(weight))
    return sets, weights


def train_command(args: argparse.Namespace) -> None:
    """prefinetune and finetune: read the sets, train, write the model; under torchrun on several processes."""
    c = checked(from_flags(TrainConfig, args))
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                     # started by torchrun
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a long timeout, because the others wait while the first process evaluates
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    first = processes()[0] == 0
    sets, weights = read_sets(args.data)
    if first:
        say(stage=args.command, init=args.init, out=args.out, rows=[len(rows) for rows in sets],
            processes=processes()[1], **vars(c))
    if args.init == "tiny":
        model = tiny([f"{r['query']} {r['positive'].get('title', '')} {r['positive']['text']}"
                      for r in itertools.chain(*sets)], c.seed)
        model.encoder.to("cuda" if cuda else "cpu")
    else:
        model = load(args.init)
    if c.unified:
        model.formats = dict(FORMATS)
    out = Path(args.out)
    losses = train(model, args.command, sets, c, weights, out=out)
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        save_into(functools.partial(save, model), out)
        print(f"wrote {args.out}: {len(losses)} steps, loss {losses[0]:.3f} -> {np.mean(losses[-20:]):.3f}")
        print(f"next: python train.py evaluate --model {args.out} --beir DIR")


def evaluate_command(args: argparse.Namespace) -> None:
    """Figures of retrieval, similarity and MTEB; each set's task by the paper's Table 9."""
    if not args.beir and not args.sts and not args.mteb:
        raise InputError("nothing to evaluate on; give --beir DIR, --sts FILE or --mteb TASK")
    tasks = mteb_tasks(args.mteb) if args.mteb else []
    model = load(args.model)
    say(model=args.model, dim=args.dim or model.encoder.config.hidden_size, split=args.split,
        task=args.task or "by Table 9")
    results: dict[str, dict[str, float]] = {}
    for name, folder in zip(short_names(args.beir), args.beir, strict=True):
        task, symmetric = table_9(Path(folder).resolve().name)
        beir = read_beir(folder, args.split)
        q, P = encode_beir(model, beir, args.task or task, args.dim, symmetric, progress="passages")
        scores = retrieval_scores(rankings(beir, q, P), beir)
        results[name] = {measure: float(np.mean(values)) for measure, values in scores.items()}
    for name, path in zip(short_names(args.sts), args.sts, strict=True):
        task, _ = table_9(Path(path).stem, "STS")
        results[name] = {"spearman": float(sts_terms(model, path, args.dim, args.task or task).mean())}
    if tasks:
        adapter = ForMteb(model, Path(args.model).resolve().name, format_query, args.dim, args.task)
        results |= mteb_scores(adapter, tasks, args.out)
    for name, values in results.items():
        print(name, "  ".join(f"{measure} {value:.4f}" for measure, value in values.items()))
    if args.out:
        out = Path(args.out, "scores.json") if tasks else Path(args.out)
        write_json(out, results)
        print(f"wrote {out}")


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
        command.add_argument("--init", required=True, help="a model folder, a hub id, or tiny")
        command.add_argument("--out", required=True, help="the folder to write")
        add_flags(command, TrainConfig)
    evaluate = commands.add_parser("evaluate", help="retrieval and similarity figures of a model")
    evaluate.add_argument("--model", required=True, help="a model folder")
    evaluate.add_argument("--mteb", nargs="+", default=[],
                          help="names of mteb's tasks, or of a benchmark, such as 'MTEB(eng, v1)', the paper's")
    evaluate.add_argument("--dim", type=int, help="cut to this many dimensions (default: all)")
    evaluate.add_argument("--out", help="write the figures to this JSON file; with --mteb, to this folder")
    evaluate.add_argument("--beir", action="append", default=[],
                          help="a BEIR folder (ties by id, descending, as trec_eval); may be repeated")
    evaluate.add_argument("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
    evaluate.add_argument("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
    evaluate.add_argument("--task", help="the task of all sets (default: by the set's name, Table 9)")
    args = parser.parse_args()
    if args.command is None:
        began, out = time.time(), Path(args.out)
        recipe(out, args.seed)
        seconds = time.time() - began
        print(f"{seconds:.0f} s in all; {out}/ holds corpus, queries, fret, pre, retriever, gecko, results")
        print(f'next: python gecko.py search "how do I round a number up" --model {out}/gecko')
        print(f"      python llm.py show {out}/fret.jsonl --changed")
    elif sys.argv[1] != args.command:                                # argparse would drop it without a word
        raise InputError(f"{sys.argv[1]} before {args.command}: there it is the recipe's; put it after the command")
    elif args.command == "evaluate":
        evaluate_command(args)
    else:
        train_command(args)


if __name__ == "__main__":
    run(main)
