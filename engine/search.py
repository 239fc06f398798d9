"""Exact search: the ids and scores of `nearest` in gecko.py, bit for bit, faster and in bounded memory.

1. A cheap product (bfloat16 where the hardware has it) finds more candidates than k for each query.
2. The candidates are scored as `nearest` scores. The best k of them are the answer if no other passage
   can reach them. That is the certificate: the cheap product is off by at most `error_bound`.
3. A query whose certificate fails is searched again in float32, from the score that it has so far.

On a CUDA device the same steps run with torch's own products. That has not been measured on a GPU.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.files import InputError

# Shapes: Q queries in all, n of one block, P passages, C of one block, d dimensions, k neighbours,
#         m candidates of a query; `found` is the number of scores above their query's floor.

ROWS = 1024                  # queries of one block
SPARE = 24                   # candidates of a bfloat16 product beyond 2 k
GROUP = 32                   # passages whose best score is looked at first
BLOCK_BYTES = 8 << 20        # of one block of scores on a CPU, so that it stays in the cache

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bfloat16(device: torch.device) -> bool:
    """True where a bfloat16 product is faster than a float32 one."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and ONEDNN and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x y^T + bias: (n, d), (c, d), (c) -> (n, c)."""
    if ONEDNN and x.device.type == "cpu" and (x.dtype == torch.float32 or has_bfloat16(x.device)):
        # MKL, which `F.linear` would use, takes twice as long on AMD's processors
        return torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "none")
    return F.linear(x, y, bias)                                      # (n, c)


# --------------------------------------------------------------------------------------------------
# The search


