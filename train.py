"""Losses, training loop, evaluation and the whole recipe (Gecko, arXiv 2403.20327, sections 3.1-3.3).

Eq. 2 pre-finetunes on pairs with in-batch negatives. Eq. 3 fine-tunes on records with the row's own
hard negative and same-tower negatives, repeated on the first dimensions (Matryoshka). Each equation
is one pure function; one loop trains both stages.

    python train.py                                       the whole recipe in small -> runs/demo/
    python train.py prefinetune|finetune DATA[:WEIGHT]... --init DIR|HUB-ID|tiny --out DIR
    torchrun --nproc-per-node N train.py finetune ...     the same gradient on N processes
    python train.py evaluate --model DIR --beir DIR

Where we differ from the paper, or fill a gap in it:
1. tau, optimiser, learning rate, batch size, steps, weight of the Matryoshka terms (3.3, silent):
   the fields of TrainConfig; AdamW, linear warm-up and decay; all dimensions weigh the same.
2. Duplicates in a batch (silent): a text equal to a row's input or positive is never its negative.
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
import shutil
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

import llm as fret
from data import (
    Record,
    batches,
    builtin_corpus,
    builtin_pairs,
    formatted,
    read_records,
)
from engine.evaluate import (
    Beir,
    bm25_rankings,
    encode_beir,
    means,
    ndcg,
    paired_bootstrap,
    rankings,
    read_beir,
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
from engine.packed import length_batches
from engine.runs import Run, digest, save_into
from engine.scale import all_reduce_sum, derive_seed, processes
from gecko import (
    FORMATS,
    Gecko,
    format_query,
    load,
    save,
    tiny,
    truncate_dim,
)

# B rows in a batch, d the model's dimension, tau the temperature, s = cos / tau. The vectors of a loss,
# q, p_pos and p_neg, are (B, d) with rows of length 1, so that the cosine is their inner product.

# --------------------------------------------------------------------------------------------------
# Equal texts are no negatives of each other (gap 2)


def duplicate(
    q_id: Tensor,     # (B) integer ids of the rows' query texts
    p_id: Tensor,     # (B) integer ids of the rows' positive texts
    text: Tensor,     # (C) integer ids of candidate negatives
    answers: Tensor,  # (C) integer ids of the queries that they came with; `text` again if with none
) -> Tensor:          # (B, C)
    """True where candidate j is row i's own query or positive, or the positive of the same query."""
    return (text[None] == p_id[:, None]) | (text[None] == q_id[:, None]) \
        | (answers[None] == q_id[:, None])                           # (B, C)


# --------------------------------------------------------------------------------------------------
# Pre-finetuning (section 3.1, eq. 2)


def pre_loss(
    q: Tensor,      # (B, d) queries, unit rows
    p: Tensor,      # (B, d) passages, unit rows
    tau: float,
    q_id: Tensor,   # (B) integer ids of the query texts
    p_id: Tensor,   # (B) integer ids of the passage texts
) -> Tensor:        # scalar
    """Eq. 2: L_pre = mean_i -log  e^{s(q_i, p_i)} / sum_j e^{s(q_i, p_j)},  s = cos / tau.

    The other rows' passages are the negatives, less the duplicates; there are no hard ones.
    """
    # EXERCISE 2 (about 4 lines)
    s = q @ p.T / tau                                                # (B, B)
    others = ~torch.eye(len(q), dtype=torch.bool, device=q.device)   # (B, B) 1[j != i]
    s = s.masked_fill(others & duplicate(q_id, p_id, p_id, q_id), -math.inf)
    return F.cross_entropy(s, torch.arange(len(q), device=q.device))
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
    every: bool = False,  # not eq. 3, to compare: all rows' hard negatives, as most libraries do
) -> Tensor:        # scalar
    """Eq. 3, with s = cos / tau:

    L_main = mean_i -log e^{s(q_i,p_i+)} / ( sum_j [e^{s(q_i,p_j+)} + 1[j!=i] e^{s(q_i,q_j)}]
                                             + e^{s(q_i,p_i-)} )

    The negatives: other rows' positives and queries (same-tower), less the duplicates, and the row's own
    hard negative, if it has one (gap 3). s(q_i, q_i) is left out: it is 1 / tau whatever is learned.
    """
    # EXERCISE 7 (about 13 lines)
    B, _ = q.shape
    itself = torch.eye(B, dtype=torch.bool, device=q.device)         # (B, B) 1[j != i] is its inverse
    positives = q @ p_pos.T / tau                                    # (B, B) s(q_i, p_j+)
    positives = positives.masked_fill(~itself & duplicate(q_id, p_id, p_id, q_id), -math.inf)
    queries = q @ q.T / tau                                          # (B, B) s(q_i, q_j)
    queries = queries.masked_fill(itself | duplicate(q_id, p_id, q_id, q_id), -math.inf)
    own = (q * p_neg).sum(1, keepdim=True) / tau                     # (B, 1) s(q_i, p_i-), no other row's
    own = own.masked_fill(n_id[:, None] < 0, -math.inf)
    if every:
        rest = itself | (n_id[None] < 0) | duplicate(q_id, p_id, n_id, n_id)  # (B, B)
        own = torch.cat([own, (q @ p_neg.T / tau).masked_fill(rest, -math.inf)], dim=1)  # (B, 1 + B)
    s = torch.cat([positives, queries, own], dim=1)                  # (B, 2B + 1)
    return F.cross_entropy(s, torch.arange(B, device=q.device))
    # END EXERCISE


