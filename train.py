"""Losses, training loop, evaluation and the whole recipe (Gecko, arXiv 2403.20327, sections 3.1-3.3).

Eq. 2 pre-finetunes on pairs with in-batch negatives. Eq. 3 fine-tunes on records with the row's own
hard negative and same-tower negatives, repeated on the first dimensions (Matryoshka). Each equation
is one pure function; one loop trains both stages.

    python train.py                                       the whole recipe in small -> runs/demo/
    python train.py prefinetune|finetune DATA[:WEIGHT]... --init DIR|HUB-ID|tiny --out DIR
    torchrun --nproc-per-node N train.py finetune ...     the same gradient on N processes
    python train.py evaluate --model DIR --beir DIR
    python train.py plot runs/*                           loss and dev curves -> a PNG
    python train.py ablate labels|rerank|formats|...      the paper's tables in small

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
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
    convert_classification,
    formatted,
    read_labelled,
    read_qrels,
    read_records,
)
from engine.files import (
    InputError,
    add_flags,
    at_least,
    beir_file,
    file_beside,
    first_line,
    flag,
    from_flags,
    read_jsonl,
    read_passages,
    run,
    say,
    write_jsonl,
)
from engine.packed import length_batches
from engine.runs import Run, digest, read_metrics, save_into, whole_rows
from engine.scale import all_reduce_sum, derive_seed, processes
from engine.search import topk
from gecko import (
    FORMATS,
    PLAIN,
    Gecko,
    fetch,
    format_query,
    is_bag,
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
    measure = (lambda: means(retrieval_scores(rankings(model, dev, "question answering"), dev))) if dev else None
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
    if model.cut and processes()[0] == 0:
        tqdm.write(f"{model.cut} of {len(tokens)} texts are cut at {max_length} tokens", file=sys.stderr)
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
        fret.Offline(corpus, seed=seed), corpus, drawn, seed), drawn, "generate")
    queries = fret.read_queries(out / "queries.jsonl", corpus)
    first = copy.deepcopy(pre)
    mixture = [1.0, n.pair_weight]                                   # generated queries, pairs
    train(first, "prefinetune", [queries, pairs], replace(c, steps=n.steps, lr=n.lr), mixture, "first embedder")
    save(first, out / "seed")
    save(pre, out / "pre")                                           # where the rows of `ablate` start

    print("3.2  FRet, step 2: the top 20, ranked twice, fused, relabelled")
    judge = fret.Offline(corpus, first, seed)                        # the same "LLM" ranks, by QL and by RC
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
# prints, the paper's tables in small, the command line.
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
# Measures


def ndcg(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 10) -> float:
    """nDCG@k with linear gains, as BEIR computes it; relevant: {id: grade}.

    >>> ndcg(["b", "a"], {"a": 1})
    0.6309297535714575
    """
    gains = [relevant.get(x, 0) / math.log2(r + 1) for r, x in enumerate(ranked[:k], 1)]
    ideal = [g / math.log2(r + 1) for r, g in enumerate(sorted(relevant.values(), reverse=True)[:k], 1)]
    return sum(gains) / (sum(ideal) or 1)


def recall(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 100) -> float:
    """Share of the relevant ones that are among the first k."""
    return len(set(ranked[:k]) & set(relevant)) / max(1, len(relevant))


def mrr(ranked: Sequence[Any], relevant: dict[Any, int], k: int = 10) -> float:
    """1 / rank of the first relevant one, 0 if it is not among the first k."""
    return next((1 / r for r, x in enumerate(ranked[:k], 1) if x in relevant), 0.0)


def spearman_terms(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """One term a pair, whose mean is the rank correlation; equal values share their mean rank.

    >>> spearman_terms([1, 2, 3], [10, 20, 15]).round(2).tolist()
    [1.5, 0.0, 0.0]
    """
    def standard_ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
        ranks = (np.cumsum(count) - (count - 1) / 2)[inverse]        # (n)
        return (ranks - ranks.mean()) / ranks.std()

    return standard_ranks(x) * standard_ranks(y)                     # (n)


def interval(gains: Sequence[np.ndarray], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95 % interval of a mean gain, by bootstrap: seeds and queries are drawn again, with replacement.

    gains: for each set (seeds, queries), paired differences; a set counts as much as another.
    """
    rng, S = np.random.default_rng(seed), len(gains[0])
    # how often each seed and each query was drawn, as a share: a mean's weights
    by_seed = rng.multinomial(S, np.full(S, 1 / S), draws) / S       # (draws, S) shares
    means = np.zeros(draws)
    for g in gains:
        Q = g.shape[1]
        by_query = rng.multinomial(Q, np.full(Q, 1 / Q), draws) / Q  # (draws, Q)
        means += ((by_seed @ g) * by_query).sum(1) / len(gains)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(y - x), queries drawn again with replacement."""
    return interval([np.asarray(y)[None] - np.asarray(x)[None]])


# --------------------------------------------------------------------------------------------------
# Evaluation: retrieval, similarity


@dataclass
class Beir:
    """A retrieval set: passages, queries that were judged, {query id: {passage id: grade > 0}}."""

    corpus: list[dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> Beir:
    """BEIR's layout: corpus.jsonl, queries.jsonl (either may be .gz), qrels/SPLIT.tsv."""
    corpus = read_passages(beir_file(folder, "corpus.jsonl"))
    qrels = read_qrels(Path(folder) / f"qrels/{split}.tsv")
    queries: dict[str, str] = {}
    for where, row in read_jsonl(beir_file(folder, "queries.jsonl")):
        if str(row.get("_id")) in qrels:
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                raise InputError(f'{where}: no "text"; every query needs one')
            queries[str(row["_id"])] = row["text"]
    if missing := sorted(set(qrels) - set(queries)):
        raise InputError(f"{folder}/qrels/{split}.tsv: query {missing[0]} is not in queries.jsonl")
    return Beir(corpus, queries, qrels)