def topk(
    queries: np.ndarray | Tensor,   # (Q, d)
    passages: np.ndarray | Tensor,  # (P, d), may be a memory map
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` for any number of passages: scores and indices (Q, k), whatever the blocks."""
    return certified_topk(queries, passages, k)[:2]


@torch.no_grad()
def certified_topk(
    queries: np.ndarray | Tensor,      # (Q, d)
    passages: np.ndarray | Tensor,     # (P, d)
    k: int,
    budget: int = 0,                   # bytes of one block of scores; 0: as many as the device likes
    dtype: torch.dtype | None = None,  # of the first product; None: the fastest
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`topk`, and (Q) true where the first search was proven right.

    For a block of queries, `candidates` gives passages and, as proof, what no other passage's score
    is above; `ranked` has the candidates' exact scores. Where the k-th is not above the proof,
    another passage may belong before it, or tie with it: `search_again` finds all of these.
    """
    Q, P = len(queries), len(passages)
    if not 1 <= k <= P:
        raise InputError(f"k = {k} neighbours of {P} passages: give 1 to {P}")
    assert queries.shape[1:] == passages.shape[1:], (queries.shape, passages.shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(passages, Tensor):
        device = passages.device
    queries, passages = as_tensor(queries), as_tensor(passages)
    if dtype is None:
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    if not budget:
        budget = torch.cuda.mem_get_info(device)[0] // 8 if device.type == "cuda" else BLOCK_BYTES
    m = min(P, 2 * k + SPARE if dtype == torch.bfloat16 else k + 8)
    # subtle: once a block just below 32 MiB was freed, glibc keeps smaller ones, whose pages need no faults (10 %)
    torch.empty(31 << 20, dtype=torch.uint8)
    scores = np.zeros((Q, k), np.float32)
    indices = np.zeros((Q, k), np.int64)
    proven = np.zeros(Q, bool)
    # EXERCISE 10 (about 11 lines)
    for start in range(0, Q, ROWS):
        q = block(queries, start, start + ROWS, device)              # (n, d)
        which, proof = candidates(q, passages, m, dtype, budget)     # (n, m), (n)
        best, ids = ranked(q, passages, which, k)                    # (n, k) twice
        sure = best[:, -1] > proof                                   # (n)
        for unsure in torch.where(~sure)[0].split(64):
            if len(unsure):
                floor = best[unsure, -1]                             # (unsure)
                best[unsure], ids[unsure] = search_again(q[unsure], passages, k, floor, budget)
        rows = slice(start, start + len(q))
        scores[rows], indices[rows], proven[rows] = best.cpu(), ids.cpu(), sure.cpu()
    # END EXERCISE
    return scores, indices, proven


def candidates(
    q: Tensor,         # (n, d)
    passages: Tensor,  # (P, d)
    m: int,
    dtype: torch.dtype,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """The m passages of largest product in `dtype`, (n, m), and what no other's score exceeds, (n)."""
    n, d = q.shape
    P = len(passages)
    q_norm = norms(q)                                                # (n)
    p_norm = q.new_zeros(())                                         # the largest so far
    q = q.to(dtype)                                                  # (n, d)
    columns = min(16384, budget // (n * q.element_size()))           # of one block, but at least m
    columns = max(columns, m + GROUP) // GROUP * GROUP
    for start in range(0, P, columns):
        p = block(passages, start, start + columns, q.device)        # (C, d)
        p_norm = torch.maximum(p_norm, norms(p).max())
        s = product(p.to(dtype), q)                                  # (C, n)
        if start == 0:
            best, which = s.T.topk(m, dim=1)                         # (n, m) twice
            continue
        # only what is above the m-th best so far can still come in
        row, column = above(s, best[:, -1])                          # (found) twice
        best, which = appended(best, which, row, column + start, s[column, row])
        best, order = best.topk(m, dim=1)                            # (n, m) twice
        which = which.gather(1, order)                               # (n, m)
    if m == P:                                                       # there is no other passage
        return which, torch.full_like(q_norm, -torch.inf)
    highest = best[:, -1].float()                                    # (n)
    return which, highest + error_bound(q_norm, p_norm, highest, d, dtype)


def ranked(
    q: Tensor,         # (n, d)
    passages: Tensor,  # (P, d)
    which: Tensor,     # (n, m) candidates of each query
    k: int,
) -> tuple[Tensor, Tensor]:
    """The best k candidates, scored and ordered as in `nearest`: (n, k) twice."""
    which = which.sort(dim=1).values                                 # (n, m) so that ties go by index
    _, m = which.shape
    _, d = q.shape
    rows = max(1, (1 << 18) // (m * d))                              # at a time, which stay in the cache
    parts = []
    for some_q, some in zip(q.split(rows), which.split(rows), strict=True):
        p = passages[some.to(passages.device)].to(q.device, torch.float32)   # (rows, m, d)
        parts.append(exact_dot(some_q[:, None], p))                  # (rows, m)
    scores, order = torch.cat(parts).sort(dim=1, descending=True, stable=True)  # (n, m) twice
    return scores[:, :k], which.gather(1, order[:, :k])              # (n, k)


def exact_dot(x: Tensor, y: Tensor) -> Tensor:
    """x . y over the last dimension, summed in float64, rounded to float32; y has the product's shape.

    subtle: no BLAS, whose last bits change with blocks and alignment; here each sum is taken alone.
    """
    return y.to(torch.float64, copy=True).mul_(x.double()).sum(-1).float()


def search_again(
    q: Tensor,         # (n, d) a few queries
    passages: Tensor,  # (P, d)
    k: int,
    floor: Tensor,     # (n) their k-th best scores, or less
    budget: int,
) -> tuple[Tensor, Tensor]:
    """`nearest` for these queries: (n, k) twice.

    Every passage whose float32 product comes within its own error of the floor is scored exactly.
    """
    n, d = q.shape
    q_norm = norms(q)                                                # (n)
    best = q.new_empty(n, 0)                                         # (n, <= k)
    which = torch.empty(n, 0, dtype=torch.long, device=q.device)     # (n, <= k)
    columns = max(GROUP, budget // (n * d) // GROUP * GROUP)         # few: any pair may have to be scored
    for start in range(0, len(passages), columns):
        p = block(passages, start, start + columns, q.device)        # (C, d)
        p_norm = norms(p).max()
        error = error_bound(q_norm, p_norm, floor, d, torch.float32)  # (n)
        row, column = above(product(p, q), floor - 2 * error)        # (found) twice
        score = exact_dot(q[row], p[column])                         # (found)
        best, which = appended(best, which, row, column + start, score)
        # a stable sort: the passages stand in ascending order, so that ties go by index
        best, order = best.sort(dim=1, descending=True, stable=True)
        best = best[:, :k]                                           # (n, <= k)
        which = which.gather(1, order[:, :k])                        # (n, <= k)
        if best.shape[1] == k:
            floor = torch.maximum(floor, best[:, -1])                # (n)
    return best, which


# --------------------------------------------------------------------------------------------------
# Its parts


def above(
    s: Tensor,      # (C, n)
    floor: Tensor,  # (n)
) -> tuple[Tensor, Tensor]:
    """All scores above their query's floor: row and column, (found) each.

    Rows ascend, and columns within a row. The maximum of a group of passages is compared first,
    because few groups hold anything.
    """
    if bool((floor >= 0).all()):
        # subtle: the bits of floats from 0 on are in the order of the floats, those of floats below
        # 0 are negative integers, and integers are compared faster; + 0 makes 0 of -0
        integers = torch.int16 if s.dtype == torch.bfloat16 else torch.int32
        s, floor = s.view(integers), (floor + 0).view(integers)
    floor = floor[:, None]                                           # (n, 1)
    if len(s) % GROUP:
        row, column = torch.where(s.T > floor)                       # (found) twice
        return row, column
    s = s.view(-1, GROUP, s.shape[1])                                # (groups, GROUP, n)
    row, group = torch.where(s.amax(1).T > floor)                    # (groups found) twice
    members = s.permute(2, 0, 1)[row, group]                         # (groups found, GROUP)
    i, place = torch.where(members > floor[row])                     # (found) twice
    return row[i], group[i] * GROUP + place


def appended(
    best: Tensor,   # (n, w)
    which: Tensor,  # (n, w)
    row: Tensor,    # (found) of what was found, ascending
    index: Tensor,  # (found)
    score: Tensor,  # (found)
) -> tuple[Tensor, Tensor]:
    """The tables with what was found put behind each row: (n, w + most found).

    A row that found fewer is filled up with scores of -inf.
    """
    n = len(best)
    count = torch.bincount(row, minlength=n)                         # (n)
    first = count.cumsum(0) - count                                  # (n) where a row's part begins
    place = torch.arange(len(row), device=row.device) - first[row]   # (found)
    new_best = best.new_full((n, int(count.max())), -torch.inf)      # (n, most found)
    new_which = which.new_zeros(new_best.shape)                      # (n, most found)
    new_best[row, place] = score
    new_which[row, place] = index
    return torch.cat([best, new_best], 1), torch.cat([which, new_which], 1)


def error_bound(
    q_norm: Tensor,  # (n)
    p_norm: Tensor,  # scalar, the largest
    s: Tensor,       # (n)
    d: int,
    dtype: torch.dtype,
) -> Tensor:         # (n)
    """The most by which q . p can be above its product in `dtype` where that is at most s.

    Rounding to bfloat16 moves each number by 2^-8 of itself or less, so a score by 2.01 * 2^-8 |q| |p|.
    """
    short = torch.minimum(q_norm, p_norm) < 2.0 ** -40               # (n) float32 may lose such numbers' products
    q_norm = q_norm * 1.001                                          # (n) it is rounded too, as p_norm is
    error = 2.0 ** -22 * (d + 8) * q_norm * p_norm                   # (n) adding d products in float32, twice
    if dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest":
        error += 2.01 * 2.0 ** -8 * q_norm * p_norm                  # q and p rounded
        error += s.abs() * 2.0 ** -7.9                               # the sum rounded
    return error.masked_fill(short, torch.inf)                       # not proven, so scored exactly


def norms(x: Tensor) -> Tensor:
    """The length of each row, (n, d) -> (n); the bounds above hold for finite, moderate ones."""
    norm = torch.linalg.vector_norm(x, dim=1)                        # (n)
    if not bool((norm < 2.0 ** 60).all()):                           # nor is one that is not a number
        raise InputError("a vector is not finite, or too long to be compared; encode its text again")
    return norm


def block(x: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows start to stop in float32 on the device; oneDNN is a hundred times slower on strided ones."""
    return x[start:stop].to(device, torch.float32).contiguous()      # (stop - start, d)


def as_tensor(x: np.ndarray | Tensor) -> Tensor:
    """The same memory as a tensor; a read-only memory map is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.as_tensor(x)