# --------------------------------------------------------------------------------------------------
# Matryoshka (section 3.3, MRL)


def mrl_loss(
    loss: Callable[..., Tensor],  # of as many tensors as there are `vectors`, unit rows
    dims: Sequence[int],          # such as 768, 256
    *vectors: Tensor,             # each (B, d), not yet of length 1
) -> Tensor:                      # scalar
    """The sum over dims of the loss on the first dim dimensions, normalised again after the cut."""
    # EXERCISE 8 (about 2 lines)
    terms = [loss(*(truncate_dim(x, dim) for x in vectors)) for dim in dims]
    return torch.stack(terms).sum()
    # END EXERCISE


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
    micro_batch: int = flag(0, "texts of mean length in memory at a time (gradient caching); 0: all")
    mix: str = flag("sets", "a batch holds rows of one of the sets, or mixed ones, or of all tasks alike: "
                            "sets, mixed or tasks")
    negatives: str = flag("own", "hard negatives of a row: own (eq. 3), or all rows' (to compare)")
    unified: bool = flag(False, "appendix B's formats also for an --init that has its makers' (see README)")
    eval: str = flag("", "BEIR folder: nDCG@10 of its dev split at each save, the best kept in OUT/best")
    save_every: int = flag(0, "steps from one checkpoint to the next; 0: one at the end")
    resume: bool = flag(False, "continue from OUT's last checkpoint: the same bytes as without a stop")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up to `peak` over the share `warmup` of the steps, then linear decay to 0."""
    rise = max(1.0, warmup * steps)
    return peak * min((step + 1) / rise, (steps - step) / max(1.0, steps - rise), 1.0)


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
    dims = read_dims(c.dims, model.encoder.config.hidden_size)
    tokens, sides = tokenised(model, sets, c.max_length)
    steps = c.steps or max(1, int(c.epochs * sum(len(rows) for rows in sets) / c.batch_size))
    plan = batches(sets, weights, c.mix, c.batch_size, steps, c.seed)  # row numbers of every step
    peak = c.lr or (1e-2 if model.encoder.config.num_hidden_layers == 0 else 3e-5)
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=peak, weight_decay=c.weight_decay, fused=True)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=c.precision == "bf16")
    model.dims = tuple(dims)
    dev = read_beir(c.eval, "dev") if out and c.eval and processes()[0] == 0 else None
    measure = (lambda: means(retrieval_scores(
        rankings(dev, *encode_beir(model, dev, "question answering")), dev))) if dev else None
    same = replace(c, eval="", save_every=0, resume=False)           # flags that change no weight
    key = digest(f"{stage} {same} {model.encoder.config}",
                 itertools.chain([sides], plan, model.encoder.parameters(), tokens))
    log = Run(out, model.encoder, optimiser, steps, key, functools.partial(save, model), measure)
    losses = log.resume(c.resume)                                    # of the steps that are done already
    bar = tqdm(range(len(losses), steps), desc=title or stage, unit="step", initial=len(losses),
               total=steps, disable=processes()[0] > 0)

    def embed(text_ids: Tensor) -> Tensor:                           # (texts) -> (texts, d)
        return model.embed([tokens[i] for i in text_ids.tolist()])

    for step in bar:
        model.encoder.train()
        torch.manual_seed(derive_seed(c.seed, step))                     # so a step depends on no other's dropout
        ids = torch.from_numpy(sides[plan[step]]).T.to(model.device)   # (3, B)
        q_id, p_id, n_id = ids                                       # 3 of (B); n_id -1: none
        optimiser.zero_grad(set_to_none=True)
        if c.micro_batch == 0 and processes()[1] == 1:               # all in memory at a time, on one device
            with autocast:
                q, p_pos = embed(q_id), embed(p_id)                  # (B, d) twice
                p_neg = torch.zeros_like(q)                          # (B, d)
                hard = n_id >= 0                                     # (B)
                if stage == "finetune" and hard.any():
                    p_neg[hard] = embed(n_id[hard]).to(q.dtype)
            if stage == "prefinetune":
                loss = mrl_loss(lambda q, p: pre_loss(q, p, c.tau, q_id, p_id), dims, q, p_pos)
            else:
                loss = mrl_loss(lambda q, p, n: main_loss(q, p, n, c.tau, q_id, p_id, n_id,
                                                          c.negatives == "all"), dims, q, p_pos, p_neg)
            loss.backward()
        else:                                                        # any batch size, any number of processes
            loss = backward(model, stage, c, dims, autocast, tokens, ids, step)
        losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(trained, c.clip)
        log.check_finite(step, losses[-1], norm.item(), plan[step], [len(rows) for rows in sets])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak, c.warmup)
        optimiser.step()
        log.log(bar, losses, len(q_id))
        if out and (step + 1 == steps or c.save_every and (step + 1) % c.save_every == 0):
            log.checkpoint(step + 1)
    model.encoder.eval()
    return losses


def read_dims(text: str, d: int) -> list[int]:
    """"384,128" -> [384, 128]; each at most d, the model's dimension, which alone is what "" gives."""
    parts = text.split(",") if text else [str(d)]
    if not all(part.strip().isdecimal() and 1 <= int(part) <= d for part in parts):
        raise InputError(f"--dims {text}: give numbers from 1 to {d} with commas between")
    return [int(part) for part in parts]


