"""A batch larger than memory, on any number of processes: the gradient of the plain loss, in parts.

Gradient caching embeds a batch a few texts at a time, the blockwise loss scores a few rows at a time. Both
call the functions that they are given, and autograd takes every gradient. No equation stands here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.packed import length_batches

# S sides (inputs, positives, hard negatives), B rows of all processes, d the vectors' dimension.

BLOCK = 16 << 20   # bytes of one (rows, B) matrix of scores, of which a loss holds about eight at a time


def cached_backward(
    embed: Callable[[Tensor], Tensor],     # ids of n texts -> their vectors (n, d), with a graph
    loss: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    # vectors (S, B, d) and some of the rows -> these rows' share of the loss, its gradient (S, B, d)
    ids: Tensor,                           # (S, B) ids of the texts, -1 where a row has none
    tokens: Sequence[Sized],               # of every text
    micro_batch: int,                      # texts of mean length to embed at a time; 0: all
    d: int,
    parameters: Sequence[torch.nn.Parameter],
    seed: Sequence[int],                   # of this step's dropout
) -> Tensor:                               # the loss, scalar
    """Replaces embedding all texts, the loss and loss.backward(): the same gradient, in bounded memory.

    Gradient caching (Gao et al. 2021): embed all texts without a graph, take the loss's gradient on the
    vectors, embed each micro-batch again, with the same dropout, and hand it its part of that gradient.
    Of several processes each embeds and scores its own rows, against everybody's vectors.
    """
    S, B = ids.shape
    rank, size = processes()
    rows = slice(B * rank // size, B * (rank + 1) // size)           # this process's rows
    parts = own_parts(ids, rows, tokens, micro_batch)                # places among the rows of x below
    ids = ids.flatten()                                              # (S * B)
    # EXERCISE 9 (about 18 lines)
    last = len(parts) - 1

    def embed_part(n: int) -> Tensor:                                # (texts of part n, d)
        torch.manual_seed(derive_seed(*seed, rank, n))               # the second time, the same dropout
        return embed(ids[parts[n]])

    x = torch.zeros(S * B, d, dtype=parameters[0].dtype, device=ids.device)  # (S * B, d)
    for n, part in enumerate(parts):
        with torch.set_grad_enabled(n == last):                      # of the last alone the graph is kept
            vectors = embed_part(n)
        x[part] = vectors.detach().to(x.dtype)
    all_reduce_sum(x)                                                # now every process has all vectors
    value, g = loss(x.view(S, B, d), rows)
    all_reduce_sum(value)
    all_reduce_sum(g)                                                # what others' rows say about my texts
    for n in reversed(range(len(parts))):
        if n < last:
            vectors = embed_part(n)
        vectors.backward(g.view(S * B, d)[parts[n]].to(vectors.dtype))
    # END EXERCISE
    for p in parameters:                                             # each process has its texts' part
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        all_reduce_sum(p.grad)
    return value


def own_parts(ids: Tensor, rows: slice, tokens: Sequence[Sized], micro_batch: int) -> list[Tensor]:
    """The places of these rows' texts, of all S * B, in groups of like length: the micro-batches."""
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)   # (S, B)
    places = places[:, rows][ids[:, rows] >= 0]                      # (n)
    lengths = [len(tokens[i]) for i in ids.flatten()[places].tolist()]
    budget = micro_batch * sum(lengths) // max(1, len(lengths)) or sys.maxsize   # in tokens
    return [places[part] for part in length_batches(lengths, budget)]


def blockwise_loss(
    loss: Callable[..., Tensor],                # of S tensors (B, dim) with unit rows: the mean over `rows`
    truncate: Callable[[Tensor, int], Tensor],  # (B, d) -> (B, dim), then to length 1
    dims: Iterable[int],
    x: Tensor,                                  # (S, B, d) vectors, not of length 1
    rows: slice,                                # whose loss is taken, each against all B
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:                     # these rows' share of the loss; its gradient on x (S, B, d)
    """Replaces the sum of the loss over dims and its backward to x: no B x B matrix, some rows at a time.

    Vectors are cut and normalised once for each of dims: blocks add to the gradient on these unit vectors,
    which then goes through the normalisation once.
    """
    S, B, _ = x.shape
    value, g = x.new_zeros(()), x.new_zeros(0)                       # g: (S, B, d)
    for dim in sorted(dims, reverse=True):                           # the largest while there is no g yet
        units = [truncate(side, dim).requires_grad_() for side in x]     # S of (B, dim)
        for some in blocks(rows, block // (B * x.element_size())):
            share = loss(*units, rows=some) * ((some.stop - some.start) / B)
            share.backward()
            value += share.detach()
            del share                                                # its graph holds the units
        g = g if len(g) else torch.zeros_like(x)
        for k in range(S):
            unit = units.pop(0)
            if unit.grad is None:                                    # of a process without rows
                continue
            for some in blocks(slice(0, B), 1024):
                vectors = x[k, some].detach().requires_grad_()       # (1024, d)
                through, = torch.autograd.grad(truncate(vectors, dim), vectors, unit.grad[some])
                g[k, some] += through
    return value, g


def blocks(rows: slice, size: int) -> Iterator[slice]:
    """The rows in slices of that size, at least of one row."""
    size = max(1, size)
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def processes() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def start_processes() -> None:
    """Under torchrun: join the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a long timeout, because the others wait while the first process evaluates
        dist.init_process_group(backend, timeout=timedelta(hours=6))


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(x: Tensor) -> None:
    """Sum over all processes, in place; the same bytes on each."""
    if dist.is_initialized():
        dist.all_reduce(x)


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, step), which no other numbers give."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