def rankings(model: Gecko, beir: Beir, task: str, dim: int | None = None,
             progress: str = "", symmetric: bool = False) -> dict[str, list[str]]:
    """The first 100 passages of each query, by id, best first."""
    return nearest_ids(beir, *encoded(model, beir, task, dim, progress, symmetric))


def encoded(model: Gecko, beir: Beir, task: str, dim: int | None = None, progress: str = "",
            symmetric: bool = False, precision: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the queries (Q, dim) and of the passages (P, dim)."""
    texts, titles = ([p[key] for p in beir.corpus] for key in ("text", "title"))
    if symmetric:                                                    # passages are formatted as inputs
        P = model.encode_queries([f"{a} {b}".strip() for a, b in zip(titles, texts, strict=True)], task,
                                 dim=dim, progress=progress, precision=precision)
    else:
        P = model.encode_passages(texts, titles, dim=dim, progress=progress, precision=precision)
    return model.encode_queries(list(beir.queries.values()), task, dim=dim, precision=precision), P


def nearest_ids(beir: Beir, q: np.ndarray, P: np.ndarray) -> dict[str, list[str]]:
    """`rankings` by vectors, (Q, dim) and (P, dim)."""
    _, nearest = topk(q, P, min(101, len(P)))                        # (Q, 101) one may be left out
    return {query: first_100(beir, query, near) for query, near in zip(beir.queries, nearest, strict=True)}


def first_100(beir: Beir, query: str, order: Iterable[int]) -> list[str]:
    """Ids of the first 100 passages of an order, less one that has the query's own id, as BEIR does.

    ArguAna's and Quora's queries stand in their corpus too. Where it is judged relevant, two sets of
    numbers met by chance, and it stays.
    """
    ids = (beir.corpus[i]["_id"] for i in order)
    return list(itertools.islice((i for i in ids if i != query or i in beir.qrels[query]), 100))


def retrieval_scores(ranked: dict[str, list[str]], beir: Beir) -> dict[str, list[float]]:
    """Each measure for each query, in the order of beir.queries."""
    return {name: [measure(ranked[query], beir.qrels[query]) for query in beir.queries]
            for name, measure in (("ndcg@10", ndcg), ("recall@100", recall), ("mrr@10", mrr))}


def means(scores: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each measure over the queries, with four digits."""
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def short_names(paths: Sequence[str | Path], folder: bool = False) -> list[str]:
    """Short names, or those of their folders; the path where two would have one name, and one figure hide another.

    >>> short_names(["a/test", "b/test", "b/dev"]), short_names(["a/test", "b/test"], folder=True)
    (['a/test', 'b/test', 'dev'], ['a', 'b'])
    """
    full = [Path(path).resolve() for path in paths]
    short = [path.parent.name if folder else path.name for path in full]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def read_sts(path: str | Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and human scores of JSONL rows sentence1, sentence2, score."""
    rows: list[tuple[str, str, float]] = []
    for where, row in read_jsonl(path):
        try:
            rows.append((str(row["sentence1"]), str(row["sentence2"]), float(row["score"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: want sentence1, sentence2 and a number score") from error
        if not all(text.strip() for text in rows[-1][:2]) or not math.isfinite(rows[-1][2]):
            raise InputError(f"{where}: want two sentences that are not empty and a finite score")
    a, b, scores = map(list, zip(*rows, strict=True))
    if min(scores) == max(scores):
        raise InputError(f"{path}: all scores are {scores[0]}; a rank correlation needs two that differ")
    return a, b, scores


def sts_terms(model: Gecko, path: str | Path, dim: int | None = None,
              task: str = "semantic similarity") -> np.ndarray:
    """(pairs) terms whose mean is Spearman's correlation of cosine and human score."""
    a, b, scores = read_sts(path)
    x, y = (model.encode_queries(s, task, dim=dim) for s in (a, b))  # (pairs, dim) twice
    return spearman_terms((x * y).sum(1), scores)


# --------------------------------------------------------------------------------------------------
# MTEB (the paper's Table 9, by mteb's own protocol)


# Table 9: the task of each set of MTEB, and whether its targets have the format of inputs.
TABLE_9 = {name: kind for kind, names in {
    ("classification", True): """AmazonCounterfactualClassification AmazonPolarityClassification
        AmazonReviewsClassification Banking77Classification EmotionClassification ImdbClassification
        MassiveIntentClassification MassiveScenarioClassification MTOPDomainClassification
        MTOPIntentClassification ToxicConversationsClassification TweetSentimentExtractionClassification""",
    ("semantic similarity", True): """BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STS22
        STSBenchmark SprintDuplicateQuestions TwitterSemEval2015 TwitterURLCorpus""",
    ("search result", True): """ArxivClusteringP2P ArxivClusteringS2S BiorxivClusteringP2P
        BiorxivClusteringS2S MedrxivClusteringP2P MedrxivClusteringS2S RedditClustering
        RedditClusteringP2P StackExchangeClustering StackExchangeClusteringP2P
        TwentyNewsgroupsClustering QuoraRetrieval""",
    ("question answering", False): """AskUbuntuDupQuestions SciDocsRR CQADupstackRetrieval DBPedia
        FiQA2018 MSMARCO NQ SCIDOCS Touche2020""",
    ("semantic similarity", False): "MindSmallReranking ArguAna",
    ("search result", False): """StackOverflowDupQuestions ClimateFEVER FEVER HotpotQA TRECCOVID
        SummEval""",
    ("fact checking", False): "NFCorpus SciFact",
}.items() for name in names.split()}
# Every other set has what the table has for most of its kind.
KINDS = {"Classification": ("classification", True), "MultilabelClassification": ("classification", True),
         "STS": ("semantic similarity", True), "PairClassification": ("semantic similarity", True),
         "BitextMining": ("semantic similarity", True), "Clustering": ("search result", True),
         "Summarization": ("search result", False)}


def table_9(name: str, kind: str = "Retrieval") -> tuple[str, bool]:
    """The task and symmetry of a set, by the name that mteb or its folder has (scifact, trec-covid).

    >>> table_9("trec-covid"), table_9("my-questions"), table_9("FEVERHardNegatives")
    (('search result', False), ('question answering', False), ('search result', False))
    """
    def bare(name: str) -> str:
        return re.sub(r"\.v\d+$|HardNegatives|Retrieval|[\W\d_]", "", name, flags=re.IGNORECASE).lower()

    found = {bare(n): kind for n, kind in TABLE_9.items()}
    return found.get(bare(name)) or KINDS.get(kind, ("question answering", False))


class ForMteb:
    """A model as mteb's EncoderProtocol asks for it: float32, Table 9's tasks and appendix B's formats."""

    def __init__(self, model: Gecko, name: str, dim: int | None = None, task: str | None = None) -> None:
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        self.model, self.dim, self.task = model, dim, task
        # mteb keeps results by name and revision, so the revision changes with whatever changes them
        revision = hashlib.sha256(repr((model.formats, model.max_length, dim, task)).encode())
        for p in model.encoder.state_dict().values():
            revision.update(p.float().cpu().numpy().tobytes())
        self.mteb_model_meta = ModelMeta.create_empty({
            "name": f"gecko/{name}", "revision": revision.hexdigest()[:16], "max_tokens": model.max_length,
            "embed_dim": dim or model.encoder.config.hidden_size, "similarity_fn_name": ScoringFunction.COSINE})

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """inputs: batches {"text": [...]}, passages with "title" and "body" too -> (texts, dim)."""
        task, symmetric = table_9(task_metadata.name, task_metadata.type)
        all_inputs = list(inputs)
        columns = {key: [x for batch in all_inputs for x in batch[key]] for key in all_inputs[0]}
        if prompt_type is not None and prompt_type.value == "document" and not symmetric:
            return self.model.encode_passages(columns["body"], columns.get("title"), dim=self.dim)
        # as encode_queries, but some of mteb's sets have empty texts
        return self.model.encode([format_query(text, self.task or task, self.model.formats)
                                  for text in columns["text"]], dim=self.dim)

    def similarity(self, x: Any, y: Any) -> Tensor:
        return torch.as_tensor(x) @ torch.as_tensor(y).T             # (B, C)

    def similarity_pairwise(self, x: Any, y: Any) -> Tensor:
        return (torch.as_tensor(x) * torch.as_tensor(y)).sum(-1)     # (B)


def mteb_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks by their names; those of the paper's benchmark as it has them, English; or a benchmark."""
    try:
        import mteb
    except ImportError as error:
        raise InputError("--mteb needs the package mteb; install it: pip install mteb") from error
    standard = {t.metadata.name: t for t in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    benchmarks, tasks = {b.name for b in mteb.get_benchmarks()}, []
    for name in names:
        try:
            if name in standard:
                tasks.append(standard[name])
            else:
                tasks += mteb.get_benchmark(name).tasks if name in benchmarks else [mteb.get_task(name)]
        except KeyError as error:
            raise InputError("--mteb: " + str(error.args[0]).removeprefix("KeyError: ")) from error
    return tasks


def mteb_scores(model: ForMteb, tasks: Sequence[Any], out: str | None = None) -> dict[str, dict[str, float]]:
    """Each task's main score by mteb's protocol; its own JSON under `out`, where a second run goes on."""
    import mteb

    cache, scores = mteb.ResultCache(out) if out else None, {}
    for task in tqdm(tasks, desc="mteb", unit="task", disable=len(tasks) < 2):
        name = task.metadata.name
        try:
            result = mteb.evaluate(model, task, cache=cache, co2_tracker=False, show_progress_bar=False)
        except OSError as error:                                     # what its clients raise without a network
            raise InputError(f"--mteb {name}: its data is not here, nor to be had from the Hugging Face hub "
                             f"({first_line(error)}); run it where there is a network") from error
        scores[name] = {task.metadata.main_score: float(result.task_results[0].get_score())}
    return scores


class BM25:
    """The lexical baseline (Robertson's BM25, Lucene's idf) on title and text."""

    def __init__(self, corpus: Sequence[dict[str, str]], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(fret.terms(f"{p['title']} {p['text']}")) for p in corpus]
        length = np.array([sum(c.values()) for c in counts])         # (P)
        norm = k1 * (1 - b + b * length / length.mean())             # (P)
        found: dict[str, list[tuple[int, float]]] = {}               # passages of a term, with its weight
        for i, c in enumerate(counts):
            for term, tf in c.items():
                found.setdefault(term, []).append((i, tf * (k1 + 1) / (tf + norm[i])))
        self.size, self.postings = len(corpus), {}
        for term, pairs in found.items():
            rows, weights = map(np.array, zip(*pairs, strict=True))
            idf = math.log(1 + (self.size - len(rows) + 0.5) / (len(rows) + 0.5))
            self.postings[term] = rows, weights * idf

    def scores(self, query: str) -> np.ndarray:
        """One score a passage, (P)."""
        out = np.zeros(self.size)
        for term in fret.terms(query):
            if term in self.postings:
                rows, weights = self.postings[term]
                out[rows] += weights
        return out

    def rankings(self, beir: Beir) -> dict[str, list[str]]:
        """The first 100 passages of each query, by id, best first; equal scores in the corpus's order."""
        return {query: first_100(beir, query, np.argsort(-self.scores(text), kind="stable"))
                for query, text in beir.queries.items()}


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


def ladder(out: Path, corpus: list[dict[str, str]], judge: fret.Offline,
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
        found = {str(dim): rankings(model, test, "question answering", dim) for dim in (d, short)} if model \
            else {str(d): BM25(corpus).rankings(test)}               # BM25 has no dimensions
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
    q, P = encoded(first, beir, task, precision=precision)
    if isinstance(judge, fret.Offline):
        judge.vectors = dict(zip(by_id, P, strict=True))             # the same, so not made again
    nearest = {query: ids[:N] for query, ids in nearest_ids(beir, q, P).items()}
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
# The paper's tables in small: each row trains and is measured, with the paper's figures beside it


@dataclass
class Table:
    """One of the paper's tables (section 4), and which of its rows stand above which."""

    columns: tuple[str, ...]                # what the paper measures
    paper: dict[str, tuple[float, ...]]     # its figures for each of our rows; nan, or (), where it has none
    claim: str
    above: list[tuple[str, str, str]]       # (row, row that it beats, in our columns of this name)


LABELS = [f"{p}, {n}" for p in ("p_seed", "p_1") for n in ("none", "sampled", "p_20")]
TABLES = {
    "labels": Table(
        ("BEIR", "STS"), dict(zip(LABELS, ((52.33, 82.66), (51.37, 82.00), (51.96, 82.26),
                                           (53.07, 82.88), (52.60, 82.85), (53.39, 83.14)), strict=True)),
        "the relabelled p_1 beats p_seed beside every negative, and p_20 is its best negative",
        [*((p_1, p_seed, "nDCG") for p_seed, p_1 in zip(LABELS[:3], LABELS[3:], strict=True)),
         ("p_1, p_20", "p_1, none", "nDCG"), ("p_1, p_20", "p_1, sampled", "nDCG")]),
    "rerank": Table(
        ("BEIR",), {"retriever": (51.3,), "QL": (52.8,), "RC": (54.1,), "QL + RC": (56.8,)},
        "the fusion of the two rankings beats either alone",
        [("QL + RC", "QL", ""), ("QL + RC", "RC", ""), ("QL + RC", "retriever", "")]),
    "formats": Table(
        ("BEIR", "STS"), {"unified": (55.5, 84.9), "sentence": (54.5, 85.0), "concatenation": (54.7, 84.8),
                          "no task, no title": ()},
        "the unified format is the best for retrieval",
        [("unified", row, "nDCG") for row in ("sentence", "concatenation", "no task, no title")]),
    "tasks": Table(
        ("MTEB",), {"question answering": (60.32,), "search result": (60.17,), "fact checking": (60.56,),
                    "sentence similarity": (60.30,), "all": (60.70,), "all, uniformly": (60.87,)},
        "rows of all tasks are worth more than as many rows of one task",
        [("all, uniformly", kind, "") for kind in fret.TASKS]),
    "mixture": Table(
        ("MTEB", "classification", "STS"),
        {"FRet": (62.64, 70.26, 83.14), "+ NLI": (63.24, math.nan, 84.74),
         "+ classification": (64.82, 81.00, math.nan), "full": (66.31, 81.17, 85.06)},
        "NLI raises similarity, classification raises classification",
        [("+ NLI", "FRet", "Spearman"), ("+ classification", "FRet", "accuracy")]),
    "dims": Table(
        ("MTEB at 768", "MTEB at 256"), {"without MRL": (), "with MRL": (66.31, 64.37)},
        "Matryoshka keeps the first dimensions good alone",
        [("with MRL", "without MRL", " at ")]),
}
# Table 7 gives the formats of inputs; its targets (silent) are taken to follow.
FORMS = {"unified": FORMATS, "sentence": {"query": "The task is {task}, and the query is {text}",
                                          "passage": "The title is {title}, and the text is {text}"},
         "concatenation": {"query": "{task} {text}", "passage": "{title} {text}"}, "no task, no title": PLAIN}


@dataclass
class Lab:
    """What the rows of a table are made from and measured on."""

    c: TrainConfig
    corpus: list[dict[str, str]]
    rows: list[Record]                      # FRet
    init: Gecko                             # where every row starts
    pairs: list[Record]                     # if any, each row first pre-finetunes on them (eq. 2)
    data: list[list[Record]]                # the sets of `mixture`
    beir: dict[str, Beir]
    task: str                               # of their queries
    sts: Sequence[str] = ()
    classes: Sequence[Sequence[str]] = ()   # (training file, test file)


Case = tuple[Callable[..., list[list[Record]]], dict[str, Any]]  # seed -> training sets; TrainConfig's changes


def cases(name: str, lab: Lab) -> dict[str, Case]:
    """The rows of a table that trains."""
    def some(rows: Sequence[Record], n: int, seed: int) -> list[Record]:
        return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]

    if name == "labels":                                             # all from one mined file
        choices = itertools.product(("seed", "p1"), ("none", "sampled", "last"))
        return {row: (lambda seed, how=how: [fret.labelled(lab.rows, lab.corpus, how[0], how[1], seed)], {})
                for row, how in zip(LABELS, choices, strict=True)}
    if name == "tasks":                                              # as many rows of each
        kinds = {kind: [r for r in lab.rows if r["kind"] == kind] for kind in fret.TASKS}
        n = min(map(len, kinds.values()))
        if not n:
            raise InputError(f"FRet has no rows of some task: {({k: len(v) for k, v in kinds.items()})}")
        return {**{kind: (lambda seed, own=own: [some(own, n, seed)], {}) for kind, own in kinds.items()},
                "all": (lambda seed: [some(lab.rows, n, seed)], {}),
                "all, uniformly": (lambda seed: [[r for own in kinds.values()
                                                  for r in some(own, n // len(kinds), seed)]], {})}
    if name == "mixture":                                            # each set beside those before it
        names = list(TABLES[name].paper) if len(lab.data) == 4 else ["FRet", "+ classification", "full"]
        return {row: (lambda seed, n=n: lab.data[:n], {}) for n, row in enumerate(names, 1)}
    d = lab.init.encoder.config.hidden_size
    changes: dict[str, dict[str, Any]] = {row: {"formats": form} for row, form in FORMS.items()}
    if name == "dims":
        changes = {"without MRL": {"dims": ""}, "with MRL": {"dims": f"{d},{d // 3}"}}
    return {row: (lambda seed: [lab.rows], change) for row, change in changes.items()}


def case_scores(lab: Lab, case: Case, seed: int, title: str, dims: Sequence[int]) -> dict[str, list[float]]:
    """Train a row and measure it: {column: a value for each query, pair or text}."""
    make, change = case
    model, change = copy.deepcopy(lab.init), dict(change)
    model.formats = change.pop("formats", model.formats)
    c = replace(lab.c, seed=seed, **change)
    if lab.pairs:
        train(model, "prefinetune", [lab.pairs], replace(c, lr=0.0), title=f"{title}: pre-finetune")
    train(model, "finetune", make(seed), c, title=title)
    out: dict[str, Any] = {}
    for name, beir in lab.beir.items():                              # encoded once, cut to each of dims
        vectors = encoded(model, beir, lab.task, precision=c.precision)  # (Q, d) and (P, d)
        for dim in dims:
            found = nearest_ids(beir, *(truncate_dim(torch.from_numpy(x), dim).numpy() for x in vectors))
            column = f"nDCG@10 {name}" + f" at {dim}" * (dim < vectors[0].shape[1])
            out[column] = retrieval_scores(found, beir)["ndcg@10"]
    for name, path in zip(short_names(lab.sts, folder=True), lab.sts, strict=True):
        out[f"Spearman {name}"] = sts_terms(model, path)
    tests = short_names([unknown for _, unknown in lab.classes], folder=True)
    for name, (known, unknown) in zip(tests, lab.classes, strict=True):
        out[f"accuracy {name}"] = class_hits(model, known, unknown)
    return out


def class_hits(model: Gecko, known: str, unknown: str, k: int = 5) -> np.ndarray:
    """1 for each text of `unknown` whose label most of its k nearest texts of `known` have, else 0."""
    (x, labels), (y, want) = read_labelled([known]), read_labelled([unknown])
    q, P = (model.encode_queries(texts, "classification") for texts in (y, x))
    _, near = topk(q, P, min(k, len(P)))                             # (texts of unknown, k)
    return np.array([Counter(labels[i] for i in row).most_common(1)[0][0] == label
                     for row, label in zip(near, want, strict=True)], float)


def ablate(name: str, out: Path, key: str, by: str, seeds: Sequence[int],
           run_case: dict[str, Callable[[int], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run what NAME.jsonl has not; a row of another `key` (data and settings) is left alone and not used."""
    path, rows = out / f"{name}.jsonl", []
    write_jsonl(path, done := whole_rows(path))                      # a kill may have left half a line
    for seed in seeds:
        for row, scores in run_case.items():
            same = {"table": name, "row": row, "seed": seed, "key": key}
            old = next((r for r in done if same.items() <= r.items()), None)
            if old is None:
                start = time.time()
                values = {k: [int(x) if x in (0, 1) else x for x in np.round(v, 3).tolist()]
                          for k, v in scores(seed).items()}
                old = {**same, "by": by, "seconds": round(time.time() - start, 1), "cores": os.cpu_count(),
                       "scores": values}
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(old) + "\n")
                means = "  ".join(f"{k} {np.mean(v):.4f}" for k, v in values.items())
                print(f"  {row}, seed {seed}: {means}  ({old['seconds']:.0f} s)", flush=True)
            rows.append(old)
    return rows


def gain(rows: Sequence[dict[str, Any]], row: str, other: str, where: str) -> tuple[float, float, float] | None:
    """Mean of `row` less `other`, in points, and its 95 % interval: in column `where`, or all named like it."""
    by = {(r["row"], r["seed"]): r["scores"] for r in rows}
    seeds = sorted(s for r, s in by if r == row and (other, s) in by)
    columns = by[row, seeds[0]] if seeds else {}
    names = [where] if where in columns else [c for c in columns if where in c]
    if not names or row == other:
        return None
    gains = [100 * np.array([np.subtract(by[row, s][c], by[other, s][c]) for s in seeds]) for c in names]
    return float(np.mean([g.mean() for g in gains])), *interval(gains, draws=1000)


def table_text(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown: the paper's figures, ours (mean and spread over seeds), and what they decide."""
    table, columns = TABLES[name], {c: [c] for c in rows[0]["scores"]}
    if len(columns) > 6:                                             # too wide: the mean of each measure
        columns = {measure: [c for c in columns if c.startswith(measure)] for measure in
                   dict.fromkeys(c.split()[0] for c in columns)}
    names = [row for row in table.paper if any(r["row"] == row for r in rows)]
    seeds = len({r["seed"] for r in rows})
    head = ["row", *(f"paper: {c}" for c in table.columns), *columns, f"mean points over {names[0]}"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in names:
        paper = table.paper[row] or (math.nan,) * len(table.columns)
        cells = [row, *("" if math.isnan(p) else f"{p:.2f}" for p in paper)]
        for own in columns.values():
            points = [100 * np.mean([np.mean(r["scores"][c]) for c in own]) for r in rows if r["row"] == row]
            cells.append(f"{np.mean(points):.1f}" + (f" ± {np.std(points, ddof=1):.1f}" if len(points) > 1 else ""))
        lines.append("| " + " | ".join([*cells, points_text(gain(rows, row, names[0], ""))]) + " |")
    lines += ["", f"The paper: {table.claim}. Here:", ""]
    for row, other, where in table.above:
        found = gain(rows, row, other, where)
        if found is None:
            says = "not measured"
        else:                                                        # an interval with 0 in it decides nothing
            says = "yes" if found[1] > 0 else "no, the reverse" if found[2] < 0 else "not decided"
        column = f" ({where.strip()})" if where else ""
        lines.append(f"- {row} over {other}{column}: {says} {points_text(found)}".rstrip())
    lines += ["", f"{sum(r['seconds'] for r in rows):.0f} s on {rows[0]['cores']} cores, {seeds} seed"
              + "s; ± is their standard deviation" * (seeds > 1) + "; [95 % interval: "
              + "seeds and " * (seeds > 1) + f"queries drawn again]; {rows[0]['by']}."]
    return "\n".join(lines) + "\n"


def points_text(found: tuple[float, float, float] | None) -> str:
    return f"{found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]" if found else ""


def fret_of(out: Path, corpus: Path, init: str | Path, llm: Callable[..., fret.LLM], c: TrainConfig, count: int,
            ) -> None:
    """The recipe's steps 3.2 on a user's own corpus: queries, seed/ and fret.jsonl in `out`, each once."""
    passages = read_passages(corpus)
    write_jsonl(out / "corpus.jsonl", passages)
    count = count or Sizes().queries * len(passages)
    if not (out / "queries.jsonl").is_file():
        fret.write_kept(out / "queries.jsonl", fret.generate(llm(passages), passages, count, c.seed), count,
                        "generate")
    queries = fret.read_queries(out / "queries.jsonl", passages)
    if not (out / "seed").is_dir():
        first = load(init)
        train(first, "prefinetune", [queries], c, title="first embedder")
        save(first, out / "seed")
    if not (out / "fret.jsonl").is_file():
        first = load(out / "seed")
        fret.write_kept(out / "fret.jsonl", fret.mine(llm(passages, first), first, passages, queries, seed=c.seed),
                        len(queries), "mine")


def own_modules(out: Path, corpus: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Classification without labels of anybody's: documentation, and the module that it stands in."""
    rows = [{"text": p["text"][:300], "label": p["title"].split(".")[0]} for p in corpus]
    for n, part in enumerate(("train", "test")):
        write_jsonl(out / f"modules/{part}.jsonl", rows[n::2])
    return str(out / "modules/train.jsonl"), str(out / "modules/test.jsonl")


def rerank_cases(judge: Callable[..., fret.LLM], first: Gecko, sets: dict[str, Beir], task: str,
                 precision: str) -> dict[str, Callable[..., dict[str, Any]]]:
    """The rows of Table 6, the first 100 of each query ranked again; a set is judged once for all rows."""
    @functools.cache
    def scores(name: str) -> dict[str, list[float]]:
        return rerank_scores(judge(sets[name].corpus, first), first, sets[name], 100, task, precision)

    return {row: lambda seed, row=row: {f"nDCG@10 {name}": scores(name)[row] for name in sets}
            for row in TABLES["rerank"].paper}


def files_key(paths: Sequence[str | Path], *settings: Any) -> str:
    """What a row depends on, beside its name and seed: the bytes of its files, and settings."""
    total = hashlib.sha256(repr(settings).encode())
    for path in map(Path, paths):
        for file in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
            total.update(file.read_bytes())
    return total.hexdigest()


def training_cases(args: argparse.Namespace, c: TrainConfig, model: Gecko, mined: Path, own: bool,
                   beir: dict[str, Beir]) -> dict[str, Callable[[int], dict[str, Any]]]:
    """The rows of a table that trains, from the FRet file in `mined` or the files of --data.

    `own`: the model, the corpus or the LLM is the user's, not the recipe's.
    """
    corpus, rows = ([], []) if args.data else (
        read_passages(mined / "corpus.jsonl"), read_records(mined / "fret.jsonl"))
    lab = Lab(c, corpus, rows, init=model, pairs=[], data=[read_records(path) for path in args.data], beir=beir,
              task=args.task, sts=args.sts, classes=args.classes)
    if args.table == "mixture" and not args.data:                    # no NLI without files of it
        modules = own_modules(Path(args.out), lab.corpus)
        lab.classes = [modules, *args.classes]
        lab.data = [lab.rows, list(convert_classification(modules[:1], Counter())),
                    builtin_pairs(lab.corpus, 50_000)]
    if args.table in ("dims", "formats") and not own:                # their change concerns eq. 2 too
        # a query of no letters is a text of no tokens where the format adds none
        lab.pairs = [r for r in builtin_pairs(lab.corpus, Sizes().pairs) if r["query"].strip()]
        lab.init = untrained(lab.corpus, lab.pairs)
    d = model.encoder.config.hidden_size
    dims = [d // part for part in ((1, 3, 6, 12, 24) if args.table == "dims" else (1,)) if part <= d]
    return {row: functools.partial(case_scores, lab, case, title=row, dims=dims)
            for row, case in cases(args.table, lab).items()}


def ablate_command(args: argparse.Namespace) -> None:
    """Find or make the files that the rows come from, run the rows, write the table."""
    c, out, home = checked(from_flags(TrainConfig, args)), Path(args.out), Path(args.corpus or "runs/demo")
    if args.data and args.table != "mixture":
        raise InputError(f"--data: {args.table} is made from FRet; give --data to mixture")
    at_least(1, seeds=args.seeds)
    at_least(0, queries=args.queries)
    for path in args.sts:                                            # a mistake shows before the LLM is paid
        read_sts(path)
    read_labelled(list(itertools.chain(*args.classes)))
    if not args.corpus and not (home / "ladder.json").is_file():
        recipe(home)
    if not args.init and not (home / "pre").is_dir():
        raise InputError(f"{home}/pre: not there; --corpus needs --init, the model that each row starts from")
    folders = args.beir or [home / "questions" if (home / "questions").is_dir() else home]
    beir = {name: read_beir(folder, args.split) for name, folder in zip(short_names(folders), folders, strict=True)}
    init, o = fetch(args.init or home / "pre"), fret.Options(llm=args.llm, model=args.model)
    model, mined = load(init), home
    c = replace(c, lr=c.lr or Sizes().lr * is_bag(model.encoder))

    def llm(corpus: list[dict[str, str]], embedder: Gecko | None = None) -> fret.LLM:
        if o.llm == "offline":
            return fret.Offline(corpus, embedder, c.seed)
        return fret.endpoint(o, str(out / "llm.jsonl"))

    own = bool(args.init) or o.llm != "offline" or not (home / "fret.jsonl").is_file()
    if own and not args.data and args.table != "rerank":
        read_dims(c.dims, model.encoder.config.hidden_size)
        mined = out / f"fret-{files_key([home / 'corpus.jsonl', init], o, c, args.queries)[:8]}"
        fret_of(mined, home / "corpus.jsonl", init, llm, c, args.queries)
    key = files_key([mined / "fret.jsonl", mined / "seed", init, *folders, *args.sts, *args.data,
                     *itertools.chain(*args.classes)], args.table, args.split, args.task, o, replace(c, seed=0))
    say(table=args.table, fret=mined, init=init, sets=", ".join(beir), llm=o.llm, key=key[:8], **vars(c))
    by = f"generated and judged by {o.model or o.llm}"
    if args.table == "rerank":
        by = by.removeprefix("generated and ")
        run_case = rerank_cases(llm, model if args.init else load(home / "seed"), beir, args.task,
                                c.precision)
    else:
        run_case = training_cases(args, c, model, mined, own, beir)
    if args.data:
        by = f"records of {', '.join(Path(path).name for path in args.data)}"
    done = ablate(args.table, out, key, by, range(c.seed, c.seed + args.seeds), run_case)
    text = table_text(args.table, done)
    with file_beside(out / f"{args.table}.md") as new:
        new.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {out}/{args.table}.jsonl and .md; for a chart: python tests/lab/figures.py "
          f"{out}/{args.table}.jsonl")


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


def plot_command(args: argparse.Namespace) -> None:
    """Loss and dev curves of runs, by their metrics.jsonl."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plot needs matplotlib; install it: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    runs = {folder: rows for folder in args.runs if (rows := read_metrics(Path(folder)))}
    if not runs:
        raise InputError(f"{args.runs[0]}: no metrics.jsonl there; give the --out folders of training runs")
    for folder, rows in runs.items():
        losses, dev = [r for r in rows if "loss" in r], [r for r in rows if "dev" in r]
        left.plot([r["step"] for r in losses], [r["loss"] for r in losses], label=folder, linewidth=1)
        right.plot([r["step"] for r in dev], [r["dev"]["ndcg@10"] for r in dev], "o-", label=folder)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="nDCG@10 on dev")
    left.legend()
    with file_beside(args.out) as new:
        figure.savefig(new, dpi=120, format="png")
    print(f"wrote {args.out}: {len(runs)} runs")


def evaluate_command(args: argparse.Namespace) -> None:
    if not args.beir and not args.sts and not args.mteb:
        raise InputError("nothing to evaluate on; give --beir DIR, --sts FILE or --mteb TASK")
    tasks, model = mteb_tasks(args.mteb) if args.mteb else [], load(args.model)
    say(model=args.model, dim=args.dim or model.encoder.config.hidden_size, split=args.split,
        task=args.task or "by Table 9")
    results: dict[str, dict[str, float]] = {}
    for name, folder in zip(short_names(args.beir), args.beir, strict=True):
        beir, (task, symmetric) = read_beir(folder, args.split), table_9(Path(folder).resolve().name)
        nearest = rankings(model, beir, args.task or task, args.dim, "passages", symmetric)
        results[name] = {k: float(np.mean(v)) for k, v in retrieval_scores(nearest, beir).items()}
    for name, path in zip(short_names(args.sts), args.sts, strict=True):
        terms = sts_terms(model, path, args.dim, args.task or table_9(Path(path).stem, "STS")[0])
        results[name] = {"spearman": float(terms.mean())}
    if tasks:
        name = Path(args.model).resolve().name
        results |= mteb_scores(ForMteb(model, name, args.dim, args.task), tasks, args.out)
    for name, values in results.items():
        print(name, "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
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
    plot = commands.add_parser("plot", help="loss and dev curves of runs, as a PNG")
    plot.add_argument("runs", nargs="+", help="--out folders of prefinetune and finetune")
    plot.add_argument("--out", default="runs/plot.png", help="the file to write (%(default)s)")
    ablation = commands.add_parser("ablate", help="one of the paper's tables in small, the paper's figures beside",
                                   epilog="--lr 0 is here the recipe's for a bag of words.")
    ablation.add_argument("table", choices=TABLES, help="which")
    ablation.add_argument("--data", nargs=4, default=[], metavar=("FRET", "NLI", "CLASSIFICATION", "REST"),
                          help="files of records for mixture (default: FRet, docstrings by module, pairs)")
    ablation.add_argument("--out", default="runs/ablate", help="the folder to write (%(default)s)")
    ablation.add_argument("--seeds", type=int, default=1, help="runs of each row, from --seed on (%(default)s)")
    ablation.add_argument("--corpus", help="a BEIR folder of your own (default: the recipe's, runs/demo)")
    ablation.add_argument("--init", help="model folder that rows start from (default: the recipe's, pre-finetuned)")
    ablation.add_argument("--llm", default="offline", help="offline, or an endpoint's URL (%(default)s)")
    ablation.add_argument("--model", default="", help="the LLM's name at the endpoint")
    ablation.add_argument("--queries", type=int, default=0, help="to generate; 0: as the recipe, by corpus size")
    ablation.add_argument("--classes", nargs=2, action="append", default=[], metavar=("TRAIN", "TEST"),
                          help="JSONL or CSV of text, label: accuracy of the nearest TRAIN texts' label")
    add_flags(ablation, TrainConfig, skip=("unified", "eval", "save_every", "resume"))
    ablation.set_defaults(**vars(replace(SMALL, steps=Sizes().steps // 8)))
    for command in (evaluate, ablation):
        command.add_argument("--beir", action="append", default=[], help="a BEIR folder; may be repeated")
        command.add_argument("--sts", action="append", default=[], help="JSONL of sentence1, sentence2, score")
        command.add_argument("--split", default="test", help="qrels/SPLIT.tsv (%(default)s)")
    evaluate.add_argument("--task", help="the task of all sets (default: by the set's name, Table 9)")
    ablation.add_argument("--task", default="question answering", help="the queries' task (%(default)s)")
    args = parser.parse_args()
    if args.command is None:
        recipe(Path(args.out), args.seed)
    elif sys.argv[1] != args.command:                                # argparse would drop it without a word
        raise InputError(f"{sys.argv[1]} before {args.command}: there it is the recipe's; put it after the command")
    else:
        {"evaluate": evaluate_command, "plot": plot_command, "ablate": ablate_command}.get(
            args.command, train_command)(args)


if __name__ == "__main__":
    run(main)