def tokenised(model: Gecko, sets: Sequence[Sequence[Record]], max_length: int,
              ) -> tuple[list[array[int]], np.ndarray]:
    """Every distinct text's tokens, and the ids of the texts of all sets' rows, (rows, 3).

    A row of ids is input, positive, hard negative (-1: none). Equal texts have equal ids, the places of
    their tokens, which is what the losses mask duplicates by.
    """
    ids: dict[str, int] = {}
    sides = []
    for row in itertools.chain(*sets):
        query, positive, negative = formatted(row, model.formats)
        own = None if negative in (query, positive) else negative    # a text is not its own negative
        sides.append([-1 if text is None else ids.setdefault(text, len(ids)) for text in (query, positive, own)])
    tokens = [array("i", text) for text in model.tokens(list(ids), max_length)]
    if model.truncated and processes()[0] == 0:
        tqdm.write(f"{model.truncated} of {len(tokens)} texts are cut at {max_length} tokens", file=sys.stderr)
    return tokens, np.array(sides)


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
    """Pre-finetune, generate, mine, fine-tune, evaluate, with `offline`: what ladder.json then holds.

    The corpus is the built-in one, if none is given; `out` gets every stage's file.
    """
    began, n = time.time(), sizes or Sizes()
    c = checked(replace(SMALL, seed=seed, mix="mixed"))

    print("3.1  Pre-finetuning on title-body pairs (eq. 2)")
    corpus = corpus or builtin_corpus()
    write_jsonl(out / "corpus.jsonl", corpus)
    pairs = builtin_pairs(corpus, n.pairs, seed)
    blank = untrained(corpus, pairs, seed)
    pre = copy.deepcopy(blank)
    train(pre, "prefinetune", [pairs], replace(c, steps=n.pre_steps), title="pre-finetune")

    print("3.2  FRet, step 1: a task and a query for passages, then the first embedder on (q, p_seed)")
    drawn = n.queries * len(corpus)
    fret.write_kept(out / "queries.jsonl", fret.generate(
        Offline(corpus, None, list(fret.TASKS), seed), corpus, drawn, seed), drawn, "generate")
    queries = fret.read_queries(out / "queries.jsonl", corpus)
    first = copy.deepcopy(pre)
    mixture = [1.0, n.pair_weight]                                   # generated queries, pairs
    train(first, "prefinetune", [queries, pairs], replace(c, steps=n.steps, lr=n.lr), mixture, "first embedder")
    save(first, out / "seed")
    save(pre, out / "pre")                                           # where the rows of tests/lab/tables.py start

    print("3.2  FRet, step 2: the top 20, ranked twice, fused, relabelled")
    judge = Offline(corpus, fret.similarity(first), list(fret.TASKS), seed)  # the same "LLM"
    fret.write_kept(out / "fret.jsonl", fret.mine(judge, first, corpus, queries, seed=seed),
                    len(queries), "mine")
    rows = [row for _, row in read_jsonl(out / "fret.jsonl")]

    print("3.3  Fine-tuning on the mixture of FRet and pairs (eq. 3, Matryoshka)")
    gecko = copy.deepcopy(pre)
    train(gecko, "finetune", [rows, pairs], replace(c, steps=n.steps, lr=n.lr), mixture, "fine-tune")
    save(gecko, out / "gecko")

    show_relabelled(rows, corpus)
    table = ladder(out, corpus, judge, {"untrained": blank, "pre-finetuned": pre,
                                        "+ (q, p_seed)": first, "+ FRet (p_1, p_20)": gecko})
    print(f"{time.time() - began:.0f} s in all; {out}/ holds corpus, queries, fret, seed, gecko, ladder")
    print(f'next: python gecko.py search "how do I round a number up" --model {out}/gecko')
    return table


def untrained(corpus: Sequence[dict[str, str]], pairs: Sequence[Record], seed: int = 0) -> Gecko:
    """The smallest encoder, with a tokenizer of all that it will read."""
    return tiny([f"{p['title']} {p['text']}" for p in corpus]
                + [f"{r['query']} {r['positive']['text']}" for r in pairs], seed)


# ==================================================================================================
# In practice: batches larger than memory, several processes, checkpoints, evaluation, what the recipe
# prints, the command line.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Any batch size, any number of processes


def backward(
    model: Gecko,
    stage: str,
    c: TrainConfig,
    dims: Sequence[int],
    autocast: torch.autocast,
    tokens: Sequence[Sequence[int]],
    ids: Tensor,    # (3, B) text ids of all processes' rows: inputs, positives, hard negatives or -1
    step: int,
) -> Tensor:        # scalar
    """Replaces the loop's embed, loss and loss.backward(): the same gradient, in bounded memory.

    Gradient caching (Gao et al. 2021): embed all texts without a graph, take the loss's gradient on
    the vectors, embed each micro-batch again, with the same dropout, and hand it its part of that
    gradient. Of several processes each embeds and scores its own rows, against everybody's vectors.
    """
    B = ids.shape[1]
    rank, size = processes()
    mine = slice(B * rank // size, B * (rank + 1) // size)           # this process's rows
    wanted = ids[:2 if stage == "prefinetune" else 3]                # (S, B) S sides: eq. 2 has no hard negatives
    place = torch.arange(wanted.numel(), device=ids.device).view_as(wanted)[:, mine].flatten()
    place = place[wanted.flatten()[place] >= 0]                      # (texts) the rows of x that are mine to fill
    texts = [tokens[i] for i in wanted.flatten()[place].tolist()]
    parts = micro_batches([len(t) for t in texts], c.micro_batch)

    # EXERCISE 9 (about 20 lines)
    def embed_part(n: int) -> Tensor:                                # (texts of part n, d)
        torch.manual_seed(derive_seed(c.seed, step, rank, n))            # the second time, the same dropout
        with autocast:
            return model.embed([texts[i] for i in parts[n]])

    x = torch.zeros(wanted.numel(), model.encoder.config.hidden_size, device=ids.device,
                    dtype=next(model.encoder.parameters()).dtype)    # (S * B, d)
    for n in range(len(parts)):
        with torch.set_grad_enabled(n == len(parts) - 1):            # the last one's graph is kept
            kept = embed_part(n)
        x[place[parts[n]]] = kept.detach().to(x.dtype)
    all_reduce_sum(x)                                                        # every process has all vectors
    loss, g = streamed_loss(x.view(*wanted.shape, -1), c.tau, dims, ids, mine, stage == "finetune",
                            c.negatives == "all")
    del x
    all_reduce_sum(loss)
    all_reduce_sum(g)                                                        # what others' rows say about mine
    g = g.view(wanted.numel(), -1)                                   # (S * B, d)
    for n in reversed(range(len(parts))):
        kept = kept if n == len(parts) - 1 else embed_part(n)
        kept.backward(g[place[parts[n]]].to(kept.dtype))
    # END EXERCISE
    for p in model.encoder.parameters():
        if p.requires_grad:                                          # each process has its rows' part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            all_reduce_sum(p.grad)
    return loss


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of texts in groups of like length, each about `size` texts of mean length in tokens."""
    if not lengths:
        return []
    if not size:
        return [list(range(len(lengths)))]
    return list(length_batches(lengths, max(1, size * sum(lengths) // len(lengths))))


BLOCK = 32 << 20   # bytes of one block of scores in the streamed loss


def streamed_loss(
    x: Tensor,       # (2 or 3, B, d) inputs, positives (and hard negatives), not of length 1
    tau: float,
    dims: Sequence[int],
    ids: Tensor,     # (3, B) their text ids
    mine: slice,     # the rows whose loss is taken, against all B rows' texts
    main: bool,      # eq. 3, else eq. 2
    every: bool = False,  # as in main_loss
    block: int = BLOCK,   # bytes
) -> tuple[Tensor, Tensor]:  # the rows' share of the loss, scalar; its gradient on x, (2 or 3, B, d)
    """Replaces mrl_loss of pre_loss or main_loss, and its backward to x: no B x B matrix.

    A block of rows is scored against all texts, its softmax taken, its gradient added up, then forgotten.
    Of u = a / |a|, with g' the gradient on u, the gradient on a is (g' - (g' . u) u) / |a|. Scores are
    s = u_q . u_p / tau, so that g' . u is a sum of softmax times score: `along`, one number a text.
    """
    B, lowest = x.shape[1], torch.finfo(x.dtype).min                 # finite: 0 * lowest is 0, 0 * inf is not
    keys = [1] + [0] * main + [2] * (main and every)                 # sides that are scored against all rows
    hide = duplicates_of(ids, keys)
    loss, g = x.new_zeros(()), torch.zeros_like(x)                   # (S, B, d)
    rows = max(1, block // (x.element_size() * B * len(keys)))
    for dim in dims:
        a = x[:, :, :dim]                                            # (S, B, dim)
        scale = 1 / torch.linalg.vector_norm(a, dim=2).clamp(min=1e-12)  # (S, B)
        along = torch.zeros_like(scale)                              # (S, B)
        for start in range(mine.start, mine.stop, rows):
            i = torch.arange(start, min(start + rows, mine.stop), device=x.device)  # (r)
            u = a[0, i] * scale[0, i, None]                          # (r, dim)
            scores = [hide(k, i, (u @ a[k].T).mul_(scale[k] / tau), lowest) for k in keys]  # each (r, B)
            target = scores[0].gather(1, i[:, None])[:, 0]           # (r) s(q_i, p_i+)
            parts = [s.logsumexp(1) for s in scores]                 # each (r)
            if main:
                own = ((u * a[2, i]).sum(1) * scale[2, i] / tau).masked_fill(ids[2, i] < 0, lowest)  # (r)
                parts.append(own)
            lse = torch.stack(parts).logsumexp(0)                    # (r) log of the sum below
            loss += (lse - target).sum() / B
            for k, s in zip(keys, scores, strict=True):
                w = (s - lse[:, None]).exp_()                        # (r, B) the softmax
                if k == 1:
                    w[torch.arange(len(i), device=i.device), i] -= 1  # the gradient of -s(q_i, p_i+)
                w /= B
                s *= w
                along[0, i] += s.sum(1)
                along[k] += s.sum(0)
                w *= scale[k] / tau
                g[0, i, :dim] += (w @ a[k]) * scale[0, i, None]
                g[k, :, :dim].addmm_(w.T, u)
            if main:                                                 # the same of the row's own hard negative
                w = (own - lse).exp() / B                            # (r)
                along[0, i] += w * own
                along[2, i] += w * own
                w = (w * scale[2, i] / tau)[:, None]                 # (r, 1)
                g[0, i, :dim] += w * a[2, i] * scale[0, i, None]
                g[2, i, :dim] += w * u
        for k in range(len(x)):
            g[k, :, :dim].addcmul_(a[k], (along[k] * scale[k] ** 2)[:, None], value=-1)
    return loss, g


def duplicates_of(ids: Tensor, keys: Sequence[int]) -> Callable[[int, Tensor, Tensor, float], Tensor]:
    """Replaces masked_fill(duplicate(...)) for a block: looks only at columns that can be duplicates.

    keys: sides, 0 inputs, 1 positives, 2 hard negatives. Few texts of a batch stand in it twice.
    """
    q_id, p_id, n_id = ids                                           # 3 of (B)
    _, number, count = torch.unique(ids[:2], return_inverse=True, return_counts=True)
    often = count[number] > 1                                        # (2, B) the text stands elsewhere too
    columns = {0: often[0], 1: often[0] | often[1], 2: torch.isin(n_id, ids[:2])}  # each (B)
    where = {k: columns[k].nonzero()[:, 0] for k in keys}

    def hide(k: int, i: Tensor, s: Tensor, value: float) -> Tensor:
        """s (r, B), the scores of rows i against side k, with what is no negative at `value`."""
        j, r = where[k], torch.arange(len(i), device=i.device)       # (C), (r)
        answers = n_id if k == 2 else q_id                           # a hard negative came with no query
        same = duplicate(q_id[i], p_id[i], ids[k, j], answers[j])    # (r, C)
        s[:, j] = s[:, j].masked_fill(same & (j != i[:, None]), value)
        if k != 1:
            s[r, i] = value                                          # 1[j != i]; p_i- has its own term
        if k == 2:
            s[:, n_id < 0] = value
        return s

    return hide


def save_final(model: Gecko, out: Path) -> None:
    """The model's files into a folder that holds the run's others too."""
    save_into(functools.partial(save, model), out)


# --------------------------------------------------------------------------------------------------
# What the recipe prints


def questions_beir(out: Path, corpus: Sequence[dict[str, str]]) -> Path:
    """The hand-written test questions as a BEIR folder beside the models; nothing trains on it."""
    folder, names = out / "questions", {p["_id"] for p in corpus}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "corpus.jsonl", folder / "corpus.jsonl")
    queries, qrels = [], {"dev": ["query-id\tcorpus-id\tscore"], "test": ["query-id\tcorpus-id\tscore"]}
    for n, (_, row) in enumerate(read_jsonl(fret.ENGINE / "questions.jsonl")):
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
    print(*fret.in_short(row, fret.passages_of([row], corpus)), sep="\n")


def ladder(out: Path, corpus: list[dict[str, str]], judge: Offline,
           models: dict[str, Gecko]) -> dict[str, dict[str, Any]]:
    """Each rung on the test questions; the judge on the dev questions. Writes ladder.json."""
    folder = questions_beir(out, corpus)
    test, dev = read_beir(folder, "test"), read_beir(folder, "dev")
    d, short = read_dims(SMALL.dims, models["untrained"].encoder.config.hidden_size)
    rungs = {"untrained": models["untrained"], "BM25": None, **models}
    table: dict[str, dict[str, Any]] = {}
    above: list[float] = []
    print(f"\nTest questions ({len(test.queries)}), nDCG@10 and recall@100 at d = {d} and d = {short}; "
          "[95 % interval of the gain over the rung above, paired bootstrap]")
    for name, model in rungs.items():
        found = {str(dim): rankings(test, *encode_beir(model, test, "question answering", dim))
                 for dim in (d, short)} if model else {str(d): bm25_rankings(test)}
        scores = {dim: retrieval_scores(ids, test) for dim, ids in found.items()}
        here = scores[str(d)]["ndcg@10"]
        low, high = paired_bootstrap(above or here, here)
        table[name] = {**{dim: means(of) for dim, of in scores.items()}, "gain": [round(low, 4), round(high, 4)]}
        shown = [f"{np.mean(of['ndcg@10']):.3f} {np.mean(of['recall@100']):.3f}" for of in scores.values()] + ["-"]
        print(f"  {name:20} {shown[0]}   {shown[1]:11}   " + f"[{low:+.3f}, {high:+.3f}]" * bool(above))
        above = here
    print("The judge on the dev questions, nDCG@10 of the first embedder's top 20, ranked again by")
    judged = rerank_scores(judge, models["+ (q, p_seed)"], dev, 20, "question answering")
    table["judge (dev)"] = means(judged)
    print("  " + "   ".join(f"{k} {v:.3f}" for k, v in table["judge (dev)"].items()))
    with file_beside(out / "ladder.json") as new:
        new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def rerank_scores(judge: fret.LLM, first: Gecko, beir: Beir, N: int, task: str, precision: str = "float32",
                  ) -> dict[str, list[float]]:
    """nDCG@10 of each query: the retriever's first N as they come, by QL, by RC and by their fusion."""
    by_id = {p["_id"]: p for p in beir.corpus}
    q, P = encode_beir(first, beir, task, precision=precision)
    if isinstance(judge, Offline):
        judge.similarity = fret.similarity(first, dict(zip(by_id, P, strict=True)))  # not made again
    nearest = {query: ids[:N] for query, ids in rankings(beir, q, P).items()}
    pairs = [(beir.queries[query], by_id[i]) for query, ids in nearest.items() for i in ids]
    QL, RC = judge.query_likelihood(pairs), judge.relevance(pairs)
    if None in QL or None in RC:
        raise fret.LLMError("a score is missing: a call failed; run again, the others are in the cache")
    scores: dict[str, list[float]] = {"retriever": [], "QL": [], "RC": [], "QL + RC": []}
    ends = itertools.accumulate(map(len, nearest.values()))
    for end, (query, ids) in zip(ends, nearest.items(), strict=True):
        ql, rc = (list[Any](x[end - len(ids):end]) for x in (QL, RC))
        four: list[list[Any]] = [[-i for i in range(len(ids))], ql, rc, fret.rrf(ql, rc)]
        for name, s in zip(scores, four, strict=True):
            order = sorted(range(len(ids)), key=lambda i: -s[i])
            scores[name].append(ndcg([ids[i] for i in order], beir.qrels[query]))
    return scores


# --------------------------------------------------------------------------------------------------
# Command line


CHOICES = {"precision": ("float32", "bf16"), "mix": ("sets", "mixed", "tasks"), "negatives": ("own", "all")}


def checked(c: TrainConfig) -> TrainConfig:
    """The same configuration; what cannot be run is one line, before anything is read or written."""
    for name, value in vars(c).items():
        given = f"--{name.replace('_', '-')} {value}"
        if value not in CHOICES.get(name, (value,)):
            raise InputError(f"{given}: give " + " or ".join(CHOICES[name]))
        if name in ("tau", "batch_size", "clip", "max_length") and not 0 < value < math.inf:
            raise InputError(f"{given}: give a number above 0")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise InputError(f"{given}: give 0 or a number above it")
    return c


def train_command(args: argparse.Namespace) -> None:
    """prefinetune and finetune: read the sets, train, write the model; under torchrun on several processes."""
    c, sets, weights = checked(from_flags(TrainConfig, args)), [], []
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                     # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the others wait while the first evaluates, so their patience is long
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=6))
    first = processes()[0] == 0
    for item in args.data:
        path, _, weight = (item, "", "1") if Path(item).exists() else item.rpartition(":")
        try:
            weights.append(float(weight))
        except ValueError as error:
            raise InputError(f"{item}: no such file; give DATA or DATA:WEIGHT") from error
        if not 0 < weights[-1] < math.inf:
            raise InputError(f"{item}: a weight is a number above 0")
        sets.append(read_records(path or item, candidates=False))
    if first:
        say(stage=args.command, init=args.init, out=args.out, rows=[len(s) for s in sets],
            processes=processes()[1], **vars(c))
    if args.init == "tiny":
        model = tiny([f"{r['query']} {r['positive'].get('title', '')} {r['positive']['text']}"
                      for r in itertools.chain(*sets)], c.seed)
        model.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        model = load(args.init)
    model.formats = dict(FORMATS) if c.unified else model.formats
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    losses = train(model, args.command, sets, c, weights, out=out)
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        save_final(model, out)
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
        with file_beside(out) as new:
            new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {out}" + (f"; mteb's own files are under {args.out}/results" if tasks else ""))


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
    evaluate.add_argument("--beir", action="append", default=[], help="a BEIR folder; may be repeated")
    evaluate.add_argument("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
    evaluate.add_argument("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
    evaluate.add_argument("--task", help="the task of all sets (default: by the set's name, Table 9)")
    args = parser.parse_args()
    if args.command is None:
        recipe(Path(args.out), args.seed)
    elif sys.argv[1] != args.command:                                # argparse would drop it without a word
        raise InputError(f"{sys.argv[1]} before {args.command}: there it is the recipe's; put it after the command")
    elif args.command == "evaluate":
        evaluate_command(args)
    else:
        train_command(args)


if __name__ == "__main__":
    run(main)
